"""ode.py: densities, solutions and probabilities that are known in closed form; and what evaluate_ode promises."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import GaussianData, GaussianDenoiser, GaussianMixture, MixtureDenoiser
from scipy import integrate
from test_exact_likelihood import ENTROPY, PI, USED, X_VDM, BestNetwork, draw_images
from torch import nn

from diffusers_vdm import FixedLinearGamma, LearnedLinearGamma, LinearBetaGamma, VDMUNet2DModel
from diffusers_vdm.evaluation import ode_density as ode_evaluation
from diffusers_vdm.evaluation.dequantization import dequantize
from diffusers_vdm.evaluation.ode_density import evaluate_ode
from diffusers_vdm.ode import OdeSolution, SampleError, eps_model, log_prob_nats, solve

pytestmark = pytest.mark.usefixtures("untouched_global_rng")

GAMMA_0, GAMMA_1 = -6.0, 40.0  # at γ = 40 nothing is left of the data: N(0, I) is exact
SCHEDULE = FixedLinearGamma(GAMMA_0, GAMMA_1)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(*shape, seed=0):
    return 2.0 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) - 1


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alpha_sigma(gamma):
    gamma = torch.as_tensor(gamma, dtype=torch.float64)
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def mixture(dimensions):
    if dimensions <= 2:
        return GaussianMixture.example(dimensions)
    means = 1.4 * torch.rand(3, dimensions, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.7
    example = GaussianMixture.example(2)
    return GaussianMixture(example.weights, means, example.variances)


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


class Labelled(nn.Module):
    """The best network for data N(mean, variance) in each dimension, one pair for each label; counts what it does."""

    dtype = torch.float64

    def __init__(self, means, variances, schedule=SCHEDULE, interrupt_at=None):
        super().__init__()
        self.data = GaussianData(torch.tensor(means).double(), torch.tensor(variances).double())
        self.schedule, self.interrupt_at = schedule, interrupt_at
        self.batches = []

    def forward(self, z, timestep, class_labels, return_dict=True):
        self.batches.append(len(z))
        if len(self.batches) == self.interrupt_at:
            raise KeyboardInterrupt
        low, high = self.schedule.config.gamma_min, self.schedule.config.gamma_max
        gamma = low + (high - low) * timestep.double() / self.schedule.config.num_train_timesteps
        mean, variance = (v[class_labels] for v in (self.data.mean, self.data.variance))
        each = GaussianData(*(v.reshape(-1, *[1] * (z.ndim - 1)) for v in (mean, variance)))
        return (each.eps_hat(z, gamma.reshape(-1, *[1] * (z.ndim - 1))),)


# ---- log-density -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimensions", "prediction"),
    [(1, "epsilon"), (2, "epsilon"), (2, "sample"), (6, "epsilon"), (6, "v_prediction")],
)
def test_log_density_of_a_mixture(dimensions, prediction):
    data = mixture(dimensions)
    z = latents(data, 8)
    truth, model = data.log_density_nats(z, GAMMA_0), model_of(data, prediction)
    for tolerance, allowed in ((1e-6, 1e-3), (1e-8, 2e-6)):
        result = exact(model, z, tolerance)
        assert result.log_prob_nats.dtype == torch.float64 and result.z.shape == z.shape
        torch.testing.assert_close(result.log_prob_nats, truth, rtol=0, atol=allowed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(1,), (2, 1, 3)])
def test_log_density_of_a_gaussian(shape, prediction):
    """Also where it ends: the ODE keeps (z − mean)/standard deviation of each dimension."""
    network = GaussianDenoiser(SCHEDULE, 0.3, 0.04, prediction)
    mean, variance = (float(v) for v in network.data.marginal(GAMMA_0))
    unit = normal(9, *shape)
    result = exact(eps_model(network, SCHEDULE, prediction), mean + variance**0.5 * unit, 1e-8)
    truth = -0.5 * (unit.square() + math.log(2 * math.pi * variance)).flatten(1).sum(1)
    torch.testing.assert_close(result.log_prob_nats, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.z, unit, rtol=0, atol=1e-6)


def test_error_falls_with_the_tolerances():
    """As calls⁻⁵ or faster; rtol and atol both count."""
    data = mixture(2)
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


def test_errors_of_a_solve_are_told():
    data = mixture(1)
    z, model = latents(data, 3), model_of(data)
    for arguments, message in (
        ({"divergence": "Exact"}, "divergence must be one of"),
        ({"divergence": "hutchinson"}, "give probes"),
        ({"divergence": "exact", "probes": signs(1, 3, 1)}, "give probes"),
        ({"probes": signs(1, 2, 1)}, r"shape \(P, 3, 1\)"),
        ({"divergence": "exact", "rtol": 0.0}, "rtol and atol must be positive"),
        ({"divergence": "exact", "atol": -1.0}, "rtol and atol must be positive"),
        ({"divergence": "exact", "rtol": math.nan}, "rtol and atol must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            log_prob_nats(model, z, GAMMA_0, GAMMA_1, **arguments)
    for start, end in ((GAMMA_1, GAMMA_0), (1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="gamma_start must be below"):
            log_prob_nats(model, z, start, end, divergence="exact")
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        eps_model(nn.Identity(), SCHEDULE, "eps")
    with pytest.raises(SampleError, match="allow larger errors by rtol and atol, or more steps by max_steps"):
        exact(model, z, 1e-8, max_steps=5)
    labels = torch.tensor([0, 0, 1])
    network = Labelled([0.0, math.nan], [1.0, 1.0])
    with pytest.raises(SampleError, match="NaN") as error:
        solve(eps_model(network, SCHEDULE, class_labels=labels), z, GAMMA_0, GAMMA_1)
    assert error.value.sample == 2


def test_no_gradient_leaks():
    """What comes back has no graph, also where z asks for one: it would be that of a part of the computation."""
    data = mixture(1)
    z = latents(data, 2).requires_grad_()
    for result in (exact(model_of(data), z, 1e-3), solve(model_of(data), z, GAMMA_0, 0.0)):
        assert not result.z.requires_grad
        assert result.log_prob_nats is None or not result.log_prob_nats.requires_grad


# ---- Hutchinson --------------------------------------------------------------------------------------------------


def hutchinson(model, z, probes, tolerance, start=GAMMA_0, end=GAMMA_1):
    return log_prob_nats(model, z, start, end, probes=probes, rtol=tolerance, atol=tolerance)


def test_hutchinson_averages_to_the_exact_divergence():
    """Over 600 probes of one sample; the mean over P probes is the mean of the P answers."""
    data = mixture(6)
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
    """The answer is a function of the probes: the same again, and the same whatever the steps."""
    data = mixture(6)
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


# ---- every sample has steps of its own -----------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson", None])
def test_a_sample_does_not_depend_on_its_batch(divergence):
    """Bit for bit, and in its number of calls, with an outlier that needs more."""
    data = mixture(2)
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


def test_finished_samples_are_not_worked_on():
    """The network sees as many samples as the calls add up to, and the last ones alone."""
    network = Labelled([0.0, 0.5, 0.0], [1.0, 1e-4, 0.3])
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
    network = Labelled(means, variances)
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


def tiny_unet(**more):
    """Random weights, with an output so small that the ODE does not blow rounding errors up."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = VDMUNet2DModel(
            **{"sample_size": 8, **more}, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            norm_num_groups=2, attention_head_dim=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            zero_init=False,
        )  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.02)
    return unet.eval()


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_a_sample_of_a_real_network_does_not_depend_on_its_batch(dtype, allowed):
    unet, schedule = tiny_unet().to(dtype), FixedLinearGamma(-6.0, 5.0)
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
    data, num = mixture(2), 4000
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


