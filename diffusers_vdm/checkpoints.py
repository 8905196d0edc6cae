"""Checkpoints of a run: safetensors and JSON that are whole or not there, and what makes a run the same run."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .files import write_atomically

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-{step}` as safetensors and JSON: under another name first, then renamed.

    Each group of `tensors` is a file, `state` is anything that JSON holds, and with `total_limit` only so many of the
    newest checkpoints are kept, at least one. Returns the folder.
    """
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_atomically(temporary / "state.json", json.dumps({**state, "step": step}, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    if total_limit is not None:
        remove_checkpoints(output_dir, keep=max(1, total_limit))
    return final


def remove_checkpoints(output_dir: str | os.PathLike, keep: int = 0) -> None:
    """Removes the complete checkpoints of a run but for the `keep` newest."""
    complete = list_checkpoints(output_dir)
    for folder in complete[: len(complete) - keep]:
        shutil.rmtree(folder)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    return sorted((p for p in folders if (p / "state.json").is_file()), key=lambda p: int(p.name.split("-")[1]))


def load_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """What [`save_checkpoint`] wrote: `(tensors, state)`; `ValueError` for a folder that is not one."""
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no state.json.")
    tensors, path = {}, folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.safetensors")):
            tensors[path.stem] = load_file(path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); go on from an older checkpoint, by its folder.") from error
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's moments and counters as flat tensors, `"{parameter index}.{name}"`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what [`optimizer_tensors`] took; the options of its groups stay."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(
    output_dir: str | os.PathLike,
    step: int,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
    run: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes all that a run needs to go on; `run` is its description, compared when it does."""
    tensors = {"model": objective.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    rates = {name: value for name, value in lr_scheduler.state_dict().items() if name != "lr_lambdas"}
    state: dict[str, Any] = {"run": run, "lr_scheduler": rates}
    if ema is not None:
        tensors["ema"] = {str(i): p for i, p in enumerate(ema.shadow_params)}
        state["ema_step"] = ema.optimization_step
    return save_checkpoint(output_dir, step, tensors, state, total_limit)


def find_checkpoint(output_dir: str | os.PathLike, name: str) -> Path:
    """The folder that `"latest"` or a path stands for. Raises `ValueError` where there is none."""
    if name != "latest":
        return Path(name)
    complete = list_checkpoints(output_dir)
    if not complete:
        raise ValueError(f"resume_from_checkpoint='latest', but there is no complete checkpoint in {output_dir}.")
    return complete[-1]


# options that a resumed run may change: they say where to and how often, not what is trained
_FREE_OPTIONS = {
    "output_dir", "overwrite_output_dir", "logging_steps", "eval_steps", "eval_batch_size", "eval_samples",
    "max_eval_images", "num_images", "ddpm_num_inference_steps", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "logger", "logging_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
    "cache_dir", "dataloader_num_workers", "num_threads", "gradient_checkpointing", "train_batch_size",
    "gradient_accumulation_steps", "save_images_epochs", "save_model_epochs",
}  # fmt: skip


def restore(
    folder: str | os.PathLike,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Puts a checkpoint of [`save`] back and returns its state, with `step` and the saved `run`.

    Raises: `ValueError` if the run is another one: other data, another global batch, other options that matter.
    """
    tensors, state = load_checkpoint(folder)
    before, now = state["run"], run
    fixed = set(now["options"]) - _FREE_OPTIONS
    if now["options"].get("dropout"):  # its masks are drawn for each batch of each process
        fixed |= {"train_batch_size", "gradient_accumulation_steps"}
    if str(now["options"].get("lr_scheduler")).startswith("constant"):  # else the rates depend on where they end
        fixed -= {"max_train_steps", "num_epochs"}
    differences = {name for name in fixed if now["options"].get(name) != before["options"].get(name)}
    for name in ("data", "global_batch_size"):
        if before[name] != now[name]:
            differences.add(name)
    if differences:
        told = "; ".join(
            f"{k}: {before['options'].get(k, before.get(k))!r} → {now['options'].get(k, now.get(k))!r}"
            for k in sorted(differences)
        )
        raise ValueError(f"this is not the run of {folder}: {told}. Start a new one in another output_dir.")
    if ("ema" in tensors) != (ema is not None):
        raise ValueError(f"{folder} {'has' if 'ema' in tensors else 'lacks'} averaged weights; use_ema must agree.")
    objective.load_state_dict(tensors["model"])
    load_optimizer_tensors(optimizer, tensors["optimizer"])
    lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), **state["lr_scheduler"]})
    for group, rate in zip(optimizer.param_groups, state["lr_scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    if ema is not None:
        for i, shadow in enumerate(ema.shadow_params):
            shadow.copy_(tensors["ema"][str(i)])
        ema.optimization_step = state["ema_step"]
    return state
