"""One run at a time writes in a place; a run that dies, however it dies, is in nobody's way."""

import json
import os
import signal
import subprocess
import sys

import pytest
from test_examples import ROOT, model  # noqa: F401  a fixture
from test_resume import ended, options, start, wait_for  # noqa: F401  a fixture

from diffusers_vdm.files import Lock
from diffusers_vdm.training.metrics import read_metrics

HOLD = """
import sys, time
from diffusers_vdm.files import Lock
print(Lock(sys.argv[1]).acquire(), flush=True)
time.sleep(600)
"""
# what made the lock's process fork lives on: a worker of a data set, say
FORK = """
import os, sys, time
from diffusers_vdm.files import Lock
held = Lock(sys.argv[1]).acquire()
if os.fork() == 0:
    print(held, flush=True)
time.sleep(20)
"""
ONE_OF_US = """
import sys
from pathlib import Path
from diffusers_vdm.files import Lock
counter = Path(sys.argv[2])
done = 0
while done < 40:
    lock = Lock(sys.argv[1])
    if lock.acquire():
        value = int(counter.read_text(encoding="utf-8"))
        counter.write_text(str(value + 1), encoding="utf-8")
        done += 1
        lock.release()
"""


def holder(path, code=HOLD):
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip() == "True"


@pytest.mark.parametrize("code", [HOLD, FORK], ids=["alone", "with a child that lives on"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_holds_nothing(tmp_path, number, code):
    path = tmp_path / "new" / "folder" / ".lock"
    process, holds = holder(path, code)
    try:
        assert holds and not Lock(path).acquire() and path.exists()
        process.send_signal(number)
        process.wait(20)
        lock = Lock(path)
        assert lock.acquire() and not Lock(path).acquire()
        lock.release()
        assert not path.exists()
    finally:
        process.kill()
        process.stdout.close()


def test_nothing_stays_behind_but_what_others_made(tmp_path):
    path = tmp_path / "a" / "b" / ".lock"
    lock = Lock(path)
    assert lock.acquire()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert lock.acquire()
    (path.parent / "result").touch()
    lock.release()
    assert list(path.parent.iterdir()) == [path.parent / "result"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        Lock(tmp_path / "file" / ".lock").acquire()


def test_only_one_of_many_is_inside(tmp_path):
    """The file goes with its holder, while others are about to lock the one that was there: no update is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0", encoding="utf-8")
    command = [sys.executable, "-c", ONE_OF_US, str(tmp_path / "folder" / ".lock"), str(counter)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert counter.read_text(encoding="utf-8") == "160" and not list(tmp_path.glob("folder/.*"))


# ---- train.py ----------------------------------------------------------------------------------------------------


def log_of(folder, rank=0):
    path = folder.with_suffix(f".{rank}.log")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def files_of(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def second(out, arguments, processes=1, batch_size=4):
    """Another run in the folder: its exit codes and what it says, and whether it changed anything there."""
    logs = [out.with_suffix(f".{rank}.log") for rank in range(processes)]
    before = [len(log.read_bytes()) if log.exists() else 0 for log in logs]
    codes = ended(out, start(out, arguments, processes, batch_size))
    return codes, [log.read_bytes()[n:].decode() for log, n in zip(logs, before, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_two_trainings_in_one_folder(tmp_path, options, processes):  # noqa: F811
    out = tmp_path / "run"
    long = [*options, "--max_train_steps", "400", "--eval_steps", "0", "--checkpointing_steps", "10000"]
    started = start(out, long, processes, 4 // processes)
    try:
        assert wait_for(lambda: read_metrics(out / "metrics.jsonl"), started)
        for process in started:
            process.send_signal(signal.SIGSTOP)  # at work, and at rest for what is compared
        before = files_of(out)
        for more in (
            ["--overwrite_output_dir", "--resume_from_checkpoint", ""],
            ["--resume_from_checkpoint", ""],
            ["--seed", "1"],
            ["--push_to_hub", "--hub_strategy", "checkpoint", "--resume_from_checkpoint", "last-checkpoint"],
        ):
            codes, logs = second(out, [*long, *more], processes, 4 // processes)
            assert codes == [1] * processes, logs
            message = "train.py: another run is writing --output_dir"
            assert [text.count(message) for text in logs] == [1] + [0] * (processes - 1)
            assert not any("Traceback" in text for text in logs)
            assert files_of(out) == before
        codes, logs = second(out, [*long, "--dry_run"])  # needs no lock, and takes none
        assert codes == [0] and "parameters" in logs[0] and files_of(out) == before
        for process in started:
            process.send_signal(signal.SIGCONT)
        assert ended(out, started) == [0] * processes
        steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
        assert steps == sorted(set(steps)) and steps[-1] == 400 and not (out / ".lock").exists()
    finally:
        for process in started:
            process.kill()
    # a folder of a run that is over says what it said before
    codes, logs = second(out, [*long, "--resume_from_checkpoint", ""], processes)
    assert codes == [1] * processes and sum("holds another run" in text for text in logs) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_two_that_start_at_once_one_trains(tmp_path, options):  # noqa: F811
    out = tmp_path / "run"
    few = [*options, "--max_train_steps", "60", "--eval_steps", "0"]
    both = start(out, few) + start(out, few)
    assert sorted(ended(out, both)) == [0, 1]
    assert log_of(out).count("another run is writing --output_dir") == 1 and "Traceback" not in log_of(out)
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 60


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_was_killed_is_in_nobodys_way(tmp_path, options, processes):  # noqa: F811
    out = tmp_path / "run"
    few = [*options, "--eval_steps", "0"]
    started = start(out, few, processes, 4 // processes)
    assert wait_for(lambda: read_metrics(out / "metrics.jsonl"), started)
    for process in started:
        process.kill()
    for process in started:
        process.wait()
    assert ended(out, start(out, few, processes, 4 // processes)) == [0] * processes, log_of(out)[-2000:]
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_folder(tmp_path, options):  # noqa: F811
    out = tmp_path / "run"
    codes, logs = second(out, [*options, "--dataset_name", str(tmp_path / "nothing"), "--cache_dir", str(tmp_path)])
    assert codes == [1] and "Traceback" not in logs[0] and not out.exists()


# ---- evaluate.py -------------------------------------------------------------------------------------------------


def evaluation(pipeline, output, processes=1, *more):
    from test_fsdp import free_port

    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--model", str(pipeline), "--output",
               str(output), "--num_threads", "1", *map(str, more)]  # fmt: skip
    port, started = str(free_port()), []
    for rank in range(processes):
        environment = os.environ | {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE))
    return started


def outputs_of(processes):
    return [(p.communicate(timeout=200)[1].decode(), p.returncode) for p in processes]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_two_evaluations_of_one_output(tmp_path, model, processes):  # noqa: F811
    output = tmp_path / "reports" / "r.json"
    lock = Lock(output.with_name(".r.lock"))
    assert lock.acquire()
    texts = outputs_of(evaluation(model, output, processes, "--num_samples", 2))
    assert [code for _, code in texts] == [1] * processes
    assert sum("another run is writing --output" in text for text, _ in texts) == 1
    assert not any("Traceback" in text for text, _ in texts)
    lock.release()
    kept = tmp_path / "reports" / "r.partial" / "mc" / "rows-0.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    texts = outputs_of(evaluation(model, output, processes, "--num_samples", 2))  # all end, not the main one alone
    assert [code for _, code in texts] == [1] * processes
    assert sum("holds the numbers of an interrupted run" in text for text, _ in texts) == 1
    texts = outputs_of(evaluation(model, output, processes, "--num_samples", 2, "--no-resume"))
    assert [code for _, code in texts] == [0] * processes, texts
    assert json.loads(output.read_text(encoding="utf-8"))["num_images"] == 297
    assert not kept.exists() and not output.with_name(".r.lock").exists()
