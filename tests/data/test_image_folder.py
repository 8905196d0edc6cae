"""data/image_folder.py: every image of a folder is in one split, once, or the folder is refused."""

import json
import os
import random
import subprocess
import zipfile

import pytest
from PIL import Image

from diffusers_vdm.data.image_folder import SPLIT_WORDS, read_image_folder
from diffusers_vdm.data.image_stream import ImageStream
from diffusers_vdm.data.images import load_images
from tests.pictures import QUIET, encoded, indices, loaded, png, write_images

# ---- splits -------------------------------------------------------------------------------------------------------


def test_words_within_paths_do_not_make_splits(tmp_path):
    # datasets #4015, #5021: each of these put held-out images among the training images, or dropped some
    path = write_images(
        tmp_path / "a", "train/apple/1.png", "train/train/1.png", "test/apple/1.png", "test/train/1.png"
    )
    assert indices(loaded(path, "train", tmp_path)) == [0, 1] and indices(loaded(path, "test", tmp_path)) == [2, 3]
    assert loaded(path, "test", tmp_path).class_names == ("apple", "train")
    path = write_images(
        tmp_path / "b", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("test-tubes", "x") for i in "12")
    )
    assert indices(loaded(path, "test", tmp_path)) == [4, 5, 6, 7]
    path = write_images(
        tmp_path / "c", "1.png", "2.png", "photo of a train.png", "4.png", "photo of test tubes.png", "6.png"
    )
    assert indices(loaded(path, "train", tmp_path)) == list(range(6))


@pytest.mark.parametrize("word", SPLIT_WORDS)
@pytest.mark.parametrize("spell", [str, str.upper, str.capitalize])
def test_a_top_folder_with_the_name_of_a_split_is_that_split(tmp_path, word, spell):
    path = write_images(tmp_path / "data", f"{spell(word)}/1.png", f"{spell(word)}/2.png")
    assert indices(loaded(path, SPLIT_WORDS[word], tmp_path)) == [0, 1]
    for other in set(SPLIT_WORDS.values()) - {SPLIT_WORDS[word]}:
        with pytest.raises(ValueError, match=f"Unknown split '{other}'"):
            loaded(path, other, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "test/1.png", "extra/1.png"], "beside others with images .extra"),
        (["car/1.png", "plane/1.png", "train/1.png"], "If all of them are classes"),
        (["val/1.png", "valid/1.png"], "several folders for the split 'validation'"),
        (["faces/train/1.png", "faces/test/1.png"], "one folder deeper; use .*faces"),
        (["faces/train/a/1.png", "faces/test/b/1.png", "preview.png"], "one folder deeper"),
        (
            ["cat/train/1.png", "cat/test/2.png", "dog/train/1.png", "dog/test/1.png"],
            "splits must be at the top level",
        ),
        (["train_images/1.png", "test_images/1.png"], "name them train, validation or test"),
    ],
)
def test_folders_with_ambiguous_splits_are_refused(tmp_path, names, message):
    path = write_images(tmp_path / "data", *names)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message):
            loaded(path, split, tmp_path)
        with pytest.raises(ValueError, match=message):
            ImageStream(path, split, is_folder=True)


def test_splits_that_are_links_are_followed(tmp_path):
    write_images(tmp_path / "far", "one/a/1.png", "one/b/1.png", "two/a/1.png")
    data = tmp_path / "data"
    data.mkdir()
    os.symlink(tmp_path / "far" / "one", data / "train")
    os.symlink("../far/two", data / "test")
    (data / "test").resolve().joinpath("back").symlink_to(data)  # a link to a parent folder is not followed
    assert indices(loaded(str(data), "train", tmp_path)) == [0, 1]
    assert indices(loaded(str(data), "test", tmp_path)) == [2]


