"""evaluation/monte_carlo.py: `evaluate_mc` over a data set, its inputs, and evaluations that are resumed."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_vdm import (
    FixedLinearGamma,
    LearnedLinearGamma,
    VariationalBound,
    evaluate_mc,
)
from tests.models import CountingNet, TinyNet, bent_gamma
from tests.oracles import GaussianData, GaussianDenoiser, expected_diffusion_bpd
from tests.tensors import random_levels, uniform

levels = functools.partial(random_levels, num_levels=9)


def evaluate(net, images, schedule=None, **kwargs):
    num_timesteps = kwargs.pop("num_timesteps", None)
    bound = VariationalBound(net, schedule or FixedLinearGamma(-7.0, 4.0), num_levels=9, num_timesteps=num_timesteps)
    return evaluate_mc(bound, images, progress_bar=False, **kwargs)


def assert_same(left, right):
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


# ---- evaluation over a data set ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_every_image_is_evaluated_once_per_repeat_for_any_batch_size(batch_size):
    images = levels(11, 1, 2, 2)
    net = TinyNet()
    out = evaluate(net, images, num_samples=3, batch_size=batch_size)
    assert sum(len(sample) for sample, _ in net.seen) == 3 * 11
    assert max(len(sample) for sample, _ in net.seen) <= batch_size
    assert (out.num_images, out.num_samples, out.num_timesteps) == (11, 3, None)
    assert out.per_image_bpd.shape == (11,) and out.gamma_t.shape == out.mse.shape == (3, 11)
    reference = evaluate(TinyNet(), images, num_samples=3, batch_size=5)
    torch.testing.assert_close(out.per_image_bpd, reference.per_image_bpd, rtol=1e-13, atol=0)
    assert torch.equal(out.gamma_t, reference.gamma_t)
    assert out.bpd == pytest.approx(float(out.per_image_bpd.mean()), rel=1e-13)
    assert out.bpd == pytest.approx(out.prior_bpd + out.reconstruction_bpd + out.diffusion_bpd, rel=1e-13)
    assert out.diffusion_bpd == pytest.approx(float(out.diffusion_terms_bpd.mean()), rel=1e-13)


def test_the_value_of_an_image_does_not_depend_on_later_images():
    images = levels(11, 4)
    all_of_them = evaluate(TinyNet(), images)
    torch.testing.assert_close(evaluate(TinyNet(), images[:5]).per_image_bpd, all_of_them.per_image_bpd[:5])
    images = images.clone()
    images[7] = 0
    changed = evaluate(TinyNet(), images).per_image_bpd != all_of_them.per_image_bpd
    assert changed.nonzero().flatten().tolist() == [7]


def test_evaluation_is_keyed_by_its_seed_alone():
    images = levels(6, 4)
    state = torch.get_rng_state()
    first = evaluate(TinyNet(), images, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(evaluate(TinyNet(), images, seed=1).per_image_bpd, first.per_image_bpd)
    assert not torch.equal(evaluate(TinyNet(), images, seed=2).per_image_bpd, first.per_image_bpd)
    # a run with more repeats continues from one with fewer
    more = evaluate(TinyNet(), images, seed=1, num_samples=6)
    assert torch.equal(more.gamma_t[:4], first.gamma_t)
    # no two images share their noise, and no repeat is another one
    assert len(first.mse.unique()) == first.mse.numel()
    # a repeat's times cover [0, 1] evenly
    t = (evaluate(TinyNet(), levels(200, 1), num_samples=1).gamma_t[0] + 7) / 11
    assert torch.diff(t.sort().values).max() < 3 / 200


def test_error_bar_covers_the_truth():
    schedule, data = FixedLinearGamma(-7.0, 4.0), GaussianData(0.1, 0.3)
    images = levels(16, 1)
    net = GaussianDenoiser(schedule, data.mean, data.variance)
    x = (2 * images[:, 0].numpy() + 1) / 9 - 1
    truth = float(expected_diffusion_bpd(x, data, schedule, None).mean())
    hits, estimates, errors = 0, [], []
    for seed in range(60):
        out = evaluate(net, images, schedule, num_samples=6, seed=seed, batch_size=16)
        expected = truth + out.prior_bpd + out.reconstruction_bpd  # nothing random in the one, little in the other
        hits += abs(out.bpd - expected) < 2.571 * out.stderr_bpd  # 95 % of Student's t with 5 degrees of freedom
        estimates.append(out.bpd - expected)
        errors.append(out.stderr_bpd)
    assert 50 <= hits
    # and it is not too wide: the spread of the estimates is what it says
    assert np.std(estimates) == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=0.4)


def test_a_single_repeat_has_no_error_bar():
    out = evaluate(TinyNet(), levels(4, 2), num_samples=1, num_timesteps=50)
    assert math.isnan(out.stderr_bpd)
    assert out.num_timesteps == 50


def test_labels_go_with_their_images():
    images, labels = levels(7, 2), torch.tensor([0, 0, 0, 0, 0, 1, 0])
    plain = evaluate(TinyNet(), images, class_labels=torch.zeros(7, dtype=torch.long), batch_size=3)
    changed = evaluate(TinyNet(), images, class_labels=labels, batch_size=3).per_image_bpd != plain.per_image_bpd
    assert changed.nonzero().flatten().tolist() == [5]


class Breaks(TinyNet):
    """A network that returns NaN for the images that `bad` marks."""

    def forward(self, sample, timestep, **kwargs):
        out = super().forward(sample, timestep, **kwargs)[0]
        return (torch.where(self.bad.reshape(-1, 1), torch.nan, out),)


def test_a_loss_of_nan_is_an_error_that_names_the_image():
    net = Breaks()
    net.bad = torch.tensor([False])
    images = levels(3, 2)
    assert math.isfinite(evaluate(net, images, batch_size=1).bpd)
    net.bad = torch.tensor([False, True, False])
    bound = VariationalBound(net, FixedLinearGamma(-7.0, 4.0), num_levels=9).train()
    with pytest.raises(ValueError, match="image 1 is not finite"):
        evaluate_mc(bound, images, batch_size=3, progress_bar=False)
    assert bound.training and net.training


class Dropping(TinyNet):
    """Notes the mode in which it is called."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes: set[bool] = set()

    def forward(self, sample, timestep, return_dict=True):
        self.modes |= {self.training, self.dropout.training}
        return super().forward(self.dropout(sample), timestep)


