"""image_folder.py and image_sources.py: every image of a folder is in one split, once, or the folder is refused."""

import json
import os
import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from test_images import DATASETS_LEAVES_FILES_OPEN, encoded, parquet_folder

from diffusers_vdm.data.image_files import decode
from diffusers_vdm.data.image_folder import SPLIT_WORDS, read_image_folder
from diffusers_vdm.data.image_sources import open_source
from diffusers_vdm.data.image_stream import ImageStream
from diffusers_vdm.data.images import count_shared, load_images

QUIET = {"progress_bar": False}


def png(value, size=(4, 4)):
    return encoded(Image.new("RGB", size, (value, value // 2, 7)))


def write(root, *names):
    """Writes one image for each name, all different: pixel (0, 0) of the red channel is the index of the name."""
    for i, name in enumerate(names):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return str(root)


def loaded(path, split, tmp_path, **options):
    return load_images(path, split, is_folder=True, cache_dir=str(tmp_path / "cache"), **QUIET, **options)


def indices(data):
    return sorted(data.images[:, 0, 0, 0].tolist())


# ---- splits ------------------------------------------------------------------------------------------------------


def test_words_within_paths_make_no_splits(tmp_path):
    # datasets #4015, #5021: each of these put held-out images among the training images, or dropped some
    path = write(tmp_path / "a", "train/apple/1.png", "train/train/1.png", "test/apple/1.png", "test/train/1.png")
    assert indices(loaded(path, "train", tmp_path)) == [0, 1] and indices(loaded(path, "test", tmp_path)) == [2, 3]
    assert loaded(path, "test", tmp_path).class_names == ("apple", "train")
    path = write(
        tmp_path / "b", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("test-tubes", "x") for i in "12")
    )
    assert indices(loaded(path, "test", tmp_path)) == [4, 5, 6, 7]
    path = write(tmp_path / "c", "1.png", "2.png", "photo of a train.png", "4.png", "photo of test tubes.png", "6.png")
    assert indices(loaded(path, "train", tmp_path)) == list(range(6))


@pytest.mark.parametrize("word", SPLIT_WORDS)
@pytest.mark.parametrize("spell", [str, str.upper, str.capitalize])
def test_a_top_folder_with_the_name_of_a_split_is_that_split(tmp_path, word, spell):
    path = write(tmp_path / "data", f"{spell(word)}/1.png", f"{spell(word)}/2.png")
    assert indices(loaded(path, SPLIT_WORDS[word], tmp_path)) == [0, 1]
    for other in set(SPLIT_WORDS.values()) - {SPLIT_WORDS[word]}:
        with pytest.raises(ValueError, match=f"Unknown split '{other}'"):
            loaded(path, other, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "test/1.png", "extra/1.png"], "beside others with images .extra"),
        (["car/1.png", "plane/1.png", "train/1.png"], "If all of them are classes"),
        (["val/1.png", "valid/1.png"], "several folders of the split 'validation'"),
        (["faces/train/1.png", "faces/test/1.png"], "one folder deeper; name .*faces"),
        (["faces/train/a/1.png", "faces/test/b/1.png", "preview.png"], "one folder deeper"),
        (
            ["cat/train/1.png", "cat/test/2.png", "dog/train/1.png", "dog/test/1.png"],
            "splits must be at the top level",
        ),
        (["train_images/1.png", "test_images/1.png"], "name them train, validation or test"),
    ],
)
def test_folders_whose_splits_are_not_clear_are_refused(tmp_path, names, message):
    path = write(tmp_path / "data", *names)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message):
            loaded(path, split, tmp_path)
        with pytest.raises(ValueError, match=message):
            ImageStream(path, split, is_folder=True)


