"""Estimate the FLOPs and memory of a training step before training, with fake tensors."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..conditions import conditions_taken
from ..texts import MAX_TOKENS


@dataclass(frozen=True)
class TrainingCost:
    """Cost of training a network.

    Attributes:
        num_parameters (`int`): number of parameters of the network.
        flops_per_image (`int`): FLOPs of a forward and a backward pass, counting only matrix products, convolutions
            and attention; a product of n×k by k×m counts 2nkm.
        activation_bytes_per_image (`int`): memory that the forward pass saves for the backward pass.
        fixed_bytes (`int`): weights, gradients, AdamW's two moments and the averages, all in float32.
    """

    num_parameters: int
    flops_per_image: int
    activation_bytes_per_image: int
    fixed_bytes: int

    def memory_bytes(self, batch_size: int) -> int:
        """Estimated peak memory for a batch, without convolution workspaces and fragmentation."""
        return self.fixed_bytes + batch_size * self.activation_bytes_per_image


def conditions_of_zeros(unet: nn.Module, batch_size: int) -> dict[str, Any]:
    """All conditions that a network takes, of zeros, in a batch."""
    config: Any = getattr(unet, "config", None) or {}
    size = config.get("sample_size") or 1
    shapes = {
        "class_labels": (),
        "cond_vectors": (config.get("cond_dim"),),
        "encoder_hidden_states": (MAX_TOKENS, config.get("cross_attention_dim")),
        "cond_images": (config.get("cond_channels"), *((size, size) if isinstance(size, int) else size)),
    }
    return {
        name: torch.zeros(batch_size, *shapes[name], dtype=torch.int64 if name == "class_labels" else torch.float32)
        for name in conditions_taken(unet)
    }


def training_cost(
    unet: nn.Module, image_shape: Sequence[int], *, num_averages: int = 1, mixed_precision: str = "no"
) -> TrainingCost:
    """FLOPs and memory of training `unet` on images of `image_shape` `(C, H, W)`.

    Args:
        num_averages (`int`, defaults to 1): number of averages (EMA) of the weights.
        mixed_precision (`"no"`, `"bf16"` or `"fp16"`): precision of the forward pass.

    Takes a second and allocates no tensors, for any size of the network.
    """
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]

    def saved_bytes_and_flops(batch_size: int) -> tuple[int, int]:
        saved: dict[int, torch.UntypedStorage] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        conditions = conditions_of_zeros(unet, batch_size)
        with FlopCounterMode(display=False) as counter:
            with (
                torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
                torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
            ):
                z_t = torch.zeros(batch_size, *image_shape)
                output = fake(z_t, torch.zeros(batch_size), return_dict=False, **conditions)[0]
            output.float().sum().backward()
        return sum(storage.nbytes() for key, storage in saved.items() if key not in weights), counter.get_total_flops()

    with FakeTensorMode(allow_non_fake_inputs=True):
        # the network may be on a GPU already; its copy has weights without values, on the CPU
        weights_of = {
            id(p): nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad) for p in unet.parameters()
        }
        buffers_of = {id(buffer): torch.empty_like(buffer, device="cpu") for buffer in unet.buffers()}
        fake = copy.deepcopy(unet, weights_of | buffers_of).train()
        weights = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}
        (one, _), (two, _) = saved_bytes_and_flops(1), saved_bytes_and_flops(2)
        with sdpa_kernel(SDPBackend.MATH):  # the counter misses fused attention on a CPU
            _, flops = saved_bytes_and_flops(1)
    count = sum(parameter.numel() for parameter in unet.parameters())
    # saved once for any batch size: the weights in half precision
    fixed = 4 * count * (4 + num_averages) + max(0, 2 * one - two)
    return TrainingCost(count, flops, two - one, fixed)


@torch.no_grad()
def matmul_flops_per_second(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """Measured FLOPs per second of a large matrix product on `device`: the reference for utilization."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 2048
    # random, because a GPU multiplies constants faster: 861 instead of 792 TFLOP/s on an H200
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    return 2 * size**3 / best_seconds(lambda: torch.matmul(a, a), device)


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest time of four runs of `work` on `device`; the first run warms up."""
    best = math.inf
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all work that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