def test_evaluation_is_in_eval_mode():
    net = Dropping().train()
    evaluate(net, levels(3, 2))
    assert net.modes == {False}


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_every_mode_as_it_was(training):
    # a network from `from_pretrained` is in eval mode, the bound around it is fresh and so in training mode
    images = levels(3, 2)
    bound = VariationalBound(Dropping().train(training), bent_gamma().train(training), num_levels=9)
    modes = {name: module.training for name, module in bound.named_modules()}
    evaluate_mc(bound, images, progress_bar=False)
    assert {name: module.training for name, module in bound.named_modules()} == modes
    with pytest.raises(ValueError, match="within"):
        evaluate_mc(bound, images + 9, progress_bar=False)
    assert {name: module.training for name, module in bound.named_modules()} == modes


def test_results_have_no_gradients():
    out = evaluate(TinyNet(), levels(3, 2), bent_gamma())
    assert not out.per_image_bpd.requires_grad and not out.gamma_t.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [7, 25, 50, 100, 250, 1000])
def test_a_time_on_the_grid_is_its_own_step(steps, dtype):
    schedule = FixedLinearGamma(-6.0, 4.0)
    bound = VariationalBound(TinyNet(), schedule, num_levels=9, num_timesteps=steps)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    out = bound(levels(steps, 2), t=t.to(dtype))
    torch.testing.assert_close(out.gamma_t, schedule(t), rtol=0, atol=1e-12)


def test_no_progress_bar_prints_nothing(capsys):
    evaluate(TinyNet(), levels(5, 2))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


class Bar:
    """A progress bar that records what it is given."""

    made: list = []

    def __init__(self, total, **kwargs):
        self.total, self.done, self.texts = total, 0, []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def update(self, n):
        self.done += n

    def set_description(self, text):
        self.texts.append(text)


def test_a_progress_bar_counts_images_and_shows_the_bound_with_its_error(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    bound = VariationalBound(TinyNet(), bent_gamma(), num_levels=9)
    evaluate_mc(bound, levels(5, 2), num_samples=2, batch_size=3, progress_bar=Bar)
    (bar,) = Bar.made
    assert bar.total == 10 == bar.done
    assert bar.texts[-1].endswith(" bits/dim") and " ± " in bar.texts[-1] and " ± " not in bar.texts[0]


def test_an_evaluation_of_no_images_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate(TinyNet(), levels(3, 2)[:0])


@pytest.mark.parametrize("arguments", [{"num_samples": 0}, {"batch_size": 0}], ids=lambda a: next(iter(a)))
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(TinyNet(), levels(3, 2), **arguments)


def test_images_of_floats_are_refused():
    with pytest.raises(TypeError, match="integers"):
        evaluate(TinyNet(), uniform(3, 2))


# ---- evaluations that are resumed ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [None, 5])
@pytest.mark.parametrize("importance_sampling", [False, True])
@pytest.mark.parametrize("stop_at", [1, 2, 7, 25, 32])
def test_an_interrupted_evaluation_is_resumed(tmp_path, stop_at, importance_sampling, num_timesteps):
    options = {"num_samples": 8, "batch_size": 11, "seed": 3}
    options |= {"importance_sampling": importance_sampling, "num_timesteps": num_timesteps}
    images = levels(40, 2)
    whole = evaluate(CountingNet(), images, **options)
    first, second, third = CountingNet(stop_at), CountingNet(), CountingNet()
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, images, **options, resume_dir=tmp_path / "a" / "b")
    assert_same(evaluate(second, images, **options, resume_dir=tmp_path / "a" / "b"), whole)
    assert first.count + second.count == 40 * 8
    assert_same(evaluate(third, images, **options, resume_dir=tmp_path / "a" / "b"), whole)
    assert third.count == 0