def test_splits_that_are_links_are_followed(tmp_path):
    write(tmp_path / "far", "one/a/1.png", "one/b/1.png", "two/a/1.png")
    data = tmp_path / "data"
    data.mkdir()
    os.symlink(tmp_path / "far" / "one", data / "train")
    os.symlink("../far/two", data / "test")
    (data / "test").resolve().joinpath("back").symlink_to(data)  # a link to what holds it ends the walk
    assert indices(loaded(str(data), "train", tmp_path)) == [0, 1]
    assert indices(loaded(str(data), "test", tmp_path)) == [2]


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
        ("train[4:]", "is empty"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_slices_take_every_image_once(tmp_path, split, expected, kind):
    names = [*(f"train/{i}.png" for i in range(4)), "test/9.png"]
    if kind == "folder":
        path, options = write(tmp_path / "data", *names), {"is_folder": True}
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


def test_an_image_in_two_splits_is_refused_unless_that_is_allowed(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")
    (tmp_path / "data" / "test" / "copy.png").write_bytes((tmp_path / "data" / "train" / "2.png").read_bytes())
    os.symlink(tmp_path / "data" / "train" / "1.png", tmp_path / "data" / "test" / "link.png")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="2 images in two splits.*allow_shared"):
            loaded(path, split, tmp_path)
        with pytest.raises(ValueError, match="2 images in two splits.*allow_shared"):
            ImageStream(path, split, is_folder=True)
    assert indices(loaded(path, "test", tmp_path, allow_shared=True)) == [0, 1, 2]


def test_a_link_to_an_image_of_the_same_split_is_refused(tmp_path):
    path = write(tmp_path / "data", "1.png", "2.png")
    os.symlink("1.png", tmp_path / "data" / "3.png")
    with pytest.raises(ValueError, match="one image twice, 1.png and 3.png"):
        loaded(path, "train", tmp_path)


# ---- classes -----------------------------------------------------------------------------------------------------


def test_a_class_has_one_index_in_all_splits(tmp_path):
    path = write(tmp_path / "data", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/c/1.png")
    train, test = (loaded(path, split, tmp_path) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b", "c") and train.num_classes == test.num_classes == 3
    assert train.labels.tolist() == [1, 2] and test.labels.tolist() == [0, 2]
    assert train.classes_in_split == {1, 2} and loaded(path, "train[:1]", tmp_path).classes_in_split == {1, 2}
    assert loaded(path, "train[:1]", tmp_path).num_classes == 3


@pytest.mark.parametrize(
    "names",
    [
        ["train/1.png", "test/1.png"],  # datasets #7880: ClassLabel ['test', 'train']
        ["train/test/1.png", "test/train/1.png"],
        ["train/only/1.png", "test/only/1.png"],
    ],
)
def test_names_that_tell_no_classes_apart_are_no_classes(tmp_path, names):
    path = write(tmp_path / "data", *names)
    data = loaded(path, "test", tmp_path)
    assert data.labels is None and data.class_names is None and data.label_column is None


def test_one_stray_image_takes_the_classes_away_and_is_named(tmp_path):
    path = write(
        tmp_path / "data", "train/a/1.png", "train/b/1.png", "train/stray.png", "test/a/1.png", "test/b/1.png"
    )
    data = loaded(path, "train", tmp_path)
    assert data.labels is None and len(data) == 3
    assert "no classes, since train/stray.png not in a folder of a class" in data.files
    assert loaded(path, "test", tmp_path).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="label_column 'label'"):
        loaded(path, "train", tmp_path, label_column="label")


@pytest.mark.parametrize("columns", [["image", "mask"], ["mask", "image"]])
def test_several_columns_of_images_must_be_chosen_from(tmp_path, columns):
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


def test_several_columns_of_classes_must_be_chosen_from(tmp_path):
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


def test_classes_that_are_names_of_splits_are_none_in_any_data_set(tmp_path):
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
def test_a_column_of_other_numbers_is_no_column_of_classes(tmp_path, label):
    kind = {int: "int64", float: "float64", str: "string", bool: "bool"}[type(label)]
    path = parquet_folder(tmp_path / "data", [(png(0), label), (png(1), label)], label=datasets.Value(kind))
    options = {"cache_dir": str(tmp_path / "cache"), "label_column": "label"}
    with pytest.raises(ValueError, match="image 0 of .*label_column 'label'"):
        load_images(path, "train", **options, **QUIET)
    with pytest.raises(ValueError, match="image 0 of .*label_column 'label'"):
        ImageStream(path, "train", **options)


# ---- files -------------------------------------------------------------------------------------------------------


def test_every_file_that_is_left_out_is_counted(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "train/2.PNG", "test/3.png", "train/.hidden.png", "preview.png")
    for name in ("train/4.heic", "train/5.jxl", "train/notes.txt", "train/__MACOSX/6.png"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"?")
    data = loaded(path, "train", tmp_path)
    assert indices(data) == [0, 1]
    assert data.files.startswith(f"2 of 8 files of {path} (train) are used; ")
    reasons = data.files.split("; ")[1:]
    assert sorted(reasons) == [
        "1 .heic: not an image that Pillow decodes", "1 .jxl: not an image that Pillow decodes",
        "1 .txt: not an image that Pillow decodes", "1 beside the folders of the splits", "2 hidden",
    ]  # fmt: skip
    assert ImageStream(path, "train", is_folder=True).files == data.files


def test_formats_that_pillow_decodes_are_taken_whatever_datasets_knows(tmp_path):
    path = write(tmp_path / "data", "1.png")
    for name, options in (("2.avif", {"quality": 100}), ("3.webp", {"lossless": True}), ("4.qoi", {})):
        if name[1:] in Image.registered_extensions():
            Image.new("RGB", (4, 4), 0).save(tmp_path / "data" / name, **options)
    assert len(loaded(path, "train", tmp_path)) == len(list((tmp_path / "data").iterdir())) > 2


def test_archives_are_named_where_they_are_all_there_is(tmp_path):
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "train.zip", "w") as file:
        file.writestr("cat/1.png", png(1))
    with pytest.raises(ValueError, match="archives are not opened, extract train.zip"):
        loaded(str(tmp_path / "data"), "train", tmp_path)


def test_a_folder_of_images_is_one_however_it_is_named(tmp_path):
    """As `--dataset_name` a local folder goes to the same reader, and not to words in its paths."""
    path = write(tmp_path / "data", "train/apple/1.png", "train/train/1.png", "test/apple/1.png", "test/train/1.png")
    options = {"cache_dir": str(tmp_path / "cache"), **QUIET}
    assert indices(load_images(path, "train", **options)) == [0, 1]
    assert indices(load_images(path, "test", **options)) == [2, 3]


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
def test_declared_files_are_taken_as_declared_and_checked(tmp_path, names, message):
    path = write(tmp_path / "data", *names)
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


# ---- metadata ----------------------------------------------------------------------------------------------------


def test_images_that_metadata_do_not_list_are_counted(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "train/2.png", "train/3.png", "train/4.png", "test/1.png")
    (tmp_path / "data" / "train" / "metadata.csv").write_text("file_name,kind\n3.png,1\n1.png,0\n4.png,1\n")
    data = loaded(path, "train", tmp_path, label_column="kind")
    assert data.images[:, 0, 0, 0].tolist() == [2, 0, 3] and data.labels.tolist() == [1, 0, 1]
    assert data.files == f"3 of 4 files of {path} (train) are used; 1 not listed in the metadata"
    assert loaded(path, "test", tmp_path).files == f"1 of 1 files of {path} (test) are used"


def test_metadata_at_the_top_level_serve_all_splits(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "train/2.png", "test/1.png")
    lines = [{"file_name": "test/1.png", "kind": 1}, {"file_name": "train/2.png", "kind": 0}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert indices(loaded(path, "train", tmp_path, label_column="kind")) == [1]
    assert loaded(path, "test", tmp_path, label_column="kind").labels.tolist() == [1]


def test_further_columns_of_files_are_images_too(tmp_path):
    path = write(tmp_path / "data", "a.png", "a_mask.png", "b.png", "b_mask.png", "left.png")
    (tmp_path / "data" / "metadata.csv").write_text("mask_file_name,file_name\na_mask.png,a.png\nb_mask.png,b.png\n")
    with pytest.raises(ValueError, match=r"image_column must name one .*'image', 'mask'|'mask', 'image'"):
        loaded(path, "train", tmp_path)
    assert indices(loaded(path, "train", tmp_path, image_column="mask")) == [1, 3]
    data = loaded(path, "train", tmp_path, image_column="image")
    assert indices(data) == [0, 2]
    assert "2 named by other columns of the metadata; 1 not listed in the metadata" in data.files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,kind\n1.png,0\n1.png,1\n", "more than once .1.png"),
        (b"file_name\n../../etc/passwd.png\n", "must name files within"),
        (b"file_name\nhttps://x.org/1.png\n", "must name files within"),
        (b"file_name\ngone.png\n", "lists 'gone.png' in row 1, and there is no such file"),
        (b"name\n1.png\n", "must have a file_name"),
        ("file_name,kind\n1.png,café\n".encode("latin-1"), "metadata.csv must be UTF-8, but its byte 24 is 0xe9"),
        (b"file_name,kind\n1.png,0\n2.png,1,2,3\n", "metadata.csv cannot be read"),
        (b"", "metadata.csv cannot be read"),
    ],
)
def test_metadata_that_are_wrong_are_named(tmp_path, content, message):
    path = write(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "data" / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        loaded(path, "train", tmp_path)


def test_a_byte_order_mark_and_numbers_as_names_do_no_harm(tmp_path):
    path = write(tmp_path / "data", "001", "002.png")
    (tmp_path / "data" / "metadata.csv").write_bytes("\ufefffile_name,kind\n001,1\n002.png,\n".encode())
    data = loaded(path, "train", tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1] and data.files.startswith("2 of 2 files")
    with pytest.raises(ValueError, match="image 1 of .*holds no class"):
        loaded(path, "train", tmp_path, label_column="kind")


# ---- single files ------------------------------------------------------------------------------------------------


def frames(kind, count=3):
    pictures = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(count)]
    options = {"webp": {"lossless": True}}.get(kind, {})
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


