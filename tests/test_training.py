"""training.py: data, keyed randomness, checkpoints. The properties that let a run be split, stopped and trusted."""

import json
import os

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_vdm import MonotoneGammaNetwork, VariationalBound, VDMUNet2DModel, training
from diffusers_vdm.images import ImageSet


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
    order = training.batch_indices(range(3 * n), n, seed=4).tolist()
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order[:n] != order[n : 2 * n]
    assert training.batch_indices(range(17, 23), n, seed=4).tolist() == order[17:23]
    assert training.batch_indices(range(3 * n), n, seed=5).tolist() != order


def test_a_global_batch_does_not_depend_on_how_it_is_split(generator):
    data = random_images(50, generator)
    whole = training.keyed_batch(data, 7, range(8), 8, seed=1, random_flip=True)
    for parts in ([range(0, 4), range(4, 8)], [range(i, i + 1) for i in range(8)]):
        split = [training.keyed_batch(data, 7, rows, 8, seed=1, random_flip=True) for rows in parts]
        for name in ("images", "labels", "flipped", "withheld", "t", "eps", "eps_0"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in split])), name
    assert not torch.equal(whole.eps, whole.eps_0)
    other = training.keyed_batch(data, 8, range(8), 8, seed=1)
    assert not torch.equal(whole.eps, other.eps) and not torch.equal(whole.t, other.t)
    # one lattice of t over the whole batch, whoever computes its rows
    assert torch.allclose(whole.t.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))


def test_flips_are_what_the_flag_says(generator):
    data = random_images(64, generator)
    batch = training.keyed_batch(data, 0, range(64), 64, seed=0, random_flip=True)
    plain = training.keyed_batch(data, 0, range(64), 64, seed=0)
    assert 10 < batch.flipped.sum() < 54 and plain.flipped.sum() == 0
    for flipped, image, original in zip(batch.flipped, batch.images, plain.images, strict=True):
        assert torch.equal(image, original.flip(-1) if flipped else original)
    assert torch.equal(batch.eps, plain.eps)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    training.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        training.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_ema_weights_are_lent_and_taken_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    ema = EMAModel([parameter], decay=0.5)
    ema.shadow_params[0].fill_(2.0)
    with pytest.raises(KeyError), training.ema_weights(ema, [parameter]):
        assert torch.equal(parameter.data, torch.full((3,), 2.0))
        raise KeyError
    assert torch.equal(parameter.data, torch.zeros(3))
    with training.ema_weights(None, [parameter]):
        assert torch.equal(parameter.data, torch.zeros(3))


def test_metrics_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30):
        training.append_metrics(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4')  # a line that a kill cut short
    training.truncate_metrics(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    training.truncate_metrics(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""
