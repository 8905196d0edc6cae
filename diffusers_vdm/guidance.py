"""Guidance: a network whose prediction is moved away from that of a weaker one.

    ε̂ = ε̂_weak + w (ε̂_c − ε̂_weak)                                          [Ho & Salimans 2022, eq. 6, w = 1 + theirs]

The weak prediction is that without the condition c, or with a negative one such as another text, or that of another
network [Karras et al. 2024a]. w = 1 is the
network itself and w = 0 the weak one, both exactly. For a given z_t, x̂ and v are affine functions of ε̂. The weights
above add up to 1, so the formula is the same for all three, and it is applied to what the network predicts.

A guided network is called like the network inside it, so every sampler and the ODE take it. It is not the density of
anything that was trained: bits/dim are those of w = 1.

Papers: Ho & Salimans 2022 (arXiv 2207.12598); Karras et al. 2024a (autoguidance, arXiv 2406.02507); Kynkäänniemi et
al. 2024 (guidance in an interval of noise levels, arXiv 2404.07724).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import call_arguments, denoiser, diffusion
from .conditions import SIZES, conditions_taken, given_conditions, null_conditions, rows_of_conditions
from .diffusers_schedulers import noise_schedule_of
from .diffusion import PredictionType
from .network_inputs import one_for_each
from .noise_schedules import NoiseSchedule


class GuidedNetwork(nn.Module):
    """A network with guidance, called as the network itself.

    Args:
        unet (`nn.Module`): the network.
        noise_schedule ([`NoiseSchedule`]): gives γ of the timesteps; see [`noise_schedule_of`] for a scheduler's.
        guidance_scale (`float`, defaults to 1.0): w ≥ 0.
        guidance_interval (`tuple[float, float]`, *optional*): lowest and highest γ with guidance, all if not given; at
            other noise levels, w is 1.
        autoguidance (`nn.Module`, *optional*): a weaker network, such as a smaller one or an earlier average, instead
            of the same network without its condition. It gets those of the conditions that it takes.
        guider (`diffusers.guiders.BaseGuidance`, *optional*): combines the predictions instead of `guidance_scale` and
            `guidance_interval`. It gets ε̂, whatever the network predicts.
        prediction_type (`str`, defaults to `"epsilon"`): what the network predicts, for `guider`.
        negative_conditions (`dict[str, torch.Tensor]`, *optional*): conditions of the weak prediction, with a row for
            each sample or one for all, instead of the null ones; a text has no other null, see conditions.py.

    Raises: `ValueError` or `TypeError` for arguments that do not fit each other or the networks.
    """

    keeps_float32_inputs = True  # each network casts its own [denoiser.py]

    def __init__(
        self,
        unet: nn.Module,
        noise_schedule: NoiseSchedule,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance: nn.Module | None = None,
        guider: Any = None,
        prediction_type: PredictionType = "epsilon",
        negative_conditions: Mapping[str, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.negative_conditions = given_conditions(negative_conditions or {})
        self.unet, self.autoguidance, self.guider = unet, autoguidance, guider
        self.noise_schedule = noise_schedule
        self.prediction_type: PredictionType = prediction_type
        self.guidance_scale = checked_scale(guidance_scale)
        self.guidance_interval = checked_interval(guidance_interval)
        if guider is not None:
            self._check_guider()
        if autoguidance is not None:
            self._check_autoguidance(autoguidance)

    @property
    def config(self) -> Any:
        """The config of the network."""
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return getattr(self.unet, "dtype", torch.float32)

    @property
    def is_guiding(self) -> bool:
        """Whether the prediction differs from that of the network at any noise level."""
        return self.guider is not None or self.guidance_scale != 1.0

    def check_guidable(self, conditions: Mapping[str, torch.Tensor | None]) -> None:
        """Raises `ValueError` if there is nothing to guide away from for these conditions."""
        if not self.is_guiding or self.autoguidance is not None:
            return
        what = "guider" if self.guider is not None else f"guidance_scale={self.guidance_scale:g}"
        given = given_conditions(conditions)
        if not given:
            raise ValueError(
                f"{what} needs a condition to guide towards, such as class_labels, or autoguidance; got neither."
            )
        if not can_guide(self.unet, given, self.negative_conditions):
            raise ValueError(
                f"{what} needs a network with the null of a condition; this one has none of {', '.join(given)}. "
                "Train one with null_class, null_vectors or null_images=True, as train.py does, pass a negative "
                "text, or use autoguidance."
            )
        for name, value in self.negative_conditions.items():
            wanted = given.get(name)
            if wanted is None or value.shape[1:] != wanted.shape[1:] or len(value) not in (1, len(wanted)):
                expected = tuple(given[name].shape) if name in given else "missing"
                raise ValueError(
                    f"negative {name} must have the shape of {name}, {expected}, got {tuple(value.shape)}."
                )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        return_dict: bool = False,
        **conditions: torch.Tensor | None,
    ) -> tuple[torch.Tensor]:
        """The guided prediction for z_t, in the parameterization of the network, with its channels.

        Args:
            sample (`torch.Tensor` of shape `(B, C, ...)`): z_t.
            timestep (`torch.Tensor` of shape `()` or `(B,)`, or a number): as for the network.
            return_dict (`bool`, defaults to `False`): must be `False`.
            conditions: as for the network.

        Returns: a tuple with a tensor of shape `(B, C, ...)`, or `(B, 2C, ...)` if the network predicts variances,
            which are not guided.
        """
        if return_dict:
            raise ValueError("return_dict must be False for a GuidedNetwork, got True.")
        given = given_conditions(conditions)
        self.check_guidable(given)
        timesteps = one_for_each(timestep, sample)
        if self.guider is not None:
            return (self._by_guider(sample, timesteps, given),)
        rows = self._guided_rows(timesteps)
        if self.guidance_scale == 1.0 or not len(rows):
            return (self._call(sample, timesteps, given),)
        if self.guidance_scale == 0.0 and len(rows) == len(sample):
            return (self._weak(sample, timesteps, given, rows),)
        output, weak = self._both(sample, timesteps, given, rows)
        channels = sample.shape[1]
        strong = output[rows, :channels]
        guided = output.clone()
        guided[rows, :channels] = weak[:, :channels] + self.guidance_scale * (strong - weak[:, :channels])
        return (guided,)

    # ---- the calls -----------------------------------------------------------------------------------------------

    def _call(self, sample, timesteps, conditions) -> torch.Tensor:
        return denoiser.call_network(self.unet, sample, timesteps, **conditions)

    def _weak(self, sample, timesteps, conditions, rows) -> torch.Tensor:
        """The prediction of `rows` to guide away from."""
        sample, timesteps = sample[rows], timesteps[rows]
        if self.autoguidance is None:
            return self._call(sample, timesteps, self._negative(conditions, rows))
        taken = conditions_taken(self.autoguidance)
        given = {name: value for name, value in conditions.items() if name in taken or name not in SIZES}
        if "encoder_hidden_states" not in taken:
            given.pop("encoder_attention_mask", None)
        return denoiser.call_network(self.autoguidance, sample, timesteps, **rows_of_conditions(given, rows))

    def _both(self, sample, timesteps, conditions, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction of all samples, and the weak one of `rows`; one call if one network makes both."""
        if self.autoguidance is not None:
            return self._call(sample, timesteps, conditions), self._weak(sample, timesteps, conditions, rows)
        weak = self._negative(conditions, rows)
        together = {name: torch.cat([value, weak[name]]) for name, value in conditions.items()}
        both = self._call(torch.cat([sample, sample[rows]]), torch.cat([timesteps, timesteps[rows]]), together)
        return both[: len(sample)], both[len(sample) :]

    def _negative(self, conditions, rows) -> dict[str, torch.Tensor]:
        """The conditions of the weak prediction of `rows`."""
        negative = {
            name: value.to(conditions[name]).expand_as(conditions[name])
            for name, value in self.negative_conditions.items()
        }
        return rows_of_conditions(null_conditions(self.unet, conditions) | negative, rows)

    def _guided_rows(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The indices of the samples whose noise level is within the interval."""
        if self.guidance_interval is None:
            return torch.arange(len(timesteps), device=timesteps.device)
        low, high = self.guidance_interval
        gamma_t = self.noise_schedule.gamma_of_timestep(timesteps)
        return ((gamma_t >= low) & (gamma_t <= high)).nonzero()[:, 0].to(timesteps.device)

    def _by_guider(self, sample, timesteps, conditions) -> torch.Tensor:
        """The prediction as combined by a guider of diffusers, which may change the network for each of its calls."""
        gamma_t = self.noise_schedule.gamma_of_timestep(timesteps).to(sample.device)
        every = torch.arange(len(sample), device=sample.device)
        negative = self._negative(conditions, every)
        pairs = {name: (value, negative[name]) for name, value in conditions.items()}
        batches, outputs = self.guider.prepare_inputs(pairs or {"class_labels": (None, None)}), []
        for batch in batches:
            self.guider.prepare_models(self.unet)
            outputs.append(self._call(sample, timesteps, {name: getattr(batch, name) for name in conditions}))
            self.guider.cleanup_models(self.unet)
            prediction = denoiser.Prediction.from_output(outputs[-1], sample, gamma_t, self.prediction_type)
            batch.noise_pred = prediction.eps_hat
        eps_hat = self.guider(batches).pred
        guided = eps_hat
        if self.prediction_type != "epsilon":
            x_hat = diffusion.x_from_eps(sample, eps_hat, gamma_t)
            is_x = self.prediction_type == "sample"
            guided = x_hat if is_x else diffusion.velocity(x_hat, eps_hat, gamma_t)
        channels = sample.shape[1]
        return torch.cat([guided.to(outputs[0].dtype), outputs[0][:, channels:]], dim=1)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_guider(self) -> None:
        if isinstance(self.guider, type):
            raise TypeError(f"guider must be an object, got the class {self.guider.__name__}; create one of it.")
        for name in ("prepare_inputs", "prepare_models", "cleanup_models", "set_state"):
            if not callable(getattr(self.guider, name, None)):
                raise TypeError(f"guider must be one of diffusers.guiders, got a {type(self.guider).__name__}.")
        if self.guidance_scale != 1.0 or self.guidance_interval is not None or self.autoguidance is not None:
            raise ValueError(
                "guider replaces guidance_scale, guidance_interval and autoguidance; set its own arguments instead, "
                f"got guidance_scale={self.guidance_scale:g}, guidance_interval={self.guidance_interval} and "
                f"{'an' if self.autoguidance is not None else 'no'} autoguidance."
            )

    def _check_autoguidance(self, weak: nn.Module) -> None:
        config: Any = getattr(weak, "config", None)
        own: Any = self.config
        if config is None:
            raise TypeError(f"autoguidance must be a network, got a {type(weak).__name__}.")
        denoiser.check_network(weak, self.noise_schedule, self.prediction_type)
        for name in ("in_channels", *SIZES.values()):
            theirs, ours = config.get(name), own.get(name)
            if theirs != ours and not (name != "in_channels" and theirs is None):
                raise ValueError(
                    f"autoguidance must have the {name} of the network, {ours}, got {theirs}; use one for the "
                    "same data."
                )


def guided_network(
    unet: nn.Module,
    scheduler: Any,
    conditions: Mapping[str, torch.Tensor | None],
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    autoguidance: nn.Module | None = None,
    guider: Any = None,
    may_change: bool = False,
    negative_conditions: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """`unet`, within a [`GuidedNetwork`] if these arguments guide it, or if they `may_change` during the steps.

    Raises: `ValueError` or `TypeError` as [`GuidedNetwork`], for arguments without effect, and for networks,
        conditions and schedulers that cannot be guided.
    """
    scale = checked_scale(guidance_scale)
    is_given = guidance_interval is not None or autoguidance is not None or guider is not None
    can_begin = may_change and can_guide(unet, given_conditions(conditions), negative_conditions or {})
    if scale == 1.0 and not is_given and not can_begin:
        return unet
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    schedule = noise_schedule_of(scheduler)
    guided = GuidedNetwork(
        unet, schedule, scale, guidance_interval, autoguidance, guider, prediction_type, negative_conditions
    )
    if is_given and not guided.is_guiding and not may_change:
        name = "guidance_interval" if guidance_interval is not None else "autoguidance"
        raise ValueError(f"{name} has no effect with guidance_scale=1; set guidance_scale as well.")
    if autoguidance is not None and autoguidance.training:
        raise ValueError("autoguidance must not be in training mode, whose dropout is random; call its eval().")
    guided.check_guidable(conditions)
    return guided


def can_guide(
    unet: nn.Module, conditions: Mapping[str, torch.Tensor], negative_conditions: Mapping[str, torch.Tensor]
) -> bool:
    """Whether the network has another prediction without these conditions, or with the negative ones."""
    known = conditions_taken(unet)
    return bool(negative_conditions) or any(known.get(name, False) for name in conditions)


def checked_scale(guidance_scale: Any) -> float:
    """`guidance_scale` as a float; raises `TypeError` or `ValueError` unless it is a finite number of at least 0."""
    scale = call_arguments.real_number("guidance_scale", guidance_scale)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale must be a finite number of at least 0, got {guidance_scale}.")
    return scale


def checked_interval(guidance_interval: Any) -> tuple[float, float] | None:
    """`guidance_interval` as floats; raises `TypeError` or `ValueError` unless it is `None` or two increasing ones."""
    if guidance_interval is None:
        return None
    try:
        low, high = (float(end) for end in guidance_interval)
    except (TypeError, ValueError):
        raise TypeError(
            f"guidance_interval must be the lowest and the highest γ with guidance, got {guidance_interval!r}."
        ) from None
    if not low < high:
        raise ValueError(f"guidance_interval must be two increasing values of γ, got {low:g} and {high:g}.")
    return low, high
