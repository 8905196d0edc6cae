"""diffusers_schedulers.py: our noise levels in schedulers of diffusers and back, and our samplers for few steps."""

import inspect
import logging
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_vdm import (
    FixedLinearGamma,
    LinearBetaScheduler,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from diffusers_vdm.diffusers_schedulers import EXPORTABLE, betas_of_gammas
from diffusers_vdm.diffusion import gammas_from_betas
from tests.models import curved_gamma, tiny_unet
from tests.oracles import GaussianData, GaussianDenoiser, GaussianMixture, MixtureDenoiser, mp_linear_beta_gammas
from tests.tensors import random_levels

# diffusers passes float64 tensors to NumPy in a way that NumPy 2 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
MIXTURE = GaussianMixture.example(2)
MEAN = MIXTURE.weights @ MIXTURE.means
CENTRED = MIXTURE.means - MEAN
COVARIANCE = (CENTRED.T * MIXTURE.weights) @ CENTRED + (MIXTURE.weights @ MIXTURE.variances) * torch.eye(2).double()
SCHEDULERS = {
    "linear": lambda: VDMScheduler(),
    "learned": lambda: VDMScheduler.from_noise_schedule(curved_gamma(-13.3, 5.0)),
    "linear-beta": lambda: LinearBetaScheduler(),
}


def exported(scheduler, name, **kwargs):
    # one of them says in its log that it changes an option for an even number of steps
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return scheduler.to_diffusers(getattr(diffusers, name), **kwargs)


def draw(scheduler, denoiser, z, num_steps=None, generator=None, **more):
    """Samples by the stock loop; the network gets the timestep that the loop gives."""
    if num_steps is not None:
        scheduler.set_timesteps(num_steps)
    z = z * scheduler.init_noise_sigma
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        output = denoiser(scheduler.scale_model_input(z, t), t, return_dict=False)[0]
        z = scheduler.step(output, t, z, return_dict=False, **kwargs)[0]
    return z


# ---- to diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "learned")) for k in SCHEDULERS])
@pytest.mark.parametrize("name", EXPORTABLE)
def test_every_exported_scheduler_reaches_the_data(name, kind):
    """Mean and covariance of a mixture with the exact denoiser; stochastic ones need more steps."""
    ours = SCHEDULERS[kind]()
    denoiser = MixtureDenoiser(MIXTURE, ours.noise_schedule())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6000, 2, 1, 1, generator=generator)
    slow = "DDPM" in name or "Ancestral" in name or "SA" in name or "DDIM" in name or name == "EulerDiscreteScheduler"
    x = draw(exported(ours, name), denoiser, z, 250 if slow else 60, generator)
    assert x.dtype == torch.float32 and bool(x.isfinite().all())
    x = x.flatten(1).double()
    error = 4 * COVARIANCE.diag().sqrt() / math.sqrt(len(x))
    assert bool(((x.mean(0) - MEAN).abs() < error + 0.006).all())
    torch.testing.assert_close(x.T.cov(), COVARIANCE, rtol=0.08, atol=0.008)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [5, 50, 250])
def test_exported_ddim_is_ours(kind, num_steps):
    ours = SCHEDULERS[kind]()
    theirs = exported(ours, "DDIMScheduler", set_alpha_to_one=kind == "linear-beta")
    theirs.set_timesteps(num_steps)
    same = type(ours).from_config(ours.config, algorithm="ddim")
    # the loop of theirs ends at the level of timestep 0 (or at the data), which is not among its timesteps
    same.set_timesteps(timesteps=[float(t) for t in theirs.timesteps])
    denoiser = MixtureDenoiser(MIXTURE, ours.noise_schedule())
    z = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = draw(theirs, denoiser, z), draw(same, denoiser, z)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", EXPORTABLE)
