"""The bounds of data whose probabilities are known: independent dimensions with one pmf π over the 256 levels.

The best network is then the posterior mean, a softmax over 256 levels; the entropy of π is the best bits/dim there is;
and every term of the bound is an integral over one variable. Nothing here uses the formulas of the package.
"""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_vdm import FixedLinearGamma, LinearBetaScheduler, VariationalBound, VDMScheduler, evaluate_vlb
from diffusers_vdm.randomness import keyed_generator
from tests.models import tiny_unet
from tests.oracles import ENTROPY, PI, USED, X_DDPM, X_USED, X_VDM, BestNetwork, draw_images

SEED, GAMMA_MIN, GAMMA_MAX = 7, -13.3, 5.0
ENDS = {"gamma_min": GAMMA_MIN, "gamma_max": GAMMA_MAX}
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def alpha_sigma(gamma):
    return np.sqrt(1 / (1 + np.exp(gamma))), np.sqrt(1 / (1 + np.exp(-gamma)))


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_likelihoods(z, gamma, x):
    """log N(z; α x_k, σ²) for all k, on a new last axis."""
    a, s = alpha_sigma(gamma)
    return -0.5 * ((z[..., None] - a * x) / s) ** 2 - np.log(s * math.sqrt(2 * math.pi))


def gammas_of(betas):
    return np.log(1 / np.cumprod(1 - betas) - 1)


def normalized_gamma(low=GAMMA_MIN):
    return lambda timestep: low + (GAMMA_MAX - low) * timestep / 1000


def noise(name, images):
    draws = [torch.randn(images.shape[1:], generator=keyed_generator(SEED, name, i)) for i in range(len(images))]
    return torch.stack(draws).double().numpy()


def bits(nats):
    """Mean over the dimensions of each image."""
    return nats.reshape(len(nats), -1).mean(1) / math.log(2)


def prior_nats(x, gamma_1):
    a, s = alpha_sigma(gamma_1)
    return 0.5 * (a**2 * x**2 + s**2 - 1 - np.log(s**2))


def vdm_bpd(images, gammas):
    """VDM's T-step bound of each image with the best network: prior, decoder, and terms `(N, T)`, bits/dim."""
    k = images.numpy().astype(int)
    x, errors = X_VDM[k], []
    for i, gamma in enumerate(gammas):
        a, s = alpha_sigma(gamma)
        z = a * x + s * noise(i - 1 if i > 0 else "z_0", images)
        if i == 0:
            decoder = np.take_along_axis(log_softmax(log_likelihoods(z, gamma, X_VDM)), k[..., None], -1)
        else:
            x_hat = np.exp(log_softmax(np.log(PI) + log_likelihoods(z, gamma, X_USED))) @ X_USED
            errors.append(bits((x - x_hat) ** 2))
    terms = np.stack(errors, 1) * 0.5 * (np.exp(-gammas[:-1]) - np.exp(-gammas[1:]))
    return bits(prior_nats(x, gammas[-1])), bits(-decoder), terms


def assert_terms(result, prior, decoder, terms):
    np.testing.assert_allclose(result.terms_bpd, terms, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(result.per_image_bpd, prior + decoder + terms.sum(1), rtol=1e-9)
    np.testing.assert_allclose(result.prior_bpd, prior.mean(), rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(result.reconstruction_bpd, decoder.mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [10, 50, None])
def test_vdm_bound_of_each_image(steps, prediction):
    """Prior, decoder and all T terms of evaluate_vlb, with the same noise; `None` is DDPM's betas in 50 steps."""
    if steps is None:
        gammas = gammas_of(np.linspace(1e-4, 0.02, 50) * 20)
        scheduler, gamma_of = LinearBetaScheduler(50, prediction_type=prediction), torch.from_numpy(gammas).__getitem__
    else:
        gammas = np.linspace(GAMMA_MIN, GAMMA_MAX, steps + 1)
        scheduler, gamma_of = VDMScheduler(prediction_type=prediction, **ENDS), normalized_gamma()
    network, images = BestNetwork(gamma_of, X_VDM, prediction), draw_images(3, 3, 4, 4)
    result = evaluate_vlb(network, scheduler, images, num_steps=steps, seed=SEED, progress_bar=False)
    assert (result.convention, result.num_steps) == ("vdm", len(gammas) - 1)
    assert_terms(result, *vdm_bpd(images, gammas))


def ddpm_bpd(images, betas, prediction, clip, network):
    """DDPM's bound (eq. 5, 7, 11 and 13) with fixed_small variances: prior, decoder, and terms `(N, T)`, bits/dim."""
    x = X_DDPM[images.numpy().astype(int)]
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    terms = np.zeros((len(x), len(betas)))
    for t in range(len(betas)):
        z = np.sqrt(bar[t]) * x + np.sqrt(1 - bar[t]) * noise(t, images)
        with torch.no_grad():
            out = network(torch.from_numpy(z), torch.tensor(t), return_dict=False)[0].numpy()
        x_hat = {
            "epsilon": (z - np.sqrt(1 - bar[t]) * out) / np.sqrt(bar[t]),
            "sample": out,
            "v_prediction": np.sqrt(bar[t]) * z - np.sqrt(1 - bar[t]) * out,
        }[prediction]
        x_hat = np.clip(x_hat, -1, 1) if clip else x_hat
        if t == 0:  # the mean is x̂ itself, and the public code takes the variance of the second step
            edges = (x - x_hat + np.array([1, -1]).reshape(2, 1, 1, 1, 1) / 255) / np.sqrt(variance[1])
            upper, lower = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (edges + 0.044715 * edges**3)))
            mass = np.where(x == -1, upper, np.where(x == 1, 1 - lower, upper - lower))
            decoder = bits(-np.log(np.maximum(mass, 1e-12)))
        else:
            terms[:, t] = bits((np.sqrt(before[t]) * betas[t] / (1 - bar[t]) * (x - x_hat)) ** 2 / (2 * variance[t]))
    return bits(0.5 * (bar[-1] * x**2 - bar[-1] - np.log(1 - bar[-1]))), decoder, terms


