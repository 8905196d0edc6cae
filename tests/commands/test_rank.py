"""The command `rank`: its numbers are those of the library, and what it refuses."""

import json
import math
import re

import pytest
import torch
from PIL import Image

from diffusers_vdm import FixedLinearGamma, VariationalBound, VDMPipeline, VDMScheduler, evaluate_mc
from diffusers_vdm.commands import rank
from diffusers_vdm.data.images import load_digits_split
from diffusers_vdm.evaluation.monte_carlo import mean_stderr
from diffusers_vdm.evaluation.ranking import auroc, png_bits
from tests.models import tiny_preset
from tests.running import LAUNCH, run_python
from tests.tensors import f64, random_levels

SCHEDULE = FixedLinearGamma(-7.5, 5.0)


@pytest.fixture
def model(tmp_path):
    """A function that saves a pipeline with these arguments of its network; returns the folder."""

    def save(preset="digits", num_levels=17, name="model", **arguments) -> str:
        net = tiny_preset(preset, zero_init=False, **arguments)
        folder = tmp_path / name
        pipe = VDMPipeline(net, VDMScheduler.from_noise_schedule(SCHEDULE), SCHEDULE, num_levels=num_levels)
        pipe.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def folder_of(tmp_path):
    """A function that writes images as PNG files of a split; returns the folder."""

    def write(name: str, images: torch.Tensor, split: str = "test") -> str:
        (tmp_path / name / split).mkdir(parents=True)
        for i, image in enumerate(images.to(torch.uint8)):
            pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / split / f"{i}.png")
        return str(tmp_path / name)

    return write


def run(tmp_path, folder: str, *more: str) -> dict:
    output = tmp_path / "reports" / "ranking.json"
    options = ["--model", folder, "--output", str(output), "--split", "test[:12]", "--num_samples", "3", *more]
    rank.main(options)

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(output.read_text(encoding="utf-8"), parse_constant=fail)


def evaluated(images: torch.Tensor, seed: int = 0, net=None, num_levels: int = 17, **arguments):
    bound = VariationalBound(net or tiny_preset(zero_init=False), SCHEDULE, num_levels=num_levels)
    return evaluate_mc(bound, images, num_samples=3, seed=seed, progress_bar=False, **arguments)


def column(rows: list[dict], name: str) -> torch.Tensor:
    return f64([math.nan if row[name] is None else row[name] for row in rows])


TEST = load_digits_split()[1]


def test_report_has_the_bits_and_the_scores_of_the_library(model, tmp_path, capsys):
    report = run(tmp_path, model(), "--num_images", "3")
    printed = capsys.readouterr().out
    images, expected = TEST.images[:12], evaluated(TEST.images[:12])
    rows = report["images"]
    assert [row["index"] for row in rows] == list(range(12))
    assert [row["label"] for row in rows] == TEST.labels[:12].tolist()
    torch.testing.assert_close(column(rows, "bpd"), expected.per_image_bpd)
    torch.testing.assert_close(column(rows, "stderr_bpd"), expected.per_image_stderr_bpd)
    bits = 64 * expected.per_image_bpd
    torch.testing.assert_close(column(rows, "bits"), bits)
    assert torch.equal(column(rows, "png_bits"), png_bits(images))
    torch.testing.assert_close(column(rows, "bits_minus_png"), bits - png_bits(images))
    typical = bits[1::2].mean()
    torch.testing.assert_close(column(rows[::2], "typicality_bits"), (bits[::2] - typical).abs())
    assert all(row["typicality_bits"] is None for row in rows[1::2])
    assert report["typical"]["bpd"] == pytest.approx(float(typical / 64)) and report["typical"]["num_images"] == 6
    assert report["bpd"] == pytest.approx(expected.bpd) and "auroc" not in report
    assert report["bpd_spread"] == pytest.approx(float(expected.per_image_bpd.std()))
    assert report["bpd_stderr_of_population"] == pytest.approx(report["bpd_spread"] / math.sqrt(12))
    assert report["bpd_rms_stderr_of_image"] == pytest.approx(float(expected.per_image_stderr_bpd.norm()) / 12**0.5)
    order = expected.per_image_bpd.argsort().tolist()
    shown = [int(index) for index in re.findall(r"^ +(\d+)  ", printed, flags=re.MULTILINE)]
    assert shown == [*order[::-1][:3], *order[:3]]


