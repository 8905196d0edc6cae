"""The optimizers of a run: AdamW, or Muon for the matrices inside the network and AdamW for everything else."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .sharding import is_sharded, sharded_like, whole

# parts of a network with weights that are not matrices between hidden layers: Muon's authors leave them to AdamW
_NOT_HIDDEN = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "class_embedding", "cond_embedding",
               "difference_filters")  # fmt: skip


def make_optimizer(args: argparse.Namespace, unet: nn.Module, noise_schedule: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the options of a run."""
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
    """AdamW, in which `torch.optim.Muon` updates the groups with `use_muon`.

    Muon replaces the average of the gradients of a matrix by the nearest orthogonal matrix [Jordan et al. 2024]. A
    convolution's kernel of shape `(out, in, h, w)` is the matrix `(out, in · h · w)`. The learning rate, times
    √max(1, out/(in · h · w)), is the spectral norm of a matrix's change, so the best one barely depends on the width.

    Like the fused optimizers of PyTorch, it skips a step if the attribute `found_inf` is one, without synchronization.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; the groups may have `use_muon`.
        momentum (`float`, defaults to 0.95): decay of Muon's average of the gradients.
    """

    def __init__(self, params: Any, *args: Any, momentum: float = 0.95, **kwargs: Any):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer 'muon' needs PyTorch 2.9 or newer, got {torch.__version__}; use 'adamw'.")
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
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                # AdamW, which loads the state, requires a step of each parameter
                self.state[parameter] |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
        tensors = [tensor for p in parameters for tensor in (p, self.state[p]["momentum_buffer"])]
        # views of the same memory, or copies of what is sharded or in another memory format
        matrices = [_matrix(tensor) for tensor in tensors]
        trained = [nn.Parameter(matrix) for matrix in matrices[::2]]
        found_inf = getattr(self, "found_inf", None)
        before = None if found_inf is None else [matrix.clone() for matrix in matrices]
        muon = torch.optim.Muon(trained, lr=group["lr"], weight_decay=group["weight_decay"], momentum=self._momentum)
        for parameter, matrix, average in zip(parameters, trained, matrices[1::2], strict=True):
            matrix.grad = _matrix(parameter.grad)
            muon.state[matrix]["momentum_buffer"] = average
        muon.step()
        if before is not None:
            skipped = whole(found_inf).bool()
            for matrix, old in zip(matrices, before, strict=True):
                matrix.copy_(torch.where(skipped, old, matrix))
        for tensor, matrix in zip(tensors, matrices, strict=True):
            if is_sharded(tensor) or matrix.data_ptr() != tensor.data_ptr():
                tensor.copy_(sharded_like(matrix.view(tensor.shape), tensor))


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor as a matrix with a row for each output, without a copy where possible."""
    return whole(tensor.detach()).flatten(1)
