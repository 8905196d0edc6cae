"""The command `evaluate`: its reports, on one process and on two, stopped and resumed; and what it cannot measure."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_vdm import VariationalBound, VDMPipeline, VDMScheduler, evaluate_mc
from diffusers_vdm.data.images import load_digits_split
from tests.commands.models import save_tiny_pipeline
from tests.models import tiny_preset, tiny_unet
from tests.paths import EXAMPLES
from tests.pictures import picture, write_image_folder, write_images
from tests.running import ENVIRONMENT, run_example, run_python

# ---- the report of each method -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mc_report(trained_run, tmp_path_factory):
    """The path of a report by Monte Carlo, and what the command printed."""
    path = tmp_path_factory.mktemp("reports") / "new folder" / "r.json"
    done = run_example(
        "evaluate.py", "--model", trained_run[0], "--num_samples", 2, "--table", 3, "--output", path, new_process=True
    )
    return path, done.stdout


def test_a_report_by_monte_carlo_is_of_all_images(mc_report):
    report = json.loads(mc_report[0].read_text())
    assert report["num_images"] == 297 == len(report["per_image_bpd"]) and report["num_steps"] is None
    assert report["bpd"] == pytest.approx(sum(report["per_image_bpd"]) / 297) and report["weights"] == "average (EMA)"
    assert report["variance_per_call"] > 0


def test_the_table_of_a_report_ends_with_continuous_time(mc_report):
    report = json.loads(mc_report[0].read_text())
    assert [row["num_steps"] for row in report["table"]] == [3, None] and "T = ∞" in mc_report[1]
    assert report["table"][1]["bpd"] == report["bpd"]


def test_a_report_leaves_its_pictures_and_no_partial_results(mc_report):
    path, _ = mc_report
    for name in ("by_gamma", "histogram", "most_likely", "most_unlikely"):
        assert (path.parent / f"r_{name}.png").exists()
    assert not (path.parent / "r.partial").exists()


def test_a_report_by_all_terms_has_each_term_and_the_best_timesteps(trained_run, tmp_path):
    done = run_example("evaluate.py", "--model", trained_run[0], "--method", "vlb", "--num_steps", 6,
                       "--best_steps", 2, 6, "--split", "test[:20]", "--output", tmp_path / "r.json")  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["terms"]) == 6 and len(report["per_image_bpd"]) == 20
    assert sum(row["bpd"] for row in report["terms"]) == pytest.approx(report["diffusion_bpd"])
    assert "best 2 timesteps" in done.stdout
    assert report["best"][0]["bpd"] > report["bpd"] and report["best"][1]["bpd"] == pytest.approx(report["bpd"])


def test_a_report_by_the_ode_names_its_dequantization(trained_run, tmp_path):
    run_example("evaluate.py", "--model", trained_run[0], "--method", "ode", "--rtol", 0.3, "--atol", 0.3,
                "--split", "test[:10]", "--output", tmp_path / "r.json")  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["dequantization"] == "truncated_normal" and report["mean_num_calls"] >= 7 and report["bpd"] < 20


def test_a_report_names_the_files_and_columns_that_were_used(tmp_path):
    path = write_images(tmp_path / "data", "test/a/1.png", "test/b/2.png", "test/notes.txt")
    done = run_example("evaluate.py", "--model", save_tiny_pipeline(tmp_path, 2), "--data_dir", path, "--num_samples",
                       1, "--output", tmp_path / "r.json", "--cache_dir", tmp_path / "cache")  # fmt: skip
    data = json.loads((tmp_path / "r.json").read_text())["data"]
    line = f"2 of 3 files of {path} (test) are used; 1 .txt: not an image that Pillow decodes"
    assert data["files"] == line and line in done.stdout
    assert (data["image_column"], data["label_column"]) == ("image", "label")


# ---- several processes, and evaluations that are stopped ---------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_diffusers_has_the_same_likelihood_on_two_processes(tmp_path):
    rng = np.random.default_rng(0)
    data = write_image_folder(tmp_path / "data", [picture(rng) for _ in range(8)])
    DDPMPipeline(tiny_unet(UNet2DModel), DDPMScheduler(20)).save_pretrained(tmp_path / "ddpm")
    reports = []
    for processes in (None, 2):
        output = tmp_path / f"{processes}.json"
        run_example("evaluate.py", "--model", tmp_path / "ddpm", "--method", "vlb", "--data_dir", data, "--split",
                    "train", "--batch_size", 4, "--cache_dir", tmp_path / "cache", "--output", output,
                    processes=processes)  # fmt: skip
        reports.append(json.loads(output.read_text()))
    assert [r["num_processes"] for r in reports] == [1, 2]
    assert reports[0]["convention"] == "ddpm" and reports[0]["num_steps"] == 20 and reports[0]["clip_sample"]
    assert len(reports[0]["per_image_bpd"]) == 7
    np.testing.assert_allclose(reports[0]["per_image_bpd"], reports[1]["per_image_bpd"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("mc", ["--num_samples", 8, "--target_stderr", 0.5, "--max_samples", 24, "--importance_sampling"]),
        ("ode", ["--rtol", 1, "--atol", 1, "--num_importance_samples", 2, "--num_probes", 2]),
    ],
)
def test_an_evaluation_gives_the_same_numbers_on_one_and_two_processes(tmp_path, ddpm_and_images, method, more):
    reports = []
    for processes, size in ((None, 3), (2, 2)):
        output = tmp_path / f"{processes}.json"
        run_example("evaluate.py", *ddpm_and_images, "--method", method, *more, "--batch_size", size, "--output",
                    output, processes=processes)  # fmt: skip
        reports.append(json.loads(output.read_text()))
    assert [r["num_processes"] for r in reports] == [1, 2] and len(reports[0]["per_image_bpd"]) == 7
    np.testing.assert_allclose(reports[0]["per_image_bpd"], reports[1]["per_image_bpd"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_evaluation_is_resumed(tmp_path, ddpm_and_images):
    output = tmp_path / "stopped.json"
    command = [EXAMPLES / "evaluate.py", *ddpm_and_images, "--method", "vlb", "--num_steps", 100, "--batch_size", 1,
               "--output", output, "--num_threads", 1]  # fmt: skip
    words = [sys.executable, *map(str, command)]
    first = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for line in iter(lambda: first.stderr.read(1), ""):
        if line == "±":  # two images are done
            first.terminate()
            break
    rest = first.communicate(timeout=200)[1]
    assert first.returncode == 143 and "Traceback" not in rest and not output.exists()
    kept = tmp_path / "stopped.partial" / "vlb" / "rows-0.safetensors"
    assert kept.exists()
    refused = run_python(*command, check=False)
    assert refused.returncode == 1 and "--resume" in refused.stderr and "Traceback" not in refused.stderr
    run_python(*command, "--resume")
    resumed = json.loads(output.read_text())
    run_python(*command)
    assert resumed["per_image_bpd"] == json.loads(output.read_text())["per_image_bpd"] and not kept.exists()


def test_a_model_that_does_not_exist_is_an_error_of_one_line(tmp_path):
    done = run_example("evaluate.py", "--model", tmp_path / "nothing", "--output", tmp_path / "r.json", check=False)
    assert done.returncode == 1 and "model_index.json" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_latent_model_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["a", "b"]}')
    done = run_example("evaluate.py", "--model", tmp_path, "--output", tmp_path / "r.json", check=False)
    assert done.returncode != 0 and "latents" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r.json").exists()


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
def test_one_image_has_no_standard_error_and_causes_no_warning(tmp_path, digits_pipeline, method):
    output = tmp_path / "r.json"
    done = run_example("evaluate.py", "--model", digits_pipeline, "--split", "test[:1]", "--output", output, *method)
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
        ["--method", "ode", "--rtol", 1, "--atol", 1],
    ],
    ids=lambda m: m[1],
)
def test_the_progress_bar_shows_no_number_of_a_single_process(tmp_path, digits_pipeline, method):
    output = tmp_path / "r.json"
    few = ["--model", digits_pipeline, "--split", "test[:12]", "--batch_size", 3, "--output", output, *method]
    done = run_example("evaluate.py", *few, processes=2)
    bpd = json.loads(output.read_text(encoding="utf-8"))["bpd"]
    shown = re.findall(r"(\d+\.\d{4})(?: ± \d\S+)? bits/dim", done.stderr)
    assert {float(text) for text in shown} <= {round(bpd, 4)} and "bits/dim" in done.stderr
    done = run_example("evaluate.py", *few)
    assert re.search(r"\d\.\d{4} ± \S+ bits/dim", done.stderr)


# ---- without conditions --------------------------------------------------------------------------------------------


def save_with(folder, **arguments):
    """Saves a pipeline for digits whose network has these arguments."""
    pipe = VDMPipeline(tiny_preset(zero_init=False, **arguments), VDMScheduler(gamma_min=-7.5), num_levels=17)
    pipe.save_pretrained(folder)
    return pipe


def test_a_model_with_a_null_class_is_measured_without_classes(tmp_path):
    pipe = save_with(tmp_path / "m", num_class_embeds=10, null_class=True)
    command = ["--model", tmp_path / "m", "--split", "test[:20]", "--num_samples", 2, "--output", tmp_path / "r.json"]
    bound, images = VariationalBound(pipe.unet, pipe.scheduler.noise_schedule(), num_levels=17), load_digits_split()[1]
    for option, conditions, given in (
        ("--null_conditions", [], {}),
        ("--no-null_conditions", ["class_labels"], {"class_labels": images.labels[:20]}),
    ):
        printed = run_example("evaluate.py", *command, option).stdout
        report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        expected = evaluate_mc(bound, images.images[:20], num_samples=2, progress_bar=False, **given)
        assert report["conditions"] == conditions and report["class_conditional"] == bool(conditions)
        assert report["bpd"] == pytest.approx(expected.bpd, rel=1e-6)
        of_class = {"bpd_with_classes": pytest.approx(expected.bpd + math.log2(10) / 64, rel=1e-6)} if given else {}
        assert {name: report[name] for name in report if name == "bpd_with_classes"} == of_class
        assert ("with the bits of the class" in printed) == bool(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "--null_conditions needs a model with conditions"),
        ({"num_class_embeds": 10}, "--null_conditions needs a model that knows the null of class_labels"),
    ],
)
def test_nulls_that_a_model_does_not_know_are_named(tmp_path, arguments, message):
    save_with(tmp_path / "m", **arguments)
    done = run_example("evaluate.py", "--model", tmp_path / "m", "--null_conditions", "--output", tmp_path / "r.json",
                       check=False)  # fmt: skip
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "r.json").exists()
