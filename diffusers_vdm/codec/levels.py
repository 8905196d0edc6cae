"""The lattices of a chain: spacings, means and standard deviations as integers, equal on every machine.

z_k = i_k δ_k with an integer i_k. The spacing δ_k is at most the smaller one of the standard deviations of the two
Gaussians over z_k: q(z_k | z_{k−1}) from below, and p(z_k | z_{k+1}) from above. See lattice.py for why it may be as
large.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from .. import diffusion
from ..evaluation.chain import Chain, log_variance
from .lattice import MAX_CLASS, MIN_CLASS, PHASES, STD_STEPS, class_of_std, portable_exp, std_of_class
from .rounding import Rounding

_SHIFT = 20  # ratios are integers in units of 2^−20
_MANTISSA_BITS = 24
# These values are computed without the network; their errors are below 1e-6. Classes are many, and errors below 1e-10.
_TOLERANCE, _CLASS_TOLERANCE = 1e-4, 1e-7
_MAX_RATIO = 2.0**40


@dataclass(frozen=True)
class Levels:
    """The numbers of a chain of T + 1 latents z_0 … z_T that the coder uses.

    Attributes:
        spacing (`np.ndarray` of shape `(T + 1,)`): δ_k, float64.
        ratio (`np.ndarray` of shape `(T,)`): the mean of z_{k+1} given z_k, in units of δ_{k+1}/PHASES, is
            `ratio[k] * i_k` in units of 2^−20.
        drawn_class (`np.ndarray` of shape `(T + 1,)`): class of the standard deviation of q(z_0 | x) and
            q(z_{k+1} | z_k).
        step_class (`list`): for each step, the classes of p(z_k | z_{k+1}): `(1,)`, or `(D,)` if pixels differ; `None`
            if the network predicts them.
        data_scale, data_offset (`int`): the mean of z_0 given pixel k is `data_scale * k + data_offset`, as `ratio`.
        decoder_scale, decoder_offset (`int`): the center of p(x | z_0) in units of 2^−20 pixel levels, from i_0.
        decoder_precision (`float`): 1/(2 std²) of p(x | z_0) in pixel levels, with 24 bits.
        prior_class (`int`): class of the prior's standard deviation of z_T.
    """

    spacing: np.ndarray
    ratio: np.ndarray
    drawn_class: np.ndarray
    step_class: list[np.ndarray | None]
    data_scale: int
    data_offset: int
    decoder_scale: int
    decoder_offset: int
    decoder_precision: float
    prior_class: int

    @classmethod
    def of(cls, chain: Chain, shape: tuple[int, ...], spacing: float, rounding: Rounding) -> Levels:
        """The lattices of a chain for images of `shape`.

        Args:
            chain ([`Chain`]): in the convention `"vdm"`.
            shape (`tuple[int, ...]`): C, H, W.
            spacing (`float`): the largest spacing, in standard deviations.
            rounding ([`Rounding`]): records or takes the sides of these values, at positions from 0.
        """
        start = 0

        def rounded(values: np.ndarray, tolerance: float = _TOLERANCE) -> np.ndarray:
            nonlocal start
            result = rounding(values, start, tolerance)
            start += len(values)
            return result

        def mantissas(values: np.ndarray) -> np.ndarray:
            _, exponents = np.frexp(values)  # a value next to a power of two could have two exponents
            exponents = exponents + (values > np.ldexp(1 - 2.0**-20, exponents))
            return np.ldexp(
                rounded(np.ldexp(values, _MANTISSA_BITS - exponents)).astype(float), exponents - _MANTISSA_BITS
            )

        gammas = torch.cat([chain.gamma_0.reshape(1).double(), chain.gammas.double()]).cpu()
        steps = len(gammas) - 1
        alpha, sigma = diffusion.alpha(gammas).numpy(), diffusion.sigma(gammas).numpy()
        forward = np.exp(0.5 * diffusion.forward_log_variance(gammas[:-1], gammas[1:]).numpy())
        drawn = np.concatenate([sigma[:1], forward])
        reverse = np.exp(0.5 * diffusion.posterior_log_variance(gammas[:-1], gammas[1:]).numpy())
        smaller = np.minimum(drawn, np.concatenate([reverse, [1.0]]))
        # drawn / δ is exactly a class, because an error of its variance would add up along the chain
        # rounded up; 0.49 and not 0.5, because the logarithm is often exactly 0
        classes = rounded(np.log2(drawn / (spacing * smaller)) * STD_STEPS + 0.49)
        classes = classes.clip(MIN_CLASS, MAX_CLASS)
        delta = mantissas(drawn / np.array([std_of_class(int(c)) for c in classes]))
        one = PHASES * 2.0**_SHIFT
        ratio = rounded(one * (alpha[1:] / alpha[:-1]) * (delta[:-1] / delta[1:]))
        step_class: list[np.ndarray | None] = []
        count = math.prod(shape)
        for k in range(steps):
            if chain.variance_type.startswith("learned"):
                step_class.append(None)
                continue
            log = log_variance(chain, k, None, torch.zeros(1, *shape, dtype=torch.float64)).cpu().double().flatten()
            log = log[:1] if bool((log == log[0]).all()) else log
            std = np.exp(0.5 * log.numpy()) / delta[k]
            step_class.append(rounded(class_of_std(std), _CLASS_TOLERANCE if len(std) == count else _TOLERANCE))
        width = 2 / chain.num_levels  # distance of pixel levels in x
        x_0 = width / 2 - 1
        data = rounded(np.array([one * alpha[0] * width / delta[0], one * alpha[0] * x_0 / delta[0]]))
        to_pixels = delta[0] / alpha[0] / width
        decoder = rounded(2.0**_SHIFT * np.array([to_pixels, -x_0 / width]))
        std_x = sigma[0] / alpha[0] / width
        precision = mantissas(np.array([0.5 / std_x**2]))
        prior = rounded(class_of_std(1 / delta[-1:]))
        if max(np.abs(ratio).max(), np.abs(data).max(), np.abs(decoder).max()) > _MAX_RATIO:
            raise ValueError(f"the levels of the chain must be closer to each other than from gamma {gammas[0]:.3g}.")
        return cls(
            spacing=delta,
            ratio=ratio,
            drawn_class=classes,
            step_class=step_class,
            data_scale=int(data[0]),
            data_offset=int(data[1]),
            decoder_scale=int(decoder[0]),
            decoder_offset=int(decoder[1]),
            decoder_precision=float(precision[0]),
            prior_class=int(prior[0]),
        )

    def fingerprint(self) -> bytes:
        """Four bytes that differ between different levels, spacings or variances."""
        digest = hashlib.blake2b(digest_size=4)
        for values in (self.spacing, self.ratio, self.drawn_class, *(c for c in self.step_class if c is not None)):
            digest.update(np.ascontiguousarray(values).tobytes())
        rest = (self.data_scale, self.data_offset, self.decoder_scale, self.decoder_offset, self.decoder_precision)
        digest.update(repr((*rest, self.prior_class)).encode())
        return digest.digest()

    # ---- means in units of 1/PHASES ------------------------------------------------------------------------------

    def mean_of_z_0(self, pixels: np.ndarray) -> np.ndarray:
        """Of q(z_0 | x), from integers."""
        return self._scaled(self.data_scale, pixels, self.data_offset)

    def mean_of_next(self, k: int, z: np.ndarray) -> np.ndarray:
        """Of q(z_{k+1} | z_k)."""
        return self._scaled(int(self.ratio[k]), z, 0)

    def decoder_center(self, z_0: np.ndarray) -> np.ndarray:
        """The center of p(x | z_0) in units of 2^−20 pixel levels."""
        return self.decoder_scale * z_0 + self.decoder_offset

    def _scaled(self, scale: int, values: np.ndarray, offset: int) -> np.ndarray:
        return (scale * values + offset + (1 << (_SHIFT - 1))) >> _SHIFT


def decoder_rows(center: np.ndarray, precision: float, num_levels: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Weights of p(x | z_0) over a window of pixel levels, float32 `(N, K)`, and the first level of each window.

    p(x = k | z_0) ∝ exp(−½ ((k − center)/std)²) over all levels; a level outside of the window has a weight below
    e^{−36} of the largest one. The third value is whether the last column is an escape for those.
    """
    radius = math.ceil(math.sqrt(36 / precision)) + 1
    size = 2 * radius + 1
    position = center.astype(np.float64) / 2.0**_SHIFT
    nearest = np.clip(np.floor(position + 0.5), 0, num_levels - 1)
    if size >= num_levels:
        first, size = np.zeros(len(center), dtype=np.int64), num_levels
    else:
        first = np.clip(nearest.astype(np.int64) - radius, 0, num_levels - size)
    levels = first[:, None] + np.arange(size)
    # the exponent relative to that of the nearest level, which is at most 0
    ahead, shift = nearest - position, levels - nearest[:, None]
    exponent = precision * shift * (shift + 2 * ahead[:, None])
    weights = portable_exp(np.maximum(exponent, 0)).astype(np.float32)
    escapes = size < num_levels
    if escapes:
        weights = np.concatenate([weights, np.full((len(weights), 1), 2.0**-20, dtype=np.float32)], axis=1)
    return weights, first, escapes
