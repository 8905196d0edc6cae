"""The prediction of a network for a noisy image: x̂, ε̂ and, if the network predicts it, the variance of a step.

Only this module calls a network. The output channels for images of C channels:

* C channels are the prediction, as given by `prediction_type`.
* 2C channels are the prediction, followed by values for the variance of p(z_s | z_t) [Nichol & Dhariwal 2021].
* The variance matters in an ancestral step and in the bound by all terms. There, `variance_type` must be a learned one
  if and only if the network returns variance values. Everything else (training, the bound by Monte Carlo, the ODE,
  deterministic steps) uses only the prediction and ignores them.

Papers: Nichol & Dhariwal 2021, "Improved DDPM" (arXiv 2102.09672).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from . import diffusion
from .diffusion import PredictionType

VarianceType = Literal["fixed_small", "learned", "learned_range"]


def working_dtype(unet: nn.Module) -> torch.dtype:
    """The dtype of data and latents: that of the network, but at least float32, because bfloat16 would round them."""
    return torch.promote_types(getattr(unet, "dtype", torch.float32), torch.float32)


def call_network(
    unet: nn.Module, z_t: torch.Tensor, timesteps: torch.Tensor, **conditions: torch.Tensor | None
) -> torch.Tensor:
    """The raw output of a network, with all channels, in the dtype of `z_t`.

    A network that sets `keeps_float32_inputs`, such as [`VDMUNet2DModel`], gets `z_t` unchanged. For other networks,
    such as those of diffusers, `z_t` is cast to the dtype of the network, because they do not cast their input.

    Args:
        unet (`nn.Module`): called as `unet(z_t, timesteps, return_dict=False, …)[0]`.
        z_t (`torch.Tensor` of shape `(B, C, ...)`): latents.
        timesteps (`torch.Tensor` of shape `()` or `(B,)`): from `NoiseSchedule.timestep` or a scheduler.
        conditions: other arguments of the network, such as `class_labels`; those that are `None` are left out.
    """
    given = {name: value for name, value in conditions.items() if value is not None}
    keeps = getattr(unet, "keeps_float32_inputs", False)
    model_input = z_t if keeps else z_t.to(getattr(unet, "dtype", z_t.dtype))
    return unet(model_input, timesteps, return_dict=False, **given)[0].to(z_t.dtype)


def check_network(
    unet: nn.Module, timesteps: Any, prediction_type: str = "epsilon", num_levels: int | None = None
) -> None:
    """Raises `ValueError` if a network that knows γ of its timesteps is used with others, or with other data; and for
    a guided network, which is the density of nothing that was trained.

    A network knows γ if its config has `gamma_min`, as that of [`VDMMultiscale2DModel`] does. Other networks pass.

    Args:
        unet (`nn.Module`): the network.
        timesteps ([`NoiseSchedule`] or scheduler): the source of its timesteps.
        prediction_type (`str`, defaults to `"epsilon"`): what its output is used as; such a network predicts ε.
        num_levels (`int`, *optional*): levels of the data.
    """
    if getattr(unet, "is_guiding", False):
        raise ValueError(
            "unet must not be guided: bits/dim are those of guidance_scale=1; pass the network inside of the "
            f"{type(unet).__name__}."
        )
    known = getattr(unet, "config", None) or {}
    if known.get("gamma_min") is None:
        return
    source, used = type(timesteps).__name__, timesteps.config
    names = ("gamma_min", "gamma_max", "num_train_timesteps")
    if used.get("timestep_type", "gamma") != "gamma" or any(name not in used for name in names):
        raise ValueError(
            f"unet, a {type(unet).__name__}, needs timesteps that are normalized γ, got those of a {source}; use a "
            "VDMScheduler, or a noise schedule such as MonotoneGammaNetwork."
        )
    differ = [f"{name}={used[name]} instead of {known[name]}" for name in names if used[name] != known[name]]
    if differ:
        raise ValueError(
            f"unet, a {type(unet).__name__}, was built for other timesteps than those of this {source}: "
            f"{', '.join(differ)}; build both with the same values."
        )
    if prediction_type != "epsilon":
        raise ValueError(f"prediction_type must be 'epsilon' for a {type(unet).__name__}, got {prediction_type!r}.")
    if num_levels is not None and num_levels != known["num_levels"]:
        raise ValueError(
            f"num_levels must be that of the network, {known['num_levels']}, got {num_levels}; build the network with "
            f"num_levels={num_levels}."
        )


def split_output(output: torch.Tensor, z_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prediction, and the variance values or `None`, each of the shape of `z_t`.

    Raises: `ValueError` unless `output` has the shape of `z_t`, or that shape with twice the channels.
    """
    if output.shape == z_t.shape:
        return output, None
    channels = z_t.shape[1] if z_t.ndim > 1 else 0
    if channels and output.shape == (z_t.shape[0], 2 * channels, *z_t.shape[2:]):
        return output[:, :channels], output[:, channels:]
    raise ValueError(
        f"the network returned an output (model_output) of shape {tuple(output.shape)} for latents (sample) of "
        f"{tuple(z_t.shape)}: it must have their shape, or twice their channels if it also predicts variances."
    )


