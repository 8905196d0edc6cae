"""codec/tiles.py: images of any size are the same after they were cut into tiles."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vdm.codec.tiles import join, padded, real_pixels, repeat_edges, split, tile_sizes

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30))


def numbered(shape):
    """An image whose every value is different."""
    return np.arange(np.prod(shape)).reshape(shape)


@given(SHAPES, SIZES)
def test_tiles_are_joined_to_the_same_image(shape, size):
    image = numbered(shape)
    tiles = split(image, size)
    assert [tile.shape[1:] for tile in tiles] == tile_sizes(*shape[1:], size)
    assert len(tiles) == -(-shape[1] // size[0]) * -(-shape[2] // size[1])
    assert sum(tile.size for tile in tiles) == image.size
    assert all(tile.shape[1] <= size[0] and tile.shape[2] <= size[1] for tile in tiles)
    again = join(tiles, *shape[1:], size)
    assert again.dtype == image.dtype and np.array_equal(again, image)


def test_an_image_of_the_size_of_a_tile_is_one_tile():
    image = numbered((3, 4, 5))
    [tile] = split(image, (4, 5))
    assert np.array_equal(tile, image)


@given(SHAPES, SIZES)
def test_padding_repeats_the_last_pixels(shape, size):
    tiles = split(numbered(shape), size)
    items = padded(tiles, size)
    assert items.shape == (len(tiles), shape[0], *size) and items.dtype == np.int64
    for item, tile in zip(items, tiles, strict=True):
        right, below = size[1] - tile.shape[2], size[0] - tile.shape[1]
        assert np.array_equal(item, np.pad(tile, ((0, 0), (0, below), (0, right)), mode="edge"))


@given(SHAPES, SIZES)
def test_the_coded_pixels_are_those_of_the_image(shape, size):
    tiles = split(numbered(shape), size)
    sizes = [tile.shape[1:] for tile in tiles]
    items, real = padded(tiles, size), real_pixels(sizes, (shape[0], *size))
    assert real.dtype == bool and real.shape == (len(tiles), items[0].size)
    flat = items.reshape(len(tiles), -1)
    assert sorted(flat[real].tolist()) == list(range(np.prod(shape)))


@given(SHAPES, SIZES)
def test_the_other_pixels_follow_from_the_coded_ones(shape, size):
    tiles = split(numbered(shape), size)
    sizes = [tile.shape[1:] for tile in tiles]
    items = padded(tiles, size)
    real = real_pixels(sizes, (shape[0], *size)).reshape(items.shape)
    again = np.where(real, items, -7)
    repeat_edges(again, sizes)
    assert np.array_equal(again, items)
