"""Monotone cubic interpolation (PCHIP) of increasing values at equidistant knots [Fritsch & Butland 1984]."""

from __future__ import annotations

import torch


def pchip_slopes(values: torch.Tensor) -> torch.Tensor:
    """Slopes at the knots, per knot distance and never negative; shape of `values`, `(n + 1,)`."""
    rise = values[1:] - values[:-1]
    if len(rise) == 1:
        return rise.expand(2)
    inside = 2 / (1 / rise[:-1] + 1 / rise[1:])
    first = ((3 * rise[0] - rise[1]) / 2).clamp(min=0)
    last = ((3 * rise[-1] - rise[-2]) / 2).clamp(min=0)
    return torch.cat([first[None], inside, last[None]])


def pchip(values: torch.Tensor, slopes: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The interpolant of `values` `(n + 1,)` and its derivative at t ∈ [0, 1]; `slopes` are from [`pchip_slopes`]."""
    n = len(values) - 1
    k = (t * n).floor().clamp(0, n - 1).long()
    r = t * n - k
    left, right, d_left, d_right = values[k], values[k + 1], slopes[k], slopes[k + 1]
    rise = right - left
    # the Hermite cubic around the left knot: left + r (d_left + r (c₂ + r c₃)), with slopes per knot distance
    c2, c3 = 3 * rise - 2 * d_left - d_right, d_left + d_right - 2 * rise
    value = torch.where(r == 1, right, left + r * (d_left + r * (c2 + r * c3)))
    return value, n * (d_left + r * (2 * c2 + 3 * r * c3))
