"""The conditions of a sampling call: what a user gives, as one row for each image.

A condition is one for all images, or a list with one for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from . import call_arguments, diffusion
from .conditions import check_conditions, given_conditions
from .editing import image_levels
from .texts import check_texts, encode_texts

_WORDS = {"class_labels": "class", "cond_vectors": "vector", "cond_images": "image",
          "encoder_hidden_states": "prompt", "encoder_attention_mask": "prompt"}  # fmt: skip


def condition_vectors(value: Any, cond_dim: int) -> torch.Tensor:
    """Vectors in float32 or better, `(cond_dim,)` if there is one, and `(n, cond_dim)` for a list of them.

    Raises: `TypeError` or `ValueError` unless `value` is a list, an array or a tensor of numbers of these shapes.
    """
    try:
        # Python's numbers are float64, as those of the training are; float32 would lose digits of large ones
        found = torch.as_tensor(np.asarray(value) if isinstance(value, list | tuple) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"cond_vectors must be a list, an array or a tensor of numbers, got a {type(value).__name__}."
        ) from None
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"cond_vectors must be real numbers, got {found.dtype}.")
    if found.ndim not in (1, 2) or found.shape[-1] != cond_dim or not len(found):
        raise ValueError(f"cond_vectors must have shape ({cond_dim},) or (B, {cond_dim}), got {tuple(found.shape)}.")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def conditions_of_call(
    network: Any, num_levels: int, class_labels: Any = None, cond_vectors: Any = None, image: Any = None,
    cond_images: torch.Tensor | None = None, texts: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:  # fmt: skip
    """The conditions that are not `None`, with a row for each one that was given, and the names of single ones.

    Args:
        network (`nn.Module`): takes the conditions.
        num_levels (`int`): levels of `image`.
        class_labels, cond_vectors, image, cond_images: arguments of the pipeline; `image` becomes `cond_images`.
        texts: embedded prompts and their mask, as [`prompt_conditions`] gives them.

    Raises: `TypeError`, `ValueError` for values of another kind or shape.
    """
    given: dict[str, torch.Tensor] = {}
    if class_labels is not None:
        given["class_labels"] = call_arguments.labels(class_labels)
    if cond_vectors is not None:
        cond_dim = network.config.get("cond_dim")
        if cond_dim is None:
            raise ValueError("cond_vectors were given, but this network takes none; its config has no cond_dim.")
        given["cond_vectors"] = condition_vectors(cond_vectors, cond_dim)
    dimensions = {"class_labels": 1, "cond_vectors": 2}
    single = {name for name, value in given.items() if value.ndim < dimensions[name]}
    given = {name: value[None] if name in single else value for name, value in given.items()}
    if image is not None:
        levels = image_levels("image", image, None, num_levels)
        given["cond_images"] = diffusion.x_from_levels(levels, num_levels, torch.float32)
    elif cond_images is not None:
        if not torch.is_tensor(cond_images) or cond_images.ndim != 4 or not cond_images.is_floating_point():
            raise TypeError("cond_images must be a floating-point torch.Tensor of shape (B, C, h, w).")
        given["cond_images"] = cond_images
    given |= texts or {}
    for name in ("cond_images", "encoder_hidden_states", "encoder_attention_mask"):
        if len(given.get(name, ())) == 1:
            single.add(name)
    return given, frozenset(single)


def prompt_conditions(
    text_encoder: Any, tokenizer: Any, name: str, prompt: Any, embeds: Any = None, mask: Any = None
) -> dict[str, Any]:
    """The embedded tokens of `prompt`, or `embeds`, and their mask; empty if neither is given.

    Args:
        text_encoder, tokenizer: those of the pipeline, or `None`.
        name (`str`): `"prompt"` or `"negative_prompt"`, for errors.
        prompt (`str` or `list[str]`, *optional*): texts.
        embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*), mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            texts that are embedded already.

    Raises: `TypeError`, `ValueError` for values of another kind, and for a prompt without a text encoder.
    """
    if embeds is not None:
        if prompt is not None:
            raise ValueError(f"pass either {name} or {name}_embeds, not both.")
        if not torch.is_tensor(embeds) or embeds.ndim != 3:
            raise TypeError(f"{name}_embeds must be a torch.Tensor of shape (B, L, D).")
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask
        if not torch.is_tensor(mask):
            raise TypeError(f"{name}_attention_mask must be a torch.Tensor of shape (B, L).")
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.to(embeds.device)}
    if mask is not None:
        raise ValueError(f"{name}_attention_mask needs {name}_embeds; a {name} has its own.")
    if prompt is None:
        return {}
    texts = check_texts(name, prompt)
    if text_encoder is None or tokenizer is None:
        raise ValueError(f"{name} needs a pipeline with a text_encoder and a tokenizer; pass {name}_embeds instead.")
    hidden, mask = encode_texts(text_encoder, tokenizer, texts)
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def batch_of_conditions(
    network: Any,
    batch_size: int | None,
    each: int,
    conditions: Mapping[str, torch.Tensor | None],
    single: frozenset[str] = frozenset(),
) -> tuple[int, dict[str, torch.Tensor]]:
    """The number of images of a call, and its conditions with a row for each of them.

    Args:
        network (`nn.Module`): takes the conditions.
        batch_size (`int`, *optional*): number of images.
        each (`int`): images for each of the conditions.
        conditions: those that were given, with a row for each of them, or a row for all of those in `single`.
        single: names of the conditions that are the same for all images.

    Raises: `ValueError`, `TypeError` for numbers that do not fit each other, and as [`check_conditions`].
    """
    given = given_conditions(conditions)
    if batch_size is not None:
        batch_size = call_arguments.positive_integer("batch_size", batch_size)
    each = call_arguments.positive_integer("num_images_per_prompt", each)
    if each > 1 and not given:
        raise ValueError(
            f"num_images_per_prompt needs class_labels or another condition, got {each} without any; set "
            f"batch_size={each} to get that number of images without labels."
        )
    if each > 1 and single >= given.keys():
        single = frozenset()
    lists = {name: len(value) for name, value in given.items() if name not in single}
    count = batch_size or max(lists.values(), default=1) * each
    for name, number in lists.items():
        if number * each != count:
            word = _WORDS[name]
            raise ValueError(
                f"{name} must be one {word} or {count} of them, got {number}"
                + (f" with num_images_per_prompt={each}, which makes {number * each} images" if each > 1 else "")
                + f"; leave out batch_size={count}, or set it to the total number of images."
            )
    rows = {
        name: value.expand(count, *value.shape[1:]) if name in single else value.repeat_interleave(each, dim=0)
        for name, value in given.items()
    }
    return count, check_conditions(network, count, rows)


def negative_batch(texts: Mapping[str, torch.Tensor], count: int, each: int) -> dict[str, Any]:
    """Embedded negative prompts: one for all images, or a row for each of `count`, `each` of them for one prompt.

    Raises: `ValueError` unless there is one prompt for all images, or one for each.
    """
    found = {}
    for name, value in texts.items():
        if len(value) == 1:
            found[name] = value
        elif len(value) * each == count:
            found[name] = value.repeat_interleave(each, dim=0)
        else:
            raise ValueError(f"negative_prompt must be one text or {count // each} of them, got {len(value)}.")
    return found