def test_changed_images_share_the_noise_and_are_compared_as_pairs(model, tmp_path, capsys):
    report = run(tmp_path, model(), "--other_transform", "rotate180")
    inside, other = report["images"], report["other_images"]
    turned = evaluated(TEST.images[:12].flip(2, 3))
    torch.testing.assert_close(column(other, "bpd"), turned.per_image_bpd)
    area, error = auroc(column(other, "bits"), column(inside, "bits"), paired=True)
    assert report["auroc"]["bits"] == {"auroc": area, "stderr": error, "num_other": 12, "num_in": 12}
    assert error != auroc(column(other, "bits"), column(inside, "bits"))[1]
    scored = [column(rows[::2], "typicality_bits") for rows in (other, inside)]
    assert report["auroc"]["typicality_bits"]["auroc"] == auroc(*scored)[0]
    assert report["auroc"]["typicality_bits"]["num_other"] == report["auroc"]["typicality_bits"]["num_in"] == 6
    printed = capsys.readouterr().out
    assert f"{area:.4f} ± {error:.4f}" in printed and "the other images" in printed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flip", [[[2, 16], [0, 1]]]),
        ("mirror", [[[1, 0], [16, 2]]]),
        ("rotate180", [[[16, 2], [1, 0]]]),
        ("negative", [[[16, 15], [14, 0]]]),
    ],
)
def test_transforms_keep_levels(name, expected):
    images = torch.tensor([[[[0, 1], [2, 16]]]], dtype=torch.uint8)
    assert torch.equal(rank.TRANSFORMS[name](images, 17), torch.tensor([expected], dtype=torch.uint8))


def test_other_images_are_files_of_levels_with_their_names(model, folder_of, tmp_path):
    letters = random_levels(9, 1, 8, 8, num_levels=17, seed=4)
    folder = folder_of("letters", letters)
    report = run(tmp_path, model(), "--other_data_dir", folder, "--typical_split", "train[:20]")
    other = report["other_images"]
    assert sorted(row["file"] for row in other) == sorted(f"test/{i}.png" for i in range(9))
    order = [int(row["file"].removeprefix("test/").removesuffix(".png")) for row in other]
    expected = evaluated(letters[order].to(torch.uint8), seed=2)
    torch.testing.assert_close(column(other, "bpd"), expected.per_image_bpd)
    assert torch.equal(column(other, "png_bits"), png_bits(letters[order]))
    assert "file" not in report["images"][0] and "label" not in other[0]
    typical = evaluated(load_digits_split()[0].images[:20], seed=1).bpd
    assert report["typical"] == {
        "data": "scikit-learn digits, 1500 training, train[:20]",
        "num_images": 20,
        "bpd": pytest.approx(typical),
    }
    torch.testing.assert_close(column(other, "typicality_bits"), 64 * (expected.per_image_bpd - typical).abs())
    assert report["auroc"]["typicality_bits"]["num_in"] == 12
    found = auroc(column(other, "bits"), column(report["images"], "bits"))
    assert report["auroc"]["bits"] == {"auroc": found[0], "stderr": found[1], "num_other": 9, "num_in": 12}


