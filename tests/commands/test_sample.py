"""The command `sample`: its arguments, models that do not exist, and the images that it draws."""

import pytest
import torch
from PIL import Image

from diffusers_vdm import FixedLinearGamma, VDMScheduler
from diffusers_vdm.commands import sample
from tests.models import pipeline
from tests.running import metrics_of, run_example

WRONG = [
    (["--num_images", "0"], "--num_images must be positive"),
    (["--num_images", "2.5"], "invalid int value"),
    (["--batch_size", "-1"], "--batch_size must be positive"),
    (["--num_inference_steps", "0"], "--num_inference_steps must be positive"),
    (["--rtol", "nan"], "--rtol must be positive"),
    (["--rtol", "inf"], "--rtol must be positive"),
    (["--class_labels"], "expected at least one argument"),
    (["--class_labels", "0.9"], "invalid int value"),
    (["--class_labels", "3", "-1"], "--class_labels must be class indices"),
    (["--decode", "draw"], "invalid choice"),
    (["--dtype", "float8"], "invalid choice"),
    (["--seed", "1.5"], "invalid int value"),
    (["--output", "samples"], "--output must name an image file"),
    (["--output", "samples.txt"], "--output must name an image file"),
    (["--output", "samples.fits"], "--output must name an image file"),  # which Pillow reads and does not write
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.parse_options(["--model", "m", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "path"), [("images_dir", "file"), ("images_dir", "file/inside"), ("output", "folder.png")]
)
def test_places_that_cannot_be_written_are_refused(tmp_path, capsys, option, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit):
        sample.parse_options(["--model", "m", f"--{option}", str(tmp_path / path)])
    assert f"--{option} must" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_devices_that_do_not_exist_are_refused(name):
    with pytest.raises(ValueError, match="--device must be available") as error:
        sample.choose_device(name)
    assert "\n" not in str(error.value)
    assert sample.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("model", ["runs/my model", "./missing", "/abs/missing", "a/b/c"])
def test_a_model_that_does_not_exist_is_refused(model):
    with pytest.raises(OSError, match="neither a local folder nor a valid Hub name") as error:
        sample.sample(sample.parse_options(["--model", model, "--device", "cpu"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampler", [None, "ode", "ddim", "EulerDiscreteScheduler"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_labels_are_checked_for_every_sampler(sampler, tmp_path):
    pipe = pipeline(VDMScheduler(), FixedLinearGamma(), num_class_embeds=3)
    pipe.save_pretrained(tmp_path / "model")
    common = ["--model", str(tmp_path / "model"), "--device", "cpu", "--output", str(tmp_path / "grid.png")]
    common += ["--num_images", "3", "--batch_size", "2", "--num_inference_steps", "2", "--rtol", "0.5"]
    common += [] if sampler is None else ["--sampler", sampler]
    for labels, message in ((["0", "3"], r"within \[0, 3\)"), (None, "class_labels must be given")):
        with pytest.raises(ValueError, match=message):
            sample.sample(sample.parse_options(common + (["--class_labels", *labels] if labels else [])))
    assert not (tmp_path / "grid.png").exists()
    sample.sample(sample.parse_options([*common, "--class_labels", "0", "2", "--images_dir", str(tmp_path / "each")]))
    assert len([*(tmp_path / "each").iterdir()]) == 3
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 8


@pytest.mark.parametrize("sampler", [None, "ode", "EulerDiscreteScheduler"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_sampler_is_guided(sampler, tmp_path, capsys):
    pipeline(VDMScheduler(), FixedLinearGamma(), num_class_embeds=3, null_class=True).save_pretrained(
        tmp_path / "model"
    )
    grid = tmp_path / "grid.png"
    common = ["--model", str(tmp_path / "model"), "--device", "cpu", "--output", str(grid), "--class_labels", "1"]
    common += ["--num_images", "2", "--num_inference_steps", "3", "--rtol", "0.1"]
    common += [] if sampler is None else ["--sampler", sampler]

    def drawn(*more: str) -> bytes:
        sample.sample(sample.parse_options([*common, *more]))
        return grid.read_bytes()

    plain = drawn()
    assert "guidance" not in capsys.readouterr().out
    guided = drawn("--guidance_scale", "30")
    assert "scale 30" in capsys.readouterr().out and guided != plain
    assert drawn("--guidance_scale", "30", "--guidance_interval", "50", "60") == plain
    # a model is no direction away from itself
    assert drawn("--guidance_scale", "1.5", "--autoguidance", str(tmp_path / "model")) == plain
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        drawn("--guidance_scale", "nan")
    with pytest.raises(ValueError, match="guidance_interval has no effect with guidance_scale=1"):
        drawn("--guidance_interval", "-1", "1")


# ---- the pipeline that train.py left -----------------------------------------------------------------------------


def test_images_are_drawn_as_a_grid_and_one_by_one(trained_run, tmp_path):
    grid = tmp_path / "grids" / "s.png"
    done = run_example("sample.py", "--model", trained_run[0], "--num_images", 3, "--batch_size", 2,
                       "--num_inference_steps", 4, "--output", grid, "--images_dir", tmp_path / "each", "--decode",
                       "sample", new_process=True)  # fmt: skip
    assert grid.exists() and len(list((tmp_path / "each").iterdir())) == 3
    assert f"{metrics_of(trained_run[0])[-1]['eval_bpd']:.4f}" in done.stdout


@pytest.mark.parametrize(("sampler", "printed"), [("UniPCMultistepScheduler", "4 steps"), ("ode", "ODE, rtol 0.1")])
def test_the_sampler_is_printed(trained_run, tmp_path, sampler, printed):
    done = run_example("sample.py", "--model", trained_run[0], "--num_images", 2, "--num_inference_steps", 4,
                       "--sampler", sampler, "--rtol", 0.1, "--output", tmp_path / "s.png")  # fmt: skip
    assert printed in done.stdout
