"""images.py and image_files.py: images as integers, exactly as they are in the files; what does not fit is named."""

import dataclasses
import logging
import multiprocessing
import os
import struct
import zlib
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffusers_vdm.data import images as images_module
from diffusers_vdm.data.image_files import _pixels, decode
from diffusers_vdm.data.images import LOOK_AHEAD, ImageSet, histogram_bpd, load_digits_split, load_images
from diffusers_vdm.threads import in_order


def random_images(n, generator, channels=1):
    images = torch.randint(0, 17, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n), 17, "random")


def test_digits_split_is_the_one_of_the_readme():
    train, test = load_digits_split()
    assert (len(train), len(test), train.num_levels) == (1500, 297, 17)
    assert train.images.dtype == torch.uint8 and int(train.images.max()) == 16
    # all 1,797 images of the original, each once
    from sklearn.datasets import load_digits

    original = sorted(map(bytes, load_digits().images.astype(np.uint8)))
    assert sorted(bytes(i.numpy()) for i in torch.cat([train.images, test.images])) == original
    assert round(histogram_bpd(train, test), 4) == 2.4185


def test_histogram_of_uniform_data_costs_the_logarithm_of_the_levels(generator):
    data = random_images(20000, generator)
    assert histogram_bpd(data, data) == pytest.approx(np.log2(17), abs=1e-3)


# ---- images from files -------------------------------------------------------------------------------------------


