"""schedulers.py: exact on Gaussian data, equal to diffusers on the same betas, and schedulers as diffusers wants."""

import copy
import inspect
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_vdm import (
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    TableGamma,
    VDMScheduler,
    diffusion,
)
from tests.models import tiny_unet
from tests.oracles import (
    GaussianData,
    GaussianDenoiser,
    gamma_of_timestep,
    official_sampling_step,
    published_wrong_scale_step,
)
from tests.tensors import normal_from, seeded

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
# learned ends outside and inside of the configured −13.3 … 5, a bent γ(t), and the straight line
CURVED = [-13.3, -12.0, -7.0, -6.5, 0.0, 3.0, 4.5, 5.0]
MAKERS = {
    "vdm": VDMScheduler,
    "vdm_curved": lambda **kwargs: VDMScheduler(trained_gammas=CURVED, **kwargs),
    "vdm_wider": lambda **kwargs: VDMScheduler(trained_gammas=[-14.0, -3.0, 6.0], **kwargs),
    "vdm_narrower": lambda **kwargs: VDMScheduler(trained_gammas=[-12.0, -3.0, 4.0], **kwargs),
    "linear_beta": LinearBetaScheduler,
    "linear_beta_200": lambda **kwargs: LinearBetaScheduler(num_train_timesteps=200, **kwargs),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def scheduler(make):
    return make()


def gamma_of(scheduler):
    """timesteps → γ, from the config alone."""
    schedule = scheduler.noise_schedule()
    return lambda timesteps: gamma_of_timestep(schedule, timesteps)


def run_chain(scheduler, z, denoiser, generator):
    for t in scheduler.timesteps:
        z = scheduler.step(denoiser(z, t, return_dict=False)[0], t, z, generator=generator, return_dict=False)[0]
    return z


def exact_chain(scheduler, data):
    """Mean and variance after each step from N(0, 1), without sampling: a step on Gaussian data is affine in z.

    Returns `(mean, variance)` lists, one entry a step.
    """
    mean, variance, means, variances = 0.0, 1.0, [], []
    for i, t in enumerate(scheduler.timesteps):
        gamma = gamma_of(scheduler)(t)
        at = {}
        for z in (0.0, 1.0):
            sample = torch.full((2,), z, dtype=torch.float64)
            at[z] = scheduler.step(data.eps_hat(sample, gamma), t, sample, generator=seeded(i), return_dict=False)[0]
        noise = torch.randn(2, generator=seeded(i), dtype=torch.float64)
        std = float((at[0.0][0] - at[0.0][1]) / (noise[0] - noise[1]))
        slope = float((at[1.0] - at[0.0])[0])
        mean = slope * mean + float(at[0.0][0] - std * noise[0])
        variance = slope**2 * variance + std**2
        means.append(mean)
        variances.append(variance)
    return means, variances


# ---- (1) Gaussian data -------------------------------------------------------------------------------------------


def test_the_sampler_is_right_on_gaussian_data(generator):
    # mean 0.000 and variance 0.248; the next tests hold the mistakes of a published sampler
    scheduler = VDMScheduler()
    scheduler.set_timesteps(1000)
    denoiser = GaussianDenoiser(scheduler.noise_schedule(), mean=0.0, variance=0.25)
    z = run_chain(scheduler, normal_from(generator, 60_000, 1), denoiser, generator)
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.var()) == pytest.approx(0.248, abs=0.005)
    # the same without the noise of a finite number of samples
    means, variances = exact_chain(scheduler, GaussianData())
    assert means[-1] == pytest.approx(0, abs=1e-9)
    assert variances[-1] == pytest.approx(0.2477, abs=2e-4)


@pytest.mark.parametrize(
    ("step", "uniform", "mean", "variance"),
    [
        (official_sampling_step, False, 0.0, 0.248),
        (published_wrong_scale_step, False, 0.0, 0.137),
        (official_sampling_step, True, 5.6, None),
    ],
    ids=["right", "one_minus_alpha", "rand_for_randn"],
)
def test_the_published_mistakes_would_not_pass(step, uniform, mean, variance):
    # the three samplers in numpy: the tolerances of the test above separate them
    generator = np.random.default_rng(0)
    gammas = np.linspace(5, -13.3, 1001)
    data = GaussianData()
    z = generator.standard_normal(4000)
    for gamma_t, gamma_s in zip(gammas, gammas[1:], strict=False):
        noise = generator.random(4000) if uniform else generator.standard_normal(4000)
        z = step(z, data.eps_hat(z, float(gamma_t)), gamma_s, gamma_t, noise)
    assert z.mean() == pytest.approx(mean, abs=0.05)
    if variance is not None:
        assert z.var() == pytest.approx(variance, abs=0.015)


