"""Metrics of a training run: the mean loss, and the lines of metrics.jsonl with their keys."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..files import write_atomically
from ..json_values import count, mapping, number, typed_values

NAME = "metrics.jsonl"
_TERMS = ("diffusion", "reconstruction", "prior")

logger = logging.get_logger(__name__)


class LossMeter:
    """Mean of the finite losses of all processes since the last line of metrics, without synchronizing the device."""

    def __init__(self, device: torch.device | str):
        self.sums = torch.zeros(2, device=device)  # sum and number of the losses

    def add(self, loss: torch.Tensor) -> None:
        loss = loss.detach().float()
        finite = loss.isfinite()
        self.sums += torch.stack([torch.where(finite, loss, 0.0), finite.float()])

    def gather(self, accelerator: Any) -> list[list[float]]:
        """The sums of each process; all processes must call it."""
        return accelerator.gather(self.sums[None]).tolist()

    def load(self, sums: list[list[float]], process: int, num_processes: int) -> None:
        """Loads gathered sums; those of another number of processes are divided equally."""
        if len(sums) != num_processes:
            sums = [[sum(column) / num_processes for column in zip(*sums, strict=True)]] * num_processes
        self.sums.copy_(torch.tensor(sums[process]))

    @staticmethod
    def mean(sums: list[list[float]]) -> float:
        """Mean loss, NaN if none was finite."""
        total, count = (sum(column) for column in zip(*sums, strict=True))
        return total / count if count else math.nan


# ---- the results of an evaluation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LineOfEvaluation:
    """The bits/dim in a line of metrics, for the weights saved in the pipeline and for the other averages.

    Attributes:
        bpd, stderr_bpd (`float`, *optional*): the Monte-Carlo estimate and its standard error, bits/dim.
        terms_bpd (`dict`): `prior`, `reconstruction` and `diffusion`, bits/dim.
        num_images, num_samples (`int`, *optional*): held-out images, and draws of (t, ε) for each.
        num_timesteps (`int`, *optional*): T; `None` in continuous time.
        class_conditional (`bool`): whether each image was measured given its class.
        weights (`"ema"` or `"raw"`, *optional*), ema_decay (`float`, *optional*): the weights of the pipeline.
        others (`dict`): `(bpd, stderr_bpd)` of the other averages, keyed by their decay.
    """

    bpd: float
    stderr_bpd: float | None
    terms_bpd: dict[str, float] = field(default_factory=dict)
    num_images: int | None = None
    num_samples: int | None = None
    num_timesteps: int | None = None
    class_conditional: bool = False
    weights: str | None = None
    ema_decay: float | None = None
    others: dict[str, tuple[float, float | None]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The keys of the line."""
        values: dict[str, Any] = {"eval_bpd": self.bpd, "eval_bpd_stderr": self.stderr_bpd}
        values |= {f"eval_{term}_bpd": value for term, value in self.terms_bpd.items()}
        names = ("num_images", "num_samples", "num_timesteps", "class_conditional", "weights", "ema_decay")
        values |= {f"eval_{name}": getattr(self, name) for name in names}
        for decay, (bpd, stderr_bpd) in self.others.items():
            values |= {f"eval_bpd_ema_{decay}": bpd, f"eval_bpd_stderr_ema_{decay}": stderr_bpd}
        return values

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> LineOfEvaluation | None:
        """Reads the output of [`LineOfEvaluation.to_json`]; `None` for a line without finite bits/dim."""
        values = {name.removeprefix("eval_"): value for name, value in line.items()}
        bpd, weights = number(values.get("bpd")), values.get("weights")
        if bpd is None:
            return None
        terms = {term: number(values.get(f"{term}_bpd")) for term in _TERMS}
        prefix = "bpd_ema_"
        others = {k.removeprefix(prefix): number(v) for k, v in values.items() if k.startswith(prefix)}
        read = typed_values(cls, values) | {
            "bpd": bpd,
            "stderr_bpd": number(values.get("bpd_stderr")),
            "terms_bpd": {term: value for term, value in terms.items() if value is not None},
            "weights": weights if weights in ("ema", "raw") else None,
            "others": {
                decay: (value, number(values.get(f"bpd_stderr_ema_{decay}")))
                for decay, value in others.items()
                if value is not None
            },
        }
        return cls(**read)


# ---- the file ----------------------------------------------------------------------------------------------------


def append_metrics(path: str | os.PathLike, metrics: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without any that a killed process left incomplete; empty if there is no file."""
    path, metrics = Path(path), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            logger.warning(f"{path}: skipped a line that is not JSON: {line[:40]!r}")
    return metrics


def read_steps(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the folder of a run that have a step."""
    return [line for line in read_metrics(Path(folder) / NAME) if count(mapping(line).get("step"))]


def last_evaluation(lines: list[dict[str, Any]]) -> tuple[int, LineOfEvaluation] | None:
    """(step, numbers) of the last of some lines with steps that has finite bits/dim; `None` if none has."""
    found = ((line["step"], LineOfEvaluation.from_json(line)) for line in reversed(lines))
    return next(((step, evaluation) for step, evaluation in found if evaluation is not None), None)


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Keeps only the lines before `step`; the resumed run writes the later ones again."""
    kept = [line for line in read_metrics(path) if line["step"] < step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