def write_folder(folder, images):
    """An imagefolder with a train and a test split and two classes."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / ("train" if i < len(images) - 1 else "test") / "ab"[i % 2] / f"{i:03d}.png")
    return str(folder)


def picture(rng, size=(8, 8), mode="RGB"):
    channels = {"RGB": 3, "L": 0, "RGBA": 4}[mode]
    shape = (size[1], size[0], channels) if channels else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=None)


def test_a_folder_of_images_is_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(5)]
    path = write_folder(tmp_path / "data", images)
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), "progress_bar": False}
    train = load_images(path, "train", **options)
    assert train.images.shape == (4, 3, 8, 8) and train.num_levels == 256
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1]
    expected = sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image in images[:4])
    assert sorted(image.numpy().tobytes() for image in train.images) == expected
    again = load_images(path, "train", **options)
    assert again.fingerprint == train.fingerprint
    assert load_images(path, "test", **options).fingerprint != train.fingerprint

    small = load_images(path, "train", resolution=4, center_crop=True, **options)
    assert small.images.shape == (4, 3, 4, 4)
    gray = load_images(path, "train", image_mode="L", **options)
    assert gray.images.shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="image_column"):
        load_images(path, "train", image_column="img", **options)
    with pytest.raises(ValueError, match="label_column"):
        load_images(path, "train", label_column="labels", **options)


def png16(values):
    """A PNG of 16 bits a value, `values` of shape (H, W, C) with C = 1, 3 or 4; Pillow writes none with colors."""
    height, width, channels = values.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    color_type = {1: 0, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def encoded(image, kind="png", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def transparent(mode, alpha):
    image = Image.new("RGBA", (4, 4), (10, 200, 30, alpha))
    return image if mode == "RGBA" else image.convert(mode)


def keyed_palette():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


DEEP = {
    "I;16": png16(np.full((4, 4, 1), 40000)),
    "I": encoded(Image.new("I", (4, 4), 70000), "tiff"),
    "F": encoded(Image.new("F", (4, 4), 0.5), "tiff"),
    "RGB;16B": png16(np.full((4, 4, 3), 40000)),
    "RGBA;16B": png16(np.full((4, 4, 4), 65535)),
    "65535": b"P6 2 2 65535\n" + bytes(24),
}


@pytest.mark.parametrize("image_mode", [None, "RGB", "L"])
@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_refused_always(kind, image_mode):
    # Pillow opens a 16-bit RGB PNG as 8-bit RGB without a word, and clips 'I;16' to 255 when it converts it
    with pytest.raises(ValueError, match="more than 8 bits") as error:
        decode({"bytes": DEEP[kind], "path": None}, image_mode, image_mode is not None)
    assert kind in str(error.value) and "convert the files" in str(error.value)


CONVERTED = {
    "RGBA": (encoded(transparent("RGBA", 255)), [10, 200, 30]),
    "LA": (encoded(Image.new("LA", (4, 4), (77, 255))), [77, 77, 77]),
    "P": (encoded(keyed_palette()), [0, 0, 0]),
    "1": (encoded(Image.new("1", (4, 4), 1)), [255, 255, 255]),
    "CMYK": (encoded(Image.new("CMYK", (4, 4), 0), "tiff"), [255, 255, 255]),
}


@pytest.mark.parametrize("mode", CONVERTED)
def test_other_modes_are_converted_where_that_is_asked_for(mode):
    content, expected = CONVERTED[mode]
    row = {"bytes": content, "path": None}
    with pytest.raises(ValueError, match="set image_mode") as error:
        decode(row, None, False)
    assert f"'{mode}'" in str(error.value)
    pixels = decode(row, "RGB", True)
    assert pixels.shape == (3, 4, 4) and pixels[:, 0, 0].tolist() == expected
    assert decode(row, "L", True).shape == (1, 4, 4)


@pytest.mark.parametrize(
    "content",
    [
        encoded(transparent("RGBA", 254)),
        encoded(transparent("LA", 0)),
        encoded(keyed_palette(), transparency=0),
        encoded(keyed_palette(), transparency=b"\x80\xff"),
        encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
    ],
)
def test_what_lies_under_transparency_is_no_data(content):
    with pytest.raises(ValueError, match="transparent pixels") as error:
        decode({"bytes": content, "path": None}, "RGB", True)
    assert "composite" in str(error.value)


def test_a_color_key_that_no_pixel_has_is_no_transparency():
    content = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(9, 9, 9))
    assert decode({"bytes": content, "path": None}, "RGB", False)[:, 0, 0].tolist() == [1, 2, 3]


def test_eight_bits_are_taken_as_they_are_and_turned_as_the_camera_says():
    rng = np.random.default_rng(0)
    for mode in ("RGB", "L"):
        image = picture(rng, (5, 3), mode)
        pixels = decode({"bytes": encoded(image), "path": None}, None, False)
        assert np.array_equal(pixels, np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode({"bytes": encoded(image, exif=exif), "path": None}, None, False)
    assert np.array_equal(turned[0], np.rot90(np.asarray(image), -1))
    with pytest.raises(ValueError, match="image_mode"):
        decode({"bytes": encoded(image), "path": None}, "CMYK", True)


OPTIONS = {"progress_bar": False}
DATASETS_LEAVES_FILES_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def parquet_folder(folder, rows, shards=1, name="train", **features):
    """A folder of parquet files, as on the Hub; `rows` are (PNG bytes, label)."""
    folder.mkdir(exist_ok=True, parents=True)
    columns = {
        "image": [content and {"bytes": content, "path": f"{i:03d}.png"} for i, (content, _) in enumerate(rows)],
        "label": [label for _, label in rows],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])} | features
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    for i in range(shards):
        part = data.shard(shards, i, contiguous=True)
        part.to_parquet(str(folder / f"{name}-{i:05d}-of-{shards:05d}.parquet"))
    return str(folder)


def test_a_folder_of_parquet_files_is_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(5)]
    rows = [(encoded(image), i % 2) for i, image in enumerate(pictures)]
    path = parquet_folder(tmp_path / "data", rows, shards=2)
    parquet_folder(tmp_path / "data", rows[:2], name="test")
    data = load_images(path, "train", cache_dir=str(tmp_path / "cache"), **OPTIONS)
    assert data.labels.tolist() == [0, 1, 0, 1, 0] and data.num_classes == 2 and data.shape == (3, 8, 8)
    for image, expected in zip(data.images, pictures, strict=True):
        assert np.array_equal(image.numpy().transpose(1, 2, 0), np.asarray(expected))
    assert len(load_images(path, "test", cache_dir=str(tmp_path / "cache"), **OPTIONS)) == 2
    assert len(load_images(path, "train[1:3]", cache_dir=str(tmp_path / "cache"), **OPTIONS)) == 2


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
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **OPTIONS}
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
        (["cat", "dog"], {"label_column": "label"}, "whole numbers.*'cat'"),
    ],
)
def test_classes_that_are_missing(tmp_path, labels, options, expected):
    rng = np.random.default_rng(0)
    kind = {"label": datasets.Value("string")} if isinstance(labels[0], str) else {}
    path = parquet_folder(tmp_path / "data", [(encoded(picture(rng)), label) for label in labels], **kind)
    options = {"cache_dir": str(tmp_path / "cache"), **OPTIONS, **options}
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
    path = write_folder(tmp_path / "data", pictures(np.random.default_rng(0)))
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **OPTIONS}
    with pytest.raises(ValueError, match=message) as error:
        load_images(path, "train", decoded_cache=decoded_cache, **options)
    assert "image " in str(error.value) and ".png" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors*tmp")) and not cache_files(tmp_path)


def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path):
    rng = np.random.default_rng(0)
    path = write_folder(tmp_path / "data", [picture(rng, (32, 32)) for _ in range(5)])
    bad = next((tmp_path / "data" / "train" / "b").glob("*.png"))
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **OPTIONS}
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
def test_no_images_is_said_in_one_line(tmp_path, is_folder):
    options = {"is_folder": is_folder, "cache_dir": str(tmp_path / "cache"), **OPTIONS}
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(ValueError, match="no data files"):
            load_images(str(tmp_path / name), "train", **options)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    if not is_folder:
        with pytest.raises(ValueError, match="cannot be read.*[Pp]arquet"):
            load_images(str(tmp_path), "train", **options)
    rng = np.random.default_rng(0)
    path = write_folder(tmp_path / "data", [picture(rng) for _ in range(3)])
    with pytest.raises(ValueError, match="nknown split"):
        load_images(path, "validation", **options)
    with pytest.raises(ValueError, match="no data|empty"):
        load_images(path, "train[:0]", **options)


# ---- the decoded cache -------------------------------------------------------------------------------------------


def cache_files(folder):
    return sorted((folder / "cache").rglob("*.safetensors"))


@pytest.fixture
def stored(tmp_path):
    """A folder of 9 + 1 images, and a function that loads them through the cache."""
    rng = np.random.default_rng(0)
    path = write_folder(tmp_path / "data", [picture(rng, (8, 10)) for _ in range(10)])
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), **OPTIONS}
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


def test_what_makes_other_pixels_has_a_file_of_its_own(stored, tmp_path):
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
def test_a_damaged_cache_is_noticed_and_made_again(stored, tmp_path, damage, caplog):
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


def test_an_interrupted_write_leaves_nothing_that_is_taken_for_a_cache(stored, tmp_path, monkeypatch):
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
    file.rename(folder / f".{file.name}.tmp")  # killed before it could clean up
    assert len(stored()) == 9 and len(list(folder.iterdir())) == 2  # the file and its lock


def test_a_disk_that_is_too_small_is_told_before_anything_is_decoded(stored, tmp_path, monkeypatch):
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
    path = write_folder(tmp_path / "data", [picture(rng, (64, 64)) for _ in range(200)])
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


def test_decoding_looks_ahead_no_further_than_it_must():
    started = []

    def read(i):
        started.append(i)
        return i

    results = in_order(read, range(1000), 2, 2 * LOOK_AHEAD - 1)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(started) <= 10 + 2 * 16
    results.close()
    assert list(in_order(read, range(57), 3, 3 * LOOK_AHEAD - 1)) == list(range(57))


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """200 MB of decoded images pass through, and are read again, without being held."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    rows = [(encoded(Image.fromarray(np.roll(tile, i, 0)), compress_level=0), i % 2) for i in range(10)]
    path = parquet_folder(tmp_path / "data", [row for _ in range(107) for row in rows], shards=4)

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

    load_images(path, "train[:20]", cache_dir=str(tmp_path / "cache"), decoded_cache=True, **OPTIONS)
    base, peaks, real = anonymous(), [], images_module.decode_image
    watched = lambda *arguments: peaks.append(anonymous()) or real(*arguments)  # noqa: E731
    images_module.decode_image = watched
    try:
        data = load_images(path, "train", cache_dir=str(tmp_path / "cache"), decoded_cache=True, **OPTIONS)
    finally:
        images_module.decode_image = real
    print(f"{data.images.nbytes / 2**20:.0f} MB of images, peak {max(peaks) - base:.0f} MB")
    assert data.images.nbytes > 200 * 2**20 and max(peaks) - base < 40
    assert int(data.images[::7].max()) == 255 and anonymous() - base < 40


def test_crops_are_drawn_once_for_each_image():
    rng = np.random.default_rng(1)
    wide = picture(rng, (32, 8))
    crops = [_pixels(wide, 8, (0, i)) for i in range(20)]
    assert all(crop.shape == (3, 8, 8) for crop in crops)
    assert np.array_equal(crops[3], _pixels(wide, 8, (0, 3)))
    assert len({crop.tobytes() for crop in crops}) > 5
    array = np.asarray(wide).transpose(2, 0, 1)
    assert np.array_equal(_pixels(wide, 8, None), array[:, :, 12:20])