@pytest.mark.parametrize("kind", ["tiff", "png", "webp", "gif"])
def test_files_with_several_frames_are_refused_unless_one_says_which(tmp_path, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"1.{kind}").write_bytes(frames(kind))
    (tmp_path / "data" / "2.png").write_bytes(png(9))
    path, options = str(tmp_path / "data"), {"image_mode": "RGB"}
    with pytest.raises(ValueError, match="has 3 frames; set frames='first'"):
        loaded(path, "train", tmp_path, **options)
    with pytest.raises(ValueError, match="has 3 frames; set frames='first'"):
        ImageStream(path, "train", is_folder=True, **options)
    assert indices(loaded(path, "train", tmp_path, frames="first", **options)) == [0, 9]
    every = loaded(path, "train", tmp_path, frames="all", **options)
    assert np.allclose(indices(every), [0, 9, 60, 120], atol=1)
    cached = loaded(path, "train", tmp_path, frames="all", decoded_cache=True, **options)
    assert cached.fingerprint == every.fingerprint
    stream = ImageStream(path, "train", is_folder=True, frames="first", **options)
    assert sorted(stream.batch(range(2))[0][:, 0, 0, 0].tolist()) == [0, 9]
    with pytest.raises(ValueError, match="frames must be 'first' or None in a stream"):
        ImageStream(path, "train", is_folder=True, frames="all")
    with pytest.raises(ValueError, match="frames must be"):
        loaded(path, "train", tmp_path, frames="last")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, it has 0 bytes"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (png(0)[:40], "cannot be decoded"),
        (b"anything", "cannot identify image file its content"),
    ],
)
def test_a_file_that_is_no_image_says_what_it_is(tmp_path, content, message):
    path = write(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "data" / "2.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"2.png.*{message}"):
        loaded(path, "train", tmp_path)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    path = write(tmp_path / "data", "1.png")
    os.symlink("gone.png", tmp_path / "data" / "2.png")
    with pytest.raises(ValueError, match="2.png.*missing, or a link that leads nowhere"):
        loaded(path, "train", tmp_path)


def test_the_limit_of_pillow_is_named_as_such(tmp_path, monkeypatch):
    path = write(tmp_path / "data", "1.png")
    for limit in (7, 15):  # an error above twice the limit, a warning above it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="too many pixels for Pillow.*MAX_IMAGE_PIXELS"):
            loaded(path, "train", tmp_path)


@pytest.mark.parametrize("decoded_cache", [False, True])
def test_damaged_files_are_left_out_where_that_is_asked_for(tmp_path, decoded_cache):
    path = write(tmp_path / "data", *(f"{name}/{i}.png" for name in "ab" for i in range(4)))
    for name in ("a/1.png", "b/3.png"):
        (tmp_path / "data" / name).write_bytes(b"")
    options = {"decoded_cache": decoded_cache}
    with pytest.raises(ValueError, match="more than skip_damaged=1"):
        loaded(path, "train", tmp_path, skip_damaged=1, **options)
    for _ in range(2):  # decoded, and read from the cache
        data = loaded(path, "train", tmp_path, skip_damaged=2, **options)
        assert indices(data) == [0, 2, 3, 4, 5, 6] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert len(data.damaged) == 2 and "a/1.png" in data.damaged[0] and data.files.endswith("2 that are damaged")


def test_a_stream_goes_on_past_damaged_files_in_an_order_that_stays(tmp_path):
    path = write(tmp_path / "data", *(f"{i}.png" for i in range(12)))
    expected = {i for i in range(12)} - {0, 4, 7}
    for i in (0, 4, 7):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"")
    options = {"is_folder": True, "buffer_size": 5}

    def read(data, size, start=0):
        return [
            i for p in range(start, 36, size) for i in data.batch(range(p, min(p + size, 36)))[0][:, 0, 0, 0].tolist()
        ]

    with pytest.raises(ValueError, match=r"(0|4|7).png.*empty"):
        read(ImageStream(path, "train", skip_damaged=2, **options), 4)
    data = ImageStream(path, "train", skip_damaged=3, **options)
    images = read(data, 4)
    assert len(images) == 36 and set(images[:12]) == expected and len(data.damaged) == 3
    assert images == read(ImageStream(path, "train", skip_damaged=3, **options), 1)
    assert images[20:] == read(ImageStream(path, "train", skip_damaged=3, **options), 4, start=20)
    with pytest.raises(ValueError, match="0.png.*empty"):
        ImageStream(path, "train", **options)