def test_the_network_gets_the_level_that_the_sample_has(name, kind):
    """σ of the scheduler, where it has one, is that of the γ which the network reads off the timestep."""
    ours = SCHEDULERS[kind]()
    scheduler = exported(ours, name)
    table = ours._gammas_at(torch.arange(1000))
    torch.testing.assert_close(torch.logit(1 - scheduler.alphas_cumprod), table, rtol=0, atol=1e-8)
    scheduler.set_timesteps(37)
    assert float(scheduler.timesteps.max()) > 970
    if not hasattr(scheduler, "sigmas"):
        return
    t = scheduler.timesteps.double().numpy()
    sigmas = scheduler.sigmas[: len(t)].double().numpy()
    if name.startswith("KDPM2"):  # every other call is at a level between, which its `sigmas` do not hold
        t, sigmas = t[::2], sigmas[::2]
    known = np.interp(t, np.arange(1000), table.numpy())
    np.testing.assert_allclose(2 * np.log(sigmas), known, atol=2e-3 if kind == "linear-beta" else 2e-4)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_from_config_of_their_schedulers_takes_our_levels(kind, tmp_path):
    """In memory and from a file; to what their float32 tables lose."""
    ours = SCHEDULERS[kind]()
    gammas = ours._gammas_at(torch.arange(1000))
    ours.save_pretrained(tmp_path)
    for name in EXPORTABLE:
        cls = getattr(diffusers, name)
        for scheduler in (cls.from_config(ours.config), cls.from_pretrained(tmp_path)):
            theirs = torch.logit(1 - scheduler.alphas_cumprod.double())
            torch.testing.assert_close(theirs[100:], gammas[100:], rtol=0, atol=0.1)
            torch.testing.assert_close(theirs, gammas, rtol=0, atol=0.25)
            assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.get("clip_sample", False)
    again = type(ours).from_pretrained(tmp_path)
    torch.testing.assert_close(again._gammas_at(torch.arange(1000)), gammas, rtol=0, atol=0)


BETAS = [0.01, 0.03, 0.02, 0.2, 0.5]
OURS = {
    "linear betas": LinearBetaScheduler,
    "linear betas, rescaled": lambda: LinearBetaScheduler(200, clip_sample=True, timestep_spacing="trailing"),
    "linear betas, not rescaled": lambda: LinearBetaScheduler(200, 2e-4, 0.03, rescale_betas=False),
    "any betas": lambda: LinearBetaScheduler(5, trained_betas=BETAS),
    "straight": lambda: VDMScheduler(num_train_timesteps=100, prediction_type="v_prediction", algorithm="ddim"),
    "learned": lambda: VDMScheduler.from_noise_schedule(curved_gamma(-13.3, 5.0)),
    "index": lambda: VDMScheduler(5, trained_betas=BETAS),
}
COMPATIBLES = sorted(VDMScheduler._compatibles)


def swapped(cls, config, **kwargs):
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        return cls.from_config(config, **kwargs)
    except ImportError:
        pytest.skip(f"{cls.__name__} has a dependency of its own")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", COMPATIBLES)
def test_a_swap_by_from_config_can_be_undone(name, kind, tmp_path):
    """By every class of `compatibles`, in memory and from a file, and by several in a row: bit for bit."""
    ours = OURS[kind]()
    assert {cls.__name__ for cls in ours.compatibles} == set(COMPATIBLES)
    there = swapped(getattr(diffusers, name), ours.config)
    there.save_pretrained(tmp_path)
    further = swapped(
        diffusers.UniPCMultistepScheduler, swapped(diffusers.EulerDiscreteScheduler, there.config).config
    )
    backs = [type(ours).from_config(each.config) for each in (there, further)]
    backs += [type(ours).from_pretrained(tmp_path), type(ours).from_config(backs[0].config)]
    for back in backs:
        assert_same_sampler(back, ours)


def assert_same_sampler(back, ours):
    assert type(back) is type(ours) and type(back.noise_schedule()) is type(ours.noise_schedule())
    assert torch.equal(back.noise_schedule().table(), ours.noise_schedule().table())
    assert back.config.trained_betas == ours.config.trained_betas and back.betas.equal(ours.betas)
    for scheduler in (back, ours):
        scheduler.set_timesteps(3)
    assert back.timesteps.equal(ours.timesteps) and back._chain == ours._chain
    said = {key for key in inspect.signature(type(ours).__init__).parameters if key != "self"}
    assert {key: back.config[key] for key in said} == {key: ours.config[key] for key in said}


