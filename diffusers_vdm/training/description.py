"""`options.json`: the options, data and environment of a run. Checkpoints contain the same.

Only this module writes and reads the keys of the file. Files of earlier versions lack some of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..json_values import count, items, mapping, text, typed_values
from ..repository import read_json

NAME = "options.json"


@dataclass(frozen=True)
class DataDescription:
    """Training images: their name, their number if known, and their hash."""

    name: str | None = None
    images: int | None = None
    fingerprint: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DataDescription:
        """Reads the output of [`RunDescription.to_json`]; a value of the wrong type counts as missing."""
        return cls(**typed_values(cls, values))


@dataclass(frozen=True)
class HeldOutDescription(DataDescription):
    """Held-out images, and how many of them are also training images; `None` if they were not compared."""

    shared_with_training: int | None = None
    files: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeldOutDescription:
        """Reads the output of [`RunDescription.to_json`]; a value of the wrong type counts as missing."""
        read = typed_values(cls, values)
        if values.get("shared_with_training") == 0:
            read["shared_with_training"] = 0
        return cls(**read)


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """The description of a run. Values that a file lacks, or that are of the wrong type, are `None` or empty.

    Attributes:
        options (`dict`): every option of the command line by its name.
        given (`list[str]`, *optional*): names of the options set on the command line.
        total_steps (`int`, *optional*): optimizer steps of the whole run.
        device (`str`, *optional*), machine (`dict`): hardware, see [`checkpoints.machine_of`].
        held_out ([`HeldOutDescription`], *optional*): the held-out images; only on the main process.
        histogram_bpd (`float`, *optional*): bits/dim of the held-out images under per-pixel histograms of the
            training images.
        data ([`DataDescription`]): the training images.
        columns (`dict`): names of the columns of images and of classes.
        class_names (`list[str]`, *optional*), labels (`str`, *optional*): names of the classes, and a hash of the
            class of each image, for a class-conditional run.
        conditions (`str`, *optional*): hash of the other conditions of each image.
        files (`str`, *optional*), damaged (`list[str]`): which files are used, and those skipped as damaged.
        global_batch_size, num_processes (`int`, *optional*): images per step over all processes, and processes.
        versions (`dict`): package versions.
    """

    options: dict[str, Any] = field(default_factory=dict)
    given: list[str] | None = None
    total_steps: int | None = None
    device: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    held_out: HeldOutDescription | None = None
    histogram_bpd: float | None = None
    data: DataDescription = field(default_factory=DataDescription)
    columns: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    labels: str | None = None
    conditions: str | None = None
    files: str | None = None
    damaged: list[str] = field(default_factory=list)
    global_batch_size: int | None = None
    num_processes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, computed as in train.py if the file has no `total_steps`."""
        total = self.total_steps or count(self.options.get("max_train_steps"))
        epochs, images, batch = count(self.options.get("num_epochs")), self.data.images, self.global_batch_size
        return total or (math.ceil(epochs * images / batch) if epochs and images and batch else None)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        values = asdict(self)
        return values | {"held_out": values["held_out"] or {}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunDescription:
        """Reads the output of [`RunDescription.to_json`] of this version or an earlier one; never raises."""
        given, names, held_out = values.get("given"), values.get("class_names"), mapping(values.get("held_out"))
        read = typed_values(cls, values) | {
            "given": [name for name in given if text(name)] if isinstance(given, list) else None,
            "held_out": HeldOutDescription.from_json(held_out) if held_out else None,
            "data": DataDescription.from_json(mapping(values.get("data"))),
            "class_names": [str(name) for name in names] if isinstance(names, list) else None,
            "damaged": [name for name in items(values.get("damaged")) if text(name)],
            "versions": {k: v for k, v in mapping(values.get("versions")).items() if text(v)},
        }
        return cls(**read)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the file atomically into the folder of the run."""
        write_atomically(Path(folder) / NAME, json.dumps(self.to_json(), indent=2))


def read_description(folder: str | os.PathLike) -> RunDescription | None:
    """Reads the description in the folder of a run, `None` if there is none; raises `ValueError` if it is not JSON."""
    path = Path(folder) / NAME
    return RunDescription.from_json(read_json(path, NAME)) if path.is_file() else None
