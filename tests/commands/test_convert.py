"""The command `convert`: its help, and models that do not exist."""

import pytest

from diffusers_vdm.commands import convert
from tests.conversion.converted import ddpm_pipeline
from tests.paths import ROOT
from tests.running import run_example


@pytest.mark.parametrize("command", ["", "official", "addtt", "diffusers", "to-official", "to-addtt"])
def test_help_of_every_conversion_names_the_output_folder(command, capsys):
    with pytest.raises(SystemExit) as caught:
        convert.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "OUTPUT_FOLDER" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_exist_is_an_error_of_one_line():
    done = run_example("convert.py", "official", "no/such", "folder", check=False, cwd=ROOT)
    assert done.returncode == 1 and "conversion official: no/such does not exist" in done.stderr


@pytest.mark.parametrize("path", ["runs/my model", "./missing", "a/b/c"])
def test_a_pipeline_that_does_not_exist_is_refused(path, tmp_path):
    ddpm_pipeline().save_pretrained(tmp_path / "ddpm")
    message = "neither a local folder nor a valid Hub name"
    for arguments in ([path], [str(tmp_path / "ddpm"), "--scheduler", path]):
        with pytest.raises(SystemExit, match=message):
            convert.main(["diffusers", arguments[0], str(tmp_path / "out"), *arguments[1:]])
    with pytest.raises(SystemExit, match=message):
        convert.main(["to-official", path, str(tmp_path / "out")])
