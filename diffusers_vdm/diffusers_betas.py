"""The noise levels that a scheduler of diffusers means: its betas, worked out in float64 from its config."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin

from .noise_schedules import BetaGamma, NoiseSchedule


def noise_schedule_of(scheduler: ConfigMixin) -> NoiseSchedule:
    """γ(t) that a scheduler means: ours, or [`BetaGamma`] of the betas of one of diffusers', worked out in float64.

    Raises: `ValueError` for schedulers without a usable table of betas.
    """
    if hasattr(scheduler, "noise_schedule"):
        return scheduler.noise_schedule()
    return BetaGamma(diffusers_betas(scheduler).tolist())


def diffusers_betas(scheduler: ConfigMixin) -> torch.Tensor:
    """The betas that a scheduler of diffusers means, float64 of shape `(T,)` (its own table is float32: 1.7e-4 in γ).

    Raises: `ValueError` for schedulers without a usable table of betas.
    """
    config = getattr(scheduler, "config", {})
    if config.get("rescale_betas_zero_snr", False):
        raise ValueError("rescale_betas_zero_snr leaves no signal at the last step: ε̂ says nothing of x there.")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    elif "beta_schedule" not in config or not hasattr(scheduler, "betas"):
        raise ValueError(
            f"{type(scheduler).__name__} has no table of betas, so no likelihood can be read off it; give the "
            "scheduler that the network was trained with."
        )
    else:
        steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
        kind = config["beta_schedule"]
        if kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":
            t = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            betas = scheduler.betas.double()
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("the scheduler's betas must be at least two numbers within (0, 1).")
    return betas