# ---- any folder --------------------------------------------------------------------------------------------------

FOLDERS = ["train", "test", "val", "Eval", "apple", "test-tubes", "a train", "2019", "deep", "training", "dev"]
FILES = ["1", "train", "photo of test tubes", "val_2", "x.train", "[1]", "a*b", "é"]
SUFFIXES = [".png", ".png", ".png", ".PNG", ".bmp", ".txt", ".heic", ""]


def random_folder(root, seed):
    """A folder of random names and depths, with metadata at times; its images, by path, are all different."""
    rng = random.Random(seed)
    tops = rng.choice([[], ["train", "test"], ["train", "val", "test"], rng.sample(FOLDERS, rng.randint(1, 3))])
    depth, mixed = rng.randint(0, 2), rng.random() < 0.3
    names = rng.sample(FOLDERS, 3)
    images = {}
    for i in range(rng.randint(1, 14)):
        parts = [rng.choice(tops)] if tops else []
        parts += [rng.choice(names) for _ in range(rng.randint(0, depth) if mixed else depth)]
        file = root.joinpath(*parts, rng.choice(FILES) + f"-{i}" + rng.choice(SUFFIXES))
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = "bmp" if file.suffix == ".bmp" else "png"
        file.write_bytes(encoded(Image.new("RGB", (4, 4), (i, seed % 200, 7)), kind))
        if file.suffix.lower() in (".png", ".bmp"):
            images[str(file.relative_to(root))] = i
    if images and rng.random() < 0.3:
        listed = rng.sample(sorted(images), rng.randint(1, len(images)))
        lines = [json.dumps({"file_name": name, "label": rng.randint(0, 2)}) for name in listed]
        (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return images, set(listed)
    return images, set(images)


@pytest.mark.parametrize("block", range(8))
def test_in_any_folder_every_image_is_used_once_or_the_folder_is_refused(tmp_path, block):
    refused = 0
    for seed in range(block * 40, block * 40 + 40):
        root = tmp_path / str(seed)
        root.mkdir()
        images, listed = random_folder(root, seed)
        try:
            folder = read_image_folder(root)
        except ValueError as error:
            assert str(root) in str(error)
            refused += 1
            continue
        used = {name: part.columns["image"] for name, part in folder.splits.items()}
        every = [file for files in used.values() for file in files]
        assert len(every) == len(set(every)) and set(every) <= set(images)
        left = set(images) - set(every)
        by_top = {name: {file.split("/")[0] for file in files} for name, files in used.items()}
        has_splits = all("/" in file for file in every) and set.union(*by_top.values()) <= {
            name for name in os.listdir(root) if name.lower() in SPLIT_WORDS
        }
        for name, files in used.items():
            part = folder.splits[name]
            assert part.num_files == len(files) + sum(part.left_out.values())
            own = {file for file in images if not has_splits or SPLIT_WORDS.get(file.split("/")[0].lower()) == name}
            assert set(files) == (own & listed or own), seed  # a split that metadata do not mention is whole
            if has_splits:
                assert {SPLIT_WORDS[top.lower()] for top in by_top[name]} == {name}
            if folder.class_names and "label" in part.columns:
                labels = [folder.class_names[label] for label in part.columns["label"]]
                assert labels == [file.split("/")[-2] for file in files]
        for file in left:
            reasons = {r for part in folder.splits.values() for r in part.left_out}
            assert reasons & {"not listed in the metadata", "beside the folders of the splits"}, (seed, file)
        split = sorted(used)[0]
        if used[split]:
            data = load_images(str(root), split, is_folder=True, allow_shared=True, label_column="", **QUIET)
            assert data.images[:, 0, 0, 0].tolist() == [images[file] for file in used[split]]
            stream = ImageStream(str(root), split, is_folder=True, allow_shared=True, label_column="", buffer_size=4)
            pixels = stream.batch(range(len(data)))[0]
            assert sorted(pixels[:, 0, 0, 0].tolist()) == sorted(data.images[:, 0, 0, 0].tolist())
    assert 2 < refused < 38


# ---- data sets that change, or are found twice -------------------------------------------------------------------


def declared(root, value):
    """A data set whose README.md says which files make which split, as a copy of one on the Hub."""
    files = "  data_files:\n  - split: train\n    path: data/*\n  - split: test\n    path: heldout/*\n"
    parquet_folder(root / "data", [(png(value), 0)], name="a")
    parquet_folder(root / "heldout", [(png(value + 1), 0), (png(value + 2), 0)], name="b")
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}---\n")
    return str(root)


