"""Conditions of a network: their names, which of them a network takes, and how one is left out.

A condition is an argument of the network with one row for each image:

* `class_labels`, `(B,)` integers, if its config has `num_class_embeds`;
* `cond_vectors`, `(B, cond_dim)` real numbers, which the network standardizes itself;
* `cond_images`, `(B, cond_channels, h, w)`, of the size of the images or smaller, in the range that the network was
  trained with: train.py gives x in [−1, 1], `diffusion.x_from_levels` of the levels;
* `encoder_hidden_states`, `(B, L, cross_attention_dim)`, the embedded tokens of a text, and optionally
  `encoder_attention_mask`, `(B, L)`, 1 for each token that counts.

Each has a null, which means that it is not known. A network with `null_class`, `null_vectors` or `null_images` learns
it. It is used if the argument is not given. Within a batch, a row has it if its label is `num_class_embeds`, or if its
vector or image is NaN. The null of a text is the embedding of the empty text.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch

NAMES = ("class_labels", "cond_vectors", "cond_images", "encoder_hidden_states", "encoder_attention_mask")
# the entry of the config with the size of a condition, and the one that says whether the network knows its null
SIZES = {"class_labels": "num_class_embeds", "cond_vectors": "cond_dim", "cond_images": "cond_channels",
          "encoder_hidden_states": "cross_attention_dim"}  # fmt: skip
_NULLS = {"class_labels": "null_class", "cond_vectors": "null_vectors", "cond_images": "null_images"}


def conditions_taken(network: Any) -> dict[str, bool]:
    """The conditions that a network takes, and whether it knows the null of each.

    The empty text is the null of `encoder_hidden_states`, which has to be given, so that it is not optional.
    """
    config = getattr(network, "config", None) or {}
    names = [name for name, size in SIZES.items() if config.get(size) is not None]
    return {name: bool(config.get(_NULLS.get(name, ""), False)) for name in names}


def conditions_needed(network: Any) -> list[str]:
    """The conditions without which a network cannot be called, because it does not know their null."""
    return [name for name, has_null in conditions_taken(network).items() if not has_null]


def given_conditions(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that are not `None`; raises `TypeError` for arguments that are no conditions."""
    for name in conditions:
        if name not in NAMES:
            raise TypeError(f"got an unexpected argument {name!r}; the conditions are {', '.join(NAMES)}.")
    return {name: value for name, value in conditions.items() if value is not None}


def rows_of_conditions(
    conditions: Mapping[str, torch.Tensor | None], rows: torch.Tensor, device: str | torch.device | None = None
) -> dict[str, Any]:
    """The conditions of the images `rows`, on `device` if it is given."""
    found = {name: value[rows.to(value.device)] for name, value in conditions.items() if value is not None}
    return found if device is None else {name: value.to(device) for name, value in found.items()}


def null_conditions(network: Any, conditions: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
    """The conditions with the null instead of each whose null the network knows."""
    known, nulls = conditions_taken(network), {}
    for name, value in given_conditions(conditions).items():
        if not known.get(name, False):
            nulls[name] = value
        elif name == "class_labels":
            nulls[name] = torch.full_like(value, network.config.num_class_embeds)
        else:
            nulls[name] = torch.full_like(value, torch.nan)
    return nulls


def withheld(value: torch.Tensor, rows: torch.Tensor, num_classes: int | None = None) -> torch.Tensor:
    """A condition with the null in the rows where `rows`, a boolean of shape `(B,)`, is true."""
    null = torch.nan if num_classes is None else num_classes
    return torch.where(rows.reshape(-1, *[1] * (value.ndim - 1)), torch.full_like(value, null), value)


def check_conditions(network: Any, num_images: int, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that are not `None`.

    Raises: `TypeError` or `ValueError`, which names the condition, unless each one is a tensor with a finite row for
        each image that the network can take, and all are given that it needs.
    """
    given, config = given_conditions(conditions), getattr(network, "config", None) or {}
    _check_labels(given.get("class_labels"), num_images, config)
    for name in ("cond_vectors", "cond_images", "encoder_hidden_states"):
        size = config.get(SIZES[name])
        if name not in given:
            if size is not None and not config.get(_NULLS.get(name, ""), False):
                raise ValueError(
                    f"{name} must be given: this network, with {SIZES[name]}={size}, was built for them and knows "
                    "no null."
                )
            continue
        if size is None:
            raise ValueError(f"{name} were given, but this network takes none; its config has no {SIZES[name]}.")
        _check_values(name, given[name], num_images, size, config)
    mask, texts = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
    if mask is not None and (texts is None or not torch.is_tensor(mask) or mask.shape != texts.shape[:2]):
        raise ValueError(
            "encoder_attention_mask must have a value for each token of encoder_hidden_states, got "
            f"{tuple(mask.shape) if torch.is_tensor(mask) else reprlib.repr(mask)}."
        )
    return given


def _check_labels(labels: Any, num_images: int, config: Mapping[str, Any]) -> None:
    classes, has_null = config.get("num_class_embeds"), bool(config.get("null_class", False))
    if labels is None:
        if classes is not None and not has_null:
            raise ValueError(f"class_labels must be given, in [0, {classes}): this network has no null class.")
        return
    if not torch.is_tensor(labels) or labels.is_floating_point():
        what = str(labels.dtype) if torch.is_tensor(labels) else type(labels).__name__
        raise TypeError(f"class_labels must be a tensor of integers, got {what}; use torch.tensor(labels).long().")
    if labels.shape != (num_images,):
        raise ValueError(f"class_labels must have shape ({num_images},), got {tuple(labels.shape)}.")
    if "num_class_embeds" in config and classes is None:
        raise ValueError("class_labels were given, but this network was built without classes.")
    if classes is not None and num_images:
        low, high, highest = int(labels.min()), int(labels.max()), classes + has_null
        if low < 0 or high >= highest:
            null = f", where {classes} is the null class" if has_null else ""
            raise ValueError(f"class_labels must be within [0, {highest}){null}, got values from {low} to {high}.")


def _check_values(name: str, value: Any, num_images: int, size: int, config: Mapping[str, Any]) -> None:
    """Of one condition of real numbers."""
    if not torch.is_tensor(value) or not value.is_floating_point():
        what = str(value.dtype) if torch.is_tensor(value) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {what}.")
    shape = tuple(value.shape)
    expected = {"cond_vectors": (num_images, size), "cond_images": (num_images, size, "h", "w"),
                "encoder_hidden_states": (num_images, "L", size)}[name]  # fmt: skip
    fits = len(shape) == len(expected) and all(isinstance(e, str) or n == e for n, e in zip(shape, expected))  # noqa: B905
    if not fits:
        words = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape ({words}), got {shape}.")
    full = config.get("sample_size")
    if name == "cond_images" and full is not None:
        height, width = (full, full) if isinstance(full, int) else full
        if shape[2] > height or shape[3] > width:
            raise ValueError(f"cond_images must be of at most {height}×{width} pixels, got {shape[2]}×{shape[3]}.")
    bad = (~value.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{name} must be finite, got NaN or infinity for image {int(bad[0, 0])}; leave the argument out for the "
            "null condition."
        )
