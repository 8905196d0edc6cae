"""A run that is killed, at any instant, and started again is the run that was never killed, bit for bit."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_fsdp import free_port

from diffusers_vdm import VDMUNet2DModel
from diffusers_vdm.training.checkpoints import list_checkpoints
from diffusers_vdm.training.metrics import read_metrics

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
OPTIONS = (
    "--max_train_steps 33 --logging_steps 4 --eval_steps 9 --checkpointing_steps 3 --gradient_accumulation_steps 2 "
    "--max_eval_images 10 --eval_samples 1 --num_images 3 --ddpm_num_inference_steps 2 --lr_warmup_steps 5 "
    "--dropout 0.2 --class_conditional --random_flip --ema_decays 0.999 0.9 --dataloader_num_workers 3 "
    "--checkpoints_total_limit 3 --importance_sampling --logger none --num_threads 1"
)
# of the clock, not of the run
TIMINGS = ("images_per_second", "flop_utilisation", "data_wait")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A network of a few thousand parameters, so that the time goes into what is tested."""
    folder = tmp_path_factory.mktemp("network")
    VDMUNet2DModel.from_preset(
        "digits", block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8
    ).save_config(folder)
    return ["--model_config_name_or_path", str(folder), *OPTIONS.split()]


def start(output_dir, options, processes=1, batch_size=4):
    """As many real processes as a launcher would start; a list of them."""
    port = str(free_port())
    started = []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"PYTHONFAULTHANDLER": "1"}  # [`ended`] asks where it stands
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(TRAIN), "--output_dir", str(output_dir), "--resume_from_checkpoint", "latest",
                   "--train_batch_size", str(batch_size), *options]  # fmt: skip
        log = open(output_dir.with_suffix(f".{rank}.log"), "ab")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()
    return started


def ended(output_dir, processes, seconds=400):
    """The exit codes; processes that do not end are made to say where they stand."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(1, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
        for process in processes:
            process.wait(60)
        logs = [output_dir.with_suffix(f".{rank}.log").read_text()[-6000:] for rank in range(len(processes))]
        pytest.fail(f"still at work after {seconds} s\n" + "\n\n".join(logs))


def finish(output_dir, options, processes=1, batch_size=4):
    codes = ended(output_dir, start(output_dir, options, processes, batch_size))
    assert codes == [0] * processes, output_dir.with_suffix(".0.log").read_text()[-3000:]


def state_of(output_dir):
    """Every byte of weights, averages and moments, and every number that is not of a clock."""
    output_dir = Path(output_dir)
    last = list_checkpoints(output_dir)[-1]
    state = json.loads((last / "state.json").read_text())
    files = [*last.glob("*.safetensors"), *(p for p in output_dir.rglob("*.safetensors") if last not in p.parents)]
    tensors = {str(p.relative_to(output_dir)): p.read_bytes() for p in files if "checkpoint" not in str(p.parent)}
    tensors |= {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    lines = read_metrics(output_dir / "metrics.jsonl")
    metrics = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    return tensors, {k: v for k, v in state.items() if k != "run"}, metrics


def wait_for(condition, processes, seconds=120):
    """Looks as fast as it can, so that what lasts a millisecond is met; `False` if the processes ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if all(process.poll() is not None for process in processes):
            return False
    raise AssertionError("nothing happened")


def count_files(folder):
    """-1 if it was renamed since it was seen."""
    try:
        return len(list(folder.iterdir()))
    except FileNotFoundError:
        return -1


def another_line(output_dir):
    before = len(read_metrics(output_dir / "metrics.jsonl"))
    return lambda: len(read_metrics(output_dir / "metrics.jsonl")) > before


