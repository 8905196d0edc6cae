"""A pipeline as the codec uses it: its chain, the lattices of the chain, and the network in float64."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..calibration import Variance
from ..evaluation.chain import Chain, chain_of, chosen_variance, with_variance
from ..evaluation.rows import weights_fingerprint
from ..gamma_scheduler import GammaScheduler, best_timesteps_of
from ..schedulers import VDMScheduler
from .conditions import coding_conditions, conditions_of_header, hashes_of
from .container import Header
from .errors import CodecError
from .lattice import LatticeGaussians
from .levels import Levels
from .network import Steps, coding_network
from .rounding import Rounding
from .stack import Stack

Dtype = Literal["float64", "float32"]
Timesteps = Literal["best", "uniform"]
# of the means in units of their grid; float64 moves them by about 1e-11, and few values are as near to an edge
TOLERANCE = 1e-8
SPACING_UNITS = 64  # the header has the spacing in 1/64 of a standard deviation


@dataclass(frozen=True)
class CodingModel:
    """What encoding and decoding share.

    Attributes:
        header ([`Header`]): the settings, as a file has them.
        chain ([`Chain`]), levels ([`Levels`]), steps ([`Steps`]): the chain, its lattices and its network.
        tables ([`LatticeGaussians`]): probabilities.
        conditions (`dict[str, torch.Tensor]`): those of the network, with a row for each image of the file.
    """

    header: Header
    chain: Chain
    levels: Levels
    steps: Steps
    tables: LatticeGaussians
    conditions: dict[str, torch.Tensor]

    @property
    def tolerance(self) -> float:
        """Of the rounding of means; float32 files are for the same machine and have none."""
        return TOLERANCE if self.header.dtype == "float64" else 0.0


def model_to_encode(
    pipe: Any,
    *,
    num_steps: int,
    timesteps: Timesteps | None,
    variance: Variance | None,
    spacing: float,
    dtype: Dtype,
    batch_size: int,
    image_size: tuple[int, int] | None,
    layout: str,
    conditions: Mapping[str, torch.Tensor | None],
) -> CodingModel:
    """The model and the header of a new file; `timesteps` and `variance` default to the best with a calibration.

    Raises: `TypeError` or `ValueError` for pipelines and arguments that the codec cannot use.
    """
    unet, scheduler, shape, num_levels = _parts(pipe)
    given = coding_conditions(unet, conditions)
    if timesteps not in (None, "best", "uniform"):
        raise ValueError(f"timesteps must be 'best' or 'uniform', got {timesteps!r}.")
    if dtype not in ("float64", "float32"):
        raise ValueError(f"dtype must be 'float64' or 'float32', got {dtype!r}.")
    if not isinstance(spacing, int | float) or not 1 / SPACING_UNITS <= spacing <= 4:
        raise ValueError(f"spacing must be within [{1 / SPACING_UNITS}, 4] standard deviations, got {spacing!r}.")
    calibrated = scheduler.calibration is not None
    if variance is None and calibrated:
        variance = "optimal"
    variance = chosen_variance(scheduler, variance)
    levels = None
    enough = num_steps < len(_grid(scheduler)[0])
    if timesteps == "best" and calibrated and not enough:
        raise ValueError(
            f"num_steps must be at most {len(_grid(scheduler)[0]) - 1} for timesteps='best', got {num_steps}; use "
            "timesteps='uniform'."
        )
    if timesteps == "best" or (timesteps is None and calibrated and enough):
        levels = _best_levels(scheduler, num_steps, variance)
    unfinished = Header(
        num_steps=num_steps,
        levels=levels,
        variance=variance,
        spacing=round(spacing * SPACING_UNITS),
        dtype=dtype,
        shape=shape,
        num_levels=num_levels,
        image_size=image_size,
        layout=layout,
        weights=bytes.fromhex(weights_fingerprint(unet))[:8],
        numbers=bytes(4),
        coder=coder_fingerprint(),
        versions=versions(),
        conditions=hashes_of(given),
    )
    return _model(unet, scheduler, unfinished, given, batch_size, Rounding(TOLERANCE))


def model_to_decode(
    pipe: Any, header: Header, batch_size: int, conditions: Mapping[str, torch.Tensor | None]
) -> CodingModel:
    """The model of a file.

    Raises: [`CodecError`] with what differs, if the file was coded with another model, coder or conditions.
    """
    unet, scheduler, shape, num_levels = _parts(pipe)
    if bytes.fromhex(weights_fingerprint(unet))[:8] != header.weights:
        raise CodecError("the file was coded with another model: the weights have another fingerprint.")
    if shape != header.shape or num_levels != header.num_levels:
        raise CodecError(
            f"the file was coded with another model: it has images of {header.shape} with {header.num_levels} levels, "
            f"the model {shape} with {num_levels}."
        )
    if coder_fingerprint() != header.coder:
        raise CodecError(
            f"the file was coded with another entropy coder: it names {header.versions}, and here is {versions()}; "
            "install that version of constriction."
        )
    given = conditions_of_header(unet, conditions, header.conditions)
    if header.levels is not None and (not header.levels or header.levels[-1] >= len(_grid(scheduler)[0])):
        raise CodecError("the file was coded with another scheduler: it has no such levels.")
    sides, _ = Rounding.sides_from(header.sides, 0)
    return _model(unet, scheduler, header, given, batch_size, Rounding(TOLERANCE, sides))


def _model(
    unet: nn.Module,
    scheduler: Any,
    header: Header,
    conditions: dict[str, torch.Tensor],
    batch_size: int,
    rounding: Rounding,
) -> CodingModel:
    chain = _chain(scheduler, header)
    levels = Levels.of(chain, header.shape, header.spacing / SPACING_UNITS, rounding)
    settings = (header.variance, chain.variance_type, chain.prediction_type, chain.clip_sample, chain.clip_range)
    numbers = hashlib.blake2b(levels.fingerprint() + repr(settings).encode(), digest_size=4).digest()
    if rounding.decodes and numbers != header.numbers:
        raise CodecError(
            "the file was coded with another scheduler: its levels, spacings or variances have another fingerprint. "
            "Use the scheduler, with its calibration, that the file was written with."
        )
    network = coding_network(unet, torch.float64 if header.dtype == "float64" else torch.float32)
    steps = Steps(network, chain, levels, header.shape, batch_size)
    if not rounding.decodes:
        header = replace(header, numbers=numbers, sides=rounding.to_bytes())
    return CodingModel(header, chain, levels, steps, LatticeGaussians(), conditions)


def _parts(pipe: Any) -> tuple[nn.Module, Any, tuple[int, int, int], int]:
    """The network, the scheduler, the shape of its images and the levels of their pixels."""
    unet, scheduler = getattr(pipe, "unet", None), getattr(pipe, "scheduler", None)
    if unet is None or scheduler is None:
        raise TypeError(f"pipe must be a pipeline with a unet and a scheduler, got {type(pipe).__name__}.")
    if not isinstance(scheduler, GammaScheduler):
        scheduler = VDMScheduler.from_diffusers(scheduler)
    config: Any = unet.config
    size = config.get("sample_size")
    if size is None:
        raise ValueError("pipe.unet must have a sample_size in its config, which is the size of its images.")
    height, width = (size, size) if isinstance(size, int) else size
    return unet, scheduler, (config["in_channels"], height, width), num_levels_of(pipe)


def num_levels_of(pipe: Any) -> int:
    """Levels of the pixels of a pipeline; those of diffusers do not say, and have 256."""
    return getattr(pipe, "config", {}).get("num_levels") or 256


def _grid(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels that a chain may visit, and their timesteps."""
    if isinstance(scheduler, VDMScheduler):
        gammas, timesteps, _ = scheduler.levels_of_steps()
        return gammas, timesteps
    count = len(scheduler)
    return torch.arange(count, dtype=torch.float64), torch.arange(count)


