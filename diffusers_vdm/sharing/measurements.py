"""Bits/dim as they were measured, with all that they must be quoted with, from metrics.jsonl and report.json.

`metrics.jsonl` and `options.json` are what examples/train.py writes, `report.json` is what examples/evaluate.py does.
A number that is missing or not finite is not claimed: it makes no [`Measurement`], or `None` in its place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..diffusers_schedulers import noise_schedule_of
from ..evaluation.rows import fingerprint
from ..repository import read_json
from ..training.metrics import read_metrics

Method = Literal["mc", "vlb", "ode"]
_OF_THE_DRAWS = "the Monte-Carlo estimate for these images"
_TERMS = ("diffusion", "reconstruction", "prior")
_DIGITS = "scikit-learn digits"
_DIGITS_SPLITS = {"1500 training": "train", "297 held-out": "test"}
_REPOSITORY = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
# what a folder, not a repository, is called
_PATH = re.compile(r"[/~.\\]|[A-Za-z]:|.*\\|.*/.*/", re.DOTALL)


@dataclass(frozen=True)
class DataName:
    """What the images are called.

    Attributes:
        name (`str`): repository, or the last part of a folder's path: where it lies is nobody's business.
        split (`str`, *optional*): split, with the slice of it.
        is_repository (`bool`): whether `name` is one of the Hub, by its form.
    """

    name: str
    split: str | None = None
    is_repository: bool = False


@dataclass(frozen=True)
class Measurement:
    """One number in bits/dim.

    Attributes:
        bpd (`float`): the number, bits/dim.
        stderr_bpd, stderr_is_of (`float`, `str`, *optional*): its standard error, and of what it is one.
        method (`"mc"`, `"vlb"` or `"ode"`): draws of (t, ε); every term of T steps; probability-flow ODE.
        num_steps (`int`, *optional*): T; `None` for continuous time and for the ODE.
        num_images, num_draws (`int`, *optional*): images, and draws (for the ODE repeats) of each.
        terms_bpd (`dict`): diffusion, reconstruction and prior, as far as they are known.
        data ([`DataName`], *optional*), data_fingerprint (`str`, *optional*): the images.
        weights (`str`): which weights.
        convention (`"vdm"` or `"ddpm"`): map of levels to x, and decoder; see evaluation/all_terms.py.
        details (`dict`): what else the method depends on.
        step (`int`, *optional*): optimizer step, where the number is of training.
        is_final (`bool`): whether it is of the weights of the folder.
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

    def is_of_data_of(self, other: Measurement) -> bool:
        """Whether another one is of the same images, by their names."""
        return (self.data and (self.data.name, self.data.split)) == (
            other.data and (other.data.name, other.data.split)
        )

    @property
    def quantity(self) -> str:
        """What was measured, in words."""
        if self.method == "ode":
            named = self.details.get("dequantization")
            return "probability-flow ODE" + (f", {str(named).replace('_', '-')} dequantization" if named else "")
        steps = "continuous time" if self.num_steps is None else f"T = {self.num_steps}"
        every = ", every term" if self.method == "vlb" else ""
        ddpm = ", DDPM's convention" if self.convention == "ddpm" else ""
        clipped = ", clipped x̂" if self.details.get("clip_sample") else ""
        return f"variational bound, {steps}{every}{ddpm}{clipped}"

    @property
    def value(self) -> str:
        """The number and its error with as many digits as the error warrants."""
        if self.stderr_bpd is None:
            return f"{self.bpd:.4f}"
        digits = 4 if self.stderr_bpd <= 0 else min(8, max(4, 1 - math.floor(math.log10(self.stderr_bpd))))
        return f"{self.bpd:.{digits}f} ± {self.stderr_bpd:.{digits}f}"


