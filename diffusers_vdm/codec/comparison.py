"""What PNG, WebP and JPEG XL need for the same images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from .container import ImageEntry
from .sources import Pair

_SMALL = 64  # pixels of the longer side up to which images are compressed together, in mosaics
_IN_A_MOSAIC = 400


class OtherFormats:
    """Counts the bytes of other lossless formats while images are read.

    Small images are put into mosaics of 400, because a file of their own would be mostly header. JPEG XL (effort 9)
    needs the package imagecodecs.

    Args:
        num_levels (`int`): levels of the pixels; formats are measured for at most 256.
    """

    def __init__(self, num_levels: int):
        self._formats = dict(_formats()) if num_levels <= 256 else {}
        self._bytes = dict.fromkeys(self._formats, 0)
        self._values = 0
        self._waiting: list[np.ndarray] = []
        self.note: str | None = None

    def watch(self, pairs: Iterable[Pair]) -> Iterator[tuple[ImageEntry, np.ndarray]]:
        """Yields the images as they are, and measures them."""
        for entry, image in pairs:
            self._values += image.size
            pixels = image[:1] if entry.mode == "L" else image
            if image.shape[0] in (1, 3, 4):
                self._add(np.ascontiguousarray(pixels.transpose(1, 2, 0), dtype=np.uint8))
            else:
                self._formats = {}
            yield entry, image

    def bpd(self) -> dict[str, float]:
        """Bits/dim of each format."""
        self._flush()
        return {name: 8 * self._bytes[name] / self._values for name in self._formats}

    def _add(self, image: np.ndarray) -> None:
        if max(image.shape[:2]) > _SMALL:
            self._count(image)
            return
        if self._waiting and self._waiting[0].shape != image.shape:
            self._flush()
        self._waiting.append(image)
        self.note = f"in mosaics of up to {_IN_A_MOSAIC}"
        if len(self._waiting) == _IN_A_MOSAIC:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        images, self._waiting = self._waiting, []
        columns = int(np.ceil(len(images) ** 0.5))
        height, width, channels = images[0].shape
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        mosaic = np.zeros((len(rows) * height, columns * width, channels), dtype=np.uint8)
        for i, row in enumerate(rows):
            for j, image in enumerate(row):
                mosaic[i * height : (i + 1) * height, j * width : (j + 1) * width] = image
        self._count(mosaic)

    def _count(self, image: np.ndarray) -> None:
        for name, encode in list(self._formats.items()):
            try:
                self._bytes[name] += len(encode(image[:, :, 0] if image.shape[2] == 1 else image))
            except Exception:  # a format that does not hold this image, such as WebP beyond 16383 pixels
                del self._formats[name]


def _formats() -> Iterator[tuple[str, Any]]:
    def by_pillow(image: np.ndarray, form: str, **options: Any) -> bytes:
        content = BytesIO()
        picture = Image.fromarray(image)
        picture.save(content, form, **options)
        return content.getvalue()

    yield "PNG", lambda image: by_pillow(image, "png", optimize=True)
    yield "WebP", lambda image: by_pillow(image, "webp", lossless=True, quality=100, method=6, exact=True)
    try:
        imagecodecs = import_module("imagecodecs")  # optional, and not among the extras
        yield "JPEG XL", lambda image: imagecodecs.jpegxl_encode(image, lossless=True, effort=9)
    except ImportError:
        return
