"""Convert noise levels between γ and diffusers' schedulers, in both directions.

The tables in diffusers are float32, which costs up to 0.2 in γ at γ = −13; here they are float64.
"""

from __future__ import annotations

import difflib
import inspect
import math
import reprlib
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from .denoiser import VarianceType
from .diffusion import log_alpha_squared
from .noise_schedules import BetaGamma, NoiseSchedule

# schedulers that accept a table of levels, with their peculiarities
EXPORTABLE = {
    "DDPMScheduler": "ancestral; the last step returns x̂",
    "DDPMParallelScheduler": "same as DDPMScheduler",
    "DDIMScheduler": "the same steps as VDMScheduler(algorithm='ddim') at the same levels",
    "DDIMParallelScheduler": "same as DDIMScheduler",
    "PNDMScheduler": "one call more than steps; ε and v only; takes no generator, so not for the stock DDPMPipeline",
    "DPMSolverMultistepScheduler": "DPM-Solver++ 2M; integer timesteps",
    "DPMSolverSinglestepScheduler": "integer timesteps; may change the last step to first order, with a warning",
    "UniPCMultistepScheduler": "integer timesteps",
    "DEISMultistepScheduler": "ends at the cleanest level of the table, not at x̂; integer timesteps",
    "SASolverScheduler": "stochastic; ends at the cleanest level of the table; integer timesteps",
    "EulerDiscreteScheduler": "starts from σ_max ε, 1/√(1 + 1/σ_max²) times the exact scale",
    "EulerAncestralDiscreteScheduler": "stochastic; ε and v only; starts like EulerDiscreteScheduler",
    "HeunDiscreteScheduler": "two calls a step; poor with few uneven steps; starts like EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "two calls a step; ε and v only; starts like EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "stochastic; two calls a step; ε, v only; starts like EulerDiscreteScheduler",
    "LMSDiscreteScheduler": "starts like EulerDiscreteScheduler",
}
# arguments that would change the levels
_LEVEL_ARGUMENTS = {
    "num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr",
    "prediction_type", "use_flow_sigmas", "sigma_min", "sigma_max", "use_dynamic_shifting", "shift",
}  # fmt: skip
# arguments that affect the steps of a diffusers sampler, but not the levels
_SAMPLER_ARGUMENTS = {
    "algorithm_type", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "noise_sampler_seed", "predict_x0", "predictor_order", "sample_max_value", "set_alpha_to_one", "skip_prk_steps",
    "solver_order", "solver_p", "solver_type", "tau_func", "time_shift_type", "timestep_spacing",
}  # fmt: skip
# values of `variance_type` in diffusers configs that mean "fixed_small"
SAME_AS_FIXED_SMALL = ("fixed_small_log", None)
# the keys that define the table in diffusers, unless `trained_betas` is given
_LINEAR_BETAS = ("beta_start", "beta_end", "beta_schedule")


def noise_schedule_of(scheduler: ConfigMixin) -> NoiseSchedule:
    """γ(t) of one of our schedulers, or the [`BetaGamma`] of a diffusers scheduler with betas, in float64.

    Raises: `ValueError` for schedulers without a usable table of betas.
    """
    if hasattr(scheduler, "noise_schedule") and not inspect.isclass(scheduler):
        return scheduler.noise_schedule()
    return BetaGamma(diffusers_betas(scheduler).tolist())


def diffusers_betas(scheduler: ConfigMixin) -> torch.Tensor:
    """The betas of a diffusers scheduler in float64, shape `(T,)` (its own float32 table is off by 1.7e-4 in γ).

    Raises: `ValueError` for schedulers without a usable table of betas.
    """
    if inspect.isclass(scheduler):
        raise TypeError(f"scheduler must be an object, got the class {scheduler.__name__}.")
    config = getattr(scheduler, "config", {})
    if config.get("rescale_betas_zero_snr", False):
        raise ValueError(
            "rescale_betas_zero_snr must be False, got True: zero SNR at the last step has no finite γ, and ε̂ does "
            "not determine x̂ there."
        )
    if config.get("trained_betas") is not None:
        return checked_betas(config["trained_betas"])
    if "beta_schedule" not in config or not hasattr(scheduler, "betas"):
        raise ValueError(
            f"{type(scheduler).__name__} has no table of betas, so it defines no likelihood; use the scheduler that "
            "the network was trained with."
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
    return checked_betas(betas, "the scheduler's betas")


def checked_betas(
    betas: Sequence[float] | torch.Tensor, name: str = "trained_betas", count: int | None = None
) -> torch.Tensor:
    """`betas` in float64; `ValueError` unless they are at least two numbers within (0, 1), and `count` if given."""
    try:
        table = torch.as_tensor(betas, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a list of numbers, got {reprlib.repr(betas)}.") from error
    if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table < 1)).all()):
        raise ValueError(f"{name} must be at least two numbers within (0, 1), got {reprlib.repr(table.tolist())}.")
    if count is not None and len(table) != count:
        raise ValueError(
            f"{name} must hold one beta for each of num_train_timesteps={count}, got {len(table)} of them; set "
            f"num_train_timesteps={len(table)}."
        )
    return table


def same_betas(one: Any, other: torch.Tensor) -> bool:
    """Whether both tables describe the same levels, up to rounding."""
    one = torch.as_tensor(one, dtype=torch.float64)
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6, atol=0)


