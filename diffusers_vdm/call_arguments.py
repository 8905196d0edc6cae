"""Checks of the arguments of a sampling call, made before any work is done.

An invalid value raises `ValueError`, and an object of the wrong kind `TypeError`. Integers may be of Python, NumPy or
PyTorch; booleans, strings and floats are rejected even if they equal an integer.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python, NumPy or PyTorch (a zero-dimensional tensor), and not a boolean."""
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return value.ndim == 0 and _are_integers(value)
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def positive_integer(name: str, value: Any) -> int:
    """`value` as an `int`; `ValueError` unless it is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {reprlib.repr(value)}.")
    return int(value)


def share(name: str, value: Any) -> float:
    """`value` as a float; `TypeError` or `ValueError` unless it is a number in (0, 1]."""
    found = real_number(name, value)
    if not 0 < found <= 1:
        raise ValueError(f"{name} must be within (0, 1], got {value}.")
    return found


def real_number(name: str, value: Any) -> float:
    """`value`, a number of Python or NumPy, as a float; `TypeError` for others and for booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}.")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """`value`; `ValueError` unless it is one of the strings `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        words = " or ".join([", ".join(map(repr, [*allowed][:-1])), repr([*allowed][-1])])
        raise ValueError(f"{name} must be {words}, got {reprlib.repr(value)}.")
    return value


def boolean(name: str, value: Any) -> bool:
    """`value` as a `bool`; `TypeError` unless it is one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {reprlib.repr(value)}.")
    return bool(value)


def decreasing_numbers(name: str, values: Any) -> list[float]:
    """`values` as floats; `ValueError` unless it is a strictly decreasing list of at least one number."""
    listed = _listed(values)
    numbers = []
    if listed is not None and all(isinstance(v, Real) and not isinstance(v, bool | np.bool_) for v in listed):
        numbers = [float(value) for value in listed]
    falling = all(b < a for a, b in zip(numbers, numbers[1:], strict=False))
    if not numbers or not falling or any(math.isnan(number) for number in numbers):
        raise ValueError(f"{name} must be a decreasing list of at least one value, got {reprlib.repr(values)}.")
    return numbers


def generators(value: Any, count: int, device: torch.device) -> torch.Generator | list[torch.Generator] | None:
    """`value`, with a tuple converted to a list.

    Raises: `TypeError` unless it is `None`, a `torch.Generator`, or a list or tuple of generators; `ValueError` unless
        a list has `count` of them, and for generators on a device that cannot be used for `device`.
    """
    if value is None:
        return None
    many = isinstance(value, list | tuple)
    each = list(value) if many else [value]
    wrong = next((one for one in each if not isinstance(one, torch.Generator)), None)
    if wrong is not None or None in each:
        raise TypeError(
            f"generator must be a torch.Generator or a list of one for each of the {count} images, got "
            f"{'a list with ' if many else ''}{reprlib.repr(wrong)}; create one with torch.Generator().manual_seed(0)."
        )
    if many and len(each) != count:
        raise ValueError(f"generator must be one generator or a list of batch_size={count}, got {len(each)}.")
    for one in each:
        if one.device.type not in ("cpu", device.type):
            raise ValueError(f"generator must be on the CPU or on {device.type}, got one on {one.device.type}.")
    return each if many else value


def labels(value: Any) -> torch.Tensor:
    """Class labels as an integer tensor on the CPU, of shape `()` for one label and `(n,)` for a list of labels.

    Raises: `ValueError` unless `value` is an integer, or a list, tuple, array or tensor of at least one.
    """
    listed = _listed(value)
    if is_integer(value):
        return torch.tensor(int(value))
    if not listed or not all(map(is_integer, listed)) or (hasattr(value, "ndim") and value.ndim != 1):
        raise ValueError(
            f"class_labels must be a class index or a list of class indices (integers), got {reprlib.repr(value)}."
        )
    return torch.tensor([int(label) for label in listed])


def latents(value: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """`value` in float32 or better.

    Raises: `TypeError` unless it is a floating-point tensor; `ValueError` unless it has `shape` and is finite.
    """
    if not torch.is_tensor(value) or not value.is_floating_point():
        what = str(value.dtype) if torch.is_tensor(value) else type(value).__name__
        raise TypeError(f"latents must be a floating-point torch.Tensor of shape {shape}, got {what}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(value.shape)}.")
    if not bool(value.isfinite().all()):
        raise ValueError("latents must be finite, got NaN or infinity.")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def names_among(name: str, value: Any, allowed: Collection[str]) -> list[str]:
    """`value` as a list; `ValueError` unless it is a list or tuple of names among `allowed`."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name} must be a list of names among {allowed}, got {reprlib.repr(value)}.")
    unknown = sorted(set(value) - set(allowed))
    if unknown:
        raise ValueError(f"{name} must be among {allowed}, got {unknown}.")
    return list(value)


def _are_integers(value: torch.Tensor | np.ndarray) -> bool:
    if torch.is_tensor(value):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return np.issubdtype(value.dtype, np.integer)


def _listed(value: Any) -> list[Any] | None:
    """The elements of a list, tuple, range, array or tensor; `None` for other objects."""
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return value.tolist() if value.ndim == 1 else None
    is_sequence = isinstance(value, Iterable) and hasattr(value, "__getitem__")
    if not is_sequence or isinstance(value, str | bytes | dict):
        return None
    return [each.item() if getattr(each, "ndim", 1) == 0 else each for each in value]  # zero-dimensional tensors