def test_an_image_in_two_splits_is_refused_unless_that_is_allowed(tmp_path):
    path = write_images(tmp_path / "data", "train/1.png", "train/2.png", "test/3.png")
    (tmp_path / "data" / "test" / "copy.png").write_bytes((tmp_path / "data" / "train" / "2.png").read_bytes())
    os.symlink(tmp_path / "data" / "train" / "1.png", tmp_path / "data" / "test" / "link.png")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="2 images in two splits.*allow_shared"):
            loaded(path, split, tmp_path)
        with pytest.raises(ValueError, match="2 images in two splits.*allow_shared"):
            ImageStream(path, split, is_folder=True)
    assert indices(loaded(path, "test", tmp_path, allow_shared=True)) == [0, 1, 2]


def test_a_link_to_an_image_of_the_same_split_is_refused(tmp_path):
    path = write_images(tmp_path / "data", "1.png", "2.png")
    os.symlink("1.png", tmp_path / "data" / "3.png")
    with pytest.raises(ValueError, match="one image under two names, 1.png and 3.png"):
        loaded(path, "train", tmp_path)


# ---- classes -----------------------------------------------------------------------------------------------------


def test_a_class_has_one_index_in_all_splits(tmp_path):
    path = write_images(tmp_path / "data", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/c/1.png")
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
def test_names_of_splits_and_single_folders_are_not_classes(tmp_path, names):
    path = write_images(tmp_path / "data", *names)
    data = loaded(path, "test", tmp_path)
    assert data.labels is None and data.class_names is None and data.label_column is None


def test_an_image_outside_of_the_class_folders_removes_the_classes_and_is_named(tmp_path):
    path = write_images(
        tmp_path / "data", "train/a/1.png", "train/b/1.png", "train/stray.png", "test/a/1.png", "test/b/1.png"
    )
    data = loaded(path, "train", tmp_path)
    assert data.labels is None and len(data) == 3
    assert "no classes, since train/stray.png not in a folder of a class" in data.files
    assert loaded(path, "test", tmp_path).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="label_column 'label'"):
        loaded(path, "train", tmp_path, label_column="label")


# ---- files -------------------------------------------------------------------------------------------------------


def test_every_file_that_is_left_out_is_counted(tmp_path):
    path = write_images(
        tmp_path / "data", "train/1.png", "train/2.PNG", "test/3.png", "train/.hidden.png", "preview.png"
    )
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


def test_all_formats_that_pillow_decodes_are_read(tmp_path):
    path = write_images(tmp_path / "data", "1.png")
    for name, options in (("2.avif", {"quality": 100}), ("3.webp", {"lossless": True}), ("4.qoi", {})):
        if Image.registered_extensions().get(name[1:]) in Image.SAVE:  # the oldest Pillow writes fewer of them
            Image.new("RGB", (4, 4), 0).save(tmp_path / "data" / name, **options)
    assert len(loaded(path, "train", tmp_path)) == len(list((tmp_path / "data").iterdir())) > 1


def test_a_folder_of_archives_only_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "train.zip", "w") as file:
        file.writestr("cat/1.png", png(1))
    with pytest.raises(ValueError, match="archives are not opened, extract train.zip"):
        loaded(str(tmp_path / "data"), "train", tmp_path)


def test_a_dataset_name_that_is_a_local_folder_is_read_as_a_folder_of_images(tmp_path):
    """A local folder as `--dataset_name` is read in the same way: words in its paths do not make splits."""
    path = write_images(
        tmp_path / "data", "train/apple/1.png", "train/train/1.png", "test/apple/1.png", "test/train/1.png"
    )
    options = {"cache_dir": str(tmp_path / "cache"), **QUIET}
    assert indices(load_images(path, "train", **options)) == [0, 1]
    assert indices(load_images(path, "test", **options)) == [2, 3]


# ---- metadata ----------------------------------------------------------------------------------------------------


def test_images_that_metadata_do_not_list_are_counted(tmp_path):
    path = write_images(tmp_path / "data", "train/1.png", "train/2.png", "train/3.png", "train/4.png", "test/1.png")
    (tmp_path / "data" / "train" / "metadata.csv").write_text("file_name,kind\n3.png,1\n1.png,0\n4.png,1\n")
    data = loaded(path, "train", tmp_path, label_column="kind")
    assert data.images[:, 0, 0, 0].tolist() == [2, 0, 3] and data.labels.tolist() == [1, 0, 1]
    assert data.files == f"3 of 4 files of {path} (train) are used; 1 not listed in the metadata"
    assert loaded(path, "test", tmp_path).files == f"1 of 1 files of {path} (test) are used"


