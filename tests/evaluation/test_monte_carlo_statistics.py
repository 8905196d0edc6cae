"""evaluation/monte_carlo.py: error bars, when an evaluation stops, and importance sampling.

200 runs with different seeds are compared with the exact bound, which is computed by quadrature.
"""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from diffusers_vdm import FixedLinearGamma, VariationalBound, evaluate_mc
from diffusers_vdm.evaluation.monte_carlo import _measured_warp
from tests.oracles import GaussianData, GaussianDenoiser
from tests.tensors import F64, random_levels, seeded

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
LN2 = math.log(2)
RUNS = 200
N, LEVELS = 48, 9
DATA = GaussianData(0.1, 0.3)
GAMMA_0, GAMMA_1 = -3.0, 4.0


levels = functools.partial(random_levels, num_levels=LEVELS)


def evaluate(net, images, schedule=None, num_timesteps=None, **kwargs):
    schedule = schedule or FixedLinearGamma(GAMMA_0, GAMMA_1)
    bound = VariationalBound(net, schedule, num_levels=LEVELS, num_timesteps=num_timesteps)
    return evaluate_mc(bound, images, **{"progress_bar": False, "batch_size": 64} | kwargs)


# ---- the truth ---------------------------------------------------------------------------------------------------


def exact_bpd(images: torch.Tensor, num_timesteps: int | None = None) -> np.ndarray:
    """The bound of each image with the denoiser of `DATA`, by quadrature over t and over each pixel's noise."""
    values = (2 * np.arange(LEVELS) + 1) / LEVELS - 1
    variance = 1 / (1 + math.exp(-GAMMA_1))
    prior = 0.5 * ((1 - variance) * values**2 + variance - 1 - math.log(variance))
    noise, step = np.linspace(-9, 9, 4001, retstep=True)
    noisy = values[:, None] + math.exp(GAMMA_0 / 2) * noise  # z_0/α_0 of each level
    logits = -0.5 * math.exp(-GAMMA_0) * (noisy[..., None] - values) ** 2
    own = np.take_along_axis(logits, np.arange(LEVELS)[:, None, None], 2)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - own
    reconstruction = step * (nats * np.exp(-0.5 * noise**2)).sum(1) / math.sqrt(2 * math.pi)
    if num_timesteps is None:
        nodes, weights = np.polynomial.legendre.leggauss(96)
        gamma, weight = GAMMA_0 + (GAMMA_1 - GAMMA_0) * (nodes + 1) / 2, weights / 4 * (GAMMA_1 - GAMMA_0)
    else:
        edges = np.linspace(GAMMA_0, GAMMA_1, num_timesteps + 1)
        gamma, weight = edges[1:], 0.5 * np.expm1(np.diff(edges))
    alpha_squared = 1 / (1 + np.exp(gamma))
    total = alpha_squared * DATA.variance + 1 - alpha_squared
    # ε − ε̂ = ε α² s²/(α² s² + σ²) − σ α (x − m)/(α² s² + σ²)
    of_noise = alpha_squared * DATA.variance / total
    of_data = np.sqrt(alpha_squared * (1 - alpha_squared)) * (values[:, None] - DATA.mean) / total
    diffusion = ((of_noise**2 + of_data**2) * weight).sum(1)
    per_level = (prior + reconstruction + diffusion) / LN2
    return per_level[images.numpy()].reshape(len(images), -1).mean(1)


IMAGES = levels(N, 2)
DENOISER = GaussianDenoiser(FixedLinearGamma(GAMMA_0, GAMMA_1), DATA.mean, DATA.variance)
TARGET = 0.09
KINDS = {
    "plain": {"num_samples": 8},
    "importance": {"num_samples": 8, "importance_sampling": True},
    "target": {"num_samples": 2, "target_stderr_bpd": TARGET},
    "discrete importance": {"num_samples": 4, "importance_sampling": True, "num_timesteps": 7},
}
MANY = [200, pytest.param(1000, marks=pytest.mark.slow)]


@functools.cache
def one_run(kind: str, seed: int):
    return evaluate(DENOISER, IMAGES, seed=seed, **KINDS[kind])


def runs(kind: str, count: int = 200) -> list:
    return [one_run(kind, seed) for seed in range(1000, 1000 + count)]


