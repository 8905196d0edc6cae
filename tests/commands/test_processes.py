"""commands/processes.py: the processes of one run, from their launch to their end."""

import sys

import pytest

from tests.running import LAUNCH, TRAIN, run_python

GROUPS = """
import sys
import torch
import torch.distributed as dist
from diffusers_vdm.commands.processes import hold_process_group

def a_run():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    dist.all_gather([torch.zeros(3)], torch.ones(3))
    dist.destroy_process_group()

for _ in range(200):  # without the hold, it hung at about the tenth
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    hold_process_group()
    a_run()
"""


def test_a_run_of_many_processes_does_not_hang_at_its_end():
    run_python("-c", GROUPS)


def test_a_launch_of_fewer_processes_than_asked_for_is_refused(tmp_path):
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [*launch.split(), "--dynamo_backend", "no", TRAIN, "--output_dir", tmp_path / "out"]
    done = run_python(*command, check=False)
    assert done.returncode != 0 and "--num_processes 2, but accelerate started 1" in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# what a process of a launch prints at its end; Linux names the threads of gloo
AT_THE_END = r"""
import atexit, sys
from importlib import import_module
from pathlib import Path

def count():
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    sys.stdout.write(f"threads of gloo: {sum('gloo' in name for name in names)}\n")

atexit.register(count)  # the first registered is the last called
import_module(f"diffusers_vdm.commands.{sys.argv[1]}").main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
@pytest.mark.parametrize(
    "command", ["evaluate --num_samples 1", "calibrate --num_gammas 9", "train --mixed_precision auto"]
)
def test_a_command_of_two_processes_leaves_no_process_group_behind(
    tmp_path, digits_pipeline, training_options, command
):
    """A process that exits with a live gloo group aborts now and then (one launch in three on two busy cores)."""
    (tmp_path / "command.py").write_text(AT_THE_END, encoding="utf-8")
    options = ["--model", digits_pipeline, "--split", "test[:8]", "--output", tmp_path / "r.json"]
    if command.startswith("train"):
        options = [*training_options, "--output_dir", tmp_path / "run", "--max_train_steps", 2]
    done = run_python(*LAUNCH.split(), 2, tmp_path / "command.py", *command.split(), *options)
    assert done.stdout.count("threads of gloo: 0") == 2, done.stdout
