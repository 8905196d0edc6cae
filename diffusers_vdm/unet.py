"""The network: diffusers' `UNet2DModel` with the additions of the VDM network.

The official VDM network is a `UNet2DModel` with one level, many blocks and one attention layer in the middle. It adds
Fourier features of its input, an input residual, zero-initialized last layers and a flag for augmented images. DDPM's
network is the same class with other arguments and no additions.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name in the module
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .network_inputs import (
    add_vector_embedding,
    check_condition_arguments,
    check_inputs,
    condition_channels,
    condition_features,
    embed,
    one_for_each,
)
from .whole_models import WholeModelMixin


class VDMUNet2DModel(WholeModelMixin, UNet2DModel, AttentionMixin):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A `UNet2DModel` with Fourier features, an input residual, zero-initialized outputs, and an augmentation flag.

    The arguments of `UNet2DModel` keep their meaning; without the additions the state dict and the outputs are the
    same. Timesteps may be fractional.

    Args (additions):
        fourier_exponents (`tuple[float, ...]`, defaults to `()`):
            exponents f of sin and cos(2^f · 2π · z) of every channel, concatenated with z. The paper's n = 7, 8 in
            2^n π z are f = 6, 7: periods of two levels and one level of 256. Always computed in float32 or better.
        input_residual (`bool`, defaults to `False`): add the input to the output [the official network].
        zero_init (`bool`, defaults to `True`):
            the official initialization: LeCun-normal kernels, zero biases, and zero kernels in the last layer of each
            block and of the network, so that a new network returns its input (with `input_residual`) or 0. `False`:
            PyTorch's initialization.
        augmentation_flag (`bool`, defaults to `False`):
            an additional input of the time embedding, 1 for an augmented image and 0 otherwise, so that augmentations
            do not leak into samples [the official network's `conditioning`].
        null_class (`bool`, defaults to `False`):
            an additional class, with index `num_class_embeds`, that means "no label" if `class_labels` is not given.
        cond_dim (`int`, *optional*): size of the vector that the network is conditioned on, see conditions.py.
        cond_mean, cond_std (`tuple[float, ...]`, *optional*): mean and standard deviation of each number of the
            vector, by which the network standardizes it.
        null_vectors (`bool`, defaults to `False`): learn an embedding that means "no vector".
        cond_channels (`int`, *optional*): channels of the image that the network is conditioned on.
        null_images (`bool`, defaults to `False`): an additional input channel, 1 with such an image and 0 without.
    """

    keeps_float32_inputs = True  # in any dtype, because the Fourier features need the precision [denoiser.py]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "cond_embedding", "conv_in"]
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _repeated_blocks = ["ResnetBlock2D", "Attention"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 1,
        flip_sin_to_cos: bool = False,
        down_block_types: tuple[str, ...] = ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("UpBlock2D",),
        block_out_channels: tuple[int, ...] = (128,),
        layers_per_block: int = 32,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = None,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        fourier_exponents: tuple[float, ...] = (),
        input_residual: bool = False,
        zero_init: bool = True,
        augmentation_flag: bool = False,
        null_class: bool = False,
        cond_dim: int | None = None,
        cond_mean: tuple[float, ...] | None = None,
        cond_std: tuple[float, ...] | None = None,
        null_vectors: bool = False,
        cond_channels: int | None = None,
        null_images: bool = False,
    ):
        check_condition_arguments(cond_dim, cond_mean, cond_std, null_vectors, cond_channels, null_images)
        _check_arguments(
            sample_size, in_channels, out_channels, block_out_channels, norm_num_groups, time_embedding_type,
            input_residual, null_class, num_class_embeds, class_embed_type,
        )  # fmt: skip
        types = (down_block_types, up_block_types, mid_block_type if add_attention else None)
        _check_heads(attention_head_dim, block_out_channels, *types)
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        time_embed_dim = self.time_embedding.linear_2.out_features
        if fourier_exponents or cond_channels:
            channels = in_channels * (1 + 2 * len(fourier_exponents)) + condition_channels(cond_channels, null_images)
            self.conv_in = nn.Conv2d(channels, block_out_channels[0], kernel_size=3, padding=1)
        if augmentation_flag:
            self.time_embedding = TimestepEmbedding(self.time_embedding.linear_1.in_features + 1, time_embed_dim)
        if null_class and num_class_embeds is not None:  # as `_check_arguments` requires
            self.class_embedding = nn.Embedding(num_class_embeds + 1, time_embed_dim)
        add_vector_embedding(self, cond_dim, null_vectors, time_embed_dim)
        if zero_init:
            self._init_as_official()
        processor: Any = ImageAttnProcessor()
        self.set_attn_processor(processor)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        augmentation_flags: torch.Tensor | None = None,
        return_dict: bool = True,
        cond_vectors: torch.Tensor | None = None,
        cond_images: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The network's prediction for noisy images.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): z_t. Keep it in float32 even for a half-precision network,
                because the Fourier features need the precision.
            timestep (`torch.Tensor` of shape `()` or `(B,)`, or a number): the scheduler's (fractional) timestep.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): classes; optional only with `null_class`.
            augmentation_flags (`torch.Tensor` of shape `(B,)`, *optional*, defaults to zeros): 1 for augmented images;
                only with `augmentation_flag`.
            return_dict (`bool`, defaults to `True`): return a `UNet2DOutput` instead of a tuple.
            cond_vectors (`torch.Tensor` of shape `(B, cond_dim)`, *optional*): vectors; optional with `null_vectors`.
            cond_images (`torch.Tensor` of shape `(B, cond_channels, h, w)`, *optional*): images of the size of
                `sample` or smaller; optional with `null_images`.

        Returns: `UNet2DOutput` or a tuple with the output, `(B, out_channels, H, W)`, in the dtype of `sample`.
        Raises: `ValueError` for sizes that cannot be halved at each level, and for unsupported conditions or flags.
        """
        check_inputs(self, sample, class_labels, augmentation_flags, cond_vectors, cond_images)
        timesteps = one_for_each(timestep, sample)
        emb = embed(self, timesteps, class_labels, augmentation_flags, cond_vectors)

        hidden = 2 * sample - 1.0 if self.config.center_input_sample else sample
        skip_sample = hidden.to(self.dtype)  # only the blocks with `skip_conv` use it
        if self.config.fourier_exponents:
            hidden = torch.cat([hidden, fourier_features(hidden, self.config.fourier_exponents)], dim=1)
        if self.config.cond_channels:
            hidden = torch.cat([hidden, condition_features(self.config, sample, cond_images)], dim=1)
        hidden = self.conv_in(hidden.to(self.dtype))

        skips: tuple[torch.Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            if hasattr(block, "skip_conv"):
                hidden, new_skips, skip_sample = block(hidden_states=hidden, temb=emb, skip_sample=skip_sample)
            else:
                hidden, new_skips = block(hidden_states=hidden, temb=emb)
            skips += new_skips
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, emb)
        skip_sample = None
        for block in self.up_blocks:
            resnets: Any = block.resnets
            used, skips = skips[-len(resnets) :], skips[: -len(resnets)]
            if hasattr(block, "skip_conv"):
                hidden, skip_sample = block(hidden, used, emb, skip_sample)
            else:
                hidden = block(hidden, used, emb)

        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        if skip_sample is not None:
            hidden = hidden + skip_sample
        if self.config.time_embedding_type == "fourier":
            hidden = hidden / timesteps.reshape(-1, 1, 1, 1).to(hidden.dtype)
        out = hidden.to(sample.dtype)
        if self.config.input_residual:
            out = out + sample
        return UNet2DOutput(sample=out) if return_dict else (out,)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """As `ConfigMixin.from_config`; the config of a `UNet2DModel` gives the same network, defaults included.

        A config of another class without `zero_init` gets `zero_init=False`, the initialization of `UNet2DModel`. For
        a new network of a preset use [`from_preset`].
        """
        if isinstance(config, dict):  # values in diffusers' list of defaults would be replaced by our defaults
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            if config.get("_class_name") != cls.__name__:
                config.setdefault("zero_init", False)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> VDMUNet2DModel:
        """A new network of one of `UNET_PRESETS`; `overrides` replace its arguments."""
        return cls(**unet_preset(preset, **overrides))

    @torch.no_grad()
    def _init_as_official(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                # truncated at ±2 sd, with std scaled so that the variance after truncation is 1/fan_in
                std = math.sqrt(1 / fan_in) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        ends: list[Any] = [self.conv_out]
        for name, module in self.named_modules():
            if name.endswith((".conv2", ".time_emb_proj", ".to_out.0")):
                ends.append(module)
        for module in ends:
            nn.init.zeros_(module.weight)


class ImageAttnProcessor:
    """Self-attention over the pixels of an image, through diffusers' attention dispatcher.

    The default processor of this block calls PyTorch directly, so `set_attention_backend` would have no effect.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> torch.Tensor:
        residual = hidden_states
        tokens = hidden_states.flatten(2)
        # contiguous here, or each of the three layers would make its own copy and keep it for the backward pass
        tokens = (tokens if attn.group_norm is None else attn.group_norm(tokens)).transpose(1, 2).contiguous()
        layers: Any = attn
        query, key, value = (
            to(tokens).unflatten(2, (attn.heads, -1)) for to in (layers.to_q, layers.to_k, layers.to_v)
        )
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        out = layers.to_out[1](layers.to_out[0](out.flatten(2).to(query.dtype)))
        out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            # A sum has the memory format of its first term. The channels-last format of the tokens makes the backward
            # pass of the next GroupNorm much slower on a CPU. Formats round differently, so only training swaps them.
            out = residual + out if attn.training else out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def fourier_features(z: torch.Tensor, exponents: tuple[float, ...]) -> torch.Tensor:
    """sin and cos(2^f · 2π · z) of every channel and exponent f [VDM §3.4, app. C].

    Channels are ordered as in the official network: all sines, then all cosines, each by channel and then exponent.
    Computed in float32 or better, because half precision would give noise at f = 7.

    Args:
        z (`torch.Tensor` of shape `(B, C, H, W)`): latents.
        exponents (`tuple[float, ...]`): f, n of them.

    Returns: `torch.Tensor` of shape `(B, 2 n C, H, W)`.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    # by numbers, because a tensor of them would have to be copied to a GPU, which waits for it
    angles = torch.stack([z * (2.0**f * 2 * math.pi) for f in exponents], dim=2).flatten(1, 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _vdm(channels: int, blocks: int, **more: Any) -> dict[str, Any]:
    """The arguments of an official VDM network: one level, attention only in the middle."""
    return {
        "sample_size": 32,
        "block_out_channels": (channels,),
        "layers_per_block": blocks,
        "attention_head_dim": channels,
        "fourier_exponents": (6, 7),
        "input_residual": True,
        "zero_init": True,
        "augmentation_flag": True,
        **more,
    }


def _ddpm(sample_size: int, channels: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """The arguments of a DDPM network: two blocks per level down, three up, attention at 16×16 and in the middle."""
    attention = [sample_size >> i == 16 for i in range(len(channels))]
    return {
        "sample_size": sample_size,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "downsample_padding": 0,
        "zero_init": True,  # as in DDPM's code: conv2 of each block, attention's output, conv_out
        **more,
    }


UNET_PRESETS: dict[str, dict[str, Any]] = {
    # 8×8 digits with 17 levels: the periods of the Fourier features are two levels and one level
    "digits": _vdm(
        48,
        2,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        norm_num_groups=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        fourier_exponents=(math.log2(17) - 2, math.log2(17) - 1),  # train.py uses the same formula for other levels
        augmentation_flag=False,
        dropout=0.05,
        zero_init=False,  # better by 0.01 to 0.02 bits/dim for two blocks (benchmarks/initialization.py)
    ),
    "cifar10": _vdm(128, 32, dropout=0.1),
    "cifar10-aug": _vdm(256, 32, dropout=0.05),
    "imagenet32": _vdm(256, 32),
    "imagenet64": _vdm(256, 64, sample_size=64),
    "ddpm-cifar10": _ddpm(32, (128, 256, 256, 256), dropout=0.1),
    # five levels, 128 → 8
    "ddpm-ffhq128": _ddpm(128, (128, 256, 256, 512, 1024)),
}


def unet_preset(preset: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of [`VDMUNet2DModel`] for a name in `UNET_PRESETS`, with `overrides`.

    Raises: `ValueError` for an unknown name.
    """
    check_preset("VDMUNet2DModel", preset, UNET_PRESETS)
    return {**UNET_PRESETS[preset], **overrides}


