"""Convert checkpoints of the official JAX code (google-research/vdm) to pipelines and back."""

from __future__ import annotations

import os

import numpy as np
import torch

from ..files import write_atomically
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
    from_official,
    gamma_from_official,
    gamma_to_official,
    official_shape,
    read_checkpoint,
    tensor_names,
    to_official,
    write_checkpoint,
)


def load_official(
    path: str | os.PathLike,
    weights: str = "ema_params",
    gamma_min: float = PAPER_ENDS[0],
    gamma_max: float = PAPER_ENDS[1],
    sample_size: int = 32,
) -> VDMPipeline:
    """Load a checkpoint of the official JAX code as an equivalent pipeline in float32.

    Convolutions `(H, W, in, out)` become `(out, in, H, W)`, and dense kernels `(in, out)` are transposed. The input of
    the time embedding keeps its last column, the flag for augmented images. For γ see [`gamma_from_official`].

    Args:
        path (`str` or `PathLike`): the folder written by clu, or its `.flax` file.
        weights (`"ema_params"` or `"params"`): the averaged weights, which the paper evaluates, or the raw ones.
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0): the *configured* ends, which scale the network's
            timestep. The file does not store them.
        sample_size (`int`, defaults to 32): height and width of the images. The file does not store it.

    Raises: `ValueError` for files of another kind and tensors that are missing, unexpected or of another shape.
    """
    if weights not in ("ema_params", "params"):
        raise ValueError(f"weights must be 'ema_params' or 'params', got {weights!r}.")
    tensors, step = read_checkpoint(path, weights)
    raise_if_any(
        f"{path}: weights must be numbers", [name for name, array in tensors.items() if array.dtype.kind != "f"]
    )
    gamma = {name.removeprefix("gamma/"): tensors.pop(name) for name in [*tensors] if name.startswith("gamma/")}
    network = ForeignNetwork(path, tensors, "score_model/conv_in/kernel", "score_model/conv_out/kernel", axes=(2, 3))
    network.count(r"score_model/down\.block_(\d+)/", r"score_model/(down|up)\.attn_")
    dense0 = tensors.get("score_model/dense0/kernel")
    flag = dense0 is not None and dense0.shape[0] == network.channels + 1
    unet = network.unet((6, 7), sample_size=sample_size, augmentation_flag=flag, norm_eps=1e-6)

    def convert(key: str, array: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(np.array(from_official(array), np.float32, order="C")).reshape(shape)

    state = network.state("official", unet, official_shape, convert)
    schedule = gamma_from_official(gamma, gamma_min, gamma_max).float()
    print(f"read {weights} of step {step}: {network}, {'with' if flag else 'no'} flag for augmented images")
    print(f"γ: {type(schedule).__name__} from {schedule.ends()[0]:.4f} to {schedule.ends()[1]:.4f}")
    print(f"assumed, not in the file: gamma_min {gamma_min} and gamma_max {gamma_max} (scale of the")
    print(f"timestep), images of {sample_size}×{sample_size} in 256 levels, dropout 0")
    return pipeline_from_state(unet, state, schedule)


def save_official(pipe: VDMPipeline, folder: str | os.PathLike, step: int = 0) -> None:
    """Save a pipeline as a checkpoint of the official JAX code: `checkpoint` and `ckpt-1.flax` in a new `folder`.

    params and ema_params are the same weights, the optimizer's moments are zero, and its counter is `step`. The bias
    of our time_emb_proj is added to that of conv1, where it has the same effect. A network without the flag for
    augmented images gets a column of zeros for it. TensorFlow's files, which store a save counter, are not written.

    Raises: `ValueError` with a list of everything that the official network does not support.
    """
    if not 0 <= step < 2**31:
        raise ValueError(f"step must be within [0, 2^31), got {step}.")
    allowed = {"norm_num_groups": (32,), "norm_eps": (1e-6,), "fourier_exponents": ((), (6, 7))}
    raise_if_any("this pipeline does not fit the official code", incompatibilities(pipe, allowed, heads=1))
    unet, schedule = pipe.unet, schedule_of(pipe)
    state, config = unet.state_dict(), unet.config
    gamma = {f"gamma/{name}": array for name, array in gamma_to_official(schedule).items()}
    pairs = tensor_names(config.layers_per_block, has_attention(unet), "official")
    ours = {theirs: key for key, theirs in pairs if key in state}
    shapes = {theirs: official_shape(key, tuple(state[key].shape)) for theirs, key in ours.items()}
    shapes |= {name: array.shape for name, array in gamma.items()}
    inputs, width = shapes["score_model/dense0/kernel"]
    shapes["score_model/dense0/kernel"] = (inputs + (not config.augmentation_flag), width)

    def array_of(name: str) -> np.ndarray:
        if name in gamma:
            return gamma[name]
        array = to_official(ours[name], with_folded_bias(state, ours[name]).numpy())
        rows = shapes[name][0] - array.shape[0]
        return np.concatenate([array, np.zeros((rows, array.shape[1]))]) if rows else array

    with whole_folder(folder) as new:
        write_checkpoint(new / "ckpt-1.flax", shapes, array_of, step)
        text = 'model_checkpoint_path: "ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n'
        write_atomically(new / "checkpoint", text)
    print(f"set in the config, not in the files: gamma_min {schedule.config.gamma_min}, gamma_max "
          f"{schedule.config.gamma_max}, sm_n_embd {config.block_out_channels[0]}, sm_n_layer "
          f"{config.layers_per_block}, with_attention {has_attention(unet)}, dropout {config.dropout}")  # fmt: skip