def test_up_and_down_is_where_it_started():
    data = mixture(2)
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


# ---- evaluate_ode: numbers that are known --------------------------------------------------------------------------

EIGHT = torch.arange(8)[:, None]
PMF = torch.tensor([0.05, 0.3, 0.0, 0.1, 0.25, 0.02, 0.0, 0.28], dtype=torch.float64)
COARSE = FixedLinearGamma(-6.0, 14.0)


def eight_levels():
    """One dimension, 8 levels: the exact density at each γ, and the network of the posterior mean."""
    used = PMF > 0
    means = (2 * EIGHT[used].double() + 1) / 8 - 1
    data = GaussianMixture(PMF[used], means, torch.zeros(int(used.sum()), dtype=torch.float64))
    return data, MixtureDenoiser(data, COARSE), EIGHT[used], PMF[used]


def evaluate(*args, **kwargs):
    return evaluate_ode(*args, **{"progress_bar": False, **kwargs})


def test_probability_of_each_level():
    """With K draws −log₂ of the integral of the density over the bin; all levels add up to at most 1."""
    data, network, images, pmf = eight_levels()
    arguments = {"num_levels": 8, "divergence": "exact", "rtol": 1e-3, "atol": 1e-3}
    plain = evaluate(network, COARSE, images, num_samples=8, **arguments)
    tight = evaluate(network, COARSE, images, num_importance_samples=24, **arguments)
    a = float(alpha_sigma(-6.0)[0])
    probability = torch.tensor([
        integrate.quad(
            lambda z: float(data.log_density_nats(torch.tensor([[z]], dtype=torch.float64), -6.0).exp()),
            a * (k / 4 - 1), a * ((k + 1) / 4 - 1), epsabs=1e-9,
        )[0]
        for k in images.flatten().tolist()
    ])  # fmt: skip
    torch.testing.assert_close(tight.per_image_bpd.float(), -torch.log2(probability), rtol=0, atol=0.06)
    for result in (plain, tight):
        total = float((2.0**-result.per_image_bpd).sum())
        assert 0.95 < total <= float(probability.sum()) + 0.005 <= 1.005
        cross_entropy = float(pmf @ result.per_image_bpd)
        assert cross_entropy >= float(-(pmf * pmf.log2()).sum()) - 0.01
    assert (plain.gamma_start, plain.gamma_end, plain.num_probes, plain.num_samples) == (-6.0, 14.0, 0, 8)
    assert plain.num_importance_samples == 1 and tight.num_importance_samples == 24
    assert plain.bpd == pytest.approx(float(plain.per_image_bpd.mean()))