@pytest.mark.parametrize("decoded_cache", [False, True])
def test_local_data_sets_of_one_name_are_kept_apart_and_changes_are_seen(tmp_path, decoded_cache):
    options = {"cache_dir": str(tmp_path / "cache"), "decoded_cache": decoded_cache, **QUIET}
    one, two = (declared(tmp_path / name / "faces", value) for name, value in (("A", 10), ("B", 20)))
    assert indices(load_images(one, "test", **options)) == [11, 12]
    assert indices(load_images(two, "test", **options)) == [21, 22]
    parquet_folder(tmp_path / "A" / "faces" / "heldout", [(png(31), 0), (png(32), 0)], name="b")
    assert indices(load_images(one, "test", **options)) == [31, 32]
    parquet_folder(tmp_path / "A" / "faces" / "heldout", [(png(33), 0)], name="c")
    assert indices(load_images(one, "test", **options)) == [31, 32, 33]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_read_without_what_map_cached(tmp_path, streaming):
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-1", "train-1-copy"], "holds one file twice"),
        (["train-00000-of-00001", "train-00000-of-00001-copy"], "has 2 files of 'train', which are 1"),
        (["train-00000-of-00002"], "lacks file 1 of the 2"),
        (["train", "train.png"], r"1 files of .* are in no split, the first 'train.png'"),
    ],
)
def test_sets_of_files_that_are_not_whole_are_refused(tmp_path, names, message):
    parquet_folder(tmp_path / "new", [(png(1), 0)])
    content = next((tmp_path / "new").iterdir()).read_bytes()
    (tmp_path / "data").mkdir()
    for name in names:
        path = tmp_path / "data" / (name if name.endswith(".png") else f"{name}.parquet")
        path.write_bytes(png(2) if name.endswith(".png") else content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "data"), "train", cache_dir=str(tmp_path / "cache"))


