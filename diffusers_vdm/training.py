"""What a training loop needs and a test must hold: keyed randomness, averaged weights, metrics.

Every random draw of training is a function of (seed, step, position in the global batch), never of what was drawn
before. So a resumed run is the run that was never stopped, and how the batch is split over processes and accumulation
steps matters for nothing but the masks of dropout, which are drawn for each batch of each process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from .files import write_atomically
from .images import ImageSet
from .randomness import key_to_seed, keyed_generator  # noqa: F401

# ---- keyed randomness --------------------------------------------------------------------------------------------


# share of the images whose class is withheld from a class-conditional network
LABEL_DROPOUT = 0.1


def batch_indices(positions: Iterable[int], num_images: int, seed: int) -> torch.Tensor:
    """Which image stands at each of `positions` of the endless order of training: one permutation after another.

    The permutation of an epoch is keyed on (seed, epoch), so no order needs to be replayed to find one's place.
    """
    positions = list(positions)
    epochs = {position // num_images for position in positions}
    orders = {e: torch.randperm(num_images, generator=keyed_generator(seed, "order", e)) for e in epochs}
    return torch.stack([orders[p // num_images][p % num_images] for p in positions])


@dataclass(frozen=True)
class KeyedBatch:
    """One micro-batch and all its randomness, on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor | None
    flipped: torch.Tensor
    withheld: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eps_0: torch.Tensor


def keyed_batch(
    data: ImageSet, step: int, rows: range, global_batch_size: int, seed: int, random_flip: bool = False
) -> KeyedBatch:
    """Rows `rows` of the global batch of `step`: images in keyed order, and (t, ε, ε_0, flip, label withheld) of each.

    t_i = (u + i/B) mod 1 over the whole global batch, whoever computes its rows [VDM app. I.1].
    """
    index = batch_indices((step * global_batch_size + i for i in rows), len(data), seed)
    images = data.images[index]
    shift = torch.rand((), generator=keyed_generator(seed, "t", step), dtype=torch.float64)
    t = (shift + torch.tensor(list(rows), dtype=torch.float64) / global_batch_size) % 1.0
    noise, flipped, withheld = [], [], []
    for i in rows:
        generator = keyed_generator(seed, "noise", step, i)
        noise.append(torch.randn((2, *images.shape[1:]), generator=generator))
        flip, withhold = torch.rand(2, generator=generator).tolist()
        flipped.append(random_flip and flip < 0.5)
        withheld.append(withhold < LABEL_DROPOUT)
    eps, eps_0 = torch.stack(noise, 1)
    flips = torch.tensor(flipped)
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    labels = None if data.labels is None else data.labels[index]
    return KeyedBatch(images, labels, flips.float(), torch.tensor(withheld), t, eps, eps_0)


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Sequence[nn.Parameter]):
    """Within the context the parameters hold the averaged weights; nothing changes if `ema` is `None`."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


# ---- metrics -----------------------------------------------------------------------------------------------------


def append_metrics(path: str | os.PathLike, metrics: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Keeps the lines up to `step`: what comes after the checkpoint will be written again."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept))
