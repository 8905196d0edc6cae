"""commands/precision.py: --mixed_precision auto is what was measured, and what a resumed run had."""

import argparse
import json
import re

import pytest
import torch

from diffusers_vdm.commands.precision import MIN_SPEEDUP, bf16_speedup, resolve_precision
from diffusers_vdm.commands.train_options import parse_options
from tests.running import run_example


def args_of(tmp_path, precision: str = "auto", resume: str | None = "latest") -> argparse.Namespace:
    return argparse.Namespace(
        mixed_precision=precision, resume_from_checkpoint=resume, output_dir=str(tmp_path / "run")
    )


def test_auto_is_half_precision_exactly_where_it_was_measured_to_be_faster(tmp_path, capsys):
    args = args_of(tmp_path)  # a first run: there is nothing to resume
    resolve_precision(args)
    chosen, speedup = re.fullmatch(
        r"--mixed_precision (\S+): bf16 takes 1/(\S+) of the time of float32 here\n", capsys.readouterr().out
    ).groups()
    assert args.mixed_precision == chosen == ("bf16" if float(speedup) >= MIN_SPEEDUP else "no")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_given_precision_is_not_measured(tmp_path, precision, capsys):
    args = args_of(tmp_path, precision)
    resolve_precision(args)
    assert args.mixed_precision == precision and not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_keeps_its_precision(tmp_path, precision, training_options):
    command = ["train.py", *training_options, "--output_dir", tmp_path / "run"]
    run_example(*command, "--mixed_precision", precision)
    recorded = json.loads((tmp_path / "run" / "options.json").read_text(encoding="utf-8"))
    assert recorded["options"]["mixed_precision"] == precision
    resumed = run_example(*command, "--mixed_precision", "auto", "--resume_from_checkpoint", "latest")
    assert f"--mixed_precision {precision}: as recorded" in resumed.stdout


def test_the_fast_presets_measure_and_the_command_line_decides():
    assert parse_options("", ["--preset", "cifar10-fast", "--dataset_name", "x"]).mixed_precision == "auto"
    given = ["--preset", "cifar10-fast", "--dataset_name", "x", "--mixed_precision", "no"]
    assert parse_options("", given).mixed_precision == "no"
    assert bf16_speedup(torch.device("cpu")) > 0
