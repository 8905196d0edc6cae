"""Pipelines of diffusers with betas as pipelines of ours."""

from __future__ import annotations

import os

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from ..denoiser import is_learned
from ..pipeline import VDMPipeline
from ..repository import check_repository_name
from ..schedulers import LinearBetaScheduler, VDMScheduler
from ..unet import VDMUNet2DModel
from .foreign_networks import (
    refuse,
)


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
    _check_channels(path, network, theirs)
    refuse(
        f"{path}: weights",
        [f"{n} holds NaN or infinity" for n, p in network.state_dict().items() if not p.isfinite().all()],
    )
    ours = scheduler_of(theirs)
    with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced at once
        unet = VDMUNet2DModel.from_config(dict(network.config))
    unet.load_state_dict(network.state_dict())
    return VDMPipeline(unet.eval(), ours)


def _check_channels(path: str, network: UNet2DModel, scheduler) -> None:
    """`ValueError` unless the network predicts variances where the scheduler has a learned `variance_type` alone."""
    inputs, outputs = network.config.in_channels, network.config.out_channels
    variance_type = scheduler.config.get("variance_type")
    expected = 2 * inputs if is_learned(variance_type) else inputs
    if outputs != expected:
        raise ValueError(
            f"{path} must have {expected} output channels for its {inputs} input channels where its scheduler has "
            f"variance_type={variance_type!r}, got {outputs}; give the scheduler that it was trained with "
            "(--scheduler), 'learned_range' or 'learned' where the network also predicts variances."
        )


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
        if is_learned(config.get("variance_type")):
            kept["variance_type"] = config["variance_type"]
        ours = LinearBetaScheduler(**kept, rescale_betas=False)
        said = f"LinearBetaScheduler with {kept}, rescale_betas False"
    else:
        ours = VDMScheduler.from_diffusers(theirs)
        said = f"VDMScheduler with the {len(ours)} levels of {type(theirs).__name__}, timestep_type index"
    same = {
        "variance_type": ("fixed_small", "fixed_small_log", "learned", "learned_range"),
        "steps_offset": (0,),
        "eta": (None,),
    }
    behind = {name: config[name] for name, values in same.items() if name in config and config[name] not in values}
    print(f"scheduler: {said}" + (f"; left behind: {behind}" * bool(behind)))
    return ours
