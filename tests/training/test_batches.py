"""training/batches.py: every batch is a function of the seed and the step, however it is split over processes."""

from dataclasses import replace

import pytest
import torch

from diffusers_vdm.data.conditions import ConditionData
from diffusers_vdm.randomness import keyed_generator
from diffusers_vdm.training.batches import batch_indices, keyed_batch
from tests.pictures import random_image_set


def test_every_epoch_visits_every_image_once_from_any_step():
    n = 10
    order = batch_indices(range(3 * n), n, seed=4).tolist()
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order[:n] != order[n : 2 * n]
    assert batch_indices(range(17, 23), n, seed=4).tolist() == order[17:23]
    assert batch_indices(range(3 * n), n, seed=5).tolist() != order


def test_a_global_batch_does_not_depend_on_how_it_is_split(generator):
    data = random_image_set(50, generator)
    whole = keyed_batch(data, 7, range(8), 8, seed=1, random_flip=True)
    for parts in ([range(0, 4), range(4, 8)], [range(i, i + 1) for i in range(8)]):
        split = [keyed_batch(data, 7, rows, 8, seed=1, random_flip=True) for rows in parts]
        for name in ("images", "labels", "augmented", "t", "eps", "eps_0"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in split])), name
        for name, rows in whole.withheld.items():
            assert torch.equal(rows, torch.cat([part.withheld[name] for part in split])), name
    assert not torch.equal(whole.eps, whole.eps_0)
    other = keyed_batch(data, 8, range(8), 8, seed=1)
    assert not torch.equal(whole.eps, other.eps) and not torch.equal(whole.t, other.t)
    # one lattice of t over the whole batch, whichever process computes its rows
    assert torch.allclose(whole.t.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))


def test_the_augmentation_flag_says_which_images_are_flipped(generator):
    data = random_image_set(64, generator)
    batch = keyed_batch(data, 0, range(64), 64, seed=0, random_flip=True)
    plain = keyed_batch(data, 0, range(64), 64, seed=0)
    assert 10 < batch.augmented.sum() < 54 and plain.augmented.sum() == 0
    for flipped, image, original in zip(batch.augmented, batch.images, plain.images, strict=True):
        assert torch.equal(image, original.flip(-1) if flipped else original)
    assert torch.equal(batch.eps, plain.eps)


def test_the_augmentation_flag_says_which_images_are_turned(generator):
    data = random_image_set(64, generator)
    batch = keyed_batch(data, 0, range(64), 64, 0, random_flip=True, random_rotation=True)
    plain = keyed_batch(data, 0, range(64), 64, 0)
    poses = [0] * 8
    for augmented, image, original in zip(batch.augmented, batch.images, plain.images, strict=True):
        turned = [torch.rot90(i, k, (-2, -1)) for i in (original, original.flip(-1)) for k in range(4)]
        pose = next(i for i, candidate in enumerate(turned) if torch.equal(candidate, image))
        poses[pose] += 1
        assert bool(augmented) == (pose > 0)
    assert min(poses) > 0 and torch.equal(batch.eps, plain.eps) and torch.equal(batch.t, plain.t)
    assert torch.equal(data.images, random_image_set(64, torch.Generator().manual_seed(20210701)).images)  # untouched


