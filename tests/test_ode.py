"""ode.py: densities and solutions that are known in closed form."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from diffusers_vdm import FixedLinearGamma, LinearBetaGamma
from diffusers_vdm.ode import SampleError, eps_model, log_prob_nats, solve
from tests.models import quiet_unet
from tests.oracles import GaussianData, GaussianDenoiser, GaussianMixture, LabelledGaussianDenoiser, MixtureDenoiser
from tests.tensors import normal, signs

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
GAMMA_0, GAMMA_1 = -6.0, 40.0  # at γ = 40 nothing is left of the data: N(0, I) is exact
SCHEDULE = FixedLinearGamma(GAMMA_0, GAMMA_1)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def alpha_sigma(gamma):
    gamma = torch.as_tensor(gamma, dtype=torch.float64)
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def latents(data, num, gamma=GAMMA_0):
    a, s = alpha_sigma(gamma)
    x = data.sample(num, torch.Generator().manual_seed(3))
    return a * x + s * normal(*x.shape, seed=4)


def model_of(data, prediction="epsilon"):
    return eps_model(MixtureDenoiser(data, SCHEDULE, prediction), SCHEDULE, prediction)


def exact(model, z, tolerance, start=GAMMA_0, end=GAMMA_1, **more):
    return log_prob_nats(model, z, start, end, divergence="exact", rtol=tolerance, atol=tolerance, **more)


def order(error, calls):
    """−slope of log error against log calls."""
    return -float(np.polyfit(np.log(calls), np.log(error), 1)[0])


# ---- log-density -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimensions", "prediction"),
    [(1, "epsilon"), (2, "epsilon"), (2, "sample"), (6, "epsilon"), (6, "v_prediction")],
)
def test_log_density_of_a_mixture(dimensions, prediction):
    data = GaussianMixture.example(dimensions)
    z = latents(data, 8)
    truth, model = data.log_density_nats(z, GAMMA_0), model_of(data, prediction)
    for tolerance, allowed in ((1e-6, 1e-3), (1e-8, 2e-6)):
        result = exact(model, z, tolerance)
        assert result.log_prob_nats.dtype == torch.float64 and result.z.shape == z.shape
        torch.testing.assert_close(result.log_prob_nats, truth, rtol=0, atol=allowed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(1,), (2, 1, 3)])
def test_log_density_of_a_gaussian(shape, prediction):
    """The ODE keeps (z − mean)/standard deviation of each dimension, so its end is known as well."""
    network = GaussianDenoiser(SCHEDULE, 0.3, 0.04, prediction)
    mean, variance = (float(v) for v in network.data.marginal(GAMMA_0))
    unit = normal(9, *shape)
    result = exact(eps_model(network, SCHEDULE, prediction), mean + variance**0.5 * unit, 1e-8)
    truth = -0.5 * (unit.square() + math.log(2 * math.pi * variance)).flatten(1).sum(1)
    torch.testing.assert_close(result.log_prob_nats, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.z, unit, rtol=0, atol=1e-6)


def test_error_falls_with_the_tolerances():
    """As calls⁻⁵ or faster; rtol and atol both count."""
    data = GaussianMixture.example(2)
    z, model = latents(data, 12), model_of(data)
    truth, errors, calls = data.log_density_nats(z, GAMMA_0), [], []
    for tolerance in 10.0 ** -np.arange(3, 8):
        result = exact(model, z, tolerance)
        errors.append(float((result.log_prob_nats - truth).abs().mean()))
        calls.append(float(result.num_calls.double().mean()))
    assert errors == sorted(errors, reverse=True) and calls == sorted(calls)
    assert errors[-1] < 1e-6 and order(errors, calls) > 4.5
    loose = {"divergence": "exact", "rtol": 1e-3, "atol": 1e-3}
    for name in ("rtol", "atol"):
        some = log_prob_nats(model, z, GAMMA_0, GAMMA_1, **{**loose, name: 1e-7})
        assert float(some.num_calls.double().mean()) > calls[0]


def three_samples():
    data = GaussianMixture.example(1)
    return model_of(data), latents(data, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "Exact"}, "divergence must be one of"),
        ({"divergence": "hutchinson"}, "probes must be given"),
        ({"divergence": "exact", "probes": signs(1, 3, 1)}, "probes must be given"),
        ({"probes": signs(1, 2, 1)}, r"shape \(P, 3, 1\)"),
        ({"divergence": "exact", "rtol": 0.0}, "rtol and atol must be positive"),
        ({"divergence": "exact", "atol": -1.0}, "rtol and atol must be positive"),
        ({"divergence": "exact", "rtol": math.nan}, "rtol and atol must be positive"),
    ],
    ids=["divergence", "no probes", "probes", "shape", "rtol", "atol", "NaN"],
)
def test_wrong_arguments_of_a_density_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_prob_nats(*three_samples(), GAMMA_0, GAMMA_1, **arguments)


@pytest.mark.parametrize(("start", "end"), [(GAMMA_1, GAMMA_0), (1.0, 1.0), (math.nan, 1.0)])
def test_a_density_is_solved_towards_more_noise(start, end):
    with pytest.raises(ValueError, match="gamma_start must be below"):
        log_prob_nats(*three_samples(), start, end, divergence="exact")


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        eps_model(nn.Identity(), SCHEDULE, "eps")


def test_too_many_steps_are_an_error_that_says_what_to_change():
    model, z = three_samples()
    with pytest.raises(SampleError, match="within max_steps=5 steps.*increase rtol and atol, or max_steps"):
        exact(model, z, 1e-8, max_steps=5)


def test_nan_of_the_network_is_an_error_that_names_the_sample():
    network = LabelledGaussianDenoiser([0.0, math.nan], [1.0, 1.0], SCHEDULE)
    model = eps_model(network, SCHEDULE, class_labels=torch.tensor([0, 0, 1]))
    with pytest.raises(SampleError, match="NaN") as error:
        solve(model, three_samples()[1], GAMMA_0, GAMMA_1)
    assert error.value.sample == 2


def test_results_have_no_gradients():
    """What comes back has no graph, also where z asks for one: it would be that of a part of the computation."""
    data = GaussianMixture.example(1)
    z = latents(data, 2).requires_grad_()
    for result in (exact(model_of(data), z, 1e-3), solve(model_of(data), z, GAMMA_0, 0.0)):
        assert not result.z.requires_grad
        assert result.log_prob_nats is None or not result.log_prob_nats.requires_grad


def test_log_density_by_a_schedule_of_betas():
    """DDPM's, whose timestep is an index found by bisection: the same density as by γ itself."""
    data, schedule = GaussianMixture.example(1), LinearBetaGamma(1000)
    start, end = (float(each) for each in schedule.ends())
    z = latents(data, 3, start)
    result = exact(eps_model(MixtureDenoiser(data, gamma_of=lambda t: index_gamma(schedule, t)), schedule), z, 1e-4,
                   start, end)  # fmt: skip
    torch.testing.assert_close(result.log_prob_nats, data.log_density_nats(z, start), rtol=0, atol=0.02)


