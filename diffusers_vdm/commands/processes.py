"""Check the number of processes, set their threads, and allow one run at a time per output."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HELD = []  # the reference of [`hold_process_group`]


def load_collectives() -> None:
    """Imports what has the default process group in defaults of arguments, to be called before the group exists.

    If `torch.distributed.nn` and `.fsdp` are first imported afterwards, as diffusers and transformers do, they keep
    the group and its threads until the process exits (torch 2.13), and it can abort; see [`evaluation_accelerator`].
    """
    import torch.distributed

    if torch.distributed.is_available():
        import torch.distributed.fsdp
        import torch.distributed.nn


def process_state():
    """The `accelerate.PartialState` that `Accelerator()` will have, before there is one.

    Without the flag that `Accelerator()` reads, processes on CPUs would be independent of each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")))


def check_processes(accelerator) -> None:
    """Raises `SystemExit` if a launcher started independent copies, or fewer processes than requested."""
    world, advice = accelerator.num_processes, "set ACCELERATE_USE_CPU=1 and launch with --multi_gpu --num_processes N"
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world:
        raise SystemExit(
            f"{launched} processes were launched, but each is independent and writes into the same folder; on a CPU, "
            f"{advice}"
        )
    requested = requested_processes()
    if requested is not None and requested != world:
        raise SystemExit(f"--num_processes {requested}, but accelerate started {world}; on a CPU, {advice}")


def hold_process_group() -> None:
    """Keeps a reference to the process group until the program exits; otherwise a run may hang at its end.

    If DDP's reducer releases the last reference to a gloo group, it waits for the group's threads while it holds the
    GIL, which a thread may need to release its last tensors (torch 2.13). A Python reference does not hold the GIL.
    """
    import torch

    if not torch.distributed.is_initialized():
        return
    if not _HELD:
        atexit.register(_release)
    _HELD[:] = [torch.distributed.group.WORLD]


def _release() -> None:
    gc.collect()  # frees a reducer that is in a reference cycle
    _HELD.clear()


def requested_processes() -> int | None:
    """The --num_processes of the `accelerate launch` that started this process, from its command line."""
    import psutil  # a dependency of accelerate

    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:  # the parent is gone or not accessible
        return None
    if not any("accelerate" in part for part in command[:4]):
        return None
    for part, following in zip(command, [*command[1:], ""], strict=True):
        is_script = part.endswith(".py") and "accelerate" not in part
        if is_script or (part in ("-m", "--module") and not following.startswith("accelerate")):
            break  # the remaining arguments are those of our script
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            number = value or following
            return int(number) if number.isdigit() else None
    return None


def check_sharding(accelerator) -> None:
    """Raises `SystemExit` for kinds of sharding that are not supported; sets up FSDP2 to compute the same as DDP."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP") or (kind == "FSDP" and not accelerator.is_fsdp2):
        what = "version 1 of FSDP" if kind == "FSDP" else kind
        raise SystemExit(
            f"train.py shards with version 2 of FSDP only, got {what}; in accelerate's configuration set use_fsdp and "
            "fsdp_version: 2 (fsdp_reshard_after_forward: true is ZeRO-3, false is ZeRO-2)"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" and kind != name:
            raise SystemExit(f"{name} was requested, but accelerate shards only on accelerators and started {kind}")
    if kind == "FSDP":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = accelerator.state.fsdp_plugin
        # FSDP's policy would round γ, the times and the noise to half precision; autocast is enough, as for DDP
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        plugin.cpu_ram_efficient_loading = False  # every process initializes the same weights from the seed


@contextmanager
def evaluation_accelerator(args: argparse.Namespace) -> Iterator[Any]:
    """The accelerator of a command that measures in float32, with as many processes as were launched.

    When the context is left without an error, the process group is destroyed: a process that exits with a live gloo
    group can abort, because a thread of the group may ask for the GIL during Python's finalization (torch 2.13).
    """
    import accelerate
    import torch

    load_collectives()
    accelerator = accelerate.Accelerator(mixed_precision="no")
    check_processes(accelerator)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    set_threads(accelerator, args.num_threads)
    yield accelerator
    _destroy_process_group(accelerator)


def set_threads(accelerator, num_threads: int | None) -> None:
    """Sets the threads of a process on a CPU to `num_threads`, by default its share of the cores.

    `accelerate launch` sets one thread per process.
    """
    import torch

    if accelerator.device.type == "cpu":
        torch.set_num_threads(num_threads or max(1, os.cpu_count() // accelerator.num_processes))


def _destroy_process_group(accelerator) -> None:
    """Destroys the process group of an `Accelerator` or a state before a process exits, or the others could abort."""
    import torch

    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


def on_main_process(accelerator, work: Callable[[], Any]) -> Any:
    """What `work` returns on the main process, for all processes of an `Accelerator` or a state.

    If it raises, all processes exit: the main one with its error, the others silently.
    """
    from accelerate.utils import broadcast_object_list

    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except (Exception, SystemExit) as raised:
            error = raised
    result, failed = broadcast_object_list([result, error is not None])
    if failed:
        _destroy_process_group(accelerator)
        raise error or SystemExit(1)
    return result


@contextmanager
def only_run(accelerator, lock_file: Path, message: str, check: Callable[[], object]) -> Iterator[None]:
    """Within the context, no other run can enter it with the same lock file.

    The main process takes the lock and calls `check`. If another run has the lock, or `check` raises, all processes
    exit: the main one with `message` or the error of `check`, the others silently.
    """
    from ..files import Lock

    lock = Lock(lock_file)

    def take() -> None:
        if not lock.acquire():
            raise ValueError(message)
        check()

    try:
        on_main_process(accelerator, take)
        yield
    finally:
        lock.release()