def test_the_flags_say_how_images_are_augmented(generator):
    """The images are the originals, changed as the flags say, and nothing else of the batch changes."""
    data = random_image_set(128, generator)
    augmented = {"random_flip": True, "random_rotation": True, "random_shift": 2, "augmentation_rate": 0.6}
    batch = keyed_batch(data, 3, range(128), 128, 0, **augmented)
    plain = keyed_batch(data, 3, range(128), 128, 0)
    side = data.images.shape[-1]
    for flags, image, original in zip(batch.augmentations, batch.images, plain.images, strict=True):
        flip, *quarters, right, down = flags.tolist()
        assert sum(quarters) <= 1
        expected = original.flip(-1) if flip else original
        expected = torch.rot90(expected, quarters.index(1.0) + 1 if any(quarters) else 0, (-2, -1))
        moved = torch.zeros_like(original)
        right, down = int(2 * right), int(2 * down)
        to, source = ([slice(max(0, k), side + min(0, k)) for k in (sign * down, sign * right)] for sign in (1, -1))
        moved[:, to[0], to[1]] = expected[:, source[0], source[1]]
        assert torch.equal(image, moved)
    turned, shifted = batch.augmentations[:, :4].any(1), batch.augmentations[:, 4:].any(1)
    assert torch.equal(batch.augmented.bool(), turned | shifted)
    assert float(turned.float().mean()) == pytest.approx(0.6 * 7 / 8, abs=0.13)
    assert float(shifted.float().mean()) == pytest.approx(0.6 * 24 / 25, abs=0.13)
    assert float((turned & shifted).float().mean()) == pytest.approx(0.3, abs=0.13)  # drawn apart
    assert {*batch.augmentations[:, 4].tolist()} == {-1.0, -0.5, 0.0, 0.5, 1.0}
    assert torch.equal(batch.withheld["class_labels"], plain.withheld["class_labels"])
    for name in ("labels", "t", "eps", "eps_0"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


def test_no_image_is_augmented_at_rate_0(generator):
    data = random_image_set(16, generator)
    options = {"random_flip": True, "random_rotation": True, "random_shift": 1, "augmentation_rate": 0.0}
    batch = keyed_batch(data, 0, range(16), 16, 0, **options)
    assert torch.equal(batch.images, keyed_batch(data, 0, range(16), 16, 0).images) and not batch.augmentations.any()


# ---- conditions ----------------------------------------------------------------------------------------------------


def with_conditions(data, generator):
    """The images with their first two pixels as a vector, and with themselves as images."""
    vectors = data.images.flatten(1)[:, :2].double()
    return replace(data, conditions=ConditionData(vectors, ("a", "b"), data.images.clone()))


def test_conditions_go_with_their_images_and_are_flipped_and_turned_like_them(generator):
    data = with_conditions(random_image_set(64, generator), generator)
    kept = data.conditions.images.clone()
    plain = keyed_batch(data, 5, range(64), 64, seed=0)
    assert torch.equal(plain.conditions.vectors, plain.images.flatten(1)[:, :2].double())
    turned = keyed_batch(data, 5, range(64), 64, seed=0, random_flip=True, random_rotation=True)
    assert not torch.equal(turned.images, plain.images)
    assert torch.equal(turned.conditions.images, turned.images)
    assert torch.equal(turned.conditions.vectors, plain.conditions.vectors)
    assert torch.equal(data.conditions.images, kept)  # the data set is not changed


def test_conditions_are_withheld_independently_or_together(generator):
    data = random_image_set(500, generator)
    arguments = {"condition_dropout": 0.3}
    each = keyed_batch(data, 2, range(500), 500, 0, **arguments).withheld
    assert all(110 < int(rows.sum()) < 190 for rows in each.values())
    both = int((each["class_labels"] & each["cond_vectors"]).sum())
    assert 20 < both < 75  # 0.09 of 500
    together = keyed_batch(data, 2, range(500), 500, 0, drop_together=True, **arguments).withheld
    assert all(torch.equal(rows, each["class_labels"]) for rows in together.values())
    # more conditions change no draw of earlier versions
    first = keyed_batch(data, 0, range(12), 12, seed=3, condition_dropout=0.5).withheld["class_labels"]
    expected = [float(torch.rand(2, generator=_after_noise(3, 0, i, data.images.shape[1:]))[1]) < 0.5
                for i in range(12)]  # fmt: skip
    assert first.tolist() == expected


def _after_noise(seed, step, i, shape):
    """The generator of row i after its noise."""
    generator = keyed_generator(seed, "noise", step, i)
    torch.randn((2, *shape), generator=generator)
    return generator
