"""console.py: every command and its help print in any encoding, and files are always UTF-8."""

import io
import json
import sys
import unicodedata

import pytest

from diffusers_vdm import console
from tests.paths import ROOT
from tests.running import run_python

ENCODINGS = ["cp1252", "ascii", "latin-1", "utf-8"]
CONVERSION = ["-m", "diffusers_vdm.conversion"]
HELP = {
    "train": ["examples/train.py", "--help"],
    "evaluate": ["examples/evaluate.py", "--help"],
    "sample": ["examples/sample.py", "--help"],
    "convert": ["examples/convert.py", "--help"],
    "conversion": [*CONVERSION, "--help"],
    **{name: [*CONVERSION, name, "--help"] for name in ("official", "addtt", "diffusers", "to-official", "to-addtt")},
}
DEFAULT = ("train", "evaluate", "sample", "official")  # in the default suite, in one encoding


def run(encoding, *arguments):
    """A command whose output goes to a file, and which warns of files that it opens without naming an encoding."""
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1"}
    options = {"text": False, "encoding": None, "timeout": 400, "check": False}
    return run_python(*arguments, cwd=ROOT, environment=environment, **options)


def unnamed_encodings(done):
    """Files of ours that were opened without an encoding, by the warnings of `PYTHONWARNDEFAULTENCODING`."""
    lines = done.stderr.decode(errors="replace").splitlines()
    ours = (str(ROOT / "diffusers_vdm"), str(ROOT / "examples"))  # an environment may lie in the checkout
    return [line for line in lines if "EncodingWarning" in line and line.startswith(ours)]


@pytest.mark.parametrize(
    ("page", "encoding"),
    [
        pytest.param(page, encoding, marks=[pytest.mark.slow] * (encoding != "ascii" or page not in DEFAULT))
        for page in HELP
        for encoding in (ENCODINGS if page in DEFAULT else ["ascii"])
    ],
)
def test_help_in_any_encoding(page, encoding):
    done = run(encoding, *HELP[page])
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    text = done.stdout.decode(encoding)
    assert "usage" in text and "?" not in text.replace("?)", "") and not unnamed_encodings(done)
    if encoding == "ascii":
        assert page not in ("train", "official") or "gamma" in text
    elif encoding == "utf-8":  # nothing is lost
        assert page not in ("train", "evaluate", "official") or any(c in text for c in "γ×ε")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_every_command_works_in_any_encoding(tmp_path, encoding, digits_pipeline):
    config = ["--model_config_name_or_path", digits_pipeline / "unet", "--train_batch_size", 4, "--max_train_steps", 2]
    few = ["--eval_samples", 1, "--num_images", 1, "--ddpm_num_inference_steps", 2, "--logger", "none"]
    trained = run(encoding, "examples/train.py", "--output_dir", tmp_path / "run", *config, *few)
    refused = run(encoding, "examples/train.py", "--output_dir", tmp_path / "x", "--objective", "ddpm", "--schedule",
                  "learned")  # fmt: skip
    report = ["--output", tmp_path / "r.json", "--split", "test[:5]", "--num_samples", 2]
    evaluated = run(encoding, "examples/evaluate.py", "--model", tmp_path / "run", *report, "--table", 3)
    grid = ["--num_images", 2, "--num_inference_steps", 2, "--output", tmp_path / "s.png"]
    sampled = run(encoding, "examples/sample.py", "--model", tmp_path / "run", *grid)
    converted = run(encoding, *CONVERSION, "official", tmp_path / "nothing-γ", tmp_path / "new")
    assert [d.returncode for d in (trained, refused, evaluated, sampled, converted)] == [0, 2, 0, 0, 1]
    for done in (trained, refused, evaluated, sampled, converted):
        printed = (done.stdout + done.stderr).decode(encoding)
        assert "Traceback" not in printed and "UnicodeEncodeError" not in printed and not unnamed_encodings(done)
    sign = "±" if encoding != "ascii" else "+/-"
    assert f" {sign} " in evaluated.stdout.decode(encoding) and f" {sign} " in sampled.stdout.decode(encoding)
    assert "inf" in evaluated.stdout.decode(encoding) and "gamma" in refused.stderr.decode(encoding)
    for name in ("options.json", "metrics.jsonl"):
        for line in (tmp_path / "run" / name).read_text(encoding="utf-8").splitlines()[: 1 if "l" in name[-1] else 0]:
            json.loads(line)


def test_every_character_of_the_package_has_an_ascii_form():
    """Each character of the package and the examples has an ASCII form that is no question mark."""
    sources = [*(ROOT / "diffusers_vdm").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    used = {c for path in sources for c in path.read_text(encoding="utf-8") if ord(c) > 127}
    assert len(used) > 20
    for character in used:
        plain = console._in_ascii(character)
        assert plain.isascii() and (plain or unicodedata.combining(character)) and plain != "?", character


EXPECTED = {"utf-8": "γ ± ε̂ é …", "latin-1": "gamma ± eps é ...", "ascii": "gamma +/- eps e ..."}


def test_streams_keep_the_characters_that_they_can_encode(monkeypatch):
    for encoding, expected in EXPECTED.items():
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # no stream of bytes: left as it is
        console.tolerate_any_encoding()
        print("γ ± ε̂ é …", end="", flush=True)
        assert raw.getvalue().decode(encoding) == expected
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    console.tolerate_any_encoding()
    print("a\udcffb 日", end="", flush=True)  # a file name that is no UTF-8
    assert raw.getvalue().decode() == "a?b 日"