def index_gamma(schedule, timesteps):
    with torch.no_grad():
        return schedule(timesteps / 999)


# ---- Hutchinson --------------------------------------------------------------------------------------------------


def hutchinson(model, z, probes, tolerance, start=GAMMA_0, end=GAMMA_1):
    return log_prob_nats(model, z, start, end, probes=probes, rtol=tolerance, atol=tolerance)


def test_hutchinson_averages_to_the_exact_divergence():
    """Over 600 probes of one sample; the mean over P probes is the mean of the P answers."""
    data = GaussianMixture.example(6)
    model, z = model_of(data), latents(data, 2)
    truth = exact(model, z, 1e-6).log_prob_nats
    for i in range(2):
        copies = z[i].expand(600, 6)
        noisy = hutchinson(model, copies, signs(1, 600, 6, seed=i), 1e-4).log_prob_nats
        error = float(noisy.std()) / math.sqrt(600)
        assert 1e-3 < error and abs(float(noisy.mean() - truth[i])) < 3.5 * error
    probes = signs(4, 2, 6)
    each = [hutchinson(model, z, probe[None], 1e-6).log_prob_nats for probe in probes]
    together = hutchinson(model, z, probes, 1e-6).log_prob_nats
    torch.testing.assert_close(together, torch.stack(each).mean(0), rtol=0, atol=1e-4)
    assert float((each[0] - each[1]).abs().min()) > 1e-3


def test_noise_is_fixed_during_the_solve():
    """The answer depends on the probes alone: not on the call, and not on the steps."""
    data = GaussianMixture.example(6)
    model, z, probes = model_of(data), latents(data, 8), signs(1, 8, 6)
    results = [hutchinson(model, z, probes, tolerance) for tolerance in (1e-4, 1e-4, 1e-7)]
    assert torch.equal(results[0].log_prob_nats, results[1].log_prob_nats)
    assert bool((results[2].num_calls > 2 * results[0].num_calls).all())
    torch.testing.assert_close(results[0].log_prob_nats, results[2].log_prob_nats, rtol=0, atol=1e-2)
    torch.testing.assert_close(results[0].z, results[2].z, rtol=0, atol=1e-2)


def linear_model(matrix):
    return lambda z, gamma, rows: z @ matrix.T