def assert_ddpm(network, scheduler, betas, images):
    config = scheduler.config
    result = evaluate_vlb(network, scheduler, images, seed=SEED, progress_bar=False)
    assert (result.convention, result.num_steps, result.clip_sample) == ("ddpm", len(betas), config.clip_sample)
    assert_terms(result, *ddpm_bpd(images, betas, config.prediction_type, config.clip_sample, network))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_bound_of_each_image(prediction, clip):
    """The same in DDPM's convention, for a scheduler of diffusers."""
    betas = np.linspace(1e-3, 0.3, 40)
    scheduler = DDPMScheduler(40, 1e-3, 0.3, clip_sample=clip, prediction_type=prediction)
    network = BestNetwork(torch.from_numpy(gammas_of(betas)).__getitem__, X_DDPM, prediction)
    assert_ddpm(network, scheduler, betas, draw_images(3, 3, 4, 4))


@pytest.mark.parametrize("kind", [pytest.param("linear", marks=pytest.mark.slow), "squaredcos_cap_v2"])
def test_checkpoint_of_diffusers_with_all_its_steps(kind):
    """A UNet2DModel with random weights: the default 1000 steps, and v-prediction along the cosine."""
    unet = tiny_unet(UNet2DModel, down_block_types=("AttnDownBlock2D",)).double()
    if kind == "linear":
        scheduler, betas = DDPMScheduler(), np.linspace(1e-4, 0.02, 1000)
    else:
        bar = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        scheduler = DDPMScheduler(100, beta_schedule=kind, prediction_type="v_prediction", clip_sample=False)
    assert_ddpm(unet.eval(), scheduler, betas, draw_images(2, 3, 8, 8))


def over_z(gamma, function, per_sigma):
    """∫ function(z, log q(z, x_k)) dz in bits, by the trapezoidal rule with `per_sigma` nodes to a σ."""
    a, s = alpha_sigma(gamma)
    z = np.arange(-a - 10 * s, a + 10 * s, s / per_sigma)
    values = function(z, np.log(PI) + log_likelihoods(z, gamma, X_USED))
    return float((values * s / per_sigma).sum()) / math.log(2)


@functools.cache
def mmse_bits(gamma, per_sigma=16):
    """E(ε − ε̂)²/log 2 = SNR E Var[x | z_t]/log 2."""

    def function(z, joint):
        p = np.exp(log_softmax(joint))
        return np.exp(joint).sum(1) * (p * (X_USED - (p @ X_USED)[:, None]) ** 2).sum(1)

    return math.exp(-gamma) * over_z(gamma, function, per_sigma)


def decoder_bits(gamma_0, knows_pi=False, per_sigma=16):
    """E[−log p(x | z_0)] with all levels alike, or with the true posterior."""

    def function(z, joint):
        flat = log_softmax(log_likelihoods(z, gamma_0, X_VDM))[:, USED]
        return -(np.exp(joint) * (log_softmax(joint) if knows_pi else flat)).sum(1)

    return over_z(gamma_0, function, per_sigma)


def marginal_prior_bits(gamma_1, per_sigma=16):
    """KL(q(z_1) ‖ N(0, 1)) of the marginal."""

    def function(z, joint):
        q = np.exp(joint).sum(1)
        return q * (np.log(q) + 0.5 * z**2 + 0.5 * math.log(2 * math.pi))

    return over_z(gamma_1, function, per_sigma)