def test_a_resumed_evaluation_adds_repeats_or_uses_fewer(tmp_path):
    images = levels(10, 2)
    evaluate(CountingNet(), images, num_samples=3, resume_dir=tmp_path)
    net = CountingNet()
    more = evaluate(net, images, num_samples=7, resume_dir=tmp_path)
    assert net.count == 10 * 4
    assert_same(more, evaluate(CountingNet(), images, num_samples=7))
    net = CountingNet()
    assert_same(evaluate(net, images, num_samples=2, resume_dir=tmp_path), evaluate(net, images, num_samples=2))
    assert net.count == 10 * 2
    # the batch size is no part of what the numbers are
    net = CountingNet()
    assert_same(evaluate(net, images, num_samples=7, batch_size=3, resume_dir=tmp_path), more)
    assert net.count == 0


@pytest.mark.parametrize("change", ["seed", "images", "weights", "gammas", "num_timesteps", "class_labels", "pilot",
                                    "num_levels", "prediction_type", "timesteps"])  # fmt: skip
def test_another_evaluation_is_refused_by_what_differs(tmp_path, change):
    images, labels = levels(6, 2), torch.zeros(6, dtype=torch.long)
    images[0, 0] = 1

    def go(weight=0.6, images=images, ends=(-3.0, 4.0), schedule=FixedLinearGamma, num_train_timesteps=1000,
           num_timesteps=None, num_levels=9, prediction_type="epsilon", **kwargs):  # fmt: skip
        bound = VariationalBound(
            CountingNet(weight=weight), schedule(*ends, num_train_timesteps), num_timesteps=num_timesteps,
            num_levels=num_levels, prediction_type=prediction_type,
        )  # fmt: skip
        options = {"class_labels": labels, "num_samples": 2, "progress_bar": False} | kwargs
        return evaluate_mc(bound, images, resume_dir=tmp_path, **options)

    go()
    other = images.clone()
    other[0, 0] = 2
    changed, name, values = {
        "seed": ({"seed": 12}, "seed", ("0", "12")),
        "images": ({"images": other}, "images", ()),
        "weights": ({"weight": math.nextafter(0.6, 1)}, "weights", ()),
        "gammas": ({"ends": (-3.0, 4.5)}, "gammas", ()),
        "num_timesteps": ({"num_timesteps": 250}, "num_timesteps", ("None", "250")),
        "class_labels": ({"class_labels": None}, "class_labels", ("None",)),
        "pilot": ({"importance_sampling": True}, "pilot_samples", ("0", "2")),
        "num_levels": ({"num_levels": 10}, "num_levels", ("9", "10")),
        "prediction_type": ({"prediction_type": "sample"}, "prediction_type", ("epsilon", "sample")),
        "timesteps": ({"num_train_timesteps": 100}, "timesteps", ()),
    }[change]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"another evaluation.*{name} was ") as error:
        go(**changed)
    assert all(value in str(error.value) for value in values)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    go()


def test_a_smaller_target_resumes_from_a_larger_one(tmp_path):
    rough_net, fine_net, alone_net = CountingNet(), CountingNet(), CountingNet()
    images = levels(9, 2)
    rough = evaluate(rough_net, images, target_stderr_bpd=1.0, resume_dir=tmp_path)
    target = 0.5 * rough.stderr_bpd
    fine = evaluate(fine_net, images, target_stderr_bpd=target, resume_dir=tmp_path)
    alone = evaluate(alone_net, images, target_stderr_bpd=target)
    assert fine.num_samples > rough.num_samples and fine.stderr_bpd <= target
    assert fine_net.count == alone_net.count - rough_net.count == 9 * (fine.num_samples - rough.num_samples)
    assert_same(fine, alone)


def test_learned_ends_are_part_of_the_evaluation(tmp_path):
    schedule = LearnedLinearGamma(-3.0, 4.0)
    evaluate(CountingNet(), levels(3, 2), schedule, resume_dir=tmp_path)
    with torch.no_grad():
        schedule.bias.add_(0.125)
    with pytest.raises(ValueError, match="gammas was"):
        evaluate(CountingNet(), levels(3, 2), schedule, resume_dir=tmp_path)


def test_numbers_of_a_broken_batch_are_not_kept(tmp_path):
    broken, images = CountingNet(stop_at=3), levels(10, 2)
    broken.broken = True
    with pytest.raises(ValueError, match="image 8 is not finite"):
        evaluate(broken, images, num_samples=3, batch_size=4, resume_dir=tmp_path)
    net = CountingNet()
    out = evaluate(net, images, num_samples=3, batch_size=4, resume_dir=tmp_path)
    assert net.count == 30 - 8
    assert_same(out, evaluate(CountingNet(), images, num_samples=3, batch_size=4))
