"""Other formats in and out: the official JAX checkpoints, addtt's PyTorch checkpoints, diffusers' DDPM pipelines.

    python -m diffusers_vdm.conversion official    CHECKPOINT_FOLDER OUTPUT_FOLDER [--weights ema_params|params]
    python -m diffusers_vdm.conversion addtt       FILE              OUTPUT_FOLDER [--weights ema|model]
    python -m diffusers_vdm.conversion diffusers   PATH_OR_REPO      OUTPUT_FOLDER [--scheduler FOLDER]
    python -m diffusers_vdm.conversion to-official PIPELINE          OUTPUT_FOLDER [--step N]
    python -m diffusers_vdm.conversion to-addtt    PIPELINE          OUTPUT_FOLDER

The first three write a pipeline for `VDMPipeline.from_pretrained`. OUTPUT_FOLDER must be new or empty, and appears
whole or not at all. What a file does not say is assumed, and printed. (TensorFlow's .index and .data files, which the
official folders hold too, carry no weights and are neither read nor written.) Each command has a --help.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention

from .console import tolerate_any_encoding
from .files import write_atomically
from .foreign_networks import (
    ForeignNetwork,
    check_new,
    filled_pipeline,
    folded,
    has_attention,
    refuse,
    schedule_of,
    unfit,
    whole_folder,
)
from .noise_schedules import MonotoneGammaNetwork
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
from .pipeline import VDMPipeline
from .repository import check_repository_name
from .schedulers import LinearBetaScheduler, VDMScheduler
from .unet import VDMUNet2DModel

PAPER_ENDS = (-13.3, 5.0)


def load_official(
    path: str | os.PathLike,
    weights: str = "ema_params",
    gamma_min: float = PAPER_ENDS[0],
    gamma_max: float = PAPER_ENDS[1],
    sample_size: int = 32,
) -> VDMPipeline:
    """A checkpoint of the official JAX code as a pipeline with the same outputs, in float32.

    Convolutions `(H, W, in, out)` become `(out, in, H, W)`, dense kernels `(in, out)` are transposed; the input of the
    time embedding keeps its last column, the flag for augmented images. γ: see [`gamma_from_official`].

    Args:
        path (`str` or `PathLike`): the folder that clu wrote, or its `.flax` file.
        weights (`"ema_params"` or `"params"`): the averaged weights, which the paper evaluates, or the raw ones.
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0): the *configured* ends, which scale the network's
            timestep. The file does not say them.
        sample_size (`int`, defaults to 32): height and width of the images. The file does not say it.

    Raises: `ValueError` for files of another kind and tensors that are missing, left over or of another shape.
    """
    if weights not in ("ema_params", "params"):
        raise ValueError(f"weights must be 'ema_params' or 'params', got {weights!r}.")
    tensors, step = read_checkpoint(path, weights)
    refuse(f"{path}: weights must be numbers", [name for name, array in tensors.items() if array.dtype.kind != "f"])
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
    print(f"assumed, as the file does not say it: gamma_min {gamma_min} and gamma_max {gamma_max} (scale of the")
    print(f"timestep), images of {sample_size}×{sample_size} in 256 levels, dropout 0")
    return filled_pipeline(unet, state, schedule)


def save_official(pipe: VDMPipeline, folder: str | os.PathLike, step: int = 0) -> None:
    """A pipeline as a checkpoint of the official JAX code: `checkpoint` and `ckpt-1.flax` in a new `folder`.

    params and ema_params are the same weights, the optimiser's moments are zero, its counter is `step`. The bias of
    our time_emb_proj is added to that of conv1, where it has the same effect, and a network without the flag for
    augmented images gets a column of zeros for it. TensorFlow's files, which hold a counter of saves, are not written.

    Raises: `ValueError` with the list of all that the official network cannot do.
    """
    if not 0 <= step < 2**31:
        raise ValueError(f"step must be within [0, 2^31), got {step}.")
    allowed = {"norm_num_groups": (32,), "norm_eps": (1e-6,), "fourier_exponents": ((), (6, 7))}
    refuse("this pipeline does not fit the official code", unfit(pipe, allowed, heads=1))
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
        array = to_official(ours[name], folded(state, ours[name]).numpy())
        rows = shapes[name][0] - array.shape[0]
        return np.concatenate([array, np.zeros((rows, array.shape[1]))]) if rows else array

    with whole_folder(folder) as new:
        write_checkpoint(new / "ckpt-1.flax", shapes, array_of, step)
        text = 'model_checkpoint_path: "ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n'
        write_atomically(new / "checkpoint", text)
    print(f"the files do not say it, the config must: gamma_min {schedule.config.gamma_min}, gamma_max "
          f"{schedule.config.gamma_max}, sm_n_embd {config.block_out_channels[0]}, sm_n_layer "
          f"{config.layers_per_block}, with_attention {has_attention(unet)}, dropout {config.dropout}")  # fmt: skip


# ---- addtt's code --------------------------------------------------------------------------------------------------


def load_addtt(
    path: str | os.PathLike,
    weights: str = "ema",
    gamma_min: float | None = None,
    gamma_max: float | None = None,
    sample_size: int = 32,
    num_heads: int | None = None,
    norm_num_groups: int | None = None,
) -> VDMPipeline:
    """A `model.pt` of github.com/addtt/variational-diffusion-models as a pipeline with the same outputs, in float32.

    Layouts are PyTorch's; q, k and v are one 1×1 convolution there, `(3C, C, 1, 1)`, and conv_in takes the Fourier
    features (exponents 5 and 6) by frequency and then colour, where ours come by colour and then frequency.

    Args:
        path (`str` or `PathLike`): the file. A `config.yaml` beside it is read, for what no weight says.
        weights (`"ema"` or `"model"`): the averaged weights or the raw ones.
        gamma_min, gamma_max (`float`, *optional*): the configured ends; else the config's, else −13.3 and 5.0.
        sample_size (`int`, defaults to 32): height and width of the images; no file says it.
        num_heads, norm_num_groups (`int`, *optional*): else the config's, else 1 and 32.

    Raises: `ValueError` for files of another kind and tensors that are missing, left over or of another shape.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights must be 'ema' or 'model', got {weights!r}.")
    path = Path(path)
    tensors, config = _addtt_tensors(path, weights), _addtt_config(path.with_name("config.yaml"))
    gamma = {name[-1]: tensors.pop(name).double().numpy() for name in ("gamma.w", "gamma.b") if name in tensors}
    network = ForeignNetwork(path, tensors, "model.conv_in.weight", "model.conv_out.2.weight", axes=(1, 0))
    network.count(r"model\.down_blocks\.(\d+)\.", r"model\.\w+_blocks\.\d+\.attention_block\.")
    inferred = {
        "embedding_dim": network.channels, "n_blocks": network.num_blocks, "input_channels": network.colours,
        "use_fourier_features": network.inputs != network.colours, "attention_everywhere": network.attention,
        "noise_schedule": "learned_linear" if gamma else "fixed_linear",
    }  # fmt: skip
    wrong = [f"{k} is {config[k]!r} there, {v!r} here" for k, v in inferred.items() if config.get(k, v) != v]
    refuse(f"{path} does not belong to the config.yaml beside it", wrong)
    given = {"gamma_min": gamma_min, "gamma_max": gamma_max, "n_attention_heads": num_heads}
    given |= {"norm_groups": norm_num_groups, "dropout_prob": None}
    for (name, value), default in zip([*given.items()], (*PAPER_ENDS, 1, 32, 0.0), strict=True):
        if value is None and name not in config:
            print(f"assumed, as nothing says it: {name} {default}")
        given[name] = config.get(name, default) if value is None else value
        if type(given[name]) not in ((int,) if isinstance(default, int) else (int, float)):
            raise ValueError(f"{name} must be a number, got {given[name]!r}; correct config.yaml or give the option.")
    heads, groups, channels = given["n_attention_heads"], given["norm_groups"], network.channels
    if heads < 1 or channels % heads or groups < 1 or channels % groups:
        raise ValueError(f"heads and groups must divide the {channels} channels, got {heads} and {groups}.")
    unet = network.unet(
        (5, 6), sample_size=sample_size, norm_eps=1e-5, norm_num_groups=groups, attention_head_dim=channels // heads,
        dropout=float(given["dropout_prob"]),
    )  # fmt: skip
    order = _fourier_order(network.colours, len(unet.config.fourier_exponents))

    def convert(key: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = tensor[:, order] if key == "conv_in.weight" else tensor
        return tensor.to(torch.float32, copy=True).reshape(shape).contiguous()

    state = network.state("addtt", unet, _addtt_shape, convert)
    ends = (float(given["gamma_min"]), float(given["gamma_max"]))
    schedule = gamma_from_official(gamma, *ends).float()
    print(f"read {weights}: {network}; γ: {type(schedule).__name__}, configured from {ends[0]} to {ends[1]}")
    print(f"assumed, as no file says it: images of {sample_size}×{sample_size} in 256 levels")
    return filled_pipeline(unet, state, schedule)


def save_addtt(pipe: VDMPipeline, folder: str | os.PathLike) -> None:
    """A pipeline as `model.pt` and `config.yaml` of github.com/addtt/variational-diffusion-models, in a new `folder`.

    The raw and the averaged weights are the same, "opt" is empty. The bias of our time_emb_proj is added to that of
    conv1, where it has the same effect. Raises: `ValueError` with the list of all that its network cannot do.
    """
    import yaml

    allowed = {"norm_eps": (1e-5,), "fourier_exponents": ((), (5, 6)), "augmentation_flag": (False,)}
    curved = isinstance(pipe.noise_schedule, MonotoneGammaNetwork)
    wrong = ["noise_schedule is a network and not a straight line"] if curved else []
    refuse("this pipeline does not fit addtt's code", unfit(pipe, allowed) + wrong)
    schedule, unet = schedule_of(pipe), pipe.unet
    state, config, attention = unet.state_dict(), unet.config, has_attention(unet)
    order = np.argsort(_fourier_order(config.in_channels, len(config.fourier_exponents)))
    tensors = {}
    for key, theirs in tensor_names(config.layers_per_block, attention, "addtt"):
        if key in state:
            tensor = folded(state, key).float()
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
    print("made up, as a pipeline does not say it: batch_size, antithetic times, lr, weight_decay, clip_grad_norm")


def _addtt_tensors(path: Path, weights: str) -> dict[str, torch.Tensor]:
    """The state dict of one set of weights, with q, k and v apart, and one name for the last layer of net2."""
    try:  # mapped, the optimiser's state is never read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251
    except OSError:
        raise
    except Exception as error:  # whatever a broken pickle raises
        raise ValueError(f"{path} is not a file of weights that can be read safely: {str(error)[:300]}") from error
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
            raise ValueError(f"{path}: {key} is there twice, or is no tensor.")
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
        raise ValueError(f"{file} is no YAML file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no list of settings, but a {type(config).__name__}.")
    return config


def _addtt_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1) if ".attentions." in key and len(shape) == 2 else shape


