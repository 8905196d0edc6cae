"""checkpoints.py: whole or not there, and a run that goes on from one is the run that was never stopped."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from test_training import random_images, tiny_objective

from diffusers_vdm import checkpoints, training


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
    folder = checkpoints.save(tmp_path, 3, objective, optimizer, scheduler, ema, RUN)

    objective, optimizer, ema, scheduler = second = setup_run()
    with torch.no_grad():  # whatever stands there is replaced
        for p in objective.parameters():
            p.add_(1.0)
    assert checkpoints.restore(folder, objective, optimizer, scheduler, ema, RUN)["step"] == 3
    run_steps(*second, data, range(3, 7))
    for a, b in zip(whole[0].state_dict().values(), objective.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole[2].shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(a, b)
    a, b = checkpoints.optimizer_tensors(whole[1]), checkpoints.optimizer_tensors(optimizer)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert whole[3].get_last_lr() == scheduler.get_last_lr()


def test_another_run_is_refused_and_free_options_are_not(tmp_path, generator):
    objective, optimizer, ema, scheduler = setup_run()
    run_steps(objective, optimizer, ema, scheduler, random_images(9, generator), range(1))
    folder = checkpoints.save(tmp_path, 1, objective, optimizer, scheduler, ema, RUN)
    fresh = setup_run()
    args = (folder, fresh[0], fresh[1], fresh[3], fresh[2])
    assert checkpoints.restore(*args, RUN | {"options": {"learning_rate": 1e-3, "output_dir": "b"}})["step"] == 1
    for changed, name in (
        ({"options": {"learning_rate": 2e-3, "output_dir": "a"}}, "learning_rate: 0.001 → 0.002"),
        ({"data": {"fingerprint": "y"}}, "data"),
        ({"global_batch_size": 8}, "global_batch_size: 4 → 8"),
    ):
        with pytest.raises(ValueError, match=name):
            checkpoints.restore(*args, RUN | changed)
    split = {"options": RUN["options"] | {"dropout": 0.1, "train_batch_size": 2}}
    with pytest.raises(ValueError, match="train_batch_size"):  # the masks of dropout would be others
        checkpoints.restore(*args, RUN | split)
    with pytest.raises(ValueError, match="averaged weights"):
        checkpoints.restore(folder, fresh[0], fresh[1], fresh[3], None, RUN)


def test_checkpoints_are_whole_or_absent(tmp_path):
    for step in (5, 10, 100):
        checkpoints.save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, total_limit=2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    # what an interrupted write leaves: the temporary folder, or a folder without the last file
    (tmp_path / ".checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-150").mkdir()
    assert checkpoints.find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "checkpoint-150")
    damaged = tmp_path / "damaged" / "checkpoint-1"
    checkpoints.save_checkpoint(tmp_path / "damaged", 1, {"model": {"w": torch.ones(2)}}, {})
    (damaged / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        checkpoints.load_checkpoint(damaged)
    tensors, state = checkpoints.load_checkpoint(tmp_path / "checkpoint-100")
    assert torch.equal(tensors["model"]["w"], torch.ones(2)) and state["step"] == 100
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoints.find_checkpoint(tmp_path / "nowhere", "latest")
    # written again over itself
    checkpoints.save_checkpoint(tmp_path, 100, {"model": {"w": torch.zeros(2)}}, {})
    assert torch.equal(checkpoints.load_checkpoint(tmp_path / "checkpoint-100")[0]["model"]["w"], torch.zeros(2))