@pytest.mark.parametrize(("dequantization", "most"), [("truncated_normal", 0.03), ("uniform", 0.5), ("decoder", 0.1)])
def test_bound_is_above_the_entropy_of_factorised_data(dequantization, most):
    """256 levels with the posterior mean; for each image against its own −log₂ P."""
    schedule = FixedLinearGamma(-13.3, 5.0)
    network = BestNetwork(lambda timestep: -13.3 + 18.3 * timestep / 1000, X_VDM)
    images = draw_images(24, 1, 4, 4)
    result = evaluate(network, schedule, images, dequantization=dequantization, rtol=1e-3, atol=1e-3)
    ideal = torch.zeros(256, dtype=torch.float64)
    ideal[torch.from_numpy(USED)] = torch.from_numpy(-np.log2(PI))
    gap = result.per_image_bpd - ideal[images.long()].flatten(1).mean(1)
    assert 0 < float(gap.mean()) + 3 * float(gap.std()) / math.sqrt(24)
    assert float(gap.mean()) - 3 * float(gap.std()) / math.sqrt(24) < most
    assert result.bpd > ENTROPY - 4 * result.stderr_bpd
    assert result.dequantization == dequantization and result.num_probes == 1


def test_uniform_noise_must_not_start_where_the_density_is_a_comb():
    """At γ = −13.3 uniform noise falls between the teeth of 256 levels; evaluate_ode starts above."""
    schedule = FixedLinearGamma(-13.3, 5.0)
    network = BestNetwork(lambda timestep: -13.3 + 18.3 * timestep / 1000, X_VDM)
    images = draw_images(8, 1, 4, 4)
    advised = evaluate(network, schedule, images, dequantization="uniform", rtol=1e-3, atol=1e-3)
    assert advised.gamma_start == pytest.approx(-11.8)
    z, rest = dequantize("uniform", images, uniform(8, 1, 4, 4), -13.3, 256, torch.float64)
    solution = log_prob_nats(
        eps_model(network, schedule), z, -13.3, 5.0, probes=signs(1, 8, 1, 4, 4), rtol=1e-3, atol=1e-3
    )
    low = float(-(solution.log_prob_nats + rest).mean()) / 16 / math.log(2)
    assert low > advised.bpd + 0.3


