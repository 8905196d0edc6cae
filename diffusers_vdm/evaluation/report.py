"""`report.json`: the result of an evaluation, with everything needed to quote it.

Only this module knows the keys of the file. It also reads files of earlier versions, which have no `"version"`: they
describe the images by one string, `data.name`, and lack `data.dataset` and `data.split`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..files import write_atomically
from ..json_values import count, items, mapping, number, text, typed_values
from ..repository import read_json

NAME = "report.json"
VERSION = 1
Method = Literal["mc", "vlb", "ode"]
TERMS = ("diffusion", "reconstruction", "prior")
# values of `stderr_is_of`: the estimate that `stderr_bpd` is the standard error of
OF_THE_DRAWS = "the Monte-Carlo estimate for these images"
OF_THE_POPULATION = "the mean over the population of images"


@dataclass(frozen=True)
class MeasuredData:
    """The images that an evaluation measured.

    Attributes:
        name (`str`, *optional*): data set and split as one readable string.
        dataset, split (`str`, *optional*): repository or folder, and the split with its slice.
        is_folder (`bool`): whether `dataset` is a folder of image files.
        fingerprint (`str`, *optional*): hash of all pixels.
        shape (`list[int]`): `(N, C, H, W)`.
        files, image_column, label_column (`str`, *optional*): which files and columns were read.
        resolution (`int`, *optional*), center_crop (`bool`), image_mode, frames (`str`, *optional*): how images were
            prepared.
        allow_shared (`bool`): whether images that also occur in other splits were accepted.
    """

    name: str | None = None
    dataset: str | None = None
    split: str | None = None
    is_folder: bool = False
    shape: list[int] = field(default_factory=list)
    fingerprint: str | None = None
    files: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    resolution: int | None = None
    center_crop: bool = False
    image_mode: str | None = None
    frames: str | None = None
    allow_shared: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MeasuredData:
        """Reads the output of [`Report.to_json`]; a value of the wrong type counts as missing."""
        shape = [size for size in items(values.get("shape")) if count(size)]
        return cls(shape=shape, **typed_values(cls, values))


@dataclass(frozen=True)
class BoundAtSteps:
    """One row of a table of the bound over T, in bits/dim; `num_steps` is `None` in continuous time."""

    num_steps: int | None
    bpd: float | None
    stderr_bpd: float | None
    num_samples: int | None
    stderr_is_of: str | None = OF_THE_DRAWS

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BoundAtSteps:
        """Reads the output of [`Report.to_json`]; a value of the wrong type counts as missing."""
        read = typed_values(cls, values)
        read["stderr_is_of"] = read["stderr_is_of"] or OF_THE_DRAWS
        return cls(**read)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one evaluation. Values that a file lacks, or that are not finite or of the wrong type, are `None`.

    Attributes:
        model (`str`, *optional*): the folder or repository that was measured.
        method (`"mc"`, `"vlb"` or `"ode"`): draws of (t, ε); every term of T steps; probability-flow ODE.
        bpd, stderr_bpd (`float`, *optional*), stderr_is_of (`str`, *optional*): the result and its standard error in
            bits/dim, and the estimate that this is the standard error of.
        terms_bpd (`dict`): `diffusion`, `reconstruction` and `prior` in bits/dim, if the method has them.
        num_images, num_samples, num_steps (`int`, *optional*): images, draws (or solves) per image, and T; `num_steps`
            is `None` in continuous time and for the ODE.
        num_levels (`int`, *optional*), prediction_type, scheduler (`str`, *optional*): properties of the model.
        convention (`str`, *optional*), clip_sample (`bool`): the map from levels to x with its decoder, and whether
            x̂ was clipped.
        weights (`str`, *optional*), weights_fingerprint, gammas_fingerprint (`str`, *optional*): which weights, and
            hashes of the weights and of γ(t).
        class_conditional (`bool`): whether each image was measured given its class.
        conditions (`list[str]`): names of all conditions that each image was measured given, see conditions.py.
        dtype (`str`, *optional*), seed (`int`, *optional*): floating-point type and random seed.
        data ([`MeasuredData`]): the images.
        versions (`dict`), num_processes (`int`, *optional*), seconds (`float`, *optional*): package versions,
            number of processes, and duration.
        table (`list[BoundAtSteps]`): the bound over T.
        details (`dict`): further settings and results of the method, under its own names.
        per_image_bpd (`list[float]`): bits/dim of each image.
    """

    model: str | None = None
    method: Method
    bpd: float | None
    stderr_bpd: float | None = None
    stderr_is_of: str | None = None
    terms_bpd: dict[str, float] = field(default_factory=dict)
    num_images: int | None = None
    num_samples: int | None = None
    num_steps: int | None = None
    num_levels: int | None = None
    prediction_type: str | None = None
    scheduler: str | None = None
    convention: str | None = None
    clip_sample: bool = False
    weights: str | None = None
    weights_fingerprint: str | None
    gammas_fingerprint: str | None = None
    class_conditional: bool = False
    conditions: list[str] = field(default_factory=list)
    dtype: str | None = None
    seed: int | None = None
    data: MeasuredData = field(default_factory=MeasuredData)
    versions: dict[str, str] = field(default_factory=dict)
    num_processes: int | None = None
    seconds: float | None = None
    table: list[BoundAtSteps] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    per_image_bpd: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The content of the file: a flat object, with the terms and the details among its keys; NaN becomes null."""
        values: dict[str, Any] = {"version": VERSION}
        for name, value in asdict(self).items():
            if name == "terms_bpd":
                values |= {f"{term}_bpd": value[term] for term in TERMS if term in value}
            elif name == "details":
                values |= self.details
            else:
                values[name] = value
        return _without_nan(values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], name: str = NAME) -> Report:
        """Reads the output of [`Report.to_json`] of this version or an earlier one.

        Args:
            values (`dict`): content of the file.
            name (`str`, *optional*): name of the file in the error message.

        Raises: `ValueError` if the content is not a report.
        """
        if values.get("method") not in get_args(Method) or "bpd" not in values or "weights_fingerprint" not in values:
            raise ValueError(
                f"report must be what examples/evaluate.py writes, with a method of {get_args(Method)}, bpd and "
                f"weights_fingerprint; {name} has the keys {sorted(values)[:8]}."
            )
        terms = {term: number(values.get(f"{term}_bpd")) for term in TERMS}
        seed = values.get("seed")
        read = typed_values(cls, values) | {
            "method": values["method"],
            "terms_bpd": {term: value for term, value in terms.items() if value is not None},
            "seed": seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
            "data": MeasuredData.from_json(mapping(values.get("data"))),
            "versions": {k: v for k, v in mapping(values.get("versions")).items() if text(v)},
            "table": [BoundAtSteps.from_json(mapping(row)) for row in items(values.get("table"))],
            "details": {k: v for k, v in values.items() if k not in _KEYS},
            "per_image_bpd": [bpd for bpd in items(values.get("per_image_bpd")) if number(bpd) is not None],
        }
        return cls(**read)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file atomically."""
        write_atomically(path, json.dumps(self.to_json(), indent=1))


_KEYS = {f.name for f in fields(Report)} | {f"{term}_bpd" for term in TERMS} | {"version"}


def read_report(path: str | os.PathLike) -> Report:
    """Reads a report; raises `ValueError` for a file that is not a report, `OSError` for one that cannot be read."""
    path = Path(path)
    return Report.from_json(read_json(path, f"the report {path.name}"), path.name)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
