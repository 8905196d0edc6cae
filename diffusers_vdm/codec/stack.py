"""The message of a bits-back code: a stack of bits, on which symbols are pushed and from which they are popped.

Pushing a symbol of probability p adds −log₂ p bits. Popping with a probability distribution removes bits and returns a
symbol that is distributed like it, if the bits are random. Both are exact inverses of each other [Duda 2009,
asymmetric numeral systems; Townsend et al. 2019, bits back]. The coder is `AnsCoder` of constriction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import NotCodable, NotEnoughBits, codec_error
from .lattice import LatticeGaussians, chunks, split_mean

_MARGIN_BITS = 96  # a pop that leaves fewer bits has probably run out of them
_LENGTHS = 25  # an escaped offset has fewer than 25 bits


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError("the codec needs constriction: pip install 'diffusers-vdm[codec]'") from error
    return constriction


class Stack:
    """A stack of bits.

    Args:
        words (`np.ndarray` of uint32, *optional*): an earlier message, see [`Stack.words`].
        tables ([`LatticeGaussians`], *optional*): shared by the stacks of a file.
    """

    def __init__(self, words: np.ndarray | None = None, tables: LatticeGaussians | None = None):
        stream = _constriction().stream
        self._model = stream.model
        self._family = stream.model.Categorical(perfect=False)
        self._ans = stream.stack.AnsCoder() if words is None or not len(words) else stream.stack.AnsCoder(words)
        self._tables = tables or LatticeGaussians()
        self.measures = False
        self.information = np.zeros(0)  # bits of the last Gaussian symbols, if `measures`

    @property
    def bits(self) -> int:
        """Bits on the stack."""
        return int(self._ans.num_valid_bits())

    def words(self) -> np.ndarray:
        """The message as uint32 words; the last one is the top of the stack."""
        return np.asarray(self._ans.get_compressed(), dtype=np.uint32)

    def copy(self) -> Stack:
        """An independent stack with the same bits."""
        other = object.__new__(Stack)
        other.__dict__ = self.__dict__ | {"_ans": self._ans.clone()}
        return other

    def check_bits(self) -> None:
        """Raises [`NotEnoughBits`] if the last pop has used up the stack."""
        if self.bits < _MARGIN_BITS:
            raise NotEnoughBits

    # ---- categorical symbols -------------------------------------------------------------------------------------

    def push(self, symbols: np.ndarray, rows: np.ndarray) -> None:
        """Pushes N symbols with weights of shape `(N, K)`, or `(K,)` for all of them."""
        if len(symbols) == 0:
            return
        symbols = np.ascontiguousarray(symbols, dtype=np.int32)
        if rows.ndim == 1:
            self._ans.encode_reverse(symbols, self._model.Categorical(rows, perfect=False))
        else:
            self._ans.encode_reverse(symbols, self._family, np.ascontiguousarray(rows))

    def pop(self, rows: np.ndarray, count: int | None = None) -> np.ndarray:
        """Pops symbols with weights of shape `(N, K)`, or `count` of them with weights of shape `(K,)`."""
        if rows.ndim == 1:
            return self._ans.decode(self._model.Categorical(rows, perfect=False), count)
        if len(rows) == 0:
            return np.zeros(0, dtype=np.int32)
        return self._ans.decode(self._family, np.ascontiguousarray(rows))

    def push_uniform(self, symbols: np.ndarray, sizes: np.ndarray) -> None:
        """Pushes integers in [0, size), where each size is within [2, 2^24]."""
        if len(symbols):
            self._ans.encode_reverse(symbols.astype(np.int32), self._model.Uniform(), sizes.astype(np.int32))

    def pop_uniform(self, sizes: np.ndarray) -> np.ndarray:
        """Pops integers in [0, size)."""
        if len(sizes) == 0:
            return np.zeros(0, dtype=np.int64)
        return self._ans.decode(self._model.Uniform(), sizes.astype(np.int32)).astype(np.int64)

    # ---- Gaussians -----------------------------------------------------------------------------------------------

    def push_gaussian(
        self, values: np.ndarray, means: np.ndarray, classes: np.ndarray | int, escapes: bool = True
    ) -> None:
        """Pushes integers of shape `(N,)` under Gaussians, see [`LatticeGaussians`].

        Args:
            values (`np.ndarray` of int64): the integers.
            means (`np.ndarray` of int64): in units of 1/PHASES.
            classes (`np.ndarray` of int64, or `int`): of the standard deviations.
            escapes (`bool`, defaults to `True`): allow integers outside of the tables. Without them it is the inverse
                of drawing latents by [`pop_gaussian`], and such an integer is the sign of a damaged file.

        Raises: [`NotCodable`] for an integer that is 2^24 or more from its mean; [`CodecError`] without `escapes`.
        """
        center, phase = split_mean(means)
        offset = values - center
        self._start(len(values))
        for radius, group in reversed(self._tables.groups(classes, len(values))):
            within, phases, classes_here = offset[group], phase[group], _part(classes, group)
            escaped = np.abs(within) > radius
            if escaped.any():
                if not escapes:
                    raise codec_error("a latent is outside of its table")
                self._push_escaped(within[escaped])
            symbols = np.where(escaped, 2 * radius + 1, within + radius)
            for part in reversed(chunks(len(symbols), 2 * radius + 2)):
                rows = self._tables.rows(radius, _part(classes_here, part), phases[part])
                self.push(symbols[part], rows if escapes else rows[:, :-1])
                self._measure(group, part, symbols, rows)
            self._measure_escaped(group, escaped, within)

    def pop_gaussian(self, means: np.ndarray, classes: np.ndarray | int, escapes: bool = True) -> np.ndarray:
        """Pops integers under Gaussians; without `escapes`, only those within the tables, for drawing latents."""
        center, phase = split_mean(means)
        values = np.empty(len(means), dtype=np.int64)
        self._start(len(values))
        for radius, group in self._tables.groups(classes, len(values)):
            phases, classes_here = phase[group], _part(classes, group)
            symbols = np.empty(len(phases), dtype=np.int64)
            for part in chunks(len(symbols), 2 * radius + 2):
                rows = self._tables.rows(radius, _part(classes_here, part), phases[part])
                symbols[part] = self.pop(rows if escapes else rows[:, :-1])
                self._measure(group, part, symbols, rows)
            offset = symbols - radius
            escaped = symbols == 2 * radius + 1
            if escaped.any():
                offset[escaped] = self._pop_escaped(int(escaped.sum()))
            self._measure_escaped(group, escaped, offset)
            values[group] = center[group] + offset
        return values

    def _push_escaped(self, offsets: np.ndarray) -> None:
        """Pushes offsets of any size: the sign and the number of bits, and the bits (Elias γ)."""
        size = np.abs(offsets)
        if size.max() >= 1 << (_LENGTHS - 1):
            raise NotCodable
        length = np.floor(np.log2(size.astype(np.float64))).astype(np.int64)  # exact: sizes are below 2^24
        bits = np.int64(1) << length
        self.push_uniform((size - bits)[length > 0], bits[length > 0])
        self.push_uniform(2 * length + (offsets < 0), np.full(len(offsets), 2 * _LENGTHS))

    def _pop_escaped(self, count: int) -> np.ndarray:
        drawn = self.pop_uniform(np.full(count, 2 * _LENGTHS))
        length, negative = drawn >> 1, drawn & 1
        if length.max() >= _LENGTHS - 1:
            raise codec_error("an impossible latent")
        bits = np.int64(1) << length
        rest = np.zeros(count, dtype=np.int64)
        rest[length > 0] = self.pop_uniform(bits[length > 0])
        return np.where(negative == 1, -(bits + rest), bits + rest)

    # ---- measurements --------------------------------------------------------------------------------------------

    def _start(self, count: int) -> None:
        if self.measures:
            self.information = np.zeros(count)

    def _measure(self, group, part: slice, symbols: np.ndarray, rows: np.ndarray) -> None:
        if not self.measures:
            return
        positions = np.arange(len(self.information))[group][part]
        self.information[positions] = bits_of(rows, symbols[part])

    def _measure_escaped(self, group, escaped: np.ndarray, offsets: np.ndarray) -> None:
        if self.measures and escaped.any():
            positions = np.arange(len(self.information))[group][escaped]
            self.information[positions] += np.log2(2 * _LENGTHS) + np.floor(np.log2(np.abs(offsets[escaped])))


def bits_of(rows: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """−log₂ of the probabilities of symbols, given weights of shape `(N, K)`."""
    chosen = rows[np.arange(len(rows)), symbols].astype(np.float64)
    return -np.log2(np.maximum(chosen / rows.sum(1, dtype=np.float64), 2.0**-24))


def _part(classes: np.ndarray | int, part: np.ndarray | slice) -> np.ndarray | int:
    return classes if isinstance(classes, int) else classes[part]