def times_and_shares(steps, nodes=64):
    """A time within each step (0, 1/T], …, or for `steps=None` the nodes of Gauss and Legendre; and their weights."""
    u, w = np.polynomial.legendre.leggauss(nodes)
    return ((u + 1) / 2, w / 2) if steps is None else ((np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps))


def expected_bits(steps, low, nodes=64):
    """Prior, decoder, and Σ ½ (SNR(s)/SNR(t) − 1) mmse(γ_t), or ½ ∫ mmse dγ in continuous time."""
    span = GAMMA_MAX - low
    t, share = times_and_shares(steps, nodes)
    t = t if steps is None else t + 0.5 / steps
    weight = 0.5 * (span if steps is None else steps * (math.exp(span / steps) - 1))
    diffusion = weight * float(share @ np.array([mmse_bits(low + span * each) for each in t]))
    return float(PI @ prior_nats(X_USED, GAMMA_MAX)) / math.log(2), decoder_bits(low), diffusion


def expected_by_package(steps, low, prediction):
    """The same of VariationalBound: all levels times a grid of ε as one batch, for each t."""
    network, schedule = BestNetwork(normalized_gamma(low), X_VDM, prediction), FixedLinearGamma(low, GAMMA_MAX)
    bound = VariationalBound(network, schedule, num_timesteps=steps, prediction_type=prediction)
    eps = np.arange(-9 * 16, 9 * 16 + 1) / 16
    weight = torch.from_numpy(np.outer(PI, np.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi) / 16).ravel())
    images = torch.from_numpy(np.repeat(USED, len(eps))).reshape(-1, 1, 1, 1)
    eps = torch.from_numpy(np.tile(eps, len(USED))).reshape(-1, 1, 1, 1)
    diffusion = 0.0
    for t, share in zip(*times_and_shares(steps), strict=True):
        with torch.no_grad():
            out = bound(images, t=torch.full((len(images),), t, dtype=torch.float64), eps=eps, eps_0=eps)
        diffusion += share * float(weight @ out.diffusion)
    return float(weight @ out.prior), float(weight @ out.reconstruction), diffusion


def test_quadrature_has_converged():
    for gamma in (GAMMA_MIN, -11.0, -6.0, 0.0, GAMMA_MAX):
        assert mmse_bits(gamma, 32) == pytest.approx(mmse_bits(gamma), abs=1e-10)
    for knows_pi in (True, False):
        assert decoder_bits(GAMMA_MIN, knows_pi, 32) == pytest.approx(decoder_bits(GAMMA_MIN, knows_pi), abs=1e-10)
    assert marginal_prior_bits(GAMMA_MAX, 32) == pytest.approx(marginal_prior_bits(GAMMA_MAX), abs=1e-12)
    assert expected_bits(None, GAMMA_MIN, 80) == pytest.approx(expected_bits(None, GAMMA_MIN), abs=1e-9)


@pytest.mark.parametrize(
    ("steps", "low", "prediction"),
    [(2, GAMMA_MIN, "epsilon"), (10, GAMMA_MIN, "v_prediction"), (10, -7.0, "sample"), (50, GAMMA_MIN, "epsilon")],
)
def test_expected_bound(steps, low, prediction):
    """The expectation of each term of VariationalBound."""
    package, exact = expected_by_package(steps, low, prediction), expected_bits(steps, low)
    np.testing.assert_allclose(package, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("low", [GAMMA_MIN, -7.0])
def test_bound_falls_to_entropy_and_its_gap_is_known(low):
    """Continuous time: entropy + KL(q(z_1) ‖ N(0, 1)) + what the decoder loses by not knowing π; any T is above."""
    gap = marginal_prior_bits(GAMMA_MAX) + decoder_bits(low) - decoder_bits(low, knows_pi=True)
    terms = expected_by_package(None, low, "epsilon")
    np.testing.assert_allclose(terms, expected_bits(None, low), rtol=1e-9, atol=1e-10)
    assert sum(terms) == pytest.approx(ENTROPY + gap, abs=1e-8)
    bounds = [sum(expected_bits(steps, low)) for steps in (2, 5, 10, 50, 250)]
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] > sum(terms) > ENTROPY + 1e-3


def test_draws_average_to_expected_bound():
    """evaluate_vlb over data drawn from π, for T = 10."""
    network, images = BestNetwork(normalized_gamma(), X_VDM), draw_images(128, 1, 16, 16)
    result = evaluate_vlb(network, VDMScheduler(**ENDS), images, num_steps=10, seed=SEED, progress_bar=False)
    terms = expected_bits(10, GAMMA_MIN)
    assert abs(result.bpd - sum(terms)) < 4 * result.stderr_bpd < 0.02 * sum(terms)
    assert abs(result.diffusion_bpd - terms[2]) < 4 * float(result.terms_bpd.sum(1).std()) / math.sqrt(len(images))