def check_preset(network: str, preset: str, presets: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless `preset` is one of the `presets` of the class `network`."""
    if preset not in presets:
        close = difflib.get_close_matches(preset, presets, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"preset {preset!r} does not exist in {network}, which has {sorted(presets)}.{hint}")


def _check_arguments(
    sample_size, in_channels, out_channels, block_out_channels, norm_num_groups, time_embedding_type,
    input_residual, null_class, num_class_embeds, class_embed_type,
) -> None:  # fmt: skip
    if input_residual and in_channels != out_channels:
        raise ValueError(f"input_residual needs in_channels == out_channels, got {in_channels} and {out_channels}.")
    if null_class and (num_class_embeds is None or class_embed_type is not None):
        raise ValueError(
            f"null_class needs num_class_embeds, the number of real classes, and no class_embed_type; got "
            f"num_class_embeds={num_class_embeds}, class_embed_type={class_embed_type!r}."
        )
    if time_embedding_type not in ("positional", "fourier", "learned"):
        raise ValueError(
            f"time_embedding_type must be 'positional', 'fourier' or 'learned', got {time_embedding_type!r}."
        )
    check_groups(block_out_channels, norm_num_groups)
    check_size(sample_size, len(block_out_channels))


def _check_heads(attention_head_dim, block_out_channels, down_block_types, up_block_types, mid_block_type) -> None:
    """Raises `ValueError` for heads with more channels than a level with attention, which would have none of them."""
    blocks = [
        *zip(down_block_types, block_out_channels, strict=False),
        *zip(up_block_types, reversed(block_out_channels), strict=False),
        *([("Attn", block_out_channels[-1])] if mid_block_type else []),
    ]
    fewest = min((channels for block, channels in blocks if "Attn" in block), default=None)
    if None not in (attention_head_dim, fewest) and not 1 <= attention_head_dim <= fewest:
        raise ValueError(
            f"attention_head_dim must be within [1, {fewest}], the fewest channels of a level with attention, got "
            f"{attention_head_dim}."
        )


def check_groups(block_out_channels: tuple[int, ...], norm_num_groups: int) -> None:
    """Raises `ValueError` for groups that do not divide the channels; warns if a group is a single channel."""
    for channels in block_out_channels:
        if channels % norm_num_groups:
            raise ValueError(
                f"norm_num_groups must divide all of block_out_channels, got {norm_num_groups} and {channels}."
            )
    if min(block_out_channels) == norm_num_groups:
        warnings.warn(
            f"norm_num_groups={norm_num_groups} equals the number of channels, so each channel is normalized by "
            "itself. This removes the time embedding, and the network cannot see the noise level. Use at most half as "
            "many groups.",
            stacklevel=5,
        )


def num_resolutions(size: tuple[int, int]) -> int:
    """The levels of a network for images of this size: each halves the one above while the shorter side stays at 7 or
    more, but at least one does if it can."""
    levels = 1
    while all(side % 2**levels == 0 for side in size) and (min(size) >> levels >= 7 or levels == 1):
        levels += 1
    return levels


def check_size(sample_size: int | tuple[int, int] | None, num_resolutions: int) -> None:
    """Raises `ValueError` for images whose size cannot be halved for each resolution below the first."""
    if sample_size is not None:
        factor = 2 ** (num_resolutions - 1)
        for size in (sample_size,) if isinstance(sample_size, int) else sample_size:
            if size % factor:
                raise ValueError(f"sample_size must be divisible by {factor} = 2^(levels − 1), got {sample_size}.")
