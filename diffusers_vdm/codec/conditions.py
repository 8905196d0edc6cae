"""Conditions that both ends of the codec have: of which images, in which precision, and a hash of them in the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..conditions import NAMES, check_conditions, rows_of_conditions
from .container import HASH_BYTES, ImageEntry
from .errors import CodecError
from .tiles import tile_sizes

_ROWS = 256  # hashed at a time


def coding_conditions(network: Any, conditions: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The conditions of all images on the CPU, integers as int64 and real numbers as they are.

    Raises: `TypeError` or `ValueError`, which names the condition, for those that the network cannot take or misses.
    """
    rows = next((len(v) for v in conditions.values() if torch.is_tensor(v) and v.ndim), 0)
    given = check_conditions(network, rows, conditions)
    return {name: (v if v.is_floating_point() else v.long()).detach().cpu() for name, v in given.items()}


def hashes_of(conditions: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """A hash of the shape and the values of each condition, which is the same for all types that hold them."""
    return {name: _hash(value) for name, value in sorted(conditions.items())}


def conditions_of_header(
    network: Any, conditions: Mapping[str, torch.Tensor | None], expected: Mapping[str, bytes]
) -> dict[str, torch.Tensor]:
    """As [`coding_conditions`], for a file in which their hashes are `expected`.

    Raises: [`CodecError`] unless they are those of the file, and as [`coding_conditions`].
    """
    for name in expected:
        if conditions.get(name) is None:
            raise CodecError(
                f"the file was coded with {name}, which a decoder must be given (--conditions of the commands)."
            )
    given = coding_conditions(network, conditions)
    for name, found in hashes_of(given).items():
        if name not in expected:
            raise CodecError(f"the file was coded without {name}; leave the argument out.")
        if found != expected[name]:
            raise CodecError(
                f"the file was coded with other {name}: they must have the same rows, in the same order and with "
                "exactly the same values."
            )
    return given


def rows_of_tiles(
    conditions: Mapping[str, torch.Tensor], entries: Iterable[ImageEntry], first: int, shape: tuple[int, int, int]
) -> dict[str, torch.Tensor]:
    """The conditions of each tile of the images `entries`, the first of which is image `first` of the file.

    Raises: `ValueError` if there are too few rows, or for images conditioned on images that are not of the network's
        size.
    """
    entries = list(entries)
    for name, value in conditions.items():
        if first + len(entries) > len(value):
            raise ValueError(
                f"{name} must have a row for each image, got {len(value)} for {first + len(entries)} or more."
            )
    if "cond_images" in conditions:
        for entry in entries:
            if (entry.height, entry.width) != shape[1:]:
                raise ValueError(
                    f"images must be of {shape[1]}×{shape[2]} pixels, the size of the network, if they are coded with "
                    f"cond_images, got {entry.height}×{entry.width}{f' for {entry.name}' if entry.name else ''}."
                )
    tiles = [len(tile_sizes(entry.height, entry.width, shape[1:])) for entry in entries]
    rows = first + torch.repeat_interleave(torch.arange(len(entries)), torch.tensor(tiles, dtype=torch.long))
    return rows_of_conditions(conditions, rows)


def check_count(conditions: Mapping[str, torch.Tensor], num_images: int) -> None:
    """Raises `ValueError` unless there is a row for each image."""
    for name, value in conditions.items():
        if len(value) != num_images:
            raise ValueError(f"{name} must have a row for each image, got {len(value)} for {num_images}.")


def read_conditions(path: str | os.PathLike | None) -> dict[str, Any]:
    """The conditions in a safetensors file, whose tensors are named like the network's arguments; none for `None`.

    Raises: `ValueError` if it is none, or has tensors of other names.
    """
    if path is None:
        return {}
    if not os.path.isfile(path):
        raise ValueError(f"conditions must be a safetensors file, got {os.fspath(path)!r}, which is no file.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"conditions must be a safetensors file, got {os.fspath(path)!r}: {error}") from error
    if not found:
        raise ValueError(f"conditions must be in the safetensors file, got none in {os.fspath(path)!r}.")
    for name in found:
        if name not in NAMES:
            raise ValueError(f"conditions must be named {', '.join(NAMES)}, got {name!r} in {os.fspath(path)!r}.")
    return found


def _hash(value: torch.Tensor) -> bytes:
    digest = hashlib.blake2b(str(tuple(value.shape)).encode(), digest_size=HASH_BYTES)
    for part in value.split(_ROWS):
        digest.update((part.double() if part.is_floating_point() else part.long()).contiguous().numpy().tobytes())
    return digest.digest()
