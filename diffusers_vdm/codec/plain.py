"""A plain lossless code that needs no bits on the stack: the first images of a file, or all of a small collection.

Each pixel is predicted from its neighbors by the median edge detector of JPEG-LS [Weinberger et al. 2000], and from
the error of the same pixel in the channel before. The errors are coded with their histogram so far: a geometric
distribution at first, and then the counts of the earlier images.
"""

from __future__ import annotations

import math

import numpy as np

from .stack import Stack

# of the geometric distribution; sqrt is exact by IEEE 754
_DECAYS = (2.0**-16, 2.0**-8, 2.0**-5, 2.0**-3, *(1 - math.sqrt(2.0**-k) for k in range(1, 17)))
_PRIOR_COUNT = 48.0  # its weight in counts of pixels
_COMPARED = 16  # images that choose the geometric distribution; later ones have counts
_MAX_SYMBOLS = 256  # of more levels, the lowest bits are coded as uniform


def push_plain(stack: Stack, images: list[np.ndarray], num_levels: int) -> None:
    """Pushes images, integers of shape `(C, h, w)` in [0, num_levels); they are popped in the same order."""
    errors = [_errors(image.astype(np.int64), num_levels) for image in images]
    shift = _shift(num_levels)
    high = [error.reshape(-1) >> shift for error in errors]
    best = min(range(len(_DECAYS)), key=lambda decay: _cost(high[:_COMPARED], num_levels, decay))
    histograms = _histograms(high, num_levels, best)
    for error, symbols, histogram in reversed(list(zip(errors, high, histograms, strict=True))):
        if shift:
            low = error.reshape(-1) & ((1 << shift) - 1)
            stack.push_uniform(low, np.full(len(low), 1 << shift))
        stack.push(symbols, histogram.astype(np.float32))
    stack.push_uniform(np.array([best]), np.array([len(_DECAYS)]))


def pop_plain(stack: Stack, shapes: list[tuple[int, int, int]], num_levels: int) -> list[np.ndarray]:
    """Pops what [`push_plain`] pushed, int64 arrays of these shapes."""
    decay = int(stack.pop_uniform(np.array([len(_DECAYS)]))[0])
    shift = _shift(num_levels)
    histogram, images = _prior(num_levels, decay), []
    for shape in shapes:
        count = int(np.prod(shape))
        symbols = stack.pop(histogram.astype(np.float32), count).astype(np.int64)
        histogram = histogram + np.bincount(symbols, minlength=len(histogram))
        errors = symbols << shift
        if shift:
            errors = errors | stack.pop_uniform(np.full(count, 1 << shift))
        images.append(_image(errors.reshape(shape), num_levels))
    return images


def _shift(num_levels: int) -> int:
    return max(0, (num_levels - 1).bit_length() - (_MAX_SYMBOLS - 1).bit_length())


def _prior(num_levels: int, decay: int) -> np.ndarray:
    """Counts before the first image, for errors modulo the number of levels."""
    shift = _shift(num_levels)
    size = ((num_levels - 1) >> shift) + 1
    powers = np.ones(size)
    for distance in range(1, size):  # not `**`, which is not equal on all machines
        powers[distance] = powers[distance - 1] * _DECAYS[decay]
    distance = np.minimum(np.arange(size), size - np.arange(size))
    weights = powers[distance] + 1e-4
    total = 0.0
    for weight in weights.tolist():
        total += weight
    return weights * (_PRIOR_COUNT / total)


def _histograms(symbols: list[np.ndarray], num_levels: int, decay: int) -> list[np.ndarray]:
    """The histogram with which each image is coded."""
    histogram, result = _prior(num_levels, decay), []
    for values in symbols:
        result.append(histogram)
        histogram = histogram + np.bincount(values, minlength=len(histogram))
    return result


def _cost(symbols: list[np.ndarray], num_levels: int, decay: int) -> float:
    histograms = _histograms(symbols, num_levels, decay)
    return sum(float(-np.log2(h[s] / h.sum()).sum()) for s, h in zip(symbols, histograms, strict=True))


def _errors(image: np.ndarray, num_levels: int) -> np.ndarray:
    """The errors of the prediction modulo the number of levels; `(C, h, w)`."""
    padded = np.pad(image, ((0, 0), (1, 0), (1, 0)))
    left, up, corner = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
    left, up, corner = left.copy(), up.copy(), corner.copy()
    up[:, 0], corner[:, 0] = left[:, 0], left[:, 0]  # the first row has only left neighbors
    left[:, :, 0], corner[:, :, 0] = up[:, :, 0], up[:, :, 0]
    median = np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
    own = image - median
    before = np.concatenate([np.zeros_like(own[:1]), own[:-1]])
    predicted = np.clip(median + before, 0, num_levels - 1)
    return (image - predicted) % num_levels


def _image(errors: np.ndarray, num_levels: int) -> np.ndarray:
    """The inverse of [`_errors`], pixel by pixel."""
    channels, height, width = errors.shape
    before = [[0] * width for _ in range(height)]
    planes = []
    for c in range(channels):
        rows: list[list[int]] = []
        own = []
        for i, line in enumerate(errors[c].tolist()):
            above = rows[i - 1] if i else None
            row: list[int] = []
            difference = []
            for j, error in enumerate(line):
                if above is None:
                    median = row[j - 1] if j else 0
                elif j == 0:
                    median = above[0]
                else:
                    left, up, corner = row[j - 1], above[j], above[j - 1]
                    low, high = (left, up) if left < up else (up, left)
                    median = min(max(left + up - corner, low), high)
                predicted = min(max(median + before[i][j], 0), num_levels - 1)
                value = (predicted + error) % num_levels
                row.append(value)
                difference.append(value - median)
            rows.append(row)
            own.append(difference)
        before = own
        planes.append(rows)
    return np.array(planes, dtype=np.int64).reshape(errors.shape)