def test_a_slice_of_what_save_to_disk_wrote_has_the_classes_of_its_whole_split(tmp_path):
    def saved(count):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "label": list(range(count))}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": saved(6), "test": saved(2)}).save_to_disk(str(tmp_path / "data"))
    shutil.copy(tmp_path / "data/train/data-00000-of-00001.arrow", tmp_path / "data/train/cache-1.arrow")  # of `map`
    data = load_images(str(tmp_path / "data"), "train[:2]", label_column="label", **QUIET)
    assert indices(data) == [0, 1] and data.num_classes == 6


def test_the_fingerprint_of_a_stream_is_of_all_its_splits(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")
    one = ImageStream(path, "train+test", is_folder=True, cache_dir=str(tmp_path / "cache")).fingerprint
    (tmp_path / "data" / "test" / "3.png").write_bytes(png(3, (40, 40)))
    assert ImageStream(path, "train+test", is_folder=True, cache_dir=str(tmp_path / "cache")).fingerprint != one


@pytest.mark.parametrize("cropped", [False, True])
def test_shared_images_are_found_whatever_the_crop_and_the_format(tmp_path, cropped):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (4, 40, 3), dtype=np.uint8)) for _ in range(4)]
    train = parquet_folder(tmp_path / "train", [(encoded(image), 0) for image in pictures[:3]])
    test = parquet_folder(tmp_path / "test", [(encoded(image, "bmp"), 0) for image in pictures[3:] + pictures[1:3]])
    options = {"cache_dir": str(tmp_path / "cache"), "decoded_cache": True, **QUIET}
    options |= {"resolution": 4} if cropped else {}
    for _ in range(2):
        assert count_shared(*(load_images(path, "train", **options) for path in (train, test))) == 2


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


