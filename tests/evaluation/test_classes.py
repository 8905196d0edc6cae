"""evaluation/classes.py: bounds of classes against closed forms, and what is decided from them."""

import math

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from diffusers_vdm import FixedLinearGamma, VariationalBound, evaluate_mc
from diffusers_vdm.evaluation.classes import (
    calibration_error,
    class_probabilities,
    evaluate_classes,
    fit_temperature,
    information_bound,
)
from tests.models import network
from tests.oracles import GaussianMixture, gamma_of_timestep
from tests.tensors import F64, f64, normal, random_levels, seeded

SCHEDULE = FixedLinearGamma(-12.0, 6.0)
PRIOR = f64([0.5, 0.3, 0.2])


class Classes(nn.Module):
    """The best network for classes that are the components of a mixture, with the mixture as its null class."""

    dtype = F64

    def __init__(self, mixture: GaussianMixture, null_class: bool = True):
        super().__init__()
        self.mixture, self.rows = mixture, 0
        self.config = FrozenDict(num_class_embeds=len(mixture.weights), null_class=null_class)

    def forward(self, z_t, timesteps, class_labels=None, return_dict=True):
        self.rows += len(z_t)
        gamma_t = gamma_of_timestep(SCHEDULE, timesteps).expand(len(z_t))
        eps_hat, flat = torch.zeros_like(z_t), z_t.flatten(1)
        labels = torch.full((len(z_t),), len(self.mixture.weights)) if class_labels is None else class_labels
        for k in labels.unique().tolist():
            own, m = labels == k, self.mixture
            if k < len(m.weights):
                m = GaussianMixture(f64([1.0]), m.means[k : k + 1], m.variances[k : k + 1])
            eps_hat[own] = m.eps_hat(flat[own], gamma_t[own]).view_as(z_t[own])
        return (eps_hat,)


def classes_of_pixels(spread: float, num: int = 120) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    """A mixture of three classes in 16 dimensions, images of 256 levels drawn from it, and their classes."""
    means = spread * normal(3, 16, seed=5)
    mixture = GaussianMixture(PRIOR, means, f64([0.01, 0.012, 0.009]))
    labels = torch.multinomial(PRIOR, num, True, generator=seeded(1))
    x = means[labels] + mixture.variances[labels, None].sqrt() * normal(num, 16, seed=2)
    return mixture, (128 * (x + 1) - 0.5).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4), labels


