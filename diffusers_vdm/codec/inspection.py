"""Where the bits of a file went: by image, by noise level, and against the error of x̂."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import plots
from ..diffusion import prior_kl_nats, x_from_levels
from ..evaluation.chain import term_nats
from .chain_code import Accounts
from .container import Reader
from .files import decoded, opened
from .lattice import STD_STEPS
from .model import CodingModel

_SHOWN = 6  # images whose x̂ are drawn
_COLUMNS = 10


@dataclass
class Inspection:
    """Measurements of a decoded file, in bits.

    Attributes:
        gammas (`list[float]`): γ of z_0 … z_T.
        decoder_bits, prior_bits (`float`), step_bits (`np.ndarray` of shape `(T,)`): the terms of the bound at the
            latents of the code, for the images that the network codes: p(x | z_0), the prior of z_T, and the step
            down to each z_k.
        image_bits (`np.ndarray` of shape `(N,)`): of each tile that the network codes.
        num_values (`int`): their values.
        x_hat_mse (`np.ndarray` of shape `(T,)`): mean of (x − x̂)² at z_{k+1}, of values in [−1, 1].
        pictures (`list[np.ndarray]`): x̂ at some levels, from the noisiest on, and x; `(B, C, H, W)` in [−1, 1].
    """

    gammas: list[float]
    decoder_bits: float = 0.0
    prior_bits: float = 0.0
    step_bits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    image_bits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    num_values: int = 0
    x_hat_mse: np.ndarray = field(default_factory=lambda: np.zeros(0))
    pictures: list[np.ndarray] = field(default_factory=list)

    def rate_distortion(self) -> tuple[np.ndarray, np.ndarray]:
        """The model's rate–distortion curve: bits/dim spent down to z_k, and the root of the mean of (x − x̂)² there.

        Both have shape `(T,)`, from the noisiest level on [Ho et al. 2020, §4.3].
        """
        spent = self.prior_bits + np.concatenate([[0.0], np.cumsum(self.step_bits[:0:-1])])
        return spent / self.num_values, np.sqrt(self.x_hat_mse[::-1])


def inspect_bits(
    pipe: Any,
    path: str | os.PathLike,
    *,
    batch_size: int = 64,
    progress_bar: bool = True,
    **conditions: torch.Tensor | None,
) -> Inspection:
    """Decodes a file and measures where its bits went.

    Args:
        pipe, path, batch_size, progress_bar, conditions: as in `decompress`.

    Raises: `CodecError` as `decompress`.
    """
    with opened(pipe, path, batch_size, conditions) as (reader, model):
        return _inspected(reader, model, progress_bar)


def _inspected(reader: Reader, model: CodingModel, progress_bar: bool) -> Inspection:
    chain, spacing = model.chain, model.levels.spacing
    gammas, snr = [float(chain.gamma_0), *chain.gammas.tolist()], torch.exp(-chain.gammas)
    num_levels, shape, steps = reader.header.num_levels, reader.header.shape, reader.header.num_steps
    found = Inspection(gammas, step_bits=np.zeros(steps), x_hat_mse=np.zeros(steps))
    kept = sorted({round(i * (steps - 1) / (_COLUMNS - 1)) for i in range(_COLUMNS)})
    images: list[np.ndarray] = []

    def log_variances(k: int, classes: np.ndarray | int) -> torch.Tensor | None:
        if chain.variance_type == "fixed_small":
            return None
        return 2 * (torch.as_tensor(classes) * (math.log(2) / STD_STEPS) + math.log(spacing[k]))

    def add(accounts: Accounts, items: np.ndarray) -> None:
        found.decoder_bits += accounts.decoder
        images.append(accounts.images)
        found.num_values += items.size
        x = x_from_levels(torch.from_numpy(items), num_levels, torch.float64).numpy()
        for k, (x_hat, classes) in zip(range(steps - 1, -1, -1), accounts.steps, strict=True):
            squared = np.square(x - x_hat)
            found.x_hat_mse[k] += float(squared.sum())
            error = snr[k] * torch.from_numpy(squared).flatten()
            found.step_bits[k] += float(term_nats(chain, k, error, log_variances(k, classes)).sum()) / math.log(2)
        prior = prior_kl_nats(torch.from_numpy(x), chain.gammas[-1])
        found.prior_bits += float(prior.sum()) / math.log(2)
        if not found.pictures:
            drawn = [accounts.steps[i][0][:_SHOWN] for i in kept] + [x[:_SHOWN]]
            found.pictures = [part.reshape(-1, *shape) for part in drawn]

    for _ in decoded(reader, model, progress_bar=progress_bar, inspect=add):
        pass
    if found.num_values:
        found.image_bits = np.concatenate(images)
        found.x_hat_mse /= found.num_values
    return found


def draw(found: Inspection, path: str | os.PathLike) -> None:
    """Writes the figure: bits by level, bits by image, rate and distortion, and x̂ along it."""
    rate, error = found.rate_distortion()
    plots.plot_code(
        path,
        gammas=found.gammas,
        step_bpd=(found.step_bits / found.num_values).tolist(),
        image_bpd=(found.image_bits * len(found.image_bits) / found.num_values).tolist(),
        rate_bpd=rate.tolist(),
        rmse=error.tolist(),
        pictures=torch.from_numpy(np.stack(found.pictures, axis=1)).float() / 2 + 0.5,
        title=f"decoder {found.decoder_bits / found.num_values:.3f} bits/dim, steps "
        f"{found.step_bits.sum() / found.num_values:.3f}, prior {found.prior_bits / found.num_values:.4f}",
    )
