"""Checkpoints of a run, written atomically as safetensors and JSON, and checks that a run may resume from one."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import file_digest, write_atomically
from .options import RENAMED_OPTIONS, option_names
from .sharding import sharded_like

logger = logging.get_logger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# ---- folders -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    total_limit: int | None = None,
    milestone_steps: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-{step}` as safetensors and JSON, first under a temporary name.

    Each group of `tensors` becomes a file; `state` must be JSON-serializable. With `total_limit`, only that many of
    the newest checkpoints are kept, at least one, and also those at multiples of `milestone_steps`. All files are
    synced to the disk before the folder is renamed. Returns the folder.

    Raises: `OSError` if it cannot be written, for example to a full disk; earlier checkpoints are kept then.
    """
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    for left_over in output_dir.glob(".checkpoint-*"):  # left by a killed process
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        digests = {}
        for name, group in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, path)
            _sync(path)
            digests[path.name] = file_digest(path)
        write_atomically(temporary / "state.json", json.dumps({**state, "step": step, "files": digests}, indent=2))
        for path in temporary.glob("*.safetensors"):  # they are readable by the owner only, unlike the JSON
            shutil.copymode(temporary / "state.json", path)
        _sync(temporary)
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        _sync(output_dir)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # free the space on a full disk
        raise
    if total_limit is not None:
        remove_checkpoints(output_dir, keep=max(1, total_limit), milestone_steps=milestone_steps)
    return final


def remove_checkpoints(output_dir: str | os.PathLike, keep: int = 0, milestone_steps: int | None = None) -> None:
    """Removes the complete checkpoints except the `keep` newest and those at multiples of `milestone_steps`."""
    complete = list_checkpoints(output_dir)
    for folder in complete[: max(0, len(complete) - keep)]:
        if not (milestone_steps and step_of(folder) % milestone_steps == 0):
            _remove(folder)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    return sorted((p for p in folders if (p / "state.json").is_file()), key=step_of)


def load_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Reads the output of [`save_checkpoint`]: `(tensors, state)`.

    Raises: `ValueError` for a folder that is not a checkpoint, or in which a file is missing or was changed.
    """
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no state.json.")
    tensors, path = {}, folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for name, digest in state["files"].items():
            path = folder / Path(name).name
            if file_digest(path) != digest:
                raise ValueError("its content does not match its hash")
            tensors[path.stem] = load_file(path)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"{path} is damaged ({reason}); resume from the folder of an older checkpoint.") from error
    return tensors, state


def load_latest(
    output_dir: str | os.PathLike,
) -> tuple[Path, dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """The newest checkpoint that is not damaged, `(folder, tensors, state)`; `None` if there is no checkpoint.

    A damaged checkpoint is logged and skipped. Raises `ValueError` if all are damaged.
    """
    folders = list_checkpoints(output_dir)
    for folder in reversed(folders):
        try:
            return folder, *load_checkpoint(folder)
        except ValueError as error:
            logger.warning(str(error).split(";")[0] + "; the previous checkpoint is used.")
    if folders:
        raise ValueError(f"every checkpoint in {output_dir} is damaged; start over with --overwrite_output_dir.")
    return None


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(folder.name.split("-")[1])


def _remove(folder: Path) -> None:
    """Renames the folder before deleting it, so that an interruption leaves nothing that looks like a checkpoint."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- optimizers --------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's moments and counters as flat tensors, `"{parameter index}.{name}"`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Loads the output of [`optimizer_tensors`], as whole tensors; the options of the parameter groups are kept."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = sharded_like(value, parameters[int(i)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rate_state(lr_scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    """The JSON-serializable state of a learning-rate scheduler, without its functions, which are created again."""
    return {name: value for name, value in lr_scheduler.state_dict().items() if name != "lr_lambdas"}


def load_rate_state(lr_scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any]) -> None:
    """Loads the output of [`rate_state`] into the scheduler and its optimizer.

    The peak rates stay those of the scheduler, which follow from the options of the run: they are the same as those in
    the state, unless the user has changed them.
    """
    peaks = lr_scheduler.base_lrs
    lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), **state, "base_lrs": peaks})
    if peaks == state["base_lrs"]:
        rates = state["_last_lr"]
    else:
        rates = [peak * at(lr_scheduler.last_epoch) for peak, at in zip(peaks, lr_scheduler.lr_lambdas, strict=True)]
        lr_scheduler._last_lr = rates
    for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ---- the same run ------------------------------------------------------------------------------------------------


