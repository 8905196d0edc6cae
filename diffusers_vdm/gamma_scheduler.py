"""Base class of both schedulers: a chain of noise levels γ, the steps along it, and checks.

γ = −log SNR grows with the noise; a step goes from γ_t down to γ_s. Coefficients are computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from . import call_arguments, denoiser, diffusion, step_selection
from .calibration import Calibration, Variance, check_variance
from .diffusers_schedulers import (
    SAME_AS_FIXED_SMALL,
    arguments_of,
    betas_of_gammas,
    check_keys,
    scheduler_of_gammas,
    unknown_key,
)
from .diffusion import Generators
from .noise_schedules import TableGamma, as_written
from .typed_config import TypedConfig

Algorithm = Literal["ancestral", "ddim", "dpmsolver++"]


@dataclass
class VDMSchedulerOutput(BaseOutput):
    """Output of `step`: z_s, the input of the next step, and x̂, the predicted data; shape `(B, ...)`."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class GammaScheduler(TypedConfig, SchedulerMixin, ConfigMixin):
    """The step, `add_noise` and the checks that both schedulers share; a subclass maps timesteps to γ."""

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    _level_keys: set[str] = set()  # any of these config keys marks the levels as those of this class
    order = 1
    init_noise_sigma = 1.0

    def _gammas_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """float64 γ of `timesteps` of any shape."""
        raise NotImplementedError

    def noise_schedule(self) -> TableGamma:
        """γ(t) as a module without parameters, for the bound and the ODE: [`TableGamma`] or [`LinearBetaGamma`]."""
        return self._schedule

    @property
    def final_gamma(self) -> torch.Tensor:
        """γ of the sample returned by the last step: γ_0 for a VDM, −inf (the data) for DDPM. Shape `()`."""
        raise NotImplementedError

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ at the timesteps 0, 1, …, num_train_timesteps − 1, float64, shape `(num_train_timesteps,)`."""
        return torch.sigmoid(-self._gammas_at(torch.arange(len(self))))

    @property
    def betas(self) -> torch.Tensor:
        """β_i = 1 − ᾱ_i/ᾱ_{i−1} at the integer timesteps, float64, shape `(num_train_timesteps,)`."""
        return betas_of_gammas(self._gammas_at(torch.arange(len(self))))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def to_diffusers(self, scheduler_class: type[SchedulerMixin], **kwargs: Any) -> SchedulerMixin:
        """A diffusers scheduler with the noise levels of this one, see [`scheduler_of_gammas`].

        For i = 0 … `num_train_timesteps` − 1, its timestep i is the level of the network's timestep i. For a
        [`VDMScheduler`] of normalized γ, the levels are therefore uniform in γ from `gamma_min` to just below
        `gamma_max`, whatever its γ(t); levels beyond these configured ends are left out.
        """
        gammas = self._gammas_at(torch.arange(len(self)))
        own = {"prediction_type": self.config.prediction_type}
        if denoiser.is_learned(self.config.variance_type):
            own["variance_type"] = self.config.variance_type
        return scheduler_of_gammas(scheduler_class, gammas, own, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """Returns `sample` unchanged: the process preserves variance, so no scaling is needed."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> VDMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of `algorithm`, by default ancestral: a sample of p(z_s | z_t) [VDM app. A.4, eq. 34].

        z_s = (α_s/α_t)(z_t − c σ_t ε̂) + σ_s √c ε,  c = −expm1(γ_s − γ_t),  ε ~ N(0, I)

        s is the timestep after `timestep` in `self.timesteps`; the last step goes to the end of the chain. With a
        learned `variance_type` the noise has the variance that the network predicts instead of σ_s² c, and with
        `variance="optimal"` the best one, see [`Calibration`].

        Args:
            model_output (`torch.Tensor` of shape `(B, C, ...)` or `(B, 2C, ...)`): the network's output, see
                `prediction_type`. In 2C channels, the second half holds the variance values, which steps without noise
                ignore.
            timestep (`torch.Tensor` of shape `()` or `float`): one of `self.timesteps`, or a value between them.
            sample (`torch.Tensor` of shape `(B, ...)`): z_t.
            generator (`torch.Generator` or a list of B of them, *optional*): with a list, the noise of each sample
                does not depend on the batch that it is in.
            return_dict (`bool`, defaults to `True`): return a [`VDMSchedulerOutput`] instead of a tuple of its parts.

        Raises: `ValueError` for shapes that differ and timesteps outside the schedule.
        """
        gamma_t, gamma_s = self._step_gammas(timestep)
        z_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        prediction = denoiser.Prediction.from_output(model_output, z_t, gamma_t, self.config.prediction_type)
        best_variance = self._calibration if self.config.variance == "optimal" else None
        if self.config.algorithm == "ancestral":
            denoiser.check_variance_values(self.config.variance_type, prediction.variance_values)
            if best_variance is not None:
                best_variance.check_shape(tuple(z_t.shape[1:]))
        x_hat, eps_hat = prediction.x_and_eps()
        if self.config.clip_sample:
            x_hat = x_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        if gamma_s >= gamma_t:  # already at the clean end of the chain
            prev_sample = z_t
        elif self.config.algorithm != "ancestral":
            prev_sample = self._solver_step(z_t, x_hat, eps_hat, gamma_s, gamma_t)
        else:
            if self.config.clip_sample:
                mean, std = diffusion.posterior(z_t, x_hat, gamma_s, gamma_t)
            else:
                mean, std = diffusion.ancestral_step(z_t, eps_hat, gamma_s, gamma_t)
            if float(std) > 0:
                if denoiser.is_learned(self.config.variance_type):
                    std = self._predicted_std(prediction, gamma_s)
                elif best_variance is not None:
                    std = torch.exp(0.5 * best_variance.log_variance(gamma_s, gamma_t)).to(z_t.dtype)
                noise = randn_tensor(z_t.shape, generator=generator, device=z_t.device, dtype=z_t.dtype)
                mean = mean + std.to(z_t.device) * noise
            prev_sample = mean

        prev_sample, x_hat = prev_sample.to(sample.dtype), x_hat.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_hat
        return VDMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_hat)

    def _predicted_std(self, prediction: denoiser.Prediction, gamma_s: torch.Tensor) -> torch.Tensor:
        """Predicted standard deviation of p(z_s | z_t) in each dimension."""
        small = diffusion.posterior_log_variance(gamma_s, prediction.gamma_t)
        large = diffusion.forward_log_variance(gamma_s, prediction.gamma_t)
        values, variance_type = prediction.variance_values, self.config.variance_type
        return torch.exp(0.5 * denoiser.predicted_log_variance(values, variance_type, small, large))

    def _solver_step(self, z_t, x_hat, eps_hat, gamma_s, gamma_t) -> torch.Tensor:
        if self.config.clip_sample:
            eps_hat = diffusion.eps_from_x(z_t, x_hat, gamma_t)
        z_s = diffusion.ddim_step(z_t, eps_hat, gamma_s, gamma_t)
        last, self._last = self._last, (gamma_t, x_hat)
        # no correction for the step to the data, which is infinitely long in log SNR
        if self.config.algorithm == "dpmsolver++" and last is not None and gamma_s.isfinite():
            last_gamma, last_x_hat = last
            # a step much longer than the previous one would extrapolate too far
            near = 0 < gamma_t - gamma_s <= 2 * (last_gamma - gamma_t)
            if near and last_x_hat.shape == x_hat.shape:
                z_s = z_s + diffusion.dpm_solver_2m_correction(x_hat, last_x_hat, gamma_s, gamma_t, last_gamma)
        return z_s

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = α_t x + σ_t ε for data and noise of shape `(B, ...)` and 1 or B timesteps [VDM eq. 1]."""
        gamma_t = self._gammas_at(torch.as_tensor(timesteps)).flatten()
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        return diffusion.q_sample(original_samples.to(dtype), noise.to(dtype), gamma_t).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = α_t ε − σ_t x, the target of v-prediction; `sample` is the clean data x; shapes as in `add_noise`."""
        gamma_t = self._gammas_at(torch.as_tensor(timesteps)).flatten()
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return diffusion.velocity(sample.to(dtype), noise.to(dtype), gamma_t).to(sample.dtype)

    def _init_chain(self, prediction_type: str, clip_sample_range: float, betas: torch.Tensor | None = None) -> None:
        diffusion.check_prediction_type(prediction_type)
        denoiser.check_variance_type(self.config.variance_type)
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {clip_sample_range}.")
        if self.config.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm must be one of {get_args(Algorithm)}, got {self.config.algorithm!r}.")
        self._calibration = self._checked_calibration(self.config.variance, self.config.calibration)
        # `trained_betas` gives diffusers' schedulers these levels in `from_config`; without the list of default
        # values, which would let their defaults replace our values
        table = (self.betas if betas is None else betas).tolist()
        self._internal_dict = FrozenDict(as_written({**self.config, "trained_betas": table}))
        self.num_inference_steps = None
        self.set_timesteps(self.config.num_train_timesteps)
        self.num_inference_steps = None

    def _checked_calibration(self, variance: Variance, calibration: Any) -> Calibration | None:
        """The calibration of a config, which then holds it as JSON."""
        check_variance(variance)
        if variance == "optimal" and calibration is None:
            raise ValueError("variance='optimal' needs a calibration, got none; run `diffusers-vdm calibrate`.")
        if variance == "optimal" and denoiser.is_learned(self.config.variance_type):
            raise ValueError(
                f"variance must be 'posterior' for variance_type={self.config.variance_type!r}, because the network "
                "predicts the variance, got 'optimal'."
            )
        if calibration is None:
            return None
        if not isinstance(calibration, Calibration):
            calibration = Calibration.from_json(calibration)
        self.register_to_config(calibration=calibration.to_json())
        return calibration

    @property
    def calibration(self) -> Calibration | None:
        """mse_ε(γ) of the network, as [`calibrate`] measured it; `None` if the config has none."""
        return self._calibration

    def levels_of_steps(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Increasing γ that a chain may visit, their timesteps, and whether a last step leads from γ_0 to the data."""
        raise NotImplementedError

    def best_timesteps(self, num_steps: int) -> list[float]:
        """The timesteps of T steps with the best bound, by the calibration; for `set_timesteps(timesteps=…)`.

        They are chosen among a few hundred levels by dynamic programming, for the `variance` of this scheduler, see
        [`best_levels`].

        Args:
            num_steps (`int`): T.

        Raises: `ValueError` without a calibration, and for T out of range.
        """
        num_steps = call_arguments.positive_integer("num_steps", num_steps)
        if self._calibration is None:
            raise ValueError("the best timesteps need a calibration, got none; run `diffusers-vdm calibrate`.")
        gammas, timesteps, ends_at_data = self.levels_of_steps()
        # with a table of betas, an extra step leads from its first level to the data
        low, high = 1 + ends_at_data, len(gammas) - 1 + ends_at_data
        if not low <= num_steps <= high:
            raise ValueError(f"num_steps must be within [{low}, {high}] for the best timesteps, got {num_steps}.")
        mse = self._calibration.mse_at(gammas[1:])
        path, _ = step_selection.best_levels(gammas, mse, num_steps - ends_at_data, self.config.variance)
        return timesteps[path if ends_at_data else path[1:]].flip(0).tolist()

    def _set_chain(self, gammas: torch.Tensor, timesteps: torch.Tensor, device) -> None:
        """Sets the chain: decreasing γ (float64, CPU) and their timesteps."""
        self._chain = gammas.tolist()
        self.timesteps = timesteps.to(device)
        self._chain_timesteps = timesteps.tolist()
        self.num_inference_steps = len(self._chain)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # γ and x̂ of the previous step, for second order

    def _step_gammas(self, timestep: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """γ_t of a timestep and γ_s of the next one, float64 of shape `()`."""
        if torch.is_tensor(timestep) and timestep.numel() != 1:
            raise ValueError(f"timestep must be a single value, got shape {tuple(timestep.shape)}.")
        value = float(timestep)
        final_gamma = float(self.final_gamma)
        try:  # exact levels for the chain's own timesteps: float32 timesteps would cost digits of γ_t − γ_s
            i = self._chain_timesteps.index(value)
            gamma_t, rest = self._chain[i], self._chain[i + 1 : i + 2]
        except ValueError:
            gamma_t = float(self._gammas_at(torch.tensor(value, dtype=torch.float64)))
            rest = [gamma for gamma in self._chain if gamma < gamma_t][:1]
        gamma_s = rest[0] if rest else final_gamma
        return torch.tensor(gamma_t, dtype=torch.float64), torch.tensor(gamma_s, dtype=torch.float64)

    def _checked_num_inference_steps(self, num_inference_steps: int | None, timesteps: Sequence | None) -> int:
        """The number of steps of the chain; `ValueError` unless one of the arguments is given and valid."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"pass either num_inference_steps or timesteps, got num_inference_steps={num_inference_steps} and "
                f"timesteps={'None' if timesteps is None else 'a list'}."
            )
        if timesteps is None:
            return call_arguments.positive_integer("num_inference_steps", num_inference_steps)
        return len(call_arguments.decreasing_numbers("timesteps", timesteps))

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """As [`ConfigMixin.from_config`], but an unknown key is an error.

        The config of a diffusers scheduler is accepted if this class supports its noise levels. So a scheduler that
        was swapped for one of `compatibles` by `from_config` can be swapped back with the same levels. Keys that do
        not affect the levels, such as `solver_order`, are ignored.

        Raises: `ValueError` for keys that contradict the levels, and for unknown keys.
        """
        if isinstance(config, dict):
            config = as_written(config)
            check_keys(cls, config, has_levels=bool(cls._level_keys & set(config)))
            known = arguments_of(cls)
            for key, value in kwargs.items():
                if key not in known and not key.startswith("_"):
                    raise ValueError(unknown_key(cls, key, value))
            if config.get("variance_type", "") in SAME_AS_FIXED_SMALL:
                config = {**config, "variance_type": "fixed_small"}
            config = cls._with_levels(config, kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _with_levels(cls, config: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """`config` with its levels given only by arguments of this class; `ValueError` if it defines two sets."""
        raise NotImplementedError


def best_timesteps_of(scheduler: Any, num_steps: int, **changed: Any) -> list[float]:
    """[`GammaScheduler.best_timesteps`] of a scheduler, with some arguments `changed`.

    Raises: `ValueError` for a scheduler of diffusers, and as that method.
    """
    if not isinstance(scheduler, GammaScheduler):
        raise ValueError(
            f"timesteps='best' needs a VDMScheduler or a LinearBetaScheduler, got a {type(scheduler).__name__}; "
            "convert the model."
        )
    chosen: Any = type(scheduler).from_config(scheduler.config, **changed) if changed else scheduler
    return chosen.best_timesteps(num_steps)
