"""evaluation/all_terms.py: the T-step bound in full, against formulas that are written independently."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel

from diffusers_vdm import (
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    VariationalBound,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_vlb,
)
from diffusers_vdm.randomness import keyed_generator
from tests.models import SmoothNet, tiny_unet

SEED, T = 3, 12


def images(n=3, levels=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels, (n, 2, 4, 4), generator=generator, dtype=torch.uint8)
    x[0, 0, 0, :2] = torch.tensor([0, levels - 1])  # both outer bins
    return x


def noise(k, i):
    return torch.randn(2, 4, 4, generator=keyed_generator(SEED, k, i)).double().numpy()


def numpy_betas(kind):
    if kind == "linear":
        return np.linspace(1e-4, 0.3, T)
    if kind == "scaled_linear":
        return np.linspace(1e-2, 0.3**0.5, T) ** 2
    if kind == "squaredcos_cap_v2":
        bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        return np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(T)])
    return np.linspace(0.02, 0.4, T) ** 1.5


def ddpm_bpd(x_int, i, betas, prediction, variance, clip, network):
    """Ho et al. 2020 and improved-diffusion's calc_bpd_loop, transcribed with its own quantities; one image."""
    alphas_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_bar[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_bar)
    log_clipped = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    coefficient_x = betas * np.sqrt(previous) / (1 - alphas_bar)
    coefficient_z = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_bar)
    x = x_int.double().numpy() / 127.5 - 1
    terms = np.zeros(len(betas))
    for t in reversed(range(len(betas))):
        eps = noise(t, i)
        z = np.sqrt(alphas_bar[t]) * x + np.sqrt(1 - alphas_bar[t]) * eps
        out = network(torch.from_numpy(z)[None], torch.tensor(t))[0][0].numpy()
        out, value = (out[:2], out[2:]) if len(out) == 4 else (out, None)
        if prediction == "epsilon":
            x_hat = z / np.sqrt(alphas_bar[t]) - np.sqrt(1 / alphas_bar[t] - 1) * out
        elif prediction == "v_prediction":
            x_hat = np.sqrt(alphas_bar[t]) * z - np.sqrt(1 - alphas_bar[t]) * out
        else:
            x_hat = out
        if clip:
            x_hat = np.clip(x_hat, -1, 1)
        log_variance = {
            "fixed_small": lambda t=t: log_clipped[t],
            "fixed_large": lambda t=t: np.log(np.append(posterior_variance[1], betas[1:]))[t],
            "learned_range": lambda t=t, v=value: (v + 1) / 2 * np.log(betas[t]) + (1 - v) / 2 * log_clipped[t],
        }[variance]() + np.zeros_like(x)
        model_mean = coefficient_x[t] * x_hat + coefficient_z[t] * z
        if t > 0:
            true_mean = coefficient_x[t] * x + coefficient_z[t] * z
            true_log = log_clipped[t]
            nats = 0.5 * (
                -1 + log_variance - true_log + np.exp(true_log - log_variance)
                + (true_mean - model_mean) ** 2 * np.exp(-log_variance)
            )  # fmt: skip
        else:
            cdf = lambda y: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))  # noqa: E731
            scale = np.exp(-0.5 * log_variance)
            above, below = cdf(scale * (x - model_mean + 1 / 255)), cdf(scale * (x - model_mean - 1 / 255))
            mass = np.where(x < -0.999, above, np.where(x > 0.999, 1 - below, above - below))
            nats = -np.log(np.maximum(mass, 1e-12))
        terms[t] = nats.mean() / np.log(2)
    last = alphas_bar[-1]
    prior = 0.5 * (-1 - np.log(1 - last) + (1 - last) + last * x**2)
    return terms, prior.mean() / np.log(2)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize(
    ("kind", "prediction"),
    [
        ("linear", "epsilon"),
        ("scaled_linear", "v_prediction"),
        ("squaredcos_cap_v2", "sample"),
        ("trained", "epsilon"),
    ],
)
def test_ddpm_convention_is_that_of_the_public_code(kind, prediction, variance, clip):
    arguments = {"trained_betas": numpy_betas(kind)} if kind == "trained" else {"beta_schedule": kind}
    scheduler = DDPMScheduler(
        T, 1e-4, 0.3, prediction_type=prediction, variance_type=variance, clip_sample=clip, **arguments
    )
    network = SmoothNet(2 if variance == "learned_range" else 1)
    data = images()
    result = evaluate_vlb(network, scheduler, data, seed=SEED, progress_bar=False)
    assert (result.convention, result.num_steps, result.clip_sample) == ("ddpm", T, clip)
    for i in range(len(data)):
        terms, prior = ddpm_bpd(data[i], i, numpy_betas(kind), prediction, variance, clip, network)
        np.testing.assert_allclose(result.terms_bpd[i, 1:], terms[1:], rtol=1e-7, atol=1e-10)
        assert float(result.per_image_bpd[i]) == pytest.approx(terms.sum() + prior, rel=1e-8)
    assert result.bpd == pytest.approx(result.prior_bpd + result.reconstruction_bpd + result.diffusion_bpd)
    assert result.stderr_bpd == pytest.approx(float(result.per_image_bpd.std()) / math.sqrt(3))


