"""The bits/dim of metrics.jsonl and report.json as [`Measurement`]s, with everything needed to quote them.

A number that is missing or not finite is not reported: it gives no [`Measurement`], or is `None` in one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..data.images import DIGITS
from ..evaluation.report import OF_THE_DRAWS, Method, Report
from ..json_values import count, items, mapping, number, text
from ..training.description import RunDescription
from ..training.metrics import last_evaluation

_DIGITS_SPLITS = {"1500 training": "train", "297 held-out": "test"}
_REPOSITORY = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
# a path, as opposed to a repository
_PATH = re.compile(r"[/~.\\]|[A-Za-z]:|.*\\|.*/.*/", re.DOTALL)


@dataclass(frozen=True)
class DataName:
    """The name of a data set.

    Attributes:
        name (`str`): repository, or the last part of a folder's path; the rest of the path is private.
        split (`str`, *optional*): split, with its slice.
        is_repository (`bool`): whether `name` has the form of a Hub repository.
    """

    name: str
    split: str | None = None
    is_repository: bool = False


@dataclass(frozen=True)
class Measurement:
    """One result in bits/dim.

    Attributes:
        bpd (`float`): the result, bits/dim.
        stderr_bpd, stderr_is_of (`float`, `str`, *optional*): its standard error, and of which estimate.
        method (`"mc"`, `"vlb"` or `"ode"`): draws of (t, ε); every term of T steps; probability-flow ODE.
        num_steps (`int`, *optional*): T; `None` for continuous time and for the ODE.
        num_images, num_draws (`int`, *optional*): images, and draws per image (repeats, for the ODE).
        terms_bpd (`dict`): diffusion, reconstruction and prior, if known.
        data ([`DataName`], *optional*), data_fingerprint (`str`, *optional*): the images.
        weights (`str`): description of the weights.
        convention (`"vdm"` or `"ddpm"`): map from levels to x, and decoder; see evaluation/all_terms.py.
        details (`dict`): further settings of the method.
        step (`int`, *optional*): optimizer step, for a result from training.
        is_final (`bool`): whether it was measured with the weights in the folder.
    """

    bpd: float
    stderr_bpd: float | None
    stderr_is_of: str | None
    method: Method
    num_steps: int | None
    num_images: int | None
    num_draws: int | None
    weights: str
    terms_bpd: dict[str, float] = field(default_factory=dict)
    data: DataName | None = None
    data_fingerprint: str | None = None
    convention: str = "vdm"
    details: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    is_final: bool = True

    def has_same_data_as(self, other: Measurement) -> bool:
        """Whether both are on the same images, by name and split."""
        return (self.data and (self.data.name, self.data.split)) == (
            other.data and (other.data.name, other.data.split)
        )

    @property
    def quantity(self) -> str:
        """Description of what was measured."""
        if self.method == "ode":
            named = self.details.get("dequantization")
            return "probability-flow ODE" + (f", {str(named).replace('_', '-')} dequantization" if named else "")
        steps = "continuous time" if self.num_steps is None else f"T = {self.num_steps}"
        every = ", every term" if self.method == "vlb" else ""
        ddpm = ", DDPM's convention" if self.convention == "ddpm" else ""
        clipped = ", clipped x̂" if self.details.get("clip_sample") else ""
        variance = ", best variance" if self.details.get("variance_type") == "optimal" else ""
        chosen = ", chosen timesteps" if self.details.get("chosen_timesteps") else ""
        return f"variational bound, {steps}{every}{ddpm}{clipped}{variance}{chosen}"

    @property
    def value(self) -> str:
        """The number and its error with as many digits as the error warrants."""
        if self.stderr_bpd is None:
            return f"{self.bpd:.4f}"
        digits = 4 if self.stderr_bpd <= 0 else min(8, max(4, 1 - math.floor(math.log10(self.stderr_bpd))))
        return f"{self.bpd:.{digits}f} ± {self.stderr_bpd:.{digits}f}"


# ---- names of data sets ------------------------------------------------------------------------------------------


def base_name(path: str) -> str:
    """The last part of a POSIX or Windows path."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def last_part(name: str) -> str:
    """The last part of anything like a path; a Hub repository is returned unchanged."""
    return base_name(name) if _PATH.match(name) else name


def data_name(dataset: object, split: object = None, is_folder: bool = False) -> DataName | None:
    """[`DataName`] of a repository or a path, and a split."""
    if not isinstance(dataset, str) or not dataset.strip():
        return None
    is_repository = not is_folder and not _PATH.match(dataset) and bool(_REPOSITORY.fullmatch(dataset))
    return DataName(dataset if is_repository else base_name(dataset) or "a folder", text(split), is_repository)


def data_name_from_text(name: str | None) -> DataName | None:
    """[`DataName`] from one string with path and split, as in files of earlier versions."""
    if name is None:
        return None
    if name.startswith(DIGITS):
        parts = name.split(", ")
        return DataName(DIGITS, _DIGITS_SPLITS.get(parts[-1], parts[-1]) if parts[1:] else None)
    found = re.fullmatch(r"(.*?)((?:, streamed)?(?:, \d+ images)?)", name, re.DOTALL)
    body, streamed = found.groups() if found else (name, "")
    path, comma, split = body.rpartition(", ")
    return data_name(path, split + streamed) if comma else data_name(name)


def training_data(run: RunDescription) -> DataName | None:
    """The training images of a run."""
    return _data_of(run, "train_split", run.data.name)