def attributes(kind: str, count: int, *names: str) -> list[np.ndarray]:
    return [np.array([getattr(run, name) for run in runs(kind, count)]) for name in names]


# ---- error bars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("kind", ["plain", "importance", "target"])
def test_error_bars_have_the_coverage_of_students_t(kind, count):
    bpd, stderr, repeats = attributes(kind, count, "bpd", "stderr_bpd", "num_samples")
    error = np.abs(bpd - exact_bpd(IMAGES).mean())
    for width in (1, 2):
        expected = np.mean(2 * stats.t.cdf(width, repeats - 1) - 1)
        three_sigma = 3 * math.sqrt(expected * (1 - expected) / count)
        covered = np.mean(error < width * stderr)
        # an evaluation that stops at a small error sometimes stops at one that is too small: up to 5 % of coverage
        lost = 0.05 if kind == "target" else 0.0
        assert expected - lost - three_sigma < covered < expected + three_sigma, (width, covered, expected)


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_unbiased(kind, count):
    truth = exact_bpd(IMAGES, KINDS[kind].get("num_timesteps"))
    (bpd,) = attributes(kind, count, "bpd")
    assert abs(bpd.mean() - truth.mean()) < 3.5 * bpd.std(ddof=1) / math.sqrt(count)
    # and each image by itself
    images = torch.stack([run.per_image_bpd for run in runs(kind, count)]).numpy()
    z = (images.mean(0) - truth) / (images.std(0, ddof=1) / math.sqrt(count))
    assert np.abs(z).max() < 4.5
    assert 0.4 < z.std() < 1.6


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("kind", ["plain", "importance"])
def test_variance_per_call_is_that_of_the_estimates(kind, count):
    bpd, stderr, variance = attributes(kind, count, "bpd", "stderr_bpd", "variance_per_call")
    np.testing.assert_allclose(variance, stderr**2 * 8 * N, rtol=1e-12)
    assert variance.mean() == pytest.approx(bpd.var(ddof=1) * 8 * N, rel=3 * math.sqrt(2 / count))


@pytest.mark.parametrize("kind", ["plain", "importance", "target"])
def test_plain_variance_is_that_of_times_drawn_one_by_one(kind):
    bound = VariationalBound(DENOISER, FixedLinearGamma(GAMMA_0, GAMMA_1), num_levels=LEVELS)
    draws, source = 4000, seeded(5)
    t = torch.rand(draws * N, generator=source, dtype=F64)
    simulated = bound(IMAGES.repeat(draws, 1), t=t, generator=source).total.view(draws, N).var(0).mean()
    (plain,) = attributes(kind, 200, "plain_variance_per_call")
    assert plain.mean() == pytest.approx(float(simulated), rel=0.1)


def test_error_is_the_spread_of_the_repeats():
    images = torch.full((20, 1), MIDDLE)
    out = evaluate(NarrowError(), images, NARROW, num_samples=6, class_labels=torch.arange(20) % 2)
    # prior and reconstruction have no noise here
    repeats = out.diffusion_terms_bpd.mean(1)
    assert out.stderr_bpd == pytest.approx(float(repeats.std()) / math.sqrt(6), rel=1e-9)
    assert out.variance_per_call == pytest.approx(out.stderr_bpd**2 * 6 * 20, rel=1e-12)
    torch.testing.assert_close(out.per_image_bpd - out.prior_bpd, out.diffusion_terms_bpd.mean(0), rtol=0, atol=1e-9)
    single = evaluate(NarrowError(), images, NARROW, num_samples=1)
    assert math.isnan(single.variance_per_call) and math.isnan(single.plain_variance_per_call)


def test_repeats_have_times_and_noise_of_their_own():
    out = evaluate(DENOISER, IMAGES, num_samples=40)
    t = (out.gamma_t - GAMMA_0) / (GAMMA_1 - GAMMA_0)
    shifts = (t[:, 0]).numpy()
    assert stats.kstest(shifts, "uniform").pvalue > 1e-3
    assert len(np.unique(shifts)) == 40 and len(out.mse.unique()) == out.mse.numel()
    # of every repeat the same lattice
    torch.testing.assert_close((t - t[:, :1]) % 1, ((t - t[:, :1]) % 1)[:1].expand_as(t), rtol=0, atol=1e-9)


