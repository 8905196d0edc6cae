"""The images to compress, one after the other: arrays, `.npz` files, folders of image files, and data sets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..data.image_files import DamagedImage, decode, deep_layout, num_frames, one_line, read_content
from ..diffusion import check_levels
from .container import ImageEntry

Pair = tuple[ImageEntry, np.ndarray]
_MODE_OF = {1: "L", 3: "RGB", 4: "RGBA"}
_OTHER_COLORS = ("CMYK", "YCbCr", "LAB", "HSV")  # which Pillow converts to RGB with rounding


@dataclass(frozen=True)
class Images:
    """Images that are read once, in order.

    Attributes:
        pairs (`Iterable`): an `ImageEntry` and an array `(C, H, W)` for each image.
        size (`tuple[int, int]`, *optional*): height and width, if all images have the same and no names.
        count (`int`, *optional*): how many, if that is known.
        layout (`str`): `"NCHW"`, `"NHWC"` or `"NHW"`, the array that a decoder writes, or `"files"`.
    """

    pairs: Iterable[Pair]
    size: tuple[int, int] | None = None
    count: int | None = None
    layout: str = "files"


def images_of(images: Any, num_levels: int) -> Images:
    """`images` as `compress` takes them; raises `TypeError` or `ValueError` for others."""
    if isinstance(images, Images):
        return images
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("=")))
    if not torch.is_tensor(images):
        if not isinstance(images, Iterable):
            raise TypeError(f"images must be a tensor, an array or an iterable, got {type(images).__name__}.")
        return Images(images)
    images = images.cpu()
    if images.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has no minimum of them
        images = images.to(torch.int64)
    check_levels(images, num_levels)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}.")
    return _of_array(images.numpy(), "NCHW")


def images_of_npz(path: str | os.PathLike, channels: int) -> Images:
    """The array of an `.npz` file, `(N, H, W, C)`, `(N, C, H, W)` or `(N, H, W)`: the only one or `images`.

    Raises: `ValueError` if there is no such array of images with this number of channels.
    """
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            names = list(arrays.files)
            name = "images" if "images" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise ValueError(f"it must hold one array, or one named images, got {names}")
            array: Any = arrays[name]
    except Exception as error:  # a damaged file can raise any exception in zipfile, zlib or numpy
        raise ValueError(f"--data_dir {path} cannot be read: {one_line(error)}") from error
    if not isinstance(array, np.ndarray):  # a file of the archive that is no array
        raise ValueError(f"--data_dir {path} cannot be read: {name} is not an array.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path} must hold integers, got {array.dtype}.")
    if array.ndim == 3 and channels == 1:
        return _of_array(array[:, None], "NHW")
    if array.ndim == 4 and array.shape[3] == channels:
        return _of_array(array.transpose(0, 3, 1, 2), "NHWC")
    if array.ndim == 4 and array.shape[1] == channels:
        return _of_array(array, "NCHW")
    raise ValueError(f"{path} must hold images of the {channels} channels of the model, got shape {array.shape}.")


def _of_array(array: np.ndarray, layout: str) -> Images:
    size = (int(array.shape[2]), int(array.shape[3]))
    return Images(((ImageEntry(*size), image) for image in array), size, len(array), layout)


def images_of_folder(path: str | os.PathLike, channels: int) -> Images:
    """All image files below a folder in the order of their names, whatever their sizes.

    Raises: `ValueError` if there are none, or when one is read that cannot be represented exactly.
    """
    from ..data.image_folder import image_suffixes, walk

    suffixes, root = image_suffixes(), Path(path)
    names = sorted(name for name in walk(root) if Path(name).suffix.lower() in suffixes)
    if not names:
        raise ValueError(f"--data_dir {path} has no image files.")

    def read() -> Iterator[Pair]:
        for name in names:
            image, mode = _decoded({"path": str(root / name), "bytes": None}, channels, name)
            _, height, width = image.shape
            yield ImageEntry(height, width, mode, Path(name).as_posix()), image

    return Images(read(), count=len(names))


def images_of_dataset(
    path: str, split: str, channels: int, *, config_name: str | None = None, image_column: str | None = None,
    cache_dir: str | None = None,
) -> Images:  # fmt: skip
    """The images of a split of a data set, whatever their sizes; arguments as in `load_images`."""
    import datasets

    from ..data.image_sources import open_source

    source = open_source(
        path, split, config_name=config_name, image_column=image_column, label_column="", cache_dir=cache_dir,
        allow_shared=True,
    )  # fmt: skip
    rows, count = source.data.cast_column(source.image_column, datasets.Image(decode=False)), source.num_rows

    def read() -> Iterator[Pair]:
        for i, row in enumerate(rows):
            image, mode = _decoded(row[source.image_column], channels, f"image {i}")
            _, height, width = image.shape
            yield ImageEntry(height, width, mode), image  # without a name, which a decoder numbers

    return Images(read(), count=count)


def _decoded(row: dict[str, Any], channels: int, name: str) -> tuple[np.ndarray, str]:
    """The pixels `(C, H, W)` and the mode of the file; a gray image has three equal channels for a model of colors."""
    try:
        if channels not in _MODE_OF:
            raise ValueError(f"the model has images of {channels} channels, which no image file has.")
        if channels == 4:
            return _decoded_rgba(row), "RGBA"
        if (count := num_frames(row)) > 1:
            raise ValueError(f"has {count} frames; write each frame into a file of its own.")
        if channels == 3:
            mode = _mode(row)
            if mode in _OTHER_COLORS:
                raise ValueError(f"mode {mode!r} cannot be converted to RGB exactly; convert the files yourself.")
            if mode == "L":
                return np.repeat(decode(row, "L", False), 3, axis=0), "L"
        return decode(row, _MODE_OF[channels], convert=channels == 3), _MODE_OF[channels]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _decoded_rgba(row: dict[str, Any]) -> np.ndarray:
    """The pixels of a file with transparency, which `decode` does not read; `(4, H, W)`."""
    content, frames = read_content(row), num_frames(row)
    try:
        with Image.open(BytesIO(content)) as image:
            mode, deep = image.mode, deep_layout(image)
            pixels = np.asarray(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file can raise any exception in Pillow
        raise DamagedImage(f"cannot be decoded ({one_line(error)}); the file is damaged.") from error
    if mode != "RGBA":
        raise ValueError(f"mode {mode!r}, and the model has images of RGBA.")
    if deep is not None or frames > 1:
        what = f"{deep!r} holds more than 8 bits per value" if deep is not None else f"has {frames} frames"
        raise ValueError(f"{what}, and the model has images of RGBA.")
    return pixels.transpose(2, 0, 1)


def _mode(row: dict[str, Any]) -> str | None:
    """Pillow's name for the mode of a file; `None` if it cannot be read, which `decode` reports."""
    try:
        with Image.open(BytesIO(read_content(row))) as image:
            return image.mode
    except Exception:  # a damaged file can raise any exception in Pillow
        return None


