"""Times t of a batch: evenly spread, or drawn where the loss is large with the weights that make up for it.

The variance of an estimate by E[loss(t)/p(t)], t ~ p, is least for p(t) ∝ √E[loss(t)²]. A learned γ(t) comes to the
same by bending the axis of t itself; this is for schedules that stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .diffusion import to_high_precision

_GOLDEN = (math.sqrt(5) - 1) / 2

# share of the density that stays uniform: no weight is above its reciprocal
UNIFORM_SHARE = 0.1


def stratified_times(
    batch_size: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
) -> torch.Tensor:
    """t_i = (u + i/B) mod 1 with one uniform u: each is uniform, together they cover [0, 1] evenly [VDM app. I.1].

    Returns: float64 `torch.Tensor` of shape `(batch_size,)`.
    """
    source = generator.device if generator is not None else device
    u = torch.rand((), generator=generator, device=source, dtype=torch.float32)
    lattice = torch.arange(batch_size, device=source) / batch_size
    return to_high_precision((u + lattice) % 1.0).to(device or u.device)


def lattice_times(index: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(i·φ + shift) mod 1 with the golden ratio φ: any run of indices covers [0, 1) evenly. float64, as `index`."""
    return (index.double() * _GOLDEN + shift) % 1.0


def importance_warp(level: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """u → (t, density of t): `level` `(bins,)` says how often to look into each of equal parts of [0, 1].

    The density is in proportion to it, piecewise constant, but for a tenth of it that is uniform; t increases with u,
    so that an even set of u gives an even set of t under it. Uniform where no level is above 0.
    """
    bins = len(level)
    mean = level.mean()
    density = (1 - UNIFORM_SHARE) * level / mean.clamp(min=torch.finfo(level.dtype).tiny) + UNIFORM_SHARE
    density = torch.where(mean > 0, density, 1.0)
    edges = torch.cat([density.new_zeros(1), (density / bins).cumsum(0)])

    def warp(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = (torch.searchsorted(edges, u, right=True) - 1).clamp(0, bins - 1)
        return ((k + (u - edges[k]) / (edges[k + 1] - edges[k])) / bins).clamp(0, 1), density[k]

    return warp


def second_moments(t: torch.Tensor, loss: torch.Tensor, bins: int) -> torch.Tensor:
    """Σ loss² and the number of draws in each of `bins` equal parts of [0, 1]; shape `(2, bins)`."""
    which = (t * bins).long().clamp(0, bins - 1)
    sums = loss.new_zeros(2, bins)
    sums[0].index_add_(0, which, loss.square())
    sums[1].index_add_(0, which, torch.ones_like(loss))
    return sums


def loss_level(sums: torch.Tensor) -> torch.Tensor:
    """√E[loss²] in each part, of the sums of [`second_moments`]; a part that was not met is as the others are."""
    level = (sums[0] / sums[1]).sqrt()
    return torch.where(sums[1] > 0, level, level.nanmean())


class ImportanceTimes:
    """Times of training in proportion to √E[loss²], of which E[loss²] is a moving average over the steps behind.

    Args:
        device (`torch.device`): where the losses are; nothing waits for it.
        bins (`int`, defaults to 32): parts of [0, 1].
        decay (`float`, defaults to 0.99): of the average, for a step.
        warm_up (`float`, defaults to 10): draws a part needs on average before times are anything but uniform.
    """

    def __init__(self, device: torch.device | str, bins: int = 32, decay: float = 0.99, warm_up: float = 10.0):
        self.sums = torch.zeros(2, bins, device=device)
        self.decay, self.warm_up = decay, warm_up
        self._step = torch.zeros_like(self.sums)

    def warp(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, density of t), of the type of `u` ∈ [0, 1), by what the steps before have shown."""
        sums = self.sums.to(u.dtype)
        return importance_warp(torch.where(sums[1].mean() >= self.warm_up, loss_level(sums), 1.0))(u)

    def add(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """Losses of a micro-batch, not divided by the density; none of it counts where one is not finite."""
        loss = loss.detach().to(self.sums)
        sums = second_moments(t.to(self.sums), torch.where(loss.isfinite(), loss, 0.0), self.sums.shape[1])
        self._step += torch.where(loss.isfinite().all(), sums, 0.0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moving average that times are drawn by."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Loads what [`state_dict`] returned."""
        self.sums.copy_(state["sums"])

    def step(self, accelerator: Any) -> None:
        """Ends a step: what all processes have seen becomes part of the average."""
        self.sums = self.decay * self.sums + accelerator.reduce(self._step, "sum")
        self._step = torch.zeros_like(self.sums)
