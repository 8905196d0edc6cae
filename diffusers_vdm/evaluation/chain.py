"""The chain of a T-step bound: its levels, its timesteps, and the variance of each step.

There are two conventions:

* `"vdm"`: x = 2(k + ½)/levels − 1, p(x|z_0) = softmax over the levels, T terms of the diffusion loss [VDM §4].
* `"ddpm"`: x = 2k/(levels − 1) − 1, T − 1 terms, and the discretized Gaussian decoder at index 0 [DDPM eq. 5 and 13;
  improved-diffusion's `calc_bpd_loop`].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers.utils import logging

from .. import denoiser, diffusion
from ..calibration import Calibration, Variance, check_variance
from ..diffusers_schedulers import noise_schedule_of
from ..diffusion import PredictionType
from ..gamma_scheduler import GammaScheduler
from ..schedulers import VDMScheduler

Convention = Literal["vdm", "ddpm"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Chain:
    """The levels of a T-step bound: term k goes from `gammas[k]` down to `gammas[k − 1]`, the first to `gamma_0`.

    γ_0 = −inf denotes DDPM's convention, where the network itself is the decoder at the first level.
    """

    gammas: torch.Tensor
    gamma_0: torch.Tensor
    timesteps: torch.Tensor
    visited: torch.Tensor  # `timesteps`; with betas in the "vdm" convention, also that of `gamma_0`
    convention: str
    prediction_type: PredictionType
    variance_type: str
    clip_sample: bool
    clip_range: float
    num_levels: int
    calibration: Calibration | None = None  # of variance_type "optimal"
    log_variances: torch.Tensor | None = None  # of p(z_s | z_t) of each term, by the calibration


def chain_of(scheduler, num_steps, timesteps, convention, clip_sample: bool | None, num_levels: int) -> Chain:
    """Checks the arguments and builds the chain that the scheduler defines."""
    convention = convention or default_convention(scheduler)
    if convention not in ("vdm", "ddpm"):
        raise ValueError(f"convention must be 'vdm' or 'ddpm', got {convention!r}.")
    if not 2 <= num_levels <= 65536:
        raise ValueError(f"num_levels must be within [2, 65536], got {num_levels}.")
    config = getattr(scheduler, "config", {})
    variance_type = config.get("variance_type", "fixed_small").removesuffix("_log")
    if variance_type not in ("fixed_small", "fixed_large", "learned", "learned_range"):
        raise ValueError(
            "the scheduler's variance_type must be 'fixed_small', 'fixed_large', 'learned' or 'learned_range', got "
            f"{variance_type!r}."
        )
    if config.get("thresholding", False):
        raise ValueError(
            "the scheduler must have thresholding=False: thresholding rescales x̂ by statistics of the whole image, so "
            "that p(z_s|z_t) is not Gaussian."
        )
    if num_steps is not None and timesteps is not None:
        raise ValueError("give either num_steps or timesteps, not both.")
    custom = None if timesteps is None else _custom_timesteps(timesteps)
    schedule = noise_schedule_of(scheduler)
    if isinstance(scheduler, VDMScheduler):
        if convention == "ddpm":
            raise ValueError("a VDMScheduler has no DDPM decoder; use convention='vdm'.")
        if custom is None:
            table = scheduler.config.timestep_type == "index"
            steps = _steps((len(scheduler) - 1 if table else 1000) if num_steps is None else num_steps)
            gammas = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps)
        else:
            gammas = scheduler._gammas_at(custom)
            if bool((gammas <= schedule.ends()[0]).any()):
                raise ValueError("timesteps must be above that of γ(0), at which the chain always ends.")
            gammas = torch.cat([schedule.ends()[0][None], gammas])
        timesteps = schedule.timestep(None, gammas)
    else:
        table = schedule.table()
        indices = torch.arange(len(table))
        if custom is not None:
            indices = custom.round().long()
            if bool((indices != custom).any()) or not 0 <= int(indices[0]) <= int(indices[-1]) < len(table):
                raise ValueError(
                    f"timesteps must be integers in [0, {len(table)}), got {custom.flip(0).tolist()[:8]}."
                )
        elif num_steps is not None and _steps(num_steps) < len(table):
            indices = torch.linspace(0, len(table) - 1, num_steps, dtype=torch.float64).round().long()
        elif num_steps is not None and num_steps > len(table):
            raise ValueError(
                f"num_steps must be at most {len(table)}, the levels that the network knows, got {num_steps}."
            )
        gammas, timesteps = table[indices], indices
    gamma_0 = torch.tensor(-math.inf, dtype=torch.float64)
    visited = timesteps[1:] if isinstance(scheduler, VDMScheduler) else timesteps
    if len(gammas) < 2:
        raise ValueError(f"num_steps must be at least 2 for a table of betas, got {len(gammas)}.")
    if convention == "vdm":
        gamma_0, gammas, timesteps = gammas[0], gammas[1:], timesteps[1:]
    return Chain(
        gammas=gammas,
        gamma_0=gamma_0,
        timesteps=timesteps,
        visited=visited,
        convention=convention,
        prediction_type=config.get("prediction_type", "epsilon"),
        variance_type=variance_type,
        clip_sample=bool(config.get("clip_sample", False)) if clip_sample is None else clip_sample,
        clip_range=float(config.get("clip_sample_range", 1.0)),
        num_levels=num_levels,
    )


def chosen_variance(scheduler: Any, variance: Variance | None) -> Variance:
    """`variance`, or what one of our schedulers has; diffusers' configs may carry ours, but their steps do not."""
    default = scheduler.config.variance if isinstance(scheduler, GammaScheduler) else "posterior"
    check_variance(variance or default)
    return variance or default