@pytest.mark.parametrize(
    "names",
    [
        ["train2017/1.png", "val2017/2.png"],
        ["trainA/1.png", "testA/2.png", "trainB/3.png"],
        ["train_set/1.png", "test_set/2.png", "logo.png"],
    ],
)
def test_folders_that_look_like_splits_are_no_classes(tmp_path, names):
    with pytest.raises(ValueError, match="look like splits"):
        loaded(write(tmp_path / "data", *names), "train", tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("file_name,image\n1.png,2.png\n", "several columns that are called 'image'"),
        ("image,file_name\n2.png,1.png\n", "several columns that are called 'image'"),
        ("file_name\n", "lists no image"),
        ("file_name,kind\n,1\n", "row 1 has None"),
    ],
)
def test_metadata_that_say_two_things_or_none_are_refused(tmp_path, header, message):
    path = write(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "data" / "metadata.csv").write_text(header)
    with pytest.raises(ValueError, match=message):
        loaded(path, "train", tmp_path)


def test_odd_values_in_other_columns_do_no_harm(tmp_path):
    path = write(tmp_path / "data", "1.png", "2.png")
    lines = [
        '{"file_name": "1.png", "id": 99999999999999999999999, "text": "a\u2028b"}',
        '{"file_name": "2.png", "id": "x"}',
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert indices(loaded(path, "train", tmp_path)) == [0, 1]


def test_equal_masks_in_two_splits_are_no_shared_images(tmp_path):
    path = write(tmp_path / "data", "train/1.png", "test/2.png")
    for split, name in (("train", "1.png"), ("test", "2.png")):
        (tmp_path / "data" / split / "mask.png").write_bytes(png(99))
        (tmp_path / "data" / split / "metadata.csv").write_text(f"file_name,mask_file_name\n{name},mask.png\n")
    assert indices(loaded(path, "train", tmp_path, image_column="image")) == [0]
    with pytest.raises(ValueError, match="images in two splits"):
        loaded(path, "train", tmp_path, image_column="mask")


def test_a_folder_of_any_depth_is_walked(tmp_path):
    path, here = write(tmp_path / "data", "1.png"), os.getcwd()
    os.chdir(path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        assert indices(loaded(path, "train", tmp_path)) == [0]
    finally:  # what removes the folders of tests would not get to the ground of it
        os.chdir(here)
        subprocess.run(["rm", "-rf", path], check=True)


def test_values_that_pillow_would_rescale_are_refused():
    with pytest.raises(ValueError, match="another range than 0 to 255"):
        decode({"bytes": b"P5 2 2 200\n" + bytes([0, 100, 150, 200])}, None, False)
    pixels = decode({"bytes": b"P5 2 2 255\n" + bytes([0, 100, 150, 200])}, None, False)
    assert pixels.flatten().tolist() == [0, 100, 150, 200]
