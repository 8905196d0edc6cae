"""Random numbers that depend only on a key, not on previous draws.

A resumed run therefore equals an uninterrupted one, and results do not depend on the batch size, the order of the
images or the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def key_to_seed(*key: int | str) -> int:
    """A 63-bit seed that depends only on `key`."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream depends only on `key`, and so not on order or batch."""
    return torch.Generator(device).manual_seed(key_to_seed(*key))


def keyed_noise(keys: Sequence[tuple[int | str, ...]], shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """ε ~ N(0, I) for each key, drawn on the CPU in float32; `(len(keys), *shape)`, with dtype and device of `like`.

    It does not synchronize with a GPU, so noise can be drawn while the GPU computes.
    """
    noise = torch.empty(len(keys), *shape, pin_memory=like.device.type == "cuda")
    for row, key in zip(noise, keys, strict=True):
        torch.randn(row.shape, generator=keyed_generator(*key), out=row)
    return noise.to(like.device, non_blocking=True).to(like.dtype)
