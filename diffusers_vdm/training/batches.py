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
# numbers that say how an image was augmented
NUM_AUGMENTATION_FLAGS = 6


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
    augmentations: torch.Tensor
    withheld: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eps_0: torch.Tensor

    @property
    def augmented(self) -> torch.Tensor:
        """1 for images that were changed, 0 for others."""
        return self.augmentations.ne(0).any(1).float()


def keyed_batch(
    data: ImageSet | ImageStream,
    step: int,
    rows: range,
    global_batch_size: int,
    seed: int,
    random_flip: bool = False,
    random_rotation: bool = False,
    label_dropout: float = LABEL_DROPOUT,
    random_shift: int = 0,
    augmentation_rate: float = 1.0,
) -> KeyedBatch:
    """Rows `rows` of the global batch of `step`: images in keyed order, and all random draws for them.

    t_i = (u + i/B) mod 1 over the global batch, whichever process computes row i [VDM app. I.1]. `augmented` is 1 for
    images that were flipped, rotated by a multiple of 90° or shifted, which the network needs to know [VDM app. B].
    `augmentations` says how, in the [`NUM_AUGMENTATION_FLAGS`] columns flip, 90°, 180°, 270°, and the shifts to the
    right and down as fractions of `random_shift` [Karras et al. 2022, app. F.2]. `withheld` is true for a fraction
    `label_dropout` of the labels. A fraction `augmentation_rate` of the images is flipped or rotated at all, and,
    drawn apart, the same fraction is shifted; pixels from outside of the image have level 0.
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
    augmentations, withheld = torch.zeros(len(rows), NUM_AUGMENTATION_FLAGS), torch.zeros(len(rows), dtype=torch.bool)
    changed = []
    for k, i in enumerate(rows):
        generator = keyed_generator(seed, "noise", step, i)
        torch.randn(noise.shape[1:], generator=generator, out=noise[k])
        flip, withhold, turn, turns, shifts, *shift = torch.rand(7, generator=generator).tolist()
        withheld[k] = withhold < label_dropout
        turns, shifts = turns < augmentation_rate, random_shift > 0 and shifts < augmentation_rate
        flips = turns and random_flip and flip < 0.5
        quarters = int(4 * turn) if turns and random_rotation else 0
        right, down = (int((2 * random_shift + 1) * u) - random_shift if shifts else 0 for u in shift)
        augmentations[k, 0] = flips
        if quarters:
            augmentations[k, quarters] = 1.0
        if right or down:
            augmentations[k, 4], augmentations[k, 5] = right / random_shift, down / random_shift
        if augmentations[k].any():
            image = torch.rot90(images[k].flip(-1) if flips else images[k], quarters, (-2, -1))
            changed.append((k, _shifted(image, right, down)))
    if changed:
        images = images.clone()  # never change the data set, which may be memory-mapped
        for k, image in changed:
            images[k] = image
    eps, eps_0 = (part.contiguous() for part in noise.unbind(1))
    return KeyedBatch(images, labels, augmentations, withheld, t, eps, eps_0)


def _shifted(image: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """The image moved to the right and down; what comes in from outside is 0."""
    return torch.nn.functional.pad(image, (right, -right, down, -down))
