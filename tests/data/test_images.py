"""data/images.py: the digits, and data sets as integers in memory or in the cache of decoded images."""

import dataclasses
import logging
import multiprocessing
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffusers_vdm.data import images as images_module
from diffusers_vdm.data.images import ImageSet, histogram_bpd, load_digits_split, load_images
from tests.pictures import (
    DATASETS_LEAVES_FILES_OPEN,
    QUIET,
    encoded,
    parquet_folder,
    picture,
    random_image_set,
    write_image_folder,
)


def test_digits_are_split_as_documented():
    train, test = load_digits_split()
    assert (len(train), len(test), train.num_levels) == (1500, 297, 17)
    assert train.images.dtype == torch.uint8 and int(train.images.max()) == 16
    # all 1,797 images of the original, each once
    from sklearn.datasets import load_digits

    original = sorted(map(bytes, load_digits().images.astype(np.uint8)))
    assert sorted(bytes(i.numpy()) for i in torch.cat([train.images, test.images])) == original
    assert round(histogram_bpd(train, test), 4) == 2.4185


def test_histogram_of_uniform_data_costs_the_logarithm_of_the_levels(generator):
    data = random_image_set(20000, generator)
    assert histogram_bpd(data, data) == pytest.approx(np.log2(17), abs=1e-3)


# ---- images from files -------------------------------------------------------------------------------------------