def check_same_run(before: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()) -> str | None:
    """Raises `ValueError` if two descriptions of a run differ in what is trained: options, data, global batch.

    A description holds `"options"`, `"data"`, `"global_batch_size"` and `"num_processes"`. `allowed` names options, or
    `"data"`, that may differ; options with `may_change` always may.

    Returns: a message if the global batch is split in another way, else `None`.
    """
    before = before | {"options": {RENAMED_OPTIONS.get(k, k): v for k, v in before["options"].items()}}
    fixed = (set(now["options"]) & set(before["options"])) - option_names(may_change=True)
    if str(now["options"].get("lr_scheduler")).startswith(
        "constant"
    ):  # other rates depend on the total number of steps
        fixed -= {"max_train_steps", "num_epochs"}
    pairs = {name: (before["options"][name], now["options"][name]) for name in fixed}
    pairs |= {name: (before[name], now[name]) for name in ("data", "global_batch_size")}
    # earlier versions did not record these
    pairs |= {n: (before[n], now[n]) for n in ("class_names", "labels", "conditions") if n in before and n in now}
    differ = {
        k: v
        for k, v in sorted(pairs.items())
        if _plain(v[0]) != _plain(v[1]) and k not in set(allowed) - {"global_batch_size"}
    }
    changes = [f"{name}: {a!r} → {b!r}" for name, (a, b) in differ.items()]
    if changes:
        raise ValueError(
            f"this is not the same run: {'; '.join(changes)}. Start a new one in another output_dir, or list what may "
            "differ in allow_changed."
        )
    splits = [
        f"{run['num_processes']} × {run['options']['train_batch_size']}"
        f" × {run['options']['gradient_accumulation_steps']} (processes × batch × accumulation)"
        for run in (before, now)
    ]
    if splits[0] == splits[1]:
        return None
    masks = "; dropout masks differ from here on" if now["options"].get("dropout") else ""
    return f"{splits[0]} → {splits[1]}: the same data order, global batch and noise{masks}"


def machine_of(device: torch.device) -> dict[str, Any]:
    """Hardware that the rounding of sums depends on: the device and, for a CPU, its instruction set and threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    if device.type != "cpu":
        return {"device": device.type}
    return {
        "device": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "cpu"


def rounding_changes(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """A message if a run resumes on other hardware or another torch, which changes the rounding of sums, else `None`.

    It compares `"machine"`, from [`machine_of`], and torch's version in `"versions"`, if both descriptions have them;
    checkpoints of earlier versions do not.
    """
    pairs = {name: (before.get("machine", {}).get(name), value) for name, value in now.get("machine", {}).items()}
    pairs["torch"] = (before.get("versions", {}).get("torch"), now.get("versions", {}).get("torch"))
    differ = [f"{name}: {a} → {b}" for name, (a, b) in pairs.items() if None not in (a, b) and a != b]
    if not differ:
        return None
    return f"{'; '.join(differ)}: from here on, results are equal up to rounding, not bit for bit"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def check_allowed(names: Iterable[str], options: Collection[str]) -> None:
    """Raises `ValueError` unless each of `names` is an option or `"data"`; the global batch size can never change."""
    unknown = sorted(set(names) - set(options) - {"data"})
    if unknown:
        raise ValueError(f"allow_changed must list options or data; there is no {unknown[0]!r}.")