@pytest.mark.parametrize("name", ["vdm", "vdm_curved", "vdm_wider", "linear_beta"])
def test_every_level_of_the_chain_has_the_marginal_of_the_forward_process(name):
    # to first order in 1/T: twice the steps, half the error, at all levels at once
    data = GaussianData(mean=0.4, variance=0.09)
    errors = []
    for num_steps in (125, 250, 500):
        scheduler = MAKERS[name]()
        scheduler.set_timesteps(num_steps)
        means, variances = exact_chain(scheduler, data)
        gammas = [*gamma_of(scheduler)(scheduler.timesteps)[1:].tolist(), float(scheduler.final_gamma)]
        marginals = [data.marginal(gamma) for gamma in gammas]
        errors.append(
            (
                max(abs(m - exact) for m, (exact, _) in zip(means, marginals, strict=True)),
                max(abs(v / exact - 1) for v, (_, exact) in zip(variances, marginals, strict=True)),
            )
        )
    assert errors[-1][1] < 0.06 and errors[-1][0] < 0.035
    # the mean keeps an error that no number of steps removes: the chain starts from N(0, 1), not from q(z_1)
    assert errors[0][1] > 1.6 * errors[1][1] > 2.4 * errors[2][1], errors


@pytest.mark.parametrize("num_steps", [1, 2, 3, 49, 999, 1000, 1001, 2500])
def test_any_number_of_steps_is_the_official_sampler(num_steps):
    scheduler = VDMScheduler(trained_gammas=CURVED)
    scheduler.set_timesteps(num_steps)
    assert scheduler.num_inference_steps == num_steps == len(scheduler.timesteps)
    assert scheduler.timesteps.dtype == torch.float32 and bool((scheduler.timesteps.diff() < 0).all())
    t = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
    gammas = TableGamma(CURVED)(t)
    expected = 1000 * (gammas[:-1] + 13.3) / 18.3
    torch.testing.assert_close(scheduler.timesteps, expected.float(), rtol=2e-7, atol=0)

    z, generator = normal_from(seeded(1), 5), seeded(2)
    reference, other = z.numpy(), seeded(2)
    for i, timestep in enumerate(scheduler.timesteps):
        eps_hat = torch.sin(3 * z) + 0.1 * i / num_steps
        z = scheduler.step(eps_hat, timestep, z, generator=generator).prev_sample
        noise = torch.randn(5, generator=other, dtype=torch.float64).numpy()
        eps_hat = np.sin(3 * reference) + 0.1 * i / num_steps
        reference = official_sampling_step(reference, eps_hat, float(gammas[i + 1]), float(gammas[i]), noise)
    np.testing.assert_allclose(z.numpy(), reference, rtol=1e-8, atol=1e-9)


# ---- (2) the same as diffusers on the same betas -----------------------------------------------------------------


def ddpm_in_float64(num_steps, **kwargs):
    """diffusers' DDPMScheduler on betas rescaled to T, its float32 tables replaced by float64 ones."""
    scale = 1000 / num_steps
    config = {
        "clip_sample": False,
        "timestep_spacing": "linspace",
        "beta_start": 1e-4 * scale,
        "beta_end": 0.02 * scale,
    }
    reference = DDPMScheduler(num_steps, **{**config, **kwargs})
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64)
    reference.betas, reference.alphas = betas, 1 - betas
    reference.alphas_cumprod = reference.alphas.cumprod(0)
    reference.one = torch.tensor(1.0, dtype=torch.float64)
    return reference


