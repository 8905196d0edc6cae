"""training.py: data, keyed randomness, checkpoints. The properties that let a run be split, stopped and trusted."""

import json
import os

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image

from diffusers_vdm import MonotoneGammaNetwork, VariationalBound, VDMUNet2DModel, training


def tiny_objective(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = VDMUNet2DModel.from_preset(
            "digits", block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8
        )
    return VariationalBound(unet, MonotoneGammaNetwork(-7.5, 5.0, hidden_dim=16, learn_ends=True), num_levels=17)


def random_images(n, generator, channels=1):
    images = torch.randint(0, 17, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return training.ImageSet(images, torch.arange(n), 17, "random")


def test_digits_split_is_the_one_of_the_readme():
    train, test = training.load_digits_split()
    assert (len(train), len(test), train.num_levels) == (1500, 297, 17)
    assert train.images.dtype == torch.uint8 and int(train.images.max()) == 16
    # all 1,797 images of the original, each once
    from sklearn.datasets import load_digits

    original = sorted(map(bytes, load_digits().images.astype(np.uint8)))
    assert sorted(bytes(i.numpy()) for i in torch.cat([train.images, test.images])) == original
    assert round(training.histogram_bpd(train, test), 4) == 2.4185


def test_histogram_of_uniform_data_costs_the_logarithm_of_the_levels(generator):
    data = random_images(20000, generator)
    assert training.histogram_bpd(data, data) == pytest.approx(np.log2(17), abs=1e-3)


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


def run_steps(objective, optimizer, ema, scheduler, data, steps):
    for step in steps:
        batch = training.keyed_batch(data, step, range(4), 4, seed=0)
        torch.manual_seed(training.key_to_seed(0, "dropout", step))
        objective(batch.images, t=batch.t, eps=batch.eps, eps_0=batch.eps_0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ema.step(list(objective.parameters()))


def setup_run():
    objective = tiny_objective()
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema = EMAModel(objective.parameters(), use_ema_warmup=True, power=0.75)
    return objective, optimizer, ema, scheduler


RUN = {"options": {"learning_rate": 1e-3, "output_dir": "a"}, "data": {"fingerprint": "x"}, "global_batch_size": 4}


def test_a_restored_run_is_the_run_that_was_never_stopped(tmp_path, generator):
    data = random_images(9, generator)
    whole = setup_run()
    run_steps(*whole, data, range(7))
    first = setup_run()
    run_steps(*first, data, range(3))
    objective, optimizer, ema, scheduler = first
    folder = training.save(tmp_path, 3, objective, optimizer, scheduler, ema, RUN)

    objective, optimizer, ema, scheduler = second = setup_run()
    with torch.no_grad():  # whatever stands there is replaced
        for p in objective.parameters():
            p.add_(1.0)
    assert training.restore(folder, objective, optimizer, scheduler, ema, RUN)["step"] == 3
    run_steps(*second, data, range(3, 7))
    for a, b in zip(whole[0].state_dict().values(), objective.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole[2].shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(a, b)
    a, b = training.optimizer_tensors(whole[1]), training.optimizer_tensors(optimizer)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert whole[3].get_last_lr() == scheduler.get_last_lr()


def test_another_run_is_refused_and_free_options_are_not(tmp_path, generator):
    objective, optimizer, ema, scheduler = setup_run()
    run_steps(objective, optimizer, ema, scheduler, random_images(9, generator), range(1))
    folder = training.save(tmp_path, 1, objective, optimizer, scheduler, ema, RUN)
    fresh = setup_run()
    args = (folder, fresh[0], fresh[1], fresh[3], fresh[2])
    assert training.restore(*args, RUN | {"options": {"learning_rate": 1e-3, "output_dir": "b"}})["step"] == 1
    for changed, name in (
        ({"options": {"learning_rate": 2e-3, "output_dir": "a"}}, "learning_rate: 0.001 → 0.002"),
        ({"data": {"fingerprint": "y"}}, "data"),
        ({"global_batch_size": 8}, "global_batch_size: 4 → 8"),
    ):
        with pytest.raises(ValueError, match=name):
            training.restore(*args, RUN | changed)
    split = {"options": RUN["options"] | {"dropout": 0.1, "train_batch_size": 2}}
    with pytest.raises(ValueError, match="train_batch_size"):  # the masks of dropout would be others
        training.restore(*args, RUN | split)
    with pytest.raises(ValueError, match="averaged weights"):
        training.restore(folder, fresh[0], fresh[1], fresh[3], None, RUN)


def test_checkpoints_are_whole_or_absent(tmp_path):
    for step in (5, 10, 100):
        training.save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, total_limit=2)
    assert [p.name for p in training.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    # what an interrupted write leaves: the temporary folder, or a folder without the last file
    (tmp_path / ".checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-150").mkdir()
    assert training.find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        training.load_checkpoint(tmp_path / "checkpoint-150")
    damaged = tmp_path / "damaged" / "checkpoint-1"
    training.save_checkpoint(tmp_path / "damaged", 1, {"model": {"w": torch.ones(2)}}, {})
    (damaged / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        training.load_checkpoint(damaged)
    tensors, state = training.load_checkpoint(tmp_path / "checkpoint-100")
    assert torch.equal(tensors["model"]["w"], torch.ones(2)) and state["step"] == 100
    with pytest.raises(ValueError, match="no complete checkpoint"):
        training.find_checkpoint(tmp_path / "nowhere", "latest")
    # written again over itself
    training.save_checkpoint(tmp_path, 100, {"model": {"w": torch.zeros(2)}}, {})
    assert torch.equal(training.load_checkpoint(tmp_path / "checkpoint-100")[0]["model"]["w"], torch.zeros(2))


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


# ---- images from files -------------------------------------------------------------------------------------------


def write_folder(folder, images):
    """An imagefolder with a train and a test split and two classes."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / ("train" if i < len(images) - 1 else "test") / "ab"[i % 2] / f"{i:03d}.png")
    return str(folder)


def picture(rng, size=(8, 8), mode="RGB"):
    channels = {"RGB": 3, "L": 0, "RGBA": 4}[mode]
    shape = (size[1], size[0], channels) if channels else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=None)


def test_a_folder_of_images_is_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(5)]
    path = write_folder(tmp_path / "data", images)
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), "progress_bar": False}
    train = training.load_images(path, "train", **options)
    assert train.images.shape == (4, 3, 8, 8) and train.num_levels == 256
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1]
    expected = sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image in images[:4])
    assert sorted(image.numpy().tobytes() for image in train.images) == expected
    again = training.load_images(path, "train", **options)
    assert again.fingerprint == train.fingerprint
    assert training.load_images(path, "test", **options).fingerprint != train.fingerprint

    small = training.load_images(path, "train", resolution=4, center_crop=True, **options)
    assert small.images.shape == (4, 3, 4, 4)
    gray = training.load_images(path, "train", image_mode="L", **options)
    assert gray.images.shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="image_column"):
        training.load_images(path, "train", image_column="img", **options)
    with pytest.raises(ValueError, match="label_column"):
        training.load_images(path, "train", label_column="labels", **options)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (lambda rng: [picture(rng), picture(rng), picture(rng, (8, 9)), picture(rng)], "set resolution"),
        (lambda rng: [picture(rng), picture(rng), picture(rng, mode="L"), picture(rng)], "set image_mode"),
        (lambda rng: [picture(rng, mode="RGBA")] * 4, "transparency"),
    ],
)
def test_images_that_do_not_fit_are_named(tmp_path, pictures, message):
    path = write_folder(tmp_path / "data", pictures(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=message) as error:
        training.load_images(path, "train", is_folder=True, cache_dir=str(tmp_path / "cache"), progress_bar=False)
    assert "image " in str(error.value)


def test_crops_are_drawn_once_for_each_image():
    rng = np.random.default_rng(1)
    wide = picture(rng, (32, 8))
    crops = [training._pixels(wide, "RGB", False, 8, (0, i)) for i in range(20)]
    assert all(crop.shape == (3, 8, 8) for crop in crops)
    assert np.array_equal(crops[3], training._pixels(wide, "RGB", False, 8, (0, 3)))
    assert len({crop.tobytes() for crop in crops}) > 5
    array = np.asarray(wide).transpose(2, 0, 1)
    assert np.array_equal(training._pixels(wide, "RGB", False, 8, None), array[:, :, 12:20])
