"""--mixed_precision auto: half precision where it is measured to be faster, since on many processors it is slower."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..training.cost import best_seconds
from ..training.description import RunDescription
from .processes import process_state

# how much faster half precision must be, to be worth its rounding
MIN_SPEEDUP = 1.2


def resolve_precision(args: argparse.Namespace, resumed: RunDescription | None = None) -> None:
    """Replaces `auto` in `args.mixed_precision` by `bf16` or `no`, equal on all processes, and prints the choice.

    A run that is resumed keeps the precision that it has recorded, wherever it goes on.
    """
    from accelerate.utils import broadcast_object_list

    if args.mixed_precision != "auto":
        return
    state = process_state()
    recorded = None if resumed is None else resumed.options.get("mixed_precision")
    speedup = None
    if recorded is None:
        speedup = broadcast_object_list([bf16_speedup(torch.device(state.device or "cpu"))])[0]
    args.mixed_precision = recorded or ("bf16" if speedup is not None and speedup >= MIN_SPEEDUP else "no")
    why = "as recorded" if speedup is None else f"bf16 takes 1/{speedup:.2f} of the time of float32 here"
    if state.is_main_process:
        print(f"--mixed_precision {args.mixed_precision}: {why}", flush=True)


def bf16_speedup(device: torch.device) -> float:
    """Time of a convolution, forward and backward, in float32 over its time in bf16 on `device`."""
    return _seconds(device, False) / _seconds(device, True)


def _seconds(device: torch.device, in_bf16: bool) -> float:
    # a GPU needs more work than a processor, or only the launches of its kernels would be measured
    images, channels = (128, 256) if device.type == "cuda" else (8, 64)
    inputs = torch.full((images, channels, 32, 32), 0.5, device=device)
    weight = torch.full((channels, channels, 3, 3), 0.01, device=device, requires_grad=True)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            output: Any = torch.nn.functional.conv2d(inputs, weight, padding=1)
        torch.autograd.grad(output.float().sum(), weight)

    return best_seconds(work, device)