def moments(output_dir, rng):
    """What a run may be doing when it is killed: each a condition that comes true at that moment, and then a delay."""

    def written(count):  # so many files of a checkpoint stand there, under the temporary name
        return lambda: any(count_files(p) >= count for p in output_dir.glob(".checkpoint-*.tmp"))

    def another(pattern):
        before = set(output_dir.glob(pattern))
        return lambda: bool(set(output_dir.glob(pattern)) - before)

    points = [(lambda count=count: written(count), 0.0) for count in (0, 1, 2, 3, 4)]
    points += [(lambda: another("checkpoint-*"), delay) for delay in (0.0, *(rng.uniform(0, 0.15) for _ in range(4)))]
    points += [(lambda: another(".checkpoint-*.removed"), 0.0)]
    points += [*((lambda: another_line(output_dir), delay) for delay in (0.0, rng.uniform(0, 0.1)))]
    rng.shuffle(points)
    return points


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("processes", "kills"), [(1, 13), (2, 7)])
def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_was(tmp_path, options, processes, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    batch_size = 4 // processes
    finish(whole, options, processes, batch_size)
    rng = random.Random(processes)
    survived = 0
    for moment, delay in (moments(killed, rng) + moments(killed, rng))[:kills]:
        started = start(killed, options, processes, batch_size)
        condition = moment()
        if not wait_for(condition, started):
            survived += 1  # it was finished before
            continue
        time.sleep(delay)
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.wait()
    assert survived <= kills // 4, "the run was over too soon for the kills to mean much"
    finish(killed, options, processes, batch_size)
    one, other = state_of(whole), state_of(killed)
    assert len(one[0]) > 6 and one[0].keys() == other[0].keys()
    assert [name for name in one[0] if one[0][name] != other[0][name]] == []
    assert one[1] == other[1]
    assert one[2] == other[2] and len(one[2]) >= 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, options, processes, number):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    batch_size = 4 // processes
    rare = [*options, "--checkpointing_steps", "1000"]
    finish(whole, rare, processes, batch_size)
    steps = []
    for asked in (1, processes):  # one of them is enough between two steps: they agree
        started = start(stopped, rare, processes, batch_size)
        assert wait_for(another_line(stopped), started)
        for process in started[:asked]:
            process.send_signal(number)
        assert ended(stopped, started) == [0] * processes
        steps.append(list_checkpoints(stopped)[-1].name)
    assert "stopped by" in stopped.with_suffix(".0.log").read_text() and len(set(steps)) == 2
    finish(stopped, rare, processes, batch_size)
    assert state_of(whole) == state_of(stopped)
    # started once more, it has nothing to do and changes nothing
    log = stopped.with_suffix(".0.log")
    before, lines = state_of(stopped), len(log.read_text())
    finish(stopped, rare, processes, batch_size)
    assert state_of(stopped) == before and "nothing to do" in log.read_text()[lines:]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, options):
    whole = tmp_path / "whole"
    finish(whole, options)
    expected = state_of(whole)
    for damage in ("cut", "flipped", "missing"):
        newest, before = list_checkpoints(whole)[-1], list_checkpoints(whole)[-2]
        victim = newest / "model.safetensors"
        content = bytearray(victim.read_bytes())
        if damage == "cut":
            victim.write_bytes(content[:-100])
        elif damage == "flipped":
            content[-10] ^= 1
            victim.write_bytes(content)
        else:
            victim.unlink()
        finish(whole, options)
        log = whole.with_suffix(".0.log").read_text()
        assert f"{victim} is damaged" in log and f"going on from {before}" in log
        assert state_of(whole) == expected


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_same_gradients_however_a_batch_is_split(tmp_path, options):
    """1 × 8 = 2 × 4 = 1 × 4 × 2: with Adam's first moment after one step, which is a tenth of the gradient."""
    one_step = [*options, "--max_train_steps", "1", "--dropout", "0", "--eval_steps", "0"]
    moments = {}
    for name, processes, batch_size, accumulation in (("1x8", 1, 8, 1), ("2x4", 2, 4, 1), ("1x4x2", 1, 4, 2)):
        out = tmp_path / name
        finish(out, [*one_step, "--gradient_accumulation_steps", str(accumulation)], processes, batch_size)
        state = load_file(out / "checkpoint-1" / "optimizer.safetensors")
        moments[name] = {key: value for key, value in state.items() if key.endswith("exp_avg")}
    largest = max(float(value.abs().max()) for value in moments["1x8"].values())
    assert largest > 1e-3
    for name in ("2x4", "1x4x2"):
        for key, value in moments["1x8"].items():
            assert float((value - moments[name][key]).abs().max()) <= 1e-6 * largest, (name, key)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_another_number_of_processes_goes_on_with_the_same_batches(tmp_path, options):
    plain = [*options, "--dropout", "0", "--max_train_steps", "6", "--eval_steps", "0", "--logging_steps", "1"]
    finish(tmp_path / "whole", plain)
    out = tmp_path / "changed"
    finish(out, plain)
    shutil.rmtree(list_checkpoints(out)[-1])
    finish(out, plain, processes=2, batch_size=2)
    log = out.with_suffix(".0.log").read_text()
    assert "1 × 4 × 2 (processes × batch × accumulation) → 2 × 2 × 2" in log and "the same data order" in log
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "changed"))
    losses = [line["train_bpd"] for line in one]
    assert losses == pytest.approx([line["train_bpd"] for line in other], rel=1e-5) and len(losses) == 6


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, options):
    whole, full = tmp_path / "whole", tmp_path / "full"
    finish(whole, options)
    (process,) = start(full, options)
    assert wait_for(lambda: list_checkpoints(full), [process])
    # no file of that process may grow any more, as on a disk that is full
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    assert ended(full, [process]) == [1]
    last = full.with_suffix(".0.log").read_text().splitlines()[-1]
    assert "train.py: " in last and ("could not be written" in last or "File too large" in last)
    assert "Traceback" not in full.with_suffix(".0.log").read_text()
    assert not list(full.glob(".checkpoint-*")) and list_checkpoints(full)
    finish(full, options)
    assert state_of(whole) == state_of(full)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_checkpoint_of_another_model_or_run_is_refused(tmp_path, options):
    out = tmp_path / "run"
    few = [*options, "--max_train_steps", "3", "--eval_steps", "0"]
    finish(out, few)
    before = state_of(out)
    other = tmp_path / "other"
    VDMUNet2DModel.from_preset(
        "digits", block_out_channels=(16,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8
    ).save_config(other)
    wider = ["--model_config_name_or_path", str(other), *few[2:]]
    for arguments, message in (
        (wider, "model_config_name_or_path: "),
        ([*wider, "--allow_changed", "model_config_name_or_path"], "is of another model: size mismatch"),
        ([*few, "--learning_rate", "1"], "learning_rate: 0.004 → 1.0"),
        ([*few, "--max_train_steps", "2", "--allow_changed", "max_train_steps"], "past the 2 that are asked for"),
        ([*few, "--allow_changed", "learning_rat"], "there is no 'learning_rat'"),
        ([*few, "--ema_decays", "0.5", "--allow_changed", "ema_decays"], "must agree"),
    ):
        assert ended(out, start(out, arguments))[0] in (1, 2)
        log = out.with_suffix(".0.log").read_text()
        assert message in log.splitlines()[-1] and "Traceback" not in log, log[-500:]
        assert state_of(out) == before
    # a run that was killed before its first checkpoint: its folder is not taken for another run's
    early = tmp_path / "early"
    early.mkdir()
    (early / "options.json").write_text((out / "options.json").read_text())
    assert ended(early, start(early, [*few, "--seed", "1"])) == [1]
    assert "seed: 0 → 1" in early.with_suffix(".0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_whose_gradients_are_not_finite_stops_and_keeps_what_was_good(tmp_path, options):
    out = tmp_path / "run"
    # the first step of such a rate is the last one that can be computed
    wild = [*options, "--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_nonfinite_steps", "7",
            "--checkpointing_steps", "1", "--eval_steps", "0"]  # fmt: skip
    for arguments, step in (
        (wild, 8),
        ([*wild, "--learning_rate", "1e-4", "--allow_changed", "learning_rate"], 15),  # it may try again
    ):
        assert ended(out, start(out, arguments)) == [1]
        log = out.with_suffix(".0.log").read_text()
        message = f"the gradients of 7 steps in a row, up to step {step}"
        assert (
            message in log.splitlines()[-1] and f"checkpoint-{step}" in log.splitlines()[-1] and "Traceback" not in log
        )
    assert read_metrics(out / "metrics.jsonl")[-1]["skipped_steps"] == 11


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_on_a_stream_goes_on_in_its_order(tmp_path, options):
    """Three shards in blocks of seven; 4 × 2 images a step, so that the stop is in the second epoch."""
    data = tmp_path / "data" / "data"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train-00000-of-00003", 9), ("train-00001-of-00003", 11), ("train-00002-of-00003", 5),
                        ("test-00000-of-00001", 10)):  # fmt: skip
        rows = {"image": [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(data / f"{name}.parquet")
    plain = [option for option in options if option != "--class_conditional"]
    stream = [*plain, "--dataset_name", str(data.parent), "--streaming", "--shuffle_buffer", "7", "--cache_dir",
              str(tmp_path / "cache"), "--max_train_steps", "9"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, stream)
    (process,) = start(killed, stream)
    assert wait_for(lambda: (killed / "checkpoint-6").exists(), [process])
    process.kill()
    process.wait()
    finish(killed, stream)
    assert "going on from" in killed.with_suffix(".0.log").read_text()
    assert state_of(whole) == state_of(killed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_threads_are_named_where_a_run_goes_on(tmp_path, options):
    out = tmp_path / "run"
    few = [*options, "--max_train_steps", "6", "--eval_steps", "0"]
    finish(out, few)
    recorded = json.loads((out / "options.json").read_text())
    assert recorded["machine"]["threads"] == 1 and recorded["machine"]["cpu_capability"]
    log = out.with_suffix(".0.log")
    for threads, count in (("1", 0), ("2", 1)):
        shutil.rmtree(list_checkpoints(out)[-1])
        finish(out, [*few, "--num_threads", threads])
        text = log.read_text()
        assert "going on from" in text and text.count("threads: 1 → 2: from here on") == count
    # a checkpoint of an earlier version does not say where it was made, and goes on
    for folder in list_checkpoints(out):
        state = json.loads((folder / "state.json").read_text())
        del state["run"]["machine"], state["run"]["versions"]
        (folder / "state.json").write_text(json.dumps(state))
    shutil.rmtree(list_checkpoints(out)[-1])
    lines = len(log.read_text())
    finish(out, few)
    assert "going on from" in log.read_text()[lines:] and "bit for bit" not in log.read_text()[lines:]
