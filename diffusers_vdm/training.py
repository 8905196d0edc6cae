"""What a training loop needs and a test must hold: keyed batches, averaged weights, finite steps, a clean stop.

Every random draw of training is a function of (seed, step, position in the global batch), never of what was drawn
before. So a resumed run is the run that was never stopped, and how the batch is split over processes and accumulation
steps matters for nothing but the masks of dropout, which are drawn for each batch of each process.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch import nn

from .files import write_atomically
from .image_stream import ImageStream
from .images import ImageSet
from .randomness import key_to_seed, keyed_generator  # noqa: F401
from .sharding import replicated_like, sharded_like, whole

logger = logging.get_logger(__name__)

# ---- keyed batches -----------------------------------------------------------------------------------------------


# share of the images whose class is withheld from a class-conditional network
LABEL_DROPOUT = 0.1


def batch_indices(positions: Iterable[int], num_images: int, seed: int) -> torch.Tensor:
    """Which image stands at each of `positions` of the endless order of training: one permutation after another.

    The permutation of an epoch is keyed on (seed, epoch), so no order needs to be replayed to find one's place.
    """
    positions = list(positions)
    orders = {epoch: _order(num_images, seed, epoch) for epoch in {p // num_images for p in positions}}
    return torch.stack([orders[p // num_images][p % num_images] for p in positions])


@functools.lru_cache(maxsize=2)  # the epoch at hand and the next one
def _order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=keyed_generator(seed, "order", epoch))


@dataclass(frozen=True)
class KeyedBatch:
    """One micro-batch and all its randomness, on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor | None
    augmented: torch.Tensor
    withheld: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eps_0: torch.Tensor


def keyed_batch(
    data: ImageSet | ImageStream,
    step: int,
    rows: range,
    global_batch_size: int,
    seed: int,
    random_flip: bool = False,
    random_rotation: bool = False,
    label_dropout: float = LABEL_DROPOUT,
) -> KeyedBatch:
    """Rows `rows` of the global batch of `step`: images in keyed order, and all that is drawn for each of them.

    t_i = (u + i/B) mod 1 over the whole global batch, whoever computes its rows [VDM app. I.1]. `augmented` is 1 where
    an image was flipped or turned by a multiple of 90°, which the network must be told [VDM app. B], and `withheld` is
    true for a share `label_dropout` of the labels.
    """
    positions = [step * global_batch_size + i for i in rows]
    if isinstance(data, ImageSet):
        index = batch_indices(positions, len(data), seed)
        images, labels = data.images[index], None if data.labels is None else data.labels[index]
    else:
        images, labels = data.batch(positions)
    shift = torch.rand((), generator=keyed_generator(seed, "t", step), dtype=torch.float64)
    t = (shift + torch.tensor(list(rows), dtype=torch.float64) / global_batch_size) % 1.0
    noise = torch.empty((len(rows), 2, *images.shape[1:]))
    augmented, withheld = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    turned = []
    for k, i in enumerate(rows):
        generator = keyed_generator(seed, "noise", step, i)
        torch.randn(noise.shape[1:], generator=generator, out=noise[k])
        flip, withhold, turn = torch.rand(3, generator=generator).tolist()
        quarters = int(4 * turn) if random_rotation else 0
        flip = random_flip and flip < 0.5
        withheld[k], augmented[k] = withhold < label_dropout, float(flip or quarters > 0)
        if augmented[k]:
            image = images[k].flip(-1) if flip else images[k]
            turned.append((k, torch.rot90(image, quarters, (-2, -1))))
    if turned:
        images = images.clone()  # of a memory-mapped set, too
        for k, image in turned:
            images[k] = image
    eps, eps_0 = (part.contiguous() for part in noise.unbind(1))
    return KeyedBatch(images, labels, augmented, withheld, t, eps, eps_0)


# ---- weights -----------------------------------------------------------------------------------------------------


