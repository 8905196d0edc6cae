"""The network: diffusers' `UNet2DModel` with what the VDM network needs beside it.

The official VDM network is a `UNet2DModel` with one level, many blocks and one attention in the middle, plus Fourier
features of its input, its input added to its output, zero-initialized last layers and a flag for augmented images.
DDPM's network is the same class with other arguments and none of the additions.
"""

from __future__ import annotations

import difflib
import math
import warnings
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

from .whole_models import WholeModelMixin


class VDMUNet2DModel(WholeModelMixin, UNet2DModel, AttentionMixin):
    """A `UNet2DModel` with Fourier features, an input residual, zero-initialized outputs, and an augmentation flag.

    All arguments of `UNet2DModel` mean what they mean there; without the additions the state dict and the outputs are
    the same. Timesteps may be fractional.

    Args (additions):
        fourier_exponents (`tuple[float, ...]`, defaults to `()`):
            exponents f of sin and cos(2^f · 2π · z) of every channel, fed beside z. The paper's n = 7, 8 in its
            2^n π z are f = 6, 7: periods of one and two levels of 256. Always worked out in float32.
        input_residual (`bool`, defaults to `False`): add the input to the output [the official network].
        zero_init (`bool`, defaults to `True`):
            start as the official network does: LeCun-normal kernels, zero biases, and zero kernels where a block or
            the network ends, so that a fresh one returns its input (with `input_residual`) or 0. `False`: PyTorch's.
        augmentation_flag (`bool`, defaults to `False`):
            one more input of the time embedding: 1 for an augmented image, 0 else, so that flips do not leak into
            samples [the official network's `conditioning`].
        null_class (`bool`, defaults to `False`):
            one more class, of index `num_class_embeds`, that stands for "no label" when `class_labels` is not given.
    """

    keeps_float32_inputs = True  # whatever its own type: the Fourier features need the digits [denoiser.py]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "conv_in"]
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
    ):
        _check_arguments(
            sample_size, in_channels, out_channels, block_out_channels, norm_num_groups, time_embedding_type,
            input_residual, null_class, num_class_embeds, class_embed_type,
        )  # fmt: skip
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
        if fourier_exponents:
            channels = in_channels * (1 + 2 * len(fourier_exponents))
            self.conv_in = nn.Conv2d(channels, block_out_channels[0], kernel_size=3, padding=1)
        if augmentation_flag:
            self.time_embedding = TimestepEmbedding(self.time_embedding.linear_1.in_features + 1, time_embed_dim)
        if null_class:
            self.class_embedding = nn.Embedding(num_class_embeds + 1, time_embed_dim)
        if zero_init:
            self._init_as_official()
        self.set_attn_processor(ImageAttnProcessor())

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        augmentation_flags: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The network's prediction for noisy images.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): z_t. Keep it in float32, also for a half-precision
                network: the Fourier features need its digits.
            timestep (`torch.Tensor` of shape `()` or `(B,)`, or a number): the scheduler's timestep, maybe fractional.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): classes; with `null_class` they may be left out.
            augmentation_flags (`torch.Tensor` of shape `(B,)`, *optional*, defaults to zeros): 1 where the image was
                augmented; only with `augmentation_flag`.
            return_dict (`bool`, defaults to `True`): return a `UNet2DOutput` instead of a tuple.

        Returns: `UNet2DOutput` or a tuple with the output, `(B, out_channels, H, W)`, in the type of `sample`.
        Raises: `ValueError` for sizes that the levels do not divide, and labels or flags that the network cannot take.
        """
        self._check_inputs(sample, class_labels, augmentation_flags)
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, dtype=torch.float32)
        timesteps = timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
        emb = self._embed(timesteps, class_labels, augmentation_flags)

        hidden = 2 * sample - 1.0 if self.config.center_input_sample else sample
        skip_sample = hidden.to(self.dtype)  # only the blocks with `skip_conv` use it
        if self.config.fourier_exponents:
            hidden = torch.cat([hidden, fourier_features(hidden, self.config.fourier_exponents)], dim=1)
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
            used, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
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
        """As `ConfigMixin.from_config`; of a `UNet2DModel`'s config it makes the same network, defaults included.

        A config without `zero_init` is taken for one of a `UNet2DModel`, which starts as PyTorch does, unless its
        `_class_name` is that of this class. A fresh network of a preset: [`from_preset`].
        """
        if isinstance(config, dict):  # what that class left at its defaults would else get ours
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            if config.get("_class_name") != cls.__name__:
                config.setdefault("zero_init", False)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> VDMUNet2DModel:
        """A fresh network of one of `UNET_PRESETS`, with any of its arguments replaced by `overrides`."""
        return cls(**unet_preset(preset, **overrides))

    def _embed(self, timesteps, class_labels, augmentation_flags) -> torch.Tensor:
        if self.config.time_embedding_type == "learned":
            timesteps = timesteps.long()  # indices of a table
        t_emb = self.time_proj(timesteps).to(self.dtype)
        if self.config.augmentation_flag:
            if augmentation_flags is None:
                augmentation_flags = torch.zeros_like(t_emb[:, 0])
            t_emb = torch.cat([t_emb, augmentation_flags.to(t_emb)[:, None]], dim=1)
        emb = self.time_embedding(t_emb)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(timesteps, self.config.num_class_embeds, dtype=torch.long)
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(self.dtype)
            emb = emb + self.class_embedding(class_labels).to(self.dtype)
        return emb

    def _check_inputs(self, sample, class_labels, augmentation_flags) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must have shape (B, {self.config.in_channels}, H, W), got {tuple(sample.shape)}."
            )
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample must have a height and a width that {factor} divides (the network halves them "
                f"{len(self.config.block_out_channels) - 1} times), got {tuple(sample.shape[2:])}; resize or pad it."
            )
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels were given to a network without classes; build it with num_class_embeds.")
        if class_labels is None and self.class_embedding is not None and not self.config.null_class:
            raise ValueError("class_labels must be given to this network; build it with null_class=True to omit them.")
        if augmentation_flags is not None and not self.config.augmentation_flag:
            raise ValueError(
                "augmentation_flags were given to a network without that input; build it with augmentation_flag=True."
            )

    @torch.no_grad()
    def _init_as_official(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                # truncated at ±2 sd, and widened so that the variance is 1/fan_in after the truncation
                std = math.sqrt(1 / fan_in) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        ends = [self.conv_out]
        for name, module in self.named_modules():
            if name.endswith((".conv2", ".time_emb_proj", ".to_out.0")):
                ends.append(module)
        for module in ends:
            nn.init.zeros_(module.weight)


class ImageAttnProcessor:
    """Self-attention over the pixels of an image, through diffusers' dispatcher of attention back-ends.

    The processor that diffusers gives this kind of block calls PyTorch directly, so that `set_attention_backend` would
    be accepted and do nothing.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> torch.Tensor:
        residual = hidden_states
        tokens = hidden_states.flatten(2)
        # contiguous once, or each of the three layers would make a copy of its own and keep it for its backward pass
        tokens = (tokens if attn.group_norm is None else attn.group_norm(tokens)).transpose(1, 2).contiguous()
        query, key, value = (to(tokens).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))
        out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            # A sum has the memory format of its first term. That of the tokens, channels last, makes the backward pass
            # of the next GroupNorm many times as long on a CPU; as formats round differently, only training changes.
            out = residual + out if attn.training else out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def fourier_features(z: torch.Tensor, exponents: tuple[float, ...]) -> torch.Tensor:
    """sin and cos(2^f · 2π · z) of every channel and exponent f [VDM §3.4, app. C].

    Channels are ordered as in the official network: all sines, then all cosines, each by channel and then exponent.
    float32 or better whatever `z` is: at f = 7 half precision would be noise.

    Args:
        z (`torch.Tensor` of shape `(B, C, H, W)`): latents.
        exponents (`tuple[float, ...]`): f, n of them.

    Returns: `torch.Tensor` of shape `(B, 2 n C, H, W)`.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    scales = torch.tensor([2.0**f * 2 * math.pi for f in exponents], dtype=z.dtype, device=z.device)
    angles = (z[:, :, None] * scales[:, None, None]).flatten(1, 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _vdm(channels: int, blocks: int, **more: Any) -> dict[str, Any]:
    """The arguments of an official VDM network: one level, attention in the middle only."""
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
    """The arguments of a DDPM network: two blocks a level down, three up, attention at 16×16 and in the middle."""
    attention = [sample_size >> i == 16 for i in range(len(channels))]
    return {
        "sample_size": sample_size,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "downsample_padding": 0,
        "zero_init": True,  # as DDPM's code: conv2 of each block, attention's output, conv_out
        **more,
    }


UNET_PRESETS: dict[str, dict[str, Any]] = {
    # 8×8 digits with 17 levels: the periods of the Fourier features are two levels and one
    "digits": _vdm(
        48,
        2,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        norm_num_groups=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        fourier_exponents=(math.log2(17) - 2, math.log2(17) - 1),  # as train.py for any number of levels
        augmentation_flag=False,
        dropout=0.05,
        zero_init=False,  # measured: better for two blocks by 0.01 to 0.02 bits/dim (benchmarks/initialization.py)
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
    if preset not in UNET_PRESETS:
        close = difflib.get_close_matches(preset, UNET_PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {sorted(UNET_PRESETS)}."
        raise ValueError(f"preset {preset!r} does not exist; {hint}")
    return {**UNET_PRESETS[preset], **overrides}


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
    for channels in block_out_channels:
        if channels % norm_num_groups:
            raise ValueError(
                f"norm_num_groups must divide every one of block_out_channels, got {norm_num_groups} and {channels}."
            )
    if min(block_out_channels) == norm_num_groups:
        warnings.warn(
            f"norm_num_groups={norm_num_groups} on as many channels normalizes every channel by itself, which "
            "removes the time embedding: the network cannot see the noise level. Use at most half as many groups.",
            stacklevel=4,
        )
    if sample_size is not None:
        factor = 2 ** (len(block_out_channels) - 1)
        for size in (sample_size,) if isinstance(sample_size, int) else sample_size:
            if size % factor:
                raise ValueError(f"sample_size must be divisible by {factor} = 2^(levels − 1), got {sample_size}.")
