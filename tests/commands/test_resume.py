"""Runs of `train` that were killed or stopped: resumed, they end with the same bits as a run without a stop."""

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffusers_vdm import VDMMultiscale2DModel
from diffusers_vdm.training.checkpoints import list_checkpoints
from diffusers_vdm.training.metrics import read_metrics
from tests.models import tiny_multiscale, tiny_preset
from tests.running import (
    SHORT_TRAINING,
    exit_codes,
    log_of,
    start_training,
    state_of,
    train,
    train_here,
    wait_for,
)


def count_files(folder):
    """The number of files, or -1 if the folder was renamed in the meantime."""
    try:
        return len(list(folder.iterdir()))
    except FileNotFoundError:
        return -1


def another_line(output_dir):
    before = len(read_metrics(output_dir / "metrics.jsonl"))
    return lambda: len(read_metrics(output_dir / "metrics.jsonl")) > before


def moments(output_dir, rng):
    """Moments at which a run is killed: each a condition that becomes true then, and a delay."""

    def written(count):  # so many files of a checkpoint are written, under the temporary name
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
@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 4)])
def test_a_run_that_is_killed_many_times_ends_like_one_that_was_never_killed(
    tmp_path, training_options, processes, kills
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    batch_size = 4 // processes
    train(whole, training_options, processes, batch_size)
    rng = random.Random(processes)
    survived = 0
    for moment, delay in (moments(killed, rng) + moments(killed, rng))[:kills]:
        started = start_training(killed, training_options, processes, batch_size)
        condition = moment()
        if not wait_for(condition, started):
            survived += 1  # the run ended before that moment
            continue
        time.sleep(delay)
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.wait()
    assert survived <= kills // 4, "the run was over too soon for the kills to mean much"
    train(killed, training_options, processes, batch_size)
    one, other = state_of(whole), state_of(killed)
    assert len(one[0]) > 6 and one[0].keys() == other[0].keys()
    assert [name for name in one[0] if one[0][name] != other[0][name]] == []
    assert one[1] == other[1]
    assert one[2] == other[2] and len(one[2]) >= 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("processes", "number", "is_fast"),
    [(1, signal.SIGTERM, True), (1, signal.SIGINT, False), (2, signal.SIGTERM, True)],
)
def test_a_run_that_is_stopped_by_a_signal_saves_and_is_resumed(
    tmp_path, training_options, processes, number, is_fast
):
    """With `VDMMultiscale2DModel` and Muon, or with the network and the optimizer of the papers."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    batch_size = 4 // processes
    rare = [*training_options, "--checkpointing_steps", "1000"]
    if is_fast:
        channels = {"block_out_channels": (8, 16), "norm_num_groups": 2, "attention_head_dim": 8}
        VDMMultiscale2DModel(**channels, layers_per_block=1).save_config(tmp_path / "network")
        rare += ["--model_config_name_or_path", str(tmp_path / "network"), "--optimizer", "muon"]
    train(whole, rare, processes, batch_size)
    steps = []
    for asked in (1, processes):  # a signal to one process is enough: the processes agree between two steps
        started = start_training(stopped, rare, processes, batch_size)
        assert wait_for(another_line(stopped), started)
        for process in started[:asked]:
            process.send_signal(number)
        assert exit_codes(stopped, started) == [0] * processes
        steps.append(list_checkpoints(stopped)[-1].name)
    assert "stopped by" in stopped.with_suffix(".0.log").read_text() and len(set(steps)) == 2
    train(stopped, rare, processes, batch_size)
    assert state_of(whole) == state_of(stopped)
    # started once more, it has nothing to do and changes nothing
    log = stopped.with_suffix(".0.log")
    before, lines = state_of(stopped), len(log.read_text())
    train(stopped, rare, processes, batch_size)
    assert state_of(stopped) == before and "nothing to do" in log.read_text()[lines:]


def test_a_resumed_run_keeps_the_learning_rate_of_muon_that_it_recorded(tmp_path):
    """The rule that gives the default may have been another one when the run began."""
    options = [*SHORT_TRAINING.split(), "--logger", "none", "--optimizer", "muon"]
    options += ["--model_config_name_or_path", str(tmp_path / "network")]
    tiny_multiscale(num_levels=17, gamma_min=-7.5).save_config(tmp_path / "network")
    train(tmp_path / "whole", [*options, "--muon_learning_rate", "0.02"])
    (tmp_path / "resumed").mkdir()
    for name in ("options.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    train(tmp_path / "resumed", options)
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "resumed")
    train(tmp_path / "new", options)
    assert state_of(tmp_path / "whole")[0] != state_of(tmp_path / "new")[0]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_is_resumed_from_the_checkpoint_before_a_damaged_one(tmp_path, training_options):
    whole = tmp_path / "whole"
    train(whole, training_options)
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
        train(whole, training_options)
        log = whole.with_suffix(".0.log").read_text()
        assert f"{victim} is damaged" in log and f"resuming from {before}" in log
        assert state_of(whole) == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read is Linux's")
def test_all_processes_end_if_the_description_of_a_run_cannot_be_read(tmp_path, training_options):
    out = tmp_path / "run"
    out.mkdir()
    (out / "options.json").symlink_to("/proc/self/mem")
    assert exit_codes(out, start_training(out, training_options, 2, 2)) == [1, 1]
    assert "train.py: " in log_of(out) and not any("Traceback" in log_of(out, rank) for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_gradients_do_not_depend_on_how_a_batch_is_split(tmp_path, training_options):
    """1 × 8 = 2 × 4 = 1 × 4 × 2: with Adam's first moment after one step, which is a tenth of the gradient."""
    one_step = [*training_options, "--max_train_steps", "1", "--dropout", "0", "--eval_steps", "0"]
    moments = {}
    for name, processes, batch_size, accumulation in (("1x8", 1, 8, 1), ("2x4", 2, 4, 1), ("1x4x2", 1, 4, 2)):
        out = tmp_path / name
        train(out, [*one_step, "--gradient_accumulation_steps", str(accumulation)], processes, batch_size)
        state = load_file(out / "checkpoint-1" / "optimizer.safetensors")
        moments[name] = {key: value for key, value in state.items() if key.endswith("exp_avg")}
    largest = max(float(value.abs().max()) for value in moments["1x8"].values())
    assert largest > 1e-3
    for name in ("2x4", "1x4x2"):
        for key, value in moments["1x8"].items():
            assert float((value - moments[name][key]).abs().max()) <= 1e-6 * largest, (name, key)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_is_resumed_with_the_same_batches_on_another_number_of_processes(tmp_path, training_options):
    plain = [
        *training_options,
        "--dropout",
        "0",
        "--max_train_steps",
        "6",
        "--eval_steps",
        "0",
        "--logging_steps",
        "1",
    ]
    train(tmp_path / "whole", plain)
    out = tmp_path / "changed"
    train(out, plain)
    shutil.rmtree(list_checkpoints(out)[-1])
    train(out, plain, processes=2, batch_size=2)
    log = out.with_suffix(".0.log").read_text()
    assert "1 × 4 × 2 (processes × batch × accumulation) → 2 × 2 × 2" in log and "the same data order" in log
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "changed"))
    losses = [line["train_bpd"] for line in one]
    assert losses == pytest.approx([line["train_bpd"] for line in other], rel=1e-5) and len(losses) == 6


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_full_disk_ends_the_run_and_no_checkpoint_is_lost(tmp_path, training_options):
    whole, full = tmp_path / "whole", tmp_path / "full"
    train(whole, training_options)
    (process,) = start_training(full, training_options)
    assert wait_for(lambda: list_checkpoints(full), [process])
    # no file of that process may grow from here on, as on a full disk
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    assert exit_codes(full, [process]) == [1]
    last = full.with_suffix(".0.log").read_text().splitlines()[-1]
    assert "train.py: " in last and ("could not be written" in last or "File too large" in last)
    assert "Traceback" not in full.with_suffix(".0.log").read_text()
    assert not list(full.glob(".checkpoint-*")) and list_checkpoints(full)
    train(full, training_options)
    assert state_of(whole) == state_of(full)


