"""The command `classify`: what it measures of the bundled digits, and what it refuses."""

import json

import pytest
import torch

from diffusers_vdm import FixedLinearGamma, VDMPipeline, VDMScheduler
from diffusers_vdm.commands import classify
from diffusers_vdm.data.images import load_digits_split
from tests.models import tiny_preset
from tests.running import LAUNCH, run_python


@pytest.fixture
def model(tmp_path):
    """A function that saves a pipeline for digits with these arguments of its network; returns the folder."""

    def save(**arguments) -> str:
        schedule = FixedLinearGamma(-7.5, 5.0)
        net = tiny_preset(**arguments)
        folder = tmp_path / "model"
        VDMPipeline(net, VDMScheduler.from_noise_schedule(schedule), schedule, num_levels=17).save_pretrained(folder)
        return str(folder)

    return save


def run(tmp_path, folder: str, *more: str) -> dict:
    output = tmp_path / "reports" / "classes.json"
    options = ["--model", folder, "--output", str(output), "--split", "test[:12]", "--num_samples", "4", *more]
    classify.main(options)
    return json.loads(output.read_text(encoding="utf-8"))


def test_report_has_accuracy_calibration_and_information(model, tmp_path, capsys):
    folder = model(num_class_embeds=10, null_class=True)
    report = run(tmp_path, folder, "--mutual_information", "--neighbors", "train", "--no-rejection")
    printed = capsys.readouterr().out
    for name in (
        "accuracy",
        "expected calibration error",
        "nearest neighbor",
        "I(x; c), bits/dim, at least",
        "by the null class",
        "temperature",
    ):
        assert name in printed
    labels = load_digits_split()[1].labels[:12].tolist()
    rows = report["images"]
    assert [row["label"] for row in rows] == labels and len(rows) == report["num_images"] == 12
    assert report["accuracy"] == sum(row["predicted"] == row["label"] for row in rows) / 12
    for row in rows:
        assert len(row["class_bits"]) == 10 and row["class_bits"].index(min(row["class_bits"])) == row["predicted"]
        assert sum(row["probabilities"]) == pytest.approx(1)
    information = sum(row["null_bits"] - row["class_bits"][row["label"]] for row in rows) / 12
    assert report["mutual_information_bits"] == pytest.approx(information)
    assert report["mutual_information_bpd"] == pytest.approx(information / 64)
    assert report["information_bound_bits"] < report["class_entropy_bits"]
    assert report["num_calls_per_image"] == report["num_calls_without_rejection"] == 44
    assert report["nearest_neighbor_accuracy"] > 0.8 and len(report["temperatures"]) == 2


def test_temperature_of_an_image_is_fitted_without_it(model, tmp_path):
    """A change of the classes of the even images changes the probabilities of the odd ones only."""
    from diffusers_vdm.commands.classify import measured, probabilities_of
    from diffusers_vdm.evaluation.classes import ClassEvaluation

    bits = 20 * torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).double()
    result = ClassEvaluation(bits, None, torch.ones(40, 3), 120, 64)
    labels = bits.argmin(1)
    labels[::4] = (labels[::4] + 1) % 3  # among the even ones
    other = labels.clone()
    other[::2] = (other[::2] + 1) % 3
    args = classify.parse_options(["--model", "m"])
    one, two = (probabilities_of(result, measured(args, result, each)["temperatures"]) for each in (labels, other))
    assert torch.equal(one[::2], two[::2]) and not torch.equal(one[1::2], two[1::2])


def test_temperature_can_be_given(model, tmp_path):
    folder = model(num_class_embeds=10)
    hot, cold = (run(tmp_path, folder, "--temperature", value) for value in ("50", "0.5"))
    assert hot["temperatures"] == [50.0]
    assert max(hot["images"][0]["probabilities"]) < max(cold["images"][0]["probabilities"])
    assert "mutual_information_bits" not in hot


def test_a_single_image_has_no_errors(model, tmp_path, capsys):
    """A standard error that is not known is null in the report, and left out of the table."""
    folder = model(num_class_embeds=10, null_class=True)
    report = run(tmp_path, folder, "--mutual_information", "--split", "test[:1]")
    assert report["information_bound_stderr_bits"] is None and report["mutual_information_stderr_bits"] is None
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ({}, [], "has no classes; train one by train.py --class_conditional"),
        ({"num_class_embeds": 10}, ["--mutual_information"], "with_null needs a network with a null class"),
        ({"num_class_embeds": 3}, [], "images of class"),
        ({"num_class_embeds": 10}, ["--upscale_factor", "2"], "--upscale_factor needs a model that takes cond_images"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused(model, tmp_path, arguments, more, message):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, model(**arguments), *more)
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", "0"], "--num_samples must be positive"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--resolution", "8"], "--resolution needs a data set"),
        (["--output", "."], "--output must name a .json file"),
        (["--output", __file__ + "/c.json"], "--output must be in a folder that can be written"),
        (["--neighbors", "other"], "--neighbors of the digits must be train, test or a slice"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        classify.parse_options(["--model", "m", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(model, tmp_path):
    """Classes are dropped, and one process has an image less than the other."""
    options = ["--model", model(num_class_embeds=10, null_class=True, zero_init=False), "--split", "test[:13]",
               "--num_samples", 8, "--mutual_information"]  # fmt: skip
    reports = []
    for name, launch in (("one.json", []), ("two.json", [*LAUNCH.split(), 2])):
        run_python(*launch, "-m", "diffusers_vdm.commands.classify", *options, "--output", tmp_path / name)
        reports.append(json.loads((tmp_path / name).read_text(encoding="utf-8")))
    one, two = reports
    assert two["num_calls_per_image"] == pytest.approx(one["num_calls_per_image"], rel=0.02)
    for left, right in zip(one["images"], two["images"], strict=True):
        assert left["class_bits"] == pytest.approx(right["class_bits"], rel=1e-4)
        assert left["null_bits"] == pytest.approx(right["null_bits"], rel=1e-4)
    assert two["mutual_information_bits"] == pytest.approx(one["mutual_information_bits"], abs=1e-3)
