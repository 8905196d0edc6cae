"""Data as people have them, given to the commands: they train on and measure what they name, or they refuse."""

import json

import pytest
import torch
from PIL import Image
from test_examples import metrics, run
from test_image_folder import png, write
from test_images import encoded, parquet_folder

from diffusers_vdm import FixedLinearGamma, VDMPipeline, VDMScheduler, VDMUNet2DModel
from diffusers_vdm.data.image_stream import ImageStream

TINY = (
    "--train_batch_size 2 --max_train_steps 2 --logging_steps 1 --eval_steps 0 --checkpointing_steps 1 "
    "--eval_samples 1 --num_images 1 --ddpm_num_inference_steps 2 --lr_warmup_steps 0 --logger none --num_threads 1 "
    "--model_config_name_or_path {config}"
)


@pytest.fixture
def config(tmp_path):
    """A network of one block for the images of 4×4 pixels of these tests."""
    path = tmp_path / "network"
    path.mkdir()
    arguments = {
        "sample_size": 4, "in_channels": 3, "out_channels": 3, "block_out_channels": [8], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 2,
        "attention_head_dim": 8,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(arguments))
    return path


def options(tmp_path, config, *arguments):
    """The options of train.py and the images that they name."""
    from diffusers_vdm.commands.train_data import load_data
    from diffusers_vdm.commands.train_options import parse_options

    given = [*TINY.format(config=config).split(), "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
    return load_data(parse_options("", [*given, "--cache_dir", str(tmp_path / "cache")]), progress_bar=False)


def model(tmp_path, num_classes=None):
    torch.manual_seed(0)
    unet = VDMUNet2DModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=num_classes,
        null_class=num_classes is not None,
    )  # fmt: skip
    folder = tmp_path / f"model-{num_classes}"
    VDMPipeline(unet, VDMScheduler.from_noise_schedule(FixedLinearGamma())).save_pretrained(folder)
    return folder


def evaluated(tmp_path, folder, *arguments):
    """The report of evaluate.py, or the error that it ends with, in this process."""
    from diffusers_vdm.commands.evaluate_options import load_data, load_model, parse_options

    given = ["--model", str(folder), *map(str, arguments), "--cache_dir", str(tmp_path / "cache")]
    unet, _, num_levels, _, names = load_model(str(folder))
    return load_data(parse_options("", given), num_levels, unet.config.num_class_embeds, names, progress_bar=False)