def test_stated_errors_are_the_spread(monkeypatch):
    """Over 80 seeds; the density is put in by hand, which is quick."""
    data, network, _, pmf = eight_levels()
    ends = []

    def by_hand(model, z, start, end, **_):
        ends.append((start, end))
        log_prob = data.log_density_nats(z, start)
        return OdeSolution(z, log_prob, log_prob[None], torch.ones(len(z)))

    monkeypatch.setattr(ode_evaluation, "log_prob_nats", by_hand)
    drawn = torch.multinomial(pmf, 12, replacement=True, generator=torch.Generator().manual_seed(0))
    images = EIGHT[PMF > 0][drawn]
    for repeats in (2, 5):
        results = [
            evaluate(
                network, COARSE, images, num_levels=8, dequantization="uniform", num_samples=repeats, seed=s,
                divergence="exact",
            )
            for s in range(80)
        ]  # fmt: skip
        spread = float(np.std([r.bpd for r in results], ddof=1))
        stated = float(np.sqrt(np.mean([r.draws_stderr_bpd**2 for r in results])))
        assert 0.7 < spread / stated < 1.3
    last = results[-1]
    assert last.stderr_bpd == pytest.approx(float(last.per_image_bpd.std()) / math.sqrt(12))
    single = evaluate(network, COARSE, images[:1], num_levels=8, divergence="exact")
    assert math.isnan(single.draws_stderr_bpd) and math.isnan(single.stderr_bpd)
    assert set(ends) == {(last.gamma_start, 14.0), (-6.0, 14.0)} and last.gamma_end == 14.0
    assert last.gamma_start == pytest.approx(-11.8 + 2 * math.log(32))


# ---- evaluate_ode: what it promises --------------------------------------------------------------------------------

SHORT = FixedLinearGamma(-4.0, 6.0)
FAST = {"num_levels": 8, "rtol": 1e-3, "atol": 1e-3}


def five(num=5):
    """Images of 2 dimensions, a label for each, and the network that knows each by its label."""
    images = torch.randint(0, 8, (num, 2), generator=torch.Generator().manual_seed(8))
    labels = torch.arange(num)
    network = Labelled(torch.linspace(-0.5, 0.5, num).tolist(), (0.5 ** torch.arange(2, num + 2)).tolist(), SHORT)
    return network, images, labels


@pytest.mark.parametrize("dequantization", ["truncated_normal", "uniform", "decoder"])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_no_image_depends_on_the_batch_and_none_is_dropped(divergence, dequantization):
    network, images, labels = five()
    results = [
        evaluate(
            network, SHORT, images, class_labels=labels, batch_size=size, num_samples=2, num_importance_samples=2,
            num_probes=2, divergence=divergence, dequantization=dequantization, **FAST,
        )
        for size in (1, 2, 7)
    ]  # fmt: skip
    for result in results:
        assert result.per_image_bpd.shape == result.num_calls.shape == (5,) and result.num_images == 5
        torch.testing.assert_close(result.per_image_bpd, results[0].per_image_bpd, rtol=1e-12, atol=0)
        assert torch.equal(result.num_calls, results[0].num_calls)
    assert results[0].num_probes == (2 if divergence == "hutchinson" else 0)
    other = evaluate(network, SHORT, images, class_labels=labels, seed=1, dequantization=dequantization, **FAST)
    assert float((other.per_image_bpd - results[0].per_image_bpd).abs().min()) > 1e-6


def test_draws_are_keyed_by_image_repeat_and_seed(monkeypatch):
    """Twins at other places of the data set get noise of their own, and so do repeats and importance samples."""
    network, images, _ = five()
    images = images[:1].expand(3, 2)
    seen = []

    def record(kind, levels, noise, *args):
        seen.append(noise)
        return dequantize(kind, levels, noise, *args)

    monkeypatch.setattr(ode_evaluation, "dequantize", record)
    evaluate(
        network,
        SHORT,
        images,
        class_labels=torch.zeros(3).long(),
        num_samples=2,
        num_importance_samples=2,
        num_probes=2,
        **FAST,
    )
    values = torch.cat(seen).flatten()
    assert len(values) == 24 == len(values.unique()) and values.dtype == torch.float64


