"""Training batches with keyed randomness: images, times and noise.

Every random draw in training is a function of (seed, step, position in the global batch), never of earlier draws. So a
resumed run equals an uninterrupted one. How the batch is split over processes and accumulation steps affects only the
masks of dropout, which are drawn for each batch of each process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..data.image_stream import ImageStream
from ..data.images import ImageSet
from ..randomness import keyed_generator

# fraction of the class labels that are withheld from a class-conditional network
LABEL_DROPOUT = 0.1


def batch_indices(positions: Iterable[int], num_images: int, seed: int) -> torch.Tensor:
    """Indices of the images at `positions` of the training order: an endless sequence of permutations, one per epoch.

    The permutation of an epoch is keyed on (seed, epoch), so a resumed run need not replay earlier epochs.
    """
    positions = list(positions)
    orders = {epoch: _order(num_images, seed, epoch) for epoch in {p // num_images for p in positions}}
    return torch.stack([orders[p // num_images][p % num_images] for p in positions])


@functools.lru_cache(maxsize=2)  # the current epoch and the next one
def _order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=keyed_generator(seed, "order", epoch))


@dataclass(frozen=True)
class KeyedBatch:
    """One micro-batch and all its randomness, on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor | None
    augmented: torch.Tensor
    withheld: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eps_0: torch.Tensor


def keyed_batch(
    data: ImageSet | ImageStream,
    step: int,
    rows: range,
    global_batch_size: int,
    seed: int,
    random_flip: bool = False,
    random_rotation: bool = False,
    label_dropout: float = LABEL_DROPOUT,
) -> KeyedBatch:
    """Rows `rows` of the global batch of `step`: images in keyed order, and all random draws for them.

    t_i = (u + i/B) mod 1 over the global batch, whichever process computes row i [VDM app. I.1]. `augmented` is 1 for
    images that were flipped or rotated by a multiple of 90°, which the network needs to know [VDM app. B]. `withheld`
    is true for a fraction `label_dropout` of the labels.
    """
    positions = [step * global_batch_size + i for i in rows]
    if isinstance(data, ImageSet):
        index = batch_indices(positions, len(data), seed)
        images, labels = data.images[index], None if data.labels is None else data.labels[index]
    else:
        images, labels = data.batch(positions)
    shift = torch.rand((), generator=keyed_generator(seed, "t", step), dtype=torch.float64)
    t = (shift + torch.tensor(list(rows), dtype=torch.float64) / global_batch_size) % 1.0
    noise = torch.empty((len(rows), 2, *images.shape[1:]))
    augmented, withheld = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    turned = []
    for k, i in enumerate(rows):
        generator = keyed_generator(seed, "noise", step, i)
        torch.randn(noise.shape[1:], generator=generator, out=noise[k])
        flip, withhold, turn = torch.rand(3, generator=generator).tolist()
        quarters = int(4 * turn) if random_rotation else 0
        flip = random_flip and flip < 0.5
        withheld[k], augmented[k] = withhold < label_dropout, float(flip or quarters > 0)
        if augmented[k]:
            image = images[k].flip(-1) if flip else images[k]
            turned.append((k, torch.rot90(image, quarters, (-2, -1))))
    if turned:
        images = images.clone()  # never change the data set, which may be memory-mapped
        for k, image in turned:
            images[k] = image
    eps, eps_0 = (part.contiguous() for part in noise.unbind(1))
    return KeyedBatch(images, labels, augmented, withheld, t, eps, eps_0)
