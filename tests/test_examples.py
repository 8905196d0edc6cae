"""The examples as a user runs them: as commands, with small sizes, and what they leave behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_vdm import VariationalBound, VDMPipeline, evaluate_bound
from diffusers_vdm.data.images import load_digits_split

ROOT = Path(__file__).parents[1]
SMALL = (
    "--train_batch_size 8 --max_train_steps 6 --logging_steps 2 --eval_steps 4 --checkpointing_steps 3 "
    "--max_eval_images 20 --eval_samples 2 --num_images 4 --ddpm_num_inference_steps 5 --lr_warmup_steps 2"
)


def run(script, *arguments, processes=None, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable]
    if processes:
        launch = f"-m accelerate.commands.launch --multi_gpu --num_processes {processes} --num_machines 1"
        command += [*launch.split(), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / script), *map(str, arguments)],
        env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline of the digits, of a few thousand parameters."""
    from diffusers_vdm import MonotoneGammaNetwork, VDMScheduler, VDMUNet2DModel

    folder = tmp_path_factory.mktemp("model")
    unet = VDMUNet2DModel.from_preset(
        "digits", block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8
    )
    schedule = MonotoneGammaNetwork(gamma_min=-7.5, gamma_max=5.0)
    VDMPipeline(unet, VDMScheduler.from_noise_schedule(schedule), schedule, num_levels=17).save_pretrained(folder)
    return folder


def test_training_leaves_all_that_the_readme_promises_and_sampling_reads_it(tmp_path):
    out = tmp_path / "run"
    done = run("train.py", "--output_dir", out, *SMALL.split())
    assert "histogram of each training pixel" in done.stdout and "this model, continuous time" in done.stdout
    pictures = ("samples.png", "schedule.png", "loss_by_gamma.png", "training.png")
    for name in ("model_index.json", "options.json", "metrics.jsonl", "denoising.gif", "noise_schedule", "unet",
                 "scheduler", *pictures):  # fmt: skip
        assert (out / name).exists(), name
    for name in pictures:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 50
    with Image.open(out / "denoising.gif") as animation:
        assert animation.n_frames > 4
    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    last = lines[-1]
    assert last["eval_num_images"] == 297 and last["eval_weights"] == "ema"
    terms = sum(last[f"eval_{term}_bpd"] for term in ("prior", "reconstruction", "diffusion"))
    assert last["eval_bpd"] == pytest.approx(terms)
    recorded = json.loads((out / "options.json").read_text())
    assert recorded["options"]["max_train_steps"] == 6 and len(recorded["data"]["fingerprint"]) == 16

    grid = tmp_path / "grids" / "s.png"
    done = run("sample.py", "--model", out, "--num_images", 3, "--batch_size", 2, "--num_inference_steps", 4,
               "--output", grid, "--images_dir", tmp_path / "each", "--decode", "sample")  # fmt: skip
    assert grid.exists() and len(list((tmp_path / "each").iterdir())) == 3
    assert f"{last['eval_bpd']:.4f}" in done.stdout

    for sampler in ("UniPCMultistepScheduler", "ode"):
        done = run("sample.py", "--model", out, "--num_images", 2, "--num_inference_steps", 4, "--sampler", sampler,
                   "--rtol", 0.1, "--output", grid)  # fmt: skip
        assert ("ODE, rtol 0.1" if sampler == "ode" else "4 steps") in done.stdout

    report = tmp_path / "reports" / "r.json"
    done = run("evaluate.py", "--model", out, "--num_samples", 2, "--table", 3, "--output", report)
    saved_report = json.loads(report.read_text())
    assert (
        saved_report["num_images"] == 297 == len(saved_report["per_image_bpd"]) and saved_report["num_steps"] is None
    )
    assert [row["num_steps"] for row in saved_report["table"]] == [3, None] and "T = ∞" in done.stdout
    assert (
        saved_report["bpd"] == pytest.approx(sum(saved_report["per_image_bpd"]) / 297)
        and saved_report["weights"] == "average (EMA)"
    )
    assert saved_report["table"][1]["bpd"] == saved_report["bpd"] and saved_report["variance_per_call"] > 0
    for name in ("by_gamma", "histogram", "most_likely", "most_unlikely"):
        assert (report.parent / f"r_{name}.png").exists()
    assert not (report.parent / "r.partial").exists()

    done = run("evaluate.py", "--model", out, "--method", "vlb", "--num_steps", 6, "--best_steps", 2, 6,
               "--split", "test[:20]", "--output", report)  # fmt: skip
    saved_report = json.loads(report.read_text())
    assert (
        len(saved_report["terms"]) == 6
        and len(saved_report["per_image_bpd"]) == 20
        and saved_report["best"][1]["bpd"] == pytest.approx(saved_report["bpd"])
    )
    assert sum(row["bpd"] for row in saved_report["terms"]) == pytest.approx(saved_report["diffusion_bpd"])
    assert "best 2 timesteps" in done.stdout and saved_report["best"][0]["bpd"] > saved_report["bpd"]
    run("evaluate.py", "--model", out, "--method", "ode", "--rtol", 0.3, "--atol", 0.3, "--split", "test[:10]",
        "--output", report)  # fmt: skip
    saved_report = json.loads(report.read_text())
    assert (
        saved_report["dequantization"] == "truncated_normal"
        and saved_report["mean_num_calls"] >= 7
        and saved_report["bpd"] < 20
    )

    # the same folder is not overwritten by mistake, neither anew nor from a checkpoint of another run
    elsewhere = ["--resume_from_checkpoint", tmp_path / "other" / "checkpoint-3"]
    done = run("train.py", "--output_dir", out, *SMALL.split(), *elsewhere, check=False)
    assert done.returncode == 1 and "holds another run" in done.stderr
    done = run("train.py", "--output_dir", out, *SMALL.split(), check=False)
    assert done.returncode == 1 and "holds another run" in done.stderr


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    one = SMALL + " --dropout 0"  # whose masks are drawn for each process
    run("train.py", "--output_dir", tmp_path / "one", *one.split())
    two = one.replace("--train_batch_size 8", "--train_batch_size 4")
    run("train.py", "--output_dir", tmp_path / "two", *two.split(), processes=2)
    recorded = [json.loads((tmp_path / n / "options.json").read_text())["global_batch_size"] for n in ("one", "two")]
    assert recorded == [8, 8]
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"train_bpd", "eval_bpd"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.slow
def test_ddpm_by_the_same_script(tmp_path):
    out = tmp_path / "ddpm"
    run("train.py", "--objective", "ddpm", "--schedule", "linear_beta", "--ddpm_num_steps", 100, "--output_dir", out,
        "--class_conditional", *SMALL.split())  # fmt: skip
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_vdm.schedulers", "LinearBetaScheduler"]
    assert metrics(out)[-1]["eval_num_timesteps"] == 99
    run("sample.py", "--model", out, "--num_images", 2, "--num_inference_steps", 100, "--class_labels", 3, 5,
        "--output", tmp_path / "s.png")  # fmt: skip


