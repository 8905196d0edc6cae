"""Randomness that is a function of a key, never of what was drawn before, and times that are evenly spread.

With it a resumed run is the run that was never stopped, and no number depends on the batch size, on the order of the
images, or on the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from .diffusion import to_high_precision

_GOLDEN = (math.sqrt(5) - 1) / 2


def key_to_seed(*key: int | str) -> int:
    """A 63-bit seed that is a function of `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream is a function of `key` alone, for randomness that does not depend on order or batch."""
    return torch.Generator(device).manual_seed(key_to_seed(*key))


def keyed_noise(keys: Sequence[tuple[int | str, ...]], shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """ε ~ N(0, I) for each key, drawn on the CPU in float32; `(len(keys), *shape)` of the type and device of `like`.

    Does not wait for a GPU: the next noise is drawn while it works.
    """
    noise = torch.empty(len(keys), *shape, pin_memory=like.device.type == "cuda")
    for row, key in zip(noise, keys, strict=True):
        torch.randn(row.shape, generator=keyed_generator(*key), out=row)
    return noise.to(like.device, non_blocking=True).to(like.dtype)


def stratified_times(
    batch_size: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
) -> torch.Tensor:
    """t_i = (u + i/B) mod 1 with one uniform u: each is uniform, together they cover [0, 1] evenly [VDM app. I.1].

    Returns: float64 `torch.Tensor` of shape `(batch_size,)`.
    """
    source = generator.device if generator is not None else device
    u = torch.rand((), generator=generator, device=source, dtype=torch.float32)
    lattice = torch.arange(batch_size, device=source) / batch_size
    return to_high_precision((u + lattice) % 1.0).to(device or u.device)


def lattice_times(index: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(i·φ + shift) mod 1 with the golden ratio φ: any run of indices covers [0, 1) evenly. float64, as `index`."""
    return (index.double() * _GOLDEN + shift) % 1.0