CONTRADICTIONS = {
    "other betas": {"trained_betas": [0.1] * 100},
    "no table": {"trained_betas": None},
    "rescaled to no signal": {"rescale_betas_zero_snr": True},
    "thresholding": {"thresholding": True},
    "karras": {"use_karras_sigmas": True},
    "flow": {"use_flow_sigmas": True},
    "beta sigmas": {"use_beta_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "flow prediction": {"prediction_type": "flow_prediction"},
    "ends": {"sigma_max": 50.0},
    "offset": {"steps_offset": 1},
    "fewer steps": {"num_train_timesteps": 50},
}


@pytest.mark.parametrize("ours", [VDMScheduler(100), LinearBetaScheduler(100)], ids=lambda ours: type(ours).__name__)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_our_levels_are_refused_on_the_way_back(case, ours):
    ((key, value),) = changes = CONTRADICTIONS[case].items()
    config = {**swapped(diffusers.UniPCMultistepScheduler, ours.config).config, **dict(changes)}
    said = "trained_betas" if key == "num_train_timesteps" else key
    with pytest.raises(ValueError, match=said):
        type(ours).from_config(config)
    if key not in ("prediction_type", "num_train_timesteps", "trained_betas"):  # those are arguments of ours
        with pytest.raises(ValueError, match=f"does not know the config key '{key}'"):
            type(ours).from_config(ours.config, **{key: value})


def test_settings_of_the_samplers_of_diffusers_are_ignored_and_kept_for_them():
    ours = VDMScheduler()
    there = swapped(
        diffusers.DPMSolverMultistepScheduler, ours.config, solver_order=3, algorithm_type="sde-dpmsolver++"
    )
    back = VDMScheduler.from_config(there.config)
    assert_same_sampler(back, ours)
    assert swapped(diffusers.DPMSolverMultistepScheduler, back.config).config.solver_order == 3
    with pytest.raises(ValueError, match="did you mean 'algorithm'"):
        VDMScheduler.from_config(back.config, algorithms="ddim")


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
@pytest.mark.parametrize("theirs", [diffusers.EDMEulerScheduler, diffusers.DDPMScheduler])
def test_a_config_without_our_levels_does_not_get_our_defaults(cls, theirs):
    config = theirs().config
    if cls is LinearBetaScheduler and theirs is diffusers.DDPMScheduler:
        assert cls.from_config(config).betas.float().allclose(theirs().betas)
        return
    with pytest.raises(ValueError, match="cannot take its noise levels from"):
        cls.from_config(config)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda b: torch.tensor(b).float().double()])
def test_trained_betas_are_taken_as_diffusers_takes_them(make):
    theirs = DDPMScheduler(5, trained_betas=BETAS, clip_sample=False)
    for cls in (LinearBetaScheduler, VDMScheduler):
        ours = cls(num_train_timesteps=5, trained_betas=make(BETAS))
        torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-6, atol=0)
        ours.set_timesteps(timesteps=[4, 2])
        assert ours.timesteps.tolist() == [4, 2]  # the network's timestep is the index
    assert LinearBetaScheduler.from_config(theirs.config).config.trained_betas == BETAS
    assert VDMScheduler.from_diffusers(theirs).betas.equal(VDMScheduler(5, trained_betas=BETAS).betas)
    # with the same steps as theirs
    ours = LinearBetaScheduler(5, trained_betas=BETAS)
    z = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in (4, 3, 1):
        step = [s.step(0.5 * z, t, z, generator=torch.Generator().manual_seed(1)).prev_sample for s in (ours, theirs)]
        torch.testing.assert_close(*step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trained_betas": BETAS}, "num_train_timesteps=1000, got 5 of them; set num_train_timesteps=5"),
        ({"trained_betas": [0.1, 1.0]}, "within (0, 1)"),
        ({"trained_betas": [0.1, 0.0]}, "within (0, 1)"),
        ({"trained_betas": [0.1, math.nan]}, "within (0, 1)"),
        ({"trained_betas": [0.1]}, "at least two numbers"),
        ({"trained_betas": []}, "at least two numbers"),
        ({"trained_betas": [[0.1, 0.2]]}, "at least two numbers"),
        ({"trained_betas": 0.1}, "at least two numbers"),
        ({"trained_betas": "linear"}, "must be a list of numbers"),
        ({"trained_betas": ["a", "b"]}, "must be a list of numbers"),
    ],
)
def test_wrong_trained_betas_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match="trained_betas.*" + re.escape(message)):
        cls(**arguments)


@pytest.mark.parametrize(
    ("cls", "more"),
    [
        (VDMScheduler, {"gamma_min": -9.0}),
        (VDMScheduler, {"gamma_max": 9.0}),
        (VDMScheduler, {"trained_gammas": [-9.0, 5.0]}),
        (LinearBetaScheduler, {"beta_start": 1e-3}),
        (LinearBetaScheduler, {"beta_end": 0.03}),
    ],
)
def test_levels_are_given_in_one_way(cls, more):
    (key,) = more
    with pytest.raises(ValueError, match=f"{key} must be left out if trained_betas is given"):
        cls(5, trained_betas=BETAS, **more)
    with pytest.raises(ValueError, match=f"{key} must be left out if trained_betas is given"):
        cls.from_config(cls(1000).config, num_train_timesteps=5, trained_betas=BETAS, **more)


