"""Images of any size as tiles of the network's size.

A tile at the right or lower edge may reach beyond its image. Its other pixels repeat the last ones of the image and
are not coded.
"""

from __future__ import annotations

import numpy as np

Size = tuple[int, int]


def _corners(height: int, width: int, size: Size) -> list[tuple[int, int]]:
    """The upper left pixel of each tile, row by row."""
    return [(i, j) for i in range(0, height, size[0]) for j in range(0, width, size[1])]


def tile_sizes(height: int, width: int, size: Size) -> list[Size]:
    """Height and width of the part of the image in each tile, row by row."""
    return [(min(size[0], height - i), min(size[1], width - j)) for i, j in _corners(height, width, size)]


def split(image: np.ndarray, size: Size) -> list[np.ndarray]:
    """The tiles of an image `(C, H, W)`, each of its own size `(C, h, w)`."""
    _, height, width = image.shape
    return [image[:, i : i + size[0], j : j + size[1]] for i, j in _corners(height, width, size)]


def join(tiles: list[np.ndarray], height: int, width: int, size: Size) -> np.ndarray:
    """The inverse of [`split`]."""
    image = np.empty((tiles[0].shape[0], height, width), dtype=tiles[0].dtype)
    for (i, j), tile in zip(_corners(height, width, size), tiles, strict=True):
        image[:, i : i + size[0], j : j + size[1]] = tile
    return image


def padded(tiles: list[np.ndarray], size: Size) -> np.ndarray:
    """Tiles as one int64 array `(B, C, H, W)`, whose pixels outside of a tile repeat its last ones."""
    result = np.empty((len(tiles), tiles[0].shape[0], *size), dtype=np.int64)
    for row, tile in zip(result, tiles, strict=True):
        row[:, : tile.shape[1], : tile.shape[2]] = tile
    repeat_edges(result, [tile.shape[1:] for tile in tiles])
    return result


def repeat_edges(items: np.ndarray, sizes: list[Size]) -> None:
    """Fills the pixels of items `(B, C, H, W)` outside of their tiles, in place."""
    for item, (height, width) in zip(items, sizes, strict=True):
        item[:, :height, width:] = item[:, :height, width - 1 : width]
        item[:, height:] = item[:, height - 1 : height]


def real_pixels(sizes: list[Size], shape: tuple[int, int, int]) -> np.ndarray:
    """Which pixels of the items are coded, bool `(B, C H W)`."""
    real = np.zeros((len(sizes), *shape), dtype=bool)
    for row, (height, width) in zip(real, sizes, strict=True):
        row[:, :height, :width] = True
    return real.reshape(len(sizes), -1)