def tiny(cls=VDMUNet2DModel, **more):
    return tiny_unet(cls, in_channels=1, out_channels=1, **more)


def digits(n=5):
    return torch.randint(0, 17, (n, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_terms_are_those_of_the_training_objective(prediction):
    """Each term is the T-step objective at its own t, with the same noise."""
    unet, schedule = tiny(zero_init=False), MonotoneGammaNetwork(-6.0, 4.0, hidden_dim=8)
    with torch.no_grad():
        schedule.output_weight.mul_(torch.linspace(0, 30, 8))
    scheduler = VDMScheduler.from_noise_schedule(schedule, prediction_type=prediction)
    data, steps = digits(), 6
    result = evaluate_vlb(unet, scheduler, data, num_steps=steps, num_levels=17, seed=SEED, progress_bar=False)
    bound = VariationalBound(
        unet, scheduler.noise_schedule(), num_levels=17, num_timesteps=steps, prediction_type=prediction
    ).eval()

    def draws(name):
        return torch.stack([torch.randn(1, 8, 8, generator=keyed_generator(SEED, name, i)) for i in range(len(data))])

    for k in range(steps):
        t = torch.full((len(data),), (k + 1) / steps, dtype=torch.float64)
        with torch.no_grad():
            out = bound(data, t=t, eps=draws(k), eps_0=draws("z_0"))
        # x-prediction goes through the difference of near-equal numbers where there is little noise
        torch.testing.assert_close(result.terms_bpd[:, k].float() * steps, out.diffusion, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(result.gammas[k].expand(len(data)), out.gamma_t)
    assert result.prior_bpd == pytest.approx(float(out.prior.mean()), rel=1e-5)
    assert result.reconstruction_bpd == pytest.approx(float(out.reconstruction.mean()), rel=1e-5)


def test_no_image_depends_on_its_batch_and_none_is_dropped():
    unet, scheduler, data = tiny(zero_init=False), LinearBetaScheduler(50), digits(7)
    results = [
        evaluate_vlb(unet, scheduler, data, num_levels=17, batch_size=b, num_steps=9, progress_bar=False)
        for b in (1, 3, 7, 100)
    ]
    for result in results:
        assert result.terms_bpd.shape == (7, 8) and bool((result.terms_bpd > 0).all())
        torch.testing.assert_close(result.terms_bpd, results[0].terms_bpd, rtol=1e-5, atol=1e-7)
    alone = evaluate_vlb(unet, scheduler, data[:1], num_levels=17, num_steps=9, progress_bar=False)
    torch.testing.assert_close(alone.per_image_bpd[0], results[0].per_image_bpd[0])
    assert math.isnan(alone.stderr_bpd)


def test_evaluation_restores_the_mode_of_each_module():
    unet = tiny(dropout=0.5)
    unet.train()
    unet.mid_block.eval()
    first, second = (
        evaluate_vlb(unet, LinearBetaScheduler(50), digits(2), num_levels=17, progress_bar=False) for _ in range(2)
    )
    assert first.bpd == second.bpd  # no dropout
    assert unet.training and not unet.mid_block.training


def test_our_convention_for_a_checkpoint_of_diffusers():
    """With our data and decoder, a DDPM checkpoint is what LinearBetaScheduler says of the same betas."""
    unet, data = tiny(UNet2DModel), digits(2)
    theirs = DDPMScheduler(1000, clip_sample=False)
    arguments = {"num_levels": 17, "num_steps": 10, "progress_bar": False}
    a = evaluate_vlb(unet, theirs, data, convention="vdm", **arguments)
    b = evaluate_vlb(unet, LinearBetaScheduler(1000), data, **arguments)
    torch.testing.assert_close(a.terms_bpd, b.terms_bpd, rtol=1e-9, atol=1e-12)
    assert a.num_steps == 9
    c = evaluate_vlb(unet, DDIMScheduler(1000, clip_sample=False), data, convention="vdm", **arguments)
    assert c.bpd == a.bpd


class NaN(SmoothNet):
    def forward(self, z, timestep, return_dict=False):
        out = z.clone()
        out[1:2] = math.nan
        return (out,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": images().float()}, TypeError, "integers"),
        ({"num_levels": 17}, ValueError, "got values from 0 to 255"),
        ({"images": images()[:0]}, ValueError, "must not be empty"),
        ({"network": NaN()}, ValueError, "image 1 is not finite"),
        ({"network": tiny(UNet2DModel)}, ValueError, "of the network's size"),
        ({"scheduler": DDPMScheduler(20, rescale_betas_zero_snr=True)}, ValueError, "zero SNR at the last step"),
        ({"scheduler": object()}, ValueError, "no table of betas"),
        ({"num_steps": 21}, ValueError, "at most 20"),
        ({"num_steps": 0}, ValueError, "positive integer"),
        ({"convention": "DDPM"}, ValueError, "convention must be"),
        ({"scheduler": VDMScheduler(), "convention": "ddpm"}, ValueError, "no DDPM decoder"),
        ({"network": SmoothNet(2)}, ValueError, "variance_type"),
    ],
    ids=["floats", "levels", "no images", "NaN", "size", "no signal", "no scheduler", "many steps", "no steps",
         "convention", "decoder", "variances"],
)  # fmt: skip
def test_wrong_arguments_are_refused(changes, error, message):
    arguments = {"network": SmoothNet(), "scheduler": DDPMScheduler(20), "images": images()} | changes
    positional = [arguments.pop(name) for name in ("network", "scheduler", "images")]
    with pytest.raises(error, match=message):
        evaluate_vlb(*positional, progress_bar=False, **arguments)


def test_another_scheduler_of_diffusers_is_measured_in_the_convention_of_ddpm():
    result = evaluate_vlb(SmoothNet(), EulerDiscreteScheduler(20), images(), progress_bar=False)
    assert result.convention == "ddpm"


# ---- custom timesteps -------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: DDPMScheduler(T), lambda: LinearBetaScheduler(50), VDMScheduler])
def test_an_evaluation_by_its_own_timesteps_is_the_same(make):
    scheduler, data = make(), images()
    once = evaluate_vlb(SmoothNet(), scheduler, data, num_steps=11, seed=SEED, progress_bar=False)
    again = evaluate_vlb(SmoothNet(), scheduler, data, timesteps=once.timesteps, seed=SEED, progress_bar=False)
    # a VDMScheduler's γ is worked out from the timestep
    torch.testing.assert_close(again.gammas, once.gammas, rtol=0, atol=1e-11)
    torch.testing.assert_close(again.per_image_bpd, once.per_image_bpd, rtol=1e-9, atol=0)
    scheduler.set_timesteps(timesteps=once.timesteps)
    assert len(scheduler.timesteps) == len(once.timesteps)


# ---- an interrupted evaluation -----------------------------------------------------------------------------------


class Interrupted(SmoothNet):
    """Counts its calls, and is stopped by Ctrl-C at one of them."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.stop_at = 0, stop_at

    def forward(self, z, timestep, return_dict=False):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return super().forward(z, timestep)


RESUMED = {"seed": SEED, "batch_size": 2, "progress_bar": False}


@pytest.fixture
def interrupted(tmp_path):
    """The folder of an evaluation of five images that was interrupted within its second batch."""
    with pytest.raises(KeyboardInterrupt):
        evaluate_vlb(Interrupted(stop_at=40 + 30), DDPMScheduler(40), images(5), resume_dir=tmp_path, **RESUMED)
    return tmp_path


def test_a_resumed_evaluation_is_the_one_that_was_not_interrupted(interrupted):
    whole = evaluate_vlb(SmoothNet(), DDPMScheduler(40), images(5), **RESUMED)
    network = Interrupted()
    again = evaluate_vlb(network, DDPMScheduler(40), images(5), resume_dir=interrupted, **RESUMED)
    assert torch.equal(again.terms_bpd, whole.terms_bpd) and torch.equal(again.per_image_bpd, whole.per_image_bpd)
    assert 40 + 11 <= network.calls <= 40 + 11 + 16  # the last batch, and what was left of the second


@pytest.mark.parametrize(
    ("data", "seed", "message"),
    [(images(5), 4, "seed was 3 and is 4"), (images(5).flip(0), SEED, "images was")],
    ids=["seed", "images"],
)
def test_an_evaluation_of_something_else_is_not_resumed(interrupted, data, seed, message):
    with pytest.raises(ValueError, match=message):
        evaluate_vlb(SmoothNet(), DDPMScheduler(40), data, resume_dir=interrupted, **RESUMED | {"seed": seed})


class Infinite(SmoothNet):
    def forward(self, z, timestep, return_dict=False):
        out = super().forward(z, timestep)[0].clone()
        out[0, 0, 0, 0] = math.inf
        return (out,)


def test_a_resumed_evaluation_computes_numbers_that_were_not_finite_again(tmp_path):
    scheduler = DDPMScheduler(20, clip_sample=False)  # a clipped x̂ would be finite
    for _ in range(2):
        with pytest.raises(ValueError, match="image 0 is not finite"):
            evaluate_vlb(Infinite(), scheduler, images(1), resume_dir=tmp_path, progress_bar=False)
