"""The network for texts: diffusers' `UNet2DConditionModel` with the additions of the VDM network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name in the module
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from .network_inputs import (
    check_cond_images,
    check_condition_arguments,
    check_sample,
    condition_channels,
    condition_features,
)
from .unet import fourier_features, num_resolutions
from .whole_models import WholeModelMixin


def _with_arguments_of(parent: type) -> Callable[[Callable], Callable]:
    """Lets `inspect.signature`, by which diffusers finds the arguments of a config, see those of `parent` as well."""

    def decorate(init: Any) -> Any:
        own = [part for part in inspect.signature(init).parameters.values() if part.kind is not part.VAR_KEYWORD]
        named = {**inspect.signature(parent.__init__).parameters, **{part.name: part for part in own}}
        first = named.pop("self")
        others = (part.replace(kind=part.KEYWORD_ONLY) for part in named.values())
        init.__signature__ = inspect.Signature([first, *others])
        return init

    return decorate


class VDMUNet2DConditionModel(WholeModelMixin, UNet2DConditionModel):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A `UNet2DConditionModel`, which attends to embedded texts, with Fourier features and an input residual.

    The arguments of `UNet2DConditionModel` keep their meaning, except that images have 3 channels by default.
    Timesteps may be fractional.

    Args (additions):
        fourier_exponents, input_residual, cond_channels, null_images: as in [`VDMUNet2DModel`].
        zero_init (`bool`, defaults to `True`): zero weights in the last layer, so that a new network returns its input
            (with `input_residual`) or 0.
    """

    keeps_float32_inputs = True  # in any dtype, because the Fourier features need the precision [denoiser.py]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "conv_in"]

    @register_to_config
    @_with_arguments_of(UNet2DConditionModel)
    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        fourier_exponents: tuple[float, ...] = (),
        input_residual: bool = False,
        zero_init: bool = True,
        cond_channels: int | None = None,
        null_images: bool = False,
        **arguments: Any,
    ):
        if input_residual and in_channels != out_channels:
            raise ValueError(
                f"input_residual needs in_channels == out_channels, got {in_channels} and {out_channels}."
            )
        check_condition_arguments(cond_channels=cond_channels, null_images=null_images)
        super().__init__(in_channels=in_channels, out_channels=out_channels, **arguments)
        if fourier_exponents or cond_channels:
            features = in_channels * (1 + 2 * len(fourier_exponents)) + condition_channels(cond_channels, null_images)
            self.conv_in = nn.Conv2d(features, self.config.block_out_channels[0], kernel_size=3, padding=1)
        if zero_init:
            last: Any = self.conv_out
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        cond_images: torch.Tensor | None = None,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """The network's prediction for noisy images with texts.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): z_t, in float32 also for a half-precision network.
            timestep (`torch.Tensor` of shape `()` or `(B,)`, or a number): the scheduler's (fractional) timestep.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`): the embedded tokens.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): classes, as in `UNet2DConditionModel`.
            encoder_attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for each token that counts; all by
                default.
            return_dict (`bool`, defaults to `True`): return a `UNet2DConditionOutput` instead of a tuple.
            cond_images (`torch.Tensor` of shape `(B, cond_channels, h, w)`, *optional*): as in [`VDMUNet2DModel`].

        Returns: `UNet2DConditionOutput` or a tuple of the output, `(B, out_channels, H, W)`, dtype of `sample`.
        Raises: `ValueError` for conditions of other sizes.
        """
        config: Any = self.config
        check_sample(config, sample)
        check_cond_images(config, sample, cond_images)
        expected = (len(sample), config.cross_attention_dim)
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[::2] != expected:
            raise ValueError(
                f"encoder_hidden_states must have shape ({expected[0]}, L, {expected[1]}), got "
                f"{tuple(encoder_hidden_states.shape)}; use the text encoder that the network was trained with."
            )
        hidden = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if config.fourier_exponents:
            hidden = torch.cat([hidden, fourier_features(hidden, config.fourier_exponents)], dim=1)
        if config.cond_channels:
            hidden = torch.cat([hidden, condition_features(config, sample, cond_images)], dim=1)
        output = (
            super()
            .forward(
                hidden.to(self.dtype),
                timestep,
                encoder_hidden_states.to(self.dtype),
                class_labels=class_labels,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
            .to(sample.dtype)
        )
        if config.input_residual:
            output = output + sample
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def text_arguments(size: tuple[int, int], width: int, cross_attention_dim: int) -> dict[str, Any]:
    """Arguments of [`VDMUNet2DConditionModel`] for images of this size.

    They have the levels of [`num_resolutions`]. Those of at most 16 pixels attend to the text. `width` is the number
    of channels of the first level; the others have twice as many.
    """
    levels = num_resolutions(size)
    attends = [min(size) >> i <= 16 for i in range(levels)]
    attends[-1] = True
    return {
        "block_out_channels": tuple(width * min(2**i, 2) for i in range(levels)),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "layers_per_block": 2,
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": max(1, width // 32),  # the number of heads, see UNet2DConditionModel
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "input_residual": True,
    }