def held_out_data(run: RunDescription) -> DataName | None:
    """The held-out images of a run."""
    return _data_of(run, "eval_split", run.held_out and run.held_out.name)


def _data_of(run: RunDescription, split: str, recorded: str | None) -> DataName | None:
    folder, name = run.options.get("train_data_dir"), run.options.get("dataset_name")
    if run.options.get("digits") or not (folder or name):
        known = {"train_split": "train", "eval_split": "test"}[split]
        return DataName(DIGITS, known) if run.options.get("digits") else data_name_from_text(recorded)
    return data_name(folder or name, run.options.get(split), bool(folder))


# ---- measurements ------------------------------------------------------------------------------------------------


def measured_in_training(lines: list[dict[str, Any]], run: RunDescription) -> list[Measurement]:
    """The results in the last line of metrics with bits/dim: of the pipeline's weights, then of other averages.

    The first is final if that line is the last one, at the last step of the run.
    """
    found = last_evaluation(lines)
    if found is None:
        return []
    step, evaluation = found
    decay = evaluation.ema_decay
    weights = {"ema": "EMA" if decay is None else f"EMA {decay:g}", "raw": "raw"}.get(evaluation.weights or "", "")
    shared: dict[str, Any] = {
        "stderr_is_of": OF_THE_DRAWS,
        "method": "mc",
        "num_steps": evaluation.num_timesteps,
        "num_images": evaluation.num_images,
        "num_draws": evaluation.num_samples,
        "data": held_out_data(run),
        "data_fingerprint": run.held_out and run.held_out.fingerprint,
        "step": step,
        "details": {"class_conditional": True} if evaluation.class_conditional else {},
    }
    is_final = step == lines[-1]["step"] == (run.num_steps or step)
    first = Measurement(
        bpd=evaluation.bpd,
        stderr_bpd=evaluation.stderr_bpd,
        weights=weights,
        terms_bpd=evaluation.terms_bpd,
        is_final=is_final,
        **shared,
    )
    others = [
        Measurement(
            bpd=bpd, stderr_bpd=error, weights=f"EMA {name}, in the folder ema_{name}", is_final=False, **shared
        )
        for name, (bpd, error) in evaluation.others.items()
    ]
    return [first, *others]


def measured_in_report(report: Report) -> list[Measurement]:
    """The result of a report and those of its table over T, with the limit T → ∞ last."""
    data = report.data
    named = data_name(data.dataset, data.split, data.is_folder) if data.dataset else data_name_from_text(data.name)
    shared: dict[str, Any] = {
        "num_images": report.num_images,
        "weights": report.weights or "",
        "data": named,
        "data_fingerprint": data.fingerprint,
    }
    common = {
        "dtype": report.dtype,
        "seed": report.seed,
        "class_conditional": report.class_conditional,
        "resolution": data.resolution,
        "center_crop": data.center_crop,
    }
    found = []
    if report.bpd is not None:
        names = ("variance_type", "importance_sampling", "dequantization", "divergence", "num_probes",
                 "num_importance_samples", "rtol", "atol", "gamma_start", "gamma_end")  # fmt: skip
        details = common | {"clip_sample": report.clip_sample} | {name: report.details.get(name) for name in names}
        details["chosen_timesteps"] = bool(items(report.details.get("timesteps")))
        details["calibration"] = _calibration(mapping(report.details.get("calibration")))
        main = Measurement(
            bpd=report.bpd,
            stderr_bpd=report.stderr_bpd,
            stderr_is_of=report.stderr_is_of,
            method=report.method,
            num_steps=report.num_steps,
            num_draws=1 if report.method == "vlb" else report.num_samples,
            terms_bpd=report.terms_bpd,
            convention="ddpm" if report.convention == "ddpm" else "vdm",
            details=_present(details),
            **shared,
        )
        found.append(main)
    for row in report.table:
        if row.bpd is not None:
            measured = Measurement(
                bpd=row.bpd,
                stderr_bpd=row.stderr_bpd,
                stderr_is_of=row.stderr_is_of,
                method="mc",
                num_steps=row.num_steps,
                num_draws=row.num_samples,
                details=_present(common),
                **shared,
            )
            found.append(measured)
    return first_of_each(found)


def first_of_each(measured: Iterable[Measurement]) -> list[Measurement]:
    """The first measurement of each quantity on each set of images."""
    first: dict[tuple[object, ...], Measurement] = {}
    for m in measured:
        first.setdefault(_quantity_and_data(m), m)
    return list(first.values())


def _quantity_and_data(m: Measurement) -> tuple[object, ...]:
    clipped = bool(m.details.get("clip_sample"))
    chain = (m.details.get("variance_type") == "optimal", bool(m.details.get("chosen_timesteps")))
    data = m.data and (m.data.name, m.data.split)
    return m.method, m.num_steps, m.convention, clipped, chain, m.num_images, data


def _calibration(record: dict[str, Any]) -> str | None:
    """What the best variance was measured on, in words."""
    if not record:
        return None
    data = data_name_from_text(text(record.get("data")))
    named = "" if data is None else f" of {data.name}" + (f", split {data.split}" if data.split else "")
    images, detail = count(record.get("num_images")) or "unknown", text(record.get("detail")) or "level"
    return f"{images} images{named}, for each {detail}"


def _present(details: dict[str, Any]) -> dict[str, Any]:
    """The details to report: texts, `True`, and finite numbers."""
    return {k: v for k, v in details.items() if v is True or text(v) or number(v) is not None}
