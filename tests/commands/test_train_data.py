"""commands/train_data.py: training takes the images that its options name, or refuses them."""

import json

import datasets
import pytest
from PIL import Image

from diffusers_vdm.data.image_stream import ImageStream
from tests.commands.models import evaluation_data, save_tiny_pipeline
from tests.pictures import encoded, parquet_folder, png, write_images
from tests.running import TIMINGS, metrics_of, run_example

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


CLASSES = ["train/a/1.png", "train/a/2.png", "train/b/3.png", "train/b/4.png", "test/a/5.png", "test/b/6.png"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_class_that_was_not_trained_is_refused_before_the_first_step(tmp_path, config, streaming):
    path = write_images(tmp_path / "data", *CLASSES)
    conditional = ["--train_data_dir", path, "--class_conditional", *streaming]
    train, test = options(tmp_path, config, *conditional)
    assert train.num_classes == 2 and test.labels.sort().values.tolist() == [0, 1]
    path = write_images(tmp_path / "data", *CLASSES, "test/c/7.png", "test/d/8.png")
    with pytest.raises(ValueError, match=r"classes that .* does not have: 2 \(c\), 3 \(d\)"):
        options(tmp_path, config, *conditional)
    train, test = options(tmp_path, config, *conditional[:2], *streaming)  # nobody needs the classes
    assert train.num_classes is None and test.labels is None


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_shift_by_more_than_the_image_is_refused_before_the_first_step(tmp_path, config, streaming):
    path = write_images(tmp_path / "data", *CLASSES)
    train, _ = options(tmp_path, config, "--train_data_dir", path, *streaming)
    size = min(train.shape[1:])
    with pytest.raises(ValueError, match=rf"--random_shift must be below the size of the images, .* got {size}"):
        options(tmp_path, config, "--train_data_dir", path, "--random_shift", size, *streaming)
    options(tmp_path, config, "--train_data_dir", path, "--random_shift", size - 1, *streaming)


def test_a_slice_of_a_split_has_all_classes_of_the_data_set(tmp_path, config):
    path = write_images(tmp_path / "data", *CLASSES)
    sliced = ["--train_data_dir", path, "--class_conditional", "--train_split", "train[:2]"]
    assert options(tmp_path, config, *sliced)[0].num_classes == 2
    done = run_example("train.py", *sliced, *TINY.format(config=config).split(), "--output_dir", tmp_path / "out",
                       "--dry_run", "--cache_dir", tmp_path / "cache")  # fmt: skip
    assert "held-out images have the classes [1], WHICH HAVE NO TRAINING IMAGES" in done.stdout
    assert f"2 of 2 files of {path} (test) are used" in done.stdout and "classes 'label' (2)" in done.stdout


def test_missing_classes_are_refused_for_conditional_training(tmp_path, config):
    path = write_images(tmp_path / "data", *CLASSES, "train/stray.png")
    with pytest.raises(ValueError, match="has no classes; .*train/stray.png not in a folder"):
        options(tmp_path, config, "--train_data_dir", path, "--class_conditional")
    path = write_images(tmp_path / "other", *CLASSES[:4], "test/5.png")
    with pytest.raises(ValueError, match="test has no classes; set --eval_split to a split with classes"):
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
def test_held_out_images_that_are_training_images_are_refused(tmp_path, config, splits, shared, kind):
    if kind == "folder":
        path = ["--train_data_dir", write_images(tmp_path / "data", *CLASSES)]
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


def test_equal_pixels_in_both_splits_are_found(tmp_path, config):
    path = write_images(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")
    image = Image.open(tmp_path / "data" / "train" / "2.png")
    (tmp_path / "data" / "test" / "other.bmp").write_bytes(encoded(image, "bmp"))
    with pytest.raises(ValueError, match="1 of the held-out images"):
        options(tmp_path, config, "--train_data_dir", path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_a_streamed_run_with_a_damaged_file_is_resumed_without_it(tmp_path, config, processes):
    path = write_images(tmp_path / "data", *(f"train/{i}.png" for i in range(8)), "test/x.png")
    common = ["--train_data_dir", path, "--streaming", "--cache_dir", tmp_path / "cache", "--shuffle_buffer", 8]
    common += [*TINY.format(config=config).replace("steps 2", "steps 4", 1).split(), "--checkpointing_steps", 0]
    out, whole = tmp_path / "out", tmp_path / "whole"
    stream = ImageStream(path, "train", is_folder=True, buffer_size=8, label_column="")
    bad = f"train/{int(stream.batch([6])[0][0, 0, 0, 0])}.png"  # of the fourth step of one process, the second of two
    (tmp_path / "data" / bad).write_bytes(b"")
    done = run_example("train.py", *common, "--output_dir", out, check=False, processes=processes)
    assert done.returncode != 0 and bad in done.stderr and "(0 bytes)" in done.stderr
    assert "--skip_damaged" in done.stderr and "train.py: image" in done.stderr
    assert list(out.glob("checkpoint-*")), "the steps before it are saved"
    resume = ["--output_dir", out, "--resume_from_checkpoint", "latest", "--skip_damaged", 2]
    done = run_example("train.py", *common, *resume, processes=processes)
    assert "1 damaged images were skipped" in done.stdout and bad in done.stdout
    run_example("train.py", *common, "--output_dir", whole, "--skip_damaged", 2, processes=processes)
    lines = [[{k: v for k, v in line.items() if k not in TIMINGS} for line in metrics_of(f)] for f in (out, whole)]
    assert lines[0] == lines[1]
    weights = [(f / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for f in (out, whole)]
    assert weights[0] == weights[1]


# ---- streams and resumed runs ------------------------------------------------------------------------------------


def test_a_streamed_held_out_set_ends_where_the_split_ends(tmp_path, config):
    path = parquet_folder(tmp_path / "data", [(png(i), 0) for i in range(6)])
    parquet_folder(tmp_path / "data", [(png(100 + i), 0) for i in range(3)], name="test")
    _, test = options(tmp_path, config, "--dataset_name", path, "--streaming", "--max_eval_images", 20)
    assert sorted(test.images[:, 0, 0, 0].tolist()) == [100, 101, 102] and "3 images" in test.name


@pytest.mark.skipif(int(datasets.__version__.split(".")[0]) < 4, reason="datasets 3 streams one split at a time")
@pytest.mark.parametrize("split", ["train+test", "all"])
def test_a_stream_of_several_splits_is_compared_by_their_names(tmp_path, config, split):
    path = parquet_folder(tmp_path / "data", [(png(i), 0) for i in range(6)])
    parquet_folder(tmp_path / "data", [(png(100), 0)], name="test")
    with pytest.raises(ValueError, match="among the training"):
        options(
            tmp_path, config, "--dataset_name", path, "--streaming", "--max_eval_images", 1, "--train_split", split
        )


def test_shared_images_are_found_beside_an_empty_split(tmp_path, config):
    path = parquet_folder(tmp_path / "data", [(png(i, (9, 5)), 0) for i in range(6)])
    parquet_folder(tmp_path / "data", [(png(9, (9, 5)), 0)], name="test")
    parquet_folder(tmp_path / "data", [], name="validation")
    both = ["--dataset_name", path, "--resolution", 4]
    with pytest.raises(ValueError, match="1 of the held-out images"):
        options(tmp_path, config, *both, "--train_split", "train+test")
    with pytest.raises(ValueError, match="takes some images twice"):
        options(tmp_path, config, *both, "--train_split", "train[:5]+train[2:3]")
    assert len(evaluation_data(tmp_path, save_tiny_pipeline(tmp_path), "--dataset_name", path, "--resolution", 4)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_run_is_not_resumed_with_other_classes(tmp_path, config, streaming):
    path = write_images(
        tmp_path / "data", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "abc" for i in range(2))
    )
    common = ["--train_data_dir", path, "--class_conditional", *streaming, "--cache_dir", tmp_path / "cache"]
    common += [*TINY.format(config=config).split(), "--output_dir", tmp_path / "out"]
    run_example("train.py", *common)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "b").rename(tmp_path / "data" / split / "d")
    more = ["--max_train_steps", 4, "--allow_changed", "max_train_steps", "--resume_from_checkpoint", "latest"]
    done = run_example("train.py", *common, *more, check=False)
    assert done.returncode == 1 and "this is not the same run" in done.stderr and "class_names" in done.stderr
