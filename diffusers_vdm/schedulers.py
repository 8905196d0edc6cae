"""The two schedulers: one step over two tables of γ (gamma_scheduler.py).

[`VDMScheduler`] holds a learned (or linear) γ(t) and hands the network the *normalised γ* as its timestep;
[`LinearBetaScheduler`] holds DDPM's linear betas and hands over integer indices. Neither keeps state but the list of
timesteps, and the last x̂ for a second-order algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks for it in the module

from .diffusers_schedulers import betas_of_gammas, diffusers_betas
from .diffusion import PredictionType, gammas_from_betas, linear_betas
from .gamma_scheduler import Algorithm, GammaScheduler, VDMSchedulerOutput  # noqa: F401
from .noise_schedules import BetaGamma, LinearBetaGamma, NoiseSchedule, TableGamma, check_ends, check_gamma_table

TimestepType = Literal["gamma", "index"]


class VDMScheduler(GammaScheduler):
    """Ancestral sampling for a Variational Diffusion Model, with γ(t) read from a float64 table in the config.

    The timestep that the network gets is the normalised γ, `num_train_timesteps · (γ − gamma_min)/(gamma_max −
    gamma_min)`, a float: the same noise level has the same timestep whatever γ(t) was learned. Steps are equidistant
    in t by default, as the model was trained. The last step returns z_0; decode it through p(x | z_0), as
    [`VDMPipeline`] does.

    Args:
        num_train_timesteps (`int`, defaults to 1000): scale of the timestep.
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0):
            the levels of the timesteps 0 and `num_train_timesteps`: those that the network was *configured* with.
        trained_gammas (`list[float]`, *optional*):
            values of γ at equidistant t from 0 to 1, increasing, with PCHIP between them; a straight line from
            `gamma_min` to `gamma_max` if not given. [`VDMScheduler.from_noise_schedule`] fills it.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`): what the network says.
        clip_sample (`bool`, defaults to `False`): clamp x̂ in each step. The samples are then not those whose
            likelihood the bound measures.
        clip_sample_range (`float`, defaults to 1.0): clamp to ± this.
        algorithm (`"ancestral"`, `"ddim"` or `"dpmsolver++"`, defaults to `"ancestral"`):
            draws of p(z_s | z_t), for many steps; or the probability-flow ODE by DDIM, first order, or by
            DPM-Solver++ 2M, second order, for few.
        timestep_type (`"gamma"` or `"index"`, defaults to `"gamma"`):
            `"index"` is for a network that was trained with betas: its timestep is the place in `trained_gammas`,
            which then has `num_train_timesteps` values. [`VDMScheduler.from_diffusers`] sets it.

    Raises: `ValueError` for γ_min ≥ γ_max, a table that does not increase, and unknown names.
    """

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
    ):
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
                f"timestep_type='index' needs trained_gammas of num_train_timesteps={num_train_timesteps} values, got "
                f"{None if trained_gammas is None else len(table)}."
            )
        else:
            self._schedule = BetaGamma(betas_of_gammas(torch.tensor(table, dtype=torch.float64)).tolist())
        self._init_chain(prediction_type, clip_sample_range)

    @classmethod
    def from_noise_schedule(
        cls, noise_schedule: NoiseSchedule, num_knots: int | None = None, **kwargs
    ) -> VDMScheduler:
        """A scheduler with γ(t) of `noise_schedule` baked into its config.

        The table is exact at its knots; between them the error of 1,025 knots is 1e-9 to 1e-7 in γ for learned
        schedules, and zero for the linear ones, which need two. `kwargs` are further arguments.
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
        """The levels of a scheduler of diffusers with betas, for the network that was trained with them.

        γ(t) goes through its table, t = i/(T − 1); the network's timestep is the index i, fractional between two of
        them. The last step returns z at its first level, to be decoded. `kwargs` are further arguments.

        Raises: `ValueError` for schedulers without a usable table of betas.
        """
        if isinstance(scheduler, GammaScheduler):
            raise TypeError(f"scheduler must be one of diffusers', got our {type(scheduler).__name__}.")
        gammas = gammas_from_betas(diffusers_betas(scheduler))
        if scheduler.config.get("thresholding", False):
            raise ValueError("thresholding=True scales x̂ by what else is in the image; it has no counterpart here.")
        settings = {
            "prediction_type": scheduler.config.get("prediction_type", "epsilon"),
            "clip_sample": scheduler.config.get("clip_sample", False),
            "clip_sample_range": scheduler.config.get("clip_sample_range", 1.0),
        }
        ends = {"gamma_min": float(gammas[0]), "gamma_max": float(gammas[-1])}
        return cls(len(gammas), trained_gammas=gammas.tolist(), timestep_type="index", **ends, **(settings | kwargs))

    @property
    def final_gamma(self) -> torch.Tensor:
        """γ(0), the level of the z_0 that the last step returns; float64, shape `()`."""
        return self._schedule.ends()[0]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lays out the chain.

        Args:
            num_inference_steps (`int`, *optional*): T, any number ≥ 1; levels γ(1), γ(1 − 1/T), …, γ(1/T), then γ(0).
            device (`str` or `torch.device`, *optional*): where `self.timesteps` goes; γ stays on the CPU in float64.
            timesteps (`Sequence[float]`, *optional*): decreasing timesteps (normalised γ) of one's own; the chain ends
                at γ(0) in any case.
        """
        self._check_num_inference_steps(num_inference_steps, timesteps)
        if timesteps is None:
            n = int(num_inference_steps)
            t = torch.arange(n, 0, -1, dtype=torch.float64) / n
            gammas = self._schedule(t)
            values = self._schedule.timestep(t, gammas).float()
        else:
            values = torch.as_tensor(timesteps, dtype=torch.float64).float()
            gammas = self._gammas_at(values)
            if not bool((gammas > self.final_gamma).all()):
                raise ValueError("timesteps must be above that of γ(0), where the chain ends by itself.")
        self._set_chain(gammas, values, device)

    def _gammas_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.config.timestep_type == "index":
            position = timesteps.detach().cpu().double() / (len(self) - 1)
            if not bool(((position >= 0) & (position <= 1)).all()):
                raise ValueError(f"timesteps must be within [0, {len(self) - 1}], got {timesteps.tolist()}.")
            return self._schedule(position)
        low, high = self.config.gamma_min, self.config.gamma_max
        position = timesteps.detach().cpu().double() / self.config.num_train_timesteps
        gammas = low * (1 - position) + high * position
        gamma_0, gamma_1 = self._schedule.ends()
        slack = 1e-6 * (high - low)  # float32 timesteps may stick out by their rounding
        if not bool(((gammas >= gamma_0 - slack) & (gammas <= gamma_1 + slack)).all()):
            # levels that the network knows but that γ(t) does not reach are fine for add_noise: judge by both ranges
            if not bool(((gammas >= min(low, gamma_0) - slack) & (gammas <= max(high, gamma_1) + slack)).all()):
                raise ValueError(
                    f"timesteps must be within [0, {self.config.num_train_timesteps}], got "
                    f"{float(timesteps.min()):.6g} to {float(timesteps.max()):.6g}; this scheduler's timesteps are "
                    "normalised γ, floats."
                )
        return gammas


class LinearBetaScheduler(GammaScheduler):
    """Ancestral sampling of DDPM with linear betas: integer timesteps, drop-in for `DDPMScheduler` [DDPM §2, §4].

    Equal to diffusers' `DDPMScheduler(variance_type="fixed_small", clip_sample=False)` on the same betas, with float64
    tables. The betas are rescaled by 1000/T (see [`LinearBetaGamma`]). The last step returns the data x̂ itself.

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): first and last β, as for 1,000 steps.
        rescale_betas (`bool`, defaults to `True`): multiply the betas by 1000/T.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`): what the network says.
        clip_sample (`bool`, defaults to `False`): clamp x̂ in each step; changes p(x), so that no likelihood describes
            the samples.
        clip_sample_range (`float`, defaults to 1.0): clamp to ± this.
        algorithm (`"ancestral"`, `"ddim"` or `"dpmsolver++"`, defaults to `"ancestral"`): see [`VDMScheduler`].
        timestep_spacing (`"linspace"`, `"leading"` or `"trailing"`, defaults to `"linspace"`):
            which indices fewer than T steps visit, named as in diffusers. `"leading"` starts below T − 1.

    Raises: `ValueError` for betas outside of (0, 1) and unknown names.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_betas: bool = True,
        prediction_type: PredictionType = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        algorithm: Algorithm = "ancestral",
    ):
        if timestep_spacing not in ("linspace", "leading", "trailing"):
            raise ValueError(
                f"timestep_spacing must be 'linspace', 'leading' or 'trailing', got {timestep_spacing!r}."
            )
        self._schedule = LinearBetaGamma(num_train_timesteps, beta_start, beta_end, rescale_betas)
        self._gammas = self._schedule.table()
        self._init_chain(prediction_type, clip_sample_range)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """As [`GammaScheduler.from_config`]; a table of betas is taken where it is that of linear ones.

        So a scheduler that was swapped for one of diffusers by `from_config` can be swapped back.
        """
        if isinstance(config, dict) and "beta_schedule" in config and config.get("trained_betas") is not None:
            table = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
            first, last, total = config.get("beta_start", 1e-4), config.get("beta_end", 0.02), len(table)
            for rescale in (False, True):
                if total < 2 or (rescale and last * 1000 / total >= 1):
                    continue
                if torch.allclose(table, linear_betas(total, first, last, rescale), rtol=1e-6, atol=0):
                    config = {**config, "trained_betas": None, "rescale_betas": rescale}
                    break
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_noise_schedule(cls, noise_schedule: LinearBetaGamma, **kwargs) -> LinearBetaScheduler:
        """The scheduler of a [`LinearBetaGamma`]; `kwargs` are further arguments, `prediction_type` say."""
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

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lays out a chain of `num_inference_steps` ≤ T steps, or one through decreasing indices of one's own."""
        self._check_num_inference_steps(num_inference_steps, timesteps)
        total = self.config.num_train_timesteps
        if timesteps is None:
            n = int(num_inference_steps)
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
            else:  # rounded before the subtraction, as diffusers does: halves go to the even number
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
