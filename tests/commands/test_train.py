"""The command `train`: what a run leaves, what it refuses, and the same run on several processes."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_vdm import VariationalBound, VDMPipeline, evaluate_mc
from diffusers_vdm.data.images import load_digits_split
from tests.pictures import picture, write_image_folder
from tests.running import SHORT_TRAINING, metrics_of, run_example

PICTURES = ("samples.png", "schedule.png", "loss_by_gamma.png", "training.png")


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_that_the_readme_names(trained_run):
    out, _ = trained_run
    for name in ("model_index.json", "options.json", "metrics.jsonl", "denoising.gif", "noise_schedule", "unet",
                 "scheduler", *PICTURES):  # fmt: skip
        assert (out / name).exists(), name


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_of_a_run_can_be_opened(trained_run, name):
    with Image.open(trained_run[0] / name) as picture:
        assert min(picture.size) > 50


def test_the_animation_of_a_run_has_several_frames(trained_run):
    with Image.open(trained_run[0] / "denoising.gif") as animation:
        assert animation.n_frames > 4


def test_the_last_metrics_are_of_all_held_out_images_and_their_terms_add_up(trained_run):
    lines = metrics_of(trained_run[0])
    assert [line["step"] for line in lines] == [2, 4, 6]
    last = lines[-1]
    assert last["eval_num_images"] == 297 and last["eval_weights"] == "ema"
    terms = sum(last[f"eval_{term}_bpd"] for term in ("prior", "reconstruction", "diffusion"))
    assert last["eval_bpd"] == pytest.approx(terms)


def test_the_options_of_a_run_are_recorded_with_its_data(trained_run):
    recorded = json.loads((trained_run[0] / "options.json").read_text())
    assert recorded["options"]["max_train_steps"] == 6 and len(recorded["data"]["fingerprint"]) == 16


def test_a_run_prints_its_result_beside_that_of_a_histogram(trained_run):
    _, printed = trained_run
    assert "histogram of each training pixel" in printed and "this model, continuous time" in printed


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_with_another_run_is_not_overwritten(trained_run, tmp_path, resumed):
    checkpoint = ["--resume_from_checkpoint", tmp_path / "other" / "checkpoint-3"] if resumed else []
    options = ["--output_dir", trained_run[0], *SHORT_TRAINING.split()]
    done = run_example("train.py", *options, *checkpoint, check=False)
    assert done.returncode == 1 and "holds another run" in done.stderr


# ---- other data, objectives and machines ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_compute_the_same_as_one(tmp_path):
    one = SHORT_TRAINING + " --dropout 0"  # whose masks are drawn for each process
    run_example("train.py", "--output_dir", tmp_path / "one", *one.split())
    two = one.replace("--train_batch_size 8", "--train_batch_size 4")
    run_example("train.py", "--output_dir", tmp_path / "two", *two.split(), processes=2)
    recorded = [json.loads((tmp_path / n / "options.json").read_text())["global_batch_size"] for n in ("one", "two")]
    assert recorded == [8, 8]
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"train_bpd", "eval_bpd"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.slow
def test_a_ddpm_is_trained_and_sampled(tmp_path):
    out = tmp_path / "ddpm"
    run_example("train.py", "--objective", "ddpm", "--schedule", "linear_beta", "--ddpm_num_steps", 100,
                "--output_dir", out, "--class_conditional", *SHORT_TRAINING.split())  # fmt: skip
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_vdm.schedulers", "LinearBetaScheduler"]
    assert metrics_of(out)[-1]["eval_num_timesteps"] == 99
    run_example("sample.py", "--model", out, "--num_images", 2, "--num_inference_steps", 100, "--class_labels", 3, 5,
        "--output", tmp_path / "s.png")  # fmt: skip


@pytest.mark.slow
def test_training_takes_a_folder_of_color_images(tmp_path):
    rng = np.random.default_rng(0)
    data = write_image_folder(tmp_path / "data", [picture(rng, (16, 20)) for _ in range(9)])
    out = tmp_path / "run"
    run_example("train.py", "--train_data_dir", data, "--resolution", 16, "--random_flip", "--output_dir", out,
                "--cache_dir", tmp_path / "cache", *SHORT_TRAINING.split())  # fmt: skip
    config = json.loads((out / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"]) == (3, 16)
    assert json.loads((out / "model_index.json").read_text())["num_levels"] == 256


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["vdm", "ddpm"])
def test_mixed_precision_trains_and_is_measured_in_float32(tmp_path, objective):
    out = tmp_path / "run"
    run_example(
        "train.py", "--mixed_precision", "bf16", "--objective", objective, "--output_dir", out, *SHORT_TRAINING.split()
    )
    measured = metrics_of(out)[-1]["eval_bpd"]
    assert 2 < measured < 20
    # bits/dim are measured in float32 all the same
    pipe, data = VDMPipeline.from_pretrained(out), load_digits_split()[1]
    steps = 999 if objective == "ddpm" else None
    bound = VariationalBound(pipe.unet, pipe.scheduler.noise_schedule(), num_levels=17, num_timesteps=steps)
    again = evaluate_mc(bound, data.images, num_samples=2, progress_bar=False)
    assert measured == pytest.approx(again.bpd, rel=1e-5)
