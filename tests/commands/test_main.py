"""commands/__main__.py: the console script `diffusers-vdm`, its help, and its error messages."""

import subprocess
import sys

import pytest

from diffusers_vdm.commands.__main__ import COMMANDS, main
from tests.running import run_command


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"]):
        main(arguments)
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS) and "accelerate launch -m" in text


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2 and "'trian' is not a command" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    """The help takes 0.1 s; importing torch and diffusers would take three."""
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["card", "."],
        ["sample", "--model", "no"],
        ["evaluate", "--model", "no", "--output", "r.json"],
        ["convert", "official", "no", "out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_model_that_does_not_exist_is_an_error_without_a_traceback(tmp_path, arguments):
    paths = [argument if argument.startswith("--") or i == 0 or argument == "official" else str(tmp_path / argument)
             for i, argument in enumerate(arguments)]  # fmt: skip
    done = run_command(*paths)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(tmp_path) in done.stderr.strip()