class WeightAverages:
    """Exponential moving averages of the same parameters, one for each decay, in float32 and on every process.

    With the warm-up of diffusers' `EMAModel`: decay(step) = min(decay, 1 − (1 + step/inv_gamma)^−power).

    Args:
        parameters (`Sequence[nn.Parameter]`): what is averaged, in an order that a resumed run has again.
        decays (`Sequence[float]`): the largest decays, all different, in [0, 1]; none for no average at all.
        inv_gamma, power (`float`, default to 1 and 0.75): of the warm-up.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], decays: Sequence[float], inv_gamma: float = 1.0, power: float = 0.75
    ):
        if len(set(decays)) != len(decays) or not all(0 <= decay <= 1 for decay in decays):
            raise ValueError(f"decays must be different numbers within [0, 1], got {list(decays)}.")
        self.parameters = list(parameters)
        options = {"use_ema_warmup": True, "inv_gamma": inv_gamma, "power": power, "foreach": True}
        self.models = {decay: EMAModel(self.parameters, decay, **options) for decay in decays}
        for ema in self.models.values():  # an average in half precision stands still
            ema.shadow_params = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in ema.shadow_params]

    def step(self) -> None:
        for ema in self.models.values():
            ema.step(self.parameters)

    @contextmanager
    def lent(self, decay: float | None = None) -> Iterator[None]:
        """Within the context the parameters hold the average of `decay`, by default the first; nothing if none."""
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

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The averages as groups of a checkpoint."""
        return {
            f"ema_{decay!r}": {str(i): p for i, p in enumerate(ema.shadow_params)}
            | {"step": torch.tensor(ema.optimization_step)}
            for decay, ema in self.models.items()
        }

    def load(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Puts back what [`tensors`] gave; `ValueError` where a decay is missing or is one too many."""
        here = {f"ema_{decay!r}" for decay in self.models}
        there = {name for name in tensors if name.startswith("ema_")}
        if here != there:
            raise ValueError(
                f"the averaged weights of the checkpoint are {sorted(there)}, those of this run {sorted(here)}; "
                "use_ema and the decays must agree."
            )
        for decay, ema in self.models.items():
            group = tensors[f"ema_{decay!r}"]
            ema.optimization_step = int(group["step"])
            for i, shadow in enumerate(ema.shadow_params):
                shadow.copy_(sharded_like(group[str(i)], shadow))


@torch.no_grad()
def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    for a, b in zip(source, target, strict=True):  # one by one: sharded tensors know no `foreach` of it
        b.copy_(a)


class FiniteSteps:
    """Optimiser steps with finite gradients only: others change nothing, and are counted.

    The decision stays on the device, so that nothing waits for it: a fused optimiser of torch skips its update where
    its `found_inf` is one. Gradients, and so the decision, are the same on every process.

    Attributes: `skipped` and `in_row`, scalar tensors on the device: steps skipped in all, and since the last good
    one.
    """

    def __init__(self, device: torch.device | str):
        self.skipped = torch.zeros((), device=device)
        self.in_row = torch.zeros((), device=device)

    def step(self, optimizer: torch.optim.Optimizer, gradient_norm: torch.Tensor, has_scaler: bool = False) -> None:
        """`optimizer.step()`, without effect if `gradient_norm` is not finite; a `GradScaler` sees to that itself."""
        bad = (~whole(gradient_norm).isfinite()).float()
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not has_scaler:
            inner.found_inf = replicated_like(bad, gradient_norm)
        optimizer.step()
        if not has_scaler:
            del inner.found_inf
        bad = bad.to(self.skipped.device)
        self.skipped += bad
        self.in_row = (self.in_row + 1) * bad


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


# ---- the end of a run --------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised by a request to stop within [`StopRequest.at_once`]."""


class StopRequest:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 as a request to stop, answered between two steps by all processes at once.

    A context manager: within it the signals are noted. Another Ctrl-C five seconds after the first one ends the
    program at once (a launcher may hand the first one on a second time).
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, num_processes: int = 1):
        self.signal: str | None = None
        self.error: Exception | None = None
        self.has_failed = False
        self._since = math.inf
        self._at_once = False
        # agreed on over a group on the CPU: to ask must not wait for the accelerator
        self._group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        again = time.monotonic() - self._since > 5
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
            print(f"\n{self.signal}: saving and stopping after this step", file=sys.stderr, flush=True)
        if self._at_once:
            raise Stopped(self.signal)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the context a request raises [`Stopped`], for work that can be thrown away.

        Each process raises by itself; what the others then miss of it, in a collective, is a `Stopped` as well.
        """
        self._at_once = True
        try:
            if self.signal is not None:
                raise Stopped(self.signal)
            yield
        except Exception as error:
            if self.signal is not None and not isinstance(error, Stopped):
                raise Stopped(self.signal) from error
            raise
        finally:
            self._at_once = False

    def fail(self, error: Exception) -> None:
        """Notes an error of this process after which no step can be made; [`agreed`] brings it to the others."""
        self.error = error

    def agreed(self) -> bool:
        """Whether any process was asked to stop or failed; all must call it at the same step, for the same answer.

        `has_failed` then says whether one failed, and `error` is this process's own.
        """
        asked = 2.0 if self.error is not None else float(self.signal is not None)
        if self._group is not None:
            flag = torch.tensor(asked)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self._group)
            asked = float(flag)
        self.has_failed = asked == 2
        if asked == 1 and self.signal is None:
            self.signal = "another process"
        return asked > 0


# ---- metrics -----------------------------------------------------------------------------------------------------


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