def _fourier_order(colours: int, exponents: int) -> np.ndarray:
    """Where in addtt's conv_in each of our input channels is: by colour then frequency, and the other way round."""
    index = np.arange(2 * exponents * colours).reshape(2, exponents, colours).transpose(0, 2, 1)
    return np.concatenate([np.arange(colours), colours + index.reshape(-1)])


# ---- diffusers -----------------------------------------------------------------------------------------------------


def load_diffusers(path: str | os.PathLike, scheduler: str | os.PathLike | None = None) -> VDMPipeline:
    """A `DDPMPipeline`, or a `UNet2DModel` and a scheduler, as a pipeline with the same network and the same betas.

    `path` and `scheduler` are folders or repositories on the Hub; a pipeline brings its own scheduler.

    Raises: `ValueError` for latent and conditional pipelines and for betas that no scheduler of ours has.
    """
    path, theirs = str(path), None
    for place in (path, scheduler):
        if place is not None and not os.path.isdir(place):
            check_repository_name(os.fspath(place))
    try:
        index = DiffusionPipeline.load_config(path)
    except OSError:  # no model_index.json
        network = _loaded(path, UNet2DModel, UNet2DModel)
    else:
        if index.get("_class_name") == "VDMPipeline":
            raise ValueError(f"{path} is a VDMPipeline already.")
        parts = {name: value for name, value in index.items() if isinstance(value, list | tuple) and value[0]}
        if set(parts) != {"unet", "scheduler"} or parts["unet"][1] not in ("UNet2DModel", "VDMUNet2DModel"):
            raise ValueError(
                f"{path} is a {index.get('_class_name')} of {sorted(parts)}; only a UNet2DModel and a scheduler are "
                "converted: latent models have no likelihood of pixels, and conditional ones are other networks."
            )
        pipe = DiffusionPipeline.from_pretrained(path)
        network, theirs = pipe.unet, pipe.scheduler
    if scheduler is not None:
        theirs = _loaded(str(scheduler), diffusers.DDPMScheduler, diffusers.SchedulerMixin)
    if theirs is None:
        raise ValueError(f"{path} is a network alone; give the scheduler that it was trained with (--scheduler).")
    if network.config.out_channels != network.config.in_channels:
        raise ValueError(
            f"{path} predicts {network.config.out_channels} channels for {network.config.in_channels}, variances too; "
            "a VDMPipeline has none. Its likelihood: evaluate_bpd(unet, scheduler, images)."
        )
    refuse(
        f"{path}: weights",
        [f"{n} holds NaN or infinity" for n, p in network.state_dict().items() if not p.isfinite().all()],
    )
    ours = scheduler_of(theirs)
    with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced at once
        unet = VDMUNet2DModel.from_config(dict(network.config))
    unet.load_state_dict(network.state_dict())
    return VDMPipeline(unet.eval(), ours)