# ---- evaluations up to a target error --------------------------------------------------------------------


def test_target_is_reached_with_ten_repeats_at_least():
    stderr, repeats = attributes("target", 200, "stderr_bpd", "num_samples")
    assert (stderr <= TARGET).all()
    assert repeats.min() == 10 and len(np.unique(repeats)) > 3 and repeats.max() <= 40
    # not many more repeats than the error needs
    variance = np.mean(attributes("target", 200, "variance_per_call")[0]) / N
    assert repeats.mean() < 2 * variance / TARGET**2


def test_target_adds_repeats_and_changes_none():
    images = IMAGES[:7]
    out = evaluate(DENOISER, images, target_stderr_bpd=0.12, batch_size=3)
    assert out.num_samples > 20 and out.stderr_bpd <= 0.12
    fixed = evaluate(DENOISER, images, num_samples=out.num_samples, batch_size=3)
    for name in ("gamma_t", "mse", "diffusion_terms_bpd", "per_image_bpd"):
        assert torch.equal(getattr(out, name), getattr(fixed, name)), name
    assert (out.bpd, out.stderr_bpd) == (fixed.bpd, fixed.stderr_bpd)
    assert torch.equal(evaluate(DENOISER, images, num_samples=4).mse, out.mse[:4])


@pytest.mark.parametrize("most", [1, 3, 13, 25])
def test_a_target_that_is_not_reached_ends_at_max_samples(most):
    out = evaluate(DENOISER, IMAGES[:5], num_samples=1, target_stderr_bpd=1e-9, max_samples=most)
    assert out.num_samples == most


@pytest.mark.parametrize(("num_samples", "expected"), [(2, 10), (12, 12)])
def test_a_target_takes_ten_repeats_or_as_many_as_asked_for(num_samples, expected):
    out = evaluate(DENOISER, IMAGES[:5], num_samples=num_samples, target_stderr_bpd=1e9)
    assert out.num_samples == expected


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_targets_that_are_not_positive_are_refused(target):
    with pytest.raises(ValueError, match="target_stderr_bpd must be positive"):
        evaluate(DENOISER, IMAGES[:5], target_stderr_bpd=target)


def test_a_target_beyond_float64_ends_at_max_samples_too():
    assert evaluate(DENOISER, IMAGES[:5], target_stderr_bpd=1e-200, max_samples=12).num_samples == 12


# ---- importance sampling -----------------------------------------------------------------------------------------

NARROW = FixedLinearGamma(-13.0, 5.0)
MIDDLE = LEVELS // 2  # the level whose x is 0


class NarrowError(nn.Module):
    """ε̂ = ε (1 + (1 + label) b(γ)) for images of zeros, whose noise is z/σ: all of the loss is where b is not 0."""

    dtype = F64

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        timestep = timestep.view(-1, *[1] * (sample.ndim - 1))
        gamma = -13 + 18 * timestep / 1000
        bump = torch.exp(-0.25 * ((gamma - 2) / 0.3) ** 2)
        if class_labels is not None:
            bump = bump * (1 + class_labels.view(timestep.shape))
        return (sample / torch.sigmoid(gamma).sqrt() * (1 + bump),)


# ∫ b² dt and ∫ b⁴ dt, b² a Gaussian of width 0.3 in γ
B2, B4 = (0.3 * math.sqrt(2 * math.pi / power) / 18 for power in (1, 2))
SCALE = 0.5 * 18 / LN2


def narrow(num_images: int = 64, **kwargs):
    labels = torch.arange(num_images) % 2
    return evaluate(NarrowError(), torch.full((num_images, 1), MIDDLE), NARROW, class_labels=labels, **kwargs)