@pytest.mark.slow
def test_a_folder_of_color_images(tmp_path):
    from test_images import picture, write_folder

    rng = np.random.default_rng(0)
    data = write_folder(tmp_path / "data", [picture(rng, (16, 20)) for _ in range(9)])
    out = tmp_path / "run"
    run("train.py", "--train_data_dir", data, "--resolution", 16, "--random_flip", "--output_dir", out,
        "--cache_dir", tmp_path / "cache", *SMALL.split())  # fmt: skip
    config = json.loads((out / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"]) == (3, 16)
    assert json.loads((out / "model_index.json").read_text())["num_levels"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "-1"], "--learning_rate must be positive"),
        (["--objective", "ddpm", "--schedule", "learned"], "cannot train γ"),
        (["--gamma_min", "6"], "must be below --gamma_max"),
        (["--dataset_name", "a", "--train_data_dir", "b"], "not both"),
        (["--train_data_dir", "does/not/exist"], "is not a folder"),
        (["--max_train_steps", "5", "--num_epochs", "1"], "not both"),
        (["--preset", "digit"], "did you mean 'digits'"),
        (["--lr_scheduler", "cosin"], "did you mean 'cosine'"),
        (["--use_emma"], "unrecognized arguments"),
        (["--use_ema", "False"], "unrecognized arguments"),
        (["--lr_warmup_steps", "-5"], "--lr_warmup_steps must be within"),
        (["--ema_max_decay", "2"], "--ema_max_decay must be within"),
        (["--dropout", "1"], "--dropout must be within"),
        (["--ddpm_num_steps", "5"], "--ddpm_num_steps must be within"),
        (["--resolution", "16"], "--resolution is of a data set"),
        (["--schedule", "linear_beta", "--gamma_min", "-3"], "come from its betas"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(arguments, message, tmp_path, capsys):
    from diffusers_vdm.commands.train_options import parse_options

    with pytest.raises(SystemExit) as stop:
        parse_options("", ["--output_dir", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_checkpoint_of_diffusers_has_the_same_likelihood_on_two_processes(tmp_path):
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from test_images import picture, write_folder

    rng = np.random.default_rng(0)
    data = write_folder(tmp_path / "data", [picture(rng) for _ in range(8)])
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(20)).save_pretrained(tmp_path / "ddpm")
    reports = []
    for processes in (None, 2):
        output = tmp_path / f"{processes}.json"
        run("evaluate.py", "--model", tmp_path / "ddpm", "--method", "vlb", "--data_dir", data, "--split", "train",
            "--batch_size", 4, "--cache_dir", tmp_path / "cache", "--output", output, processes=processes)  # fmt: skip
        reports.append(json.loads(output.read_text()))
    assert [r["num_processes"] for r in reports] == [1, 2]
    assert reports[0]["convention"] == "ddpm" and reports[0]["num_steps"] == 20 and reports[0]["clip_sample"]
    assert len(reports[0]["per_image_bpd"]) == 7
    np.testing.assert_allclose(reports[0]["per_image_bpd"], reports[1]["per_image_bpd"], rtol=1e-6)


GROUPS = """
import sys
import torch
import torch.distributed as dist
from diffusers_vdm.commands.processes import hold_process_group

def a_run():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    dist.all_gather([torch.zeros(3)], torch.ones(3))
    dist.destroy_process_group()

for _ in range(200):  # without the hold it waited for ever at about the tenth
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    hold_process_group()
    a_run()
"""


def test_a_run_of_many_processes_does_not_hang_at_its_end():
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", GROUPS], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint of diffusers and eight images: what evaluate.py is run on."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from test_images import picture, write_folder

    rng = np.random.default_rng(0)
    data = write_folder(tmp_path / "data", [picture(rng) for _ in range(8)])
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "ddpm")
    return ["--model", tmp_path / "ddpm", "--data_dir", data, "--split", "train", "--cache_dir", tmp_path / "cache"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("mc", ["--num_samples", 8, "--target_stderr", 0.5, "--max_samples", 24, "--importance_sampling"]),
        ("ode", ["--rtol", 0.1, "--atol", 0.1, "--num_importance_samples", 2, "--num_probes", 2]),
    ],
)
def test_the_same_images_get_the_same_bits_on_one_and_two_processes(tmp_path, foreign, method, more):
    reports = []
    for processes, size in ((None, 3), (2, 2)):
        output = tmp_path / f"{processes}.json"
        run("evaluate.py", *foreign, "--method", method, *more, "--batch_size", size, "--output", output,
            processes=processes)  # fmt: skip
        reports.append(json.loads(output.read_text()))
    assert [r["num_processes"] for r in reports] == [1, 2] and len(reports[0]["per_image_bpd"]) == 7
    np.testing.assert_allclose(reports[0]["per_image_bpd"], reports[1]["per_image_bpd"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_evaluation_that_is_stopped_goes_on(tmp_path, foreign):
    output = tmp_path / "stopped.json"
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), *map(str, foreign), "--method", "vlb",
               "--num_steps", "100", "--batch_size", "1", "--output", str(output), "--num_threads", "1"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for line in iter(lambda: first.stderr.read(1), ""):
        if line == "±":  # two images are done
            first.terminate()
            break
    rest = first.communicate(timeout=200)[1]
    assert first.returncode == 143 and "Traceback" not in rest and not output.exists()
    kept = tmp_path / "stopped.partial" / "vlb" / "rows-0.safetensors"
    assert kept.exists()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert refused.returncode == 1 and "--resume" in refused.stderr and "Traceback" not in refused.stderr
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True, timeout=200)
    resumed = json.loads(output.read_text())
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
    assert resumed["per_image_bpd"] == json.loads(output.read_text())["per_image_bpd"] and not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ode", "--num_steps", "5"], "the ODE takes the steps"),
        (["--rtol", "0.1"], "--rtol goes with --method ode, not with mc"),
        (["--method", "vlb", "--target_stderr", "0.1"], "--target_stderr goes with --method mc"),
        (["--target_stderr", "-1"], "--target_stderr must be positive"),
        (["--method", "vlb", "--timesteps", "5", "1", "--num_steps", "3"], "not both"),
        (["--method", "vlb", "--best_steps", "0"], "--best_steps must be positive"),
        (["--table", "10", "-1"], "--table must be positive"),
        (["--output", "report.txt"], "must name a .json file"),
        (["--dataset_name", "a", "--data_dir", "b"], "not both"),
        (["--split", "validation"], "--split of the digits must be train or test"),
        (["--resolution", "16"], "--resolution is of a data set"),
        (["--data_dir", "does/not/exist"], "is not a folder"),
        (["--method", "vlb", "--num_samples", "3"], "--num_samples goes with --method mc and ode"),
        (["--target_stderr", "0.1", "--max_samples", "5"], "--max_samples 5 must be at least --num_samples 20"),
    ],
)
def test_wrong_arguments_of_an_evaluation(arguments, message, capsys):
    from diffusers_vdm.commands.evaluate_options import parse_options

    with pytest.raises(SystemExit) as stop:
        parse_options("", ["--model", "m", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_models_that_are_not_there(tmp_path):
    done = run("evaluate.py", "--model", tmp_path / "nothing", "--output", tmp_path / "r.json", check=False)
    assert done.returncode == 1 and "model_index.json" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_latents_have_no_likelihood(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["a", "b"]}')
    done = run("evaluate.py", "--model", tmp_path, "--output", tmp_path / "r.json", check=False)
    assert done.returncode != 0 and "latents" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["vdm", "ddpm"])
def test_mixed_precision(tmp_path, objective):
    out = tmp_path / "run"
    run("train.py", "--mixed_precision", "bf16", "--objective", objective, "--output_dir", out, *SMALL.split())
    measured = metrics(out)[-1]["eval_bpd"]
    assert 2 < measured < 20
    # bits/dim are measured in float32 all the same
    pipe, data = VDMPipeline.from_pretrained(out), load_digits_split()[1]
    steps = 999 if objective == "ddpm" else None
    bound = VariationalBound(pipe.unet, pipe.scheduler.noise_schedule(), num_levels=17, num_timesteps=steps)
    again = evaluate_bound(bound, data.images, num_samples=2, progress_bar=False)
    assert measured == pytest.approx(again.bpd, rel=1e-5)


def test_a_launch_of_fewer_processes_than_asked_for_is_told(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", str(ROOT / "examples" / "train.py")]
    command += ["--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0 and "--num_processes 2, but accelerate started 1" in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_folder_of_images_has_both_names_in_both_commands(tmp_path):
    from diffusers_vdm.commands import evaluate_options, train_options

    for flag in ("--data_dir", "--train_data_dir"):
        o = train_options.parse_options("", [flag, str(tmp_path), "--output_dir", str(tmp_path / "out")])
        assert o.train_data_dir == str(tmp_path) and "train_data_dir" in o.given
        assert not {"data_dir"} & (vars(o).keys() | set(o.given))  # one name in options.json and on a card
        o = evaluate_options.parse_options("", ["--model", "m", flag, str(tmp_path)])
        assert o.data_dir == str(tmp_path) and not hasattr(o, "train_data_dir")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "method",
    [
        ["--method", "mc", "--num_samples", 1],
        ["--method", "vlb", "--num_steps", 1],
        ["--method", "ode", "--rtol", 0.1, "--atol", 0.1, "--num_samples", 2],
    ],
    ids=lambda m: m[1],
)
def test_one_image_has_no_error_and_makes_no_warning(tmp_path, model, method):
    output = tmp_path / "r.json"
    done = run("evaluate.py", "--model", model, "--split", "test[:1]", "--output", output, *method)
    assert "Warning" not in done.stderr and "nan" not in done.stdout

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    saved_report = json.loads(output.read_text(encoding="utf-8"), parse_constant=refuse)
    assert saved_report["num_images"] == 1 and saved_report["stderr_bpd"] is None
    assert all(term["stderr_bpd"] is None for term in saved_report.get("terms", []))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "method",
    [
        ["--method", "mc", "--num_samples", 3],
        ["--method", "vlb", "--num_steps", 3],
        ["--method", "ode", "--rtol", 0.3, "--atol", 0.3],
    ],
    ids=lambda m: m[1],
)
def test_the_bar_of_two_processes_shows_no_number_of_one(tmp_path, model, method):
    output = tmp_path / "r.json"
    few = ["--model", model, "--split", "test[:40]", "--batch_size", 4, "--output", output, *method]
    done = run("evaluate.py", *few, processes=2)
    bpd = json.loads(output.read_text(encoding="utf-8"))["bpd"]
    shown = re.findall(r"(\d+\.\d{4})(?: ± \d\S+)? bits/dim", done.stderr)
    assert {float(text) for text in shown} <= {round(bpd, 4)} and "bits/dim" in done.stderr
    done = run("evaluate.py", *few)
    assert re.search(r"\d\.\d{4} ± \S+ bits/dim", done.stderr)
