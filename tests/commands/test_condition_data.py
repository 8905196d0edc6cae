"""Training with vectors and images as conditions: the network, its samples, a resumed run, and its evaluation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_vdm import VariationalBound, VDMPipeline, evaluate_mc, noise_schedule_of
from diffusers_vdm.data.images import load_digits_split
from diffusers_vdm.diffusion import low_resolution, x_from_levels
from tests.models import tiny_preset
from tests.running import SHORT_TRAINING, metrics_of, run_command, run_example

OPTIONS = f"{SHORT_TRAINING} --logger none --num_threads 1 --width 16 --preset fast"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of 8×8 in two splits, with two columns of numbers."""
    root, source = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 20)):
        (root / split).mkdir()
        with open(root / split / "metadata.jsonl", "w") as file:
            for i in range(count):
                pixels = source.integers(0, 256, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"{i}.png")
                row = {
                    "file_name": f"{i}.png",
                    "mass": float(pixels.mean()),
                    "corner": [int(pixels[0, 0]), 1000.0 + i],
                }
                file.write(json.dumps(row) + "\n")
    return root


def train(output_dir, *arguments, **more):
    return run_example("train.py", "--output_dir", output_dir, *OPTIONS.split(), *map(str, arguments), **more)


def weights(output_dir):
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_run_with_vectors_samples_resumes_and_is_evaluated_with_them(folder, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    data = ["--train_data_dir", folder, "--cond_columns", "mass", "corner", "--cache_dir", tmp_path / "cache"]
    printed = train(whole, *data).stdout
    assert "a vector of mass, corner[0], corner[1]; withheld from 10% of the images, independently" in printed
    config = json.loads((whole / "unet" / "config.json").read_text())
    assert config["cond_dim"] == 3 and config["null_vectors"] and config["cond_mean"][2] == pytest.approx(1011.5)
    assert (whole / "samples.png").stat().st_size > 200

    train(part, *data)
    for name in ("model_index.json", "checkpoint-6"):
        path = part / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "removed")
    train(part, *data, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(value, weights(part)[name]) for name, value in weights(whole).items())
    changed = train(part, *data[:3], "mass", "--resume_from_checkpoint", "latest", check=False)
    assert changed.returncode != 0 and "Traceback" not in changed.stderr

    report = tmp_path / "report.json"
    arguments = ["--data_dir", folder, "--num_samples", 2, "--seed", 3, "--cache_dir", tmp_path / "cache"]
    run_example("evaluate.py", "--model", whole, *arguments, "--output", report)
    found = json.loads(report.read_text())
    assert found["conditions"] == ["cond_vectors"]
    other = run_example("evaluate.py", "--model", whole, *arguments, "--cond_columns", "corner", "mass", check=False)
    assert "--cond_columns must be that of the training, ['mass', 'corner']" in other.stderr
    pipe = VDMPipeline.from_pretrained(whole)
    rows = [json.loads(line) for line in (folder / "test" / "metadata.jsonl").read_text().splitlines()]
    images = torch.stack([torch.from_numpy(np.array(Image.open(folder / "test" / row["file_name"]))) for row in rows])
    vectors = torch.tensor([[row["mass"], *row["corner"]] for row in rows], dtype=torch.float64)
    bound = VariationalBound(pipe.unet, noise_schedule_of(pipe.scheduler))
    again = evaluate_mc(bound, images[:, None], cond_vectors=vectors, num_samples=2, seed=3, progress_bar=False)
    assert found["bpd"] == pytest.approx(again.bpd, rel=1e-5)


