"""As many processes as were asked for, or none; the threads of each; and one run at a time in a place."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HELD = []  # of [`hold_process_group`]


def check_processes(accelerator) -> None:
    """`SystemExit` where a launcher started independent copies, or silently fewer processes than it was asked for."""
    world, advice = accelerator.num_processes, "set ACCELERATE_USE_CPU=1 and launch with --multi_gpu --num_processes N"
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world:
        raise SystemExit(
            f"{launched} processes were launched, but each would run alone and write into one folder; on a CPU, "
            f"{advice}"
        )
    asked = asked_of_the_launcher()
    if asked is not None and asked != world:
        raise SystemExit(f"--num_processes {asked}, but accelerate started {world}; on a CPU, {advice}")


def hold_process_group() -> None:
    """Keeps the processes' group until the program ends; without it a run may hang at its very end.

    Where DDP's reducer is the last to let go of a gloo group, it waits for the group's threads with Python's lock in
    its hand, which such a thread may need to let go of its last tensors (torch 2.13). Python's own handle does not.
    """
    import torch

    if not torch.distributed.is_initialized():
        return
    if not _HELD:
        atexit.register(_release)
    _HELD[:] = [torch.distributed.group.WORLD]


def _release() -> None:
    gc.collect()  # of a reducer in a cycle
    _HELD.clear()


def asked_of_the_launcher() -> int | None:
    """The --num_processes of the `accelerate launch` that started this process, as its command line has it."""
    import psutil  # of accelerate

    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:  # no parent that may be looked at
        return None
    if not any("accelerate" in part for part in command[:4]):
        return None
    for part, following in zip(command, [*command[1:], ""], strict=True):
        is_script = part.endswith(".py") and "accelerate" not in part
        if is_script or (part in ("-m", "--module") and not following.startswith("accelerate")):
            break  # what follows is ours
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            number = value or following
            return int(number) if number.isdigit() else None
    return None


def check_sharding(accelerator) -> None:
    """`SystemExit` for kinds of sharding that train.py does not know; FSDP2 is made to compute what DDP does."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP") or (kind == "FSDP" and not accelerator.is_fsdp2):
        what = "version 1 of FSDP" if kind == "FSDP" else kind
        raise SystemExit(
            f"train.py shards by version 2 of FSDP, got {what}; in the configuration of accelerate set use_fsdp and "
            "fsdp_version: 2 (fsdp_reshard_after_forward: true is ZeRO-3, false is ZeRO-2)"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" and kind != name:
            raise SystemExit(f"{name} was asked for, but accelerate shards on accelerators only and started {kind}")
    if kind == "FSDP":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = accelerator.state.fsdp_plugin
        # its own policy would round γ, the times and the noise to half precision; autocast is enough, as for DDP
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        plugin.cpu_ram_efficient_loading = False  # every process makes the same weights from the seed


def set_threads(accelerator, num_threads: int | None) -> None:
    """Set the threads of a process on a CPU to `num_threads`, by default its share of the cores.

    `accelerate launch` leaves each of them one thread.
    """
    import torch

    if accelerator.device.type == "cpu":
        torch.set_num_threads(num_threads or max(1, os.cpu_count() // accelerator.num_processes))


def _leave_together(accelerator) -> None:
    """Ends the group of processes before any of them does: one that finds the others gone may abort."""
    import torch

    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


@contextmanager
def only_run(accelerator, lock_file: Path, message: str, check: Callable[[], object]) -> Iterator[None]:
    """Within the context no other run can enter it with this lock file.

    The main process takes the lock and calls `check`. Where another run has the lock, or `check` raises, every process
    ends: the main one by an error with `message` or by that of `check`, the others without a word.
    """
    from accelerate.utils import broadcast_object_list

    from ..files import Lock

    lock, error = Lock(lock_file), None
    try:
        if accelerator.is_main_process:
            try:
                if not lock.acquire():
                    raise ValueError(message)
                check()
            except (Exception, SystemExit) as raised:
                error = raised
        if broadcast_object_list([error is not None])[0]:
            _leave_together(accelerator)
            raise error or SystemExit(1)
        yield
    finally:
        lock.release()
