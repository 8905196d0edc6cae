"""The options of `evaluate`: those that are refused, and the images and classes that they name."""

import json

import pytest

from tests.commands.models import evaluation_data, save_tiny_pipeline
from tests.pictures import parquet_folder, png, write_images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ode", "--num_steps", "5"], "the steps of the ODE follow"),
        (["--rtol", "0.1"], "--rtol needs --method ode, got --method mc"),
        (["--method", "vlb", "--target_stderr", "0.1"], "--target_stderr needs --method mc"),
        (["--target_stderr", "-1"], "--target_stderr must be positive"),
        (["--method", "vlb", "--timesteps", "5", "1", "--num_steps", "3"], "not both"),
        (["--method", "vlb", "--best_steps", "0"], "--best_steps must be positive"),
        (["--table", "10", "-1"], "--table must be positive"),
        (["--output", "report.txt"], "must name a .json file"),
        (["--dataset_name", "a", "--data_dir", "b"], "not both"),
        (["--split", "validation"], "--split of the digits must be train, test or a slice"),
        (["--resolution", "16"], "--resolution needs a data set"),
        (["--data_dir", "does/not/exist"], "is not a folder"),
        (["--method", "vlb", "--num_samples", "3"], "--num_samples needs --method mc or ode"),
        (["--target_stderr", "0.1", "--max_samples", "5"], "--max_samples 5 must be at least --num_samples 20"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    from diffusers_vdm.commands.evaluate_options import parse_options

    with pytest.raises(SystemExit) as stop:
        parse_options("", ["--model", "m", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_train_and_evaluate_take_both_names_of_the_option_for_a_folder(tmp_path):
    from diffusers_vdm.commands import evaluate_options, train_options

    for flag in ("--data_dir", "--train_data_dir"):
        o = train_options.parse_options("", [flag, str(tmp_path), "--output_dir", str(tmp_path / "out")])
        assert o.train_data_dir == str(tmp_path) and "train_data_dir" in o.given
        assert not {"data_dir"} & (vars(o).keys() | set(o.given))  # one name in options.json and on a card
        o = evaluate_options.parse_options("", ["--model", "m", flag, str(tmp_path)])
        assert o.data_dir == str(tmp_path) and not hasattr(o, "train_data_dir")


# ---- the images of an evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_images_that_are_also_in_another_split_are_refused(tmp_path, kind):
    folder = save_tiny_pipeline(tmp_path)
    if kind == "folder":
        path = ["--data_dir", write_images(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")]
        copy = (tmp_path / "data" / "train" / "2.png").read_bytes()
        (tmp_path / "data" / "test" / "4.png").write_bytes(copy)
    else:
        path = ["--dataset_name", parquet_folder(tmp_path / "data", [(png(0), 0), (png(1), 0)])]
        parquet_folder(tmp_path / "data", [(png(2), 0), (png(1), 0)], name="test")
    with pytest.raises(SystemExit, match="two splits|in other splits .*'train': 1"):
        evaluation_data(tmp_path, folder, *path)
    assert len(evaluation_data(tmp_path, folder, *path, "--allow_shared")) == 2


@pytest.fixture
def images_of_three_classes(tmp_path):
    return write_images(tmp_path / "data", "test/a/1.png", "test/b/2.png", "test/c/3.png")


def test_images_of_the_classes_of_the_model_are_taken(tmp_path, images_of_three_classes):
    data = evaluation_data(tmp_path, save_tiny_pipeline(tmp_path, 3), "--data_dir", images_of_three_classes)
    assert data.labels.tolist() == [0, 1, 2]


def test_images_of_more_classes_than_the_model_has_are_refused_or_taken_without(tmp_path, images_of_three_classes):
    model, options = save_tiny_pipeline(tmp_path, 2), ["--data_dir", images_of_three_classes]
    with pytest.raises(SystemExit, match="has images of class 2"):
        evaluation_data(tmp_path, model, *options)
    assert evaluation_data(tmp_path, model, *options, "--label_column", "").labels is None


def test_images_of_other_classes_than_those_of_the_training_are_refused(tmp_path, images_of_three_classes):
    model = save_tiny_pipeline(tmp_path, 3)
    (model / "options.json").write_text(json.dumps({"class_names": ["a", "b", "z"]}))
    with pytest.raises(SystemExit, match="was trained with the classes .*'z'"):
        evaluation_data(tmp_path, model, "--data_dir", images_of_three_classes)


def test_images_of_fewer_classes_without_the_names_of_those_of_the_model_are_refused(tmp_path):
    path = write_images(tmp_path / "fewer", "test/b/1.png", "test/c/2.png")
    with pytest.raises(SystemExit, match="their indices may have other meanings"):
        evaluation_data(tmp_path, save_tiny_pipeline(tmp_path, 3), "--data_dir", path)


def test_names_of_splits_are_not_classes(tmp_path):
    path = write_images(tmp_path / "data", "train/1.png", "test/2.png")
    assert evaluation_data(tmp_path, save_tiny_pipeline(tmp_path, 2), "--data_dir", path).labels is None


def test_shared_images_are_found_in_the_files_that_rows_name(tmp_path):
    write_images(tmp_path / "data", "a/0.png", "a/1.png", "b/2.png")
    (tmp_path / "data" / "b" / "3.png").write_bytes(png(0))
    files = "  data_files:\n  - split: train\n    path: a/*\n  - split: test\n    path: b/*\n"
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}---\n")
    with pytest.raises(SystemExit, match="in other splits .*'train': 1"):
        evaluation_data(tmp_path, save_tiny_pipeline(tmp_path), "--dataset_name", tmp_path / "data")