def own_calibration(scheduler: Any) -> Calibration | None:
    """The calibration of one of our schedulers."""
    return scheduler.calibration if isinstance(scheduler, GammaScheduler) else None


def with_variance(
    chain: Chain,
    scheduler: Any,
    variance: Variance | None,
    calibration: Calibration | None,
    shape: tuple[int, ...],
) -> Chain:
    """`chain` with the best variance for images of `shape` (C, H, W), if that is the chosen one."""
    if chosen_variance(scheduler, variance) == "posterior":
        return chain
    calibration = calibration or own_calibration(scheduler)
    if calibration is None:
        raise ValueError("variance='optimal' needs a calibration, got none; run `diffusers-vdm calibrate`.")
    if not isinstance(calibration, Calibration):
        calibration = Calibration.from_json(calibration)
    if chain.variance_type not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance must be 'posterior' for variance_type={chain.variance_type!r}, got 'optimal'.")
    calibration.check_shape(shape)
    if calibration.clip_sample != chain.clip_sample:
        logger.warning(
            f"the calibration was measured with clip_sample={calibration.clip_sample}, and the bound is with "
            f"clip_sample={chain.clip_sample}: its variance is not the best one."
        )
    log_variances = [
        calibration.log_variance(lower_level(chain, k), chain.gammas[k]) for k in range(len(chain.gammas))
    ]
    return replace(chain, variance_type="optimal", calibration=calibration, log_variances=torch.stack(log_variances))


def _custom_timesteps(timesteps: Sequence[float]) -> torch.Tensor:
    """`timesteps` as an increasing float64 tensor."""
    custom = torch.as_tensor(timesteps, dtype=torch.float64).flatten().flip(0)
    if len(custom) == 0 or bool((custom.diff() <= 0).any()):
        raise ValueError(
            f"timesteps must be a decreasing list of at least one value, got {custom.flip(0).tolist()[:8]}."
        )
    return custom


def _steps(num_steps: int) -> int:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}.")
    return num_steps


def default_convention(scheduler: Any) -> Convention:
    """`"vdm"` for our schedulers, `"ddpm"` for those of diffusers."""
    return "vdm" if isinstance(scheduler, GammaScheduler) else "ddpm"


def x_of_levels(images: torch.Tensor, convention: str, num_levels: int, dtype: torch.dtype) -> torch.Tensor:
    """The data x of integers, see the head of the module."""
    if convention == "vdm":
        return diffusion.x_from_levels(images, num_levels, dtype)
    return 2 * images.to(dtype) / (num_levels - 1) - 1


def posterior_log_variance(chain: Chain, k: int) -> torch.Tensor:
    """log Var q(z_s | z_t, x) of term k; DDPM's decoder uses that of term 1, because its own is −inf."""
    if chain.convention == "ddpm":
        k = max(k, 1)
    return diffusion.posterior_log_variance(lower_level(chain, k), chain.gammas[k])


def log_variance(chain: Chain, k: int, values: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """log Var p(z_s | z_t) of term k: fixed, or predicted by the network."""
    small = posterior_log_variance(chain, k)
    decoder = k == 0 and chain.convention == "ddpm"
    if chain.variance_type == "fixed_small" or (chain.variance_type == "fixed_large" and decoder):
        return diffusion.expand_like(small, x)
    if chain.log_variances is not None:
        return chain.log_variances[k].expand(x.shape)
    large = diffusion.forward_log_variance(lower_level(chain, k), chain.gammas[k])
    if chain.variance_type == "fixed_large":
        return diffusion.expand_like(large, x)
    return denoiser.predicted_log_variance(values, chain.variance_type, small, large)


def lower_level(chain: Chain, k: int) -> torch.Tensor:
    """The lower level of term k."""
    return chain.gammas[k - 1] if k > 0 else chain.gamma_0


def term_nats(chain: Chain, k: int, error: torch.Tensor, log_var: torch.Tensor | None) -> torch.Tensor:
    """KL(q(z_s | z_t, x) ‖ p(z_s | z_t)) of term k in each dimension, between Gaussians, in nats.

    Args:
        error (`torch.Tensor` of shape `(B, ...)`): (ε − ε̂)².
        log_var (`torch.Tensor`, broadcastable to `error`, *optional*): log Var p(z_s | z_t), if it is not that of q.
    """
    gamma_s, gamma_t = lower_level(chain, k), chain.gammas[k]
    nats = diffusion.expand_like(diffusion.step_weight(gamma_s, gamma_t), error) * error
    if log_var is None:
        return nats
    # r is the variance of q over that of p
    r = torch.exp(posterior_log_variance(chain, k) - diffusion.to_high_precision(log_var)).to(error.dtype)
    return r * nats + 0.5 * (r - 1 - torch.log(r))