def linear_log_prob(z, rates, start, end):
    """For ε̂ = rates · z: z_1 = z exp ½∫(rate σ − σ²), and the integrals by scipy."""
    of_sigma = integrate.quad(lambda g: 1 / math.sqrt(1 + math.exp(-g)), start, end, epsabs=1e-12)[0]
    of_variance = math.log1p(math.exp(end)) - math.log1p(math.exp(start))
    growth = 0.5 * (rates * of_sigma - of_variance)
    z_1 = z * growth.exp()
    return -0.5 * (z_1.square() + math.log(2 * math.pi)).sum(1) + growth.sum(), 0.5 * of_sigma


def test_one_probe_is_exact_for_a_diagonal_jacobian():
    rates = torch.tensor([0.3, -0.5, 1.1, 0.0, 0.8], dtype=torch.float64)
    z, model = normal(6, 5), linear_model(torch.diag(rates))
    truth, _ = linear_log_prob(z, rates, -3.0, 4.0)
    for result in (exact(model, z, 1e-9, -3.0, 4.0), hutchinson(model, z, signs(1, 6, 5), 1e-9, -3.0, 4.0)):
        torch.testing.assert_close(result.log_prob_nats, truth, rtol=0, atol=1e-7)


def test_variance_over_probes_is_that_of_theory():
    """Over all ±1 there are: mean 0 and variance 2 Σ S² of the symmetrised off-diagonal, times (½∫σ)²."""
    d = 4
    matrix = 0.4 * normal(d, d, seed=2)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d)), dtype=torch.float64)
    z, model = normal(1, d).expand(len(every), d), linear_model(matrix)
    noise = hutchinson(model, z, every[None], 1e-9, -3.0, 4.0).log_prob_nats
    noise = noise - exact(model, z, 1e-9, -3.0, 4.0).log_prob_nats
    off = 0.5 * (matrix + matrix.T)
    off = off - torch.diag(off.diag())
    _, weight = linear_log_prob(z, off.diag(), -3.0, 4.0)
    assert float(noise.mean()) == pytest.approx(0, abs=1e-7)
    assert float(noise.square().mean()) == pytest.approx(2 * float(off.square().sum()) * weight**2, rel=1e-6)


# ---- each sample has its own steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson", None])
def test_a_sample_does_not_depend_on_its_batch(divergence):
    """Bit for bit, and in its number of calls, with an outlier that needs more."""
    data = GaussianMixture.example(2)
    z, model = latents(data, 7), model_of(data)
    z[3] *= 40
    probes = signs(2, 7, 2)

    def run(index):
        if divergence is None:
            result = solve(model, z[index], GAMMA_0, 8.0, rtol=1e-4, atol=1e-4)
            return [result.z, result.num_calls]
        some = probes[:, index] if divergence == "hutchinson" else None
        result = log_prob_nats(model, z[index], GAMMA_0, 8.0, divergence=divergence, probes=some, rtol=1e-3, atol=1e-3)
        return [result.z, result.num_calls, result.log_prob_nats]

    everything = run(torch.arange(7))
    assert everything[1].dtype == torch.long and len(everything[1].unique()) > 2
    for size in (1, 3):
        pieces = [run(index) for index in torch.arange(7).split(size)]
        for whole, parts in zip(everything, zip(*pieces, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))
    permutation = torch.tensor([4, 2, 6, 0, 3, 5, 1])
    for whole, permuted in zip(everything, run(permutation), strict=True):
        assert torch.equal(whole[permutation], permuted)


def test_finished_samples_are_not_passed_to_the_network():
    """The network gets as many samples as the numbers of calls add up to; the slowest samples come last and alone."""
    network = LabelledGaussianDenoiser([0.0, 0.5, 0.0], [1.0, 1e-4, 0.3], SCHEDULE)
    labels = torch.tensor([1, 0, 2, 0])
    z = normal(4, 2)
    result = solve(eps_model(network, SCHEDULE, class_labels=labels), z, GAMMA_0, GAMMA_1)
    assert sum(network.batches) == int(result.num_calls.sum())
    assert network.batches[0] == 4 and network.batches[-1] < 4
    assert len(network.batches) == int(result.num_calls.max())


