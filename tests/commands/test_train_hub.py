"""commands/train_hub.py: uploads in the background, errors of the Hub, and runs that are resumed from it."""

import json
import os
import signal
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_vdm.training.metrics import read_metrics
from tests import hub_server
from tests.hub_client import files_at
from tests.models import tiny_preset
from tests.running import exit_codes, log_of, run_example, run_python, start_training, state_of, wait_for

REPO = "user/digits"
OPTIONS = (
    "--max_train_steps 9 --logging_steps 2 --eval_steps 4 --checkpointing_steps 3 --max_eval_images 10 "
    "--eval_samples 1 --num_images 2 --ddpm_num_inference_steps 2 --ema_decays 0.999 0.9 --logger none "
    "--num_threads 1 --checkpoints_total_limit 1 --push_to_hub --hub_model_id digits --hub_strategy"
)
PULL = """
import json, sys
import torch
from diffusers_vdm import VDMPipeline, VariationalBound, noise_schedule_of
pipeline = VDMPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
samples = pipeline(2, 3, torch.Generator().manual_seed(1), output_type="np").images
bound = VariationalBound(pipeline.unet, noise_schedule_of(pipeline.scheduler), num_levels=17)
images = torch.randint(0, 17, (4, 1, 8, 8), generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    total = bound(images, generator=torch.Generator().manual_seed(3)).total
print(json.dumps([samples.tolist(), total.tolist()]))
"""


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """train.py as a user of this Hub, with more options; `run(folder, strategy, …)` returns the processes."""
    hub.reset()
    for name, value in hub_server.environment(hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    tiny_preset().save_config(tmp_path / "network")
    fixed = ["--model_config_name_or_path", str(tmp_path / "network"), *OPTIONS.split()]
    return lambda folder, strategy, *more: start_training(folder, [*fixed, strategy, *more])


def head(hub, name=REPO):
    """The files at the newest commit."""
    return files_at(hub, name=name)


def pulled(source, **environment):
    """The samples and bounds of a pipeline that another process has loaded."""
    environment = {"HF_HUB_OFFLINE": ""} | environment
    return json.loads(run_python("-c", PULL, source, environment=environment).stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pushed_run_is_loaded_as_it_was_trained(hub, run, tmp_path):
    out = tmp_path / "run"
    options = ["--max_train_steps", "2", "--hub_license", "mit", "--hub_include_code"]
    assert exit_codes(out, run(out, "end", *options)) == [0], log_of(out)
    files = head(hub)
    card, last = ModelCard(files["README.md"].decode()), read_metrics(out / "metrics.jsonl")[-1]
    assert card.data.license == "mit" and "from_pretrained(&quot;" not in card.text and REPO in card.text
    (result,) = card.data.eval_results
    assert result.metric_value == last["eval_bpd"] and result.metric_args["num_images"] == 297
    assert "--train_batch_size 4 --max_train_steps 2" in card.text.replace("\\\n    ", "")
    assert sum(name.endswith(".py") for name in files) == 4
    assert {"model_index.json", "README.md", "metrics.jsonl", "options.json", "samples.png", "training.png"} <= set(
        files
    )
    assert "ema_0.9/unet/diffusion_pytorch_model.safetensors" in files
    assert not [name for name in files if name.startswith(("checkpoint", "last-checkpoint", ".upload", "logs"))]
    assert len(hub.repos[REPO].commits) == 2  # the empty one and this one
    assert pulled(REPO, HF_HOME=str(tmp_path / "elsewhere")) == pulled(out)
    # once more it has nothing to do, and nothing to upload
    commits = len(hub.repos[REPO].commits)
    assert exit_codes(out, run(out, "end", *options)) == [0], log_of(out)
    assert "nothing to do" in log_of(out) and len(hub.repos[REPO].commits) == 2
    assert len(hub.repos[REPO].commits) == commits and not list(out.glob(".upload*"))
    # another run in the same folder: nothing of the first run is uploaded
    ddpm = ["--objective", "ddpm", "--schedule", "linear_beta", "--no-use_ema", "--overwrite_output_dir",
            "--resume_from_checkpoint", ""]  # fmt: skip
    assert exit_codes(out, run(out, "end", "--max_train_steps", "1", *ddpm)) == [0], log_of(out)
    assert not [name for name in head(hub) if name.startswith(("noise_schedule", "ema_")) or name.endswith(".py")]
    assert pulled(REPO, HF_HOME=str(tmp_path / "third")) == pulled(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_resumed_from_the_hub_on_another_machine(hub, run, tmp_path):
    """Which takes the options that would have other defaults there from what the run has recorded."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    chosen = ["--optimizer", "muon", "--muon_learning_rate", "0.02", "--mixed_precision", "bf16"]
    assert exit_codes(whole, run(whole, "end", "--hub_model_id", "whole", *chosen)) == [0], log_of(whole)
    (process,) = run(first, "checkpoint", "--resume_from_checkpoint", "last-checkpoint", *chosen)
    wait_for(lambda: REPO in hub.repos and any("checkpoint/state" in name for name in head(hub)))
    process.kill()
    process.wait()
    step = json.loads(head(hub)["last-checkpoint/state.json"])["step"]
    assert step in (3, 6)
    assert f"these are the weights after step {step}." in head(hub)["README.md"].decode()
    assert {"metrics.jsonl", "options.json", "model_index.json", "last-checkpoint/ema_0.9.safetensors"} <= set(
        head(hub)
    )
    stale = json.loads((whole / "options.json").read_text())  # a run that was killed here before its first checkpoint
    stale["options"] |= {"mixed_precision": "no", "muon_learning_rate": 0.05}
    second.mkdir()
    (second / "options.json").write_text(json.dumps(stale))
    again = ["--resume_from_checkpoint", "last-checkpoint", "--optimizer", "muon", "--mixed_precision", "auto"]
    assert exit_codes(second, run(second, "checkpoint", *again)) == [0], log_of(second)
    assert "--mixed_precision bf16: as recorded" in log_of(second)
    assert f"checkpoint-{step} was downloaded from {REPO}" in log_of(second)
    assert state_of(whole) == state_of(second)
    assert json.loads(head(hub)["last-checkpoint/state.json"])["step"] == 9
    assert "Training had not finished" not in head(hub)["README.md"].decode()
    # another run is not resumed from this checkpoint, and keeps its own files
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    other = ["--hub_model_id", "digits", "--resume_from_checkpoint", "last-checkpoint", "--seed", "3", *chosen]
    (whole / "checkpoint-9" / "state.json").rename(tmp_path / "state.json")  # the Hub's is newer then
    assert exit_codes(whole, run(whole, "checkpoint", *other)) == [1]
    assert "this is not the same run: seed" in log_of(whole).splitlines()[-1]
    (tmp_path / "state.json").rename(whole / "checkpoint-9" / "state.json")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    # the Hub holds the files of the last checkpoint alone
    assert {name for name in head(hub) if name.startswith("last-checkpoint")} == {
        f"last-checkpoint/{name}"
        for name in ("state.json", "model.safetensors", "optimizer.safetensors", "ema_0.9.safetensors",
                     "ema_0.999.safetensors")
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_damaged_checkpoint_on_the_hub_is_refused(hub, run, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    assert exit_codes(out, run(out, "checkpoint", "--max_train_steps", "3")) == [0], log_of(out)
    files = head(hub)
    for damage, message in (
        ({"last-checkpoint/model.safetensors": files["last-checkpoint/model.safetensors"][:-9]}, "content does not"),
        ({"last-checkpoint/state.json": b"[]"}, "JSON object"),
        ({"options.json": b"[]"}, "JSON object"),
    ):
        hub.create(REPO, files | damage)
        resumed = run(other, "checkpoint", "--resume_from_checkpoint", "last-checkpoint", "--max_train_steps", "3")
        assert exit_codes(other, resumed) == [1]
        assert message in log_of(other).splitlines()[-1] and "Traceback" not in log_of(other), log_of(other)
        assert not other.exists(), "nothing of it may be left"
    # with a Hub that does not answer, a new run could replace the one on the Hub
    hub.fault("GET", "/api/models/", times=10**9, status=503, headers={"Retry-After": "0"})
    assert exit_codes(other, run(other, "checkpoint", "--resume_from_checkpoint", "last-checkpoint")) == [1]
    assert "no local checkpoint either" in log_of(other).splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_does_not_wait_for_a_slow_hub(hub, run, tmp_path):
    """The first commit is answered when the run is at its end, and no sooner: the steps did not wait for it."""
    out = tmp_path / "run"
    lines = out / "metrics.jsonl"
    at_end = lambda: bool(read_metrics(lines)) and read_metrics(lines)[-1]["step"] == 9  # noqa: E731
    hub.fault("POST", "/commit/", gate=lambda: wait_for(at_end))
    assert exit_codes(out, run(out, "every_save")) == [0], log_of(out)
    assert hub.faults[0].times == 0
    messages = [commit.title for commit in hub.repos[REPO].commits.values()][1:]
    # if step 6 has to wait until step 9 is there, that one goes in its place
    assert [m for m in messages if "6" not in m] == ["in training, step 3", "trained, step 9"] and len(messages) <= 3
    assert json.loads(head(hub)["metrics.jsonl"].splitlines()[-1])["step"] == 9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_errors_of_the_hub_change_no_weights_and_the_upload_is_repeated(hub, run, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert exit_codes(whole, run(whole, "end", "--hub_model_id", "whole")) == [0], log_of(whole)
    hub.fault("POST", "/", times=10**9, status=500)
    assert exit_codes(out, run(out, "checkpoint")) == [1]
    log = log_of(out)
    assert "The Hub does not answer" in log and "Traceback" not in log
    assert "the run is complete in" in log.splitlines()[-1] and "to try again" in log.splitlines()[-1]
    assert state_of(whole) == state_of(out) and REPO not in hub.repos and not list(out.glob(".upload*"))
    hub.faults.clear()
    assert exit_codes(out, run(out, "checkpoint")) == [0]
    assert json.loads(head(hub)["last-checkpoint/state.json"])["step"] == 9


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hub_token", "hf_wrong"], "hf auth login"),
        (["--hub_model_id", "somebody/else"], "somebody/else cannot be written to"),
        (["--hub_model_id", "a/b/c"], "a/b/c"),
    ],
    ids=["token", "owner", "name"],
)
def test_a_repository_that_may_not_be_written_ends_the_run_before_its_first_step(hub, run, tmp_path, options, message):
    out = tmp_path / "run"
    assert exit_codes(out, run(out, "end", *options)) == [1]
    last = log_of(out).splitlines()[-1]
    assert message in last and "train.py: " in last and "Traceback" not in log_of(out), log_of(out)
    assert not (out / "metrics.jsonl").exists() and "hf_wrong" not in log_of(out)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_license_is_refused(hub, run, tmp_path):
    out = tmp_path / "run"
    assert exit_codes(out, run(out, "end", "--hub_license", "The MIT License")) == [2]
    assert "license must be an identifier" in log_of(out).splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_ends_the_wait_for_a_hub_that_does_not_answer(hub, run, tmp_path):
    out, over = tmp_path / "run", threading.Event()
    hub.fault("POST", "/commit/", gate=over.wait)
    (process,) = run(out, "end", "--max_train_steps", "2")
    wait_for(lambda: "waiting for the upload" in log_of(out))
    process.send_signal(signal.SIGTERM)
    assert exit_codes(out, [process]) == [0] and "was canceled" in log_of(out)
    over.set()
    assert not list(out.glob(".upload*")) and (out / "model_index.json").exists()


def test_the_last_checkpoint_of_the_hub_needs_push_to_hub(tmp_path):
    options = ["--output_dir", tmp_path / "x", "--resume_from_checkpoint", "last-checkpoint"]
    done = run_example("train.py", *options, check=False)
    assert done.returncode == 2 and "--push_to_hub" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_data_sets_are_read_from_the_hub(hub, run, tmp_path):
    """By name, whole and as a stream, private, and what is not there."""
    rng = np.random.default_rng(0)
    files = {}
    for split in ("train", "test"):
        images = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(12)]
        rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(tmp_path / f"{split}.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / f"{split}.parquet").read_bytes()
    hub.create("datasets/user/faces", files, private=True)
    common = ["--max_train_steps", "2", "--eval_steps", "0", "--train_batch_size", "4"]
    data = ["--dataset_name", "user/faces", "--cache_dir", str(tmp_path / "cache")]
    whole, stream, local = (tmp_path / name for name in ("whole", "stream", "local"))
    assert exit_codes(whole, run(whole, "end", *common, *data)) == [0], log_of(whole)
    assert exit_codes(stream, run(stream, "end", *common, *data, "--streaming", "--num_train_images", "12")) == [0], (
        log_of(stream)
    )
    (tmp_path / "copy").mkdir()
    for name, content in files.items():
        (tmp_path / "copy" / Path(name).name).write_bytes(content)
    assert exit_codes(local, run(local, "end", *common, "--dataset_name", str(tmp_path / "copy"))) == [0], log_of(
        local
    )
    values = [[line["eval_bpd"] for line in read_metrics(out / "metrics.jsonl") if "eval_bpd" in line]
              for out in (whole, local)]  # fmt: skip
    assert values[0] == values[1] and len(values[0]) == 1
    os.environ["HF_TOKEN"] = "hf_other"  # back by the fixture's monkeypatch
    for name in ("user/faces", "user/nothing"):
        out = tmp_path / "refused"
        other = ["--dataset_name", name, "--cache_dir", str(tmp_path / "empty"), "--hub_token", "hf_user"]
        assert exit_codes(out, run(out, "end", *common, *other)) == [1]
        last = log_of(out).splitlines()[-1]
        assert name in last and "Traceback" not in log_of(out), log_of(out)