def check_keys(cls: type, config: dict[str, Any], has_levels: bool) -> None:
    """Raises `ValueError` for a config key that `cls`, one of our schedulers, neither knows nor may ignore.

    It may ignore keys that do not affect the levels: the arguments for the steps of a diffusers sampler, the betas
    that `trained_betas` overrides, and arguments with the default value of diffusers.

    Args:
        cls (`type`): the class to load.
        config (`dict`): the config of a scheduler.
        has_levels (`bool`): whether the config defines the noise levels by keys of `cls`.
    """
    known = arguments_of(cls)
    source = config.get("_class_name", "scheduler's")
    for key, value in config.items():
        if (key in known and key != "variance_type") or key.startswith("_"):
            continue
        shown, allowed = reprlib.repr(value), _allowed_values(key)
        if allowed is None:
            raise ValueError(unknown_key(cls, key, value))
        overridden = has_levels and config.get("trained_betas") is not None
        if key == "variance_type" and _is_among(value, allowed):
            continue
        linear = key == "beta_schedule" and value == "linear" and "beta_start" in known
        if not has_levels or (key in _LINEAR_BETAS and not overridden and not linear):
            raise ValueError(
                f"{cls.__name__} cannot take its noise levels from a {source} config with {key}={shown}"
                f"{' and trained_betas=None' if has_levels else ''}; use LinearBetaScheduler for linear betas, "
                "VDMScheduler(trained_gammas=…) for a table of γ, and VDMScheduler.from_diffusers(scheduler) for any "
                "diffusers scheduler with betas."
            )
        if key not in _SAMPLER_ARGUMENTS and key not in _LINEAR_BETAS and not _is_among(value, allowed):
            raise ValueError(
                f"{cls.__name__} cannot honor {key}={shown} of a {source} config: it takes {allowed} only, because "
                "other values change the levels or the prediction."
            )


def arguments_of(cls: type) -> set[str]:
    """The names of the arguments of a class's constructor."""
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def unknown_key(cls: type, key: str, value: Any) -> str:
    """The error message for a key that is not an argument of `cls`, with a guess at the intended one."""
    known = arguments_of(cls)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it knows {sorted(known)}."
    return f"{cls.__name__} does not know the config key {key!r} (value {reprlib.repr(value)}); {hint}"


def _is_among(value: Any, allowed: list[Any]) -> bool:
    return (value is None or isinstance(value, str | int | float)) and value in allowed  # `in` fails for arrays


def _allowed_values(key: str) -> list[Any] | None:
    """The values of a key that may be ignored; `None` if no supported diffusers scheduler has such an argument."""
    if key == "variance_type":
        return [*get_args(VarianceType), *SAME_AS_FIXED_SMALL]
    return _defaults_of_diffusers().get(key, [] if key in _SAMPLER_ARGUMENTS else None)


@cache
def _defaults_of_diffusers() -> dict[str, list[Any]]:
    """For each argument, its default values in the diffusers schedulers that accept our levels."""
    defaults: dict[str, list[Any]] = {}
    for name in sorted({*EXPORTABLE, *(each.name for each in KarrasDiffusionSchedulers)}):
        for key, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
            # a class whose dependency is missing is a dummy that takes (*args, **kwargs)
            if key != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                defaults.setdefault(key, []).append(parameter.default)
    return {key: [v for i, v in enumerate(values) if v not in values[:i]] for key, values in defaults.items()}


def betas_of_gammas(gammas: torch.Tensor) -> torch.Tensor:
    """β_i = 1 − ᾱ_i/ᾱ_{i−1} with ᾱ_{−1} = 1, from increasing γ_i; float64, the inverse of `gammas_from_betas`."""
    zero = torch.zeros(1, dtype=torch.float64)
    return -torch.expm1(torch.diff(log_alpha_squared(gammas.double()), prepend=zero))


def scheduler_of_gammas(
    scheduler_class: type[SchedulerMixin], gammas: torch.Tensor, network: dict[str, str], **kwargs: Any
) -> SchedulerMixin:
    """A diffusers scheduler whose timestep i has the level γ_i, with float64 tables.

    If it has these options, its steps start at the last level (`timestep_spacing="trailing"`) and it does not clip.
    `save_pretrained` stores only the betas in its config, so a scheduler that is loaded again has float32 tables.

    Args:
        scheduler_class (`type`): one of [`EXPORTABLE`].
        gammas (`torch.Tensor` of shape `(N,)`): increasing levels of the timesteps 0 … N − 1.
        network (`dict`): the network's `prediction_type`, and its `variance_type` if it is learned.
        kwargs: further arguments of the class, such as `use_karras_sigmas=True`.

    Raises: `TypeError` for anything but a scheduler class, `ValueError` for a class that accepts no table, and for
        arguments that would change the levels.
    """
    if not (inspect.isclass(scheduler_class) and issubclass(scheduler_class, SchedulerMixin)):
        raise TypeError(
            f"scheduler_class must be a diffusers scheduler class, such as DDIMScheduler, got {scheduler_class!r}."
        )
    name, known = scheduler_class.__name__, arguments_of(scheduler_class)
    if name not in EXPORTABLE:
        raise ValueError(
            f"scheduler_class must accept a table of noise levels, got {name}; use one of {', '.join(EXPORTABLE)}."
        )
    wrong = sorted(set(kwargs) & _LEVEL_ARGUMENTS)
    if wrong:
        raise ValueError(f"{wrong[0]} must be left out: the levels and the prediction are those of this scheduler.")
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]!r}; it knows {sorted(known)}.")
    wanted = {
        "num_train_timesteps": len(gammas),
        "trained_betas": betas_of_gammas(gammas).tolist(),
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "thresholding": False,
        "steps_offset": 0,
        "skip_prk_steps": True,
        **network,
    }
    scheduler: Any = scheduler_class(**{key: value for key, value in wanted.items() if key in known} | kwargs)
    scheduler.alphas_cumprod = torch.sigmoid(-gammas.double())
    if hasattr(scheduler, "final_alpha_cumprod") and not kwargs.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(len(gammas))  # the constructor used its float32 table
    return scheduler
