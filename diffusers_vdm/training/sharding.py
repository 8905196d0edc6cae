"""Convert between tensors sharded by FSDP2 and the whole tensors in files.

A sharded tensor is a torch `DTensor`. Other tensors pass through unchanged, so callers need no check.
"""

from __future__ import annotations

from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """The whole tensor on each process; all processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(
    groups: dict[str, dict[str, torch.Tensor]], keep: bool = True
) -> dict[str, dict[str, torch.Tensor]] | None:
    """The groups of a checkpoint with whole tensors, gathered one by one; sharded tensors are moved to the CPU.

    All processes must call it with the same names in the same order. `keep` is true on the process that writes; the
    others get `None`.
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
    """`tensor` sharded like `target`; all processes must call it with the same whole tensor."""
    if not is_sharded(target) or tensor.shape != target.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def replicated_like(tensor: torch.Tensor, target: Any) -> torch.Tensor:
    """A tensor that is equal on all processes, in a form that can be combined with `target`."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * target.device_mesh.ndim
    return DTensor.from_local(tensor, target.device_mesh, placements, run_check=False)
