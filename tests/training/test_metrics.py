"""training/metrics.py: the mean loss, and the lines of metrics.jsonl."""

import json
import math

import pytest
import torch

from diffusers_vdm.training.metrics import LossMeter, append_metrics, truncate_metrics


def test_losses_that_are_not_finite_do_not_count():
    meter = LossMeter("cpu")
    for loss in (1.0, math.nan, 3.0, math.inf):
        meter.add(torch.tensor(loss))
    assert meter.sums.tolist() == [4.0, 2.0] and LossMeter.mean([[4.0, 2.0], [8.0, 4.0]]) == 2.0


def test_the_mean_of_no_losses_is_nan():
    assert math.isnan(LossMeter.mean([[0.0, 0.0]]))
    assert LossMeter("cpu").sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("processes", [2, 3])
def test_sums_of_two_processes_are_loaded_by_any_number_of_them(processes):
    meters = [LossMeter("cpu") for _ in range(processes)]
    for i, each in enumerate(meters):
        each.load([[4.0, 2.0], [8.0, 4.0]], i, processes)
    assert LossMeter.mean([each.sums.tolist() for each in meters]) == pytest.approx(2.0)


def test_metrics_of_steps_after_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30):
        append_metrics(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4')  # a line that a kill cut short
    truncate_metrics(path, 30)  # what is due at a step is done again
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    truncate_metrics(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""