def exact_bits(mixture: GaussianMixture, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """−log₂ p(x | c) and −log₂ p(x) of images: of the density, times the width of a level in each dimension."""
    x = (images.double().flatten(1) + 0.5) / 128 - 1
    log_joint = mixture._log_joint(x, -math.inf)[0]
    log_width = 16 * math.log(2 / 256)
    of_class = log_joint - mixture.weights.log() + log_width
    return -of_class / math.log(2), -(log_joint.logsumexp(1) + log_width) / math.log(2)


def evaluated(net, images, **arguments):
    return evaluate_classes(VariationalBound(net, SCHEDULE), images, progress_bar=False, **arguments)


def test_bits_probabilities_and_mutual_information_are_those_of_the_closed_form():
    mixture, images, labels = classes_of_pixels(spread=0.035)
    result = evaluated(Classes(mixture), images, with_null=True, num_samples=400, rejection=False, batch_size=5000)
    bits, null = exact_bits(mixture, images)
    difference, expected = (b - b.mean(1, keepdim=True) for b in (result.class_bits, bits))
    assert float(difference.std()) > 1
    assert float((difference - expected).square().mean().sqrt()) < 0.15
    assert float((result.null_bits - null).mean().abs()) < 1.0  # of 16 dimensions
    exact = class_probabilities(bits, PRIOR)
    torch.testing.assert_close(result.probabilities(PRIOR), exact, rtol=0, atol=0.15)
    torch.testing.assert_close(
        exact, mixture._log_joint((images.double().flatten(1) + 0.5) / 128 - 1, -math.inf)[0].softmax(1)
    )
    found, error = result.mutual_information(labels)
    of_images = (null - bits.gather(1, labels[:, None])[:, 0]).mean()
    assert found == pytest.approx(float(of_images), abs=0.06)
    entropy = -float((PRIOR * PRIOR.log2()).sum())
    assert 0.2 * entropy < found < entropy and 0.02 < error < 0.2


def test_mutual_information_of_separate_classes_is_their_entropy():
    mixture, images, labels = classes_of_pixels(spread=0.5)
    result = evaluated(Classes(mixture), images, with_null=True, class_labels=labels, num_samples=100, batch_size=5000)
    found, error = result.mutual_information(labels)
    frequencies = labels.bincount() / len(labels)
    assert found == pytest.approx(-float((PRIOR.log2() * frequencies).sum()), abs=4 * error + 0.02)
    assert torch.equal(result.class_bits.argmin(1), labels)


def test_shared_noise_makes_differences_exact_that_single_bounds_are_not():
    mixture, images, _ = classes_of_pixels(spread=0.035, num=60)
    runs = [evaluated(Classes(mixture), images, num_samples=8, rejection=False, seed=s).class_bits for s in range(8)]
    each = torch.stack(runs)
    of_single = each.std(0).mean()
    of_difference = (each - each.mean(2, keepdim=True)).std(0).mean()
    assert float(of_difference) < 0.3 * float(of_single)


def test_hopeless_classes_get_no_more_draws_and_nothing_else_changes():
    mixture, images, labels = classes_of_pixels(spread=0.2)
    bits, _ = exact_bits(mixture, images)
    whole, fewer = Classes(mixture), Classes(mixture)
    all_draws = evaluated(whole, images, num_samples=32, rejection=False)
    rejecting = evaluated(fewer, images, num_samples=32)
    assert all_draws.num_calls == whole.rows == 32 * 3 * len(images)
    assert rejecting.num_calls == fewer.rows == int(rejecting.num_draws.sum()) < 0.7 * whole.rows
    assert torch.equal(rejecting.class_bits.argmin(1), bits.argmin(1)) and bool((all_draws.num_draws == 32).all())
    kept = rejecting.num_draws.sort(1).values
    assert int(kept[:, 0].min()) >= 4
    # the true classes are kept with all their draws
    of_truth = evaluated(Classes(mixture), images, class_labels=labels, num_samples=32)
    assert bool((of_truth.num_draws.gather(1, labels[:, None]) == 32).all())
    own = of_truth.class_bits.gather(1, labels[:, None])
    torch.testing.assert_close(own, all_draws.class_bits.gather(1, labels[:, None]))


def test_more_draws_where_the_classes_differ():
    """After the pilot draws: a smaller error than of as many uniform draws."""
    mixture, images, _ = classes_of_pixels(spread=0.06, num=60)
    bits, _ = exact_bits(mixture, images)
    expected = bits - bits.mean(1, keepdim=True)
    bound = VariationalBound(Classes(mixture), SCHEDULE)
    errors = {"warped": [], "uniform": []}
    for seed in range(6):
        found = evaluated(Classes(mixture), images, num_samples=16, rejection=False, seed=seed).class_bits
        labels = (torch.full((60,), k) for k in range(3))
        options = {"num_samples": 16, "seed": seed, "progress_bar": False}
        each = [evaluate_mc(bound, images, class_labels=each, **options).per_image_bpd for each in labels]
        uniform = 16 * torch.stack(each, dim=1)
        for name, each in (("warped", found), ("uniform", uniform)):
            errors[name].append((each - each.mean(1, keepdim=True) - expected).square().mean().sqrt())
    assert float(torch.stack(errors["warped"]).mean()) < 0.8 * float(torch.stack(errors["uniform"]).mean())


def test_result_does_not_depend_on_the_batch_size_or_on_the_other_images():
    mixture, images, _ = classes_of_pixels(spread=0.1, num=7)
    one, many = (evaluated(Classes(mixture), images, num_samples=6, batch_size=size).class_bits for size in (1, 1000))
    torch.testing.assert_close(one, many)
    net = network(1, num_class_embeds=3, null_class=True)
    pictures = random_levels(5, 1, 8, 8)
    was_training = net.train().training
    result = evaluated(net, pictures, with_null=True, num_samples=4, batch_size=7)
    assert result.class_bits.shape == (5, 3) and result.null_bits.shape == (5,) and net.training is was_training
    conditional = evaluate_mc(
        VariationalBound(net, SCHEDULE),
        pictures,
        class_labels=torch.full((5,), 1),
        num_samples=200,
        progress_bar=False,
    )
    again = evaluated(net, pictures, num_samples=200, rejection=False)
    assert float(again.class_bits[:, 1].mean() / 64) == pytest.approx(
        conditional.bpd, abs=5 * conditional.stderr_bpd + 0.05
    )


# ---- probabilities -----------------------------------------------------------------------------------------------


def test_temperature_recovers_what_made_probabilities_too_sure():
    logits = 3 * normal(20000, 5)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=seeded(11))[:, 0]
    for temperature in (0.5, 1.0, 7.0):  # which the logits were multiplied by
        bits = -temperature * logits / math.log(2)
        assert fit_temperature(bits, labels) == pytest.approx(temperature, rel=0.05)
        sure, right = class_probabilities(bits), class_probabilities(bits, temperature=temperature)
        assert calibration_error(right, labels) < 0.03
        if temperature == 7.0:
            assert calibration_error(sure, labels) > 0.1


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    probabilities = f64([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = torch.tensor([0] * 9 + [1] + [1] * 3 + [0] * 7)
    assert calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.3)
    assert calibration_error(probabilities, labels, num_bins=1) == pytest.approx(abs(12 / 20 - 0.75))


def test_information_bound_is_below_the_information_and_equal_for_the_true_posterior():
    log_joint = 2 * normal(50_000, 4, seed=3)
    posterior = torch.softmax(log_joint, 1)
    labels = torch.multinomial(posterior, 1, generator=seeded(12))[:, 0]
    prior = posterior.mean(0)
    information = float((posterior * (posterior.log2() - prior.log2())).sum(1).mean())
    found, error = information_bound(posterior, labels, prior)
    assert abs(found - information) < 4 * error < 0.05
    for temperature in (0.5, 2.0):
        worse = torch.softmax(log_joint / temperature, 1)
        assert information_bound(worse, labels, prior)[0] < found - 0.01
    perfect = torch.nn.functional.one_hot(labels, 4).double()
    assert information_bound(perfect, labels)[0] == pytest.approx(2)


def test_prior_moves_probabilities_as_bayes_says():
    bits = f64([[3.0, 2.0]])
    odds = class_probabilities(bits, f64([0.8, 0.2]))
    assert float(odds[0, 0] / odds[0, 1]) == pytest.approx(0.5 * 4)
    for wrong in (f64([0.5, 0.5, 0.5]), f64([1.0, 0.0])):
        with pytest.raises(ValueError, match="prior must be 2 positive probabilities"):
            class_probabilities(bits, wrong)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        ({}, {}, "bound.unet must have classes"),
        ({"num_class_embeds": 3}, {"with_null": True}, "with_null needs a network with a null class"),
        ({"num_class_embeds": 3}, {"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "images must not be empty"),
        ({"num_class_embeds": 3}, {"num_samples": 0}, "num_samples and batch_size must be at least 1"),
        ({"num_class_embeds": 3}, {"class_labels": torch.tensor([0, 3])}, r"class_labels must be within \[0, 3\)"),
        (
            {"num_class_embeds": 3, "null_class": True},
            {"class_labels": torch.tensor([0, 3])},
            r"class_labels must be within \[0, 3\)",
        ),
        ({"num_class_embeds": 3}, {"class_labels": torch.tensor([0])}, r"class_labels must have shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_refused(net, arguments, message):
    arguments = {"images": random_levels(2, 1, 8, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        evaluated(network(1, **net), **arguments)


def test_image_for_which_the_network_fails_is_named():
    mixture, images, _ = classes_of_pixels(spread=0.1, num=4)

    class Broken(Classes):
        def forward(self, z_t, timesteps, class_labels=None, return_dict=True):
            return (torch.where((class_labels == 2).view(-1, 1, 1, 1), math.nan, z_t),)

    with pytest.raises(ValueError, match="the bound of image 0 is not finite"):
        evaluated(Broken(mixture), images)


def test_mutual_information_needs_the_null_class():
    mixture, images, labels = classes_of_pixels(spread=0.1, num=4)
    known = evaluated(Classes(mixture), images, num_samples=4, with_null=True)
    with pytest.raises(ValueError, match="class_labels must be a tensor of the classes of all 4 images"):
        known.mutual_information(labels[:1])
    with pytest.raises(ValueError, match="null_bits must be known"):
        evaluated(Classes(mixture), images, num_samples=4).mutual_information(labels)
