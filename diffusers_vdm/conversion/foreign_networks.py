"""Shared by all conversions: networks inferred from foreign tensors, compatibility checks, atomic output folders."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ..noise_schedules import BetaGamma, NoiseSchedule, TableGamma
from ..pipeline import VDMPipeline
from ..schedulers import VDMScheduler
from ..unet import VDMUNet2DModel
from .official_checkpoint import tensor_names

# ---- networks from foreign tensors ---------------------------------------------------------------------------------


class ForeignNetwork:
    """A network inferred from foreign tensors; `axes` are the input and output axes of a convolution weight."""

    def __init__(self, path, tensors: dict[str, Any], conv_in: str, conv_out: str, axes: tuple[int, int]):
        for name in (conv_in, conv_out):
            if name not in tensors or tensors[name].ndim != 4:
                raise ValueError(f"{path} has no convolution {name}; it has {shorten(sorted(tensors))}.")
        self.path, self.tensors = path, tensors
        self.inputs, self.channels = (int(tensors[conv_in].shape[axis]) for axis in axes)
        self.colors = int(tensors[conv_out].shape[axes[1]])

    def count(self, block: str, attention: str) -> None:
        """Counts the blocks by a name pattern; attention is in all blocks if any name matches its pattern."""
        self.num_blocks = len({m[1] for name in self.tensors if (m := re.match(block, name))})
        self.attention = any(re.match(attention, name) for name in self.tensors)

    def __str__(self) -> str:
        where = "everywhere" if self.attention else "in the middle"
        fourier = "no " if self.inputs == self.colors else ""
        counts = f"{self.channels} channels, {self.num_blocks} blocks, {self.colors} colors"
        return f"{counts}, attention {where}, {fourier}Fourier features"

    def unet(self, exponents: tuple[int, ...], **more) -> VDMUNet2DModel:
        """The network on the meta device; [`pipeline_from_state`] assigns its weights without a copy."""
        with_features = self.colors * (1 + 2 * len(exponents))
        size = more.get("sample_size", 32)
        if not isinstance(size, int) or not 1 <= size <= 2**14:
            raise ValueError(f"sample_size must be an integer within [1, {2**14}], got {size!r}.")
        if self.inputs not in (self.colors, with_features) or self.num_blocks < 1:
            raise ValueError(
                f"{self.path}: with {self.colors} colors, conv_in must take {self.colors} channels, or "
                f"{with_features} with Fourier features {exponents}, and at least one block must follow; got "
                f"{self.inputs} channels and {self.num_blocks} blocks."
            )
        kind = "Attn" if self.attention else ""
        with torch.device("meta"):
            return VDMUNet2DModel(
                in_channels=self.colors, out_channels=self.colors, input_residual=True,
                down_block_types=(f"{kind}DownBlock2D",), up_block_types=(f"{kind}UpBlock2D",),
                block_out_channels=(self.channels,), layers_per_block=self.num_blocks,
                fourier_exponents=() if self.inputs == self.colors else exponents,
                **{"attention_head_dim": self.channels, **more},
            )  # fmt: skip

    def state(self, which: str, unet, shape_of: Callable, convert: Callable) -> dict[str, torch.Tensor]:
        """The state dict of `unet`; `ValueError` with all tensors that are missing, unexpected or of another shape."""
        shapes = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
        state, wrong = {}, []
        for ours, theirs in tensor_names(self.num_blocks, self.attention, which):
            if ours not in shapes:
                continue  # our network has 1×1 convolutions only where the number of channels changes
            tensor, expected = self.tensors.pop(theirs, None), shape_of(ours, shapes[ours])
            if tensor is not None and tuple(tensor.shape) == (1, 1, 1, *expected) and "norm" in ours:
                tensor = tensor.reshape(expected)  # flax up to 0.3.4
            if tensor is None:
                wrong.append(f"{theirs} is missing")
            elif tuple(tensor.shape) != expected:
                wrong.append(f"{theirs} has shape {tuple(tensor.shape)} and not {expected}")
            else:
                state[ours] = convert(ours, tensor, shapes[ours])
                if not bool(state[ours].isfinite().all()):
                    wrong.append(f"{theirs} holds NaN or infinity")
        raise_if_any(
            f"{self.path}: not this network ({self})", wrong + [f"{name} is unexpected" for name in self.tensors]
        )
        return state


def raise_if_any(what: str, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"{what}: {shorten(reasons, '; ')}.")


def shorten(items: list[str], separator: str = ", ") -> str:
    return separator.join(items[:12]) + (f"{separator}and {len(items) - 12} more" if len(items) > 12 else "")


def pipeline_from_state(unet: VDMUNet2DModel, state: dict, schedule: NoiseSchedule) -> VDMPipeline:
    ends = [float(end.detach()) for end in schedule.ends()]
    if max(map(abs, ends)) > 100:
        raise ValueError(f"γ must be within ±100 to be a noise schedule, got {ends[0]:.6g} to {ends[1]:.6g}.")
    for key, parameter in unet.named_parameters():
        if key.endswith("time_emb_proj.bias"):  # the foreign layer has no bias
            state[key] = torch.zeros(parameter.shape)
    unet.load_state_dict(state, assign=True)
    return VDMPipeline(unet.eval(), VDMScheduler.from_noise_schedule(schedule), noise_schedule=schedule.eval())


# ---- compatibility checks -----------------------------------------------------------------------------------------


def schedule_of(pipe: VDMPipeline) -> NoiseSchedule:
    return pipe.scheduler.noise_schedule() if pipe.noise_schedule is None else pipe.noise_schedule


def has_attention(unet: VDMUNet2DModel) -> bool:
    return tuple(unet.config.down_block_types) == ("AttnDownBlock2D",)


def with_folded_bias(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """A tensor in float64; the bias of time_emb_proj is added to that of conv1, which has the same effect."""
    tensor = state[key].detach().cpu().double()
    if key.endswith("conv1.bias"):
        tensor = tensor + state[key.replace("conv1", "time_emb_proj")].detach().cpu().double()
    return tensor


def incompatibilities(pipe: VDMPipeline, allowed: dict[str, tuple], heads: int | None = None) -> list[str]:
    """Everything that differs from a one-level VDM with timestep 1000 (γ − γ_min)/(γ_max − γ_min)."""
    unet, scheduler, wrong = pipe.unet, pipe.scheduler, []
    if not isinstance(unet, VDMUNet2DModel):
        return [f"unet is a {type(unet).__name__}, which does not add its input to its output"]
    config = unet.config
    groups, channels = config.norm_num_groups, config.block_out_channels[0]
    allowed = {
        "input_residual": (True,), "num_class_embeds": (None,), "class_embed_type": (None,),
        "act_fn": ("silu", "swish"), "time_embedding_type": ("positional",), "flip_sin_to_cos": (False,),
        "center_input_sample": (False,),
        "freq_shift": (1,), "time_embedding_dim": (None, 4 * channels), "resnet_time_scale_shift": ("default",),
        "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,), "add_attention": (True,),
        "attn_norm_num_groups": (None, groups), "block_out_channels": ((channels,),), **allowed,
    }  # fmt: skip
    for name, values in allowed.items():
        value = tuple(config[name]) if isinstance(config[name], list) else config[name]
        if value not in values:
            wrong.append(f"{name} is {value!r} and not {' or '.join(repr(v) for v in values)}")
    types = (tuple(config.down_block_types), tuple(config.up_block_types))
    if types not in ((("DownBlock2D",), ("UpBlock2D",)), (("AttnDownBlock2D",), ("AttnUpBlock2D",))):
        wrong.append(f"the blocks are {types}, not one level with attention in all of them or none")
    found = {module.heads for module in unet.modules() if isinstance(module, Attention)}
    if len(found) > 1 or (heads is not None and found - {heads}):
        wrong.append(f"attention has {sorted(found)} heads and not {heads or 'one number of them'}")
    if pipe.config.num_levels != 256:
        wrong.append(f"num_levels is {pipe.config.num_levels} and not 256")
    if not isinstance(scheduler, VDMScheduler):
        return [*wrong, f"scheduler is a {type(scheduler).__name__}: its timestep is an index, not the normalized γ"]
    if scheduler.config.prediction_type != "epsilon":
        wrong.append(f"prediction_type is {scheduler.config.prediction_type!r} and not 'epsilon'")
    schedule = schedule_of(pipe)
    if schedule.config.get("num_train_timesteps") != 1000 or isinstance(schedule, BetaGamma):
        return [*wrong, "the timestep is not 1000 times the normalized γ"]
    table = schedule.table()
    t = torch.linspace(0, 1, len(table), dtype=torch.float64)
    if isinstance(schedule, TableGamma) and float((table - torch.lerp(table[0], table[-1], t)).abs().max()) > 1e-9:
        wrong.append("γ is a table that is not a straight line, and the pipeline has no noise_schedule")
    elif float((scheduler.noise_schedule()(t) - table).abs().max()) > 1e-4:
        wrong.append("γ of the scheduler differs from that of noise_schedule")
    return wrong


def check_new(folder: str | os.PathLike) -> Path:
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another one, or remove it.")
    return folder


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `folder` when it is complete."""
    folder = check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new.chmod(0o755)
    try:
        yield new
        if folder.exists():
            folder.rmdir()
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
