"""Conditions of the images of a data set beside their classes: numbers in columns, other images, and smaller ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..diffusion import low_resolution, x_from_levels
from .text_table import TextTable


@dataclass(frozen=True)
class ConditionData:
    """Conditions of N images.

    - `vectors`: float64 numbers, shape `(N, d)`, or `None`; `vector_names` are their d names.
    - `images`: uint8 levels of other images, shape `(N, C, h, w)`, or `None`.
    - `upscale_factor`: the condition is the image itself, smaller by this factor; or `None`.
    - `texts`: embedded captions, or `None`; `captions` are the rows of `texts` with the captions of each image, and
      `text_rows`, int64 `(N,)`, the one that is used, the first if none was drawn.
    """

    vectors: torch.Tensor | None = None
    vector_names: tuple[str, ...] = ()
    images: torch.Tensor | None = None
    upscale_factor: int | None = None
    texts: TextTable | None = None
    captions: tuple[tuple[int, ...], ...] = ()
    text_rows: torch.Tensor | None = None

    def slice(self, part: slice) -> ConditionData:
        """Of a slice of the images."""
        names = ("vectors", "images", "text_rows")
        rows = {name: None if getattr(self, name) is None else getattr(self, name)[part] for name in names}
        return replace(self, **rows, captions=self.captions[part])

    def fingerprint(self) -> str:
        """Hash of all values."""
        digest = hashlib.blake2b(repr((self.vector_names, self.upscale_factor)).encode(), digest_size=8)
        for values in (self.vectors, self.images):
            if values is not None:
                digest.update(repr(tuple(values.shape)).encode())
                digest.update(values.contiguous().numpy().tobytes())
        if self.texts is not None:
            digest.update(repr((self.texts.fingerprint, self.captions)).encode())
        return digest.hexdigest()

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each number; a number that is constant has the standard deviation 1."""
        if self.vectors is None:
            return [], []
        std, is_constant = self.vectors.std(0, correction=0), self.vectors.amax(0) == self.vectors.amin(0)
        return self.vectors.mean(0).tolist(), torch.where(is_constant, 1.0, std).tolist()

    def num_channels(self, image_channels: int) -> int | None:
        """Channels of the images that are a condition of images with `image_channels`; `None` without them."""
        if self.upscale_factor is not None:
            return image_channels
        return None if self.images is None else self.images.shape[1]


def read_vectors(rows: Any, columns: Sequence[str], where: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The numbers in `columns` of each row, float64 `(N, d)`, and their names.

    Args:
        rows (`datasets.Dataset`): a column holds numbers, booleans, or lists of numbers of one length.
        columns: their names; a list of n numbers in a column `c` is `c[0]` to `c[n − 1]`.
        where (`str`): the data set, for errors.

    Raises: `ValueError`, with the name of the column, for a missing one, and for a value that is no finite number.
    """
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(f"{where} has no column {missing[0]!r}; its columns are {rows.column_names}.")
    parts, names = [], []
    for name in columns:
        values = [value if isinstance(value, list) else [value] for value in rows[name][:]]
        length = len(values[0]) if values else 0
        for i, value in enumerate(values):
            if len(value) != length or not length:
                raise ValueError(
                    f"column {name!r} of {where} must have lists of one length, got {length} and, in row {i}, "
                    f"{len(value)} numbers."
                )
            for number in value:
                if not isinstance(number, int | float) or not math.isfinite(number):
                    raise ValueError(
                        f"column {name!r} of {where} must have finite numbers, got {number!r} in row {i}; remove or "
                        "fill such rows."
                    )
        parts.append(np.array(values, dtype=np.float64).reshape(len(values), length))
        names += [name] if length == 1 else [f"{name}[{i}]" for i in range(length)]
    return torch.from_numpy(np.concatenate(parts, axis=1)), tuple(names)


def conditions_of(
    network: Any,
    images: torch.Tensor,
    num_levels: int,
    labels: torch.Tensor | None,
    data: ConditionData | None,
    without_text: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Those conditions of a data set that a network takes, by their names in conditions.py, with a row for each image.

    Images become x in [−1, 1]. Conditions that the data set does not have are left out. Images for which
    `without_text`, a boolean `(N,)`, is true get the empty text.
    """
    config: Mapping[str, Any] = getattr(network, "config", None) or {}
    found, data = {}, data or ConditionData()
    if config.get("num_class_embeds") is not None and labels is not None:
        found["class_labels"] = labels
    if config.get("cond_dim") is not None and data.vectors is not None:
        found["cond_vectors"] = data.vectors
    if config.get("cond_channels") is not None:
        levels = data.images
        if data.upscale_factor is not None:
            levels = low_resolution(images, data.upscale_factor)
        if levels is not None:
            found["cond_images"] = x_from_levels(levels, num_levels, torch.float32)
    if config.get("cross_attention_dim") is not None and data.texts is not None and data.text_rows is not None:
        rows = data.text_rows if without_text is None else torch.where(without_text, 0, data.text_rows)
        found["encoder_hidden_states"], found["encoder_attention_mask"] = data.texts.rows(rows)
    return found