def _loaded(path: str, reader: type, base: type):
    """A component alone, of the class that its config names."""
    name = reader.load_config(path).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{path} is a {name}, and not one of diffusers' {base.__name__}.")
    return kind.from_pretrained(path)


def scheduler_of(theirs) -> LinearBetaScheduler | VDMScheduler:
    """Our scheduler with the betas of one of diffusers': [`LinearBetaScheduler`], or [`VDMScheduler.from_diffusers`].

    What has no counterpart is printed. Raises: `ValueError` where it has no usable table of betas, or thresholds x̂.
    """
    config, kept = theirs.config, {}
    plain = config.get("beta_schedule") == "linear" and config.get("trained_betas") is None
    if plain and not config.get("rescale_betas_zero_snr", False) and not config.get("thresholding", False):
        names = ("num_train_timesteps", "beta_start", "beta_end")
        optional = ("prediction_type", "clip_sample", "clip_sample_range", "timestep_spacing")
        kept = {name: config[name] for name in (*names, *(name for name in optional if name in config))}
        ours = LinearBetaScheduler(**kept, rescale_betas=False)
        said = f"LinearBetaScheduler with {kept}, rescale_betas False"
    else:
        ours = VDMScheduler.from_diffusers(theirs)
        said = f"VDMScheduler with the {len(ours)} levels of {type(theirs).__name__}, timestep_type index"
    same = {"variance_type": ("fixed_small", "fixed_small_log"), "steps_offset": (0,), "eta": (None,)}
    behind = {name: config[name] for name, values in same.items() if name in config and config[name] not in values}
    print(f"scheduler: {said}" + (f"; left behind: {behind}" * bool(behind)))
    return ours


