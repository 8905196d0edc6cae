"""The console script `diffusers-vdm`: what it lists and runs, how quickly it answers, and what it says of mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_vdm.commands.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]


def run(*arguments, **more):
    command = [sys.executable, "-m", "diffusers_vdm.commands", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False, **more)


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"]):
        main(arguments)
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS) and "accelerate launch -m" in text


def test_a_command_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2 and "'trian' is not a command" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    """That is what makes it quick: 0.1 s here, where torch and diffusers take three."""
    code = (
        "import sys\n"
        "from diffusers_vdm.commands.__main__ import main\n"
        "try:\n"
        f"    main([{name!r}, '--help'])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'accelerate', 'datasets', 'transformers', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stderr.strip() == "[]" and "usage: " in done.stdout


def test_the_environment_for_a_bug_report():
    done = run("env")
    assert done.returncode == 0, done.stderr
    for name in ("diffusers_vdm", "torch", "diffusers", "Python", "CPU", "CUDA"):
        assert f"\n  {name}" in f"\n{done.stdout}"


def test_errors_are_one_line(tmp_path):
    for arguments in (
        ["card", tmp_path],
        ["sample", "--model", tmp_path / "no"],
        ["evaluate", "--model", tmp_path / "no", "--output", tmp_path / "r.json"],
        ["convert", "official", tmp_path / "no", tmp_path / "out"],
    ):
        done = run(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert str(tmp_path) in done.stderr.strip()


def test_a_card_that_was_edited_stays(tmp_path):
    from test_saved_before import FIXTURE

    folder = tmp_path / "run"
    folder.mkdir()
    for source in (FIXTURE / "run").rglob("*"):
        target = folder / source.relative_to(FIXTURE / "run")
        if source.is_dir():
            target.mkdir(exist_ok=True)
        elif source.name != "README.md":
            target.write_bytes(source.read_bytes())
    done = run("card", folder, "--license", "mit")
    assert done.returncode == 0 and "written: " in done.stdout, done.stderr
    card = folder / "README.md"
    assert "license: mit" in card.read_text(encoding="utf-8") and "6.326044443063438" in card.read_text(
        encoding="utf-8"
    )
    card.write_text("mine", encoding="utf-8")
    done = run("card", folder)
    assert done.returncode == 1 and "--overwrite" in done.stderr and card.read_text(encoding="utf-8") == "mine"
    assert run("card", folder, "--overwrite").returncode == 0 and "license" not in card.read_text(encoding="utf-8")