CLASSES = ["train/a/1.png", "train/a/2.png", "train/b/3.png", "train/b/4.png", "test/a/5.png", "test/b/6.png"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_class_that_was_not_trained_is_refused_before_the_first_step(tmp_path, config, streaming):
    path = write(tmp_path / "data", *CLASSES)
    conditional = ["--train_data_dir", path, "--class_conditional", *streaming]
    train, test = options(tmp_path, config, *conditional)
    assert train.num_classes == 2 and test.labels.sort().values.tolist() == [0, 1]
    path = write(tmp_path / "data", *CLASSES, "test/c/7.png", "test/d/8.png")
    with pytest.raises(ValueError, match=r"classes that .* has not: 2 \(c\), 3 \(d\)"):
        options(tmp_path, config, *conditional)
    train, test = options(tmp_path, config, *conditional[:2], *streaming)  # nobody needs the classes
    assert train.num_classes is None and test.labels is None


def test_a_slice_of_sorted_classes_has_all_of_them(tmp_path, config):
    path = write(tmp_path / "data", *CLASSES)
    sliced = ["--train_data_dir", path, "--class_conditional", "--train_split", "train[:2]"]
    assert options(tmp_path, config, *sliced)[0].num_classes == 2
    done = run("train.py", *sliced, *TINY.format(config=config).split(), "--output_dir", tmp_path / "out", "--dry_run",
               "--cache_dir", tmp_path / "cache")  # fmt: skip
    assert "held-out images are of the classes [1], OF WHICH THERE IS NO TRAINING IMAGE" in done.stdout
    assert f"2 of 2 files of {path} (test) are used" in done.stdout and "classes 'label' (2)" in done.stdout


def test_classes_that_vanish_are_an_error_where_they_are_asked_for(tmp_path, config):
    path = write(tmp_path / "data", *CLASSES, "train/stray.png")
    with pytest.raises(ValueError, match="has no classes; .*train/stray.png not in a folder"):
        options(tmp_path, config, "--train_data_dir", path, "--class_conditional")
    path = write(tmp_path / "other", *CLASSES[:4], "test/5.png")
    with pytest.raises(ValueError, match="test has no classes; name a split that has by --eval_split"):
        options(tmp_path, config, "--train_data_dir", path, "--class_conditional")


@pytest.mark.parametrize(
    ("splits", "shared"),
    [
        (["train", "train[:1]"], "1 of the held-out"),
        (["train[:50%]", "train[1:]"], "1 of the held-out"),
        (["train[2:]", "train[:2]"], None),
        (["train", "test"], None),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_held_out_images_are_no_training_images(tmp_path, config, splits, shared, kind):
    if kind == "folder":
        path = ["--train_data_dir", write(tmp_path / "data", *CLASSES)]
    else:
        # of random crops the pixels differ where the images are the same
        rows = [(png(i, (9, 5)), 0) for i in range(4)]
        path = ["--dataset_name", parquet_folder(tmp_path / "data", rows), "--resolution", 4]
        parquet_folder(tmp_path / "data", [(png(9, (9, 5)), 0)], name="test")
    arguments = [*path, "--train_split", splits[0], "--eval_split", splits[1]]
    if shared:
        with pytest.raises(ValueError, match=f"{shared} images.*--allow_shared"):
            options(tmp_path, config, *arguments)
    train, test = options(tmp_path, config, *arguments, "--allow_shared")
    assert len(train) and len(test)


def test_pixels_that_are_in_both_splits_are_found(tmp_path, config):
    path = write(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")
    image = Image.open(tmp_path / "data" / "train" / "2.png")
    (tmp_path / "data" / "test" / "other.bmp").write_bytes(encoded(image, "bmp"))
    with pytest.raises(ValueError, match="1 of the held-out images"):
        options(tmp_path, config, "--train_data_dir", path)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_an_evaluation_looks_into_the_other_splits(tmp_path, kind):
    folder = model(tmp_path)
    if kind == "folder":
        path = ["--data_dir", write(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")]
        copy = (tmp_path / "data" / "train" / "2.png").read_bytes()
        (tmp_path / "data" / "test" / "4.png").write_bytes(copy)
    else:
        path = ["--dataset_name", parquet_folder(tmp_path / "data", [(png(0), 0), (png(1), 0)])]
        parquet_folder(tmp_path / "data", [(png(2), 0), (png(1), 0)], name="test")
    with pytest.raises(SystemExit, match="two splits|in other splits .*'train': 1"):
        evaluated(tmp_path, folder, *path)
    assert len(evaluated(tmp_path, folder, *path, "--allow_shared")) == 2


def test_an_evaluation_knows_the_classes_of_its_model(tmp_path):
    two, three = model(tmp_path, 2), model(tmp_path, 3)
    path = write(tmp_path / "data", "test/a/1.png", "test/b/2.png", "test/c/3.png")
    data = ["--data_dir", path]
    assert evaluated(tmp_path, three, *data).labels.tolist() == [0, 1, 2]
    with pytest.raises(SystemExit, match="has images of class 2"):
        evaluated(tmp_path, two, *data)
    assert evaluated(tmp_path, two, *data, "--label_column", "").labels is None
    (three / "options.json").write_text(json.dumps({"class_names": ["a", "b", "z"]}))
    with pytest.raises(SystemExit, match="was trained with the classes .*'z'"):
        evaluated(tmp_path, three, *data)
    path = write(tmp_path / "fewer", "test/b/1.png", "test/c/2.png")
    (three / "options.json").unlink()
    with pytest.raises(SystemExit, match="their numbers need not mean the same"):
        evaluated(tmp_path, three, "--data_dir", path)


def test_names_of_splits_are_no_classes_of_an_evaluation(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "test/2.png")
    assert evaluated(tmp_path, model(tmp_path, 2), "--data_dir", path).labels is None


def test_a_report_says_what_was_measured(tmp_path):
    path = write(tmp_path / "data", "test/a/1.png", "test/b/2.png", "test/notes.txt")
    done = run("evaluate.py", "--model", model(tmp_path, 2), "--data_dir", path, "--num_samples", 1, "--output",
               tmp_path / "r.json", "--cache_dir", tmp_path / "cache")  # fmt: skip
    data = json.loads((tmp_path / "r.json").read_text())["data"]
    line = f"2 of 3 files of {path} (test) are used; 1 .txt: not an image that Pillow decodes"
    assert data["files"] == line and line in done.stdout
    assert (data["image_column"], data["label_column"]) == ("image", "label")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_a_damaged_file_costs_a_streamed_run_nothing(tmp_path, config, processes):
    path = write(tmp_path / "data", *(f"train/{i}.png" for i in range(8)), "test/x.png")
    common = ["--train_data_dir", path, "--streaming", "--cache_dir", tmp_path / "cache", "--shuffle_buffer", 8]
    common += [*TINY.format(config=config).replace("steps 2", "steps 4", 1).split(), "--checkpointing_steps", 0]
    out, whole = tmp_path / "out", tmp_path / "whole"
    stream = ImageStream(path, "train", is_folder=True, buffer_size=8, label_column="")
    bad = f"train/{int(stream.batch([6])[0][0, 0, 0, 0])}.png"  # of the fourth step of one process, the second of two
    (tmp_path / "data" / bad).write_bytes(b"")
    done = run("train.py", *common, "--output_dir", out, check=False, processes=processes)
    assert done.returncode != 0 and bad in done.stderr and "it has 0 bytes" in done.stderr
    assert "--skip_damaged" in done.stderr and "train.py: image" in done.stderr
    assert list(out.glob("checkpoint-*")), "the steps before it are saved"
    resume = ["--output_dir", out, "--resume_from_checkpoint", "latest", "--skip_damaged", 2]
    done = run("train.py", *common, *resume, processes=processes)
    assert "1 damaged images were left out" in done.stdout and bad in done.stdout
    run("train.py", *common, "--output_dir", whole, "--skip_damaged", 2, processes=processes)
    timing = {"images_per_second", "data_wait", "flop_utilisation"}
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in metrics(f)] for f in (out, whole)]
    assert lines[0] == lines[1]
    weights = [(f / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for f in (out, whole)]
    assert weights[0] == weights[1]


# ---- streams and resumed runs --------------------------------------------------------------------------------------


def test_a_streamed_held_out_set_ends_where_the_split_ends(tmp_path, config):
    path = parquet_folder(tmp_path / "data", [(png(i), 0) for i in range(6)])
    parquet_folder(tmp_path / "data", [(png(100 + i), 0) for i in range(3)], name="test")
    _, test = options(tmp_path, config, "--dataset_name", path, "--streaming", "--max_eval_images", 20)
    assert sorted(test.images[:, 0, 0, 0].tolist()) == [100, 101, 102] and "3 images" in test.name


@pytest.mark.parametrize("split", ["train+test", "all"])
def test_a_stream_of_several_splits_is_compared_by_their_names(tmp_path, config, split):
    path = parquet_folder(tmp_path / "data", [(png(i), 0) for i in range(6)])
    parquet_folder(tmp_path / "data", [(png(100), 0)], name="test")
    with pytest.raises(ValueError, match="among the training"):
        options(
            tmp_path, config, "--dataset_name", path, "--streaming", "--max_eval_images", 1, "--train_split", split
        )


def test_an_empty_split_beside_does_not_turn_the_checks_off(tmp_path, config):
    path = parquet_folder(tmp_path / "data", [(png(i, (9, 5)), 0) for i in range(6)])
    parquet_folder(tmp_path / "data", [(png(9, (9, 5)), 0)], name="test")
    parquet_folder(tmp_path / "data", [], name="validation")
    both = ["--dataset_name", path, "--resolution", 4]
    with pytest.raises(ValueError, match="1 of the held-out images"):
        options(tmp_path, config, *both, "--train_split", "train+test")
    with pytest.raises(ValueError, match="takes some images twice"):
        options(tmp_path, config, *both, "--train_split", "train[:5]+train[2:3]")
    assert len(evaluated(tmp_path, model(tmp_path), "--dataset_name", path, "--resolution", 4)) == 1


def test_an_evaluation_reads_the_files_that_rows_name(tmp_path):
    write(tmp_path / "data", "a/0.png", "a/1.png", "b/2.png")
    (tmp_path / "data" / "b" / "3.png").write_bytes(png(0))
    files = "  data_files:\n  - split: train\n    path: a/*\n  - split: test\n    path: b/*\n"
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}---\n")
    with pytest.raises(SystemExit, match="in other splits .*'train': 1"):
        evaluated(tmp_path, model(tmp_path), "--dataset_name", tmp_path / "data")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_run_does_not_go_on_with_other_classes(tmp_path, config, streaming):
    path = write(tmp_path / "data", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "abc" for i in range(2)))
    common = ["--train_data_dir", path, "--class_conditional", *streaming, "--cache_dir", tmp_path / "cache"]
    common += [*TINY.format(config=config).split(), "--output_dir", tmp_path / "out"]
    run("train.py", *common)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "b").rename(tmp_path / "data" / split / "d")
    more = ["--max_train_steps", 4, "--allow_changed", "max_train_steps", "--resume_from_checkpoint", "latest"]
    done = run("train.py", *common, *more, check=False)
    assert done.returncode == 1 and "this is not the same run" in done.stderr and "class_names" in done.stderr
