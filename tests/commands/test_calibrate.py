"""The command `calibrate`, and the options of `evaluate` and `sample` that use its table."""

import json
import shutil
from importlib import import_module

import pytest
import torch

from diffusers_vdm import Calibration, VDMPipeline
from tests.running import run_command, run_example

SMALL = ("--num_images", 20, "--num_gammas", 9, "--num_threads", 1)


@pytest.fixture(scope="module")
def calibrated(trained_run, tmp_path_factory):
    """A copy of a trained model with a table in its scheduler, and what the command printed."""
    folder = tmp_path_factory.mktemp("models") / "calibrated"
    shutil.copytree(trained_run[0], folder)
    done = run_command("calibrate", "--model", folder, "--detail", "pixel", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_scheduler_of_the_model_holds_the_table(calibrated, trained_run):
    folder, printed = calibrated
    before, after = (VDMPipeline.from_pretrained(f).scheduler for f in (trained_run[0], folder))
    table = after.calibration
    assert before.calibration is None and table.mse.shape == (9, 1, 8, 8) and table.num_images == 20
    assert table.data == "scikit-learn digits, 1500 training" and after.config.variance == "posterior"
    assert torch.equal(after.alphas_cumprod, before.alphas_cumprod)
    assert "mse_eps of 20 images of scikit-learn digits, 1500 training" in printed
    assert len(after.best_timesteps(5)) == 5


@pytest.mark.slow
def test_a_file_holds_the_table_and_leaves_the_model_as_it_is(trained_run, tmp_path):
    config = trained_run[0] / "scheduler" / "scheduler_config.json"
    before = config.read_bytes()
    done = run_command("calibrate", "--model", trained_run[0], "--output", tmp_path / "c.json", *SMALL)
    assert done.returncode == 0, done.stderr
    table = Calibration.from_json(json.loads((tmp_path / "c.json").read_text()))
    assert table.detail == "level" and config.read_bytes() == before


@pytest.mark.slow
def test_evaluate_measures_with_the_best_variance_and_timesteps(calibrated, tmp_path):
    reports = {}
    for name, options in {
        "plain": (),
        "best": ("--timesteps", "best"),
        "optimal": ("--timesteps", "best", "--variance", "optimal"),
    }.items():
        path = tmp_path / f"{name}.json"
        run_example("evaluate.py", "--model", calibrated[0], "--method", "vlb", "--num_steps", 4, *options,
                    "--split", "test[:20]", "--output", path)  # fmt: skip
        reports[name] = json.loads(path.read_text())
    assert reports["plain"]["variance_type"] == "fixed_small" and reports["plain"]["num_steps"] == 4
    assert reports["optimal"]["variance_type"] == "optimal" and reports["optimal"]["num_steps"] == 4
    assert reports["optimal"]["bpd"] < reports["best"]["bpd"] < reports["plain"]["bpd"]
    record = reports["optimal"]["calibration"]
    assert record["detail"] == "pixel" and record["num_images"] == 20 and record["data"].endswith("1500 training")
    assert len(reports["optimal"]["timesteps"]) == 4 and record["num_shared_images"] == 0


@pytest.mark.slow
def test_evaluate_takes_the_table_from_a_file(calibrated, trained_run, tmp_path):
    table = VDMPipeline.from_pretrained(calibrated[0]).scheduler.calibration
    (tmp_path / "c.json").write_text(json.dumps(table.to_json()))
    values = []
    for model, options in ((calibrated[0], ()), (trained_run[0], ("--calibration", tmp_path / "c.json"))):
        path = tmp_path / "r.json"
        run_example("evaluate.py", "--model", model, "--method", "vlb", "--num_steps", 3, "--split", "test[:20]",
                    "--variance", "optimal", "--timesteps", "best", *options, "--output", path)  # fmt: skip
        values.append(json.loads(path.read_text())["per_image_bpd"])
    assert values[0] == values[1]


@pytest.mark.slow
def test_sample_takes_the_best_timesteps_and_variance(calibrated, tmp_path):
    options = ("--model", calibrated[0], "--num_images", 4, "--num_inference_steps", 3)
    for more in ((), ("--best_timesteps", "--variance", "optimal")):
        path = tmp_path / f"{len(more)}.png"
        run_example("sample.py", *options, *more, "--output", path)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "3.png").read_bytes()


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("calibrate", ("--model", "user/x"), "--model must be a folder that VDMPipeline saved"),
        ("calibrate", ("--model", "MODEL", "--output", "c.txt"), "--output must name a .json file"),
        ("calibrate", ("--model", "MODEL", "--output", "c.json", "--variance", "optimal"), "--variance changes"),
        ("calibrate", ("--model", "MODEL", "--num_gammas", "1"), "--num_gammas must be within"),
        ("calibrate", ("--model", "MODEL", "--split", "all"), "--split of the digits must be train, test"),
        ("evaluate", ("--model", "MODEL", "--timesteps", "best", "--method", "vlb"), "best needs --num_steps"),
        ("evaluate", ("--model", "MODEL", "--variance", "optimal"), "--variance needs --method vlb"),
        ("evaluate", ("--model", "MODEL", "--method", "vlb", "--calibration", "no.json"), "--calibration must name"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(trained_run, capsys, command, options, message):
    words = [str(trained_run[0]) if word == "MODEL" else word for word in options]
    with pytest.raises(SystemExit):
        import_module(f"diffusers_vdm.commands.{command}").main(words)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_best_steps_of_pixels_are_refused_before_anything_is_measured(calibrated, tmp_path):
    options = ("--method", "vlb", "--num_steps", 900, "--variance", "optimal", "--best_steps", 3)
    done = run_command("evaluate", "--model", calibrated[0], *options, "--output", tmp_path / "r.json")
    assert done.returncode != 0 and "--best_steps needs a calibration of --detail level, got pixel" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("evaluate", ("--method", "vlb", "--num_steps", 3, "--variance", "optimal"), "needs a calibration"),
        (
            "evaluate",
            ("--method", "vlb", "--num_steps", 3, "--calibration", __file__),
            "--calibration needs --variance",
        ),
        ("sample", ("--best_timesteps",), "the best timesteps need a calibration"),
        ("sample", ("--sampler", "ddim", "--variance", "optimal"), "needs the ancestral sampler"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error_of_one_line(trained_run, tmp_path, command, options, message):
    done = run_command(command, "--model", trained_run[0], *options, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