def test_reference_model_sees_the_same_draws(model, tmp_path):
    reference = model(name="reference", seed=1)
    report = run(tmp_path, model(), "--reference_model", reference, "--other_split", "train[:10]")
    nets = [tiny_preset(zero_init=False), tiny_preset(zero_init=False, seed=1)]
    one, two = (evaluated(TEST.images[:12], net=net) for net in nets)
    rows = report["images"]
    torch.testing.assert_close(column(rows, "reference_bpd"), two.per_image_bpd)
    torch.testing.assert_close(
        column(rows, "bits_minus_reference"), 64 * (one.per_image_bpd - two.per_image_bpd), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(column(rows, "bpd_minus_reference_stderr"), mean_stderr(one.draws_bpd - two.draws_bpd))
    names = ["bits", "png_bits", "bits_minus_png", "typicality_bits", "bits_minus_reference"]
    assert list(report["auroc"]) == names
    # the halves: each of the 10 other images, against every second one
    assert [report["auroc"][name]["num_in"] for name in names] == [12, 12, 12, 6, 12]
    assert [report["auroc"][name]["num_other"] for name in names] == [10, 10, 10, 10, 10]


def test_color_images_of_a_folder(model, folder_of, tmp_path):
    images = random_levels(6, 3, 32, 32, seed=2)
    folder, flat = folder_of("noise", images), folder_of("flat", images[:4, :, :1, :1].expand(-1, -1, 32, 32))
    picture = tmp_path / "pictures" / "grid.png"
    more = ["--data_dir", folder, "--split", "test", "--other_data_dir", flat, "--picture", str(picture)]
    report = run(tmp_path, model("cifar10", 256), *more, "--num_images", "50", "--importance_sampling")
    assert report["num_images"] == 6 and report["other"]["num_images"] == 4
    assert sorted(row["file"] for row in report["images"]) == [f"test/{i}.png" for i in range(6)]
    assert report["num_dimensions"] == 3072
    # noise is longer than flat images as a file
    assert min(row["png_bits"] for row in report["images"]) > max(row["png_bits"] for row in report["other_images"])
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width > drawn.height > 200


@pytest.mark.parametrize("null_class", [True, False])
def test_classes_are_used_where_there_is_no_null_class(model, tmp_path, null_class):
    classes = {"num_class_embeds": 10, "null_class": null_class}
    report = run(tmp_path, model(**classes))
    labels = None if null_class else TEST.labels[:12]
    expected = evaluated(TEST.images[:12], net=tiny_preset(zero_init=False, **classes), class_labels=labels)
    torch.testing.assert_close(column(report["images"], "bpd"), expected.per_image_bpd)


def test_one_image_has_bits_and_no_errors(model, tmp_path):
    report = run(tmp_path, model(), "--split", "test[:1]", "--num_samples", "1")
    [row] = report["images"]
    assert row["bits"] == pytest.approx(64 * row["bpd"]) and row["stderr_bpd"] is None
    assert report["bpd_spread"] is None and "typicality_bits" not in row and "typical" not in report


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ({"num_class_embeds": 10}, ["--other_data_dir", "letters"], "has classes and no null class, so it needs"),
        ({}, ["--other_data_dir", "bright"], "pixels of the other images must be 0 to 16, but"),
        ({}, ["--other_data_dir", "large"], r"images must be of the network's size, (N, 1, 8, 8), got (2, 1, 9, 9)"),
        ({}, ["--other_data_dir", "color"], "images must be of the network's size, (N, 1, 8, 8), got (2, 3, 8, 8)"),
        ({}, ["--reference_model", "colors"], "--reference_model must have the 17 levels of the model, got 256"),
        ({}, ["--reference_model", "letters"], "--reference_model must be a folder with a model_index.json"),
        ({}, ["--typical_split", "test[5:]"], "7 images of --typical_split are also in --split"),
        ({}, ["--other_split", "test[5:]"], "7 images of --other_split are also in --split"),
        (
            {},
            ["--other_split", "train[:0]"],
            "--other_split train[:0] of the digits has no images; choose another slice",
        ),
    ],
)
def test_models_and_images_that_do_not_fit_are_refused(
    model, folder_of, tmp_path, monkeypatch, arguments, more, message
):
    monkeypatch.chdir(tmp_path)
    for name, shape, num_levels in (
        ("letters", (2, 1, 8, 8), 17),
        ("bright", (2, 1, 8, 8), 200),
        ("large", (2, 1, 9, 9), 17),
        ("color", (2, 3, 8, 8), 17),
    ):
        folder_of(name, random_levels(*shape, num_levels=num_levels))
    model("cifar10", 256, name="colors")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, model(**arguments), *more)
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", "0"], "--num_samples must be positive"),
        (["--num_images", "0"], "--num_images must be positive"),
        (["--picture", "grid.jpg"], "--picture must name a .png file, got grid.jpg"),
        (["--output", "."], "--output must name a .json file"),
        (["--other_data_dir", "nowhere"], "--other_data_dir nowhere is not a folder"),
        (["--other_data_dir", ".", "--other_dataset_name", "x"], "give --other_dataset_name or --other_data_dir"),
        (["--other_transform", "flip", "--other_split", "train"], "give no other images with it"),
        (["--other_transform", "shear"], "invalid choice: 'shear'"),
        (["--other_image_column", "img"], "needs --other_dataset_name or --other_data_dir"),
        (["--other_split", "test"], "--other_split must not be --split, got 'test' for both"),
        (["--typical_split", "test"], "--typical_split must not be --split, got 'test' for both"),
        (["--other_split", "val"], "--other_split of the digits must be train, test or a slice"),
        (["--typical_split", "val"], "--typical_split of the digits must be train, test or a slice"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        rank.parse_options(["--model", "m", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(model, tmp_path):
    options = ["--model", model(), "--split", "test[:13]", "--num_samples", 4, "--other_transform", "rotate180",
               "--reference_model", model(name="reference", seed=1)]  # fmt: skip
    reports = []
    for name, launch in (("one.json", []), ("two.json", [*LAUNCH.split(), 2])):
        run_python(*launch, "-m", "diffusers_vdm.commands.rank", *options, "--output", tmp_path / name)
        reports.append(json.loads((tmp_path / name).read_text(encoding="utf-8")))
    one, two = reports
    for part in ("images", "other_images"):
        for left, right in zip(one[part], two[part], strict=True):
            left, right = ({k: v for k, v in row.items() if v is not None} for row in (left, right))
            assert left == pytest.approx(right, rel=1e-4, abs=1e-4)  # other batches have other rounding errors
    assert one["auroc"].keys() == two["auroc"].keys() and one["typical"]["bpd"] == pytest.approx(two["typical"]["bpd"])
