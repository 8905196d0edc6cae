"""Times t of a batch: evenly spread, or importance-sampled where the loss is large, with weights that correct for it.

The variance of loss(t)/p(t), t ~ p, is smallest for p(t) ∝ √E[loss(t)²]. A learned γ(t) has the same effect by
warping t itself; importance sampling is for fixed schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .diffusion import to_high_precision

_GOLDEN = (math.sqrt(5) - 1) / 2

# share of the density that is uniform, so that no weight exceeds its reciprocal
UNIFORM_SHARE = 0.1


def stratified_times(
    batch_size: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
) -> torch.Tensor:
    """t_i = (u + i/B) mod 1 with one uniform u: each t_i is uniform, and all cover [0, 1] evenly [VDM app. I.1].

    Returns: float64 `torch.Tensor` of shape `(batch_size,)`.
    """
    source = generator.device if generator is not None else device
    u = torch.rand((), generator=generator, device=source, dtype=torch.float32)
    lattice = torch.arange(batch_size, device=source) / batch_size
    return to_high_precision((u + lattice) % 1.0).to(device or u.device)


def lattice_times(index: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(i·φ + shift) mod 1 with φ = (√5 − 1)/2: consecutive indices cover [0, 1) evenly. float64, shape of `index`."""
    return (index.double() * _GOLDEN + shift) % 1.0


def importance_warp(level: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A function u → (t, density of t) that samples each of `bins` equal parts of [0, 1] in proportion to `level`.

    The density is piecewise constant: a share `UNIFORM_SHARE` is uniform, the rest is proportional to `level`, of
    shape `(bins,)`. t increases with u, so evenly spread u give t evenly spread under the density. If no level is
    above 0, the density is uniform.
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
    """√E[loss²] in each part, from the sums of [`second_moments`]; a part without draws gets the others' mean."""
    level = (sums[0] / sums[1]).sqrt()
    return torch.where(sums[1] > 0, level, level.nanmean())


class ImportanceTimes:
    """Training times with density ∝ √E[loss²], where E[loss²] is a moving average over the previous steps.

    Args:
        device (`torch.device`): the device of the losses; no call synchronizes with it.
        bins (`int`, defaults to 32): parts of [0, 1].
        decay (`float`, defaults to 0.99): decay of the average per step.
        warm_up (`float`, defaults to 10): times are uniform until the average number of draws per part reaches this.
    """

    def __init__(self, device: torch.device | str, bins: int = 32, decay: float = 0.99, warm_up: float = 10.0):
        self.sums = torch.zeros(2, bins, device=device)
        self.decay, self.warm_up = decay, warm_up
        self._step = torch.zeros_like(self.sums)

    def warp(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, density of t), of the type of `u` ∈ [0, 1), from the losses of the previous steps."""
        sums = self.sums.to(u.dtype)
        return importance_warp(torch.where(sums[1].mean() >= self.warm_up, loss_level(sums), 1.0))(u)

    def add(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """Adds the losses of a micro-batch, not divided by the density; skips it if any loss is not finite."""
        loss = loss.detach().to(self.sums)
        sums = second_moments(t.to(self.sums), torch.where(loss.isfinite(), loss, 0.0), self.sums.shape[1])
        self._step += torch.where(loss.isfinite().all(), sums, 0.0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moving averages that define the density."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Loads what [`state_dict`] returned."""
        self.sums.copy_(state["sums"])

    def step(self, accelerator: Any) -> None:
        """Ends a step: adds the losses of all processes to the average."""
        self.sums = self.decay * self.sums + accelerator.reduce(self._step, "sum")
        self._step = torch.zeros_like(self.sums)
