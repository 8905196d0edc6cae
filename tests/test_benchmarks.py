"""benchmarks/: the commands that others run on their machines, here with tiny networks."""

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_report.py"


@pytest.mark.slow
def test_every_part_of_the_report_runs_and_is_recorded(tmp_path):
    file = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--output", str(file)]
    subprocess.run(command, check=True, timeout=500, capture_output=True)
    report = json.loads(file.read_text())
    assert report["machine"]["torch"] and set(report["parts"]) == {"train_step", "train_loop", "evaluation", "race"}
    assert {name: part["error"] for name, part in report["parts"].items()} == dict.fromkeys(report["parts"])
    assert report["parts"]["train_step"]["results"]["variants"]["bf16"]["speed_over_port"]
    assert "ratio_median" in report["parts"]["evaluation"]["output"]
    [row] = [row for row in report["parts"]["race"]["results"] if row["is_last"]]
    assert row["num_images"] == 297 and row["flops"] > 0 and row["process_seconds"] > 0


def test_a_machine_without_a_gpu_is_told_so_at_once(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "report.json")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and "--tiny --device cpu" in done.stderr and not (tmp_path / "report.json").exists()
