"""The best variance of an ancestral step, from a table of the network's mean squared error over γ.

The mean of p(z_s | z_t) is that of q(z_s | z_t, x̂). Around it, z_s varies by more than the variance σ_Q² of q, because
x̂ is uncertain. The variance with the smallest bound is σ_Q² (1 + m), m = expm1(γ_t − γ_s) mse_ε(γ_t), with
mse_ε(γ) = E(ε − ε̂)² [Bao et al. 2022, Analytic-DPM, arXiv 2201.06503, theorem 1]. A [`Calibration`] holds mse_ε(γ) of
each level, channel or pixel, measured on training images by [`calibrate`]. A scheduler keeps it in its config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from . import diffusion
from .json_values import count, items, mapping, number, text, typed_values

Variance = Literal["posterior", "optimal"]
Detail = Literal["level", "channel", "pixel"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """mse_ε(γ) = E(ε − ε̂)² of a network as a table over γ, and where it comes from.

    Attributes:
        gammas (`torch.Tensor` of shape `(K,)`): increasing levels, float64.
        mse (`torch.Tensor` of shape `(K,)`, `(K, C, 1, 1)` or `(K, C, H, W)`): errors at these levels, float64; of
            each level, each channel or each pixel.
        num_images, num_draws (`int`): images of the measurement, and draws of ε for each at every level.
        data (`str`, *optional*), data_fingerprint (`str`, *optional*): name and hash of the images.
        weights_fingerprint (`str`, *optional*): hash of the weights.
        clip_sample (`bool`): whether x̂ was clamped.
        seed (`int`): key of the noise.
        image_digests (`tuple[str]`): a hash of each image, so that none of them is evaluated unnoticed.
    """

    gammas: torch.Tensor
    mse: torch.Tensor
    num_images: int
    num_draws: int = 1
    data: str | None = None
    data_fingerprint: str | None = None
    weights_fingerprint: str | None = None
    clip_sample: bool = False
    seed: int = 0
    image_digests: tuple[str, ...] = ()

    def __post_init__(self):
        gammas = torch.as_tensor(self.gammas, dtype=torch.float64).cpu()
        mse = torch.as_tensor(self.mse, dtype=torch.float64).cpu()
        if gammas.ndim != 1 or len(gammas) < 2 or not bool(gammas.isfinite().all() & (gammas.diff() > 0).all()):
            raise ValueError(
                f"gammas must be at least two finite increasing numbers, got shape {tuple(gammas.shape)}."
            )
        if mse.ndim not in (1, 4) or len(mse) != len(gammas) or not bool(mse.isfinite().all() & (mse >= 0).all()):
            raise ValueError(
                f"mse must hold finite numbers of at least 0, of shape ({len(gammas)},), ({len(gammas)}, C, 1, 1) or "
                f"({len(gammas)}, C, H, W), got shape {tuple(mse.shape)}."
            )
        object.__setattr__(self, "gammas", gammas)
        object.__setattr__(self, "mse", mse)

    @property
    def detail(self) -> Detail:
        """Of what the table has an error: `"level"`, `"channel"` or `"pixel"`."""
        if self.mse.ndim == 1:
            return "level"
        return "channel" if self.mse.shape[2:] == (1, 1) else "pixel"

    def mse_at(self, gamma: torch.Tensor | float) -> torch.Tensor:
        """mse_ε at γ, linear in log mse between the levels of the table and constant beyond its ends.

        Args:
            gamma (`torch.Tensor` of shape `()` or `(N,)`): float64 levels.

        Returns: float64 `torch.Tensor` of the shape of `gamma` followed by that of `mse[0]`.
        """
        gamma = torch.as_tensor(gamma, dtype=torch.float64).cpu()
        inside = gamma.clamp(self.gammas[0], self.gammas[-1])
        right = torch.searchsorted(self.gammas, inside).clamp(1, len(self.gammas) - 1)
        share = (inside - self.gammas[right - 1]) / (self.gammas[right] - self.gammas[right - 1])
        share = share.reshape(share.shape + (1,) * (self.mse.ndim - 1))
        return self.mse[right - 1] ** (1 - share) * self.mse[right] ** share

    def log_variance(self, gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
        """log of the best variance of p(z_s | z_t), see [`optimal_log_variance`] of diffusion.py.

        Args:
            gamma_s, gamma_t (`torch.Tensor` of shape `()`): float64 levels, γ_s < γ_t; γ_s may be −inf.

        Returns: float64 `torch.Tensor` of shape `()`, `(C, 1, 1)` or `(C, H, W)`, which broadcasts to z_s.
        """
        return diffusion.optimal_log_variance(gamma_s.cpu(), gamma_t.cpu(), self.mse_at(gamma_t))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` unless the table fits images of shape `(C, H, W)`."""
        if self.mse.ndim == 1:
            return
        own = tuple(self.mse.shape[1:])
        if own not in (tuple(shape), (*shape[:1], 1, 1)):
            raise ValueError(
                f"the calibration must be for images of shape {tuple(shape)}, got one for {own}; calibrate this "
                "network again, or by detail='level'."
            )

    def count_shared(self, images: torch.Tensor) -> int:
        """How many of some images, integers of shape `(N, C, H, W)`, are among those of the calibration."""
        known = set(self.image_digests)
        return sum(digest in known for digest in digests_of(images)) if known else 0

    def reduced(self, detail: Detail) -> Calibration:
        """The same measurement in less detail: means over pixels, or over channels and pixels."""
        check_detail(detail)
        order = get_args(Detail)
        if order.index(detail) > order.index(self.detail):
            raise ValueError(f"detail must be at most that of the table, {self.detail!r}, got {detail!r}.")
        mse = self.mse
        if detail == "level" and mse.ndim > 1:
            mse = mse.flatten(1).mean(1)
        elif detail == "channel" and mse.ndim > 1:
            mse = mse.mean((2, 3), keepdim=True)
        return replace(self, mse=mse)

    def to_json(self) -> dict[str, Any]:
        """What a scheduler's config holds."""
        lists = {"gammas": self.gammas.tolist(), "mse": self.mse.tolist(), "image_digests": list(self.image_digests)}
        return vars(self) | lists

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Reads what [`Calibration.to_json`] made; raises `ValueError` for anything else."""
        values = mapping(values)
        try:
            gammas, mse = (torch.tensor(values.get(name) or [], dtype=torch.float64) for name in ("gammas", "mse"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"calibration must hold numbers in gammas and mse: {error}") from error
        if not count(values.get("num_images")):
            raise ValueError("calibration must be what calibrate returns, with num_images; calibrate again.")
        seed = values.get("seed")
        read = typed_values(cls, values) | {
            "gammas": gammas,
            "mse": mse,
            "num_images": values["num_images"],
            "num_draws": count(values.get("num_draws")) or 1,
            "seed": seed if isinstance(seed, int) and number(seed) is not None else 0,
            "image_digests": tuple(digest for digest in items(values.get("image_digests")) if text(digest)),
        }
        return cls(**read)


def digests_of(images: torch.Tensor) -> tuple[str, ...]:
    """A hash of each image, of its integers and not of their dtype."""
    rows = images.to(torch.int32).cpu().flatten(1).contiguous().numpy()
    return tuple(hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows)


def check_detail(detail: str) -> None:
    """Raises `ValueError` unless it is one of the names."""
    if detail not in get_args(Detail):
        raise ValueError(f"detail must be one of {get_args(Detail)}, got {detail!r}.")


def check_variance(variance: str | None) -> None:
    """Raises `ValueError` unless it is one of the names."""
    if variance not in get_args(Variance):
        raise ValueError(f"variance must be one of {get_args(Variance)}, got {variance!r}.")
