"""Training batches with keyed randomness: images, times and noise.

Every random draw in training is a function of (seed, step, position in the global batch), never of earlier draws. So a
resumed run equals an uninterrupted one. How the batch is split over processes and accumulation steps affects only the
masks of dropout, which are drawn for each batch of each process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ..data.conditions import ConditionData
from ..data.image_stream import ImageStream
from ..data.images import ImageSet
from ..randomness import keyed_generator

# fraction of the conditions that are withheld from a network
CONDITION_DROPOUT = 0.1
# numbers that say how an image was augmented
NUM_AUGMENTATION_FLAGS = 6
# conditions in the order of their draws
_WITHHELD = ("class_labels", "cond_vectors", "cond_images", "encoder_hidden_states")


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
    withheld: dict[str, torch.Tensor]
    conditions: ConditionData
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
    condition_dropout: float = CONDITION_DROPOUT,
    random_shift: int = 0,
    augmentation_rate: float = 1.0,
    drop_together: bool = False,
) -> KeyedBatch:
    """Rows `rows` of the global batch of `step`: images in keyed order, and all random draws for them.

    t_i = (u + i/B) mod 1 over the global batch, whichever process computes row i [VDM app. I.1]. `augmented` is 1 for
    images that were flipped, rotated by a multiple of 90° or shifted, which the network needs to know [VDM app. B].
    `augmentations` says how, in the [`NUM_AUGMENTATION_FLAGS`] columns flip, 90°, 180°, 270°, and the shifts to the
    right and down as fractions of `random_shift` [Karras et al. 2022, app. F.2]. A fraction `augmentation_rate` of the
    images is flipped or rotated at all, and, drawn apart, the same fraction is shifted; pixels from outside of the
    image have level 0. Images that are a condition are flipped and rotated like theirs. `withheld` is, for each
    condition, true for a fraction `condition_dropout` of the images: drawn for each condition, or with
    `drop_together` once for all of them. One of the captions of an image is drawn.
    """
    positions = [step * global_batch_size + i for i in rows]
    known = data.conditions or ConditionData()
    vectors = others = text_rows = None
    index = torch.zeros(0, dtype=torch.int64)
    if isinstance(data, ImageSet):
        index = batch_indices(positions, len(data), seed)
        images, labels = data.images[index], None if data.labels is None else data.labels[index]
        parts = (known.vectors, known.images, known.text_rows)
        vectors, others, text_rows = (None if part is None else part[index] for part in parts)
    else:
        images, labels = data.batch(positions)
    shift = torch.rand((), generator=keyed_generator(seed, "t", step), dtype=torch.float64)
    t = (shift + torch.tensor(list(rows), dtype=torch.float64) / global_batch_size) % 1.0
    noise = torch.empty((len(rows), 2, *images.shape[1:]))
    augmentations = torch.zeros(len(rows), NUM_AUGMENTATION_FLAGS)
    withheld = {name: torch.zeros(len(rows), dtype=torch.bool) for name in _WITHHELD}
    changed = []
    for k, i in enumerate(rows):
        generator = keyed_generator(seed, "noise", step, i)
        torch.randn(noise.shape[1:], generator=generator, out=noise[k])
        flip, withhold, turn, turns, shifts, *shift = torch.rand(7, generator=generator).tolist()
        *withhold, caption = withhold, *torch.rand(len(_WITHHELD), generator=generator).tolist()
        if text_rows is not None:
            choices = known.captions[int(index[k])]
            text_rows[k] = choices[int(caption * len(choices))]
        for name, drawn in zip(_WITHHELD, withhold, strict=True):
            withheld[name][k] = (withhold[0] if drop_together else drawn) < condition_dropout
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
            changed.append((k, _shifted(_turned(images[k], flips, quarters), right, down)))
            if others is not None:
                others[k] = _turned(others[k], flips, quarters)
    if changed:
        images = images.clone()  # never change the data set, which may be memory-mapped
        for k, image in changed:
            images[k] = image
    eps, eps_0 = (part.contiguous() for part in noise.unbind(1))
    conditions = replace(known, vectors=vectors, images=others, text_rows=text_rows)
    return KeyedBatch(images, labels, augmentations, withheld, conditions, t, eps, eps_0)


def _turned(image: torch.Tensor, flips: bool, quarters: int) -> torch.Tensor:
    """The image, flipped and then rotated by quarters of a turn."""
    return torch.rot90(image.flip(-1) if flips else image, quarters, (-2, -1))


def _shifted(image: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """The image moved to the right and down; what comes in from outside is 0."""
    return torch.nn.functional.pad(image, (right, -right, down, -down))
