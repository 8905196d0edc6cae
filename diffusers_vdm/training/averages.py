"""Exponential moving averages of the weights, with one or more decays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from .sharding import sharded_like


class WeightAverages:
    """Exponential moving averages of the same parameters, one for each decay, in float32 and on every process.

    The decay warms up as in diffusers' `EMAModel`: decay(step) = min(decay, 1 − (1 + step/inv_gamma)^−power).

    Args:
        parameters (`Sequence[nn.Parameter]`): the parameters to average, in an order that a resumed run repeats.
        decays (`Sequence[float]`): the largest decays, all different, in [0, 1]; empty for no average.
        inv_gamma, power (`float`, default to 1 and 0.75): parameters of the warm-up.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], decays: Sequence[float], inv_gamma: float = 1.0, power: float = 0.75
    ):
        if len(set(decays)) != len(decays) or not all(0 <= decay <= 1 for decay in decays):
            raise ValueError(f"decays must be different numbers within [0, 1], got {list(decays)}.")
        self.parameters = list(parameters)
        options = {"use_ema_warmup": True, "inv_gamma": inv_gamma, "power": power, "foreach": True}
        self.models = {decay: EMAModel(self.parameters, decay, **options) for decay in decays}
        for ema in self.models.values():  # in half precision, small updates would be rounded away
            ema.shadow_params = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in ema.shadow_params]

    def step(self) -> None:
        for ema in self.models.values():
            ema.step(self.parameters)

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Within the context, the parameters hold the average with `decay`, by default the first, if there is any."""
        if not self.models:
            yield
            return
        ema = self.models[next(iter(self.models)) if decay is None else decay]
        raw = [parameter.detach().clone() for parameter in self.parameters]
        _copy(ema.shadow_params, self.parameters)
        try:
            yield
        finally:
            _copy(raw, self.parameters)

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """The averages, each with its step, under the keys `"ema_{decay}"`."""
        return {
            f"ema_{decay!r}": {str(i): p for i, p in enumerate(ema.shadow_params)}
            | {"step": torch.tensor(ema.optimization_step)}
            for decay, ema in self.models.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Loads the output of [`state_dict`]; other keys are ignored.

        Raises: `ValueError` if a decay is missing or unexpected.
        """
        here = {f"ema_{decay!r}" for decay in self.models}
        there = {name for name in state if name.startswith("ema_")}
        if here != there:
            raise ValueError(
                f"use_ema and the decays must match those of the checkpoint, {sorted(there)}, got {sorted(here)}; "
                "resume with the same options."
            )
        for decay, ema in self.models.items():
            group = state[f"ema_{decay!r}"]
            ema.optimization_step = int(group["step"])
            for i, shadow in enumerate(ema.shadow_params):
                shadow.copy_(sharded_like(group[str(i)], shadow))


@torch.no_grad()
def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    for a, b in zip(source, target, strict=True):  # one by one, because sharded tensors have no `foreach` copy
        b.copy_(a)