def test_importance_sampling_lowers_the_variance_of_a_narrow_loss():
    plain, importance = ([narrow(num_samples=32, seed=s, importance_sampling=i) for s in range(16)] for i in (0, 1))
    variance = [np.mean([run.variance_per_call for run in kind]) for kind in (plain, importance)]
    assert variance[1] < variance[0] / 2
    # of the draws after the first quarter alone
    late = np.mean([float(run.diffusion_terms_bpd[8:].mean(1).var()) for run in importance])
    early = np.mean([float(run.diffusion_terms_bpd[:8].mean(1).var()) for run in importance])
    assert late < early / 4
    # rare large losses: the plain draws meet few of them
    for kind, tolerance in ((plain, 0.36), (importance, 0.2)):
        terms = np.array([run.diffusion_bpd for run in kind])
        assert abs(terms.mean() - SCALE * B2 * 2.5) < 3.5 * terms.std(ddof=1) / 4
        # times drawn one by one: E loss² − (E loss)², (1 + label)⁴ is 8.5 in the mean
        expected = SCALE**2 * 8.5 * (3 * B4 - B2**2)
        assert np.mean([run.plain_variance_per_call for run in kind]) == pytest.approx(expected, rel=tolerance)


def test_the_first_quarter_is_plain_and_later_draws_follow_their_density():
    plain, out = (narrow(num_images=256, num_samples=40, importance_sampling=i) for i in (False, True))
    assert torch.equal(out.gamma_t[:10], plain.gamma_t[:10])
    assert torch.equal(out.diffusion_terms_bpd[:10], plain.diffusion_terms_bpd[:10])
    assert not torch.isclose(out.gamma_t[10:], plain.gamma_t[10:]).any(1).all()
    t = ((out.gamma_t + 13) / 18)[10:].flatten()
    terms, mse = out.diffusion_terms_bpd[10:].flatten(), out.mse[10:].flatten()
    seen = mse > 1e-250
    density = SCALE * mse / terms
    assert density[seen].min() == pytest.approx(0.1, abs=0.02) and density[seen].max() > 5
    # the length of an interval of times is the mean of 1/density over the draws between them
    weight = torch.where(seen, 1 / density, 10.0)
    for low, high in [(0, 1), *((k / 10, (k + 1) / 10) for k in range(10))]:
        inside = (t >= low) & (t < high)
        assert float((weight * inside).mean()) == pytest.approx(high - low, abs=0.01)


@pytest.mark.parametrize("num_images", [31, 64, 500, 4096])
def test_the_warp_is_the_inverse_of_a_distribution(num_images):
    t = torch.rand(num_images, generator=seeded(1), dtype=F64)
    loss = (0.01 + torch.exp(-(((t - 0.7) / 0.1) ** 2))) * torch.rand(num_images, generator=seeded(2), dtype=F64)
    warp = _measured_warp(t, loss)
    u = torch.linspace(0, 1, 200_001, dtype=F64)[:-1]
    out, density = warp(u)
    assert out[0] == 0 and 1 - 1e-3 < out[-1] <= 1
    step = out.diff()
    assert (step > 0).all()
    # du = density dt, but at the edges of the bins
    inside = density[1:] == density[:-1]
    torch.testing.assert_close(step[inside] * density[1:][inside] * 200_000, torch.ones(int(inside.sum()), dtype=F64))
    assert float(torch.trapezoid(density, out) + (1 - out[-1]) * density[-1]) == pytest.approx(1, abs=1e-3)
    bins = max(1, min(64, num_images // 16))
    assert len(density.unique()) == bins
    level = [float(loss[(t * bins).long() == k].square().mean().sqrt()) for k in range(bins)]
    wanted = 0.9 * np.array(level) / np.mean(level) + 0.1
    middle = (out * bins).long().clamp(max=bins - 1)
    np.testing.assert_allclose([float(density[middle == k].median()) for k in range(bins)], wanted, rtol=1e-9)


def test_the_warp_of_a_zero_loss_is_the_identity():
    u = torch.rand(100, generator=seeded(), dtype=F64)
    for t, loss in ((u, torch.zeros_like(u)), (u[:5], u[:5])):
        out, density = _measured_warp(t, loss)(u)
        torch.testing.assert_close(out, u, rtol=0, atol=1e-14)
        assert (density == 1).all()


def test_importance_sampling_does_not_depend_on_the_batch():
    out, other = (narrow(num_samples=8, importance_sampling=True, batch_size=size) for size in (64, 5))
    torch.testing.assert_close(out.per_image_bpd, other.per_image_bpd, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.gamma_t, other.gamma_t, rtol=1e-12, atol=0)
