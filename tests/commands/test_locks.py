"""Two runs of a command in one place: the second is refused, and a run that was killed leaves no lock behind."""

import json
import signal

import pytest

from diffusers_vdm.files import Lock
from diffusers_vdm.training.metrics import read_metrics
from tests.paths import EXAMPLES
from tests.running import exit_codes, log_of, log_path, start_script, start_training, wait_for

# ---- train.py -----------------------------------------------------------------------------------------------------


def files_of(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def ended(out, processes, start):
    """Exit codes of the processes that `start` starts, and what each of them adds to its log."""
    logs = [log_path(out, rank) for rank in range(processes)]
    before = [len(log.read_bytes()) if log.exists() else 0 for log in logs]
    codes = exit_codes(out, start())
    return codes, [log.read_bytes()[n:].decode() for log, n in zip(logs, before, strict=True)]


def second(out, arguments, processes=1, batch_size=4):
    """Another run in the folder: its exit codes, and what each of its processes prints."""
    return ended(out, processes, lambda: start_training(out, arguments, processes, batch_size))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_training_in_the_folder_of_a_running_one_is_refused(tmp_path, training_options, processes):
    out = tmp_path / "run"
    long = [*training_options, "--max_train_steps", "120", "--eval_steps", "0", "--checkpointing_steps", "10000"]
    started = start_training(out, long, processes, 4 // processes)
    try:
        assert wait_for(lambda: read_metrics(out / "metrics.jsonl"), started)
        for process in started:
            process.send_signal(signal.SIGSTOP)  # paused, so that its files can be compared
        before = files_of(out)
        attempts = [
            ["--overwrite_output_dir", "--resume_from_checkpoint", ""],
            ["--push_to_hub", "--hub_strategy", "checkpoint", "--resume_from_checkpoint", "last-checkpoint"],
            ["--resume_from_checkpoint", ""],
            ["--seed", "1"],
        ]
        for more in attempts[: 4 // processes]:
            codes, logs = second(out, [*long, *more], processes, 4 // processes)
            assert codes == [1] * processes, logs
            message = "train.py: another run is writing to --output_dir"
            assert [text.count(message) for text in logs] == [1] + [0] * (processes - 1)
            assert not any("Traceback" in text for text in logs)
            assert files_of(out) == before
        codes, logs = second(out, [*long, "--dry_run"])  # it needs no lock
        assert codes == [0] and "parameters" in logs[0] and files_of(out) == before
        for process in started:
            process.send_signal(signal.SIGCONT)
        assert exit_codes(out, started) == [0] * processes
        steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
        assert steps == sorted(set(steps)) and steps[-1] == 120 and not (out / ".lock").exists()
    finally:
        for process in started:
            process.kill()
    # after the run has ended, the folder is refused as that of another run
    codes, logs = second(out, [*long, "--resume_from_checkpoint", ""], processes)
    assert codes == [1] * processes and sum("holds another run" in text for text in logs) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_only_one_of_two_trainings_that_start_at_once_runs(tmp_path, training_options):
    out = tmp_path / "run"
    few = [*training_options, "--max_train_steps", "60", "--eval_steps", "0"]
    both = start_training(out, few) + start_training(out, few)
    assert sorted(exit_codes(out, both)) == [0, 1]
    assert log_of(out).count("another run is writing to --output_dir") == 1 and "Traceback" not in log_of(out)
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 60


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_leaves_no_lock(tmp_path, training_options, processes):
    out = tmp_path / "run"
    few = [*training_options, "--eval_steps", "0"]
    started = start_training(out, few, processes, 4 // processes)
    assert wait_for(lambda: read_metrics(out / "metrics.jsonl"), started)
    for process in started:
        process.kill()
    for process in started:
        process.wait()
    assert exit_codes(out, start_training(out, few, processes, 4 // processes)) == [0] * processes, log_of(out)[-2000:]
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_folder(tmp_path, training_options):
    out = tmp_path / "run"
    codes, logs = second(
        out, [*training_options, "--dataset_name", str(tmp_path / "nothing"), "--cache_dir", str(tmp_path)]
    )
    assert codes == [1] and "Traceback" not in logs[0] and not out.exists()


# ---- evaluate.py -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_evaluation_of_the_same_output_is_refused(tmp_path, digits_pipeline, processes):
    output = tmp_path / "reports" / "r.json"

    def evaluation(*more):
        command = ["--model", digits_pipeline, "--output", output, "--num_threads", 1, "--num_samples", 2, *more]
        start = lambda: start_script(EXAMPLES / "evaluate.py", command, tmp_path / "evaluation", processes)  # noqa: E731
        return ended(tmp_path / "evaluation", processes, start)

    lock = Lock(output.with_name(".r.lock"))
    assert lock.acquire()
    codes, texts = evaluation()
    assert codes == [1] * processes
    assert sum("another run is writing to --output" in text for text in texts) == 1
    assert not any("Traceback" in text for text in texts)
    lock.release()
    kept = tmp_path / "reports" / "r.partial" / "mc" / "rows-0.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    codes, texts = evaluation()  # all processes end, not the main one alone
    assert codes == [1] * processes
    assert sum("holds the results of an interrupted run" in text for text in texts) == 1
    codes, texts = evaluation("--no-resume")
    assert codes == [0] * processes, texts
    assert json.loads(output.read_text(encoding="utf-8"))["num_images"] == 297
    assert not kept.exists() and not output.with_name(".r.lock").exists()
