"""Skip optimizer steps whose gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch

from .sharding import replicated_like, whole


class FiniteSteps:
    """Optimizer steps that are skipped, and counted, if their gradients are not finite.

    The decision stays on the device, without synchronization: torch's fused optimizers skip their update if
    `found_inf` is one. Gradients, and so the decision, are the same on every process.

    Attributes: `skipped` and `in_row`, scalar tensors on the device: steps skipped in total, and since the last good
    one.
    """

    def __init__(self, device: torch.device | str):
        self.skipped = torch.zeros((), device=device)
        self.in_row = torch.zeros((), device=device)

    def step(self, optimizer: torch.optim.Optimizer, gradient_norm: torch.Tensor, has_scaler: bool = False) -> None:
        """Calls `optimizer.step()`; skips if `gradient_norm` is not finite, which a `GradScaler` does by itself."""
        bad = (~whole(gradient_norm).isfinite()).float()
        inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not has_scaler:
            inner.found_inf = replicated_like(bad, gradient_norm)
        optimizer.step()
        if not has_scaler:
            del inner.found_inf
        bad = bad.to(self.skipped.device)
        self.skipped += bad
        self.in_row = (self.in_row + 1) * bad

    def state_dict(self) -> dict[str, float]:
        """Both counts."""
        return {"skipped": float(self.skipped), "in_row": float(self.in_row)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Loads the output of [`state_dict`]; other keys are ignored."""
        self.skipped.fill_(state["skipped"])
        self.in_row.fill_(state["in_row"])
