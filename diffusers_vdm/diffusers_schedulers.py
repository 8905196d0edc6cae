"""Between γ and diffusers' own schedulers: the levels that one of them means, and one of them made of our levels.

Their tables are float32, which at γ = −13 costs up to 0.2 in γ; here they are float64 on both ways.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .diffusion import log_alpha_squared
from .noise_schedules import BetaGamma, NoiseSchedule

# what can be made of a table of levels, and what is not as one might think
EXPORTABLE = {
    "DDPMScheduler": "ancestral; the last step returns x̂",
    "DDPMParallelScheduler": "as DDPMScheduler",
    "DDIMScheduler": "the same steps as VDMScheduler(algorithm='ddim') at the same levels",
    "DDIMParallelScheduler": "as DDIMScheduler",
    "PNDMScheduler": "one call more than steps; ε and v only; takes no generator, so not in the stock DDPMPipeline",
    "DPMSolverMultistepScheduler": "DPM-Solver++ 2M; whole timesteps",
    "DPMSolverSinglestepScheduler": "whole timesteps; may change the last step to first order, and says so",
    "UniPCMultistepScheduler": "whole timesteps",
    "DEISMultistepScheduler": "ends at the cleanest level of the table, not at x̂; whole timesteps",
    "SASolverScheduler": "stochastic; ends at the cleanest level of the table; whole timesteps",
    "EulerDiscreteScheduler": "starts from σ_max ε, a share 1/√(1 + 1/σ_max²) of the right scale",
    "EulerAncestralDiscreteScheduler": "stochastic; ε and v only; starts as EulerDiscreteScheduler",
    "HeunDiscreteScheduler": "two calls a step; poor at few steps of uneven levels; starts as EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "two calls a step; ε and v only; starts as EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "stochastic; two calls a step; ε and v only; starts as EulerDiscreteScheduler",
    "LMSDiscreteScheduler": "starts as EulerDiscreteScheduler",
}
# arguments that would change the levels
_OF_THE_LEVELS = {
    "num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr",
    "prediction_type", "use_flow_sigmas", "sigma_min", "sigma_max", "use_dynamic_shifting", "shift",
}  # fmt: skip


def noise_schedule_of(scheduler: ConfigMixin) -> NoiseSchedule:
    """γ(t) that a scheduler means: ours, or [`BetaGamma`] of the betas of one of diffusers', worked out in float64.

    Raises: `ValueError` for schedulers without a usable table of betas.
    """
    if hasattr(scheduler, "noise_schedule") and not inspect.isclass(scheduler):
        return scheduler.noise_schedule()
    return BetaGamma(diffusers_betas(scheduler).tolist())


def diffusers_betas(scheduler: ConfigMixin) -> torch.Tensor:
    """The betas that a scheduler of diffusers means, float64 of shape `(T,)` (its own table is float32: 1.7e-4 in γ).

    Raises: `ValueError` for schedulers without a usable table of betas.
    """
    if inspect.isclass(scheduler):
        raise TypeError(f"scheduler must be an object, got the class {scheduler.__name__}.")
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


def betas_of_gammas(gammas: torch.Tensor) -> torch.Tensor:
    """β_i = 1 − ᾱ_i/ᾱ_{i−1} with ᾱ_{−1} = 1, of increasing γ_i; float64, the inverse of `gammas_from_betas`."""
    zero = torch.zeros(1, dtype=torch.float64)
    return -torch.expm1(torch.diff(log_alpha_squared(gammas.double()), prepend=zero))


def scheduler_of_gammas(
    scheduler_class: type[SchedulerMixin], gammas: torch.Tensor, prediction_type: str, **kwargs: Any
) -> SchedulerMixin:
    """A scheduler of diffusers whose timestep i is the level γ_i, with float64 tables.

    Where it has the option it takes steps from the last level on (`timestep_spacing="trailing"`) and does not clip.
    `save_pretrained` keeps what its config holds, the betas: a scheduler that is loaded again has float32 tables.

    Args:
        scheduler_class (`type`): one of [`EXPORTABLE`].
        gammas (`torch.Tensor` of shape `(N,)`): increasing levels of the timesteps 0 … N − 1.
        prediction_type (`str`): what the network predicts.
        kwargs: further arguments of the class, `use_karras_sigmas=True` say.

    Raises: `TypeError` for what is no scheduler class, `ValueError` for one that takes no table, and for arguments
        that would change the levels.
    """
    if not (inspect.isclass(scheduler_class) and issubclass(scheduler_class, SchedulerMixin)):
        raise TypeError(f"scheduler_class must be a class of diffusers, as DDIMScheduler, got {scheduler_class!r}.")
    name, known = scheduler_class.__name__, inspect.signature(scheduler_class.__init__).parameters
    if name not in EXPORTABLE:
        raise ValueError(f"{name} cannot be given noise levels by a table; these can: {', '.join(EXPORTABLE)}.")
    wrong = sorted(set(kwargs) & _OF_THE_LEVELS)
    if wrong:
        raise ValueError(f"{wrong[0]} cannot be given: the levels and the prediction are those of this scheduler.")
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]!r}; it knows {sorted(set(known) - {'self'})}.")
    wanted = {
        "num_train_timesteps": len(gammas),
        "trained_betas": betas_of_gammas(gammas).tolist(),
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "thresholding": False,
        "steps_offset": 0,
        "skip_prk_steps": True,
    }
    scheduler = scheduler_class(**{key: value for key, value in wanted.items() if key in known} | kwargs)
    scheduler.alphas_cumprod = torch.sigmoid(-gammas.double())
    if hasattr(scheduler, "final_alpha_cumprod") and not kwargs.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(len(gammas))  # what was laid out already came from float32
    return scheduler
