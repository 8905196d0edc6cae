"""The documentation is correct: its code runs, its commands parse, and its names, paths and links exist."""

import importlib.util
import pkgutil
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffusers_vdm
from diffusers_vdm.diffusers_schedulers import EXPORTABLE
from tests.models import tiny_preset
from tests.paths import DIGITS_MODEL, ROOT
from tests.rooms import ROOMS
from tests.text_models import text_pipeline

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    `mark` is the HTML comment above it, which names the test that runs it, or the reason that none does.
    """

    page: str
    language: str
    code: str
    mark: str | None


def blocks_of(page: str, text: str) -> list[Block]:
    pattern = r"(?:^<!-- ((?:not run|run by)[^\n]*) -->\n)?^```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)
    return [Block(page, language, code, mark or None) for mark, language, code in found]


BLOCKS = [block for page, text in PAGES.items() for block in blocks_of(page, text)]


def python_of(page: str) -> list[str]:
    return [b.code for b in BLOCKS if b.page == page and b.language == "python" and b.mark is None]


# ---- every block -------------------------------------------------------------------------------------------------


def test_the_reader_of_blocks_sees_marks_and_languages():
    text = "a\n<!-- not run: a reason -->\n```\nx\n```\n<!-- another -->\n```python\ny\n```\n"
    assert blocks_of("p", text) == [Block("p", "", "x\n", "not run: a reason"), Block("p", "python", "y\n", None)]


def test_every_block_is_of_a_kind_that_a_test_reads():
    assert all(text.count("```") == 2 * len([b for b in BLOCKS if b.page == page]) for page, text in PAGES.items())
    assert {b.language for b in BLOCKS} == {"", "python", "yaml"}
    for block in BLOCKS:
        if block.mark is not None:
            assert re.fullmatch(r"not run: .{10,}|run by tests/[\w/]+\.py\b.*", block.mark), block
            assert block.language != "python" or compile(block.code, block.page, "exec")
        for name in re.findall(r"tests/[\w/]+\.py", block.mark or ""):
            assert (ROOT / name).is_file()
    # the pages whose code is run by a test below
    assert {b.page for b in BLOCKS if b.language == "python" and b.mark is None} == {
        "README.md", "docs/training.md", "docs/measuring.md", "docs/samplers.md", "docs/few_steps.md",
        "docs/compressing.md", "docs/conditions.md", "docs/ranking.md",
    }  # fmt: skip


# ---- code --------------------------------------------------------------------------------------------------------


def random_images(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = diffusers_vdm.MonotoneGammaNetwork(gamma_min=-7.5, gamma_max=5.0)
    scheduler = diffusers_vdm.VDMScheduler.from_noise_schedule(schedule)
    diffusers_vdm.VDMPipeline(tiny_preset(), scheduler, schedule, num_levels=17).save_pretrained("runs/digits")
    sample, likelihood = python_of("README.md")
    assert all(sum(bool(line) for line in code.splitlines()) <= 6 for code in (sample, likelihood))
    scope = {}
    exec(sample.replace("250", "2"), scope)
    assert len(scope["images"]) == 16 and scope["images"][0].size == (8, 8) and Path("digit.png").is_file()
    scope = {}
    exec(likelihood, scope)
    assert scope["result"].num_images == 16 and scope["result"].bpd > scope["result"].stderr_bpd > 0


def test_the_code_about_measuring_runs(generator):
    [code] = python_of("docs/measuring.md")
    scope = {
        "unet": tiny_preset("cifar10"),
        "scheduler": diffusers_vdm.VDMScheduler(),
        "test_uint8": random_images(generator),
    }
    exec(code.replace("1000", "3").replace("25)", "2)").replace("test_uint8)", "test_uint8, rtol=1, atol=1)"), scope)
    assert scope["ode"].num_images == 2 and len(scope["timesteps"]) == 2


def test_the_code_about_few_steps_runs(tmp_path, monkeypatch):
    [code] = python_of("docs/few_steps.md")
    monkeypatch.chdir(tmp_path)
    pipe = diffusers_vdm.VDMPipeline(tiny_preset(), diffusers_vdm.VDMScheduler(gamma_min=-7.5), num_levels=17)
    pipe.save_pretrained("runs/digits")
    scope = {}
    exec(code.replace("16, num", "2, num").replace("10", "3").replace("split.images", "split.images[:2]"), scope)
    assert scope["images"][0].size == (8, 8) and scope["result"].variance_type == "optimal"
    assert scope["result"].num_steps == 3 and scope["table"].detail == "pixel"


def test_the_code_about_compressing_runs(tmp_path, monkeypatch):
    code, of_classes = python_of("docs/compressing.md")
    monkeypatch.chdir(tmp_path)
    diffusers_vdm.VDMPipeline.from_pretrained(DIGITS_MODEL).save_pretrained("runs/digits")
    scope = {}
    exec(code.replace("num_steps=100", "num_steps=20, verify=False"), scope)
    classes = diffusers_vdm.VDMPipeline(tiny_preset(num_class_embeds=10), diffusers_vdm.VDMScheduler(), num_levels=17)
    classes.save_pretrained("runs/classes")
    exec(of_classes.replace("class_labels=labels)\n", "class_labels=labels, num_steps=2, verify=False)\n", 1), scope)
    assert load_file("labels.safetensors")["class_labels"].equal(scope["labels"])
    summary = scope["summary"]
    assert summary.num_images == 297 and summary.bound_bpd - 0.1 < summary.marginal_bpd < summary.file_bpd < 3


# diffusers passes float64 tensors to NumPy in a way that NumPy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
def test_the_code_about_training_and_samplers_runs(tmp_path, monkeypatch, generator):
    monkeypatch.chdir(tmp_path)
    images = random_images(generator)
    scope = {"images_uint8": images, "test_uint8": images}
    [training], [samplers] = python_of("docs/training.md"), python_of("docs/samplers.md")
    exec(training, scope)
    assert scope["out"].total.shape == (2,) and scope["result"].num_images == 2
    scope |= {"pipe": diffusers_vdm.VDMPipeline.from_pretrained("my-vdm")}
    exec(samplers, scope)
    assert type(scope["pipe"].scheduler).__name__ == "UniPCMultistepScheduler"
    sample = python_of("README.md")[0]
    exec(sample.replace("runs/digits", "my-vdm").replace("250", "2").replace("16", "1"), scope)
    assert scope["images"][0].size == (32, 32)


def test_the_conditions_of_the_page_run():
    schedule = diffusers_vdm.FixedLinearGamma(-7.5, 5.0)
    classes = {"num_class_embeds": 10, "null_class": True}
    pipe = diffusers_vdm.VDMPipeline(
        tiny_preset(**classes), diffusers_vdm.VDMScheduler.from_noise_schedule(schedule), None, 17
    )
    pipe.set_progress_bar_config(disable=True)
    texts, guided, measured = python_of("docs/conditions.md")
    scope = {"pipe": text_pipeline()}
    exec(texts.replace("scale=3.0", "scale=3.0, num_inference_steps=2"), scope)
    assert len(scope["images"]) == 4
    scope = {"pipe": pipe, "earlier_unet": tiny_preset(seed=1, **classes).eval()}
    exec(guided.replace("scale=2.0", "scale=2.0, num_inference_steps=2"), scope)
    assert len(scope["images"]) == 4
    labels = torch.tensor([3, 5])
    scope |= {"bound": diffusers_vdm.VariationalBound(pipe.unet, schedule, num_levels=17), "labels": labels}
    scope["images"] = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    exec(measured.replace("64", "4"), scope)
    assert scope["result"].class_bits.shape == (2, 10)


def test_the_code_about_ranking_writes_levels(tmp_path, monkeypatch):
    [code] = python_of("docs/ranking.md")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    from diffusers_vdm.data.images import load_images

    letters = load_images("letters", "test", is_folder=True, label_column="", progress_bar=False)
    assert letters.images.shape == (234, 1, 8, 8) and int(letters.images.max()) == 16
    assert len(letters.images.flatten(1).unique(dim=0)) == 234


# ---- commands ----------------------------------------------------------------------------------------------------


def commands_of(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [words for b in BLOCKS if not b.language and b.mark is None for words in commands_of(b.code)]
# those within sentences; names of commands without options are no commands
PROGRAMS = r"accelerate launch|diffusers-vdm|python|make|pytest|pip install|(?:train|evaluate|sample)\.py"
SENTENCES = re.sub(r"^```.*?^```$", "", EVERYTHING, flags=re.DOTALL | re.MULTILINE)
INLINE = [shlex.split(text) for text in re.findall(rf"`((?:{PROGRAMS}) [^`…]+)`", SENTENCES)]


def run_parser(name: str, arguments: list[str]) -> None:
    """Reads the arguments of one of our commands; `SystemExit` with code 2 if it does not take them."""
    from diffusers_vdm.commands import (
        calibrate,
        card,
        classify,
        compress,
        convert,
        decompress,
        evaluate_options,
        inspect,
        rank,
        sample,
        train_options,
    )  # fmt: skip

    if name == "train":
        train_options.parse_options("", ["--output_dir", "does-not-exist", *arguments])
    elif name == "evaluate":
        evaluate_options.parse_options("", arguments)
    elif name == "calibrate":
        calibrate.parse_options(
            [*arguments, "--output", "c.json"]
        )  # else the folder, which is the reader's, must exist
    elif name in ("sample", "compress", "classify", "rank"):
        {"sample": sample, "compress": compress, "classify": classify, "rank": rank}[name].parse_options(arguments)
    elif name in ("decompress", "inspect"):
        file = arguments[arguments.index("--input") + 1] if name == "decompress" else arguments[0]
        Path(file).touch()  # the reader's
        {"decompress": decompress, "inspect": inspect}[name].parse_options(arguments)
    elif name == "convert":
        convert.parse_options(arguments)
    elif name == "card":
        with pytest.raises(SystemExit, match=r"diffusers-vdm card: folder must contain a saved pipeline"):
            card.main(arguments)  # the folder is the reader's
    elif name in ("edit_images", "upscale_images"):
        assert arguments[0] == "--model" and arguments[2:] in ([], ["--images", "*.png"])
    else:
        assert name == "env" and not arguments


def check_command(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):.*?## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets
    elif program == "pip":
        check_installation(arguments)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(arguments[1:])
        script = launch.training_script
        if launch.module:
            assert importlib.util.find_spec(script)
            name = script.removeprefix("diffusers_vdm.commands.")
        else:
            assert (ROOT / script).is_file()
            name = Path(script).stem
        run_parser(name, launch.training_script_args)
    elif program == "python" and arguments[:2] == ["-m", "diffusers_vdm.conversion"]:
        run_parser("convert", arguments[2:])
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
        if arguments[0] == "benchmarks/race.py":
            spec = importlib.util.spec_from_file_location("race", ROOT / arguments[0])
            race = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(race)
            options = race.parse_options(arguments[1:])
            assert {name for _, name, _ in race.runs_of(options)} >= set(options.names or ())
            return
        assert arguments[0].startswith("examples/")
        run_parser(Path(arguments[0]).stem, arguments[1:])
    elif program.endswith(".py"):
        run_parser(program.removesuffix(".py"), arguments)
    elif program == "diffusers-vdm":
        if arguments != ["--help"]:
            run_parser(arguments[0], arguments[1:])
    else:
        assert program == "pytest", f"no test knows {program!r}"
        assert all((ROOT / word).exists() for word in arguments if not word.startswith("-"))


def check_installation(arguments: list[str]) -> None:
    import configparser

    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert arguments[0] == "install"
    for word in arguments[1:]:
        wheel = f"diffusers_vdm-{diffusers_vdm.__version__}-py3-none-any.whl"
        source, extra = re.fullmatch(r"(.*?)(?:\[(\w+)\])?", word).groups()
        assert source in ("-e", ".", wheel, f"dist/{wheel}"), word
        assert extra is None or extra in config["options.extras_require"], word
    assert config["metadata"]["version"] == diffusers_vdm.__version__


def text_of(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize("words", COMMANDS, ids=text_of)
def test_the_commands_of_the_pages_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("faces", "letters", "emoji"):  # these folders are the reader's
        (tmp_path / folder).mkdir()
    check_command(words)


@pytest.mark.parametrize("words", INLINE, ids=text_of)
def test_the_commands_within_sentences_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {("diffusers-vdm",): words[1:2], ("accelerate", "launch", "-m"): words[3:4], ("python", "-m"): words[2:3]}
    for start, rest in names.items():
        if tuple(words) == (*start, *rest):  # a name alone: it exists
            from diffusers_vdm.commands.__main__ import COMMANDS as KNOWN

            assert rest[0] in KNOWN or importlib.util.find_spec(rest[0])
            return
    check_command(words)


def test_the_commands_are_found():
    scripts = [text_of(words) for words in COMMANDS]
    assert sum("examples/evaluate.py" in script for script in scripts) >= 3
    assert sum("examples/train.py" in script for script in scripts) >= 5
    assert len(INLINE) >= 10


@pytest.mark.parametrize(
    "words",
    [["make", "tset"], ["python", "examples/smaple.py"], ["diffusers-vdm", "sample", "--modle", "x"], ["rm", "x"],
     ["accelerate", "launch", "examples/train.py", "--preset", "cifar11"], ["pip", "install", ".[tests]"]],
    ids=text_of,
)  # fmt: skip
def test_a_wrong_command_is_noticed(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, SystemExit)):
        check_command(words)


def test_the_configuration_of_fsdp_has_options_of_accelerate():
    from accelerate.commands.launch import launch_command_parser

    [block] = [b for b in BLOCKS if b.language == "yaml"]
    config = yaml.safe_load(block.code)
    assert config["distributed_type"] == "FSDP" and config["fsdp_config"]["fsdp_version"] == 2
    for name in config["fsdp_config"]:
        assert f"--{name}" in launch_command_parser()._option_string_actions


# ---- names, paths, links -----------------------------------------------------------------------------------------


def test_the_table_of_paper_and_code_names_what_exists():
    rows = re.findall(r"^\|.*\| (`[^|]*`) \| ([\w., /]+\.py) \|$", README, flags=re.MULTILINE)
    assert len(rows) > 12
    for names, files in rows:
        modules = [
            importlib.import_module(f"diffusers_vdm.{f.strip()[:-3].replace('/', '.')}") for f in files.split(",")
        ]
        for name in re.findall(r"`(\w+)", names):
            assert any(hasattr(module, name) for module in modules), (name, files)


def test_every_public_class_is_in_the_documentation():
    prose = EVERYTHING.replace(PAGES["docs/api.md"], "")
    missing = [n for n in diffusers_vdm.__all__ if n[0].isupper() and n not in prose and n not in
               ("NoiseSchedule", "TableGamma", "UNET_PRESETS", "MULTISCALE_PRESETS")]  # fmt: skip
    assert missing == []


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: diffusers_vdm\.([\w.]+)$", PAGES["docs/api.md"], flags=re.MULTILINE)
    for name, module in diffusers_vdm._MODULE_OF.items():
        assert f"{module}.{name}" in listed
    for name in listed:
        pkgutil.resolve_name(f"diffusers_vdm.{name}")


def test_the_table_of_schedulers_is_what_can_be_exported():
    rows = dict(re.findall(r"^\| `(\w+Scheduler)` \| (.*) \|$", PAGES["docs/samplers.md"], flags=re.MULTILINE))
    assert rows == EXPORTABLE


def test_the_presets_are_those_of_train():
    [text] = re.findall(r"The presets are (.*?)\. ", PAGES["docs/training.md"].replace("\n", " "))
    assert set(re.findall(r"`([\w-]+)`", text)) == {*diffusers_vdm.UNET_PRESETS, *diffusers_vdm.MULTISCALE_PRESETS}


def test_the_rooms_of_the_architecture_are_those_of_the_layout_test():
    table = PAGES["docs/architecture.md"].partition("| room | imports from |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\w+) \| (.*) \|$", table, flags=re.MULTILINE)
    assert {room: set(others.split(", ")) - {"–"} for room, others in rows} == ROOMS


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 180


def test_the_files_that_are_named_exist():
    found = set(re.findall(r"`((?:diffusers_vdm|docs|tests|examples|benchmarks|\.ci)/[\w./-]+)`", EVERYTHING))
    assert len(found) > 15
    assert not [name for name in found if not (ROOT / name).exists()]


def slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs make of a heading in English."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_links_lead_to_pages_and_headings_that_exist():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 30
    for page, link in links:
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), (page, link)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), (page, link)


# ---- the site, and the files of the repository -------------------------------------------------------------------


def test_the_site_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in config["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert config["strict"] is True
    assert all(f"]({page})" in PAGES["docs/index.md"] for page in listed if page != "index.md")
    assert all(f"](docs/{page})" in README for page in listed)


def test_docstrings_become_lists():
    pytest.importorskip("griffe", reason="the docs extra is not installed")
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import docstrings
    finally:
        sys.path.remove(str(ROOT / "docs"))
    text = "See [`VDMPipeline`].\n\nArgs:\n    a, b (`int`): two\n        lines.\n    c: one.\n\nReturns: [`X`]."
    expected = (
        "See [`VDMPipeline`][diffusers_vdm.pipeline.VDMPipeline].\n\n\n**Args:**\n\n- **a, b** (`int`): two\n"
        "    lines.\n- **c**: one.\n\n\n**Returns:** `X`."
    )
    assert docstrings.to_markdown(text) == expected


def test_the_workflow_calls_make_and_nothing_else():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    for line in runs:
        check_command(shlex.split(line))
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    targets = re.findall(r"^make --no-print-directory ([\w-]+)", script, flags=re.MULTILINE)
    assert targets[-1].startswith("test") and "docs" in targets  # the last line that it prints is pytest's summary
    assert set(targets) < {line.split()[1] for line in runs}


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_the_forms_of_issues_are_whole(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    labels = [field["attributes"].get("label", "") for field in form["body"]]
    assert name != "bug_report" or any("diffusers-vdm env" in label for label in labels)


def test_the_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[([\d.]+)\] - ([\d-]+)$", changes, flags=re.MULTILINE)[0]
    assert version == citation["version"] == diffusers_vdm.__version__
    assert date == str(citation["date-released"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [ruff] = [repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert f"\nruff=={ruff.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
