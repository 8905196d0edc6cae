"""Rounding of real numbers that another machine computes slightly differently.

An encoder and a decoder compute the same means with differences of about 1e-12, and a single value that is rounded to
the other side breaks everything after it. The encoder therefore records on which side it rounded each value that is
within a tolerance of an edge. These are few, and the file contains them. The decoder rounds the others itself.
"""

from __future__ import annotations

import numpy as np

from .errors import CodecError, codec_error
from .integers import read_varint, write_varint

_LIMIT = 2.0**52
_RELATIVE = 2.0**-20  # larger values have larger errors
_FARTHEST = 0.25  # from an edge, that a side is recorded; the next edge must be clearly farther


class Rounding:
    """Rounds to integers; an encoder records sides, and a decoder takes recorded ones.

    Args:
        tolerance (`float`): distance from an edge, k + ½, below which a value's side is recorded; 0 records none.
        sides (`dict[int, int]`, *optional*): the recorded sides, for a decoder: 0 for k and 1 for k + 1, by position.

    Attributes:
        largest_shift (`float`): in a decoder, how far at least one recorded value was on the other side of its edge.
    """

    def __init__(self, tolerance: float, sides: dict[int, int] | None = None):
        self.tolerance = tolerance
        self.decodes = sides is not None
        self.sides: dict[int, int] = {} if sides is None else sides
        self._positions = np.array(sorted(self.sides), dtype=np.int64)
        self.largest_shift = 0.0

    def __call__(self, values: np.ndarray, start: int, tolerance: float | None = None) -> np.ndarray:
        """The nearest integers of float64 values of shape `(N,)` at the positions from `start`, int64.

        Raises: [`CodecError`] for values that are not finite or too large, and for a decoder whose values are near
            edges that the encoder was not near.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        low = np.floor(values)
        if not bool((np.abs(low) < _LIMIT).all()):  # false for NaN as well
            if self.decodes:
                raise codec_error("the network returned NaN or infinity")
            raise CodecError("the images cannot be coded: the network returned NaN or infinity.")
        distance = values - low - 0.5  # exact; the edge is at 0
        rounded = low.astype(np.int64) + (distance >= 0)
        if self.tolerance == 0:
            return rounded
        reach = np.minimum(tolerance * np.maximum(1, np.abs(values) * _RELATIVE), _FARTHEST)
        near = np.abs(distance) < (0.5 * reach if self.decodes else reach)
        if not self.decodes:
            for i in np.flatnonzero(near).tolist():
                self.sides[start + i] = int(distance[i] >= 0)
            return rounded
        first, last = np.searchsorted(self._positions, [start, start + len(values)])
        known = self._positions[first:last] - start
        for i in known.tolist():
            side = self.sides[start + i]
            if side != int(distance[i] >= 0):
                self.largest_shift = max(self.largest_shift, abs(float(distance[i])))
            rounded[i] = int(low[i]) + side
        near[known] = False
        if near.any():
            raise CodecError(
                "this machine computes other numbers than the one that wrote the file, by more than the tolerance of "
                f"{tolerance:g}, or the file is damaged: a value is {float(np.abs(distance[near]).min()):.1e} from an "
                "edge."
            )
        return rounded

    def forget(self, start: int) -> None:
        """Removes the recorded sides from a position on."""
        self.sides = {position: side for position, side in self.sides.items() if position < start}

    def to_bytes(self) -> bytes:
        """The recorded sides: their number, and the distances between positions with the sides as lowest bits."""
        content, last = bytearray(), 0
        write_varint(content, len(self.sides))
        for position in sorted(self.sides):
            write_varint(content, (position - last) << 1 | self.sides[position])
            last = position
        return bytes(content)

    @staticmethod
    def sides_from(content: bytes, at: int) -> tuple[dict[int, int], int]:
        """What [`Rounding.to_bytes`] wrote at an offset, and the offset behind it."""
        count, at = read_varint(content, at, most=len(content))
        sides, position = {}, 0
        for _ in range(count):
            value, at = read_varint(content, at, most=1 << 62)
            position += value >> 1
            sides[position] = value & 1
        return sides, at
