"""diffusion.py: the equations in γ, against mpmath at 60 digits, Bayes' rule and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusers_vdm import diffusion
from tests.oracles import (
    MP,
    mp_alpha_squared,
    mp_level_log_probs,
    mp_posterior,
    mp_prior_kl,
    mp_sigma_squared,
    mp_step_weight,
)
from tests.tensors import f64, normal_from

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
EXTREME_GAMMAS = [-30.0, -13.3, -1e-3, 0.0, 0.7, 5.0, 30.0]
# neighbors of a chain of 1e5 steps, of a chain of 1000 steps, and the ends of everything
GAMMA_PAIRS = [(-13.3, -13.2817), (-13.3, -13.299817), (-30.0, -29.9), (-30.0, 30.0), (4.9817, 5.0), (29.0, 30.0)]


# ---- α, σ, SNR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", EXTREME_GAMMAS)
def test_coefficients_are_exact_to_the_last_digits(gamma):
    alpha_squared, sigma_squared = mp_alpha_squared(gamma), mp_sigma_squared(gamma)
    assert float(diffusion.alpha(f64(gamma))) == pytest.approx(float(MP.sqrt(alpha_squared)), rel=1e-14, abs=0)
    assert float(diffusion.sigma(f64(gamma))) == pytest.approx(float(MP.sqrt(sigma_squared)), rel=1e-14, abs=0)
    assert float(diffusion.snr(f64(gamma))) == pytest.approx(float(alpha_squared / sigma_squared), rel=1e-14, abs=0)
    assert float(diffusion.log_alpha_squared(f64(gamma))) == pytest.approx(
        float(MP.log(alpha_squared)), rel=1e-14, abs=0
    )


@pytest.mark.parametrize("gamma", EXTREME_GAMMAS)
def test_sigma_keeps_its_digits_in_float32(gamma):
    # √(1 − α²) in float32 is off by 1.7 % at −13.3
    exact = float(MP.sqrt(mp_sigma_squared(gamma)))
    assert float(diffusion.sigma(torch.tensor(gamma))) == pytest.approx(exact, rel=2e-6, abs=0)


def test_variance_is_preserved():
    gamma = torch.linspace(-30, 30, 601, dtype=torch.float64)
    total = diffusion.alpha(gamma).square() + diffusion.sigma(gamma).square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=5e-16)


@pytest.mark.parametrize("gamma", [*EXTREME_GAMMAS, -200.0, 29.999, 30.001, 200.0])
def test_gamma_comes_back_from_log_alpha_squared(gamma):
    # log ᾱ from mpmath: near ᾱ = 1 it is −1e-87, and γ keeps its digits
    log_alpha_squared = f64(float(MP.log(mp_alpha_squared(gamma))) if gamma > -100 else -math.exp(gamma))
    assert float(diffusion.gamma_from_log_alpha_squared(log_alpha_squared)) == pytest.approx(
        gamma, rel=1e-14, abs=1e-14
    )


def test_the_noise_free_end():
    gamma = f64(-math.inf)
    assert float(diffusion.alpha(gamma)) == 1 and float(diffusion.sigma(gamma)) == 0
    assert float(diffusion.log_alpha_squared(gamma)) == 0
    assert float(diffusion.gamma_from_log_alpha_squared(f64(0.0))) == -math.inf


# ---- x, ε, v -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [f64(-13.3), f64(5.0), f64([-13.3, 0.2, 5.0])], ids=["clean", "noisy", "batch"])
def test_x_eps_and_v_are_the_same_information(generator, gamma):
    x, eps = normal_from(generator, 3, 2, 4), normal_from(generator, 3, 2, 4)
    z_t, v = diffusion.q_sample(x, eps, gamma), diffusion.velocity(x, eps, gamma)
    for prediction_type, output in [("epsilon", eps), ("sample", x), ("v_prediction", v)]:
        x_hat, eps_hat = diffusion.predicted_x_and_eps(output, z_t, gamma, prediction_type)
        torch.testing.assert_close(x_hat, x, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(eps_hat, eps, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(diffusion.x_from_eps(z_t, eps, gamma), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(diffusion.eps_from_x(z_t, x, gamma), eps, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_the_error_weight_turns_any_error_into_that_of_eps(generator, prediction_type):
    gamma = f64([-13.3, -2.0, 5.0])
    x, eps, wrong = normal_from(generator, 3, 4), normal_from(generator, 3, 4), normal_from(generator, 3, 4)
    z_t = diffusion.q_sample(x, eps, gamma)
    target = {"epsilon": eps, "sample": x, "v_prediction": diffusion.velocity(x, eps, gamma)}[prediction_type]
    # a small error: at γ = −13.3 it is 800 times as large in ε as in x
    output = target + 1e-3 * wrong
    eps_hat = diffusion.predicted_x_and_eps(output, z_t, gamma, prediction_type)[1]
    weight = diffusion.eps_error_weight(gamma, prediction_type)
    expected = (eps - eps_hat).square().sum(1)
    torch.testing.assert_close(weight * (target - output).square().sum(1), expected, rtol=1e-9, atol=0)


def test_velocity_is_the_derivative_along_the_circle(generator):
    # v = dz/dφ with α = cos φ, σ = sin φ [Salimans & Ho 2022, app. D]: this test finds a sign error
    x, eps, phi, h = normal_from(generator, 5), normal_from(generator, 5), 0.8, 1e-5
    z = [diffusion.q_sample(x, eps, f64(2 * math.log(math.tan(p)))) for p in (phi - h, phi + h)]
    v = diffusion.velocity(x, eps, f64(2 * math.log(math.tan(phi))))
    torch.testing.assert_close((z[1] - z[0]) / (2 * h), v, rtol=0, atol=1e-9)


# ---- the posterior -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma_s", "gamma_t"), GAMMA_PAIRS)
def test_posterior_is_the_papers_to_all_digits(gamma_s, gamma_t):
    on_z_t, on_x, variance = mp_posterior(gamma_s, gamma_t)
    one, zero = f64([1.0]), f64([0.0])
    gammas = (f64(gamma_s), f64(gamma_t))
    # the difference of the float64 numbers γ_t − γ_s itself holds 1e-15·30/1e-4
    rel = 1e-15 * 40 / (gamma_t - gamma_s) + 1e-13
    assert float(diffusion.posterior(one, zero, *gammas)[0]) == pytest.approx(float(on_z_t), rel=rel, abs=0)
    mean, std = diffusion.posterior(zero, one, *gammas)
    assert float(mean) == pytest.approx(float(on_x), rel=rel, abs=0)
    assert float(std) == pytest.approx(float(MP.sqrt(variance)), rel=rel, abs=0)


def test_posterior_is_bayes_rule_on_a_grid():
    # q(z_s | z_t, x) ∝ q(z_t | z_s) q(z_s | x), normalized by brute force
    gamma_s, gamma_t, x, z_t = f64(-1.0), f64(0.5), 0.7, -0.4
    a_s, s_s, a_t, s_t = (float(f(g)) for g in (gamma_s, gamma_t) for f in (diffusion.alpha, diffusion.sigma))
    grid = np.linspace(-6, 6, 40001)
    ratio = a_t / a_s
    log_p = -0.5 * (z_t - ratio * grid) ** 2 / (s_t**2 - (ratio * s_s) ** 2) - 0.5 * (grid - a_s * x) ** 2 / s_s**2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean, std = diffusion.posterior(f64([z_t]), f64([x]), gamma_s, gamma_t)
    assert float(mean) == pytest.approx((p * grid).sum(), abs=1e-10)
    assert float(std) ** 2 == pytest.approx((p * (grid - (p * grid).sum()) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("gammas", [(-13.3, -4.0, 5.0), (-13.3, -13.28, -13.26), (-math.inf, -9.0, 2.0)])
def test_two_steps_of_the_posterior_are_one_in_law(gammas):
    # t → s → r has the mean and the variance of t → r
    gamma_r, gamma_s, gamma_t = (f64(g) for g in gammas)
    z_t, x = f64([1.3]), f64([-0.6])
    mean_s, std_s = diffusion.posterior(z_t, x, gamma_s, gamma_t)
    mean_r, std_r = diffusion.posterior(mean_s, x, gamma_r, gamma_s)
    on_z_s = diffusion.posterior(mean_s + 1, x, gamma_r, gamma_s)[0] - mean_r
    mean, std = diffusion.posterior(z_t, x, gamma_r, gamma_t)
    torch.testing.assert_close(mean_r, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        (on_z_s * std_s).square() + std_r.square(), std.square().expand(1), rtol=1e-9, atol=1e-24
    )


def test_posterior_of_the_forward_process_has_its_marginal():
    # z_s drawn by way of z_t is z_s drawn from x: mean α_s x, variance σ_s²
    gamma_s, gamma_t, x = f64(-6.0), f64(-2.0), f64([0.8])
    mean = diffusion.posterior(diffusion.alpha(gamma_t) * x, x, gamma_s, gamma_t)[0]
    torch.testing.assert_close(mean, diffusion.alpha(gamma_s) * x)
    on_z_t = diffusion.posterior(f64([1.0]), f64([0.0]), gamma_s, gamma_t)[0]
    variance = (on_z_t * diffusion.sigma(gamma_t)).square() + diffusion.posterior(x, x, gamma_s, gamma_t)[1].square()
    torch.testing.assert_close(variance, diffusion.sigma(gamma_s).square().expand(1))


@pytest.mark.parametrize(("gamma_s", "gamma_t"), [*GAMMA_PAIRS[:5], (-math.inf, -9.2), (-math.inf, 5.0)])
def test_ancestral_step_is_the_posterior_at_x_hat(generator, gamma_s, gamma_t):
    z_t, eps_hat = normal_from(generator, 2, 3), normal_from(generator, 2, 3)
    x_hat = diffusion.x_from_eps(z_t, eps_hat, f64(gamma_t))
    for mine, theirs in zip(
        diffusion.ancestral_step(z_t, eps_hat, f64(gamma_s), f64(gamma_t)),
        diffusion.posterior(z_t, x_hat, f64(gamma_s), f64(gamma_t)),
        strict=True,
    ):
        # at γ_t = 30, x̂ is 3e6 times as large as its part in the mean
        scale = max(1.0, float(diffusion.alpha(f64(gamma_s)) / diffusion.alpha(f64(gamma_t))))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12 * scale)


def test_the_last_step_to_clean_data_is_x_hat_without_noise(generator):
    z_t, eps_hat = normal_from(generator, 4), normal_from(generator, 4)
    mean, std = diffusion.ancestral_step(z_t, eps_hat, f64(-math.inf), f64(-9.21))
    torch.testing.assert_close(mean, diffusion.x_from_eps(z_t, eps_hat, f64(-9.21)))
    assert float(std) == 0


def test_coefficients_of_a_small_step_survive_float32_data():
    # c = −expm1(γ_s − γ_t) from float32 γ is off by 1e-2 at T = 1e5; the data may be float32 all the same
    gamma_s, gamma_t = f64(-13.3), f64(-13.3 + 18.3e-5)
    std = diffusion.posterior(torch.zeros(1), torch.zeros(1), gamma_s, gamma_t)[1]
    assert std.dtype == torch.float32
    assert float(std) == pytest.approx(
        float(MP.sqrt(mp_posterior(float(gamma_s), float(gamma_t))[2])), rel=1e-6, abs=0
    )


@pytest.mark.parametrize("function", [diffusion.posterior, diffusion.ancestral_step])
@pytest.mark.parametrize(
    ("gamma_s", "gamma_t"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), ([0.0, 3.0], [1.0, 2.0])]
)
def test_steps_against_the_order_of_noise_are_refused(function, gamma_s, gamma_t):
    with pytest.raises(ValueError, match="gamma_s must be below gamma_t"):
        function(torch.zeros(2, 1), torch.zeros(2, 1), f64(gamma_s), f64(gamma_t))


# ---- weights and the prior ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma_s", "gamma_t"), GAMMA_PAIRS)
def test_step_weight_is_half_the_loss_of_snr(gamma_s, gamma_t):
    weight = float(diffusion.step_weight(f64(gamma_s), f64(gamma_t)))
    assert weight == pytest.approx(float(mp_step_weight(gamma_s, gamma_t)), rel=1e-13 + 4e-14 / (gamma_t - gamma_s))


def test_step_weight_is_the_kl_of_the_two_posteriors(generator):
    gamma_s, gamma_t = f64(-3.0), f64(-2.5)
    x, eps, eps_hat = normal_from(generator, 6), normal_from(generator, 6), normal_from(generator, 6)
    z_t = diffusion.q_sample(x, eps, gamma_t)
    q = Normal(*diffusion.posterior(z_t, x, gamma_s, gamma_t))
    p = Normal(*diffusion.ancestral_step(z_t, eps_hat, gamma_s, gamma_t))
    expected = diffusion.step_weight(gamma_s, gamma_t) * (eps - eps_hat).square()
    torch.testing.assert_close(kl_divergence(q, p), expected, rtol=1e-10, atol=1e-12)


def test_step_weight_tends_to_half_the_slope():
    # ½ expm1(Δ) = ½ Δ (1 + Δ/2 + …): first order in the step
    deltas = f64([1e-2, 1e-4, 1e-6])
    ratio = diffusion.step_weight(f64(1.0) - deltas, f64(1.0)) / (0.5 * deltas)
    torch.testing.assert_close((ratio - 1) / deltas, torch.full((3,), 0.5, dtype=torch.float64), rtol=4e-3, atol=1e-4)


@pytest.mark.parametrize("gamma", [-13.3, 0.0, 5.0])
def test_prior_kl_is_that_of_torch_distributions(generator, gamma):
    x = torch.rand(4, 3, generator=generator, dtype=torch.float64) * 2 - 1
    q = Normal(diffusion.alpha(f64(gamma)) * x, diffusion.sigma(f64(gamma)))
    expected = kl_divergence(q, Normal(f64(0.0), f64(1.0)))
    torch.testing.assert_close(diffusion.prior_kl_nats(x, f64(gamma)), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
def test_prior_kl_keeps_its_digits_where_it_nearly_vanishes(x):
    # at x = 0 it is ¼ α⁴ = 2e-27 for γ = 30, where σ² itself, next to 1, has only three digits of α² left
    for gamma, rel in ((30.0, 1e-3), (11.0, 1e-9)):
        result = float(diffusion.prior_kl_nats(f64([x]), f64(gamma)))
        assert result == pytest.approx(float(mp_prior_kl(x, gamma)), rel=rel, abs=0)


# ---- shapes and types --------------------------------------------------------------------------------------------


def test_a_batch_of_gammas_equals_the_samples_one_by_one(generator):
    x, eps = normal_from(generator, 3, 2, 4, 4), normal_from(generator, 3, 2, 4, 4)
    gamma_s, gamma_t = f64([-13.3, -1.0, 3.0]), f64([-13.0, 0.0, 5.0])
    levels = torch.randint(0, 256, (3, 2, 4, 4), generator=generator)
    calls = {
        "q_sample": lambda i: diffusion.q_sample(x[i], eps[i], gamma_t[i]),
        "velocity": lambda i: diffusion.velocity(x[i], eps[i], gamma_t[i]),
        "x_from_eps": lambda i: diffusion.x_from_eps(x[i], eps[i], gamma_t[i]),
        "eps_from_x": lambda i: diffusion.eps_from_x(x[i], eps[i], gamma_t[i]),
        "posterior": lambda i: diffusion.posterior(x[i], eps[i], gamma_s[i], gamma_t[i])[0],
        "ancestral_step": lambda i: diffusion.ancestral_step(x[i], eps[i], gamma_s[i], gamma_t[i])[0],
        "prior_kl": lambda i: diffusion.prior_kl_nats(x[i], gamma_t[i]),
        "decoder": lambda i: diffusion.decoder_log_prob_nats(levels[i], x[i], gamma_t[i]),
        "decode": lambda i: diffusion.decode(x[i], gamma_t[i]),
    }
    for name, call in calls.items():
        singles = torch.cat([call(slice(i, i + 1)) for i in range(3)])
        torch.testing.assert_close(call(slice(None)), singles, rtol=1e-12, atol=1e-12, msg=name)
    std = diffusion.posterior(x, eps, gamma_s, gamma_t)[1]
    assert std.shape == (3, 1, 1, 1)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (3, 1, 1, 1)])
def test_gammas_that_do_not_fit_the_batch_are_refused(shape):
    with pytest.raises(ValueError, match=r"gamma must have shape \(\) or \(3,\)"):
        diffusion.q_sample(torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [f64(-1.0), f64([-1.0, -1.0])], ids=["scalar", "batch"])
def test_half_precision_is_promoted_to_float32(generator, dtype, gamma):
    # a γ of shape () must not let the arithmetic sink to the type of the data: torch ignores the type of scalars
    x, eps = (normal_from(generator, 2, 5).to(dtype) for _ in range(2))
    results = {
        "q_sample": lambda a, b: diffusion.q_sample(a, b, gamma),
        "velocity": lambda a, b: diffusion.velocity(a, b, gamma),
        "x_from_eps": lambda a, b: diffusion.x_from_eps(a, b, gamma),
        "eps_from_x": lambda a, b: diffusion.eps_from_x(a, b, gamma),
        "v_prediction": lambda a, b: diffusion.predicted_x_and_eps(b, a, gamma, "v_prediction")[0],
        "posterior": lambda a, b: diffusion.posterior(a, b, gamma - 1, gamma)[0],
        "ancestral_step": lambda a, b: diffusion.ancestral_step(a, b, gamma - 1, gamma)[0],
        "prior_kl": lambda a, b: diffusion.prior_kl_nats(a, gamma),
        "decoder": lambda a, b: diffusion.decoder_log_prob_nats(torch.full((2, 5), 100), a, gamma),
    }
    for name, function in results.items():
        result = function(x, eps)
        assert result.dtype == torch.float32, name
        expected = function(x.double(), eps.double()).float()
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_of_half_precision_is_that_of_the_same_numbers(generator, dtype):
    z_0 = normal_from(generator, 1, 4000).to(dtype)
    for gamma in (f64(-13.3), f64([-13.3])):
        assert torch.equal(diffusion.decode(z_0, gamma), diffusion.decode(z_0.float(), gamma))


@pytest.mark.parametrize("name", ["eps", "", None, "Epsilon", "v"])
def test_unknown_prediction_types_are_refused(name):
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        diffusion.predicted_x_and_eps(torch.zeros(1), torch.zeros(1), f64(0.0), name)
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        diffusion.eps_error_weight(f64(0.0), name)


def test_no_function_changes_its_arguments(generator):
    x, eps = normal_from(generator, 2, 3), normal_from(generator, 2, 3)
    gamma_s, gamma_t, levels = f64([-2.0, -1.0]), f64([-1.0, 0.0]), torch.tensor([[0, 1, 2], [3, 4, 5]])
    before = [a.clone() for a in (x, eps, gamma_s, gamma_t, levels)]
    diffusion.q_sample(x, eps, gamma_t)
    diffusion.predicted_x_and_eps(x, eps, gamma_t, "v_prediction")
    diffusion.posterior(x, eps, gamma_s, gamma_t)
    diffusion.ancestral_step(x, eps, gamma_s, gamma_t)
    diffusion.decoder_log_prob_nats(levels, x, gamma_t, 8)
    diffusion.decode(x, gamma_t, 8, draw=True, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, eps, gamma_s, gamma_t, levels), strict=True))


# ---- integers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 17, 256, 65536])
def test_levels_are_recovered_from_data(num_levels):
    levels = torch.arange(num_levels)
    x = diffusion.x_from_levels(levels, num_levels)
    assert torch.equal(diffusion.nearest_levels(x, num_levels), levels)
    assert float(x[0]) == pytest.approx(-1 + 1 / num_levels) and float(x[-1]) == pytest.approx(1 - 1 / num_levels)
    assert torch.equal(
        diffusion.nearest_levels(torch.tensor([-9.0, -1.0, 1.0, 9.0]), num_levels) // (num_levels // 2),
        torch.tensor([0, 0, 1, 1]) * (num_levels - 1) // (num_levels // 2),
    )
    # values up to almost half a step away still belong to the level
    hair = (0.49 * 2 / num_levels) * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    near = diffusion.x_from_levels(levels, num_levels, torch.float64) + hair
    assert torch.equal(diffusion.nearest_levels(near, num_levels), levels.expand(2, -1))


def test_levels_of_uint8_do_not_overflow():
    assert float(diffusion.x_from_levels(torch.tensor([255], dtype=torch.uint8))) == pytest.approx(255 / 256)


def dense_log_probs(z_0, gamma_0, num_levels):
    """log p of every level, `(..., num_levels)`, as the official decoder does it."""
    x = (2 * torch.arange(num_levels, dtype=z_0.dtype) + 1) / num_levels - 1
    alpha, precision = torch.sigmoid(-gamma_0).sqrt(), torch.exp(-gamma_0)
    for _ in range(z_0.ndim - gamma_0.ndim):
        alpha, precision = alpha[..., None], precision[..., None]
    return (-0.5 * precision[..., None] * ((z_0 / alpha)[..., None] - x).square()).log_softmax(-1)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("gamma_0", [-15.0, -13.3, -9.0, -5.0, 0.0, 5.0])
class TestDecoder:
    def latents(self, num_levels, gamma_0, generator):
        """z_0 of random data, on a border of two levels, and far outside of the data range."""
        x = diffusion.x_from_levels(
            torch.randint(0, num_levels, (40,), generator=generator), num_levels, torch.float64
        )
        z_0 = diffusion.q_sample(x, normal_from(generator, 40), f64(gamma_0))
        outside = f64([-100.0, -3.0, -1.0, 1.0, 1.02, 3.0, 100.0]) * diffusion.alpha(f64(gamma_0))
        border = f64([2 * (num_levels // 2) / num_levels - 1]) * diffusion.alpha(f64(gamma_0))
        return torch.cat([z_0, outside, border])

    def test_sums_to_one(self, num_levels, gamma_0, generator):
        z_0 = self.latents(num_levels, gamma_0, generator)
        levels = torch.arange(num_levels)[:, None].expand(-1, len(z_0))
        log_p = diffusion.decoder_log_prob_nats(levels, z_0.expand(num_levels, -1), f64(gamma_0), num_levels)
        assert log_p.shape == (num_levels, len(z_0)) and bool((log_p <= 0).all())
        torch.testing.assert_close(log_p.exp().sum(0), torch.ones_like(z_0), rtol=0, atol=1e-9)

    def test_values_and_gradients_are_those_of_the_dense_softmax(self, num_levels, gamma_0, generator):
        z_0 = self.latents(num_levels, gamma_0, generator)[:44]
        levels = torch.randint(0, num_levels, (len(z_0),), generator=generator)
        levels[: len(z_0) // 2] = diffusion.nearest_levels(
            z_0[: len(z_0) // 2] / diffusion.alpha(f64(gamma_0)), num_levels
        )
        results = []
        for function in (
            lambda z, g: diffusion.decoder_log_prob_nats(levels, z, g, num_levels),
            lambda z, g: dense_log_probs(z, g, num_levels).gather(-1, levels[:, None])[:, 0],
        ):
            z, g = z_0.clone().requires_grad_(), f64(gamma_0).requires_grad_()
            log_p = function(z, g)
            weights = torch.linspace(0.5, 1.5, len(z_0), dtype=torch.float64)
            grads = torch.autograd.grad((weights * log_p).sum(), (z, g))
            results.append((log_p.detach(), *grads))
        for mine, dense in zip(*results, strict=True):
            scale = float(dense.abs().max())
            torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-13 * scale + 1e-12)


@pytest.mark.parametrize(("num_levels", "gamma_0"), [(2, -1.0), (17, -3.0), (17, 2.0), (256, -8.0), (256, -9.7)])
def test_decoder_gradcheck(generator, num_levels, gamma_0):
    x = diffusion.x_from_levels(torch.randint(0, num_levels, (2, 3), generator=generator), num_levels, torch.float64)
    gammas = f64([gamma_0, gamma_0 + 0.3]).requires_grad_()
    z_0 = diffusion.q_sample(x, normal_from(generator, 2, 3), gammas.detach()).requires_grad_()
    levels = diffusion.nearest_levels(z_0.detach(), num_levels)
    for gamma in (gammas, gammas.detach()[0].requires_grad_()):
        assert torch.autograd.gradcheck(
            lambda z, g: diffusion.decoder_log_prob_nats(levels, z, g, num_levels), (z_0, gamma), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("gamma_0", [-15.0, -5.0, 5.0])
@pytest.mark.parametrize("z_0", [0.3, -0.99, 1.5, 50.0])
def test_decoder_is_that_of_mpmath(gamma_0, z_0):
    exact = f64([float(v) for v in mp_level_log_probs(z_0, gamma_0, 17)])
    log_p = diffusion.decoder_log_prob_nats(torch.arange(17), f64(z_0).expand(17), f64(gamma_0), 17)
    torch.testing.assert_close(log_p, exact, rtol=1e-11, atol=1e-11)


def test_float32_decoder_is_good_to_2e_8_bits_per_dimension(generator):
    # γ_0 = −13.3: logits reach 1.2e6, and bfloat16 gives 0.072 bits/dim for 0.0090
    levels = torch.randint(0, 256, (300_000,), generator=generator)
    gamma_0 = f64(-13.3)
    z_0 = diffusion.q_sample(
        diffusion.x_from_levels(levels), normal_from(generator, len(levels), dtype=torch.float32), gamma_0
    )
    results = [
        -diffusion.decoder_log_prob_nats(levels, z, gamma_0).double().mean() / math.log(2) for z in (z_0, z_0.double())
    ]
    assert 0.005 < float(results[1]) < 0.015
    assert float(results[0]) == pytest.approx(float(results[1]), abs=4e-8)


@pytest.mark.parametrize("gamma_0", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("z_0", [5.0, 1000.0])
def test_float32_decoder_keeps_its_digits_far_outside_of_the_data(z_0, gamma_0):
    # an untrained network may give any z_0: −½ P (y − x)² and the normalizer are then large, their difference is not
    z_32 = torch.full((256,), z_0)
    log_p = diffusion.decoder_log_prob_nats(torch.arange(256), z_32, f64(gamma_0))
    exact = dense_log_probs(z_32.double()[:1], f64(gamma_0), 256)[0]
    torch.testing.assert_close(log_p.double(), exact, rtol=3e-5, atol=3e-5)


def test_an_upper_bound_of_gamma_0_changes_nothing(generator):
    levels = torch.randint(0, 256, (50,), generator=generator)
    gamma_0 = f64(-9.0)
    z_0 = diffusion.q_sample(diffusion.x_from_levels(levels, dtype=torch.float64), normal_from(generator, 50), gamma_0)
    plain = diffusion.decoder_log_prob_nats(levels, z_0, gamma_0)
    for bound in (-9.0, -5.0, 30.0):
        bounded = diffusion.decoder_log_prob_nats(levels, z_0, gamma_0, max_gamma_0=bound)
        torch.testing.assert_close(bounded, plain, rtol=1e-12, atol=1e-13)


def test_no_tensor_has_an_axis_of_levels(generator):
    # (B, C, H, W, 256) would be 256 times the image: what is saved for the backward pass, and what is ever made
    z_0 = normal_from(generator, 2, 3, 8, 8).requires_grad_()
    gamma_0 = f64(-8.0).requires_grad_()
    levels = torch.randint(0, 256, z_0.shape, generator=generator)
    saved, made = [], []

    class LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(o.numel() for o in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(o))
            return out

    with (
        LargestResult(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        log_p = diffusion.decoder_log_prob_nats(levels, z_0, gamma_0)
    assert len(made) > 256  # the mode has seen the loop over the levels
    assert max(made) <= z_0.numel() and max(saved) <= z_0.numel()
    assert sum(saved) <= 12 * z_0.numel()
    log_p.sum().backward()
    assert z_0.grad is not None and gamma_0.grad is not None


@pytest.mark.parametrize("gamma_0", [math.inf, math.nan, -math.inf])
def test_a_gamma_0_that_is_not_finite_is_refused_by_the_decoder(gamma_0):
    with pytest.raises(ValueError, match="gamma_0 must be finite"):
        diffusion.decoder_log_prob_nats(torch.tensor([3]), torch.zeros(1), f64(gamma_0))


def test_a_gamma_0_that_is_not_finite_for_one_sample_of_a_batch_is_refused():
    with pytest.raises(ValueError, match="gamma_0 must be finite"):
        diffusion.decoder_log_prob_nats(torch.tensor([3, 3]), torch.zeros(2), f64([-math.inf, -5.0]))


# ---- decode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_mode_is_the_most_probable_level(generator, num_levels):
    gamma_0 = f64(-6.0)
    z_0 = normal_from(generator, 500)
    expected = dense_log_probs(z_0, gamma_0, num_levels).argmax(-1)
    result = diffusion.decode(z_0, gamma_0, num_levels)
    assert result.dtype == torch.int64 and torch.equal(result, expected)


@pytest.mark.parametrize(("num_levels", "gamma_0"), [(2, 0.0), (17, -4.0), (17, 3.0), (256, -9.0)])
def test_draws_have_the_frequencies_of_the_decoder(generator, num_levels, gamma_0):
    num = 40_000
    for z in (0.013, 0.93):
        counts = torch.bincount(
            diffusion.decode(f64(z).expand(num), f64(gamma_0), num_levels, draw=True, generator=generator),
            minlength=num_levels,
        ).double()
        expected = num * dense_log_probs(f64([z]), f64(gamma_0), num_levels)[0].exp()
        often = expected > 5
        chi_squared = float(((counts - expected).square() / expected)[often].sum())
        freedom = int(often.sum())
        assert chi_squared < freedom + 4 * math.sqrt(2 * freedom) + 4, (z, chi_squared, freedom)
        assert float(counts[~often].sum()) < 30


def test_the_noise_free_end_decodes_to_the_nearest_level_and_draws_nothing(generator):
    x = torch.rand(100, generator=generator) * 2 - 1
    before = generator.get_state()
    for draw in (False, True):
        result = diffusion.decode(x, f64(-math.inf), draw=draw, generator=generator)
        assert torch.equal(result, diffusion.nearest_levels(x))
    assert torch.equal(generator.get_state(), before)


def test_a_batch_with_one_noise_free_sample_decodes_each_by_its_own_level(generator):
    z_0 = torch.full((2, 2000), 0.101)
    levels = diffusion.decode(z_0, f64([-math.inf, -5.0]), draw=True, generator=generator)
    assert torch.equal(levels[0], diffusion.nearest_levels(z_0[0]))
    assert len(levels[1].unique()) > 10


def test_draws_take_one_generator_for_each_sample():
    z_0 = torch.full((3, 50), 0.2)
    seeds = [11, 12, 13]
    together = diffusion.decode(z_0, f64(0.0), draw=True, generator=[torch.Generator().manual_seed(s) for s in seeds])
    alone = [
        diffusion.decode(z_0[:1], f64(0.0), draw=True, generator=[torch.Generator().manual_seed(s)]) for s in seeds
    ]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])