def test_resumed_evaluation_is_the_one_that_was_not_interrupted(tmp_path):
    network, images, labels = five()
    arguments = {"class_labels": labels, "batch_size": 2, "num_samples": 2, **FAST}
    whole = evaluate(network, SHORT, images, **arguments)
    total = len(network.batches)
    first = batches_of(network, images[:2], labels[:2])

    network, _, _ = five()
    network.interrupt_at = first + 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, SHORT, images, resume_dir=tmp_path, **arguments)
    network.batches, network.interrupt_at = [], None
    resumed = evaluate(network, SHORT, images, resume_dir=tmp_path, **arguments)
    assert torch.equal(resumed.per_image_bpd, whole.per_image_bpd) and resumed.bpd == whole.bpd
    assert torch.equal(resumed.num_calls, whole.num_calls) and resumed.draws_stderr_bpd == whole.draws_stderr_bpd
    assert len(network.batches) == total - first

    network.batches = []
    again = evaluate(network, SHORT, images, resume_dir=tmp_path, **arguments)
    assert not network.batches and torch.equal(again.per_image_bpd, whole.per_image_bpd)
    for other, name in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"rtol": 1e-2}, "rtol was 0.001 and is 0.01"),
        ({"dequantization": "uniform"}, "dequantization was"),
        ({"divergence": "exact"}, "divergence was"),
        ({"class_labels": labels.flip(0)}, "class_labels was"),
        ({"num_probes": 2}, "num_probes was 1 and is 2"),
        ({"num_importance_samples": 2, "num_probes": 2}, "num_importance_samples was 1 and is 2"),
    ):
        with pytest.raises(ValueError, match=name):
            evaluate(network, SHORT, images, resume_dir=tmp_path, **{**arguments, **other})
    # more repeats go on from there
    more = evaluate(network, SHORT, images, resume_dir=tmp_path, **{**arguments, "num_samples": 3})
    assert more.num_samples == 3 and network.batches and len(network.batches) < total


def batches_of(network, images, labels):
    before = len(network.batches)
    evaluate(network, SHORT, images, class_labels=labels, batch_size=2, **FAST)
    return len(network.batches) - before


def test_a_refused_argument_leaves_resume_dir_as_it_was(tmp_path):
    network, images, labels = five()
    for wrong in ({"divergence": "trace"}, {"rtol": 0.0}, {"atol": -1.0}, {"prediction_type": "eps"}):
        with pytest.raises(ValueError, match="must be"):
            evaluate(network, SHORT, images, class_labels=labels, resume_dir=tmp_path, **{**FAST, **wrong})
    result = evaluate(network, SHORT, images, class_labels=labels, resume_dir=tmp_path, **FAST)
    assert math.isfinite(result.bpd)


