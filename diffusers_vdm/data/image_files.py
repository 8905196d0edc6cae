"""Decode an image file into the integers it stores, or reject it with a reason.

Bits/dim are defined for integers, so no pixel is changed silently: where Pillow would clip, round or blend, an error
is raised.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..randomness import keyed_generator

MODES = ("L", "RGB")
# Pillow's names for layouts that it silently reduces to 8 bits; not 'RGB;16', which is 5-6-5 bits
_DEEP = re.compile(r"^L;16|;(16[BLNS]|32|64)")
_ORIENTATION = 0x0112


class DamagedImage(ValueError):
    """A file that is damaged, missing or not an image; an intact file that is rejected raises a plain `ValueError`."""


def check_image_mode(image_mode: str | None) -> None:
    """Raises `ValueError` for anything but `"L"`, `"RGB"` and `None`."""
    if image_mode is not None and image_mode not in MODES:
        raise ValueError(f"image_mode must be one of {MODES} or None, got {image_mode!r}.")


def row_name(row: dict[str, Any] | None) -> str:
    """For error messages: ", file NAME" if the row of an undecoded image column has a path, else an empty string."""
    name = (row or {}).get("path")
    return f", file {name}" if name else ""


def check_frames(frames: str | None) -> None:
    """Raises `ValueError` for anything but `"first"`, `"all"` and `None`."""
    if frames not in (None, "first", "all"):
        raise ValueError(f"frames must be 'first', 'all' or None, got {frames!r}.")


@dataclass(frozen=True)
class DecodedImage:
    """An image ready for training, uint8 `(C, H, W)`, and a digest of all its pixels before cropping."""

    pixels: np.ndarray
    digest: int


def decode(
    row: dict[str, Any] | None,
    mode: str | None,
    convert: bool,
    resolution: int | None = None,
    crop_key: tuple[int | str, ...] | None = None,
    frame: int | None = None,
) -> np.ndarray:
    """The image in one row of a column cast to `datasets.Image(decode=False)`, uint8 `(C, H, W)`.

    8-bit grayscale and RGB images are accepted. Images with more than 8 bits per value are rejected where the file
    declares its depth (all of Pillow's deep modes; 16-bit colors in PNG, TIFF, PPM and SGI, but not in JPEG 2000 or
    AVIF). Images with transparent pixels are rejected because the color of such a pixel depends on the program that
    wrote the file. The EXIF orientation is applied, as in `datasets`.

    Args:
        row (`dict`): holds the `bytes` of the file, or its `path`.
        mode (`"L"` or `"RGB"`, *optional*): the required mode; either of the two if not given.
        convert (`bool`): convert other 8-bit opaque images (palette, CMYK, black and white, …) to `mode`.
        resolution (`int`, *optional*): resize the shorter side to it and crop a square.
        crop_key (`tuple`, *optional*): key of the random crop position; without it the crop is centered.
        frame (`int`, *optional*): frame to take from a file with several (TIFF, GIF, APNG, WebP); without it such a
            file is rejected.

    Raises: `ValueError` with the reason for the rejection. It does not name the image; the caller adds the name.
    """
    return _pixels(_open_image(row, mode, convert, frame), resolution, crop_key)


def decode_image(
    row: dict[str, Any] | None,
    mode: str | None,
    convert: bool,
    resolution: int | None = None,
    crop_key: tuple[int | str, ...] | None = None,
    frame: int | None = None,
) -> DecodedImage:
    """Like [`decode`], with a digest of all pixels before cropping."""
    image = _open_image(row, mode, convert, frame)
    content = f"{image.mode} {image.size}".encode() + image.tobytes()
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
    return DecodedImage(_pixels(image, resolution, crop_key), digest)


def _open_image(row: dict[str, Any] | None, mode: str | None, convert: bool, frame: int | None) -> Image.Image:
    """The uncropped image in `"L"` or `"RGB"`; arguments and errors as in [`decode`]."""
    if mode is not None:
        check_image_mode(mode)
    content = read_content(row)
    try:
        image = Image.open(BytesIO(content))
        count = _num_frames(image)
        if frame:
            image.seek(frame)
        depth = deep_layout(image)  # Pillow drops the layout when it loads the pixels
        image.load()
        if image.getexif().get(_ORIENTATION) is not None:
            image = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"has too many pixels for Pillow ({one_line(error)}); if the file can be trusted, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # a damaged file can raise any exception in Pillow
        raise DamagedImage(
            f"cannot be decoded ({one_line(error)}); the file is damaged, replace it or leave it out."
        ) from error
    if count > 1 and frame is None:
        raise ValueError(
            f"has {count} frames; set frames='first' to take the first of each file, or frames='all' to take each "
            "frame as an image."
        )
    if depth is not None:
        raise ValueError(
            f"{depth!r} holds more than 8 bits per value, or a range other than 0 to 255. Pillow would silently clip, "
            "round or rescale the values, and bits/dim would be those of other data; convert the files to 8-bit 'L' "
            "or 'RGB' yourself, and report the conversion with every number."
        )
    if image.has_transparency_data and (convert or image.mode in MODES):
        alpha: Any = image.convert("RGBA").getchannel("A").getextrema()[0]
        if alpha < 255:
            raise ValueError(
                f"mode {image.mode!r} with transparent pixels (alpha {alpha}): their color is arbitrary; composite "
                "the files on a background of your choice."
            )
    return _to_mode(image, mode or image.mode, convert)


def num_frames(row: dict[str, Any] | None) -> int:
    """Number of frames in a file; 1 for a file that cannot be opened, so that [`decode`] reports the error."""
    try:
        return _num_frames(Image.open(BytesIO(read_content(row))))
    except Exception:  # a damaged file can raise any exception in Pillow
        return 1


def _num_frames(image: Image.Image) -> int:
    if image.format == "MPO":  # the other frames are a preview or a depth map
        return 1
    return getattr(image, "n_frames", 1)


def read_content(row: dict[str, Any] | None) -> bytes:
    """The bytes of the file; raises `DamagedImage` if it is missing, empty or evidently not an image."""
    if row is None or (row.get("bytes") is None and not row.get("path")):
        raise DamagedImage("cannot be decoded: the row holds no image.")
    content = row.get("bytes")
    try:
        if content is None and "://" not in row["path"]:
            with open(row["path"], "rb") as file:
                content = file.read()
        elif content is None:
            import fsspec

            opened: Any = fsspec.open(row["path"], "rb")
            with opened as file:  # 'hf://…', 'zip://…::…': streaming does not download them
                content = file.read()
    except FileNotFoundError as error:
        raise DamagedImage("cannot be decoded: the file is missing, or it is a broken link.") from error
    start = content[:512].lstrip().lower()
    if not content:
        raise DamagedImage("cannot be decoded: the file is empty (0 bytes).")
    if start.startswith(b"version https://git-lfs"):
        raise DamagedImage("cannot be decoded: the file is a Git LFS pointer; run `git lfs pull` to fetch its data.")
    if start.startswith((b"<!doctype html", b"<html")):
        raise DamagedImage("cannot be decoded: the file is a web page (HTML), probably left by a failed download.")
    return content


def one_line(error: BaseException) -> str:
    """The message of an error from Pillow or datasets, without line breaks and memory addresses."""
    text = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "its content", str(error))
    return " ".join(text.split())[:500] or type(error).__name__


def deep_layout(image: Image.Image) -> str | None:
    """Pillow's name for the stored layout if its values are not 0 to 255; the image must not be loaded yet."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return image.mode
    for codec, _, _, layout in getattr(image, "tile", []):
        for part in layout if isinstance(layout, tuple) else (layout,):
            if isinstance(part, str) and _DEEP.search(part):
                return part
            if codec.startswith("ppm") and isinstance(part, int) and part not in (0, 1, 255):  # the largest value
                return f"{image.mode} up to {part}"
    return None


def _to_mode(image: Image.Image, mode: str, convert: bool) -> Image.Image:
    """The image in `mode`; raises `ValueError` if it has another mode and `convert` is false."""
    if mode not in MODES:
        raise ValueError(
            f"images must be 8-bit grayscale ('L') or RGB, got mode {mode!r}; set image_mode to convert them, which "
            "makes bits/dim those of the converted images."
        )
    if image.mode != mode:
        if not convert:
            raise ValueError(f"mode {image.mode!r}, but the first image has {mode!r}; set image_mode to convert all.")
        if image.has_transparency_data:  # checked to be opaque; Pillow warns about some direct conversions
            image = image.convert("RGBA")
        image = image.convert(mode)
    return image


def _pixels(image: Image.Image, resolution: int | None, crop_key: tuple[int | str, ...] | None) -> np.ndarray:
    """uint8 array `(C, H, W)` of a PIL image, resized and cropped."""
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
