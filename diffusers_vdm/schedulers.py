"""The two schedulers, which share one step (gamma_scheduler.py) and differ in their table of γ.

[`VDMScheduler`] has a learned (or linear) γ(t), and its timestep is the *normalized γ*. [`LinearBetaScheduler`] has
DDPM's linear betas, and its timesteps are integer indices. The only state is the list of timesteps and, for the
second-order algorithm, the last x̂.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks for it in the module

from .calibration import Variance
from .denoiser import VarianceType, is_learned
from .diffusers_schedulers import betas_of_gammas, checked_betas, diffusers_betas, same_betas
from .diffusion import PredictionType, gammas_from_betas, linear_betas
from .gamma_scheduler import Algorithm, GammaScheduler, VDMSchedulerOutput  # noqa: F401
from .noise_schedules import BetaGamma, LinearBetaGamma, NoiseSchedule, TableGamma, check_ends, check_gamma_table

TimestepType = Literal["gamma", "index"]
# levels among which the best timesteps are chosen
_LEVELS_OF_STEPS = 256


class VDMScheduler(GammaScheduler):
    """Ancestral sampling for a Variational Diffusion Model, with γ(t) read from a float64 table in the config.

    The timestep of the network is the normalized γ, `num_train_timesteps · (γ − gamma_min)/(gamma_max − gamma_min)`, a
    float: a noise level has the same timestep whatever γ(t) was learned. By default, steps are equidistant in t, as in
    training. The last step returns z_0; decode it through p(x | z_0), as [`VDMPipeline`] does.

    Args:
        num_train_timesteps (`int`, defaults to 1000): scale of the timestep.
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0):
            the levels of the timesteps 0 and `num_train_timesteps`, as *configured* for the network.
        trained_gammas (`list[float]`, *optional*):
            increasing values of γ at equidistant t from 0 to 1, interpolated by PCHIP; a straight line from
            `gamma_min` to `gamma_max` if not given. [`VDMScheduler.from_noise_schedule`] fills it.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`): what the network
            predicts.
        clip_sample (`bool`, defaults to `False`): clamp x̂ in each step. The bound does not measure the likelihood of
            such a sampler.
        clip_sample_range (`float`, defaults to 1.0): clamp to ± this.
        algorithm (`"ancestral"`, `"ddim"` or `"dpmsolver++"`, defaults to `"ancestral"`):
            samples of p(z_s | z_t), for many steps; or the probability-flow ODE for few steps, by DDIM (first order)
            or DPM-Solver++ 2M (second order).
        timestep_type (`"gamma"` or `"index"`, defaults to `"gamma"`):
            `"index"` is for a network that was trained with betas: its timestep is the index into `trained_gammas`,
            which must have `num_train_timesteps` values. [`VDMScheduler.from_diffusers`] sets it.
        trained_betas (`list[float]`, *optional*):
            `num_train_timesteps` betas instead of γ, for a network that was trained with them, as in diffusers'
            schedulers: the timestep is the index, and the last step returns z at the first level.
        variance_type (`"fixed_small"`, `"learned_range"` or `"learned"`, defaults to `"fixed_small"`):
            the variance of an ancestral step: that of q(z_s | z_t, x), or the prediction of a network with twice the
            channels, as in diffusers' `DDPMScheduler`. [`VDMScheduler.from_diffusers`] sets it.
        variance (`"posterior"` or `"optimal"`, defaults to `"posterior"`):
            with `variance_type="fixed_small"`, the variance of q(z_s | z_t, x) as it is, or the one with the best
            bound for this network, which is larger. It matters for few steps; `"optimal"` needs `calibration`.
        calibration ([`Calibration`] or `dict`, *optional*): the network's mse_ε(γ), from [`calibrate`].

    Raises: `ValueError` for γ_min ≥ γ_max, a table that does not increase, and unknown names.
    """

    _level_keys = {"gamma_min"}

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        trained_gammas: list[float] | None = None,
        prediction_type: PredictionType = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        algorithm: Algorithm = "ancestral",
        timestep_type: TimestepType = "gamma",
        trained_betas: list[float] | None = None,
        variance_type: VarianceType = "fixed_small",
        variance: Variance = "posterior",
        calibration: dict[str, Any] | None = None,
    ):
        if trained_betas is not None:
            betas = checked_betas(trained_betas, count=num_train_timesteps)
            levels = {"gamma_min": gamma_min, "gamma_max": gamma_max, "trained_gammas": trained_gammas}
            _check_default(levels, {"gamma_min": -13.3, "gamma_max": 5.0, "trained_gammas": None})
            trained_gammas, timestep_type = gammas_from_betas(betas).tolist(), "index"
            gamma_min, gamma_max = trained_gammas[0], trained_gammas[-1]
            self.register_to_config(gamma_min=gamma_min, gamma_max=gamma_max, timestep_type=timestep_type)
        check_ends(gamma_min, gamma_max)
        table = [gamma_min, gamma_max] if trained_gammas is None else list(trained_gammas)
        if trained_gammas is not None:
            check_gamma_table(torch.tensor(table, dtype=torch.float64))
            self.register_to_config(trained_gammas=[float(gamma) for gamma in table])
        if timestep_type not in get_args(TimestepType):
            raise ValueError(f"timestep_type must be one of {get_args(TimestepType)}, got {timestep_type!r}.")
        if timestep_type == "gamma":
            self._schedule = TableGamma(table, gamma_min, gamma_max, num_train_timesteps)
        elif len(table) != num_train_timesteps or trained_gammas is None:
            raise ValueError(
                f"timestep_type='index' needs num_train_timesteps={num_train_timesteps} values in trained_gammas, got "
                f"{None if trained_gammas is None else len(table)}."
            )
        else:
            self._schedule = BetaGamma(betas_of_gammas(torch.tensor(table, dtype=torch.float64)).tolist())
        self._init_chain(prediction_type, clip_sample_range)

    @classmethod
    def _with_levels(cls, config: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = ("num_train_timesteps", "gamma_min", "gamma_max", "trained_gammas", "timestep_type")
        own = {name: config[name] for name in names if name in config}
        table = config.get("trained_betas")
        if "gamma_min" in config and ("beta_schedule" in config or table is not None):
            # our configs store trained_betas for diffusers' schedulers; they follow from γ unless a value was edited
            if table is None or not same_betas(table, cls(**own).betas):
                raise ValueError(
                    "trained_betas of this config must be those of its gamma_min, gamma_max and trained_gammas, got "
                    f"{'none' if table is None else 'other ones'}: remove the ones that are wrong."
                )
        if kwargs.get("trained_betas") is not None:
            dropped = {*names[1:], "trained_betas"} - set(kwargs)
        else:
            dropped = {"trained_betas"} if "gamma_min" in config else set()
        return {key: value for key, value in config.items() if key not in dropped}

    @classmethod
    def from_noise_schedule(
        cls, noise_schedule: NoiseSchedule, num_knots: int | None = None, **kwargs
    ) -> VDMScheduler:
        """A scheduler with γ(t) of `noise_schedule` as a table in its config.

        The table is exact at its knots. Between 1,025 knots the error in γ is 1e-9 to 1e-7 for learned schedules;
        linear schedules need two knots and have no error. `kwargs` are further arguments.
        """
        if isinstance(noise_schedule, LinearBetaGamma):
            raise ValueError(
                "a network trained with LinearBetaGamma is conditioned on DDPM's index, not on γ; use "
                "LinearBetaScheduler.from_noise_schedule(noise_schedule)."
            )
        table = noise_schedule.table() if num_knots is None else noise_schedule.table(num_knots)
        return cls(
            num_train_timesteps=noise_schedule.config.num_train_timesteps,
            gamma_min=noise_schedule.config.gamma_min,
            gamma_max=noise_schedule.config.gamma_max,
            trained_gammas=table.tolist(),
            **kwargs,
        )

    @classmethod
    def from_diffusers(cls, scheduler: ConfigMixin, **kwargs) -> VDMScheduler:
        """A scheduler with the levels of a diffusers scheduler with betas, for the network that was trained with them.

        γ(t) interpolates its table at t = i/(T − 1); the network's timestep is the index i, fractional between
        integers. The last step returns z at the first level, to be decoded. A learned `variance_type`
        ("learned_range", "learned") is kept; fixed ones become "fixed_small". `kwargs` are further arguments.

        Raises: `ValueError` for schedulers without a usable table of betas.
        """
        if isinstance(scheduler, GammaScheduler):
            raise TypeError(f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}.")
        gammas = gammas_from_betas(diffusers_betas(scheduler))
        if scheduler.config.get("thresholding", False):
            raise ValueError("thresholding must be False, got True: dynamic thresholding has no counterpart here.")
        settings = {
            "prediction_type": scheduler.config.get("prediction_type", "epsilon"),
            "clip_sample": scheduler.config.get("clip_sample", False),
            "clip_sample_range": scheduler.config.get("clip_sample_range", 1.0),
        }
        if is_learned(scheduler.config.get("variance_type")):
            settings["variance_type"] = scheduler.config["variance_type"]
        ends = {"gamma_min": float(gammas[0]), "gamma_max": float(gammas[-1])}
        return cls(len(gammas), trained_gammas=gammas.tolist(), timestep_type="index", **ends, **(settings | kwargs))

    @property
    def final_gamma(self) -> torch.Tensor:
        """γ(0), the level of the z_0 that the last step returns; float64, shape `()`."""
        return self._schedule.ends()[0]

    def levels_of_steps(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        gamma_0, gamma_1 = (float(end) for end in self._schedule.ends())
        gammas = torch.linspace(gamma_0, gamma_1, _LEVELS_OF_STEPS + 1, dtype=torch.float64)
        return gammas, self._schedule.timestep(None, gammas), False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Sets the chain of noise levels.

        Args:
            num_inference_steps (`int`, *optional*): T, any number ≥ 1; levels γ(1), γ(1 − 1/T), …, γ(1/T), then γ(0).
            device (`str` or `torch.device`, *optional*): device of `self.timesteps`; γ stays on the CPU in float64.
            timesteps (`Sequence[float]`, *optional*): custom decreasing timesteps (normalized γ); the chain always
                ends at γ(0).
        """
        n = self._checked_num_inference_steps(num_inference_steps, timesteps)
        if timesteps is None:
            t = torch.arange(n, 0, -1, dtype=torch.float64) / n
            gammas = self._schedule(t)
            values = self._schedule.timestep(t, gammas).float()
        else:
            values = torch.as_tensor(timesteps, dtype=torch.float64).float()
            gammas = self._gammas_at(values)
            if not bool((gammas > self.final_gamma).all()):
                raise ValueError("timesteps must be above that of γ(0), because the chain always ends at γ(0).")
        self._set_chain(gammas, values, device)

    def _gammas_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        gammas = self._schedule.gamma_of_timestep(timesteps.detach().cpu())
        if self.config.timestep_type == "index":
            return gammas
        low, high = self.config.gamma_min, self.config.gamma_max
        gamma_0, gamma_1 = self._schedule.ends()
        slack = 1e-6 * (high - low)  # for the rounding of float32 timesteps
        if not bool(((gammas >= gamma_0 - slack) & (gammas <= gamma_1 + slack)).all()):
            # add_noise also accepts levels that the network knows but γ(t) does not reach, so check both ranges
            if not bool(((gammas >= min(low, gamma_0) - slack) & (gammas <= max(high, gamma_1) + slack)).all()):
                raise ValueError(
                    f"timesteps must be within [0, {self.config.num_train_timesteps}], got "
                    f"{float(timesteps.min()):.6g} to {float(timesteps.max()):.6g}; this scheduler's timesteps are "
                    "normalized γ, floats."
                )
        return gammas


class LinearBetaScheduler(GammaScheduler):
    """Ancestral sampling of DDPM with linear betas: integer timesteps, drop-in for `DDPMScheduler` [DDPM §2, §4].

    Equal to diffusers' `DDPMScheduler(variance_type="fixed_small", clip_sample=False)` with the same betas, but with
    float64 tables. The betas are rescaled by 1000/T (see [`LinearBetaGamma`]). The last step returns the data x̂.

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): first and last β for 1,000 steps.
        rescale_betas (`bool`, defaults to `True`): multiply the betas by 1000/T.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`): what the network
            predicts.
        clip_sample (`bool`, defaults to `False`): clamp x̂ in each step. The bound does not measure the likelihood of
            such a sampler.
        clip_sample_range (`float`, defaults to 1.0): clamp to ± this.
        algorithm (`"ancestral"`, `"ddim"` or `"dpmsolver++"`, defaults to `"ancestral"`): see [`VDMScheduler`].
        timestep_spacing (`"linspace"`, `"leading"` or `"trailing"`, defaults to `"linspace"`):
            which indices are visited by fewer than T steps, named as in diffusers. `"leading"` starts below T − 1.
        trained_betas (`list[float]`, *optional*):
            T custom betas, not rescaled, instead of the linear ones, as in diffusers' schedulers.
        variance_type (`"fixed_small"`, `"learned_range"` or `"learned"`, defaults to `"fixed_small"`): see
            [`VDMScheduler`].
        variance (`"posterior"` or `"optimal"`, defaults to `"posterior"`), calibration (*optional*): see
            [`VDMScheduler`].

    Raises: `ValueError` for betas outside of (0, 1) and unknown names.
    """

    _level_keys = {"rescale_betas", "beta_schedule"}

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float | None = 1e-4,
        beta_end: float | None = 0.02,
        rescale_betas: bool = True,
        prediction_type: PredictionType = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        algorithm: Algorithm = "ancestral",
        trained_betas: list[float] | None = None,
        variance_type: VarianceType = "fixed_small",
        variance: Variance = "posterior",
        calibration: dict[str, Any] | None = None,
    ):
        if timestep_spacing not in ("linspace", "leading", "trailing"):
            raise ValueError(
                f"timestep_spacing must be 'linspace', 'leading' or 'trailing', got {timestep_spacing!r}."
            )
        betas = None
        if trained_betas is None:
            arguments: Any = (num_train_timesteps, beta_start, beta_end, rescale_betas)  # which LinearBetaGamma checks
            self._schedule = LinearBetaGamma(*arguments)
        else:
            betas = checked_betas(trained_betas, count=num_train_timesteps)
            _check_default({"beta_start": beta_start, "beta_end": beta_end}, {"beta_start": 1e-4, "beta_end": 0.02})
            self._schedule = BetaGamma(betas.tolist())
            # a config with these values means linear betas and a redundant table
            self.register_to_config(beta_start=None, beta_end=None, rescale_betas=False)
        self._gammas = self._schedule.table()
        self._init_chain(prediction_type, clip_sample_range, betas)

    @classmethod
    def _with_levels(cls, config: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        table, theirs = config.get("trained_betas"), "beta_schedule" in config
        names = ("num_train_timesteps", "beta_start", "beta_end")
        linear = dict(zip(names, (1000, 1e-4, 0.02), strict=True)) | {n: config[n] for n in names if n in config}
        ours = config.get("rescale_betas", not theirs)
        if kwargs.get("trained_betas") is not None:
            return {**config, "beta_start": None, "beta_end": None, "trained_betas": None, "rescale_betas": False}
        if table is None:
            # diffusers never rescales betas
            if theirs and ours and "rescale_betas" not in kwargs and linear["num_train_timesteps"] != 1000:
                raise ValueError(
                    "rescale_betas must be False in a config with beta_schedule and trained_betas=None, because "
                    "diffusers does not rescale betas, got True; remove one of them."
                )
            return {**config, "rescale_betas": ours}
        if linear["beta_start"] is None and linear["beta_end"] is None:
            return config
        for rescale in [ours] if "rescale_betas" in config or not theirs else [False, True]:
            of = (linear["num_train_timesteps"], linear["beta_start"], linear["beta_end"])
            if _are_linear(table, of, rescale, theirs or "rescale_betas" not in config):
                return {**config, "trained_betas": None, "rescale_betas": rescale}
        if "rescale_betas" in config:
            raise ValueError(
                "trained_betas of this config must be the linear ones of its beta_start and beta_end, got others: "
                "remove the ones that are wrong."
            )
        return {**config, "beta_start": None, "beta_end": None, "rescale_betas": False}

    @classmethod
    def from_noise_schedule(cls, noise_schedule: LinearBetaGamma, **kwargs) -> LinearBetaScheduler:
        """The scheduler of a [`LinearBetaGamma`]; `kwargs` are further arguments, such as `prediction_type`."""
        if not isinstance(noise_schedule, LinearBetaGamma):
            raise TypeError(
                f"noise_schedule must be a LinearBetaGamma, got {type(noise_schedule).__name__}; "
                "VDMScheduler.from_noise_schedule takes any schedule."
            )
        names = ("num_train_timesteps", "beta_start", "beta_end", "rescale_betas")
        return cls(**{name: noise_schedule.config[name] for name in names}, **kwargs)

    @property
    def final_gamma(self) -> torch.Tensor:
        """−inf: the last step returns the data x̂, not a latent; float64, shape `()`."""
        return torch.tensor(-math.inf, dtype=torch.float64)

    def levels_of_steps(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        count = min(len(self), _LEVELS_OF_STEPS + 1)
        indices = torch.linspace(0, len(self) - 1, count, dtype=torch.float64).round().long()
        return self._gammas[indices], indices, True

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Sets a chain of `num_inference_steps` ≤ T steps, or of custom decreasing indices `timesteps`."""
        n = self._checked_num_inference_steps(num_inference_steps, timesteps)
        total = self.config.num_train_timesteps
        if timesteps is None:
            if n > total:
                raise ValueError(
                    f"num_inference_steps must be at most num_train_timesteps={total}, the number of noise levels "
                    f"that the network knows, got {n}."
                )
            if self.config.timestep_spacing == "linspace":
                last = total - 1
                values = torch.linspace(last, 0, n, dtype=torch.float64) if n > 1 else torch.tensor([float(last)])
            elif self.config.timestep_spacing == "leading":
                values = torch.arange(n - 1, -1, -1, dtype=torch.float64) * (total // n)
            else:  # rounded before the subtraction, as in diffusers: halves go to the even number
                values = (torch.arange(n, 0, -1, dtype=torch.float64) * (total / n)).round() - 1
            values = values.round().long()
        else:
            values = torch.as_tensor(timesteps)
        self._set_chain(self._gammas_at(values), values.long(), device)

    def _gammas_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        indices = timesteps.detach().cpu()
        rounded = indices.round().long()
        if not bool((rounded == indices).all()) or not bool(((rounded >= 0) & (rounded < len(self))).all()):
            raise ValueError(
                f"timesteps must be integers in [0, {len(self)}), got values from {float(indices.min()):.6g} to "
                f"{float(indices.max()):.6g}."
            )
        return self._gammas[rounded]


def _are_linear(table: Any, of: tuple[Any, Any, Any], rescale: bool, may_be_none: bool) -> bool:
    """Whether `table` holds the linear betas `of` (T, start, end); invalid ones are `False` if `may_be_none`."""
    try:
        return same_betas(table, linear_betas(*of, rescale))
    except ValueError:
        if may_be_none:
            return False
        raise


def _check_default(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None and value != defaults[name]:
            raise ValueError(f"{name} must be left out if trained_betas is given, got {value!r}.")
