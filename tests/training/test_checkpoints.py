"""training/checkpoints.py: a checkpoint is complete or absent, and a resumed run equals one that never stopped."""

import pytest
import torch
from diffusers.utils import logging
from safetensors import SafetensorError

from diffusers_vdm import MonotoneGammaNetwork, VariationalBound
from diffusers_vdm.randomness import key_to_seed
from diffusers_vdm.training import checkpoints
from diffusers_vdm.training.averages import WeightAverages
from diffusers_vdm.training.batches import keyed_batch
from tests.models import fixed_weights, tiny_preset
from tests.pictures import random_image_set


def tiny_objective() -> VariationalBound:
    with fixed_weights():
        schedule = MonotoneGammaNetwork(-7.5, 5.0, hidden_dim=16, learn_ends=True)
    return VariationalBound(tiny_preset(), schedule, num_levels=17)


def run_steps(objective, optimizer, ema, scheduler, data, steps):
    for step in steps:
        batch = keyed_batch(data, step, range(4), 4, seed=0)
        torch.manual_seed(key_to_seed(0, "dropout", step))
        objective(batch.images, t=batch.t, eps=batch.eps, eps_0=batch.eps_0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ema.step()


def setup_run():
    objective = tiny_objective()
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema = WeightAverages(list(objective.parameters()), [0.999, 0.5])
    return objective, optimizer, ema, scheduler


RUN = {
    "options": {"learning_rate": 1e-3, "output_dir": "a", "train_batch_size": 4, "gradient_accumulation_steps": 1},
    "data": {"fingerprint": "x"},
    "global_batch_size": 4,
    "num_processes": 1,
}


def changed(**options):
    return RUN | {"options": RUN["options"] | options}


@pytest.fixture
def three_steps(tmp_path, generator):
    """A run of three steps, its images, the groups that were saved of it, and what is loaded of the checkpoint."""
    data, run = random_image_set(9, generator), setup_run()
    run_steps(*run, data, range(3))
    objective, optimizer, ema, _ = run
    groups = {"model": objective.state_dict(), "optimizer": checkpoints.optimizer_tensors(optimizer)}
    groups |= ema.state_dict()
    folder = checkpoints.save_checkpoint(tmp_path, 3, groups, {"run": RUN, "sums": [[0.1, 1.0]]})
    return run, data, groups, checkpoints.load_checkpoint(folder)


def test_a_loaded_checkpoint_holds_what_was_saved(three_steps):
    _, _, groups, (tensors, state) = three_steps
    assert state["step"] == 3 and state["run"] == RUN and state["sums"] == [[0.1, 1.0]]
    assert tensors.keys() == groups.keys()
    for name, group in groups.items():
        assert all(torch.equal(tensors[name][key], value) for key, value in group.items())


def test_a_run_from_a_checkpoint_is_the_run_that_was_never_stopped(three_steps):
    (objective, optimizer, ema, scheduler), data, _, (tensors, _) = three_steps
    second = setup_run()
    with torch.no_grad():  # all values are replaced
        for p in second[0].parameters():
            p.add_(1.0)
    second[0].load_state_dict(tensors["model"])
    checkpoints.load_optimizer_tensors(second[1], tensors["optimizer"])
    second[2].load_state_dict(tensors)
    checkpoints.load_rate_state(second[3], checkpoints.rate_state(scheduler))
    assert second[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1e-3
    for run in ((objective, optimizer, ema, scheduler), second):
        run_steps(*run, data, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(objective.parameters(), second[0].parameters(), strict=True))
    for decay in (0.999, 0.5):
        pairs = zip(ema.models[decay].shadow_params, second[2].models[decay].shadow_params, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_options_that_do_not_change_the_numbers_may_differ():
    assert checkpoints.check_same_run(RUN, changed(output_dir="b", new_option=3)) is None


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (changed(learning_rate=2e-3), "learning_rate: 0.001 → 0.002"),
        (RUN | {"data": {"fingerprint": "y"}}, "data"),
        (RUN | {"global_batch_size": 8}, "global_batch_size: 4 → 8"),
    ],
    ids=["option", "data", "batch size"],
)
def test_another_run_is_refused_by_what_differs(other, difference):
    with pytest.raises(ValueError, match=difference):
        checkpoints.check_same_run(RUN, other)


def test_an_option_may_change_where_that_is_allowed():
    assert checkpoints.check_same_run(RUN, changed(learning_rate=2e-3), ["learning_rate"]) is None


def test_the_global_batch_size_may_never_change():
    # the order of the data depends on it
    with pytest.raises(ValueError, match="global_batch_size"):
        checkpoints.check_same_run(RUN, RUN | {"global_batch_size": 8}, ["global_batch_size"])


def test_a_longer_run_is_refused_where_the_learning_rate_depends_on_its_length():
    with pytest.raises(ValueError, match="max_train_steps: 5 → 9"):
        checkpoints.check_same_run(*(changed(max_train_steps=n, lr_scheduler="cosine") for n in (5, 9)))
    constant = [changed(max_train_steps=n, lr_scheduler="constant_with_warmup") for n in (5, 9)]
    assert checkpoints.check_same_run(*constant) is None


def test_names_of_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'learning_rat'"):
        checkpoints.check_allowed(["learning_rat"], RUN["options"])


def test_another_split_of_the_batch_is_described():
    two = changed(train_batch_size=2) | {"num_processes": 2}
    message = checkpoints.check_same_run(RUN, two)
    assert "1 × 4 × 1" in message and "2 × 2 × 1" in message and "dropout" not in message
    two["options"]["dropout"] = 0.1
    assert "dropout masks differ" in checkpoints.check_same_run(changed(dropout=0.1), two)


def save(folder, step, value=1.0, **options):
    return checkpoints.save_checkpoint(folder, step, {"model": {"w": torch.full((2,), value)}}, {}, **options)


def names(folder):
    return [p.name for p in checkpoints.list_checkpoints(folder)]


def test_checkpoints_are_whole_or_absent(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    # what an interrupted write leaves: the temporary folder, or a folder without the last file
    (tmp_path / ".checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-150").mkdir()
    assert checkpoints.load_latest(tmp_path)[0].name == "checkpoint-100"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "checkpoint-150")
    assert checkpoints.load_latest(tmp_path / "nowhere") is None
    # written again over itself, and the left-overs go
    save(tmp_path, 100, 0.0)
    assert torch.equal(checkpoints.load_checkpoint(tmp_path / "checkpoint-100")[0]["model"]["w"], torch.zeros(2))
    assert not list(tmp_path.glob(".checkpoint*"))


def test_milestones_are_kept_beyond_the_limit(tmp_path):
    for step in range(1, 10):
        save(tmp_path, step, total_limit=2, milestone_steps=4)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]


