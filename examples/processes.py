"""As many processes as were asked for, or none; and the threads of each."""

from __future__ import annotations

import os

import torch


def check_processes(accelerator) -> None:
    """`SystemExit` where a launcher started independent copies, or silently fewer processes than it was told to."""
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


def asked_of_the_launcher() -> int | None:
    """The --num_processes of the `accelerate launch` that started this process, as its command line has it."""
    import psutil  # of accelerate

    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # no parent, or none that may be looked at
        return None
    if not any("accelerate" in part for part in command[:4]):
        return None
    for part, following in zip(command, [*command[1:], ""], strict=True):
        if part.endswith(".py") and "accelerate" not in part:
            break  # what follows is ours
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            number = value or following
            return int(number) if number.isdigit() else None
    return None


def set_threads(accelerator, num_threads: int | None) -> None:
    """`accelerate launch` leaves a process on a CPU one thread; all cores, shared alike, unless told otherwise."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(num_threads or max(1, os.cpu_count() // accelerator.num_processes))
