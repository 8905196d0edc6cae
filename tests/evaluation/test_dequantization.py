"""evaluation/dequantization.py: draws and densities against scipy and mpmath, and the bound on a known probability."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffusers_vdm import FixedLinearGamma
from diffusers_vdm.evaluation.dequantization import (
    cross_fitted_bpd,
    dequantization_start,
    dequantize,
    importance_weighted_bpd,
)
from tests.oracles import GaussianMixture, mp_level_log_probs

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
KINDS = ["truncated_normal", "uniform", "decoder"]
LAST = 1 - 2.0**-53  # the largest that torch.rand gives in float64
CASES = [(17, -13.3), (17, -3.0), (256, -13.3), (256, -7.5), (256, -3.0)]


def alpha_sigma(gamma):
    return 1 / math.sqrt(1 + math.exp(gamma)), 1 / math.sqrt(1 + math.exp(-gamma))


def draw(kind, gamma, num_levels, shape=(6, 2, 3), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, num_levels, shape, generator=generator, dtype=torch.uint8)
    levels.view(-1)[:2] = torch.tensor([0, num_levels - 1])
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    noise.view(-1)[-2:] = torch.tensor([0.0, LAST])
    return levels, noise, *dequantize(kind, levels, noise, gamma, num_levels, dtype)


def distribution(kind, x, gamma, num_levels):
    """q(z | x) of scipy."""
    a, s = alpha_sigma(gamma)
    if kind == "uniform":
        return stats.uniform(a * (x - 1 / num_levels), 2 * a / num_levels)
    if kind == "decoder":
        return stats.norm(a * x, s)
    tau = a / num_levels / s
    return stats.truncnorm(-tau, tau, a * x, s)


def centers(levels, num_levels):
    return 2 * (levels.numpy().astype(float) + 0.5) / num_levels - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_levels", "gamma"), CASES)
def test_rest_is_minus_log_q_and_the_decoder(kind, num_levels, gamma):
    levels, _, z, rest = draw(kind, gamma, num_levels)
    x = centers(levels, num_levels)
    # 1e-12 of a bin: scipy says −inf a rounding error outside of the bin, where z of the first and last quantile is
    q, middle = distribution(kind, x, gamma, num_levels), alpha_sigma(gamma)[0] * x
    expected = -q.logpdf(middle + (z.numpy() - middle) * (1 - 1e-12))
    if kind == "decoder":
        log_probs = [
            float(mp_level_log_probs(float(each), gamma, num_levels)[int(level)])
            for each, level in zip(z.flatten(), levels.flatten(), strict=True)
        ]
        expected = expected + np.array(log_probs).reshape(x.shape)
    assert rest.shape == (len(z),) and rest.dtype == torch.float64
    np.testing.assert_allclose(rest, expected.reshape(len(z), -1).sum(1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["truncated_normal", "uniform"])
@pytest.mark.parametrize(("num_levels", "gamma"), CASES)
def test_z_stays_in_its_bin(kind, num_levels, gamma, dtype):
    levels, _, z, _ = draw(kind, gamma, num_levels, (50, 40), dtype)
    assert z.dtype == dtype
    y = z.double().numpy() / alpha_sigma(gamma)[0]
    assert np.abs(y - centers(levels, num_levels)).max() <= 1 / num_levels + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_levels", "gamma"), CASES)
def test_draws_follow_q(kind, num_levels, gamma):
    """Kolmogorov and Smirnov, and each draw is the quantile that its noise asks for."""
    levels, noise, z, _ = draw(kind, gamma, num_levels, (3000, 1))
    u = distribution(kind, centers(levels, num_levels), gamma, num_levels).cdf(z.numpy())
    assert stats.kstest(u[:-2, 0], "uniform").pvalue > 1e-3
    np.testing.assert_allclose(u, noise, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("num_levels", "gamma"), [*CASES, (8, -30.0), (1024, 5.0)])
def test_extreme_noise_is_finite(kind, dtype, num_levels, gamma):
    noise = torch.tensor([[0.0], [2.0**-53], [0.5], [LAST]], dtype=torch.float64)
    levels = torch.full((4, 1), num_levels - 1)
    z, rest = dequantize(kind, levels, noise, gamma, num_levels, dtype)
    assert bool(z.isfinite().all()) and bool(rest.isfinite().all())
    assert bool((z.diff(dim=0) >= 0).all())


def test_each_sample_has_its_own_rest():
    for kind in KINDS:
        levels, noise, z, rest = draw(kind, -7.5, 256)
        for i in range(len(levels)):
            alone = dequantize(kind, levels[i : i + 1], noise[i : i + 1], -7.5, 256, torch.float64)
            assert torch.equal(alone[0][0], z[i])
            torch.testing.assert_close(alone[1][0], rest[i], rtol=1e-13, atol=0)


def test_start_of_the_ode():
    wide = FixedLinearGamma(-13.3, 5.0)
    for kind in ("truncated_normal", "decoder"):
        assert dequantization_start(kind, wide, 256) == (-13.3, 5.0)
    for num_levels in (8, 17, 256):
        start, end = dequantization_start("uniform", wide, num_levels)
        a, s = alpha_sigma(start)
        assert end == 5.0 and s / a * num_levels == pytest.approx(0.7, abs=2e-3)
    assert dequantization_start("uniform", FixedLinearGamma(-6.0, 5.0), 256)[0] == -6.0
    with pytest.raises(ValueError, match="dequantization must be one of"):
        dequantization_start("normal", wide, 256)
    with pytest.raises(ValueError, match="dequantization must be one of"):
        dequantize("normal", torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 0.5), -5.0, 8)


# ---- importance-weighted bound -----------------------------------------------------------------------------------


def test_equal_weights_give_the_plain_bound():
    log_weights = torch.tensor([-3.0, 500.0, -40000.0], dtype=torch.float64)
    plain = -log_weights / (5 * math.log(2))
    for k in (1, 2, 1000):
        torch.testing.assert_close(importance_weighted_bpd(log_weights.expand(k, 3), 5), plain, rtol=1e-14, atol=0)
    two = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    assert float(importance_weighted_bpd(two, 1)) == pytest.approx(-1.0, abs=1e-15)  # mean of 1 and 3


@pytest.mark.parametrize("kind", KINDS)
def test_bound_falls_to_the_probability(kind):
    """1-D, 4 levels, a density that is known: P(x) is its integral over the bin, or over p(x | z)."""
    gamma, num_levels, level, groups = -2.5, 4, 1, 150
    a, _ = alpha_sigma(gamma)
    mixture = GaussianMixture.example(1)

    def density(z):
        return float(mixture.log_density_nats(torch.tensor([[z]], dtype=torch.float64), gamma).exp())

    if kind == "decoder":
        probability = integrate.quad(
            lambda z: density(z) * float(np.exp(float(mp_level_log_probs(z, gamma, num_levels)[level]))), -2.5, 2.5,
            points=[-0.5, 0.0, 0.5], epsabs=1e-7,
        )[0]  # fmt: skip
    else:
        probability = integrate.quad(density, a * -0.5, 0.0, epsabs=1e-10)[0]
    noise = torch.rand(512 * groups, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels = torch.full((len(noise), 1), level)
    z, rest = dequantize(kind, levels, noise, gamma, num_levels, torch.float64)
    log_weights = mixture.log_density_nats(z, gamma) + rest
    weights = log_weights.exp()
    assert abs(float(weights.mean()) - probability) < 4 * float(weights.std()) / math.sqrt(len(weights))

    exact, bounds = -math.log2(probability), {}
    for k in (1, 8, 512):
        bits = importance_weighted_bpd(log_weights.reshape(k, -1), 1)
        bounds[k] = float(bits.mean()), float(bits.std() / math.sqrt(len(bits)))
    assert bounds[1][0] > bounds[8][0] > exact - 3 * bounds[8][1]
    assert bounds[1][0] - exact > 10 * bounds[1][1]  # else nothing is to be gained here
    assert abs(bounds[512][0] - exact) < 3 * bounds[512][1]


# ---- weights with noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "noise"), [(2.0, 3.0), (2.0, 0.0), (0.0, 3.0), (3.0, 0.3)])
def test_noisy_weights_still_give_a_bound(spread, noise):
    """w ~ N(−s²/2, s²) has E exp(w) = 1: the truth is 0. Noise within the draws and noise that they share."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count, probes, images = 16, 2, 20_000
    w = spread * randn(count, 1, images) - spread**2 / 2
    noisy = w + noise * randn(count, probes, images) + noise * randn(1, probes, images)
    exact = importance_weighted_bpd(w[:, 0], 1)
    fitted, naive = cross_fitted_bpd(noisy, 1), importance_weighted_bpd(noisy.mean(1), 1)
    error = float(fitted.std()) / math.sqrt(images)
    assert float(fitted.mean()) > float(exact.mean()) - 4 * error  # a bound, whatever the noise
    mean_of_draws = -float(noisy.mean()) / math.log(2)
    assert float(fitted.mean()) <= mean_of_draws + 0.02  # and never worse than no weighting
    if noise == 0:
        torch.testing.assert_close(fitted, exact, rtol=1e-9, atol=1e-9)
    if noise == 3:
        assert float(naive.mean()) < -0.5  # too good to be true
    if spread > noise > 0:
        assert float(fitted.mean()) < float(exact.mean()) + 0.1


def test_cross_fitting_needs_two_probes():
    with pytest.raises(ValueError, match="at least 2 probes"):
        cross_fitted_bpd(torch.zeros(4, 1, 3), 2)
