"""benchmarks/: the commands that others run on their machines, here with tiny networks."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from diffusers_vdm.training.scaling import FITTED_BATCHES, FITTED_FLOPS, RULE
from tests.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_report.py"


def script(name):
    """A script of the folder, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_scaling_rule_is_the_fit_of_the_stored_runs(capsys):
    race = script("race")
    found = race.fit(json.loads((ROOT / "benchmarks/results/race.json").read_text(encoding="utf-8")))
    for parameters in (250_000, 1_000_000, 2_200_000):
        for images in (10_000, 50_000, 200_000):
            assert found.expected_bpd(parameters, images) == pytest.approx(
                RULE.expected_bpd(parameters, images), abs=2e-3
            )
    assert found.error_bpd == pytest.approx(RULE.error_bpd, abs=2e-3)
    assert found.critical_batch == pytest.approx(RULE.critical_batch, rel=1e-2)
    assert " 24,510 images" not in capsys.readouterr().out  # those of the digits


def test_the_fitted_flops_are_those_of_the_stored_runs():
    race = script("race")
    rows = race.fitted_rows(json.loads((ROOT / "benchmarks/results/race.json").read_text(encoding="utf-8")))
    flops = [row["flops"] for row in rows]
    assert (min(flops), max(flops)) == pytest.approx(FITTED_FLOPS, rel=2e-3)
    batches = {round(row["flops"] / row["steps"] / 1.157e9) for row in rows if row["name"].startswith("fast-batch")}
    assert max(batches) == FITTED_BATCHES[1]


def test_a_name_of_the_race_runs_where_it_is_an_entry_and_unknown_ones_are_refused(capsys):
    race = script("race")
    found = race.runs_of(race.parse_options(["--names", "fast-16", "--seeds", "0", "1"]))
    assert found == [("cifar10", "fast-16", 0), ("cifar10", "fast-16", 1)]
    assert {d for d, name, _ in race.runs_of(race.parse_options(["--names", "default"]))} == {"cifar10", "digits"}
    with pytest.raises(SystemExit):
        race.parse_options(["--datasets", "digits", "--names", "fast-16"])
    names = "'default', 'fast', 'fast-3x3', 'fast-classes', 'fast-classes-3x3', 'fast-no-"
    assert f"--names must be among [{names}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "-1"], "--budget must be positive and finite, got -1"),
        (["--budget", "nan"], "--budget must be positive and finite, got nan"),
        (["--seeds", "0", "-1"], "--seeds must not be negative, got -1"),
        (["--figure", "none/race.png"], "--figure must be a .png file in an existing folder"),
        (["--figure", "race.xyz"], "--figure must be a .png file in an existing folder"),
        (["--fit", "--only_plot"], "not allowed with argument"),
        (["--only_plot", "--output", "none.json"], "--output none.json is no list of rows"),
        (["--fit", "--output", "broken.json"], "--output broken.json is no list of rows"),
        (["--output", "other.json"], "--output other.json is no list of rows"),
        (["--fit", "--output", "empty.json"], "--fit needs at least seven runs"),
        (["--only_plot", "--output", "empty.json"], "has no rows of --datasets and --names"),
    ],
)
def test_wrong_arguments_of_the_race_start_nothing_and_write_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    race = script("race")
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "["), ("other", '{"rows": []}'), ("empty", "[]")):
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["race.py", *arguments])
    with pytest.raises(SystemExit) as end:
        race.main()
    assert message in f"{end.value} {capsys.readouterr().err}"
    assert {path.name for path in tmp_path.iterdir()} == {"broken.json", "other.json", "empty.json"}


def test_the_table_and_the_figure_have_the_entries_that_are_asked_for(tmp_path, monkeypatch, capsys):
    race = script("race")
    figure = tmp_path / "race.png"
    options = ["--only_plot", "--datasets", "digits", "--names", "fast", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["race.py", *options])
    race.main()
    printed = capsys.readouterr().out
    assert "| digits | fast |" in printed and "cifar10" not in printed and "fast-classes" not in printed
    with Image.open(figure) as picture:
        assert picture.size[0] > 2 * picture.size[1]  # one row of two panels


def test_a_part_of_the_report_that_is_cut_off_leaves_no_process(tmp_path, monkeypatch):
    """As the race, which starts train.py: a child that goes on keeps the output open, and the report waits for it."""
    report = script("gpu_report")
    monkeypatch.setattr(report, "BENCHMARKS", tmp_path)
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    start = time.monotonic()
    result = report.run(["parent.py"], None, limit=3.0)
    assert result["error"] == "stopped after 3 s" and time.monotonic() - start < 30


@pytest.mark.slow
def test_every_part_of_the_report_runs_and_is_recorded(tmp_path):
    file = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--output", str(file)]
    subprocess.run(command, check=True, timeout=500, capture_output=True)
    report = json.loads(file.read_text())
    parts = {"train_step", "compilation", "train_loop", "evaluation", "race"}
    assert report["machine"]["torch"] and set(report["parts"]) == parts
    assert {name: part["error"] for name, part in report["parts"].items()} == dict.fromkeys(report["parts"])
    assert report["parts"]["train_step"]["results"]["variants"]["bf16"]["speed_over_port"]
    assert report["parts"]["compilation"]["results"]["speedup"] > 0
    assert "ratio_median" in report["parts"]["evaluation"]["output"]
    [row] = [row for row in report["parts"]["race"]["results"] if row["is_last"]]
    assert row["num_images"] == 297 and row["flops"] > 0 and row["process_seconds"] > 0


def test_a_machine_without_a_gpu_is_told_so_at_once(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "report.json")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and "--tiny --device cpu" in done.stderr and not (tmp_path / "report.json").exists()
