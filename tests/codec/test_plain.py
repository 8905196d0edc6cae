"""codec/plain.py: any images come back, and those that can be predicted are small."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vdm.codec.plain import pop_plain, push_plain
from diffusers_vdm.codec.stack import Stack

LEVELS = [2, 3, 17, 255, 256, 257, 1000, 65535, 65536]
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def bits(images, num_levels):
    """What the images cost; checks that they come back."""
    stack = Stack()
    push_plain(stack, images, num_levels)
    cost = stack.bits
    again = pop_plain(stack, [image.shape for image in images], num_levels)
    assert stack.bits == 0
    assert all(np.array_equal(a, b) for a, b in zip(again, images, strict=True))
    return cost


def content(kind, shape, num_levels, rng):
    """Noise, extremes, a gradient, or one level."""
    if kind == "noise":
        return rng.integers(0, num_levels, shape)
    if kind == "extremes":
        return rng.integers(0, 2, shape) * (num_levels - 1)
    if kind == "gradient":
        ramp = np.arange(shape[1])[:, None] + np.arange(shape[2]) + np.arange(shape[0])[:, None, None]
        return ramp * num_levels // (sum(shape) + 1)
    return np.full(shape, rng.integers(num_levels))


@given(
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(LEVELS),
    st.lists(st.tuples(SIZES, st.sampled_from(["noise", "extremes", "gradient", "one"])), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_images_of_any_sizes_come_back(channels, num_levels, images, seed):
    rng = np.random.default_rng(seed)
    arrays = [content(kind, (channels, *size), num_levels, rng) for size, kind in images]
    bits(arrays, num_levels)


@pytest.mark.parametrize("num_levels", LEVELS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_of_one_pixel_comes_back(channels, num_levels):
    for level in (0, num_levels // 2, num_levels - 1):
        bits([np.full((channels, 1, 1), level)], num_levels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_the_type_of_the_integers_does_not_matter(dtype):
    images = [np.random.default_rng(0).integers(0, 256, (3, 9, 7)).astype(dtype)]
    assert bits(images, 256) == bits([image.astype(np.int64) for image in images], 256)


def test_images_are_pushed_on_what_is_on_the_stack():
    rng = np.random.default_rng(1)
    stack = Stack(rng.integers(1, 2**32, 30, dtype=np.uint32))
    before, images = stack.words(), [rng.integers(0, 256, (3, 8, 8)) for _ in range(3)]
    push_plain(stack, images, 256)
    pop_plain(stack, [image.shape for image in images], 256)
    assert np.array_equal(stack.words(), before)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_constant_images_cost_nearly_nothing(num_levels):
    rng = np.random.default_rng(2)
    images = [content("one", (3, 24, 24), num_levels, rng) for _ in range(12)]
    last = bits(images, num_levels) - bits(images[:-1], num_levels)
    assert last < 0.05 * images[0].size
    assert bits(images, num_levels) < 0.25 * 12 * images[0].size


@pytest.mark.parametrize("num_levels", LEVELS)
def test_noise_costs_hardly_more_than_its_entropy(num_levels):
    images = list(np.random.default_rng(3).integers(0, num_levels, (2, 1, 40, 40)))
    values = sum(image.size for image in images)
    assert -40 < bits(images, num_levels) - values * math.log2(num_levels) < 0.25 * values + 40


@pytest.mark.parametrize("num_levels", [17, 256, 1000, 65536])
def test_smooth_images_cost_less_than_uniform_levels(num_levels):
    rng = np.random.default_rng(4)
    rows, columns = np.mgrid[:32, :32] / 32
    smooth = 0.4 + 0.3 * np.sin(3 * rows + 2 * columns + np.arange(3)[:, None, None]) + 0.1 * rows
    image = np.clip(smooth * num_levels + 0.5 * rng.normal(size=smooth.shape), 0, num_levels - 1).astype(np.int64)
    assert bits([image], num_levels) < (math.log2(num_levels) - 1) * image.size


def test_equal_channels_cost_little_more_than_one():
    rng = np.random.default_rng(5)
    one = rng.integers(0, 256, (1, 32, 32))
    images = [one, np.repeat(one, 3, axis=0)]
    three = bits([images[1]] * 4, 256) / bits([images[0]] * 4, 256)
    assert three < 3