def test_metadata_at_the_top_level_serve_all_splits(tmp_path):
    path = write_images(tmp_path / "data", "train/1.png", "train/2.png", "test/1.png")
    lines = [{"file_name": "test/1.png", "kind": 1}, {"file_name": "train/2.png", "kind": 0}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert indices(loaded(path, "train", tmp_path, label_column="kind")) == [1]
    assert loaded(path, "test", tmp_path, label_column="kind").labels.tolist() == [1]


def test_further_columns_of_files_are_images_too(tmp_path):
    path = write_images(tmp_path / "data", "a.png", "a_mask.png", "b.png", "b_mask.png", "left.png")
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
        (b"file_name\ngone.png\n", "lists 'gone.png' in row 1, but that file does not exist"),
        (b"name\n1.png\n", "must have a file_name"),
        ("file_name,kind\n1.png,café\n".encode("latin-1"), "metadata.csv must be UTF-8, but its byte 24 is 0xe9"),
        (b"file_name,kind\n1.png,0\n2.png,1,2,3\n", "metadata.csv cannot be read"),
        (b"", "metadata.csv cannot be read"),
        (b"file_name,image\n1.png,2.png\n", "several columns named 'image'"),
        (b"image,file_name\n2.png,1.png\n", "several columns named 'image'"),
        (b"file_name\n", "lists no image"),
        (b"file_name,kind\n,1\n", "row 1 has None"),
    ],
)
def test_wrong_metadata_are_refused(tmp_path, content, message):
    path = write_images(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "data" / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        loaded(path, "train", tmp_path)


def test_a_byte_order_mark_and_numeric_names_are_read(tmp_path):
    path = write_images(tmp_path / "data", "001", "002.png")
    (tmp_path / "data" / "metadata.csv").write_bytes("\ufefffile_name,kind\n001,1\n002.png,\n".encode())
    data = loaded(path, "train", tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1] and data.files.startswith("2 of 2 files")
    with pytest.raises(ValueError, match="image 1 of .*holds no class"):
        loaded(path, "train", tmp_path, label_column="kind")


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


@pytest.mark.parametrize(
    "names",
    [
        ["train2017/1.png", "val2017/2.png"],
        ["trainA/1.png", "testA/2.png", "trainB/3.png"],
        ["train_set/1.png", "test_set/2.png", "logo.png"],
    ],
)
def test_folders_with_names_like_splits_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="look like splits"):
        loaded(write_images(tmp_path / "data", *names), "train", tmp_path)


def test_odd_values_in_unused_columns_are_ignored(tmp_path):
    path = write_images(tmp_path / "data", "1.png", "2.png")
    lines = [
        '{"file_name": "1.png", "id": 99999999999999999999999, "text": "a\u2028b"}',
        '{"file_name": "2.png", "id": "x"}',
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert indices(loaded(path, "train", tmp_path)) == [0, 1]


def test_equal_masks_in_two_splits_are_not_shared_images(tmp_path):
    path = write_images(tmp_path / "data", "train/1.png", "test/2.png")
    for split, name in (("train", "1.png"), ("test", "2.png")):
        (tmp_path / "data" / split / "mask.png").write_bytes(png(99))
        (tmp_path / "data" / split / "metadata.csv").write_text(f"file_name,mask_file_name\n{name},mask.png\n")
    assert indices(loaded(path, "train", tmp_path, image_column="image")) == [0]
    with pytest.raises(ValueError, match="images in two splits"):
        loaded(path, "train", tmp_path, image_column="mask")


def test_a_folder_of_any_depth_is_walked(tmp_path):
    path, here = write_images(tmp_path / "data", "1.png"), os.getcwd()
    os.chdir(path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        assert indices(loaded(path, "train", tmp_path)) == [0]
    finally:  # pytest could not remove a folder of this depth
        os.chdir(here)
        subprocess.run(["rm", "-rf", path], check=True)
