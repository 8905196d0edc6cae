"""Gaussians on a lattice: the probabilities of integers around a mean, equal on every machine.

The probability of the integer i is exp(−½ ((i − mean)/std)²), normalized. Such a discrete Gaussian has the mean, the
variance and the entropy of the continuous one up to about 2 exp(−2π² std²), which is 5e-9 for std = 1 (Poisson
summation). A Gaussian whose density is integrated over bins has the variance std² + 1/12 instead. So a lattice whose
spacing is a whole standard deviation costs nothing here, and latents need few bits.

An encoder and a decoder need equal probabilities. Therefore means and standard deviations are integers, and the
probabilities come from additions, multiplications and divisions only, which IEEE 754 defines to the bit. `exp` of a
math library differs between machines.
"""

from __future__ import annotations

import math

import numpy as np

PHASES = 128  # a mean is an integer in units of 1/PHASES
STD_STEPS = 128  # a standard deviation is 2^(class/STD_STEPS)
MIN_CLASS, MAX_CLASS = -4 * STD_STEPS, 16 * STD_STEPS
_REACH = 6.0  # standard deviations on each side that a table covers
_ESCAPE = 2.0**-22  # probability of an integer beyond them
_WIDTHS = (4, 6, 8, 10, 12, 16)  # radii of tables, so that few widths occur; beyond the last by factors of 5/4
_VALUES_AT_ONCE = 1 << 22  # of tables in memory
_LOG_2 = 0.6931471805599453
_LOG_2_HIGH, _LOG_2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the first times n ≤ 2^20 is exact


def portable_exp(y: np.ndarray) -> np.ndarray:
    """e^{−y} for y ≥ 0, and e^{−700} beyond 700, by operations that are equal on all machines. Shape of `y`.

    The relative error is below 1e-15.
    """
    y = np.minimum(np.asarray(y, dtype=np.float64), 700.0)
    n = np.floor(y * (1 / _LOG_2))
    r = (y - n * _LOG_2_HIGH) - n * _LOG_2_LOW
    total = np.ones_like(r)
    for k in range(20, 0, -1):  # Taylor, by Horner's rule
        total = 1 - r * total / k
    return np.ldexp(total, -n.astype(np.int64))


def std_of_class(index: int) -> float:
    """2^(index/STD_STEPS)."""
    octave, rest = divmod(index, STD_STEPS)
    mantissa = 2 * float(portable_exp(np.array((STD_STEPS - rest) / STD_STEPS * _LOG_2))) if rest else 1.0
    return math.ldexp(mantissa, octave)


def class_of_std(std: np.ndarray) -> np.ndarray:
    """The real number whose rounding is the class of a standard deviation, clipped to the range of classes."""
    return np.clip(np.log2(std) * STD_STEPS, MIN_CLASS, MAX_CLASS)


def split_mean(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest integer of means in units of 1/PHASES, and the remaining phase in [0, PHASES)."""
    shifted = mean + PHASES // 2
    center = shifted // PHASES
    return center, shifted - center * PHASES


def _radius(std: float) -> int:
    """Integers on each side of the mean in a table."""
    least = math.ceil(_REACH * std) + 1
    for width in _WIDTHS:
        if least <= width:
            return width
    radius = _WIDTHS[-1]
    while radius < least:
        radius = radius * 5 // 4
    return radius


class LatticeGaussians:
    """Tables of probabilities by class and phase, computed when they are first used.

    The columns of a table are the integers from −radius to radius around the nearest integer of the mean, followed by
    the escape, which stands for all others.
    """

    def __init__(self):
        self._radius = np.zeros(MAX_CLASS - MIN_CLASS + 1, dtype=np.int64)  # by class; 0 if not yet computed
        self._row = np.zeros(MAX_CLASS - MIN_CLASS + 1, dtype=np.int64)  # of a class in the bank of its radius
        self._bank: dict[int, np.ndarray] = {}  # radius → (classes, PHASES, 2 radius + 2)

    def groups(self, classes: np.ndarray | int, count: int) -> list[tuple[int, np.ndarray | slice]]:
        """The radii of `count` symbols and the symbols of each, in the order in which they are coded."""
        if isinstance(classes, int):
            self._prepare([classes])
            return [(int(self._radius[classes - MIN_CLASS]), slice(0, count))]
        present = np.flatnonzero(np.bincount(classes - MIN_CLASS)) + MIN_CLASS
        self._prepare(present.tolist())
        distinct = np.unique(self._radius[present - MIN_CLASS]).tolist()
        if len(distinct) == 1:
            return [(distinct[0], slice(0, count))]
        radii = self._radius[classes - MIN_CLASS]
        return [(radius, np.flatnonzero(radii == radius)) for radius in distinct]

    def rows(self, radius: int, classes: np.ndarray | int, phases: np.ndarray) -> np.ndarray:
        """The tables of symbols of one radius, float32 of shape `(N, 2 radius + 2)`, not normalized."""
        return self._bank[radius][self._row[classes - MIN_CLASS], phases]

    def _prepare(self, classes: list[int]) -> None:
        new: dict[int, list[np.ndarray]] = {}
        for index in classes:
            if self._radius[index - MIN_CLASS]:
                continue
            std = std_of_class(index)
            radius = _radius(std)
            self._radius[index - MIN_CLASS] = radius
            self._row[index - MIN_CLASS] = len(self._bank.get(radius, ())) + len(new.get(radius, ()))
            new.setdefault(radius, []).append(_table(std, radius))
        for radius, tables in new.items():
            old = [self._bank[radius]] if radius in self._bank else []
            self._bank[radius] = np.concatenate([*old, np.stack(tables)])


def _table(std: float, radius: int) -> np.ndarray:
    """The rows of all phases for a standard deviation."""
    offsets = np.arange(-radius, radius + 1, dtype=np.float64)
    fractions = (np.arange(PHASES, dtype=np.float64) - PHASES // 2) / PHASES
    distance = (offsets - fractions[:, None]) / std
    exponent = 0.5 * (distance * distance)
    # the nearest integer has weight 1, so that the escape is rare even if all are many small standard deviations away
    weights = portable_exp(exponent - exponent.min(axis=1, keepdims=True))
    escape = np.full((PHASES, 1), _ESCAPE * 2.5066282746310002 * std)  # √(2π) std is about the sum of the weights
    return np.concatenate([weights, escape], axis=1).astype(np.float32)


def chunks(count: int, columns: int) -> list[slice]:
    """Slices of symbols whose tables of so many columns are in memory at the same time."""
    size = max(1, _VALUES_AT_ONCE // columns)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