# ---- values of files that anybody may have written ---------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number, else `None`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def count(value: object) -> int | None:
    """A positive whole number, else `None`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def text(value: object) -> str | None:
    """A string that is not empty, else `None`."""
    return value if isinstance(value, str) and value else None


def mapping(value: object) -> dict[str, Any]:
    """A dictionary, empty if it is none."""
    return value if isinstance(value, dict) else {}


def base_name(path: str) -> str:
    """The last part of a path, of whatever system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def last_part(name: str) -> str:
    """The last part of what looks like a path; a repository of the Hub stays as it is."""
    return base_name(name) if _PATH.match(name) else name


def data_name(name: object, split: object = None, is_folder: bool = False) -> DataName | None:
    """[`DataName`] of what the package calls a data set: path or repository, and after a comma the split."""
    if not isinstance(name, str) or not name.strip():
        return None
    if not isinstance(split, str):
        body, streamed = re.fullmatch(r"(.*?)((?:, streamed)?(?:, \d+ images)?)", name, re.DOTALL).groups()
        if name.startswith(_DIGITS):
            parts = name.split(", ")
            return DataName(_DIGITS, _DIGITS_SPLITS.get(parts[-1], parts[-1]) if parts[1:] else None)
        body, comma, split = body.rpartition(", ")
        name, split = (body, split + streamed) if comma else (name, None)
    is_repository = not is_folder and not _PATH.match(name) and bool(_REPOSITORY.fullmatch(name))
    return DataName(name if is_repository else base_name(name) or "a folder", split, is_repository)


def training_data(description: dict[str, Any]) -> DataName | None:
    """The data of a run, of its options.json."""
    return _data_of(description, "train_split", mapping(description.get("data")).get("name"))


def _data_of(description: dict[str, Any], split: str, recorded: object) -> DataName | None:
    options = mapping(description.get("options"))
    folder = options.get("train_data_dir")
    if options.get("digits") or not (folder or options.get("dataset_name")):
        known = {"train_split": "train", "eval_split": "test"}[split]
        return DataName(_DIGITS, known) if options.get("digits") else data_name(recorded)
    return data_name(folder or options["dataset_name"], options.get(split), bool(folder))


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that say their step."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if count(mapping(line).get("step"))]


def measured_in_training(lines: list[dict[str, Any]], description: dict[str, Any]) -> list[Measurement]:
    """What the last line of metrics with bits/dim says: of the pipeline's weights, then of the other averages.

    They are final if the run did not go on after that line, and had no more steps to do.
    """
    line = next((line for line in reversed(lines) if number(line.get("eval_bpd")) is not None), None)
    if line is None:
        return []
    total = total_steps(description)
    held_out = mapping(description.get("held_out"))
    decay = number(line.get("eval_ema_decay"))
    shared = {
        "stderr_is_of": _OF_THE_DRAWS,
        "method": "mc",
        "num_steps": count(line.get("eval_num_timesteps")),
        "num_images": count(line.get("eval_num_images")),
        "num_draws": count(line.get("eval_num_samples")),
        "data": _data_of(description, "eval_split", held_out.get("name")),
        "data_fingerprint": text(held_out.get("fingerprint")),
        "step": line["step"],
        "details": {"class_conditional": True} if line.get("eval_class_conditional") is True else {},
    }
    weights = {"ema": "EMA" if decay is None else f"EMA {decay:g}", "raw": "raw"}.get(
        str(line.get("eval_weights")), ""
    )
    is_final = line["step"] == lines[-1]["step"] == (total or line["step"])
    found = [
        Measurement(
            float(line["eval_bpd"]),
            number(line.get("eval_bpd_stderr")),
            weights=weights,
            terms_bpd=_terms(line, "eval_"),
            is_final=is_final,
            **shared,
        )
    ]
    for name, value in line.items():
        other = name.removeprefix("eval_bpd_ema_")
        if other != name and number(value) is not None:
            stderr = number(line.get(f"eval_bpd_stderr_ema_{other}"))
            weights = f"EMA {other}, in the folder ema_{other}"
            found.append(Measurement(float(value), stderr, weights=weights, is_final=False, **shared))
    return found


