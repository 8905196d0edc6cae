"""The optimizers of a run: AdamW, or Muon for the matrices inside the network and AdamW for everything else."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .sharding import sharded_like, whole

# parts of a network with weights that are not matrices between hidden layers: Muon's authors leave them to AdamW
_NOT_HIDDEN = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "class_embedding", "cond_embedding",
               "difference_filters")  # fmt: skip


def muon_learning_rate(num_steps: int) -> float:
    """The default of --muon_learning_rate for a training of `num_steps` steps: 0.6/√num_steps to three digits, ≤ 0.05.

    Measured for `cifar10-fast` with 400 to 14,000 steps, 16 to 48 channels and a cosine schedule (docs/compute.md).
    """
    return min(0.05, float(f"{0.6 / math.sqrt(num_steps):.3g}"))


def make_optimizer(args: argparse.Namespace, unet: nn.Module, noise_schedule: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the options of a run, which state the learning rate of Muon if they are of Muon."""
    if args.optimizer == "muon" and args.muon_learning_rate is None:
        raise ValueError("muon_learning_rate must be set for optimizer 'muon', got None; see `muon_learning_rate`.")
    muon = args.muon_learning_rate if args.optimizer == "muon" else None
    groups = parameter_groups(unet, noise_schedule, args.gamma_learning_rate or 10 * args.learning_rate, muon)
    betas = (args.adam_beta1, args.adam_beta2)
    rest = (args.learning_rate, betas, args.adam_epsilon, args.adam_weight_decay)
    return torch.optim.AdamW(groups, *rest, fused=True) if muon is None else MuonAdamW(groups, *rest)


def parameter_groups(
    unet: nn.Module, noise_schedule: nn.Module, gamma_learning_rate: float, muon_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """The parameters of a network and of γ(t) in the groups of an optimizer.

    Args:
        gamma_learning_rate (`float`): learning rate of γ(t), which has no weight decay, because that would bias γ.
        muon_learning_rate (`float`, *optional*): learning rate of Muon, for [`MuonAdamW`]; all by AdamW if not given.
    """
    named = [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]
    hidden = (
        [] if muon_learning_rate is None else [parameter for name, parameter in named if _is_hidden(name, parameter)]
    )
    chosen = {id(parameter) for parameter in hidden}
    groups: list[dict[str, Any]] = [{"params": [parameter for _, parameter in named if id(parameter) not in chosen]}]
    of_gamma = [parameter for parameter in noise_schedule.parameters() if parameter.requires_grad]
    if of_gamma:
        groups.append({"params": of_gamma, "weight_decay": 0.0, "lr": gamma_learning_rate})
    if hidden:
        groups.append({"params": hidden, "lr": muon_learning_rate, "use_muon": True})
    return groups


def _is_hidden(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and not any(part in name.split(".") for part in _NOT_HIDDEN)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, with Muon for the groups with `use_muon`.

    Muon replaces the average of the gradients of a matrix by the nearest orthogonal matrix [Jordan et al. 2024]. A
    convolution's kernel of shape `(out, in, h, w)` is the matrix `(out, in · h · w)`. The learning rate, times
    √max(1, out/(in · h · w)), is the spectral norm of a matrix's change, so the best one barely depends on the width.

    A step is that of `torch.optim.Muon`, but all matrices of one shape are updated at once: on a GPU, the hundreds of
    small products of a step take much less time than starting them one by one.

    Like the fused optimizers of PyTorch, it skips a step if the attribute `found_inf` is one, without synchronization.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; the groups may have `use_muon`.
        momentum (`float`, defaults to 0.95): decay of Muon's average of the gradients.
    """

    def __init__(self, params: Any, *args: Any, momentum: float = 0.95, **kwargs: Any):
        self._momentum = momentum
        super().__init__([{"use_muon": False} | group for group in params], *args, fused=True, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both optimizers."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["use_muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["use_muon"]:
                self._step_muon(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if "momentum_buffer" not in self.state[parameter]:
                # AdamW, which loads the state, requires a step of each parameter
                self.state[parameter] |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
            shape = parameter.shape[0], parameter.shape[1:].numel(), parameter.dtype
            by_shape.setdefault(shape, []).append(parameter)
        found_inf = getattr(self, "found_inf", None)
        skipped = None if found_inf is None else whole(found_inf).bool()
        for (rows, columns, _), parameters in by_shape.items():
            averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            weight, average = _matrices(parameters), _matrices(averages)
            gradient = _matrices([p.grad for p in parameters if p.grad is not None])
            new_average = average.lerp(gradient, 1 - self._momentum)
            direction = _orthogonalized(gradient.lerp(new_average, self._momentum))  # Nesterov's momentum
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            new_weight = (weight * (1 - group["lr"] * group["weight_decay"])).add(direction, alpha=-rate)
            if skipped is not None:
                new_weight = torch.where(skipped, weight, new_weight)
                new_average = torch.where(skipped, average, new_average)
            _assign(parameters, new_weight)
            _assign(averages, new_average)


def _orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """U S Vᵀ for each matrix U Σ Vᵀ, with singular values S from 0.7 to 1.2, in bfloat16; `(N, rows, columns)`.

    Five iterations X ← a X + b X Xᵀ X + c (X Xᵀ)² X with the coefficients of Jordan et al. [2024].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _matrices(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whole tensors as matrices with a row for each output, `(N, rows, columns)`."""
    return torch.stack([whole(tensor.detach()).flatten(1) for tensor in tensors])


def _assign(tensors: list[torch.Tensor], matrices: torch.Tensor) -> None:
    """Copies each of the matrices into its tensor, which may be sharded."""
    for tensor, matrix in zip(tensors, matrices, strict=True):
        tensor.copy_(sharded_like(matrix.view(tensor.shape), tensor))
