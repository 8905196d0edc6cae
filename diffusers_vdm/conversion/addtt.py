"""Convert checkpoints of github.com/addtt/variational-diffusion-models to pipelines and back."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention

from ..files import write_atomically
from ..noise_schedules import MonotoneGammaNetwork
from ..pipeline import VDMPipeline
from . import PAPER_ENDS
from .foreign_networks import (
    ForeignNetwork,
    has_attention,
    incompatibilities,
    pipeline_from_state,
    raise_if_any,
    schedule_of,
    whole_folder,
    with_folded_bias,
)
from .official_checkpoint import (
    gamma_from_official,
    gamma_to_official,
    tensor_names,
)


def load_addtt(
    path: str | os.PathLike,
    weights: str = "ema",
    gamma_min: float | None = None,
    gamma_max: float | None = None,
    sample_size: int = 32,
    num_heads: int | None = None,
    norm_num_groups: int | None = None,
) -> VDMPipeline:
    """Load a `model.pt` of github.com/addtt/variational-diffusion-models as an equivalent pipeline in float32.

    The weights have PyTorch's layouts. There, q, k and v are one 1×1 convolution, `(3C, C, 1, 1)`, and conv_in orders
    the Fourier features (exponents 5 and 6) by frequency and then color; here they are ordered by color and then
    frequency.

    Args:
        path (`str` or `PathLike`): the file. A `config.yaml` beside it is read for values that the weights do not
            determine.
        weights (`"ema"` or `"model"`): the averaged weights or the raw ones.
        gamma_min, gamma_max (`float`, *optional*): the configured ends; default to the config's, or to −13.3 and 5.0.
        sample_size (`int`, defaults to 32): height and width of the images, which neither file stores.
        num_heads, norm_num_groups (`int`, *optional*): default to the config's, or to 1 and 32.

    Raises: `ValueError` for files of another kind and tensors that are missing, unexpected or of another shape.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights must be 'ema' or 'model', got {weights!r}.")
    path = Path(path)
    tensors, config = _addtt_tensors(path, weights), _addtt_config(path.with_name("config.yaml"))
    gamma = {name[-1]: tensors.pop(name).double().numpy() for name in ("gamma.w", "gamma.b") if name in tensors}
    network = ForeignNetwork(path, tensors, "model.conv_in.weight", "model.conv_out.2.weight", axes=(1, 0))
    network.count(r"model\.down_blocks\.(\d+)\.", r"model\.\w+_blocks\.\d+\.attention_block\.")
    inferred = {
        "embedding_dim": network.channels, "n_blocks": network.num_blocks, "input_channels": network.colors,
        "use_fourier_features": network.inputs != network.colors, "attention_everywhere": network.attention,
        "noise_schedule": "learned_linear" if gamma else "fixed_linear",
    }  # fmt: skip
    wrong = [f"{k} is {config[k]!r}, not {v!r}" for k, v in inferred.items() if config.get(k, v) != v]
    raise_if_any(f"{path} does not belong to the config.yaml beside it", wrong)
    given = {"gamma_min": gamma_min, "gamma_max": gamma_max, "n_attention_heads": num_heads}
    given |= {"norm_groups": norm_num_groups, "dropout_prob": None}
    for (name, value), default in zip([*given.items()], (*PAPER_ENDS, 1, 32, 0.0), strict=True):
        if value is None and name not in config:
            print(f"assumed, not in any file: {name} {default}")
        given[name] = config.get(name, default) if value is None else value
        if type(given[name]) not in ((int,) if isinstance(default, int) else (int, float)):
            raise ValueError(f"{name} must be a number, got {given[name]!r}; correct config.yaml or set the option.")
    heads, groups, channels = given["n_attention_heads"], given["norm_groups"], network.channels
    if heads < 1 or channels % heads or groups < 1 or channels % groups:
        raise ValueError(
            f"num_heads and norm_num_groups must divide the {channels} channels, got {heads} and {groups}."
        )
    unet = network.unet(
        (5, 6), sample_size=sample_size, norm_eps=1e-5, norm_num_groups=groups, attention_head_dim=channels // heads,
        dropout=float(given["dropout_prob"]),
    )  # fmt: skip
    order = _fourier_order(network.colors, len(unet.config.fourier_exponents))

    def convert(key: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = tensor[:, order] if key == "conv_in.weight" else tensor
        return tensor.to(torch.float32, copy=True).reshape(shape).contiguous()

    state = network.state("addtt", unet, _addtt_shape, convert)
    ends = (float(given["gamma_min"]), float(given["gamma_max"]))
    schedule = gamma_from_official(gamma, *ends).float()
    print(f"read {weights}: {network}; γ: {type(schedule).__name__}, configured from {ends[0]} to {ends[1]}")
    print(f"assumed, not in any file: images of {sample_size}×{sample_size} in 256 levels")
    return pipeline_from_state(unet, state, schedule)


def save_addtt(pipe: VDMPipeline, folder: str | os.PathLike) -> None:
    """Save a pipeline as `model.pt` and `config.yaml` of github.com/addtt/variational-diffusion-models in `folder`.

    The raw and the averaged weights are equal, and "opt" is empty. The bias of our time_emb_proj is added to that of
    conv1, where it has the same effect.

    Raises: `ValueError` with a list of everything that addtt's network does not support.
    """
    import yaml

    allowed = {"norm_eps": (1e-5,), "fourier_exponents": ((), (5, 6)), "augmentation_flag": (False,)}
    curved = isinstance(pipe.noise_schedule, MonotoneGammaNetwork)
    wrong = ["noise_schedule is a network and not a straight line"] if curved else []
    raise_if_any("this pipeline does not fit addtt's code", incompatibilities(pipe, allowed) + wrong)
    schedule, unet = schedule_of(pipe), pipe.unet
    state, config, attention = unet.state_dict(), unet.config, has_attention(unet)
    order = np.argsort(_fourier_order(config.in_channels, len(config.fourier_exponents)))
    tensors = {}
    for key, theirs in tensor_names(config.layers_per_block, attention, "addtt"):
        if key in state:
            tensor = with_folded_bias(state, key).float()
            tensor = tensor[:, order] if key == "conv_in.weight" else tensor
            name = theirs.replace("net2.last", "net2.3" if config.dropout > 0 else "net2.2")
            tensors[name] = tensor.reshape(_addtt_shape(key, tuple(tensor.shape))).contiguous()
    for name in [name for name in tensors if ".layers.1.q." in name]:
        q, k, v = (tensors.pop(name.replace(".1.q.", f".1.{part}.")) for part in "qkv")
        tensors[name.replace(".1.q.", ".1.")] = torch.cat([q, k, v])
    gamma = gamma_to_official(schedule)
    tensors |= {f"gamma.{name}": torch.tensor(float(value[0])) for name, value in gamma.items()}
    heads = next(module.heads for module in unet.modules() if isinstance(module, Attention))
    written = {
        "embedding_dim": config.block_out_channels[0], "n_blocks": config.layers_per_block,
        "n_attention_heads": heads, "dropout_prob": float(config.dropout), "norm_groups": config.norm_num_groups,
        "input_channels": config.in_channels, "use_fourier_features": bool(config.fourier_exponents),
        "attention_everywhere": attention, "noise_schedule": "learned_linear" if gamma else "fixed_linear",
        "gamma_min": float(schedule.config.gamma_min), "gamma_max": float(schedule.config.gamma_max),
        "batch_size": 128, "antithetic_time_sampling": True, "lr": 2e-4, "weight_decay": 0.01, "clip_grad_norm": True,
    }  # fmt: skip
    average = {f"{copy}.{name}": tensor for copy in ("online_model", "ema_model") for name, tensor in tensors.items()}
    average |= {"initted": torch.tensor([True]), "step": torch.tensor([0])}
    with whole_folder(folder) as new:
        content = {"step": 0, "model": tensors, "opt": {}, "ema": average}
        torch.save(content, new / "model.pt")  # noqa: TID251  their format
        write_atomically(new / "config.yaml", yaml.safe_dump(written, sort_keys=False))
    print("defaults, not in the pipeline: batch_size, antithetic times, lr, weight_decay, clip_grad_norm")


def _addtt_tensors(path: Path, weights: str) -> dict[str, torch.Tensor]:
    """The state dict of one set of weights, with q, k and v split and a single name for the last layer of net2."""
    try:  # memory-mapped, so the optimizer state is never read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{path} is not a weights file that can be read safely: {str(error)[:300]}") from error
    part = content.get(weights) if isinstance(content, dict) else None
    if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
        there = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has no state dict {weights!r}, but {there}.")
    tensors: dict[str, torch.Tensor] = {}
    for key, value in part.items():
        if weights == "ema":
            if not key.removeprefix("module.").startswith("ema_model."):
                continue
            key = key.removeprefix("module.").removeprefix("ema_model.")
        key = re.sub(r"(\.net2)\.[23]\.", r"\1.last.", key.removeprefix("module."))
        if key in tensors or not torch.is_tensor(value):
            raise ValueError(f"{path}: {key} is a duplicate, or not a tensor.")
        value = value.detach()
        qkv = re.fullmatch(r"(model\..*\.layers\.1)\.(weight|bias)", key)
        if qkv and value.ndim and value.shape[0] % 3 == 0:
            thirds = zip("qkv", value.chunk(3), strict=True)
            tensors |= {f"{qkv[1]}.{name}.{qkv[2]}": third for name, third in thirds}
        else:
            tensors[key] = value
    return tensors


def _addtt_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a YAML file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must be a mapping of settings, got a {type(config).__name__}.")
    return config


def _addtt_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1) if ".attentions." in key and len(shape) == 2 else shape


def _fourier_order(colors: int, exponents: int) -> np.ndarray:
    """Index in addtt's conv_in of each of our input channels: ours go by color, then frequency; addtt's vice versa."""
    index = np.arange(2 * exponents * colors).reshape(2, exponents, colors).transpose(0, 2, 1)
    return np.concatenate([np.arange(colors), colors + index.reshape(-1)])
