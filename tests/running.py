"""How tests run commands, examples and trainings in other processes, and how they read what a run leaves."""

import io
import json
import logging
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import diffusers_vdm.commands.__main__
from diffusers_vdm.training.checkpoints import list_checkpoints
from diffusers_vdm.training.metrics import read_metrics
from tests import fork_server
from tests.paths import EXAMPLES

# of processes that tests start: one thread, no network, no accelerator
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--main_process_port 0 --num_processes"
)


def run_python(*arguments, check: bool = True, timeout: float = 200, environment: dict | None = None, **more):
    """Runs Python with these arguments to its end, in [`ENVIRONMENT`] and what `environment` adds to it.

    Returns the `subprocess.CompletedProcess` with its output as text.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | ENVIRONMENT | (environment or {}), timeout=timeout, check=False,
        **{"capture_output": True, "text": True, "encoding": "utf-8"} | more,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_example(
    script: str, *arguments, processes: int | None = None, check: bool = True, new_process: bool = False, **more
):
    """Runs a file of `examples/`, by `accelerate launch` if `processes` are given; else as [`run_here`]."""
    if processes or more or new_process:
        launch = [*LAUNCH.split(), processes] if processes else []
        return run_python(*launch, EXAMPLES / script, *arguments, check=check, timeout=600, **more)
    return run_here(
        lambda: runpy.run_path(str(EXAMPLES / script), run_name="__main__"), script, *arguments, check=check
    )


def run_command(*arguments, check: bool = False, new_process: bool = False, **more):
    """Runs a command of `diffusers-vdm` as [`run_here`]."""
    if more or new_process:
        return run_python("-m", "diffusers_vdm.commands", *arguments, check=check, **more)
    return run_here(diffusers_vdm.commands.__main__.main, "diffusers-vdm", *arguments, check=check)


def run_here(program: Callable[[], object], name: str, *arguments, check: bool = True):
    """Runs a program in this process, which saves the seconds that importing torch and diffusers takes.

    The command line, the environment, the standard output and the global state of random numbers, threads, signals and
    Accelerate are those of a new process, and are put back. Returns what [`run_python`] returns.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with ExitStack() as stack:
        stack.enter_context(_state_of_process())
        stack.enter_context(patch.object(sys, "argv", [name, *map(str, arguments)]))
        stack.enter_context(patch.dict(os.environ, ENVIRONMENT))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(_logging_to(err))
        found = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("default")
        try:
            program()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
        except Exception:
            code = 1
            traceback.print_exc(file=err)
        for warning in found:
            print(
                warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno), file=err
            )
    done = subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())
    if check:
        assert code == 0, done.stderr[-3000:]
    return done


@contextmanager
def _state_of_process() -> Iterator[None]:
    """What a program may change in its process, as at its start and put back at its end."""
    random_states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    threads, folder = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.chdir(folder)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_rng_state(random_states[0])
        np.random.set_state(random_states[1])  # noqa: NPY002
        random.setstate(random_states[2])


@contextmanager
def _logging_to(stream: TextIO) -> Iterator[None]:
    """Sends to `stream` what loggers of diffusers print, which have the standard error of this process."""
    found = [h for h in logging.getLogger("diffusers").handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(stream) for handler in found]
    try:
        yield
    finally:
        for handler, earlier in zip(found, before, strict=True):
            handler.setStream(earlier)


def metrics_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return read_metrics(Path(folder) / "metrics.jsonl")


# a training of six steps that evaluates, saves checkpoints and draws images
SHORT_TRAINING = (
    "--train_batch_size 8 --max_train_steps 6 --logging_steps 2 --eval_steps 4 --checkpointing_steps 3 "
    "--max_eval_images 20 --eval_samples 2 --num_images 4 --ddpm_num_inference_steps 5 --lr_warmup_steps 2"
)


# ---- several processes -------------------------------------------------------------------------------------------


def free_port() -> int:
    """A free port outside of the range from which the system takes those of connections."""
    for port in random.sample(range(20000, 32000), 50):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise OSError("no free port")


def ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of each of its processes; nothing for one process."""
    if processes == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def wait_for(condition: Callable[[], bool], processes: list | None = None, seconds: float = 120) -> bool:
    """Looks as often as it can, so that no state is missed; `False` if all of the processes ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if processes is None:
            time.sleep(0.02)
        elif all(process.poll() is not None for process in processes):
            return False
    raise AssertionError("nothing happened")