@pytest.mark.parametrize("kind", OURS)
def test_trained_betas_replace_the_levels_of_a_config(kind):
    ours = OURS[kind]()
    there = type(ours).from_config(ours.config, num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])
    assert there.betas.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert there.config.prediction_type == ours.config.prediction_type
    assert type(ours).from_config(there.config).betas.equal(there.betas)


@pytest.mark.parametrize("kind", OURS)
def test_a_config_of_ours_lists_no_defaults_and_keeps_its_values(kind, tmp_path):
    ours = OURS[kind]()
    ours.save_pretrained(tmp_path)
    for scheduler in (ours, type(ours).from_pretrained(tmp_path), type(ours).from_config(ours.config)):
        assert "_use_default_values" not in scheduler.config
        # what is False by default here, and True there
        assert DDPMScheduler.from_config(scheduler.config).config.clip_sample is ours.config.clip_sample


def test_from_config_takes_changes_of_our_own_configs():
    changed = VDMScheduler.from_config(VDMScheduler().config, gamma_min=-9.0)
    assert changed.config.trained_betas[0] == pytest.approx(1 / (1 + math.exp(9)))


@pytest.mark.parametrize(
    ("cls", "error", "message"),
    [
        (diffusers.EDMEulerScheduler, ValueError, "must accept a table of noise levels, got EDMEulerScheduler"),
        (diffusers.LCMScheduler, ValueError, "must accept a table of noise levels, got LCMScheduler"),
        ("DDIMScheduler", TypeError, "must be a diffusers scheduler class"),
        (VDMUNet2DModel, TypeError, "must be a diffusers scheduler class"),
    ],
    ids=["EDM", "LCM", "name", "network"],
)
def test_classes_that_cannot_be_given_levels_are_refused(cls, error, message):
    with pytest.raises(error, match=message):
        VDMScheduler().to_diffusers(cls)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"beta_start": 0.1}, "beta_start must be left out"), ({"kaboom": 1}, "has no argument 'kaboom'")],
    ids=["levels", "unknown"],
)
def test_wrong_options_of_an_export_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        VDMScheduler().to_diffusers(DDIMScheduler, **option)


def test_options_of_the_exported_class_are_passed_on():
    exported = VDMScheduler().to_diffusers(diffusers.DPMSolverMultistepScheduler, solver_order=3)
    assert exported.config.solver_order == 3


# ---- from diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_from_diffusers_keeps_the_levels_of_every_timestep(beta_schedule, tmp_path):
    theirs = DDPMScheduler(200, 1e-3, 0.05, beta_schedule, prediction_type="v_prediction", clip_sample=False)
    ours = VDMScheduler.from_diffusers(theirs, algorithm="dpmsolver++")
    assert ours.config.prediction_type == "v_prediction" and not ours.config.clip_sample
    gammas = ours._gammas_at(torch.arange(200))
    torch.testing.assert_close(torch.sigmoid(-gammas), theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)
    ours.save_pretrained(tmp_path)
    ours = VDMScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(ours._gammas_at(torch.arange(200)), gammas, rtol=0, atol=1e-10)
    ours.set_timesteps(199)
    torch.testing.assert_close(ours.timesteps, torch.arange(199.0, 0, -1), rtol=0, atol=1e-4)
    if beta_schedule == "linear":
        levels = mp_linear_beta_gammas(200, 1e-3, 0.05, [0, 100, 199])
        assert [float(gammas[i]) for i in (0, 100, 199)] == pytest.approx([float(g) for g in levels], abs=1e-9)
    # and back
    back = ours.to_diffusers(DDPMScheduler)
    torch.testing.assert_close(back.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)