SHORT = ["--max_train_steps", "3", "--eval_steps", "0"]


@pytest.fixture(scope="module")
def finished_run(training_options, tmp_path_factory):
    """The folder of a run of three steps, which no test changes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, [*training_options, *SHORT])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("channels", "changes", "message"),
    [
        (16, "", "model_config_name_or_path: "),
        (16, "--allow_changed model_config_name_or_path", "belongs to another model: size mismatch"),
        (8, "--learning_rate 1", "learning_rate: 0.004 → 1.0"),
        (8, "--max_train_steps 2 --allow_changed max_train_steps", "past the 2 requested steps"),
        (8, "--allow_changed learning_rat", "there is no 'learning_rat'"),
        (8, "--ema_decays 0.5 --allow_changed ema_decays", "must match"),
    ],
    ids=["network", "allowed network", "option", "steps", "misspelled option", "averages"],
)
def test_a_run_with_other_options_is_refused_and_changes_nothing(
    finished_run, training_options, tmp_path, channels, changes, message
):
    before, options = state_of(finished_run), [*training_options, *SHORT, *changes.split()]
    if channels != 8:
        tiny_preset(block_out_channels=(channels,)).save_config(tmp_path)
        options = ["--model_config_name_or_path", str(tmp_path), *options[2:]]
    assert train_here(finished_run, options) in (1, 2)
    log = log_of(finished_run)
    assert message in log.splitlines()[-1] and "Traceback" not in log, log[-500:]
    assert state_of(finished_run) == before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_resumed_by_another(
    finished_run, training_options, tmp_path
):
    early = tmp_path / "early"
    early.mkdir()
    (early / "options.json").write_text((finished_run / "options.json").read_text())
    assert train_here(early, [*training_options, *SHORT, "--seed", "1"]) == 1
    assert "seed: 0 → 1" in log_of(early)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_whose_gradients_are_not_finite_stops_and_can_be_resumed(tmp_path, training_options):
    out = tmp_path / "run"
    # the first step of such a rate is the last one that can be computed
    wild = [*training_options, "--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_nonfinite_steps", "7",
            "--checkpointing_steps", "1", "--eval_steps", "0"]  # fmt: skip
    for arguments, step in (
        (wild, 8),
        ([*wild, "--learning_rate", "1e-4", "--allow_changed", "learning_rate"], 15),  # it may try again
    ):
        assert train_here(out, arguments) == 1
        log = out.with_suffix(".0.log").read_text()
        message = f"the gradients of 7 steps in a row, up to step {step}"
        assert (
            message in log.splitlines()[-1] and f"checkpoint-{step}" in log.splitlines()[-1] and "Traceback" not in log
        )
    assert read_metrics(out / "metrics.jsonl")[-1]["skipped_steps"] == 11


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_on_a_stream_is_resumed_in_its_order(tmp_path, training_options):
    """Three shards in blocks of seven; 4 × 2 images a step, so that the stop is in the second epoch."""
    data = tmp_path / "data" / "data"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train-00000-of-00003", 9), ("train-00001-of-00003", 11), ("train-00002-of-00003", 5),
                        ("test-00000-of-00001", 10)):  # fmt: skip
        rows = {"image": [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(data / f"{name}.parquet")
    plain = [option for option in training_options if option != "--class_conditional"]
    stream = [*plain, "--dataset_name", str(data.parent), "--streaming", "--shuffle_buffer", "7", "--cache_dir",
              str(tmp_path / "cache"), "--max_train_steps", "9"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, stream)
    (process,) = start_training(killed, stream)
    assert wait_for(lambda: (killed / "checkpoint-6").exists(), [process])
    process.kill()
    process.wait()
    train(killed, stream)
    assert "resuming from" in killed.with_suffix(".0.log").read_text()
    assert state_of(whole) == state_of(killed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_resumed_run_names_another_number_of_threads(tmp_path, training_options):
    out = tmp_path / "run"
    few = [*training_options, "--max_train_steps", "6", "--eval_steps", "0"]
    train(out, few)
    recorded = json.loads((out / "options.json").read_text())
    assert recorded["machine"]["threads"] == 1 and recorded["machine"]["cpu_capability"]
    log = out.with_suffix(".0.log")
    for threads, count in (("1", 0), ("2", 1)):
        shutil.rmtree(list_checkpoints(out)[-1])
        train(out, [*few, "--num_threads", threads])
        text = log.read_text()
        assert "resuming from" in text and text.count("threads: 1 → 2: from here on") == count
    # a checkpoint of an earlier version has no description of its machine, and is resumed
    for folder in list_checkpoints(out):
        state = json.loads((folder / "state.json").read_text())
        del state["run"]["machine"], state["run"]["versions"]
        (folder / "state.json").write_text(json.dumps(state))
    shutil.rmtree(list_checkpoints(out)[-1])
    lines = len(log.read_text())
    train(out, few)
    assert "resuming from" in log.read_text()[lines:] and "bit for bit" not in log.read_text()[lines:]