@pytest.fixture
def pictures_and_load(tmp_path):
    """Five pictures, of which the last is the test split, and a function that loads their folder."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(5)]
    path = write_image_folder(tmp_path / "data", pictures)
    fixed = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **QUIET}
    return pictures, lambda split="train", **options: load_images(path, split, **fixed, **options)


def test_a_folder_of_images_is_read_exactly(pictures_and_load):
    pictures, load = pictures_and_load
    train = load()
    assert train.images.shape == (4, 3, 8, 8) and train.num_levels == 256
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1]
    expected = sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image in pictures[:4])
    assert sorted(image.numpy().tobytes() for image in train.images) == expected


def test_the_fingerprint_is_of_the_split(pictures_and_load):
    _, load = pictures_and_load
    assert load().fingerprint == load().fingerprint != load("test").fingerprint


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"resolution": 4, "center_crop": True}, (4, 3, 4, 4)), ({"image_mode": "L"}, (4, 1, 8, 8))],
    ids=["resolution", "gray"],
)
def test_images_are_resized_and_converted(pictures_and_load, options, shape):
    assert pictures_and_load[1](**options).images.shape == shape


@pytest.mark.parametrize("options", [{"image_column": "img"}, {"label_column": "labels"}], ids=lambda o: next(iter(o)))
def test_columns_that_do_not_exist_are_refused(pictures_and_load, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pictures_and_load[1](**options)


def test_a_folder_of_parquet_files_is_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(5)]
    rows = [(encoded(image), i % 2) for i, image in enumerate(pictures)]
    path = parquet_folder(tmp_path / "data", rows, shards=2)
    parquet_folder(tmp_path / "data", rows[:2], name="test")
    data = load_images(path, "train", cache_dir=str(tmp_path / "cache"), **QUIET)
    assert data.labels.tolist() == [0, 1, 0, 1, 0] and data.num_classes == 2 and data.shape == (3, 8, 8)
    for image, expected in zip(data.images, pictures, strict=True):
        assert np.array_equal(image.numpy().transpose(1, 2, 0), np.asarray(expected))
    assert len(load_images(path, "test", cache_dir=str(tmp_path / "cache"), **QUIET)) == 2
    assert len(load_images(path, "train[1:3]", cache_dir=str(tmp_path / "cache"), **QUIET)) == 2


@DATASETS_LEAVES_FILES_OPEN
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_classes_come_from_a_metadata_file(tmp_path, kind):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for i in range(3):
        picture(rng).save(folder / f"{i}.png")
    lines = {
        "csv": ["file_name,kind", "0.png,2", "1.png,0", "2.png,1"],
        "jsonl": [f'{{"file_name": "{i}.png", "kind": {k}}}' for i, k in enumerate((2, 0, 1))],
    }[kind]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **QUIET}
    data = load_images(str(tmp_path / "data"), "train", label_column="kind", **options)
    assert data.labels.tolist() == [2, 0, 1]
    assert load_images(str(tmp_path / "data"), "train", **options).labels is None


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        ([None, None], {}, None),  # a test split without classes
        ([-1, -1], {}, None),
        ([0, None], {}, "image 1 of .*label_column 'label' holds no class"),
        ([-1, 0], {}, "image 0 of .*label_column 'label' holds no class"),
        ([None, None], {"label_column": "label"}, "image 0 of .*label_column 'label' holds no class"),
        ([0, None], {"label_column": ""}, None),
        (["cat", "dog"], {"label_column": "label"}, "integers.*'cat'"),
    ],
)
def test_classes_that_are_missing(tmp_path, labels, options, expected):
    rng = np.random.default_rng(0)
    kind = {"label": datasets.Value("string")} if isinstance(labels[0], str) else {}
    path = parquet_folder(tmp_path / "data", [(encoded(picture(rng)), label) for label in labels], **kind)
    options = {"cache_dir": str(tmp_path / "cache"), **QUIET, **options}
    if expected is None:
        assert load_images(path, "train", **options).labels is None
    else:
        with pytest.raises(ValueError, match=expected):
            load_images(path, "train", **options)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (lambda rng: [picture(rng), picture(rng), picture(rng, (8, 9)), picture(rng)], "set resolution"),
        (lambda rng: [picture(rng), picture(rng), picture(rng, mode="L"), picture(rng)], "set image_mode"),
        (lambda rng: [picture(rng, mode="RGBA") for _ in range(4)], "set image_mode"),
    ],
)
@pytest.mark.parametrize("decoded_cache", [False, True])
def test_images_that_do_not_fit_are_named(tmp_path, pictures, message, decoded_cache):
    path = write_image_folder(tmp_path / "data", pictures(np.random.default_rng(0)))
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **QUIET}
    with pytest.raises(ValueError, match=message) as error:
        load_images(path, "train", decoded_cache=decoded_cache, **options)
    assert "image " in str(error.value) and ".png" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors*tmp")) and not cache_files(tmp_path)


def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path):
    rng = np.random.default_rng(0)
    path = write_image_folder(tmp_path / "data", [picture(rng, (32, 32)) for _ in range(5)])
    bad = next((tmp_path / "data" / "train" / "b").glob("*.png"))
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **QUIET}
    whole = bad.read_bytes()
    for content in (whole[:200], whole[:100] + b"?" * 50 + whole[150:], b"", b"not an image"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be decoded") as error:
            load_images(path, "train", **options)
        assert bad.name in str(error.value) and "image 2 of" in str(error.value)
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text('{"file_name": "a/gone.png", "x": 1}\n')
    with pytest.raises(ValueError, match="gone.png"):
        load_images(path, "train", **options)


@DATASETS_LEAVES_FILES_OPEN
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_images_is_refused(tmp_path, name, is_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data files"):
        load_images(str(tmp_path / name), "train", is_folder=is_folder, cache_dir=str(tmp_path / "cache"), **QUIET)


def test_a_parquet_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read.*[Pp]arquet"):
        load_images(str(tmp_path / "data"), "train", cache_dir=str(tmp_path / "cache"), **QUIET)


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize(
    ("split", "message"), [("validation", "nknown split"), ("train[:0]", "no data|has no images")]
)
def test_splits_without_images_are_refused(tmp_path, split, message, is_folder):
    rng = np.random.default_rng(0)
    path = write_image_folder(tmp_path / "data", [picture(rng) for _ in range(3)])
    with pytest.raises(ValueError, match=message):
        load_images(path, split, is_folder=is_folder, cache_dir=str(tmp_path / "cache"), **QUIET)


# ---- the decoded cache -------------------------------------------------------------------------------------------


def cache_files(folder):
    return sorted((folder / "cache").rglob("*.safetensors"))


@pytest.fixture
def stored(tmp_path):
    """A folder of 9 + 1 images, and a function that loads them through the cache."""
    rng = np.random.default_rng(0)
    path = write_image_folder(tmp_path / "data", [picture(rng, (8, 10)) for _ in range(10)])
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **QUIET}
    return lambda split="train", **more: load_images(path, split, **{**options, "decoded_cache": True, **more})


def test_the_cache_holds_the_same_images_and_their_hash(stored, tmp_path, monkeypatch):
    plain = stored(decoded_cache=False)
    assert not cache_files(tmp_path)
    first = stored()
    (file,) = cache_files(tmp_path)
    with safe_open(file, "pt") as content:
        assert set(content.keys()) == {"images", "labels", "digests"}
        assert content.metadata()["fingerprint"] == plain.fingerprint
    monkeypatch.setattr(images_module, "decode_image", None)  # nothing is decoded again
    monkeypatch.setattr(images_module.hashlib, "blake2b", key_only(images_module.hashlib.blake2b))
    again = stored()
    for data in (first, again):
        assert torch.equal(data.images, plain.images) and torch.equal(data.labels, plain.labels)
        assert (data.fingerprint, data.name, data.num_levels) == (plain.fingerprint, plain.name, 256)


def key_only(blake2b):
    """blake2b that refuses anything as long as the images are."""

    def hashed(content=b"", **options):
        assert len(content) < 2000
        return blake2b(content, **options)

    return hashed


def test_a_part_of_a_stored_set_has_a_fingerprint_of_its_own(stored):
    data = stored()
    part = dataclasses.replace(data, images=data.images[:2], labels=data.labels[:2])
    assert part.fingerprint == ImageSet(data.images[:2].clone(), None, 256, "x").fingerprint != data.fingerprint


def test_writing_to_the_images_does_not_reach_the_file(stored):
    data, before = stored(), stored().images.clone()
    data.images[0] = 7
    assert torch.equal(stored().images, before)


def test_options_that_change_pixels_have_their_own_cache_file(stored, tmp_path):
    different = [{}, {"resolution": 4}, {"resolution": 4, "center_crop": True}, {"resolution": 4, "seed": 1},
                 {"image_mode": "L"}, {"split": "test"}, {"split": "train[:3]"}, {"label_column": ""}]  # fmt: skip
    for number, options in enumerate(different, 1):
        data = stored(**options)
        assert len(cache_files(tmp_path)) == number
        assert torch.equal(data.images, stored(decoded_cache=False, **options).images)
    stored(num_workers=1)
    assert len(cache_files(tmp_path)) == len(different)
    assert stored(label_column="").labels is None


def test_a_file_that_changed_is_decoded_again(stored, tmp_path):
    before = stored()
    changed = next((tmp_path / "data" / "train" / "a").glob("*.png"))
    Image.new("RGB", (8, 10), (1, 2, 3)).save(changed)
    os.utime(changed, (1e9, 1e9))
    after = stored()
    assert not torch.equal(before.images, after.images)
    assert torch.equal(after.images, stored(decoded_cache=False).images)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty", "other"])
def test_a_damaged_cache_file_is_replaced(stored, tmp_path, damage, caplog):
    expected = stored().images.clone()
    (file,) = cache_files(tmp_path)
    content = file.read_bytes()
    other = content.replace(b'"images"', b'"imagez"')
    bad = {"cut": content[:-1], "longer": content + b"?", "header": b"?" * len(content), "empty": b"", "other": other}
    file.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        data = stored()
    assert "damaged" in caplog.text and file.name in caplog.text
    assert torch.equal(data.images, expected) and file.read_bytes() == content


def test_an_interrupted_write_leaves_no_cache_file(stored, tmp_path, monkeypatch):
    real, calls = images_module.decode_image, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(images_module, "decode_image", stops)
    with pytest.raises(KeyboardInterrupt):
        stored()
    assert not cache_files(tmp_path) and not list((tmp_path / "cache").rglob("*.tmp"))
    monkeypatch.undo()
    folder = tmp_path / "cache" / "decoded_images"
    assert len(stored()) == 9
    (file,) = cache_files(tmp_path)
    file.rename(folder / f".{file.name}.tmp")  # as if the process had been killed before it could clean up
    assert len(stored()) == 9 and len(list(folder.iterdir())) == 2  # the file and its lock


def test_a_full_disk_is_an_error_before_any_decoding(stored, tmp_path, monkeypatch):
    full = type("usage", (), {"free": 9 * 3 * 8 * 10 - 1})
    monkeypatch.setattr(images_module.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match="2.16e-06 GB.*cache_dir"):
        stored()
    assert not cache_files(tmp_path) and not list((tmp_path / "cache").rglob("*.tmp"))


def _decode_in_a_process(path, cache, queue):
    counted, real = [], images_module.decode_image
    images_module.decode_image = lambda *arguments: counted.append(1) or real(*arguments)
    options = {"is_folder": True, "cache_dir": cache, "progress_bar": False, "decoded_cache": True}
    queue.put((len(counted), load_images(path, "train", **options).fingerprint, len(counted)))


@pytest.mark.slow
def test_one_process_decodes_and_the_others_wait(tmp_path):
    rng = np.random.default_rng(0)
    path = write_image_folder(tmp_path / "data", [picture(rng, (64, 64)) for _ in range(200)])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (path, str(tmp_path / "cache"), queue)
    processes = [context.Process(target=_decode_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(after - before > 0 for before, _, after in answers) == 1
    assert len({fingerprint for _, fingerprint, _ in answers}) == 1 and len(cache_files(tmp_path)) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """200 MB of decoded images pass through, and are read again, without being held."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    rows = [(encoded(Image.fromarray(np.roll(tile, i, 0)), compress_level=0), i % 2) for i in range(10)]
    path = parquet_folder(tmp_path / "data", [row for _ in range(107) for row in rows], shards=4)

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

    load_images(path, "train[:20]", cache_dir=str(tmp_path / "cache"), decoded_cache=True, **QUIET)
    base, peaks, real = anonymous(), [], images_module.decode_image
    watched = lambda *arguments: peaks.append(anonymous()) or real(*arguments)  # noqa: E731
    images_module.decode_image = watched
    try:
        data = load_images(path, "train", cache_dir=str(tmp_path / "cache"), decoded_cache=True, **QUIET)
    finally:
        images_module.decode_image = real
    print(f"{data.images.nbytes / 2**20:.0f} MB of images, peak {max(peaks) - base:.0f} MB")
    assert data.images.nbytes > 200 * 2**20 and max(peaks) - base < 40
    assert int(data.images[::7].max()) == 255 and anonymous() - base < 40
