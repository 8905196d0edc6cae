"""data/image_sources.py: every kind of data set; splits and classes that are not clear are refused."""

import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_vdm.data.image_sources import open_source
from diffusers_vdm.data.image_stream import ImageStream
from diffusers_vdm.data.images import count_shared, load_images
from tests.pictures import DATASETS_LEAVES_FILES_OPEN, QUIET, encoded, indices, parquet_folder, png, write_images


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[1:3]", [1, 2]),
        ("train[:50%]", [0, 1]),
        ("train[-1:]+test", [3, 4]),
        ("train[:1]+train[3:]", [0, 3]),
        ("train+train", "takes some images twice"),
        ("train[:3]+train[2:]", "takes some images twice"),
        ("train[3:1]", "must not end before it starts"),
        ("train[a:b]", "must be a split or a slice"),
        ("train[4:]", "has no images"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_slices_take_every_image_once(tmp_path, split, expected, kind):
    names = [*(f"train/{i}.png" for i in range(4)), "test/9.png"]
    if kind == "folder":
        path, options = write_images(tmp_path / "data", *names), {"is_folder": True}
    else:
        rows = [(png(i), 0) for i in range(5)]
        path, options = parquet_folder(tmp_path / "data", rows[:4]), {}
        parquet_folder(tmp_path / "data", rows[4:], name="test")
    options |= {"cache_dir": str(tmp_path / "cache")}
    if isinstance(expected, list):
        assert indices(load_images(path, split, **options, **QUIET)) == expected
    else:
        with pytest.raises(ValueError, match=expected if kind == "folder" else f"{expected}|no data|cannot be read"):
            load_images(path, split, **options, **QUIET)


@DATASETS_LEAVES_FILES_OPEN
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["test/train/1.png", "train/apple/1.png"],
            "in the splits 'train' and 'test'|in the splits 'test' and 'train'",
        ),
    ],
)
def test_files_declared_in_readme_are_used_and_checked(tmp_path, names, message):
    path = write_images(tmp_path / "data", *names)
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n"
    (tmp_path / "data" / "README.md").write_text(header.format("train/**"))
    options = {"cache_dir": str(tmp_path / "cache"), **QUIET}
    assert indices(load_images(path, "train", **options)) == [1]
    both = "- split: test\n    path: test/**\n  - split: train\n    path: t*/**"
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n  " + both + "\n---\n"
    (tmp_path / "data" / "README.md").write_text(header)
    with pytest.raises(ValueError, match=message):
        load_images(path, "train", **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["photo-train.parquet", "other.parquet"], "1 files of .* are in no split, the first 'other.parquet'"),
        (["train-test.parquet"], "is in the splits"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_in_no_split_or_in_two_are_refused(tmp_path, names, message, streaming):
    for name in names:
        parquet_folder(tmp_path / "new", [(png(1), 0)])
        (tmp_path / "data").mkdir(exist_ok=True)
        next((tmp_path / "new").iterdir()).rename(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "data"), "train", cache_dir=str(tmp_path / "cache"), streaming=streaming)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-1", "train-1-copy"], "contains one file twice"),
        (["train-00000-of-00001", "train-00000-of-00001-copy"], "has 2 files of 'train' instead of 1"),
        (["train-00000-of-00002"], "lacks file 1 of the 2"),
        (["train", "train.png"], r"1 files of .* are in no split, the first 'train.png'"),
    ],
)
def test_incomplete_sets_of_files_are_refused(tmp_path, names, message):
    parquet_folder(tmp_path / "new", [(png(1), 0)])
    content = next((tmp_path / "new").iterdir()).read_bytes()
    (tmp_path / "data").mkdir()
    for name in names:
        path = tmp_path / "data" / (name if name.endswith(".png") else f"{name}.parquet")
        path.write_bytes(png(2) if name.endswith(".png") else content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "data"), "train", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_save_to_disk_folder_is_read_without_the_cache_files_of_map(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": png(i), "path": None} for i in range(4)]
    splits = {"train": rows[:3], "test": rows[3:]}
    made = {name: datasets.Dataset.from_dict({"image": part}, features=features) for name, part in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "data"))
    datasets.load_from_disk(str(tmp_path / "data")).map(lambda row: row)
    assert list((tmp_path / "data" / "train").glob("cache-*.arrow"))
    if streaming:
        data = ImageStream(str(tmp_path / "data"), "train")
        assert data.num_images == 3 and sorted(data.batch(range(3))[0][:, 0, 0, 0].tolist()) == [0, 1, 2]
    else:
        assert indices(load_images(str(tmp_path / "data"), "train", **QUIET)) == [0, 1, 2]
        assert indices(load_images(str(tmp_path / "data"), "train[1:]+test", **QUIET)) == [1, 2, 3]
        made["train"].save_to_disk(str(tmp_path / "single"))
        assert indices(load_images(str(tmp_path / "single"), "train", **QUIET)) == [0, 1, 2]
        with pytest.raises(ValueError, match="Unknown split 'validation'"):
            load_images(str(tmp_path / "data"), "validation", **QUIET)


