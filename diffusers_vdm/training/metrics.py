"""What a run measures while it trains: the mean loss, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..files import write_atomically

logger = logging.get_logger(__name__)


class LossMeter:
    """Mean of the finite losses since the last line of metrics, of all processes, without waiting for the device."""

    def __init__(self, device: torch.device | str):
        self.sums = torch.zeros(2, device=device)  # of the losses, and how many

    def add(self, loss: torch.Tensor) -> None:
        loss = loss.detach().float()
        finite = loss.isfinite()
        self.sums += torch.stack([torch.where(finite, loss, 0.0), finite.float()])

    def gather(self, accelerator: Any) -> list[list[float]]:
        """The sums of each process; all processes must call it."""
        return accelerator.gather(self.sums[None]).tolist()

    def load(self, sums: list[list[float]], process: int, num_processes: int) -> None:
        """Goes on from gathered sums; those of another number of processes are shared alike."""
        if len(sums) != num_processes:
            sums = [[sum(column) / num_processes for column in zip(*sums, strict=True)]] * num_processes
        self.sums.copy_(torch.tensor(sums[process]))

    @staticmethod
    def mean(sums: list[list[float]]) -> float:
        """Mean loss, NaN if none was finite."""
        total, count = (sum(column) for column in zip(*sums, strict=True))
        return total / count if count else math.nan


def append_metrics(path: str | os.PathLike, metrics: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that was cut short by a kill; none if there is no such file."""
    path, metrics = Path(path), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            logger.warning(f"{path}: a line that is no JSON is left out: {line[:40]!r}")
    return metrics


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Keeps the lines before `step`: those of the step itself and after it will be written again."""
    kept = [line for line in read_metrics(path) if line["step"] < step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