@pytest.mark.parametrize("damage", ["zeros", "cut", "bit", "missing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(tmp_path, damage, caplog):
    for step in (1, 2):
        save(tmp_path, step, float(step))
    victim = tmp_path / "checkpoint-2" / ("state.json" if damage == "state" else "model.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
    changed = {"zeros": b"\0" * 20, "cut": content[:-1], "state": content[:-9], "bit": content}.get(damage)
    victim.write_bytes(changed) if changed is not None else victim.unlink()
    with pytest.raises(ValueError, match=rf"{victim.name} is damaged"):
        checkpoints.load_checkpoint(victim.parent)
    logging.enable_propagation()
    try:
        folder, tensors, state = checkpoints.load_latest(tmp_path)
    finally:
        logging.disable_propagation()
    assert folder.name == "checkpoint-1" and state["step"] == 1 and float(tensors["model"]["w"][0]) == 1.0
    assert f"{victim.name} is damaged" in caplog.text
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="every checkpoint in"):
        checkpoints.load_latest(tmp_path)


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    assert checkpoints.load_latest(tmp_path)[0].name == "checkpoint-1"


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_no_more_are_removed_than_the_limit_says(tmp_path, limit):
    for step in range(1, 7):
        save(tmp_path, step, total_limit=limit)
        assert len(names(tmp_path)) == min(step, limit)


# ---- the same machine --------------------------------------------------------------------------------------------


def description(torch_version="2.13.0", **machine):
    return {"machine": machine, "versions": {"torch": torch_version}}


def test_machines_that_round_differently_are_named():
    here = {"device": "a processor", "cpu_capability": "AVX2", "threads": 1}
    assert checkpoints.rounding_changes(description(**here), description(**here)) is None
    for name, value in (("threads", 2), ("cpu_capability", "AVX512"), ("device", "another")):
        message = checkpoints.rounding_changes(description(**here), description(**here | {name: value}))
        assert message.startswith(f"{name}: {here[name]} → {value}: ") and "not bit for bit" in message
    message = checkpoints.rounding_changes(description("2.12.0", **here), description(**here | {"threads": 4}))
    assert "threads: 1 → 4; torch: 2.12.0 → 2.13.0" in message
    # checkpoints of earlier versions say less, and nothing is made up of that
    for old in ({}, {"versions": {"torch": "2.13.0"}}, {"machine": {}, "versions": {}}):
        assert checkpoints.rounding_changes(old, description(**here)) is None


def test_the_description_of_a_machine_has_threads_and_instructions():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            machine = checkpoints.machine_of(torch.device("cpu"))
            assert machine["threads"] == threads and machine["device"]
            assert machine["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    finally:
        torch.set_num_threads(before)


def test_a_learning_rate_that_was_changed_has_an_effect():
    """As with `--learning_rate 1e-4 --allow_changed learning_rate`; the schedule goes on where it was."""
    _, optimizer, _, scheduler = setup_run()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    changed = torch.optim.AdamW(tiny_objective().parameters(), 1e-4)
    found = torch.optim.lr_scheduler.LambdaLR(changed, lambda step: 1 / (1 + step))
    checkpoints.load_rate_state(found, checkpoints.rate_state(scheduler))
    for step in (3, 4):
        assert changed.param_groups[0]["lr"] == found.get_last_lr()[0] == 1e-4 * (1 / (1 + step))
        changed.step()
        found.step()
