"""A network that reaches a given bits/dim with less computation than the papers' networks.

It differs from [`VDMUNet2DModel`] in four ways, each measured in benchmarks/README.md:

* Its input holds differences of neighboring values in units of the noise. At low noise, where most of the bits are,
  these are what tells noise from data, and they look alike at every noise level.
* Its output passes through the mean of the levels near x̂ [`diffusion.eps_of_levels`], which is exact for integers
  under low noise, so that the network needs no Fourier features to learn it. For data of few levels, it can predict
  the probability of each level instead [`diffusion.eps_of_level_logits`].
* Most of its work is at low resolution, in a residual stream: each level adds to the one above it, and no block sees a
  concatenation of two.
* Scale and shift by the time embedding in each block.

It therefore knows the noise level γ of each timestep, and the levels of the data; both are in its config.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name in the module
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from . import diffusion
from .network_inputs import (
    add_vector_embedding,
    check_condition_arguments,
    check_inputs,
    condition_channels,
    condition_features,
    embed,
    one_for_each,
)
from .noise_schedules import check_ends, check_num_train_timesteps
from .unet import ImageAttnProcessor, check_groups, check_preset, check_size, num_resolutions
from .whole_models import WholeModelMixin


class VDMMultiscale2DModel(WholeModelMixin, ConfigMixin, AttentionMixin):
    """Predicts ε̂ from z_t and the timestep of a [`NoiseSchedule`] with the same γ_min and γ_max.

    Level i has `block_out_channels[i]` channels at 1/2^i of the resolution. `layers_per_block[i]` residual blocks go
    down, and as many come up; at the lowest level each block is followed by attention.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*): size of the images.
        in_channels (`int`, defaults to 3): channels of the images.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 128)`): channels of each level.
        layers_per_block (`int` or `tuple[int, ...]`, defaults to `(2, 2, 1)`): residual blocks of each level.
        attention_head_dim (`int`, defaults to 32): channels of an attention head.
        norm_num_groups (`int`, defaults to 8): groups of each GroupNorm, at least two channels each.
        norm_eps (`float`, defaults to 1e-6): ε of each GroupNorm.
        dropout (`float`, defaults to 0.0): dropout in each residual block.
        conv_in_kernel, conv_out_kernel (`int`, default to 3): odd sizes of the kernels of the first and the last
            convolution.
        num_difference_filters (`int`, defaults to 24): number of 3×3 filters for the differences, or 0 for none.
        num_levels (`int`, defaults to 256): levels of the data.
        predict_levels (`bool`, defaults to `True`): pass the output through the mean of the levels near x̂.
        level_logits (`bool`, defaults to `False`): predict the probability of each level instead of x̂, for data of few
            levels [`diffusion.eps_of_level_logits`]; `predict_levels` and `data_variance` have no effect then.
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0): γ at the timesteps 0 and `num_train_timesteps`, as
            configured in the noise schedule.
        num_train_timesteps (`int`, defaults to 1000): scale of the timestep.
        data_variance (`float`, defaults to 0.25): E[x²]; without training, ε̂ is the best linear prediction for
            independent values of this variance.
        num_augmentation_flags (`int`, defaults to 0): inputs of the time embedding for how an image was augmented, so
            that augmentations do not change the distribution of images as they are, whose inputs are 0. train.py sets
            1 input (whether) or 6 (how).
        num_class_embeds, null_class, cond_dim, cond_mean, cond_std, null_vectors, cond_channels, null_images: as in
            [`VDMUNet2DModel`].
    """

    keeps_float32_inputs = True  # in any dtype, because differences are divided by the noise [denoiser.py]
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "cond_embedding", "conv_in"]
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _repeated_blocks = ["ResnetBlock2D", "Attention"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int | tuple[int, ...] = (2, 2, 1),
        attention_head_dim: int = 32,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        num_difference_filters: int = 24,
        num_levels: int = 256,
        predict_levels: bool = True,
        level_logits: bool = False,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        num_train_timesteps: int = 1000,
        data_variance: float = 0.25,
        num_augmentation_flags: int = 0,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        cond_dim: int | None = None,
        cond_mean: tuple[float, ...] | None = None,
        cond_std: tuple[float, ...] | None = None,
        null_vectors: bool = False,
        cond_channels: int | None = None,
        null_images: bool = False,
    ):
        super().__init__()
        check_condition_arguments(cond_dim, cond_mean, cond_std, null_vectors, cond_channels, null_images)
        check_ends(gamma_min, gamma_max)
        check_num_train_timesteps(num_train_timesteps)
        layers = _layers(layers_per_block, len(block_out_channels))
        _check_multiscale_arguments(
            sample_size, block_out_channels, attention_head_dim, norm_num_groups, num_levels, num_difference_filters,
            data_variance, null_class, num_class_embeds, conv_in_kernel, conv_out_kernel,
        )  # fmt: skip
        first, embedding = block_out_channels[0], 4 * block_out_channels[0]
        self.gradient_checkpointing = False
        self.time_proj = Timesteps(2 * first, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(2 * first + num_augmentation_flags, embedding)
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, embedding)
        add_vector_embedding(self, cond_dim, null_vectors, embedding)
        if num_difference_filters:
            self.difference_filters = nn.Parameter(torch.empty(num_difference_filters, in_channels, 3, 3))
            # normalized when used, so this norm only sets how fast they turn: from a larger one, they hardly learn
            nn.init.kaiming_uniform_(self.difference_filters, a=math.sqrt(5))
        features = in_channels + num_difference_filters + condition_channels(cond_channels, null_images)
        self.conv_in = nn.Conv2d(features, first, conv_in_kernel, padding=conv_in_kernel // 2)

        def block(channels: int) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels=channels,
                temb_channels=embedding,
                groups=norm_num_groups,
                eps=norm_eps,
                dropout=dropout,
                time_embedding_norm="scale_shift",
            )

        def attention(channels: int) -> Attention:
            return Attention(
                channels,
                heads=channels // attention_head_dim,
                dim_head=attention_head_dim,
                norm_num_groups=norm_num_groups,
                eps=norm_eps,
                bias=True,
                residual_connection=True,
                _from_deprecated_attn_block=True,
            )

        upper = list(zip(block_out_channels[:-1], block_out_channels[1:], layers[:-1], strict=True))
        lowest = block_out_channels[-1]
        self.down_blocks = nn.ModuleList(nn.ModuleList(block(c) for _ in range(n)) for c, _, n in upper)
        self.downsamplers = nn.ModuleList(nn.Conv2d(4 * c, below, kernel_size=1) for c, below, _ in upper)
        self.mid_blocks = nn.ModuleList(block(lowest) for _ in range(layers[-1]))
        self.attentions = nn.ModuleList(attention(lowest) for _ in range(layers[-1]))
        self.upsamplers = nn.ModuleList(nn.Conv2d(below, 4 * c, kernel_size=1) for c, below, _ in upper)
        self.up_blocks = nn.ModuleList(nn.ModuleList(block(c) for _ in range(n)) for c, _, n in upper)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, first, eps=norm_eps)
        outputs = in_channels * (num_levels if level_logits else 1)
        self.conv_out = nn.Conv2d(first, outputs, conv_out_kernel, padding=conv_out_kernel // 2)
        for name, module in self.named_modules():
            if name.endswith((".conv2", ".time_emb_proj", ".to_out.0")) or module is self.conv_out:
                ends: Any = module
                nn.init.zeros_(ends.weight)
                nn.init.zeros_(ends.bias)
        processor: Any = ImageAttnProcessor()
        self.set_attn_processor(processor)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        augmentation_flags: torch.Tensor | None = None,
        return_dict: bool = True,
        cond_vectors: torch.Tensor | None = None,
        cond_images: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """ε̂ for noisy images.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): z_t, in float32 also for a half-precision network.
            timestep (`torch.Tensor` of shape `()` or `(B,)`, or a number): the schedule's (fractional) timestep.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): classes; optional only with `null_class`.
            augmentation_flags (`torch.Tensor` of shape `(B, num_augmentation_flags)`, *optional*, defaults to zeros):
                how the images were augmented; `(B,)` for a single flag.
            return_dict (`bool`, defaults to `True`): return a `UNet2DOutput` instead of a tuple.
            cond_vectors, cond_images: as in [`VDMUNet2DModel.forward`].

        Returns: `UNet2DOutput` or a tuple with ε̂, `(B, C, H, W)`, in the dtype of `sample`.
        Raises: `ValueError` for sizes that cannot be halved at each level, and for unsupported conditions or flags.
        """
        check_inputs(self, sample, class_labels, augmentation_flags, cond_vectors, cond_images)
        timesteps = one_for_each(timestep, sample)
        z_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        gamma_t = self.gamma_of_timestep(timesteps)
        emb = embed(self, timesteps, class_labels, augmentation_flags, cond_vectors)

        features = [z_t, self._differences(z_t, gamma_t)] if self.config.num_difference_filters else [z_t]
        if self.config.cond_channels:
            features.append(condition_features(self.config, z_t, cond_images))
        hidden = self.conv_in(torch.cat(features, dim=1).to(self.dtype))
        streams = []
        for blocks, downsampler in zip(self.down_blocks, self.downsamplers, strict=True):
            hidden = self._run(blocks, hidden, emb)
            streams.append(hidden)
            hidden = downsampler(F.pixel_unshuffle(hidden, 2))
        for block, attention in zip(self.mid_blocks, self.attentions, strict=True):
            hidden = attention(self._run([block], hidden, emb))
        for i in reversed(range(len(streams))):
            hidden = streams[i] + F.pixel_shuffle(self.upsamplers[i](hidden), 2)
            hidden = self._run(self.up_blocks[i], hidden, emb)
        output = self.conv_out(F.silu(self.conv_norm_out(hidden))).to(z_t.dtype)

        if self.config.level_logits:
            logits = output.unflatten(1, (z_t.shape[1], -1)).movedim(2, -1)
            eps_hat = diffusion.eps_of_level_logits(z_t, logits, gamma_t)
        else:
            eps_hat = output + self._linear_prediction(z_t, gamma_t)
            if self.config.predict_levels:
                eps_hat = diffusion.eps_of_levels(z_t, eps_hat, gamma_t, self.config.num_levels)
        eps_hat = eps_hat.to(sample.dtype)
        return UNet2DOutput(sample=eps_hat) if return_dict else (eps_hat,)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> VDMMultiscale2DModel:
        """A new network of one of `MULTISCALE_PRESETS`; `overrides` replace its arguments."""
        check_preset("VDMMultiscale2DModel", preset, MULTISCALE_PRESETS)
        return cls(**{**MULTISCALE_PRESETS[preset], **overrides})

    def gamma_of_timestep(self, timesteps: torch.Tensor) -> torch.Tensor:
        """γ of the schedule's timesteps, the inverse of [`NoiseSchedule.timestep`]; float64, shape of `timesteps`."""
        ends = (self.config.gamma_min, self.config.gamma_max)
        return diffusion.gamma_of_timestep(timesteps, *ends, self.config.num_train_timesteps)

    def _differences(self, z_t: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
        """asinh of the filtered z_t in units of the noise: `(B, num_difference_filters, H, W)`.

        Each filter sums to zero over its taps, so flat areas give 0 at any brightness, and has norm 1, so white noise
        of z_t gives a variance of 1.
        """
        with torch.autocast(z_t.device.type, enabled=False):  # half precision would round differences to nothing
            filters = self.difference_filters.to(z_t.dtype)
            filters = filters - filters.mean((1, 2, 3), keepdim=True)
            filters = filters / filters.square().sum((1, 2, 3), keepdim=True).sqrt()
            return torch.asinh(F.conv2d(_padded(z_t), filters) / diffusion.expand_like(diffusion.sigma(gamma_t), z_t))

    def _linear_prediction(self, z_t: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
        """σ z_t/(α² v + σ²), the linear prediction of ε with the least error for independent values of variance v."""
        power = torch.sigmoid(-gamma_t) * self.config.data_variance + torch.sigmoid(gamma_t)
        return diffusion.expand_like(diffusion.sigma(gamma_t) / power, z_t) * z_t

    def _run(self, blocks: Any, hidden: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                checkpointed: Any = self._gradient_checkpointing_func
                hidden = checkpointed(block, hidden, emb)
            else:
                hidden = block(hidden, emb)
        return hidden


MULTISCALE_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},  # train.py adds `fast_arguments` for the data
    "digits-fast": {
        "sample_size": 8,
        "in_channels": 1,
        "block_out_channels": (32, 64),
        "layers_per_block": (1, 2),
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "num_levels": 17,
        "level_logits": True,
        "gamma_min": -7.5,
        "num_augmentation_flags": 6,
        "dropout": 0.1,
    },
    "cifar10-fast": {"sample_size": 32},
    "imagenet32-fast": {"sample_size": 32, "block_out_channels": (48, 96, 192)},
}


def fast_arguments(size: tuple[int, int], num_levels: int, num_images: int | None) -> dict[str, Any]:
    """Arguments of [`VDMMultiscale2DModel`] for images of this size, of which there are `num_images` for training.

    They have the levels of [`num_resolutions`]; images of 32×32 get the three of `cifar10-fast`. Fewer than 10,000
    images get dropout, because the network would learn them by heart. The output of values of at most 32 levels is the
    probability of each level.
    """
    levels = num_resolutions(size)
    return {
        "block_out_channels": channels_of(32, levels),
        "layers_per_block": (2,) * (levels - 1) + (1,) if levels > 1 else (3,),
        "level_logits": num_levels <= 32,
        "dropout": 0.1 if num_images is not None and num_images < 10_000 else 0.0,
    }


def channels_of(width: int, num_levels: int) -> tuple[int, ...]:
    """`width` channels at the first level, twice as many at each level below, and at most eight times as many."""
    return tuple(width * min(2**i, 8) for i in range(num_levels))


def _padded(z_t: torch.Tensor) -> torch.Tensor:
    """z_t with its border values repeated once."""
    if z_t.device.type == "cpu" and not torch.compiler.is_compiling():
        return F.pad(z_t, (1, 1, 1, 1), mode="replicate")
    # On a GPU, the gradient of `F.pad` is a sum in any order, so a run would not be repeated bit for bit. Inductor
    # expects another memory layout of that gradient than it has on a CPU (PyTorch 2.13).
    z_t = torch.cat([z_t[..., :1, :], z_t, z_t[..., -1:, :]], dim=-2)
    return torch.cat([z_t[..., :1], z_t, z_t[..., -1:]], dim=-1)


def _layers(layers_per_block: int | tuple[int, ...], num_resolutions: int) -> tuple[int, ...]:
    """The number of blocks of each level."""
    if isinstance(layers_per_block, int):
        layers_per_block = (layers_per_block,) * num_resolutions
    layers = tuple(layers_per_block)
    if len(layers) != num_resolutions or not all(isinstance(n, int) and n >= 1 for n in layers):
        raise ValueError(
            f"layers_per_block must be a positive integer, or one for each of the {num_resolutions} "
            f"block_out_channels, got {layers_per_block}."
        )
    return layers


def _check_multiscale_arguments(
    sample_size, block_out_channels, attention_head_dim, norm_num_groups, num_levels, num_difference_filters,
    data_variance, null_class, num_class_embeds, conv_in_kernel, conv_out_kernel,
) -> None:  # fmt: skip
    check_groups(block_out_channels, norm_num_groups)
    check_size(sample_size, len(block_out_channels))
    if block_out_channels[-1] % attention_head_dim:
        raise ValueError(
            f"attention_head_dim must divide the channels of the lowest level, got {attention_head_dim} and "
            f"{block_out_channels[-1]}."
        )
    diffusion.check_num_levels(num_levels)
    if not isinstance(num_difference_filters, int) or num_difference_filters < 0:
        raise ValueError(f"num_difference_filters must be an integer of at least 0, got {num_difference_filters}.")
    if not 0 < data_variance <= 1:
        raise ValueError(f"data_variance, E[x²] of data in [−1, 1], must be within (0, 1], got {data_variance}.")
    for name, size in (("conv_in_kernel", conv_in_kernel), ("conv_out_kernel", conv_out_kernel)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
            raise ValueError(f"{name} must be a positive odd integer, got {size!r}.")
    if null_class and num_class_embeds is None:
        raise ValueError("null_class needs num_class_embeds, the number of real classes, got None.")
