"""Tensors that FSDP2 has cut into parts, one for each process, and the whole tensors that a file holds.

A sharded tensor is torch's `DTensor`. What is not sharded passes through unchanged, so that callers need not ask.
"""

from __future__ import annotations

from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor on each process; all of them must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(
    groups: dict[str, dict[str, torch.Tensor]], keep: bool = True
) -> dict[str, dict[str, torch.Tensor]] | None:
    """The groups of a checkpoint with whole tensors, one after another, on the CPU if they were sharded.

    All processes must call it with the same names in the same order; `keep` is for the one that writes, the others
    get `None`.
    """
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, group in groups.items():
        result[name] = {}
        for key, tensor in group.items():
            tensor = whole(tensor.detach()).cpu() if is_sharded(tensor) else tensor
            if keep:
                result[name][key] = tensor
    return result if keep else None


def sharded_like(tensor: torch.Tensor, target: Any) -> torch.Tensor:
    """`tensor` cut as `target` is; all processes must call it with the same whole tensor."""
    if not is_sharded(target) or tensor.shape != target.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def replicated_like(tensor: torch.Tensor, target: Any) -> torch.Tensor:
    """A tensor that is the same on all processes, as one that may meet `target` in an operation."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * target.device_mesh.ndim
    return DTensor.from_local(tensor, target.device_mesh, placements, run_check=False)
