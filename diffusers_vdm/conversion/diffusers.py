"""Convert diffusers pipelines with betas to VDM pipelines."""

from __future__ import annotations

import os
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from ..denoiser import is_learned
from ..pipeline import VDMPipeline
from ..repository import check_repository_name
from ..schedulers import LinearBetaScheduler, VDMScheduler
from ..unet import VDMUNet2DModel
from .foreign_networks import (
    raise_if_any,
)


def load_diffusers(path: str | os.PathLike, scheduler: str | os.PathLike | None = None) -> VDMPipeline:
    """Load a `DDPMPipeline`, or a `UNet2DModel` and a scheduler, as a pipeline with the same network and betas.

    `path` and `scheduler` are folders or Hub repositories; a pipeline contains its own scheduler.

    Raises: `ValueError` for latent and conditional pipelines and for betas that our schedulers do not support.
    """
    path, theirs = str(path), None
    for place in (path, scheduler):
        if place is not None and not os.path.isdir(place):
            check_repository_name(os.fspath(place))
    try:
        index: Any = DiffusionPipeline.load_config(path)
    except OSError:  # no model_index.json
        network = _loaded(path, UNet2DModel, UNet2DModel)
    else:
        if index.get("_class_name") == "VDMPipeline":
            raise ValueError(f"{path} is already a VDMPipeline.")
        parts = {name: value for name, value in index.items() if isinstance(value, list | tuple) and value[0]}
        if set(parts) != {"unet", "scheduler"} or parts["unet"][1] not in ("UNet2DModel", "VDMUNet2DModel"):
            raise ValueError(
                f"{path} must consist of a UNet2DModel and a scheduler, got a {index.get('_class_name')} of "
                f"{sorted(parts)}; latent models have no pixel likelihood, and conditional ones use other networks."
            )
        pipe = DiffusionPipeline.from_pretrained(path)
        network, theirs = pipe.unet, pipe.scheduler
    if scheduler is not None:
        theirs = _loaded(str(scheduler), diffusers.DDPMScheduler, diffusers.SchedulerMixin)
    if theirs is None:
        raise ValueError(f"{path} has no scheduler; set scheduler (--scheduler) to the one that it was trained with.")
    _check_channels(path, network, theirs)
    raise_if_any(
        f"{path}: weights",
        [f"{n} holds NaN or infinity" for n, p in network.state_dict().items() if not p.isfinite().all()],
    )
    ours = scheduler_of(theirs)
    with torch.random.fork_rng(devices=[]):  # random initialization must not change the global state
        unet: Any = VDMUNet2DModel.from_config(dict(network.config))
    unet.load_state_dict(network.state_dict())
    return VDMPipeline(unet.eval(), ours)


def _check_channels(path: str, network: Any, scheduler: Any) -> None:
    """Raises `ValueError` unless the network predicts variances if and only if `variance_type` is a learned one."""
    inputs, outputs = network.config.in_channels, network.config.out_channels
    variance_type = scheduler.config.get("variance_type")
    expected = 2 * inputs if is_learned(variance_type) else inputs
    if outputs != expected:
        raise ValueError(
            f"{path} must have {expected} output channels for its {inputs} input channels if its scheduler has "
            f"variance_type={variance_type!r}, got {outputs}; set scheduler (--scheduler) to the one that it was "
            "trained with, with 'learned_range' or 'learned' if the network also predicts variances."
        )


def _loaded(path: str, reader: type, base: type):
    """A single component, of the class that its config names."""
    name = reader.load_config(path).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{path} must be one of diffusers' {base.__name__} classes, got {name}.")
    return kind.from_pretrained(path)


def scheduler_of(theirs) -> LinearBetaScheduler | VDMScheduler:
    """A [`LinearBetaScheduler`], or a scheduler from [`VDMScheduler.from_diffusers`], with the betas of `theirs`.

    Settings without a counterpart are printed.

    Raises: `ValueError` if the scheduler has no usable table of betas, or if it thresholds x̂.
    """
    config, kept = theirs.config, {}
    plain = config.get("beta_schedule") == "linear" and config.get("trained_betas") is None
    if plain and not config.get("rescale_betas_zero_snr", False) and not config.get("thresholding", False):
        names = ("num_train_timesteps", "beta_start", "beta_end")
        optional = ("prediction_type", "clip_sample", "clip_sample_range", "timestep_spacing")
        kept = {name: config[name] for name in (*names, *(name for name in optional if name in config))}
        if is_learned(config.get("variance_type")):
            kept["variance_type"] = config["variance_type"]
        ours = LinearBetaScheduler(**kept, rescale_betas=False)
        description = f"LinearBetaScheduler with {kept}, rescale_betas False"
    else:
        ours = VDMScheduler.from_diffusers(theirs)
        description = f"VDMScheduler with the {len(ours)} levels of {type(theirs).__name__}, timestep_type index"
    same = {
        "variance_type": ("fixed_small", "fixed_small_log", "learned", "learned_range"),
        "steps_offset": (0,),
        "eta": (None,),
    }
    ignored = {name: config[name] for name, values in same.items() if name in config and config[name] not in values}
    print(f"scheduler: {description}" + (f"; ignored: {ignored}" * bool(ignored)))
    return ours
