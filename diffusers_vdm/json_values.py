"""Read values of untrusted JSON files: a value of the expected type, or `None`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any


def number(value: object) -> float | None:
    """A finite number, else `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: object) -> int | None:
    """A positive integer, else `None`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def text(value: object) -> str | None:
    """A string that is not empty, else `None`."""
    return value if isinstance(value, str) and value else None


def mapping(value: object) -> dict[str, Any]:
    """A dictionary; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """A list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def flag(value: object) -> bool:
    """Whether a value is `True`."""
    return value is True


# by the annotation of a field, in modules with `from __future__ import annotations`
_READERS: dict[Any, Callable[[object], Any]] = {
    "str | None": text, "int | None": count, "float | None": number, "bool": flag, "dict[str, Any]": mapping,
}  # fmt: skip


def typed_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass with a plain type, each read as its annotation says; other fields are left out."""
    return {f.name: _READERS[f.type](values.get(f.name)) for f in fields(cls) if f.type in _READERS}
