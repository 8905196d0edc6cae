"""The two schedulers: one step over two tables of γ.

[`VDMScheduler`] holds a learned (or linear) γ(t) and hands the network the *normalised γ* as its timestep;
[`LinearBetaScheduler`] holds DDPM's linear betas and hands over integer indices. They share one ancestral step
(diffusion.py), work in float64 on the CPU up to the coefficients, and keep no state but the list of timesteps.

γ = −log SNR grows with the noise; a step goes from γ_t down to γ_s.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from . import diffusion
from .diffusion import Generators, PredictionType
from .noise_schedules import LinearBetaGamma, NoiseSchedule, TableGamma, as_written, check_ends, check_gamma_table

# keys that configs of diffusers carry and that say nothing about γ or the step when they have these values
_HARMLESS_FOREIGN_KEYS = {
    "beta_schedule": "linear",
    "variance_type": ("fixed_small", "fixed_small_log"),
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "trained_betas": None,
    "dynamic_thresholding_ratio": ...,
    "sample_max_value": ...,
    "set_alpha_to_one": True,
}


@dataclass
class VDMSchedulerOutput(BaseOutput):
    """What `step` returns: z_s, the input of the next step, and x̂, the data that the network expects; `(B, ...)`."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class GammaScheduler(SchedulerMixin, ConfigMixin):
    """The step, the noising and the checks that both schedulers share; the subclasses say which γ a timestep has."""

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
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
        """γ of the sample that the last step returns: γ_0 for a VDM, −inf (the data itself) for DDPM. Shape `()`."""
        raise NotImplementedError

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ at the timesteps 0, 1, …, num_train_timesteps − 1, float64, shape `(num_train_timesteps,)`."""
        return torch.sigmoid(-self._gammas_at(torch.arange(len(self))))

    @property
    def betas(self) -> torch.Tensor:
        """β_i = 1 − ᾱ_i/ᾱ_{i−1} at the integer timesteps, float64, shape `(num_train_timesteps,)`."""
        log_alpha_bar = diffusion.log_alpha_squared(self._gammas_at(torch.arange(len(self))))
        return -torch.expm1(torch.diff(log_alpha_bar, prepend=torch.zeros(1, dtype=torch.float64)))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """Returns `sample` as it is: the latents have unit variance at every noise level."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> VDMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step: a draw of p(z_s | z_t) [VDM app. A.4, eq. 34].

        z_s = (α_s/α_t)(z_t − c σ_t ε̂) + σ_s √c ε,  c = −expm1(γ_s − γ_t),  ε ~ N(0, I)

        s is the timestep that follows `timestep` in `self.timesteps`, and after the last one the end of the chain.

        Args:
            model_output (`torch.Tensor` of shape `(B, ...)`): the network's output, see `prediction_type`.
            timestep (`torch.Tensor` of shape `()` or `float`): one of `self.timesteps`, or a value between them.
            sample (`torch.Tensor` of shape `(B, ...)`): z_t.
            generator (`torch.Generator` or a list of B of them, *optional*): with a list, each sample has its own
                noise, whatever batch it is in.
            return_dict (`bool`, defaults to `True`): return a [`VDMSchedulerOutput`] instead of a tuple of its parts.

        Raises: `ValueError` for shapes that differ and timesteps outside of the schedule.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape of sample, got {tuple(model_output.shape)} and "
                f"{tuple(sample.shape)}; a network that also predicts variances must be split first."
            )
        gamma_t, gamma_s = self._step_gammas(timestep)
        z_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x_hat, eps_hat = diffusion.predicted_x_and_eps(
            model_output.to(z_t.dtype), z_t, gamma_t, self.config.prediction_type
        )
        if self.config.clip_sample:
            x_hat = x_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        if gamma_s >= gamma_t:  # already at the clean end of the chain
            prev_sample = z_t
        else:
            if self.config.clip_sample:
                mean, std = diffusion.posterior(z_t, x_hat, gamma_s, gamma_t)
            else:
                mean, std = diffusion.ancestral_step(z_t, eps_hat, gamma_s, gamma_t)
            if float(std) > 0:
                noise = randn_tensor(z_t.shape, generator=generator, device=z_t.device, dtype=z_t.dtype)
                mean = mean + std.to(z_t.device) * noise
            prev_sample = mean

        prev_sample, x_hat = prev_sample.to(sample.dtype), x_hat.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_hat
        return VDMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_hat)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = α_t x + σ_t ε for data and noise of shape `(B, ...)`, at 1 or B timesteps in range [VDM eq. 1]."""
        gamma_t = self._gammas_at(torch.as_tensor(timesteps)).flatten()
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        return diffusion.q_sample(original_samples.to(dtype), noise.to(dtype), gamma_t).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = α_t ε − σ_t x, the target of v-prediction; `sample` is the clean data x, the rest as in `add_noise`."""
        gamma_t = self._gammas_at(torch.as_tensor(timesteps)).flatten()
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return diffusion.velocity(sample.to(dtype), noise.to(dtype), gamma_t).to(sample.dtype)

    def _init_chain(self, prediction_type: str, clip_sample_range: float) -> None:
        diffusion.check_prediction_type(prediction_type)
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {clip_sample_range}.")
        self.num_inference_steps = None
        self.set_timesteps(self.config.num_train_timesteps)
        self.num_inference_steps = None

    def _set_chain(self, gammas: torch.Tensor, timesteps: torch.Tensor, device) -> None:
        """Fixes the chain: decreasing γs (float64, CPU) and the timesteps that stand for them."""
        self._chain = gammas.tolist()
        self.timesteps = timesteps.to(device)
        self._chain_timesteps = timesteps.tolist()
        self.num_inference_steps = len(self._chain)

    def _step_gammas(self, timestep: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """γ_t of a timestep and γ_s of the one after it, float64 of shape `()`."""
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

    def _check_num_inference_steps(self, num_inference_steps: int | None, timesteps: Sequence | None) -> None:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"give either num_inference_steps or timesteps, got num_inference_steps={num_inference_steps} and "
                f"timesteps={'None' if timesteps is None else 'a list'}."
            )
        if timesteps is None:
            number = isinstance(num_inference_steps, int | float) and math.isfinite(num_inference_steps)
            if not number or num_inference_steps < 1 or num_inference_steps % 1:
                raise ValueError(f"num_inference_steps must be a positive integer, got {num_inference_steps!r}.")
        else:
            values = [float(t) for t in timesteps]
            if not values or any(not b < a for a, b in zip(values, values[1:], strict=False)):
                raise ValueError(f"timesteps must be a decreasing list of at least one value, got {values[:8]}.")

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """As [`ConfigMixin.from_config`], but a key that this class does not know is an error, not a shrug.

        Configs of diffusers' own schedulers are taken where they describe the same process; `ValueError` else.
        """
        if isinstance(config, dict):
            config = as_written(config)
            cls._refuse_unknown_keys({**config, **kwargs})
            if "beta_schedule" in config and "rescale_betas" not in kwargs:
                config.setdefault("rescale_betas", False)  # diffusers never rescales, whatever the number of steps
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _refuse_unknown_keys(cls, config: dict) -> None:
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        source = config.get("_class_name", "scheduler's")
        for key, value in config.items():
            if key in known or key.startswith("_") or (key == "rescale_betas" and "beta_schedule" in config):
                continue
            if key.startswith("beta_"):
                if "beta_start" in known and _HARMLESS_FOREIGN_KEYS.get(key) == value:
                    continue
                raise ValueError(
                    f"{cls.__name__} cannot take its noise levels from a {source} config with {key}={value!r}; "
                    "linear betas go with LinearBetaScheduler, a table of γ with VDMScheduler(trained_gammas=…)."
                )
            if key in _HARMLESS_FOREIGN_KEYS:
                allowed = _HARMLESS_FOREIGN_KEYS[key]
                scalar = value is None or isinstance(value, str | int | float)  # betas may be an array
                if allowed is ... or (scalar and value in (allowed if isinstance(allowed, tuple) else (allowed,))):
                    continue
                raise ValueError(
                    f"{cls.__name__} cannot honour {key}={value!r} of a {source} config; it knows only {allowed!r}."
                )
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it knows {sorted(known)}."
            raise ValueError(f"{cls.__name__} does not know the config key {key!r} (value {value!r}); {hint}")


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
    ):
        check_ends(gamma_min, gamma_max)
        table = [gamma_min, gamma_max] if trained_gammas is None else list(trained_gammas)
        if trained_gammas is not None:
            check_gamma_table(torch.tensor(table, dtype=torch.float64))
            self.register_to_config(trained_gammas=[float(gamma) for gamma in table])
        self._schedule = TableGamma(table, gamma_min, gamma_max, num_train_timesteps)
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
    ):
        if timestep_spacing not in ("linspace", "leading", "trailing"):
            raise ValueError(
                f"timestep_spacing must be 'linspace', 'leading' or 'trailing', got {timestep_spacing!r}."
            )
        self._schedule = LinearBetaGamma(num_train_timesteps, beta_start, beta_end, rescale_betas)
        self._gammas = self._schedule.table()
        self._init_chain(prediction_type, clip_sample_range)

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