def test_wrong_arguments_are_told():
    network, images, labels = five()
    arguments = {"class_labels": labels, **FAST}
    with pytest.raises(TypeError, match="integers"):
        evaluate(network, SHORT, images.float(), **arguments)
    for wrong, message in (
        ({"num_levels": 4}, r"within \[0, 4\)"),
        ({"dequantization": "normal"}, "dequantization must be one of"),
        ({"divergence": "trace"}, "divergence must be one of"),
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"atol": 0.0}, "rtol and atol must be positive"),
        ({"prediction_type": "eps"}, "prediction_type must be one of"),
        ({"num_samples": 0}, "num_samples must be a positive integer"),
        ({"num_importance_samples": 1.5}, "num_importance_samples must be a positive integer"),
        ({"num_probes": 0}, "num_probes must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(network, SHORT, images, **{**arguments, **wrong})
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate(network, SHORT, images[:0], **FAST)


def test_the_image_that_fails_is_named():
    network, images, labels = five()
    network.data.mean[3] = math.nan
    for size in (1, 2, 7):
        with pytest.raises(ValueError, match="image 3: the network returned NaN or infinity"):
            evaluate(network, SHORT, images, class_labels=labels, batch_size=size, **FAST)
    network, images, labels = five()
    smooth = network.forward
    network.forward = lambda z, t, class_labels, **more: (
        smooth(z, t, class_labels)[0] + (class_labels == 4)[:, None] * torch.sin(30 * z),
    )  # the others are done before
    calls = evaluate(network, SHORT, images, class_labels=labels, **{**FAST, "rtol": 1e-6, "atol": 1e-6}).num_calls
    steps = int(calls[:4].max() + 5) // 6
    assert calls[4] > calls[:4].max() + 6
    for size in (1, 2, 7):
        with pytest.raises(ValueError, match=f"image 4: .* after {steps} steps.*more steps by max_steps"):
            evaluate(
                network, SHORT, images, class_labels=labels, batch_size=size,
                **{**FAST, "rtol": 1e-6, "atol": 1e-6, "max_steps": steps},
            )  # fmt: skip


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_network_is_left_as_it_was_and_no_grad_does_not_matter(divergence):
    """Modes, gradients and requires_grad; labels and a learned schedule under no_grad and inference_mode."""
    unet, schedule = tiny_unet(num_class_embeds=3, dropout=0.5, sample_size=4), LearnedLinearGamma(-4.0, 4.0)
    unet.train()
    unet.mid_block.eval()
    frozen = next(unet.parameters()).requires_grad_(False)
    num = 2 if divergence == "hutchinson" else 1
    images = torch.randint(0, 8, (num, 1, 4, 4), generator=torch.Generator().manual_seed(8))
    arguments = {"class_labels": torch.tensor([2, 0])[:num], "divergence": divergence, "num_levels": 8}
    arguments |= {"rtol": 0.1, "atol": 0.1, "prediction_type": "v_prediction"}
    plain = evaluate(unet, schedule, images, **arguments)
    with torch.no_grad():
        assert evaluate(unet, schedule, images, **arguments).bpd == plain.bpd
    with torch.inference_mode():
        inside = {**arguments, "class_labels": arguments["class_labels"].clone()}
        assert evaluate(unet, schedule, images.clone(), **inside).bpd == plain.bpd
    assert unet.training and not unet.mid_block.training and unet.conv_in.training
    for module in (unet, schedule):
        for parameter in module.parameters():
            assert parameter.grad is None and parameter.requires_grad == (parameter is not frozen)
    assert not plain.per_image_bpd.requires_grad


def test_modes_are_restored_after_an_error():
    network, images, labels = five()
    network.train()
    network.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, SHORT, images, class_labels=labels, **FAST)
    assert network.training


def test_a_schedule_of_betas():
    """DDPM's, whose timestep is an index found by bisection: the same density as by γ itself."""
    data, schedule = mixture(1), LinearBetaGamma(1000)
    start, end = (float(each) for each in schedule.ends())
    z = latents(data, 3, start)
    result = exact(eps_model(MixtureDenoiser(data, gamma_of=lambda t: index_gamma(schedule, t)), schedule), z, 1e-4,
                   start, end)  # fmt: skip
    torch.testing.assert_close(result.log_prob_nats, data.log_density_nats(z, start), rtol=0, atol=0.02)


def index_gamma(schedule, timesteps):
    with torch.no_grad():
        return schedule(timesteps / 999)


@pytest.mark.parametrize("total", [20, 50, 200])
def test_the_last_step_does_not_leave_the_table(total):
    """γ + (end − γ) may round to beyond the end, which a table of betas has no level for."""
    schedule = LinearBetaGamma(total, rescale_betas=False)
    network = GaussianDenoiser(schedule, variance=0.3)
    images = torch.randint(0, 256, (40, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for tolerance in (0.5, 0.1, 0.02):
        assert math.isfinite(evaluate(network, schedule, images, rtol=tolerance, atol=tolerance, num_levels=256).bpd)


def test_images_and_labels_must_be_those_of_the_network():
    unet, schedule = tiny_unet(num_class_embeds=3), FixedLinearGamma(-4.0, 4.0)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for labels, error, message in (
        (None, ValueError, r"class_labels must be given, in \[0, 3\)"),
        (torch.tensor([0, 3]), ValueError, r"within \[0, 3\), got values from 0 to 3"),
        (torch.tensor([0]), ValueError, r"shape \(2,\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers"),
        ([0, 1], TypeError, "tensor of integers, got list"),
    ):
        with pytest.raises(error, match=message):
            evaluate(unet, schedule, images, class_labels=labels)
    for bad in (images[:, :, :4], images.expand(2, 3, 8, 8), images[0]):
        with pytest.raises(ValueError, match="of the network's size"):
            evaluate(unet, schedule, bad, class_labels=torch.tensor([0, 1]))
