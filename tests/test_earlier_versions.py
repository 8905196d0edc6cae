"""Files of an earlier version: its run is resumed, and its pipeline, its report and its card are read.

`fixtures/saved_before_rooms` was written by commit 99c0f40 with the commands in its README.md; only its paths were
made relative. Another processor may round differently, so numbers are compared to a tolerance that a change of the
arithmetic would exceed.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from diffusers_vdm import VariationalBound, VDMPipeline, evaluate_mc
from diffusers_vdm.data.images import load_digits_split
from diffusers_vdm.sharing.model_card import model_card
from tests.paths import SAVED_BEFORE_ROOMS
from tests.running import metrics_of, run_example

COMMAND = (
    "--model_config_name_or_path network --max_train_steps 4 --logging_steps 1 --eval_steps 0 --checkpointing_steps 2 "
    "--checkpoints_total_limit 5 --max_eval_images 20 --eval_samples 1 --num_images 1 --ddpm_num_inference_steps 2 "
    "--lr_warmup_steps 2 --train_batch_size 8 --num_threads 1 --logger none --schedule learned_linear"
)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    shutil.copytree(SAVED_BEFORE_ROOMS, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_run_is_resumed_to_the_same_end(saved):
    before, weights = (
        metrics_of(saved / "run"),
        load_file(saved / "run" / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    for name in ("unet", "scheduler", "noise_schedule"):
        shutil.rmtree(saved / "run" / name)
    (saved / "run" / "model_index.json").unlink()
    done = run_example("train.py", *COMMAND.split(), "--output_dir", "run", "--resume_from_checkpoint", "latest")
    assert "resuming from run/checkpoint-2" in done.stdout
    after = metrics_of(saved / "run")
    assert [line["step"] for line in after] == [1, 2, 3, 4] and after[0] == before[0]
    for a, b in zip(after, before, strict=True):
        for name in set(a) & {"train_bpd", "learning_rate", "eval_bpd", "eval_reconstruction_bpd"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
    again = load_file(saved / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        # the gradient of to_k.bias is zero, so AdamW moves it by the rounding of this machine
        tolerance = 1e-6 if name.endswith("to_k.bias") else 1e-7
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=tolerance)


def test_the_pipeline_has_the_likelihood_of_its_report(saved):
    report = json.loads((saved / "run" / "report.json").read_text(encoding="utf-8"))
    pipe = VDMPipeline.from_pretrained(saved / "run")
    bound = VariationalBound(pipe.unet, pipe.scheduler.noise_schedule(), num_levels=17)
    images = load_digits_split()[1].images[:20]
    result = evaluate_mc(bound, images, num_samples=2, batch_size=128, progress_bar=False)
    assert result.bpd == pytest.approx(report["bpd"], rel=1e-6)
    assert result.per_image_bpd.tolist() == pytest.approx(report["per_image_bpd"], rel=1e-5)


def test_the_card_quotes_the_same_numbers(saved):
    before = (saved / "run" / "README.md").read_text(encoding="utf-8")
    after = model_card(VDMPipeline.from_pretrained(saved / "run"), saved / "run")
    numbers = r"(?:value|stderr|\w+_bpd|num_images|num_draws|data_fingerprint): \S+"
    assert re.findall(numbers, after) == re.findall(numbers, before) and "6.326044443063438" in after