# ---- the command ---------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_vdm.conversion",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, source: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("source", metavar=source)
        added.add_argument("output", metavar="OUTPUT_FOLDER", help="new or empty")
        return added

    official = command("official", "CHECKPOINT_FOLDER", "a checkpoint of the official JAX code to a pipeline")
    official.add_argument(
        "--weights", choices=("ema_params", "params"), default="ema_params", help="default: ema_params"
    )
    addtt = command("addtt", "FILE", "model.pt of github.com/addtt/variational-diffusion-models to a pipeline")
    addtt.add_argument("--weights", choices=("ema", "model"), default="ema", help="default: ema")
    addtt.add_argument("--num_heads", type=int, help="of attention (default: config.yaml's, else 1)")
    addtt.add_argument("--norm_num_groups", type=int, help="default: config.yaml's, else 32")
    for added, where in ((official, ""), (addtt, "config.yaml's, else ")):
        added.add_argument("--gamma_min", type=float, help=f"configured end of γ (default: {where}{PAPER_ENDS[0]})")
        added.add_argument("--gamma_max", type=float, help=f"configured end of γ (default: {where}{PAPER_ENDS[1]})")
        added.add_argument("--sample_size", type=int, default=32, help="height and width of the images (default: 32)")
    theirs = command("diffusers", "PATH_OR_REPO", "a DDPMPipeline or UNet2DModel of diffusers to a pipeline")
    theirs.add_argument("--scheduler", help="folder or repository of the scheduler (default: the pipeline's)")
    back = command("to-official", "PIPELINE", "a saved pipeline to a checkpoint of the official JAX code")
    back.add_argument("--step", type=int, default=0, help="training steps done, as the file shall say (default: 0)")
    command("to-addtt", "PIPELINE", "a saved pipeline to model.pt and config.yaml of addtt's code")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; a `SystemExit` that says what is wrong for input that cannot be converted."""
    tolerate_any_encoding()
    given = {name: value for name, value in vars(parse_options(arguments)).items() if value is not None}
    name, source, output = (given.pop(key) for key in ("command", "source", "output"))
    try:
        check_new(output)
        if name.startswith("to-"):
            save = save_official if name == "to-official" else save_addtt
            save(VDMPipeline.from_pretrained(source), output, **given)
        else:
            load = {"official": load_official, "addtt": load_addtt, "diffusers": load_diffusers}[name]
            pipe = load(source, **given)
            with whole_folder(output) as new:
                pipe.save_pretrained(new)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"conversion {name}: {error}") from error
    print(f"written: {output}")


if __name__ == "__main__":
    main()
