"""What an image file must be to be data: found, opened, refused with a reason, made into the integers that it holds.

Bits/dim are of integers. So nothing is changed in silence: what Pillow would clip, round or blend is an error.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .randomness import keyed_generator

MODES = ("L", "RGB")
# Pillow's names of layouts that it reduces to 8 bits without a word; not 'RGB;16', which is 5-6-5 bits
_DEEP = re.compile(r"^L;16|;(16[BLNS]|32|64)")
_ORIENTATION = 0x0112


def open_dataset(
    path: str, split: str, config_name: str | None, is_folder: bool, cache_dir: str | None, streaming: bool
) -> Any:
    """The `datasets.Dataset`, or `IterableDataset` if `streaming`, of a name on the Hub or a folder.

    Raises: `ValueError` where there are no data, the split is unknown, or the files cannot be read; `OSError` for what
        the network or the disk reports.
    """
    import datasets

    where = f"{path!r} ({split})"
    options: dict[str, Any] = {"split": split, "cache_dir": cache_dir, "streaming": streaming}
    if int(datasets.__version__.split(".")[0]) < 4:
        options["trust_remote_code"] = False  # later versions run none
    try:
        if is_folder:
            return datasets.load_dataset("imagefolder", data_dir=path, **options)
        return datasets.load_dataset(path, config_name, **options)
    except FileNotFoundError as error:
        raise ValueError(
            f"{where} has no data files; name a data set on the Hub, a folder of images or a folder of parquet files "
            f"(datasets says: {_one_line(error)})."
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{where} cannot be read: {_one_line(error.__cause__ or error)}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{where} has no data: an empty split, or a folder without image files.") from error
        if str(error).startswith("Bad split"):  # what streaming calls it
            raise ValueError(
                f"Unknown split {split!r} of {path!r}.{str(error)[len(f'Bad split: {split}.') :]}"
            ) from error
        raise ValueError(f"{where} cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def find_columns(data: Any, image_column: str | None, label_column: str | None) -> tuple[str, str | None, str | None]:
    """Names of the columns of images and classes (`None` without classes), and the mode that the data set declares.

    Without a name the first column of their type is taken; `label_column=""` takes no classes.

    Raises: `ValueError` for a column that is not there or holds no images, naming those that do.
    """
    import datasets

    features = data.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if (image_column or next(iter(images), None)) not in images:
        raise ValueError(
            f"image_column must name a column of images, got {image_column!r}; there are {images or 'none'} among "
            f"{list(features)}."
        )
    image_column = image_column or images[0]
    if label_column is None:
        label_column = next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    elif label_column and label_column not in features:
        raise ValueError(f"label_column {label_column!r} is not in the data set, which has {list(features)}.")
    mode = getattr(features[image_column], "mode", None)
    return image_column, label_column or None, mode if mode in MODES else None


def check_image_mode(image_mode: str | None) -> None:
    """`ValueError` for anything but `"L"`, `"RGB"` and `None`."""
    if image_mode is not None and image_mode not in MODES:
        raise ValueError(f"image_mode must be one of {MODES} or None, got {image_mode!r}.")


def check_label(label: Any, column: str) -> int:
    """The class as it stands in the row, -1 where there is none; `ValueError` if it is no whole number."""
    if label is None:
        return -1
    if not isinstance(label, int):
        raise ValueError(
            f"label_column {column!r} must hold whole numbers, the indices of the classes, got {label!r}; cast it to "
            "datasets.ClassLabel, or take another column."
        )
    return max(label, -1)


def missing_label(column: str) -> ValueError:
    """The error for a row without a class."""
    return ValueError(
        f"label_column {column!r} holds no class (none, or -1) here; leave such images out, or set label_column='' to "
        "take all images without classes."
    )


def row_name(row: dict[str, Any] | None) -> str:
    """', file NAME' where the row of an undecoded image column tells it, for error messages."""
    name = (row or {}).get("path")
    return f", file {name}" if name else ""


def decode(
    row: dict[str, Any] | None,
    mode: str | None,
    convert: bool,
    resolution: int | None = None,
    crop_key: tuple[int | str, ...] | None = None,
) -> np.ndarray:
    """uint8 array `(C, H, W)` of one row of a column cast to `datasets.Image(decode=False)`.

    Taken are 8-bit grayscale and RGB. Always refused are more than 8 bits a value, as far as the file tells it (all of
    Pillow's deep modes; 16-bit colours in PNG, TIFF, PPM and SGI, but not in JPEG 2000 or AVIF), and images with
    transparent pixels: what lies under them is whatever the program that wrote the file left there. The image is
    turned as its EXIF orientation says, as `datasets` does.

    Args:
        row (`dict`): `bytes` of the file, or else the `path` of it.
        mode (`"L"` or `"RGB"`, *optional*): what the image must be, either of the two if not given.
        convert (`bool`): convert to `mode` what is 8-bit and opaque: palettes, CMYK, black and white, ….
        resolution (`int`, *optional*): side of the square that is resized and cropped to.
        crop_key (`tuple`, *optional*): key of the place of the crop; without it the middle is cropped.

    Raises: `ValueError` that says what came and why it is no data; it does not name the image, which the caller knows.
    """
    if mode is not None:
        check_image_mode(mode)
    try:
        image = Image.open(BytesIO(_content(row)))
        depth = _deep_layout(image)  # known until the pixels are loaded
        image.load()
        if image.getexif().get(_ORIENTATION) is not None:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise ValueError(
            f"cannot be decoded ({_one_line(error)}); the file is damaged or missing, replace it or leave it out."
        ) from error
    if depth is not None:
        raise ValueError(
            f"{depth!r} holds more than 8 bits a value. Conversion would clip or round them in silence, and bits/dim "
            "would be of other data; convert the files to 8-bit 'L' or 'RGB' yourself, and say so with every number."
        )
    if image.has_transparency_data and (convert or image.mode in MODES):
        alpha = image.convert("RGBA").getchannel("A").getextrema()[0]
        if alpha < 255:
            raise ValueError(
                f"mode {image.mode!r} with transparent pixels (alpha {alpha}): what lies under them is arbitrary; "
                "composite the files on a background of your choice."
            )
    return _pixels(image, mode or image.mode, convert, resolution, crop_key)


def _content(row: dict[str, Any] | None) -> bytes:
    if row is None or (row.get("bytes") is None and not row.get("path")):
        raise ValueError("the row holds no image")
    if row.get("bytes") is not None:
        return row["bytes"]
    if "://" not in row["path"]:
        with open(row["path"], "rb") as file:
            return file.read()
    import fsspec

    with fsspec.open(row["path"], "rb") as file:  # 'hf://…', 'zip://…::…': what streaming does not download
        return file.read()


def _deep_layout(image: Image.Image) -> str | None:
    """Pillow's name of what is stored, if that is more than 8 bits a value; of an image that is not loaded yet."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return image.mode
    for codec, _, _, layout in getattr(image, "tile", []):
        for part in layout if isinstance(layout, tuple) else (layout,):
            if isinstance(part, str) and _DEEP.search(part):
                return part
            if codec.startswith("ppm") and isinstance(part, int) and part > 255:  # the largest value
                return f"{image.mode} up to {part}"
    return None


def _pixels(
    image: Image.Image, mode: str, convert: bool, resolution: int | None, crop_key: tuple[int | str, ...] | None
) -> np.ndarray:
    """uint8 array `(C, H, W)` of a PIL image, resized and cropped."""
    if mode not in MODES:
        raise ValueError(
            f"images must be 8-bit grayscale ('L') or RGB, got mode {mode!r}; set image_mode to convert them, knowing "
            "that bits/dim are then of the converted images."
        )
    if image.mode != mode:
        if not convert:
            raise ValueError(f"mode {image.mode!r}, but the first image has {mode!r}; set image_mode to convert all.")
        if image.has_transparency_data:  # opaque, as was checked; Pillow warns of some direct ways
            image = image.convert("RGBA")
        image = image.convert(mode)
    if resolution is not None and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        if crop_key is not None:
            share = torch.rand(2, generator=keyed_generator(*crop_key)).tolist()
            left, top = int(share[0] * (width - resolution + 1)), int(share[1] * (height - resolution + 1))
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.array(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