# ---- trainings in the background ---------------------------------------------------------------------------------

# a training of 33 steps in which every feature draws random numbers, and checkpoints are frequent
TRAINING_OPTIONS = (
    "--max_train_steps 33 --logging_steps 4 --eval_steps 9 --checkpointing_steps 3 --gradient_accumulation_steps 2 "
    "--max_eval_images 10 --eval_samples 1 --num_images 3 --ddpm_num_inference_steps 2 --lr_warmup_steps 5 "
    "--dropout 0.2 --class_conditional --random_flip --ema_decays 0.999 0.9 --dataloader_num_workers 3 "
    "--checkpoints_total_limit 3 --importance_sampling --logger none --num_threads 1"
)
TRAIN = EXAMPLES / "train.py"
# the metrics that depend on the speed of the machine
TIMINGS = ("process_seconds", "images_per_second", "flop_utilisation", "data_wait")


def start_training(output_dir: Path, options: list[str], processes: int = 1, batch_size: int = 4) -> list:
    """Starts train.py in as many processes as a launcher would; the output of each goes to a log file."""
    return start_script(TRAIN, _arguments(output_dir, options, batch_size), output_dir, processes)


def start_script(script: Path, arguments: list, output_dir: Path, processes: int = 1) -> list:
    """Starts a script in as many processes as a launcher would, which write to [`log_path`] of `output_dir`."""
    command = [str(part) for part in (script, *arguments)]
    return [
        fork_server.start(command, place, log_path(output_dir, rank)) for rank, place in enumerate(ranks(processes))
    ]


def train_here(output_dir: Path, options: list[str], batch_size: int = 4) -> int:
    """Runs train.py to its end as [`run_here`]; returns the exit code, and adds the output to the log file."""
    done = run_example("train.py", *_arguments(output_dir, options, batch_size), check=False)
    with open(log_path(output_dir), "a", encoding="utf-8") as log:
        log.write(done.stdout + done.stderr)
    return done.returncode


def _arguments(output_dir: Path, options: list[str], batch_size: int) -> list[str]:
    own = f"--resume_from_checkpoint latest --train_batch_size {batch_size}"
    return ["--output_dir", str(output_dir), *own.split(), *options]


def log_path(output_dir: Path, rank: int = 0) -> Path:
    return output_dir.with_suffix(f".{rank}.log")


def log_of(output_dir: Path, rank: int = 0) -> str:
    """What a process of a training has printed."""
    path = log_path(output_dir, rank)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def exit_codes(output_dir: Path, processes: list, seconds: float = 400) -> list[int]:
    """Waits for the processes; those that do not end print where they stand, and the test fails."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(1, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
        for process in processes:
            process.wait(60)
        logs = [log_of(output_dir, rank)[-6000:] for rank in range(len(processes))]
        pytest.fail(f"still running after {seconds} s\n" + "\n\n".join(logs))


def train(output_dir: Path, options: list[str], processes: int = 1, batch_size: int = 4) -> None:
    """Runs train.py to its end, from the latest checkpoint if there is one."""
    if processes == 1:
        codes = [train_here(output_dir, options, batch_size)]
    else:
        codes = exit_codes(output_dir, start_training(output_dir, options, processes, batch_size))
    assert codes == [0] * processes, log_of(output_dir)[-3000:]


def state_of(output_dir: Path) -> tuple[dict[str, bytes], dict, list[dict]]:
    """Every byte of weights, averages and moments, the rest of the checkpoint, and all metrics but the timings."""
    output_dir = Path(output_dir)
    last = list_checkpoints(output_dir)[-1]
    state = json.loads((last / "state.json").read_text())
    files = [*last.glob("*.safetensors"), *(p for p in output_dir.rglob("*.safetensors") if last not in p.parents)]
    tensors = {str(p.relative_to(output_dir)): p.read_bytes() for p in files if "checkpoint" not in str(p.parent)}
    tensors |= {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    metrics = [{k: v for k, v in line.items() if k not in TIMINGS} for line in metrics_of(output_dir)]
    return tensors, {k: v for k, v in state.items() if k != "run"}, metrics