def _best_levels(scheduler: Any, num_steps: int, variance: Variance) -> tuple[int, ...]:
    """The levels of the best chain of T steps, as indices into [`_grid`]."""
    is_table = not isinstance(scheduler, VDMScheduler)  # its first level is one of the timesteps
    timesteps = best_timesteps_of(scheduler, num_steps + is_table, variance=variance)
    grid = _grid(scheduler)[1].double()
    chosen = torch.tensor(timesteps[::-1], dtype=torch.float64)
    return tuple((grid[None] - chosen[:, None]).abs().argmin(1).tolist())


def _chain(scheduler: Any, header: Header) -> Chain:
    is_table = not isinstance(scheduler, VDMScheduler)
    if header.levels is None:
        chain = chain_of(scheduler, header.num_steps + is_table, None, "vdm", None, header.num_levels)
    else:
        timesteps = _grid(scheduler)[1][list(header.levels)].flip(0).tolist()
        chain = chain_of(scheduler, None, timesteps, "vdm", None, header.num_levels)
    variance: Any = header.variance
    return with_variance(chain, scheduler, variance, None, header.shape)


# ---- what a file names -------------------------------------------------------------------------------------------


def versions() -> str:
    """Versions of torch, diffusers, constriction and this package."""
    from importlib.metadata import PackageNotFoundError, version

    names = []
    for package in ("torch", "diffusers", "constriction", "diffusers-vdm"):
        try:
            names.append(version(package))
        except PackageNotFoundError:
            names.append("?")
    return " ".join(names)


def coder_fingerprint() -> bytes:
    """Two bytes that differ if the entropy coder gives another message for the same symbols."""
    stack = Stack()
    values = np.arange(-40, 40) * np.arange(80) % 31 - 15
    means, classes = 100 * np.arange(80) - 4000, 7 * np.arange(80) - 100
    stack.push_gaussian(values, means, classes)
    stack.push_uniform(np.arange(16), np.full(16, 17))
    stack.push(np.arange(8), np.array([math.pi * k for k in range(1, 9)], dtype=np.float32))
    return hashlib.blake2b(stack.words().astype("<u4").tobytes(), digest_size=2).digest()