def test_a_ddpm_network_samples_and_has_a_bound_by_it():
    theirs = DDPMScheduler(clip_sample=False)
    ours = VDMScheduler.from_diffusers(theirs)
    denoiser = MixtureDenoiser(MIXTURE, ours.noise_schedule())
    generator = torch.Generator().manual_seed(0)
    x = draw(ours, denoiser, torch.randn(4000, 2, 1, 1, generator=generator), 250, generator).flatten(1).double()
    torch.testing.assert_close(x.T.cov(), COVARIANCE, rtol=0.1, atol=0.01)
    unet = tiny_unet(UNet2DModel, in_channels=1, out_channels=1)
    images = random_levels(2, 1, 8, 8, dtype=torch.uint8)
    assert VariationalBound(unet, ours.noise_schedule())(images, generator=generator).loss.isfinite()
    with pytest.raises(ValueError, match="needs num_train_timesteps=1000 values in trained_gammas"):
        VDMScheduler(timestep_type="index")
    with pytest.raises(ValueError, match="timestep_type must be one of"):
        VDMScheduler(timestep_type="sigma")


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        (VDMScheduler(), TypeError, "scheduler must be a diffusers scheduler"),
        (DDPMScheduler, TypeError, "got the class DDPMScheduler"),
        (DDPMScheduler(thresholding=True), ValueError, "thresholding"),
        (DDPMScheduler(rescale_betas_zero_snr=True), ValueError, "zero SNR"),
        (diffusers.EDMEulerScheduler(), ValueError, "no table of betas"),
    ],
    ids=["ours", "class", "thresholding", "no signal", "no betas"],
)
def test_schedulers_that_cannot_become_ours_are_refused(scheduler, error, message):
    with pytest.raises(error, match=message):
        VDMScheduler.from_diffusers(scheduler)


def test_betas_and_gammas_are_inverse():
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    torch.testing.assert_close(betas_of_gammas(gammas_from_betas(betas)), betas, rtol=1e-12, atol=0)


# ---- our solvers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("algorithm", "order"), [("ddim", 1), ("dpmsolver++", 2)])
def test_order_of_convergence(algorithm, order, prediction):
    """Against the ODE of Gaussian data, whose solution is z_s = m_s + √(V_s/V_t) (z_t − m_t)."""
    data = GaussianData(0.3, 0.09)
    schedule = FixedLinearGamma(-6.0, 6.0)
    denoiser = GaussianDenoiser(schedule, data.mean, data.variance, prediction)
    z = torch.randn(50, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (m_0, v_0), (m_1, v_1) = data.marginal(-6.0), data.marginal(6.0)
    exact = m_0 + math.sqrt(v_0 / v_1) * (z - m_1)
    counts, errors = [40, 80, 160, 320, 640], []
    for n in counts:
        scheduler = VDMScheduler.from_noise_schedule(schedule, algorithm=algorithm, prediction_type=prediction)
        errors.append(float((draw(scheduler, denoiser, z, n) - exact).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.15 < slope < order + 0.3, (slope, errors)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_second_order_is_nearer_at_few_steps(kind):
    ours = SCHEDULERS[kind]()
    denoiser = MixtureDenoiser(MIXTURE, ours.noise_schedule())
    z = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def result(algorithm, n):
        return draw(type(ours).from_config(ours.config, algorithm=algorithm), denoiser, z, n)

    reference = result("dpmsolver++", 1000)
    first, second = ((result(a, 20) - reference).square().mean().sqrt() for a in ("ddim", "dpmsolver++"))
    assert float(second) < 0.75 * float(first)


def test_a_second_order_chain_starts_afresh_and_clips():
    scheduler = VDMScheduler(algorithm="dpmsolver++")
    denoiser = MixtureDenoiser(MIXTURE, scheduler.noise_schedule())
    z = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    once = draw(scheduler, denoiser, z, 10)
    torch.testing.assert_close(draw(scheduler, denoiser, z, 10), once, rtol=0, atol=0)
    # without set_timesteps between, the first step of the next chain must not look at the last of this one
    torch.testing.assert_close(draw(scheduler, denoiser, z), once, rtol=0, atol=0)
    clipped = draw(VDMScheduler(algorithm="ddim", clip_sample=True, clip_sample_range=0.2), denoiser, z, 10)
    assert float(clipped.abs().max()) < 0.21
    with pytest.raises(ValueError, match="algorithm must be one of"):
        VDMScheduler(algorithm="euler")


# ---- in pipelines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTABLE)
def test_exported_schedulers_run_in_both_pipelines(name):
    unet = tiny_unet(zero_init=False)
    ours = VDMScheduler()
    pipes = [VDMPipeline(unet, ours)]
    # the stock pipeline hands a generator to every scheduler, which some of diffusers' own do not take
    if "generator" in inspect.signature(getattr(diffusers, name).step).parameters:
        pipes.append(DDPMPipeline(unet, ours))
    for pipe in pipes:
        pipe.scheduler = exported(ours, name)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(batch_size=2, num_inference_steps=6, generator=generator, output_type="np").images
        assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0