def write_image(path: Path, image: np.ndarray, entry: ImageEntry) -> None:
    """Writes an image `(C, H, W)` as a PNG with the mode of its file.

    Raises: `ValueError` for images that no PNG of 8 bits holds.
    """
    from ..files import write_atomically

    if len(image) not in _MODE_OF:
        raise ValueError(f"{path.name}: the image has {len(image)} channels, which no image file has.")
    if image.max() > 255:
        raise ValueError(
            f"{path.name}: an image file holds at most 256 levels, the image has the level {image.max()}."
        )
    pixels = image[:1] if entry.mode == "L" else image
    array = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    content = BytesIO()
    Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8)).save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def write_array(path: Path, images: list[np.ndarray], layout: str) -> None:
    """Writes images `(C, H, W)` as the array `images` of an `.npz` file in one of the layouts of [`Images`]."""
    from ..files import whole_file

    array = np.stack(images)
    array = array.astype(np.uint8 if array.dtype == np.uint8 else np.int32)
    if layout != "NCHW":
        array = array.transpose(0, 2, 3, 1) if layout == "NHWC" else array[:, 0]
    with whole_file(path) as file:
        np.savez(file, images=array)


def file_name(entry: ImageEntry, taken: set[str]) -> str:
    """The name of the PNG for an image: that of its file with another suffix, or with a second one if that is taken.

    An image without a name gets a number. `:` and `\\`, which lead out of a folder on Windows, become `_`.

    Raises: `ValueError` for a name that leads out of the folder, which no file of ours has.
    """
    given = re.sub(r"[:\\]", "_", entry.name) or f"{len(taken):06d}"
    parts = Path(given).parts
    if not parts or ".." in re.split(r"[/\\]", entry.name) or Path(given).is_absolute():
        raise ValueError(f"the file names an image {entry.name!r}, which is no name within a folder.")
    name = Path(given).with_suffix(".png").as_posix()
    if name in taken:
        name = f"{given}.png"
    while name in taken:
        name = f"{name}.png"
    taken.add(name)
    return name