@dataclass(frozen=True)
class Prediction:
    """The output of a network for z_t; x̂ and ε̂ are computed on demand.

    Attributes:
        output (`torch.Tensor` of shape `(B, C, ...)`): the prediction, as given by `prediction_type`.
        variance_values (`torch.Tensor` of shape `(B, C, ...)` or `None`): the second half of 2C channels, see
            [`predicted_log_variance`].
        z_t (`torch.Tensor` of shape `(B, C, ...)`): the latents.
        gamma_t (`torch.Tensor` of shape `()` or `(B,)`): their noise level.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`): what `output` is.
    """

    output: torch.Tensor
    variance_values: torch.Tensor | None
    z_t: torch.Tensor
    gamma_t: torch.Tensor
    prediction_type: PredictionType

    @classmethod
    def from_output(
        cls, output: torch.Tensor, z_t: torch.Tensor, gamma_t: torch.Tensor, prediction_type: PredictionType
    ) -> Prediction:
        """From a raw output with C or 2C channels; raises `ValueError` for other shapes."""
        diffusion.check_prediction_type(prediction_type)
        prediction, values = split_output(output.to(z_t.dtype), z_t)
        return cls(prediction, values, z_t, gamma_t, prediction_type)

    @property
    def x_hat(self) -> torch.Tensor:
        """The predicted data; shape of `z_t`."""
        return self.x_and_eps()[0]

    @property
    def eps_hat(self) -> torch.Tensor:
        """The predicted noise; shape of `z_t`."""
        # not computed through x̂, which would lose digits at low noise
        return self.output if self.prediction_type == "epsilon" else self.x_and_eps()[1]

    def x_and_eps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(x_hat, eps_hat)`, computed together."""
        return diffusion.predicted_x_and_eps(self.output, self.z_t, self.gamma_t, self.prediction_type)


def predict(
    unet: nn.Module,
    z_t: torch.Tensor,
    gamma_t: torch.Tensor,
    timesteps: torch.Tensor,
    prediction_type: PredictionType = "epsilon",
    **conditions: torch.Tensor | None,
) -> Prediction:
    """One call of a network; arguments as in [`call_network`] and [`Prediction`].

    Raises: `ValueError` for another `prediction_type`, and for an output of the wrong shape.
    """
    output = call_network(unet, z_t, timesteps, **conditions)
    return Prediction.from_output(output, z_t, gamma_t, prediction_type)


# ---- the variance of p(z_s | z_t) --------------------------------------------------------------------------------


def is_learned(variance_type: str | None) -> bool:
    """Whether the network predicts the variance: `"learned"` or `"learned_range"`."""
    return variance_type in ("learned", "learned_range")


def check_variance_type(variance_type: str) -> None:
    """Raises `ValueError` unless `variance_type` is one of [`VarianceType`]."""
    if variance_type not in get_args(VarianceType):
        raise ValueError(f"variance_type must be one of {get_args(VarianceType)}, got {variance_type!r}.")


def check_variance_values(variance_type: str, values: torch.Tensor | None) -> None:
    """Raises `ValueError` unless the network predicts variances if and only if `variance_type` is a learned one."""
    if is_learned(variance_type) and values is None:
        raise ValueError(
            f"variance_type={variance_type!r} needs a network with twice the channels of its input, got one that "
            "predicts no variances; set variance_type='fixed_small' in the scheduler."
        )
    if not is_learned(variance_type) and values is not None:
        raise ValueError(
            f"variance_type={variance_type!r} needs a network with the channels of its input, got twice as many; "
            "remove the predicted variances from the output, or set variance_type='learned_range' (or 'learned') in "
            "the scheduler to use them."
        )


def predicted_log_variance(
    values: torch.Tensor | None, variance_type: str, small: torch.Tensor, large: torch.Tensor
) -> torch.Tensor:
    """The predicted log Var p(z_s | z_t), interpreted as in diffusers' DDPMScheduler.

    `"learned_range"`: values from −1 to 1 interpolate from `small` to `large` [Nichol & Dhariwal 2021, eq. 15].
    `"learned"`: the values are the variances.

    Args:
        values (`torch.Tensor` of shape `(B, C, ...)`): the second half of the network's channels.
        variance_type (`"learned"` or `"learned_range"`): the meaning of `values`.
        small, large (`torch.Tensor` of shape `()`): `posterior_log_variance` and `forward_log_variance` of the step.

    Returns: `torch.Tensor` of the shape of `values`.
    Raises: `ValueError` if the network has no such channels.
    """
    if values is None:
        raise ValueError(f"values must be predicted by the network for variance_type={variance_type!r}, got None.")
    if variance_type == "learned":
        return torch.log(values)
    share = (values + 1) / 2
    return share * diffusion.expand_like(large, values) + (1 - share) * diffusion.expand_like(small, values)
