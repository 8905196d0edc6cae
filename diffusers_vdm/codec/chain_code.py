"""Bits-back coding of a batch of images along the forward chain, in the order of Bit-Swap.

    encode: pop z_0 ~ q(z_0|x), push x by p(x|z_0); for each level: pop z_{k+1} ~ q(z_{k+1}|z_k), push z_k by
            p(z_k|z_{k+1}); push z_T by the prior
    decode: the inverse of each operation, in the opposite order

Every push of a latent gives back the bits that its pop took, up to the terms of the bound. An image therefore needs
the bits of about two latents on the stack, not of T [Kingma et al. 2019, Bit-Swap, arXiv 1905.06845].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import diffusion
from .errors import NotCodable, codec_error
from .levels import Levels, decoder_rows
from .network import Steps
from .rounding import Rounding
from .stack import Stack, bits_of

_LARGEST = 1 << 30  # |i_k| of any latent; a larger one is the sign of a damaged file


@dataclass
class Accounts:
    """Where the bits of a batch went.

    Attributes:
        decoder (`float`): bits of the pixels given z_0.
        bound (`np.ndarray` of shape `(B,)`): when encoding, the bound of each image at its latents.
        low (`int`): when encoding, the fewest bits that were on the stack.
        images (`np.ndarray` of shape `(B,)`): when decoding with `measures`, the bits of each image.
        steps (`list`): when decoding with `measures`, x̂ and the classes of each step, from step T − 1 on.
    """

    bound: np.ndarray
    low: int = 0
    decoder: float = 0.0
    images: np.ndarray = field(default_factory=lambda: np.zeros(0))
    steps: list[tuple[np.ndarray, np.ndarray | int]] = field(default_factory=list)


class ChainCode:
    """Encodes and decodes batches with the same levels and network.

    Args:
        levels ([`Levels`]): the lattices.
        steps ([`Steps`]): the network.
        num_levels (`int`): levels of the pixels.
        rounding ([`Rounding`]): records or takes the sides of the means.
    """

    def __init__(self, levels: Levels, steps: Steps, num_levels: int, rounding: Rounding):
        self.levels, self.steps, self.num_levels, self.rounding = levels, steps, num_levels, rounding
        self.num_steps = len(levels.ratio)

    # ---- one batch -----------------------------------------------------------------------------------------------

    def encode(
        self,
        stack: Stack,
        items: np.ndarray,
        real: np.ndarray,
        start: int,
        tick: Callable[[int], object],
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> Accounts:
        """Pushes a batch of images.

        Args:
            stack ([`Stack`]): must have the bits of about two latents for each image.
            items (`np.ndarray` of shape `(B, D)`): integers in [0, num_levels).
            real (`np.ndarray` of bool, `(B, D)`): which of them are coded; the others follow from these.
            start (`int`): position of the first rounded value, see [`Rounding`].
            tick (`Callable`): called with the number of images after each network call.
            conditions (`Mapping[str, torch.Tensor]`, *optional*): those of the B images, see `Steps.rows`.

        Returns: [`Accounts`].
        Raises: [`NotEnoughBits`] if the stack is too small, [`NotCodable`] for latents that are too far from their
            means. The stack is then spoilt.
        """
        levels, size = self.levels, items.size
        x = diffusion.x_from_levels(torch.from_numpy(items), self.num_levels, torch.float64)
        x = x.reshape(len(items), *self.steps.shape)
        low = stack.bits
        z = stack.pop_gaussian(levels.mean_of_z_0(items.reshape(-1)), int(levels.drawn_class[0]), escapes=False)
        stack.check_bits()
        low = min(low, stack.bits)
        bound = self._push_pixels(stack, items, real, z)
        for k in range(self.num_steps):
            upper = stack.pop_gaussian(levels.mean_of_next(k, z), int(levels.drawn_class[k + 1]), escapes=False)
            stack.check_bits()
            low = min(low, stack.bits)
            if np.abs(upper).max() > _LARGEST:
                raise NotCodable
            means, classes, terms, _ = self._step(k, upper.reshape(items.shape), start, x, conditions)
            stack.push_gaussian(z, means, classes)
            bound += terms
            z = upper
            tick(len(items))
        stack.push_gaussian(z, np.zeros(size, dtype=np.int64), levels.prior_class)
        gamma_1 = self.steps.chain.gammas[-1]
        bound += diffusion.prior_kl_nats(x, gamma_1).flatten(1).sum(1).numpy() / math.log(2)
        return Accounts(bound, low)

    def decode(
        self,
        stack: Stack,
        real: np.ndarray,
        fill: Callable[[np.ndarray], np.ndarray],
        start: int,
        tick: Callable[[int], object],
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[np.ndarray, Accounts]:
        """Pops a batch: the inverse of [`ChainCode.encode`].

        Args:
            stack, real, start, tick, conditions: as there.
            fill (`Callable`): fills in the items what is not coded, `(B, D)` to `(B, D)`.

        Returns: the items, int64 of shape `(B, D)`, and [`Accounts`] without a bound.
        """
        levels, size = self.levels, real.size
        accounts = Accounts(np.zeros(0), images=np.zeros(len(real)))

        def count(sign: int) -> None:
            if stack.measures:
                accounts.images += sign * stack.information.reshape(len(real), -1).sum(1)

        z = stack.pop_gaussian(np.zeros(size, dtype=np.int64), levels.prior_class)
        count(1)
        for k in range(self.num_steps - 1, -1, -1):
            if np.abs(z).max() > _LARGEST:
                raise codec_error("an impossible latent")
            means, classes, _, x_hat = self._step(k, z.reshape(real.shape), start, None, conditions)
            lower = stack.pop_gaussian(means, classes)
            count(1)
            if np.abs(lower).max() > _LARGEST:
                raise codec_error("an impossible latent")
            stack.push_gaussian(z, levels.mean_of_next(k, lower), int(levels.drawn_class[k + 1]), escapes=False)
            count(-1)
            z = lower
            if stack.measures and x_hat is not None:
                accounts.steps.append((x_hat, classes))
            tick(len(real))
        pixel_bits = np.zeros(len(real))
        items = fill(self._pop_pixels(stack, real, z, pixel_bits))
        accounts.images, accounts.decoder = accounts.images + pixel_bits, float(pixel_bits.sum())
        stack.push_gaussian(z, levels.mean_of_z_0(items.reshape(-1)), int(levels.drawn_class[0]), escapes=False)
        count(-1)
        return items, accounts

    def positions(self, count: int) -> int:
        """How many positions of [`Rounding`] a batch of `count` images takes."""
        return 2 * count * math.prod(self.steps.shape) * self.num_steps

    # ---- one step ------------------------------------------------------------------------------------------------

    def _step(
        self,
        k: int,
        z: np.ndarray,
        start: int,
        x: torch.Tensor | None,
        conditions: Mapping[str, torch.Tensor] | None,
    ):
        means, classes, terms, x_hat = self.steps(k, z, x, conditions)
        at = start + 2 * k * z.size
        rounded = self.rounding(means, at)
        fixed = self.levels.step_class[k]
        if classes is not None:
            chosen = self.rounding(classes, at + z.size)
        elif fixed is not None and len(fixed) > 1:
            chosen = np.tile(fixed, len(z))
        else:
            chosen = int(fixed[0]) if fixed is not None else 0
        return rounded, chosen, terms, x_hat

    # ---- pixels --------------------------------------------------------------------------------------------------

    def _push_pixels(self, stack: Stack, items: np.ndarray, real: np.ndarray, z_0: np.ndarray) -> np.ndarray:
        """Pushes the coded pixels, and returns their bits for each image."""
        coded = np.flatnonzero(real)
        rows, first, escapes = self._pixel_rows(z_0[coded])
        pixels, escape = items.reshape(-1)[coded], rows.shape[1] - 1
        symbols = pixels - first
        outside = (symbols < 0) | (symbols >= escape) if escapes else np.zeros(len(pixels), dtype=bool)
        stack.push_uniform(pixels[outside], np.full(int(outside.sum()), self.num_levels))
        symbols = np.where(outside, escape, symbols)
        stack.push(symbols, rows)
        bits = bits_of(rows, symbols) + outside * math.log2(self.num_levels)
        return np.bincount(coded // items.shape[1], bits, minlength=len(items))

    def _pop_pixels(self, stack: Stack, real: np.ndarray, z_0: np.ndarray, per_image: np.ndarray) -> np.ndarray:
        """Pops the coded pixels; the others are 0. Their bits are added to `per_image`, if the stack measures."""
        coded = np.flatnonzero(real)
        rows, first, escapes = self._pixel_rows(z_0[coded])
        symbols = stack.pop(rows).astype(np.int64)
        pixels = symbols + first
        outside = symbols == rows.shape[1] - 1 if escapes else np.zeros(len(pixels), dtype=bool)
        pixels[outside] = stack.pop_uniform(np.full(int(outside.sum()), self.num_levels))
        items = np.zeros(real.size, dtype=np.int64)
        items[coded] = pixels
        if stack.measures:
            bits = bits_of(rows, symbols) + outside * math.log2(self.num_levels)
            per_image += np.bincount(coded // real.shape[1], bits, minlength=len(real))
        return items.reshape(real.shape)

    def _pixel_rows(self, z_0: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        return decoder_rows(self.levels.decoder_center(z_0), self.levels.decoder_precision, self.num_levels)