def test_labels_go_to_their_samples():
    """Samples with other labels finish earlier; the answers are the closed forms of each label, alone or together."""
    means, variances = [0.0, 0.7, -0.4], [1.0, 1e-3, 0.2]
    labels = torch.tensor([2, 0, 1, 0, 2, 1])
    network = LabelledGaussianDenoiser(means, variances, SCHEDULE)
    data = GaussianData(network.data.mean[labels, None], network.data.variance[labels, None])
    mean, variance = data.marginal(GAMMA_0)
    unit = normal(6, 3)
    z = mean + variance**0.5 * unit
    result = exact(eps_model(network, SCHEDULE, class_labels=labels), z, 1e-8)
    truth = -0.5 * (unit.square() + torch.log(2 * math.pi * variance)).sum(1)
    assert len(result.num_calls.unique()) > 1
    torch.testing.assert_close(result.log_prob_nats, truth, rtol=0, atol=1e-6)
    down = solve(eps_model(network, SCHEDULE, class_labels=labels), unit, GAMMA_1, GAMMA_0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(down.z, z, rtol=0, atol=1e-6)
    alone = [exact(eps_model(network, SCHEDULE, class_labels=labels[i : i + 1]), z[i : i + 1], 1e-8) for i in range(6)]
    assert torch.equal(torch.cat([each.log_prob_nats for each in alone]), result.log_prob_nats)
    assert torch.equal(torch.cat([each.num_calls for each in alone]), result.num_calls)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_a_sample_of_a_real_network_does_not_depend_on_its_batch(dtype, allowed):
    unet, schedule = quiet_unet().to(dtype), FixedLinearGamma(-6.0, 5.0)
    z, probes = 0.5 * normal(3, 1, 8, 8).to(dtype), signs(1, 3, 1, 8, 8)

    def run(i, j):
        model = eps_model(unet, schedule)
        return log_prob_nats(model, z[i:j], -6.0, 5.0, probes=probes[:, i:j], rtol=1e-3, atol=1e-3)

    together, alone = run(0, 3), [run(i, i + 1) for i in range(3)]
    assert together.z.dtype == dtype and together.log_prob_nats.dtype == torch.float64
    each = torch.cat([one.log_prob_nats for one in alone])
    torch.testing.assert_close(together.log_prob_nats, each, rtol=allowed, atol=0)
    torch.testing.assert_close(together.z, torch.cat([one.z for one in alone]), rtol=allowed, atol=allowed)
    assert float((each[0] - each[1]).abs()) > 0.01


# ---- samples -----------------------------------------------------------------------------------------------------


def test_noise_becomes_the_mixture():
    data, num = GaussianMixture.example(2), 4000
    result = solve(model_of(data), normal(num, 2), GAMMA_1, GAMMA_0, rtol=1e-4, atol=1e-4)
    assert result.log_prob_nats is None
    a, s = alpha_sigma(GAMMA_0)
    mean = a * data.weights @ data.means
    centered = a * data.means - mean
    covariance = torch.einsum("k,ki,kj->ij", data.weights, centered, centered)
    covariance = covariance + ((data.weights @ data.variances) * a**2 + s**2) * torch.eye(2, dtype=torch.float64)
    off = result.z.mean(0) - mean
    assert bool((off.abs() < 4 * (covariance.diag() / num).sqrt()).all())
    torch.testing.assert_close(result.z.T.cov(), covariance, rtol=0, atol=4 * 2**0.5 * 0.3 / math.sqrt(num))
    nearest = torch.cdist(result.z, a * data.means).argmin(1)
    share = torch.bincount(nearest, minlength=3).double() / num
    torch.testing.assert_close(share, data.weights, rtol=0, atol=4 * 0.5 / math.sqrt(num))


def test_solving_up_and_down_returns_to_the_start():
    data = GaussianMixture.example(2)
    z, model = latents(data, 40), model_of(data)
    up = solve(model, z, GAMMA_0, 6.0, rtol=1e-6, atol=1e-6)
    down = solve(model, up.z, 6.0, GAMMA_0, rtol=1e-6, atol=1e-6)
    assert float((up.z - z).abs().min(1).values.max()) > 0.1
    torch.testing.assert_close(down.z, z, rtol=0, atol=1e-4)
    with_density = exact(model, z, 1e-6, end=6.0)
    torch.testing.assert_close(with_density.z, up.z, rtol=0, atol=1e-4)


def test_order_of_the_solver():
    """5, against the closed form of a Gaussian, both ways."""
    network = GaussianDenoiser(SCHEDULE, 0.3, 0.04)
    model, unit = eps_model(network, SCHEDULE), normal(8, 2)
    mean, variance = (float(v) for v in network.data.marginal(GAMMA_0))
    ends = {GAMMA_0: mean + variance**0.5 * unit, GAMMA_1: unit}
    for start, end in ((GAMMA_0, GAMMA_1), (GAMMA_1, GAMMA_0)):
        errors, calls = [], []
        for tolerance in 10.0 ** -np.arange(5, 11):
            result = solve(model, ends[start], start, end, rtol=tolerance, atol=tolerance)
            errors.append(float((result.z - ends[end]).square().mean().sqrt()))
            calls.append(float(result.num_calls.double().mean()))
        assert 4.4 < order(errors, calls) < 6.5
        assert errors[-1] < 1e-8