def total_steps(description: dict[str, Any]) -> int | None:
    """The steps that a run was to do, as train.py works them out; `None` if that is not known."""
    options = mapping(description.get("options"))
    total = count(description.get("total_steps")) or count(options.get("max_train_steps"))
    images = count(mapping(description.get("data")).get("images"))
    epochs, batch = count(options.get("num_epochs")), count(description.get("global_batch_size"))
    return total or (math.ceil(epochs * images / batch) if epochs and images and batch else None)


# ---- report.json -------------------------------------------------------------------------------------------------


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """A report of examples/evaluate.py; `ValueError` for anything else."""
    report = read_json(Path(path), f"the report {Path(path).name}")
    if report.get("method") not in get_args(Method) or "bpd" not in report or "weights_fingerprint" not in report:
        raise ValueError(
            f"report must be what examples/evaluate.py writes, with a method of {get_args(Method)}, bpd and "
            f"weights_fingerprint; {Path(path).name} holds {sorted(report)[:8]}."
        )
    return report


def gammas_fingerprint(scheduler: Any) -> str | None:
    """Hash of the γ(t) of a scheduler, as a report says it; `None` for one that has none [`noise_schedule_of`]."""
    try:
        return fingerprint([noise_schedule_of(scheduler).table(257)])
    except (ValueError, TypeError):
        return None


def measured_in_report(report: dict[str, Any]) -> list[Measurement]:
    """The number of a report and those of its table over T, the limit T → ∞ last."""
    data = mapping(report.get("data"))
    shared = {
        "num_images": count(report.get("num_images")),
        "weights": text(report.get("weights")) or "",
        "data": data_name(data.get("name")),
        "data_fingerprint": text(data.get("fingerprint")),
    }
    of_all = _plain(report, ("dtype", "seed", "class_conditional")) | _plain(data, ("resolution", "center_crop"))
    found = []
    if number(report["bpd"]) is not None:
        names = ("clip_sample", "variance_type", "importance_sampling", "dequantization", "divergence", "num_probes",
                 "num_importance_samples", "rtol", "atol", "gamma_start", "gamma_end")  # fmt: skip
        main = Measurement(
            float(report["bpd"]),
            number(report.get("stderr_bpd")),
            stderr_is_of=text(report.get("stderr_is_of")),
            method=report["method"],
            num_steps=count(report.get("num_steps")),
            num_draws=1 if report["method"] == "vlb" else count(report.get("num_samples")),
            terms_bpd=_terms(report, ""),
            convention="ddpm" if report.get("convention") == "ddpm" else "vdm",
            details=of_all | _plain(report, names),
            **shared,
        )
        found.append(main)
    rows = report.get("table")
    for row in map(mapping, rows if isinstance(rows, list) else []):
        if number(row.get("bpd")) is None:
            continue
        measured = Measurement(
            float(row["bpd"]),
            number(row.get("stderr_bpd")),
            stderr_is_of=text(row.get("stderr_is_of")) or _OF_THE_DRAWS,
            method="mc",
            num_steps=count(row.get("num_steps")),
            num_draws=count(row.get("num_samples")),
            details=of_all,
            **shared,
        )
        found.append(measured)
    return first_of_each(found)


def first_of_each(measured: Iterable[Measurement]) -> list[Measurement]:
    """Of measurements of the same quantity on the same images the first one."""
    first: dict[tuple[object, ...], Measurement] = {}
    for m in measured:
        first.setdefault(_quantity_and_data(m), m)
    return list(first.values())


def _quantity_and_data(m: Measurement) -> tuple[object, ...]:
    clipped = bool(m.details.get("clip_sample"))
    data = m.data and (m.data.name, m.data.split)
    return m.method, m.num_steps, m.convention, clipped, m.num_images, data


def _terms(values: dict[str, Any], prefix: str) -> dict[str, float]:
    terms = {term: number(values.get(f"{prefix}{term}_bpd")) for term in _TERMS}
    return {term: value for term, value in terms.items() if value is not None}


def _plain(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of some values that say something: texts, what is true, finite numbers."""
    found = {name: values.get(name) for name in names}
    return {k: v for k, v in found.items() if v is True or text(v) or number(v) is not None}
