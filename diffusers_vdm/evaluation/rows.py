"""The table of results of an evaluation: its rows are shared among processes and saved as they are computed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..diffusers_schedulers import noise_schedule_of
from ..diffusion import check_levels, to_high_precision
from ..files import write_atomically
from ..noise_schedules import NoiseSchedule

SECONDS_BETWEEN_SAVES = 60.0


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """Hash of the shapes, types and values of some tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """Hash of the weights in float32, the precision of evaluations: a cast to it and back changes nothing."""
    weights = network.state_dict().values()
    return fingerprint(t.to(torch.float32) if t.is_floating_point() else t for t in weights)


def gammas_fingerprint(scheduler: Any) -> str | None:
    """Hash of the γ(t) of a scheduler; `None` if it has none, see [`noise_schedule_of`]."""
    try:
        return fingerprint([noise_schedule_of(scheduler).table(257)])
    except (ValueError, TypeError):
        return None


def identity_of(
    network: nn.Module,
    noise_schedule: NoiseSchedule,
    images: torch.Tensor,
    conditions: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Everything that results depend on, for [`Rows`]: network, weights, γ(t), timesteps, images and conditions."""
    gammas = noise_schedule.table(257)
    config = {name: value for name, value in dict(getattr(network, "config", {})).items() if not name.startswith("_")}
    return {
        "network": f"{type(network).__name__} {json.dumps(config, sort_keys=True, default=str)}",
        "weights": fingerprint(network.state_dict().values()),
        "gammas": fingerprint([gammas]),
        "timesteps": fingerprint([noise_schedule.timestep(None, gammas)]),
        "images": fingerprint([images]),
        "class_labels": None,
        **{name: fingerprint([value]) for name, value in conditions.items()},
    }


def check_images(images: torch.Tensor, num_levels: int, network: nn.Module) -> None:
    """Raises `TypeError` or `ValueError` unless `images` are integers in [0, num_levels) of the network's size."""
    check_levels(images, num_levels)
    config = getattr(network, "config", {})
    if "in_channels" not in config:
        return
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else size
    if images.ndim != 4 or images.shape[1] != config["in_channels"] or (size and tuple(size) != images.shape[2:]):
        height, width = size or ("H", "W")
        raise ValueError(
            f"images must be of the network's size, (N, {config['in_channels']}, {height}, {width}), "
            f"got {tuple(images.shape)}; resize or convert them."
        )


def device_of(network: nn.Module) -> torch.device:
    """The device of the weights; the CPU for a network without weights."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def progress_text(bits: torch.Tensor, num_processes: int = 1) -> str:
    """The text of a progress bar: the mean of `bits` in bits/dim and, for two or more, its standard error.

    With several processes there is no number: before [`Rows.share`], each process knows only its own rows.
    """
    if num_processes > 1:
        return "bits/dim"
    error = f" ± {float(bits.std()) / math.sqrt(len(bits)):.4f}" if len(bits) > 1 else ""
    return f"{float(bits.mean()):.4f}{error} bits/dim"


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Puts `network` in `eval()` mode, and restores the mode of each module afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(network: nn.Module, rows: Rows) -> Iterator[None]:
    """[`evaluation_mode`] that saves `rows` on exceptions."""
    with evaluation_mode(network):
        try:
            yield
        except BaseException:
            rows.keep(now=True)  # `share` has already saved completed work
            raise


def batches(rows: torch.Tensor, num_images: int, batch_size: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Splits rows `repeat · num_images + image` into batches within one repeat; yields (repeat, images, rows)."""
    for repeat in (rows // num_images).unique().tolist():
        for row in rows[rows // num_images == repeat].split(batch_size):
            yield repeat, row % num_images, row


def check_rows_finite(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Returns `values` of shape `(B, columns)`; raises `ValueError` naming the first image with a non-finite value."""
    bad = (~values.isfinite()).any(1).nonzero()
    if len(bad):
        i = int(images[bad[0, 0]])
        raise ValueError(f"the bound of image {i} is not finite: the network returned NaN or infinity.")
    return values


class Rows:
    """A table whose rows are computed by several processes, in any order, once each; missing values are NaN.

    Every process must call the same methods in the same order, except `keep`.

    Args:
        num_columns (`int`): values per row.
        accelerator (`accelerate.Accelerator`, *optional*): shares the rows among its processes.
        resume_dir (`str` or `os.PathLike`, *optional*): folder for intermediate results, one file per process.
            Existing files are read, whatever number of processes wrote them.
        identity (`dict`, *optional*): everything that the values depend on, JSON-serializable.

    Raises: `ValueError` with the differences if `resume_dir` holds the results of another evaluation.
    """

    def __init__(
        self,
        num_columns: int,
        *,
        accelerator: Any = None,
        resume_dir: str | os.PathLike | None = None,
        identity: dict[str, Any] | None = None,
    ):
        self.values = torch.full((0, num_columns), torch.nan, dtype=torch.float64)
        self.rank, self.world = 0, 1
        self._accelerator = accelerator
        if accelerator is not None:
            self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self._identity = {name: json.loads(json.dumps(value)) for name, value in (identity or {}).items()}
        self._folder = None if resume_dir is None else Path(resume_dir)
        self._saved_at = time.monotonic()
        self._resumed = torch.zeros(0, dtype=torch.bool)  # rows that were complete on disk, known to every process
        if self._folder is not None:
            for path in sorted(self._folder.glob("rows-*.safetensors")):
                self._read_file(path)
            self._resumed = self.values.isfinite().all(1)  # rows with infinity are computed, and reported, again
            if accelerator is not None and self.world > 1:
                accelerator.wait_for_everyone()  # no process may write before all have read

    def grow(self, num_rows: int) -> None:
        """Extends the table to `num_rows` rows if it is shorter."""
        missing = num_rows - len(self.values)
        if missing > 0:
            self.values = torch.cat([self.values, self.values.new_full((missing, self.values.shape[1]), torch.nan)])
            self._resumed = torch.cat([self._resumed, torch.zeros(missing, dtype=torch.bool)])

    def mine(self, start: int, stop: int) -> torch.Tensor:
        """The rows in [start, stop) that this process must compute."""
        left = (~self._resumed[start:stop]).nonzero().flatten() + start
        return left[self.rank :: self.world]

    def keep(self, now: bool = False) -> None:
        """Saves the table, at most once a minute unless `now`."""
        if self._folder is None or not (now or time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES):
            return
        if bool(self.values.isnan().all()):  # a rejected argument must not claim the folder for this evaluation
            return
        self._saved_at = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        metadata = {"identity": json.dumps(self._identity)}
        path = self._folder / f"rows-{self.rank}.safetensors"
        write_atomically(path, save({"values": self.values.contiguous()}, metadata))

    def share(self, start: int, stop: int) -> torch.Tensor:
        """Combines the rows [start, stop) of all processes, and returns them on each; all processes must call it."""
        self.keep(now=True)
        if self.world > 1:
            mine, share = self.mine(start, stop) - start, torch.zeros_like(self.values[start:stop])
            share[mine] = self.values[start:stop][mine]
            share = to_high_precision(share.to(self._accelerator.device))
            share = self._accelerator.reduce(share, "sum").double().cpu()
            new = ~self._resumed[start:stop]
            self.values[start:stop][new] = share[new]
        return self.values[start:stop]

    def _read_file(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                identity = dict(json.loads(file.metadata()["identity"]))
                values = file.get_tensor("values")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and its results are computed again.") from error
        names = sorted({n for n in identity.keys() | self._identity if identity.get(n) != self._identity.get(n)})
        if names or values.ndim != 2 or values.shape[1] != self.values.shape[1]:
            differ = ", ".join(f"{n} was {identity.get(n)!r} and is {self._identity.get(n)!r}" for n in names)
            raise ValueError(
                f"{path.parent} holds the results of another evaluation ({differ or 'other columns'}); use another "
                "folder, or remove it."
            )
        self.grow(len(values))
        here = self.values[: len(values)]
        here.copy_(torch.where(here.isnan(), values, here))