def test_a_slice_of_a_save_to_disk_folder_has_the_classes_of_its_whole_split(tmp_path):
    def saved(count):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "label": list(range(count))}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": saved(6), "test": saved(2)}).save_to_disk(str(tmp_path / "data"))
    shutil.copy(tmp_path / "data/train/data-00000-of-00001.arrow", tmp_path / "data/train/cache-1.arrow")  # of `map`
    data = load_images(str(tmp_path / "data"), "train[:2]", label_column="label", **QUIET)
    assert indices(data) == [0, 1] and data.num_classes == 6


def test_the_fingerprint_of_a_stream_is_of_all_its_splits(tmp_path):
    path = write_images(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")
    one = ImageStream(path, "train+test", is_folder=True, cache_dir=str(tmp_path / "cache")).fingerprint
    (tmp_path / "data" / "test" / "3.png").write_bytes(png(3, (40, 40)))
    assert ImageStream(path, "train+test", is_folder=True, cache_dir=str(tmp_path / "cache")).fingerprint != one


# ---- columns and classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [["image", "mask"], ["mask", "image"]])
def test_one_of_several_image_columns_must_be_chosen(tmp_path, columns):
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    rows = {"image": [{"bytes": png(1), "path": None}], "mask": [{"bytes": png(2), "path": None}]}
    (tmp_path / "data").mkdir()
    data = datasets.Dataset.from_dict({name: rows[name] for name in columns}, features=features)
    data.to_parquet(str(tmp_path / "data" / "train.parquet"))
    options = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="image_column must name one .*'image'.*'mask'|'mask'.*'image'"):
        load_images(str(tmp_path / "data"), "train", **options, **QUIET)
    for name, value in (("image", 1), ("mask", 2)):
        chosen = load_images(str(tmp_path / "data"), "train", image_column=name, **options, **QUIET)
        assert indices(chosen) == [value] and chosen.image_column == name


def test_one_of_several_class_columns_must_be_chosen(tmp_path):
    kinds = {
        "coarse_label": datasets.ClassLabel(names=["x", "y"]),
        "fine_label": datasets.ClassLabel(names=["p", "q"]),
    }
    rows = {"image": [{"bytes": png(1), "path": None}], "coarse_label": [1], "fine_label": [0]}
    (tmp_path / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), **kinds})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    path, options = str(tmp_path / "data"), {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="label_column must name one .*'coarse_label', 'fine_label'"):
        load_images(path, "train", **options, **QUIET)
    with pytest.raises(ValueError, match="label_column must name one"):
        ImageStream(path, "train", **options)
    fine = load_images(path, "train", label_column="fine_label", **options, **QUIET)
    assert fine.labels.tolist() == [0] and fine.class_names == ("p", "q") and fine.label_column == "fine_label"
    assert load_images(path, "train", label_column="", **options, **QUIET).labels is None


def test_classes_with_names_of_splits_are_not_used(tmp_path):
    kinds = {"label": datasets.ClassLabel(names=["test", "train"])}
    path = parquet_folder(tmp_path / "data", [(png(0), 0), (png(1), 0)], **kinds)
    options = {"cache_dir": str(tmp_path / "cache")}
    assert load_images(path, "train", **options, **QUIET).labels is None
    assert not ImageStream(path, "train", **options).has_labels
    with pytest.raises(ValueError, match="names of splits"):
        load_images(path, "train", label_column="label", **options, **QUIET)


