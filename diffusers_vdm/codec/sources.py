"""The images to compress, one after the other: arrays, `.npz` files, folders of image files, and data sets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.image_files import decode, read_content
from ..diffusion import check_levels
from .container import ImageEntry

Pair = tuple[ImageEntry, np.ndarray]
_MODE_OF = {1: "L", 3: "RGB", 4: "RGBA"}


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
        images = torch.from_numpy(images)
    if not torch.is_tensor(images):
        if not isinstance(images, Iterable):
            raise TypeError(f"images must be a tensor, an array or an iterable, got {type(images).__name__}.")
        return Images(images)
    images = images.cpu()
    check_levels(images, num_levels)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}.")
    return _of_array(images.numpy(), "NCHW")


def images_of_npz(path: str | os.PathLike, channels: int) -> Images:
    """The array of an `.npz` file, `(N, H, W, C)`, `(N, C, H, W)` or `(N, H, W)`: the only one or `images`.

    Raises: `ValueError` if there is no such array of images with this number of channels.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays.files)
            name = "images" if "images" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise ValueError(f"it must hold one array, or one named images, got {names}")
            array = arrays[name]
    except (ValueError, OSError) as error:
        raise ValueError(f"--data_dir {path} cannot be read: {error}") from error
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
            yield ImageEntry(*image.shape[1:], mode, Path(name).as_posix()), image

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
    digits = len(str(count or 0))

    def read() -> Iterator[Pair]:
        for i, row in enumerate(rows):
            image, mode = _decoded(row[source.image_column], channels, f"image {i}")
            yield ImageEntry(*image.shape[1:], mode, f"{i:0{digits}d}.png"), image

    return Images(read(), count=count)


def _decoded(row: dict[str, Any], channels: int, name: str) -> tuple[np.ndarray, str]:
    """The pixels `(C, H, W)` and the mode of the file; a gray image has three equal channels for a model of colors."""
    try:
        if channels == 4:
            from io import BytesIO

            with Image.open(BytesIO(read_content(row))) as image:
                if image.mode != "RGBA":
                    raise ValueError(f"mode {image.mode!r}, and the model has images of RGBA.")
                return np.asarray(image).transpose(2, 0, 1), "RGBA"
        if channels not in _MODE_OF:
            raise ValueError(f"the model has images of {channels} channels, which no image file has.")
        if channels == 3 and _is_gray(row):
            gray = decode(row, "L", False)
            return np.repeat(gray, 3, axis=0), "L"
        return decode(row, _MODE_OF[channels], convert=channels == 3), _MODE_OF[channels]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_gray(row: dict[str, Any]) -> bool:
    from io import BytesIO

    try:
        with Image.open(BytesIO(read_content(row))) as image:
            return image.mode == "L"
    except (OSError, ValueError):  # `decode` reports it
        return False


def write_image(path: Path, image: np.ndarray, entry: ImageEntry) -> None:
    """Writes an image `(C, H, W)` as a PNG with the mode of its file."""
    from io import BytesIO

    from ..files import write_atomically

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

    Raises: `ValueError` for a name that leads out of the folder, which no file of ours has.
    """
    parts = Path(entry.name).parts
    if not parts or ".." in parts or Path(entry.name).is_absolute() or "\\" in entry.name or ":" in entry.name:
        raise ValueError(f"the file names an image {entry.name!r}, which is no name within a folder.")
    name = Path(entry.name).with_suffix(".png").as_posix()
    if name in taken:
        name = f"{entry.name}.png"
    taken.add(name)
    return name
