"""training/: data, keyed randomness, checkpoints. The properties that let a run be split, stopped and trusted."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch

from diffusers_vdm import MonotoneGammaNetwork, VariationalBound, VDMUNet2DModel
from diffusers_vdm.data.images import ImageSet
from diffusers_vdm.files import write_atomically
from diffusers_vdm.threads import in_order
from diffusers_vdm.training.averages import WeightAverages
from diffusers_vdm.training.batches import batch_indices, keyed_batch
from diffusers_vdm.training.finite_steps import FiniteSteps
from diffusers_vdm.training.metrics import LossMeter, append_metrics, truncate_metrics
from diffusers_vdm.training.stopping import Stopped, StopRequest


def tiny_objective(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = VDMUNet2DModel.from_preset(
            "digits", block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8
        )
    return VariationalBound(unet, MonotoneGammaNetwork(-7.5, 5.0, hidden_dim=16, learn_ends=True), num_levels=17)


def random_images(n, generator, channels=1):
    images = torch.randint(0, 17, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n), 17, "random")


def test_every_epoch_visits_every_image_once_from_any_step():
    n = 10
    order = batch_indices(range(3 * n), n, seed=4).tolist()
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order[:n] != order[n : 2 * n]
    assert batch_indices(range(17, 23), n, seed=4).tolist() == order[17:23]
    assert batch_indices(range(3 * n), n, seed=5).tolist() != order


def test_a_global_batch_does_not_depend_on_how_it_is_split(generator):
    data = random_images(50, generator)
    whole = keyed_batch(data, 7, range(8), 8, seed=1, random_flip=True)
    for parts in ([range(0, 4), range(4, 8)], [range(i, i + 1) for i in range(8)]):
        split = [keyed_batch(data, 7, rows, 8, seed=1, random_flip=True) for rows in parts]
        for name in ("images", "labels", "augmented", "withheld", "t", "eps", "eps_0"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in split])), name
    assert not torch.equal(whole.eps, whole.eps_0)
    other = keyed_batch(data, 8, range(8), 8, seed=1)
    assert not torch.equal(whole.eps, other.eps) and not torch.equal(whole.t, other.t)
    # one lattice of t over the whole batch, whoever computes its rows
    assert torch.allclose(whole.t.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))


def test_flips_are_what_the_flag_says(generator):
    data = random_images(64, generator)
    batch = keyed_batch(data, 0, range(64), 64, seed=0, random_flip=True)
    plain = keyed_batch(data, 0, range(64), 64, seed=0)
    assert 10 < batch.augmented.sum() < 54 and plain.augmented.sum() == 0
    for flipped, image, original in zip(batch.augmented, batch.images, plain.images, strict=True):
        assert torch.equal(image, original.flip(-1) if flipped else original)
    assert torch.equal(batch.eps, plain.eps)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_averages_are_lent_and_taken_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    averages = WeightAverages([parameter], [0.5, 0.9])
    for decay, value in ((0.5, 2.0), (0.9, 3.0)):
        averages.models[decay].shadow_params[0].fill_(value)
        with pytest.raises(KeyError), averages.applied(decay):
            assert torch.equal(parameter.data, torch.full((3,), value))
            raise KeyError
        assert torch.equal(parameter.data, torch.zeros(3))
    with averages.applied():
        assert float(parameter.data[0]) == 2.0
    with WeightAverages([parameter], []).applied():
        assert torch.equal(parameter.data, torch.zeros(3))
    with pytest.raises(ValueError, match="different numbers"):
        WeightAverages([parameter], [0.9, 0.9])
    tensors = averages.state_dict()
    with pytest.raises(ValueError, match="must agree"):
        WeightAverages([parameter], [0.5]).load_state_dict(tensors)
    fresh = WeightAverages([parameter], [0.5, 0.9])
    fresh.load_state_dict(tensors)
    assert float(fresh.models[0.9].shadow_params[0][0]) == 3.0


def test_averages_are_the_sums_that_the_warm_up_says():
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    averages = WeightAverages([parameter], [0.8], inv_gamma=1.0, power=0.75)
    expected = 0.0
    for step in range(1, 30):
        with torch.no_grad():
            parameter.fill_(float(step))
        averages.step()
        decay = min(0.8, 1 - (1 + (step - 1)) ** -0.75) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * step
        assert float(averages.models[0.8].shadow_params[0][0]) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    def train(gradients):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter], 0.1, fused=True)
        steps, in_row = FiniteSteps("cpu"), []
        for gradient in gradients:
            parameter.grad = torch.full((3,), gradient)
            steps.step(optimizer, torch.nn.utils.clip_grad_norm_([parameter], 1.0))
            in_row.append(int(steps.in_row))
        return parameter, optimizer.state[parameter], int(steps.skipped), in_row

    parameter, state, skipped, in_row = train([1.0, bad, bad, 2.0, bad])
    expected, expected_state, none, _ = train([1.0, 2.0])
    assert torch.equal(parameter, expected) and (skipped, none) == (3, 0) and in_row == [0, 1, 2, 0, 1]
    assert all(torch.equal(state[name], expected_state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_losses_that_are_not_finite_do_not_count():
    meter = LossMeter("cpu")
    for loss in (1.0, math.nan, 3.0, math.inf):
        meter.add(torch.tensor(loss))
    assert meter.sums.tolist() == [4.0, 2.0] and LossMeter.mean([[4.0, 2.0], [8.0, 4.0]]) == 2.0
    assert math.isnan(LossMeter.mean([[0.0, 0.0]]))
    for processes in (2, 3):
        meters = [LossMeter("cpu") for _ in range(processes)]
        for i, each in enumerate(meters):
            each.load([[4.0, 2.0], [8.0, 4.0]], i, processes)
        assert LossMeter.mean([each.sums.tolist() for each in meters]) == pytest.approx(2.0)
    assert LossMeter("cpu").sums.tolist() == [0.0, 0.0]


def test_batches_are_made_ahead_and_come_in_order():
    started = []

    def make(key):
        started.append(key)
        time.sleep(0.01 * (3 - key % 3))  # the later ones are ready first
        if key == 7:
            raise ValueError("image 7 is broken")
        return key

    batches = in_order(make, range(100), 3, look_ahead=6)
    assert [next(batches) for _ in range(6)] == list(range(6))
    assert len(started) <= 6 + 2 * 3 + 1
    with pytest.raises(ValueError, match="image 7 is broken"):
        list(batches)
    assert len(started) < 25
    early = in_order(make, range(5), 2, look_ahead=4)
    next(early)
    early.close()  # no thread is left behind
    assert not [t for t in threading.enumerate() if t.name.startswith("in_order")]


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_noted_and_then_answered(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed()
        with stop.at_once():
            pass
        signal.raise_signal(number)
        assert stop.agreed() and stop.signal == signal.Signals(number).name
        with pytest.raises(Stopped), stop.at_once():
            pass
        signal.raise_signal(number)  # a launcher hands it on a second time
    assert signal.getsignal(number) is before
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        signal.raise_signal(number)


def test_metrics_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30):
        append_metrics(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4')  # a line that a kill cut short
    truncate_metrics(path, 30)  # what is due at a step is done again
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    truncate_metrics(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""


def test_turned_images_are_what_the_flag_says(generator):
    data = random_images(64, generator)
    batch = keyed_batch(data, 0, range(64), 64, 0, random_flip=True, random_rotation=True)
    plain = keyed_batch(data, 0, range(64), 64, 0)
    poses = [0] * 8
    for augmented, image, original in zip(batch.augmented, batch.images, plain.images, strict=True):
        turned = [torch.rot90(i, k, (-2, -1)) for i in (original, original.flip(-1)) for k in range(4)]
        pose = next(i for i, candidate in enumerate(turned) if torch.equal(candidate, image))
        poses[pose] += 1
        assert bool(augmented) == (pose > 0)
    assert min(poses) > 0 and torch.equal(batch.eps, plain.eps) and torch.equal(batch.t, plain.t)
    assert torch.equal(data.images, random_images(64, torch.Generator().manual_seed(20210701)).images)  # untouched