def assert_same_steps(scheduler, reference, timesteps, atol=1e-10, scale=1.0):
    for t in timesteps:
        generator = seeded(int(t))
        sample, output = normal_from(generator, 2, 3), scale * normal_from(generator, 2, 3)
        mine = scheduler.step(output, t, sample, generator=seeded(7))
        theirs = reference.step(output, int(t), sample, generator=seeded(7))
        torch.testing.assert_close(mine.prev_sample, theirs.prev_sample, rtol=1e-10, atol=atol, msg=f"t = {int(t)}")
        torch.testing.assert_close(mine.pred_original_sample, theirs.pred_original_sample, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("num_steps", [200, 1000, 4000])
def test_linear_beta_steps_are_those_of_diffusers(num_steps, clip_sample, prediction_type):
    options = {"clip_sample": clip_sample, "prediction_type": prediction_type, "clip_sample_range": 0.8}
    scheduler = LinearBetaScheduler(num_steps, **options)
    reference = ddpm_in_float64(num_steps, **options)
    # before set_timesteps both step from t to t − 1
    picked = [num_steps - 1, num_steps - 2, num_steps // 2, 37, 2, 1, 0]
    assert_same_steps(scheduler, reference, picked)
    for chosen in ([num_steps - 1, 150, 149, 101, 3, 0], [120, 60, 7]):
        scheduler.set_timesteps(timesteps=chosen)
        reference.set_timesteps(timesteps=chosen)
        assert scheduler.timesteps.tolist() == reference.timesteps.tolist()
        # diffusers adds 1e-10 of noise where a chain ends above index 0
        assert_same_steps(scheduler, reference, chosen, atol=1e-9)


@pytest.mark.parametrize("num_steps", [200, 1000])
def test_a_whole_chain_is_that_of_diffusers(num_steps):
    scheduler, reference = LinearBetaScheduler(num_steps), ddpm_in_float64(num_steps)
    denoiser = GaussianDenoiser(LinearBetaGamma(num_steps), mean=0.2, variance=0.04)
    scheduler.set_timesteps(num_steps)
    reference.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == reference.timesteps.tolist() == list(range(num_steps - 1, -1, -1))
    mine = theirs = normal_from(seeded(0), 50, 1)
    mine = run_chain(scheduler, mine, denoiser, seeded(5))
    generator = seeded(5)
    for t in reference.timesteps:
        theirs = reference.step(denoiser(theirs, t, return_dict=False)[0], t, theirs, generator=generator).prev_sample
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_fewer_steps_visit_the_indices_of_diffusers(spacing):
    for num_train in (1000, 200, 4000, 37):
        for num in (2, 3, 7, 10, 30, 37, 50, 99, 150, 200, 400, 600, 800, 999, 1000):
            if num > num_train:
                continue
            reference = DDPMScheduler(num_train, timestep_spacing=spacing)
            reference.set_timesteps(num)
            scheduler = LinearBetaScheduler(num_train, timestep_spacing=spacing)
            scheduler.set_timesteps(num)
            assert scheduler.timesteps.tolist() == reference.timesteps.tolist(), (num_train, num)


def test_one_step_starts_from_the_noisiest_index():
    # where diffusers' linspace would start from index 0 and return the noise itself
    for spacing in ("linspace", "trailing"):
        scheduler = LinearBetaScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("num_steps", [200, 1000])
def test_betas_and_alphas_cumprod_are_those_of_diffusers(num_steps):
    scheduler, reference = LinearBetaScheduler(num_steps), ddpm_in_float64(num_steps)
    assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(scheduler.betas, reference.betas, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(scheduler.alphas_cumprod, reference.alphas_cumprod, rtol=1e-12, atol=0)


@pytest.mark.parametrize("timesteps", [[0, 999, 500], [3], [[17]]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_add_noise_and_velocity_are_those_of_diffusers(generator, timesteps, dtype):
    scheduler, reference = LinearBetaScheduler(), ddpm_in_float64(1000)
    x, eps = normal_from(generator, 3, 2, 4, 4), normal_from(generator, 3, 2, 4, 4)
    mine, theirs = torch.tensor(timesteps, dtype=dtype), torch.tensor(timesteps).flatten()
    torch.testing.assert_close(
        scheduler.add_noise(x, eps, mine), reference.add_noise(x, eps, theirs), rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(
        scheduler.get_velocity(x, eps, mine), reference.get_velocity(x, eps, theirs), rtol=1e-11, atol=1e-11
    )


# ---- the step itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_the_three_predictions_sample_alike(make, prediction_type):
    chains = []
    for kind in ("epsilon", prediction_type):
        scheduler = make(prediction_type=kind)
        scheduler.set_timesteps(40)
        denoiser = GaussianDenoiser(mean=0.3, variance=0.04, prediction_type=kind, gamma_of=gamma_of(scheduler))
        chains.append(run_chain(scheduler, normal_from(seeded(0), 20, 1), denoiser, seeded(1)))
    # the oracle knows γ from float32 timesteps, 1e-6 off at the most
    torch.testing.assert_close(chains[1], chains[0], rtol=1e-5, atol=1e-6)


def test_clipping_uses_the_posterior_at_the_clipped_x(generator):
    scheduler = VDMScheduler(clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(20)
    sample, output = normal_from(generator, 50), normal_from(generator, 50)
    t = scheduler.timesteps[3]
    gamma_t, gamma_s = torch.tensor([5 - 18.3 * 3 / 20, 5 - 18.3 * 4 / 20], dtype=torch.float64)
    x_hat = diffusion.x_from_eps(sample, output, gamma_t).clamp(-0.5, 0.5)
    mean, std = diffusion.posterior(sample, x_hat, gamma_s, gamma_t)
    result = scheduler.step(output, t, sample, generator=seeded(3))
    expected = mean + std * torch.randn(50, generator=seeded(3), dtype=torch.float64)
    torch.testing.assert_close(result.prev_sample, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.pred_original_sample, x_hat, rtol=1e-10, atol=1e-10)
    assert float(result.pred_original_sample.abs().max()) == 0.5


def test_a_timestep_between_those_of_the_chain_steps_to_the_next_below(generator):
    scheduler = VDMScheduler()
    scheduler.set_timesteps(10)
    sample, output = normal_from(generator, 4), normal_from(generator, 4)
    gamma_t = torch.tensor(-13.3 + 18.3 * 0.45625, dtype=torch.float64)
    gamma_s = torch.tensor(-13.3 + 18.3 * 0.4, dtype=torch.float64)
    mean, std = diffusion.ancestral_step(sample, output, gamma_s, gamma_t)
    expected = mean + std * torch.randn(4, generator=seeded(0), dtype=torch.float64)
    for t in (456.25, torch.tensor(456.25), np.float64(456.25)):
        result = scheduler.step(output, t, sample, generator=seeded(0)).prev_sample
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_the_last_step_ends_where_final_gamma_says(scheduler, generator):
    scheduler.set_timesteps(5)
    sample, output = normal_from(generator, 6), normal_from(generator, 6)
    gamma_t = gamma_of(scheduler)(scheduler.timesteps[-1])
    result = scheduler.step(output, scheduler.timesteps[-1], sample, generator=seeded(0))
    noise = torch.randn(6, generator=seeded(0), dtype=torch.float64)
    mean, std = diffusion.ancestral_step(sample, output, scheduler.final_gamma, gamma_t)
    # float32 timesteps cost this check, not the sampler, 6e-5/1000 · 18.3 in γ
    torch.testing.assert_close(result.prev_sample, mean + std * noise, rtol=1e-4, atol=1e-5)
    if isinstance(scheduler, LinearBetaScheduler):
        assert float(scheduler.final_gamma) == -math.inf
        torch.testing.assert_close(result.prev_sample, result.pred_original_sample, rtol=1e-12, atol=1e-12)
    else:
        assert float(scheduler.final_gamma) == float(scheduler.noise_schedule()(0.0))


def test_a_step_depends_on_its_arguments_only(scheduler, generator):
    # no hidden counter: backwards, twice, and interleaved with another chain gives the same
    scheduler.set_timesteps(7)
    sample, output = normal_from(generator, 3), normal_from(generator, 3)
    forwards = [scheduler.step(output, t, sample, generator=seeded(1)).prev_sample for t in scheduler.timesteps]
    backwards = [
        scheduler.step(output, t, sample, generator=seeded(1)).prev_sample for t in reversed(scheduler.timesteps)
    ]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    twin = copy.deepcopy(scheduler)
    assert torch.equal(twin.step(output, twin.timesteps[2], sample, generator=seeded(1)).prev_sample, forwards[2])


def test_a_step_changes_none_of_its_arguments(scheduler, generator):
    sample, output = normal_from(generator, 3), normal_from(generator, 3)
    before = sample.clone(), output.clone()
    scheduler.step(output, scheduler.timesteps[4], sample, generator=generator)
    assert torch.equal(sample, before[0]) and torch.equal(output, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_samples_are_worked_on_in_float32(scheduler, generator, dtype):
    scheduler.set_timesteps(30)
    for t in (scheduler.timesteps[0], scheduler.timesteps[-2], scheduler.timesteps[-1]):
        sample, output = normal_from(generator, 2, 50).to(dtype), normal_from(generator, 2, 50).to(dtype)
        low = scheduler.step(output, t, sample, generator=seeded(4))
        high = scheduler.step(output.float(), t, sample.float(), generator=seeded(4))
        assert low.prev_sample.dtype == low.pred_original_sample.dtype == dtype
        assert torch.equal(low.prev_sample, high.prev_sample.to(dtype))
        assert torch.equal(low.pred_original_sample, high.pred_original_sample.to(dtype))
        # a half-precision network on a float32 latent, which is how the pipeline runs it
        mixed = scheduler.step(output, t, sample.float(), generator=seeded(4)).prev_sample
        assert mixed.dtype == torch.float32 and torch.equal(mixed, high.prev_sample)
        timesteps = t[None]
        noisy = scheduler.add_noise(sample, output, timesteps)
        assert noisy.dtype == dtype
        assert torch.equal(noisy, scheduler.add_noise(sample.float(), output.float(), timesteps).to(dtype))
        velocity = scheduler.get_velocity(sample, output, timesteps)
        assert torch.equal(velocity, scheduler.get_velocity(sample.float(), output.float(), timesteps).to(dtype))


def test_sigma_is_not_lost_in_half_precision(generator):
    # 1 − α² is exactly 0 in fp16 there: σ² = sigmoid(γ)
    noisy = VDMScheduler().add_noise(torch.zeros(1), torch.ones(1), torch.tensor([0.0]))
    assert float(noisy) == pytest.approx(math.sqrt(1 / (1 + math.exp(13.3))), rel=1e-6)


# ---- (5) randomness ----------------------------------------------------------------------------------------------


def test_with_a_list_of_generators_a_sample_does_not_depend_on_its_batch(make):
    scheduler = make()
    scheduler.set_timesteps(12)
    denoiser = GaussianDenoiser(mean=0.2, variance=0.04, gamma_of=gamma_of(scheduler))
    start = normal_from(seeded(0), 3, 1, 4, 4)
    together = run_chain(scheduler, start, denoiser, [seeded(11), seeded(12), seeded(13)])
    for i, seed in enumerate((11, 12, 13)):
        alone = run_chain(scheduler, start[i : i + 1], denoiser, [seeded(seed)])
        assert torch.equal(together[i : i + 1], alone)
    reordered = run_chain(scheduler, start[[2, 0]], denoiser, [seeded(13), seeded(11)])
    assert torch.equal(reordered, together[[2, 0]])


def test_the_same_seed_is_the_same_chain_and_another_is_another(make):
    results = []
    for seed in (1, 1, 2):
        scheduler = make()
        scheduler.set_timesteps(12)
        denoiser = GaussianDenoiser(gamma_of=gamma_of(scheduler))
        results.append(run_chain(scheduler, normal_from(seeded(0), 4, 1), denoiser, seeded(seed)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_noise_of_a_step_is_normal_and_independent_between_elements(generator):
    # a chain of one step from γ = 5 to γ_0 has a known std; rand() or one number for all would show
    scheduler = VDMScheduler(gamma_min=-2.0, gamma_max=5.0)
    scheduler.set_timesteps(1)
    zeros = torch.zeros(200_000, dtype=torch.float64)
    noise = scheduler.step(zeros, scheduler.timesteps[0], zeros, generator=generator).prev_sample
    std = math.sqrt(1 / (1 + math.exp(2)) * -math.expm1(-7))
    noise = noise / std
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.var()) == pytest.approx(1, abs=0.015)
    assert float((noise**4).mean()) == pytest.approx(3, abs=0.1)
    assert float((noise[:-1] * noise[1:]).mean()) == pytest.approx(0, abs=0.01)


# ---- (3) the contract of diffusers' plug-ins ---------------------------------------------------------------------


def test_it_is_a_scheduler_of_diffusers(scheduler):
    assert isinstance(scheduler, SchedulerMixin)
    assert scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    assert DDPMScheduler in scheduler.compatibles
    assert len(scheduler) == scheduler.config.num_train_timesteps
    parameters = inspect.signature(type(scheduler).__init__).parameters.values()
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert "Scheduler" in type(scheduler).__name__  # push_to_hub looks for the word


def test_timesteps_are_there_from_the_start(scheduler):
    total = scheduler.config.num_train_timesteps
    assert len(scheduler.timesteps) == total and scheduler.num_inference_steps is None
    assert len(scheduler.betas) == total and bool((scheduler.betas > 0).all()) and bool((scheduler.betas < 1).all())
    assert bool((scheduler.alphas_cumprod.diff() < 0).all())


@pytest.mark.parametrize("timestep", [0, 1, 0.0, 100, torch.tensor(0), torch.tensor([50.0])])
def test_step_works_before_set_timesteps_and_for_numbers(scheduler, generator, timestep):
    sample, output = (
        normal_from(generator, 2, 3, dtype=torch.float32),
        normal_from(generator, 2, 3, dtype=torch.float32),
    )
    result = scheduler.step(output, timestep, sample, generator=seeded(0))
    as_tuple = scheduler.step(output, timestep, sample, generator=seeded(0), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], result.prev_sample)
    assert torch.equal(as_tuple[1], result.pred_original_sample)
    assert result.prev_sample.shape == sample.shape and bool(result.prev_sample.isfinite().all())


def test_add_noise_takes_one_timestep_of_its_own(scheduler, generator):
    x, eps = normal_from(generator, 4, 3), normal_from(generator, 4, 3)
    t = scheduler.timesteps[5]
    gamma = gamma_of(scheduler)(t)
    expected = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * eps
    for timesteps in (t[None], t, t.expand(4), [t.item()] * 4):
        torch.testing.assert_close(scheduler.add_noise(x, eps, timesteps), expected, rtol=1e-9, atol=1e-9)
    expected = torch.sigmoid(-gamma).sqrt() * eps - torch.sigmoid(gamma).sqrt() * x
    torch.testing.assert_close(scheduler.get_velocity(x, eps, t[None]), expected, rtol=1e-9, atol=1e-9)


def test_every_timestep_of_the_chain_can_be_noised(scheduler):
    x = torch.ones(len(scheduler), 1, dtype=torch.float64)
    noisy = scheduler.add_noise(x, torch.zeros_like(x), scheduler.timesteps)
    assert bool((noisy.flatten().diff() > 0).all())


def test_scale_model_input_changes_nothing(scheduler):
    sample = torch.ones(2, 3)
    assert scheduler.scale_model_input(sample, 0.0) is sample and scheduler.scale_model_input(sample) is sample


def test_set_timesteps_puts_them_where_asked(scheduler):
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    scheduler.set_timesteps(5, device=torch.device("cpu"))
    assert scheduler.timesteps.device.type == "cpu"


def test_a_saved_config_is_enough(scheduler, tmp_path, generator):
    scheduler.save_config(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    sample, output = normal_from(generator, 3), normal_from(generator, 3)
    for a, b in ((scheduler, loaded), (scheduler, type(scheduler).from_config(scheduler.config))):
        assert torch.equal(a.timesteps, b.timesteps) and torch.equal(a.betas, b.betas)
        assert float(a.final_gamma) == float(b.final_gamma)
        for t in (a.timesteps[0], a.timesteps[-1]):
            steps = [s.step(output, t, sample, generator=seeded(0)).prev_sample for s in (a, b)]
            assert torch.equal(*steps)


def test_options_survive_save_and_from_config(tmp_path):
    options = {"prediction_type": "v_prediction", "clip_sample": True, "clip_sample_range": 0.7}
    for scheduler in (
        # by position: diffusers notes these as "default values" and would drop them
        VDMScheduler(500, -12.0, 4.0, [-12.0, 1.0, 4.0], **options),
        LinearBetaScheduler(500, 2e-4, 0.03, False, timestep_spacing="trailing", **options),
    ):
        scheduler.save_pretrained(tmp_path)
        for copied in (type(scheduler).from_pretrained(tmp_path), type(scheduler).from_config(scheduler.config)):
            for name in inspect.signature(type(scheduler).__init__).parameters:
                assert name == "self" or copied.config[name] == scheduler.config[name], name
        changed = type(scheduler).from_config(scheduler.config, clip_sample=False)
        assert changed.config.clip_sample is False and changed.config.num_train_timesteps == 500


# ---- (4) stock pipeline and network ------------------------------------------------------------------------------


def test_the_stock_pipeline_and_network_run(make):
    pipeline = DDPMPipeline(unet=tiny_unet(UNet2DModel, in_channels=1, out_channels=1), scheduler=make())
    pipeline.set_progress_bar_config(disable=True)
    results = [
        pipeline(batch_size=2, num_inference_steps=3, output_type="np", generator=seeded(0)).images for _ in range(2)
    ]
    assert results[0].shape == (2, 8, 8, 1)
    assert np.isfinite(results[0]).all() and np.array_equal(results[0], results[1])


# ---- (6) tables from schedules -----------------------------------------------------------------------------------


def bent_network(**kwargs):
    network = MonotoneGammaNetwork(hidden_dim=32, **kwargs)
    generator = seeded(3)
    with torch.no_grad():
        network.output_weight.copy_(4 * torch.rand(32, generator=generator))
        network.hidden_weight.copy_(4 + torch.randn(32, generator=generator))
        if network.config.learn_ends:
            network.bias -= 0.31
            network.weight += 0.77
    return network


@pytest.mark.parametrize("learn_ends", [False, True])
def test_a_baked_schedule_is_exact_at_its_knots_after_json(tmp_path, learn_ends):
    network = bent_network(learn_ends=learn_ends, num_train_timesteps=500)
    scheduler = VDMScheduler.from_noise_schedule(network, prediction_type="v_prediction")
    table = network.table().tolist()
    assert len(table) == 1025
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["trained_gammas"] == table
    loaded = VDMScheduler.from_pretrained(tmp_path)
    for s in (scheduler, loaded):
        assert s.config.trained_gammas == table
        assert s.config.num_train_timesteps == 500 and s.config.prediction_type == "v_prediction"
        # the scale of the timestep stays with the configured ends, wherever the learned ones went
        assert (s.config.gamma_min, s.config.gamma_max) == (-13.3, 5.0)
        t = torch.linspace(0, 1, 1025, dtype=torch.float64)
        assert torch.equal(s.noise_schedule()(t), network(t).detach())
        between = torch.linspace(0, 1, 7001, dtype=torch.float64)
        assert float((s.noise_schedule()(between) - network(between).detach()).abs().max()) < 2e-8
        assert float(s.final_gamma) == float(network.ends()[0].detach())


def test_chains_of_a_baked_schedule_follow_the_schedule():
    network = bent_network()
    scheduler = VDMScheduler.from_noise_schedule(network)
    scheduler.set_timesteps(64)
    t = torch.arange(64, 0, -1, dtype=torch.float64) / 64
    expected = network.timestep(t, network(t)).detach()
    torch.testing.assert_close(scheduler.timesteps, expected.float(), rtol=2e-7, atol=0)
    with torch.no_grad():
        network.output_weight.zero_()  # training goes on: the scheduler is a copy, not a view
    torch.testing.assert_close(scheduler.timesteps, expected.float(), rtol=2e-7, atol=0)


def test_linear_schedules_bake_to_two_knots_and_any_number_on_request():
    for schedule in (FixedLinearGamma(-10.0, 3.0), LearnedLinearGamma(-10.0, 3.0)):
        assert VDMScheduler.from_noise_schedule(schedule).config.trained_gammas == [-10.0, 3.0]
        assert len(VDMScheduler.from_noise_schedule(schedule, num_knots=9).config.trained_gammas) == 9
    straight, baked = VDMScheduler(), VDMScheduler.from_noise_schedule(FixedLinearGamma())
    assert torch.equal(straight.timesteps, baked.timesteps)


def test_a_table_schedule_keeps_its_own_knots_when_baked():
    # 11 knots interpolated by 1,025 others would be another curve between them
    schedule = TableGamma(CURVED, num_train_timesteps=400)
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    t = torch.linspace(0, 1, 9001, dtype=torch.float64)
    assert float((scheduler.noise_schedule()(t) - schedule(t)).abs().max()) < 1e-12


def test_linear_beta_goes_round_by_its_schedule():
    for scheduler in (LinearBetaScheduler(200), LinearBetaScheduler(300, 2e-4, 0.01, rescale_betas=False)):
        again = LinearBetaScheduler.from_noise_schedule(scheduler.noise_schedule(), clip_sample=True)
        assert torch.equal(again.betas, scheduler.betas) and again.config.clip_sample is True


def test_linear_betas_belong_to_linear_beta_scheduler():
    with pytest.raises(ValueError, match=r"DDPM's index.*LinearBetaScheduler\.from_noise_schedule"):
        VDMScheduler.from_noise_schedule(LinearBetaGamma())


def test_linear_beta_scheduler_takes_linear_betas_only():
    with pytest.raises(TypeError, match=r"must be a LinearBetaGamma, got FixedLinearGamma"):
        LinearBetaScheduler.from_noise_schedule(FixedLinearGamma())


def test_misspelled_options_of_from_noise_schedule_are_refused():
    with pytest.raises(TypeError, match="clip_smaple"):
        VDMScheduler.from_noise_schedule(FixedLinearGamma(), clip_smaple=True)


# ---- (7) configs that are wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_min": 5.0, "gamma_max": -13.3}, "gamma"),
        ({"gamma_min": 5.0, "gamma_max": 5.0}, "gamma"),
        ({"gamma_min": 6.0, "trained_gammas": [-13.3, 5.0]}, "gamma_min must be below gamma_max"),
        ({"gamma_max": math.nan}, "finite"),
        ({"gamma_min": -math.inf}, "finite"),
        ({"trained_gammas": [5.0, -13.3]}, "must increase"),
        ({"trained_gammas": [-13.3, 0.0, 0.0, 5.0]}, r"must increase.*index 1"),
        ({"trained_gammas": [-13.3, math.nan, 5.0]}, "finite"),
        ({"trained_gammas": [1.0]}, "at least 2"),
        ({"trained_gammas": []}, "at least 2"),
        ({"trained_gammas": [[-13.3, 5.0]]}, "at least 2 numbers, got shape"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps must be an integer"),
        ({"prediction_type": "eps"}, "prediction_type must be one of"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be positive"),
        ({"clip_sample_range": math.nan}, "clip_sample_range must be positive"),
    ],
)
def test_wrong_vdm_configs_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VDMScheduler(**arguments)
    # a file that someone edited is no better
    VDMScheduler().save_config(tmp_path)
    edit(tmp_path, arguments)
    with pytest.raises(ValueError, match=message):
        VDMScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_start": 0.03}, "betas must satisfy"),
        ({"beta_start": 0.0}, "betas must satisfy"),
        ({"beta_end": 1.0}, "betas must satisfy"),
        ({"num_train_timesteps": 20}, "betas must satisfy"),
        ({"num_train_timesteps": 1}, "at least 2"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be an integer"),
        ({"timestep_spacing": "middle"}, "timestep_spacing must be"),
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must be positive"),
    ],
)
def test_wrong_linear_beta_configs_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LinearBetaScheduler(**arguments)
    LinearBetaScheduler().save_config(tmp_path)
    edit(tmp_path, arguments)
    with pytest.raises(ValueError, match=message):
        LinearBetaScheduler.from_pretrained(tmp_path)


def edit(folder, changes):
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


UNKNOWN_KEYS = pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("clip_smaple", "did you mean 'clip_sample'"),
        ("predictiontype", "did you mean 'prediction_type'"),
        ("xyz", "knows"),
    ],
)


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
@UNKNOWN_KEYS
def test_unknown_keys_of_a_config_are_refused(cls, key, hint, tmp_path):
    message = f"does not know the config key '{key}'.*{hint}"
    with pytest.raises(ValueError, match=message):
        cls.from_config({**cls().config, key: 1})
    cls().save_config(tmp_path)
    edit(tmp_path, {key: 1})
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
@UNKNOWN_KEYS
def test_unknown_arguments_are_refused(cls, key, hint, tmp_path):
    message = f"does not know the config key '{key}'.*{hint}"
    with pytest.raises(ValueError, match=message):
        cls.from_config(cls().config, **{key: 1})
    cls().save_config(tmp_path)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path, **{key: 1})
    with pytest.raises(TypeError, match=key):
        cls(**{key: 1})


def test_the_two_schedulers_do_not_take_each_others_configs():
    with pytest.raises(ValueError, match=r"VDMScheduler cannot take its noise levels from .*beta_"):
        VDMScheduler.from_config(LinearBetaScheduler().config)
    with pytest.raises(ValueError, match=r"LinearBetaScheduler does not know the config key '(gamma|trained_gamma)"):
        LinearBetaScheduler.from_config(VDMScheduler().config)


@pytest.mark.parametrize("foreign", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_configs_of_diffusers_belong_to_linear_beta_scheduler(foreign):
    with pytest.raises(ValueError, match="use LinearBetaScheduler for linear betas"):
        VDMScheduler.from_config(foreign().config)


@pytest.mark.parametrize("source", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("saved", [False, True])
def test_configs_of_diffusers_keep_their_betas(source, saved, tmp_path):
    # their betas are never rescaled: ours would be, for 200 steps
    reference = source(num_train_timesteps=200, beta_start=2e-4, timestep_spacing="trailing", clip_sample=False)
    if saved:
        reference.save_config(tmp_path)
        scheduler = LinearBetaScheduler.from_pretrained(tmp_path)
    else:
        scheduler = LinearBetaScheduler.from_config(reference.config)
    torch.testing.assert_close(scheduler.betas.float(), reference.betas, rtol=1e-5, atol=0)
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.clip_sample is False
    # what is made of it keeps it as well
    again = LinearBetaScheduler.from_config(scheduler.config)
    assert torch.equal(again.betas, scheduler.betas)
    scheduler.save_config(tmp_path)
    assert torch.equal(LinearBetaScheduler.from_pretrained(tmp_path).betas, scheduler.betas)
    # their default clips, and the sampler of such a checkpoint does
    assert LinearBetaScheduler.from_config(source().config).config.clip_sample is True


def test_rescaling_a_config_of_diffusers_must_be_said():
    scheduler = LinearBetaScheduler.from_config(DDPMScheduler(200).config, rescale_betas=True)
    assert torch.equal(scheduler.betas, LinearBetaScheduler(200).betas)


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_large_log"},
        {"thresholding": True},
        {"rescale_betas_zero_snr": True},
        {"steps_offset": 1},
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"trained_betas": np.linspace(0.1, 0.3, 3)},
    ],
    ids=lambda arguments: "-".join(
        f"{k}={type(v).__name__ if k == 'trained_betas' else v}" for k, v in arguments.items()
    ),
)
def test_configs_of_other_processes_are_refused(arguments):
    (name,) = arguments
    config = DDPMScheduler(**arguments).config
    message = "trained_betas must hold one beta for each" if name == "trained_betas" else f"cannot .*{name}="
    with pytest.raises(ValueError, match=message):
        LinearBetaScheduler.from_config(config)


def test_settings_that_do_not_matter_to_the_step_are_taken():
    config = DDPMScheduler(
        variance_type="fixed_small_log", dynamic_thresholding_ratio=0.5, sample_max_value=3.0
    ).config
    assert torch.equal(LinearBetaScheduler.from_config(config).betas, LinearBetaScheduler().betas)


@pytest.mark.parametrize("num", [0, -1, 2.5, "5"])
def test_wrong_numbers_of_steps_are_refused(scheduler, num):
    with pytest.raises(ValueError, match="num_inference_steps must be a positive integer"):
        scheduler.set_timesteps(num)


@pytest.mark.parametrize("num", [math.nan, math.inf])
def test_numbers_of_steps_that_are_not_finite_are_refused(num):
    with pytest.raises(ValueError, match="num_inference_steps must be a positive integer"):
        VDMScheduler().set_timesteps(num)


def test_steps_by_number_or_by_list_but_not_both(scheduler):
    for arguments in ({}, {"num_inference_steps": 3, "timesteps": [3, 2]}):
        with pytest.raises(ValueError, match="pass either num_inference_steps or timesteps"):
            scheduler.set_timesteps(**arguments)


@pytest.mark.parametrize("timesteps", [[], [1, 2], [100, 100], [100, 50, 70], [100, math.nan], [math.nan, 50]])
def test_timesteps_that_do_not_decrease_are_refused(scheduler, timesteps):
    with pytest.raises(ValueError, match="timesteps must be a decreasing list"):
        scheduler.set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("timesteps", [[1200, 100], [100, -60], [math.nan], [math.inf]])
def test_timesteps_out_of_range_are_refused(scheduler, timesteps):
    with pytest.raises((ValueError, OverflowError), match=r"timesteps must be|integer"):
        scheduler.set_timesteps(timesteps=timesteps)


def test_fractional_indices_of_ddpm_are_refused():
    scheduler = LinearBetaScheduler()
    with pytest.raises(ValueError, match="timesteps must be integers"):
        scheduler.step(torch.zeros(2), 10.5, torch.zeros(2))
    with pytest.raises(ValueError, match="timesteps must be integers"):
        scheduler.set_timesteps(timesteps=[10.5, 3.2])


def test_a_custom_chain_may_not_start_at_its_end():
    with pytest.raises(ValueError, match=r"above that of γ\(0\)"):
        VDMScheduler().set_timesteps(timesteps=[500.0, 0.0])
    with pytest.raises(ValueError, match=r"above that of γ\(0\)"):
        MAKERS["vdm_narrower"]().set_timesteps(timesteps=[500.0, 10.0])


def test_ddpm_has_no_more_steps_than_levels():
    with pytest.raises(ValueError, match="at most num_train_timesteps=200"):
        LinearBetaScheduler(200).set_timesteps(201)


@pytest.mark.parametrize("timestep", [-1.0, 1200.0, math.nan, math.inf])
def test_steps_out_of_range_are_refused(scheduler, timestep):
    with pytest.raises(ValueError, match="timesteps must be"):
        scheduler.step(torch.zeros(2), timestep if timestep != -1.0 else -60.0, torch.zeros(2))
    with pytest.raises(ValueError, match="timesteps must be"):
        scheduler.add_noise(torch.zeros(2), torch.zeros(2), torch.tensor([timestep if timestep != -1.0 else -60.0]))


def test_a_step_takes_one_timestep(scheduler):
    with pytest.raises(ValueError, match="timestep must be a single value"):
        scheduler.step(torch.zeros(2), torch.tensor([5, 5]), torch.zeros(2))


def test_a_step_by_fixed_variances_takes_no_predicted_ones(scheduler):
    with pytest.raises(ValueError, match="remove the predicted variances"):
        scheduler.step(torch.zeros(1, 6, 2, 2), scheduler.timesteps[0], torch.zeros(1, 3, 2, 2))


def test_add_noise_takes_a_timestep_for_each_sample(scheduler):
    with pytest.raises(ValueError, match=r"gamma must have shape"):
        scheduler.add_noise(torch.zeros(2, 3), torch.zeros(2, 3), scheduler.timesteps[:3])