def test_a_run_for_upscaling_is_conditioned_on_smaller_images(tmp_path):
    out = tmp_path / "out"
    options = [
        "--upscale_factor",
        2,
        "--class_conditional",
        "--random_flip",
        "--condition_dropout",
        0,
        "--mixed_precision",
    ]
    printed = train(out, *options, "no", "--num_images", 25).stdout
    assert "10 classes, the image 2 times smaller; withheld from 0%" in printed
    pipe = VDMPipeline.from_pretrained(out)
    assert pipe.unet.config.cond_channels == 1 and not pipe.unet.config.null_images
    assert pipe.unet.config.num_class_embeds == 10 and not pipe.unet.config.null_class
    _, test = load_digits_split()
    small = low_resolution(test.images[:20], 2)
    bound = VariationalBound(pipe.unet, noise_schedule_of(pipe.scheduler), num_levels=17)
    given = {"class_labels": test.labels[:20], "cond_images": x_from_levels(small, 17, torch.float32)}
    last = metrics_of(out)[-1]
    again = evaluate_mc(bound, test.images, num_samples=2, progress_bar=False, class_labels=test.labels,
                        cond_images=x_from_levels(low_resolution(test.images, 2), 17, torch.float32))  # fmt: skip
    assert last["eval_num_images"] == 297 and last["eval_bpd"] == pytest.approx(again.bpd, rel=1e-4)
    # the pipeline takes the same images in [0, 1]
    arguments = {"class_labels": given["class_labels"], "output_type": "pt"}
    pictures = pipe(20, 2, torch.Generator().manual_seed(0), image=small / 16, **arguments).images
    tensors = pipe(20, 2, torch.Generator().manual_seed(0), cond_images=given["cond_images"], **arguments).images
    assert torch.equal(pictures, tensors)
    card = run_command("card", out)
    assert card.returncode == 0 and "image=small_image" in (out / "README.md").read_text()


@pytest.mark.slow
def test_the_numbers_of_a_column_of_images_are_a_condition(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = np.random.default_rng(1)
    rows = [Image.fromarray(source.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(16)]
    others = [Image.fromarray(source.integers(0, 256, (4, 4)).astype(np.uint8)) for _ in range(16)]
    data = datasets.Dataset.from_dict(
        {"picture": rows, "depth": others},
        features=datasets.Features({"picture": datasets.Image(), "depth": datasets.Image()}),
    )
    datasets.DatasetDict(train=data.select(range(10)), test=data.select(range(10, 16))).save_to_disk(tmp_path / "data")
    options = ["--dataset_name", tmp_path / "data", "--image_column", "picture", "--cond_image_column", "depth"]
    out = tmp_path / "out"
    printed = train(out, *options, "--random_rotation", "--cache_dir", tmp_path / "cache").stdout
    assert "images of 1 channels" in printed
    assert VDMPipeline.from_pretrained(out).unet.config.cond_channels == 1
    report = tmp_path / "report.json"
    run_example("evaluate.py", "--model", out, *options[:4], "--num_samples", 1, "--output", report)
    assert json.loads(report.read_text())["conditions"] == ["cond_images"]


REFUSED = [
    (["--cond_columns", "mass"], "--cond_columns needs a data set"),
    (["--upscale_factor", "3"], "--upscale_factor must divide the size of the images, 8×8, got 3"),
    (["--train_data_dir", "{data}", "--cond_columns", "weight"], "has no column 'weight'; its columns are"),
    (["--train_data_dir", "{data}", "--cond_columns", "mass", "--streaming"], "cannot be used with --streaming"),
    (["--train_data_dir", "{data}", "--cond_columns", "mass", "--skip_damaged", "1"], "cannot be used with --skip_d"),
    (["--train_data_dir", "{data}", "--cond_image_column", "image", "--upscale_factor", "2"], "not both"),
    (["--train_data_dir", "{data}", "--cond_image_column", "image"], "must not be the column of the images"),
    (["--train_data_dir", "{data}", "--cond_image_column", "mass"], "--cond_image_column mass: image_column must"),
    (["--train_data_dir", "{data}", "--cond_columns", "mass", "mass"], "--cond_columns must be different columns"),
    (["--train_data_dir", "{data}", "--caption_column", "mass", "--text_encoder", "{data}"], "--text_encoder must be"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_wrong_conditions_are_refused_before_any_step(folder, tmp_path, arguments, message):
    from diffusers_vdm.commands.train_data import load_data
    from diffusers_vdm.commands.train_options import parse_options

    given = [argument.format(data=folder) for argument in arguments]
    given += ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match=message):
        load_data(parse_options("", given), progress_bar=False)


def test_a_network_of_a_condition_that_nothing_names_is_refused(tmp_path):
    from diffusers_vdm.commands.train_data import load_data
    from diffusers_vdm.commands.train_options import build, parse_options

    tiny_preset(cond_dim=2, null_vectors=True).save_config(tmp_path / "network")
    arguments = ["--output_dir", str(tmp_path / "out"), "--model_config_name_or_path", str(tmp_path / "network")]
    args = parse_options("", arguments)
    with pytest.raises(ValueError, match="the network takes cond_vectors, but no option names them"):
        build(args, load_data(args, progress_bar=False)[0])
