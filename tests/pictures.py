"""Small images, the files that hold them, and the folders and data sets that tests write of them."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vdm.data.images import ImageSet, load_images

QUIET = {"progress_bar": False}
# of `datasets`, where it reads a metadata file or finds no images
DATASETS_LEAVES_FILES_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def random_image_set(n: int, generator: torch.Generator, channels: int = 1) -> ImageSet:
    """Random images of 8×8 pixels and 17 levels, each with its own class."""
    images = torch.randint(0, 17, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n), 17, "random")


def loaded(path: str, split: str, tmp_path: Path, **options) -> ImageSet:
    """A split of a folder of image files, with a cache in `tmp_path`."""
    return load_images(path, split, is_folder=True, cache_dir=str(tmp_path / "cache"), **QUIET, **options)


def indices(data: ImageSet) -> list[int]:
    """The red values of the first pixels, sorted: which images of [`png`] a data set holds."""
    return sorted(data.images[:, 0, 0, 0].tolist())


# ---- one image ---------------------------------------------------------------------------------------------------


def picture(rng: np.random.Generator, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """An image of random pixels; `size` is width and height."""
    channels = {"RGB": 3, "L": 0, "RGBA": 4}[mode]
    shape = (size[1], size[0], channels) if channels else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=None)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    """The content of an image file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG of one color, whose red is `value`."""
    return encoded(Image.new("RGB", size, (value, value // 2, 7)))


def plain(value: int, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    """A PNG whose every number is `value`."""
    return encoded(Image.new(mode, size, (value,) * 3 if mode == "RGB" else value))


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a value, `values` of shape (H, W, C) with C = 1, 3 or 4; Pillow writes none with colors."""
    height, width, channels = values.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    color_type = {1: 0, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


# files with more than 8 bits a value, by the name of their mode in the error message
DEEP = {
    "I;16": png16(np.full((4, 4, 1), 40000)),
    "I": encoded(Image.new("I", (4, 4), 70000), "tiff"),
    "F": encoded(Image.new("F", (4, 4), 0.5), "tiff"),
    "RGB;16B": png16(np.full((4, 4, 3), 40000)),
    "RGBA;16B": png16(np.full((4, 4, 4), 65535)),
    "65535": b"P6 2 2 65535\n" + bytes(24),
}


# ---- folders and data sets ---------------------------------------------------------------------------------------


def write_images(root: str | Path, *names: str) -> str:
    """Writes one image of [`png`] for each name; its value is the index of the name."""
    for i, name in enumerate(names):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return str(root)


def write_image_folder(folder: Path, images: list[Image.Image]) -> str:
    """Writes a folder with a train and a test split and two classes; the last image is the test split."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / ("train" if i < len(images) - 1 else "test") / "ab"[i % 2] / f"{i:03d}.png")
    return str(folder)


def parquet_folder(folder: Path, rows: list[tuple], shards: int = 1, name: str = "train", **features) -> str:
    """Writes a folder of parquet files, as on the Hub; `rows` are (content of a file, label)."""
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
