"""Randomness that is a function of a key, never of what was drawn before.

With it a resumed run is the run that was never stopped, and no number depends on the batch size, on the order of the
images, or on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


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
