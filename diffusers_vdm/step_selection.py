"""Find the T timesteps with the best bound, by dynamic programming over the measured errors of a fine chain.

The term of a step from level t down to s is ½ m for each dimension, m = expm1(γ_t − γ_s) mse(γ_t), or ½ log(1 + m)
with the best variance: its error depends on t alone. So the errors of one fine chain give the terms for all pairs of
levels, and the best path through T of them is a shortest path [Watson et al. 2021, arXiv 2106.03802, §4]. Choose
timesteps on images other than those used for evaluation.
"""

from __future__ import annotations

import math

import torch

from .calibration import Variance, check_variance
from .diffusion import step_weight


def best_levels(
    gammas: torch.Tensor,
    mse: torch.Tensor,
    num_steps: int,
    variance: Variance = "posterior",
    calibrated_mse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """The path of `num_steps` steps through a fine chain of levels whose diffusion terms have the smallest sum.

    Args:
        gammas (`torch.Tensor` of shape `(M + 1,)`): increasing levels γ_0 … γ_1, both of which every path visits.
        mse (`torch.Tensor` of shape `(M,)` or `(M, ...)`): mean of (ε − ε̂)² over the images at `gammas[1:]`, and over
            the dimensions, or of each channel or pixel.
        num_steps (`int`): T, 1 to M.
        variance (`"posterior"` or `"optimal"`, defaults to `"posterior"`): the variance of the steps.
        calibrated_mse (`torch.Tensor` of the shape of `mse`, *optional*): the errors that the optimal variance is made
            of, where they are not `mse`. With c = expm1(γ_t − γ_s) times these, a step then costs
            ½ (log(1 + c) + (m − c)/(1 + c)).

    Returns: indices into `gammas` of shape `(num_steps + 1,)`, increasing, and the sum of the terms in bits/dim.
    Raises: `ValueError` for mismatched shapes, levels that do not increase, and T out of range.
    """
    check_variance(variance)
    gammas, mse = gammas.double().cpu(), mse.double().cpu()
    fine = len(mse) if mse.ndim else 0
    if gammas.ndim != 1 or mse.ndim < 1 or len(gammas) != fine + 1:
        raise ValueError(
            f"gammas must have one more element than mse, got shapes {tuple(gammas.shape)} and {tuple(mse.shape)}."
        )
    if not bool((gammas.diff() > 0).all()) or not bool(gammas.isfinite().all() & mse.isfinite().all()):
        raise ValueError("gammas must increase, and gammas and mse must be finite.")
    if not isinstance(num_steps, int) or not 1 <= num_steps <= fine:
        raise ValueError(f"num_steps must be an integer within [1, {fine}], the steps measured, got {num_steps!r}.")
    # cost[s, t − 1]: the step from level t down to s < t
    cost = torch.full((fine, fine), math.inf, dtype=torch.float64)
    for t in range(fine):
        weight = 2 * step_weight(gammas[: t + 1], gammas[t + 1])[:, None]
        m = weight * mse[t].flatten()
        nats = m
        if variance == "optimal":
            nats = torch.log1p(m)
            if calibrated_mse is not None:
                c = weight * calibrated_mse[t].flatten()
                nats = torch.log1p(c) + (m - c) / (1 + c)
        cost[: t + 1, t] = 0.5 * nats.mean(1) / math.log(2)
    best, came_from = cost[0], []  # cost of reaching each level from γ_0 in one step
    for _ in range(num_steps - 1):
        # cost of reaching t with a last step from s ≥ 1
        through = best[:-1, None] + cost[1:]
        value, source = through.min(0)
        came_from.append(source + 1)
        best = value
    path = [fine]
    for sources in reversed(came_from):
        path.append(int(sources[path[-1] - 1]))
    return torch.tensor([0, *reversed(path)]), float(best[-1])