@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_the_number_of_classes_is_that_of_the_whole_data_set(tmp_path, kind):
    rows = [(png(i), i // 3) for i in range(9)]
    types = datasets.ClassLabel(names=["a", "b", "c"]) if kind == "names" else datasets.Value("int64")
    path = parquet_folder(tmp_path / "data", rows, label=types)
    options = {"cache_dir": str(tmp_path / "cache"), "label_column": "label"}
    data = load_images(path, "train[:2]", **options, **QUIET)
    assert data.labels.tolist() == [0, 0] and data.num_classes == 3


@pytest.mark.parametrize("label", [123456789, -123456789, 2.5, "cat", True])
def test_a_column_of_values_that_are_not_classes_is_refused(tmp_path, label):
    kind = {int: "int64", float: "float64", str: "string", bool: "bool"}[type(label)]
    path = parquet_folder(tmp_path / "data", [(png(0), label), (png(1), label)], label=datasets.Value(kind))
    options = {"cache_dir": str(tmp_path / "cache"), "label_column": "label"}
    with pytest.raises(ValueError, match="image 0 of .*label_column 'label'"):
        load_images(path, "train", **options, **QUIET)
    with pytest.raises(ValueError, match="image 0 of .*label_column 'label'"):
        ImageStream(path, "train", **options)


# ---- data sets that change, and images in two data sets ----------------------------------------------------------


def declared(root, value):
    """A data set whose README.md says which files make which split, as a copy of one on the Hub."""
    files = "  data_files:\n  - split: train\n    path: data/*\n  - split: test\n    path: heldout/*\n"
    parquet_folder(root / "data", [(png(value), 0)], name="a")
    parquet_folder(root / "heldout", [(png(value + 1), 0), (png(value + 2), 0)], name="b")
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}---\n")
    return str(root)


@pytest.mark.parametrize("decoded_cache", [False, True])
def test_local_data_sets_of_the_same_name_are_distinguished_and_changes_are_seen(tmp_path, decoded_cache):
    options = {"cache_dir": str(tmp_path / "cache"), "decoded_cache": decoded_cache, **QUIET}
    one, two = (declared(tmp_path / name / "faces", value) for name, value in (("A", 10), ("B", 20)))
    assert indices(load_images(one, "test", **options)) == [11, 12]
    assert indices(load_images(two, "test", **options)) == [21, 22]
    parquet_folder(tmp_path / "A" / "faces" / "heldout", [(png(31), 0), (png(32), 0)], name="b")
    assert indices(load_images(one, "test", **options)) == [31, 32]
    parquet_folder(tmp_path / "A" / "faces" / "heldout", [(png(33), 0)], name="c")
    assert indices(load_images(one, "test", **options)) == [31, 32, 33]


def test_images_that_rows_name_are_decoded_again_when_they_change(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "1.png").write_bytes(png(1))
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "1.png")}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    options = {"cache_dir": str(tmp_path / "cache"), "decoded_cache": True, **QUIET}
    assert indices(load_images(str(tmp_path / "data"), "train", **options)) == [1]
    (tmp_path / "1.png").write_bytes(png(2))
    assert indices(load_images(str(tmp_path / "data"), "train", **options)) == [2]


@pytest.mark.parametrize("cropped", [False, True])
def test_shared_images_are_found_for_any_crop_and_format(tmp_path, cropped):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (4, 40, 3), dtype=np.uint8)) for _ in range(4)]
    train = parquet_folder(tmp_path / "train", [(encoded(image), 0) for image in pictures[:3]])
    test = parquet_folder(tmp_path / "test", [(encoded(image, "bmp"), 0) for image in pictures[3:] + pictures[1:3]])
    options = {"cache_dir": str(tmp_path / "cache"), "decoded_cache": True, **QUIET}
    options |= {"resolution": 4} if cropped else {}
    for _ in range(2):
        assert count_shared(*(load_images(path, "train", **options) for path in (train, test))) == 2
