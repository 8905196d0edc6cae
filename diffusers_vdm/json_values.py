"""Read values of untrusted JSON files: a value of the expected type, or `None`."""

from __future__ import annotations

import math
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
