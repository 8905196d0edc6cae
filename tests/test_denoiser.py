"""denoiser.py: networks that also predict variances, in every part of the package that calls a network."""

import ast
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from torch import nn

import diffusers_vdm
from diffusers_vdm import (
    FixedLinearGamma,
    LinearBetaScheduler,
    SimpleObjective,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_mc,
    evaluate_ode,
    evaluate_vlb,
    noise_schedule_of,
    ode,
)
from diffusers_vdm.commands import convert, sample
from diffusers_vdm.conversion.diffusers import load_diffusers
from diffusers_vdm.denoiser import call_network, predict, split_output, working_dtype
from diffusers_vdm.diffusion import PREDICTION_TYPES, predicted_x_and_eps
from diffusers_vdm.randomness import keyed_generator
from diffusers_vdm.sharing.remote_code import save_code
from tests.models import SmoothNet, tiny_unet
from tests.running import run_python
from tests.tensors import F64, normal, seeded

# of diffusers' schedulers, which hand a tensor to NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
T = 20
LEARNED = ("learned_range", "learned")


def network(cls=UNet2DModel, channels=3, outputs=None, **arguments):
    """A network with random weights, by default one that predicts variances: twice the channels of its input."""
    channels = {"in_channels": channels, "out_channels": outputs or 2 * channels}
    unet = tiny_unet(cls, add_attention=False, **channels, **arguments)
    source = seeded(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return unet.eval()


def without_variances(unet):
    """The same prediction from a network of C channels."""
    half = network(type(unet), unet.config.in_channels, unet.config.in_channels)
    state = {name: v[: len(v) // 2] if name.startswith("conv_out") else v for name, v in unet.state_dict().items()}
    half.load_state_dict(state)
    return half


def ddpm(variance_type="learned_range", **arguments):
    return DDPMScheduler(T, 1e-3, 0.3, **{"variance_type": variance_type, "clip_sample": False, **arguments})


def in_float64(scheduler):
    """One of diffusers' with tables in float64: what it would compute without rounding them."""
    scheduler.betas = torch.linspace(1e-3, 0.3, T, dtype=F64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=F64)
    return scheduler


def images(channels=3, n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)


def drawn(pipe, steps=5, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, "generator": seeded(), "output_type": "latent", **arguments}
    return pipe(2, **arguments).images


# ---- the module itself -------------------------------------------------------------------------------------------


def test_channels_are_the_prediction_or_prediction_and_variance():
    z = torch.zeros(2, 3, 4, 4)
    output = normal(2, 6, 4, 4)
    prediction, values = split_output(output, z)
    assert torch.equal(prediction, output[:, :3]) and torch.equal(values, output[:, 3:])
    prediction, values = split_output(output[:, :3], z)
    assert torch.equal(prediction, output[:, :3]) and values is None


class ConstantShape(nn.Module):
    """A network whose output always has one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, z, timestep, return_dict=False):
        return (torch.zeros(self.shape),)


X, LEVELS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
CALLS = {
    "split_output": lambda net: split_output(torch.zeros(net.shape), X),
    "bound": lambda net: VariationalBound(net, FixedLinearGamma())(LEVELS),
    "simple": lambda net: SimpleObjective(net, FixedLinearGamma())(LEVELS),
    "ode": lambda net: ode.sample(net, FixedLinearGamma(), X),
    "all terms": lambda net: evaluate_vlb(net, VDMScheduler(), LEVELS, num_steps=2, progress_bar=False),
    "step": lambda net: VDMScheduler().step(torch.zeros(net.shape), 500.0, X),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 9, 4, 4), (2, 6, 4, 8), (1, 6, 4, 4), (2, 6, 4), (2, 1, 4, 4)])
def test_outputs_of_other_shapes_are_refused_everywhere(shape, call):
    with pytest.raises(ValueError, match=r"must have their shape, or twice their channels"):
        CALLS[call](ConstantShape(shape))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("outputs", [3, 6])
def test_a_prediction_is_that_of_the_equations(prediction_type, outputs):
    unet, z = network(outputs=outputs), normal(2, 3, 8, 8, dtype=torch.float32)
    gamma = torch.tensor([-3.0, 2.0], dtype=F64)
    timesteps = torch.tensor([1.0, 7.5])
    with torch.no_grad():
        raw = unet(z, timesteps).sample
        said = predict(unet, z, gamma, timesteps, prediction_type)
    x_hat, eps_hat = predicted_x_and_eps(raw[:, :3], z, gamma, prediction_type)
    assert torch.equal(said.output, raw[:, :3])
    assert torch.equal(said.x_hat, x_hat) and torch.equal(said.eps_hat, eps_hat)
    if outputs == 3:
        assert said.variance_values is None
    else:
        assert torch.equal(said.variance_values, raw[:, 3:])
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        predict(unet, z, gamma, timesteps, "x")


def test_conditions_that_are_none_are_left_out():
    seen = {}

    class Asked(nn.Module):
        def forward(self, z, timestep, return_dict=True, **conditions):
            seen.update(conditions, return_dict=return_dict)
            return (z,)

    labels = torch.tensor([1, 2])
    call_network(Asked(), torch.zeros(2, 3, 4, 4), torch.tensor(1.0), class_labels=labels, augmentation_flags=None)
    assert seen.pop("class_labels") is labels and seen == {"return_dict": False}


def types_of_inputs(unet, wrap=lambda unet: unet):
    """The types in which a network and its first convolution get their input, and that of the output."""
    seen = []
    for module in (unet, unet.conv_in):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    called = wrap(unet)
    z = normal(2, 3, 8, 8, dtype=working_dtype(called))
    with torch.no_grad():
        seen.append(call_network(called, z, torch.tensor(3.0)).dtype)
    assert z.dtype == working_dtype(unet)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_our_network_keeps_the_digits_of_its_input_and_others_get_their_own_type(dtype):
    high = torch.promote_types(dtype, torch.float32)
    assert types_of_inputs(network(VDMUNet2DModel, fourier_exponents=(6, 7)).to(dtype)) == [high, dtype, high]
    assert types_of_inputs(network().to(dtype)) == [dtype, dtype, high]


def test_a_compiled_network_keeps_the_digits_of_its_input():
    # the pipeline asked for the class of the network, which `torch.compile` wraps
    unet = network(VDMUNet2DModel, fourier_exponents=(6, 7)).to(torch.bfloat16)
    seen = types_of_inputs(unet, lambda unet: torch.compile(unet, backend="eager"))
    assert seen[0] == seen[-1] == torch.float32 and torch.bfloat16 in seen


@pytest.mark.parametrize("cls", [UNet2DModel, VDMUNet2DModel])
def test_half_precision_networks_are_measured_and_sampled(cls):
    # a UNet2DModel in bfloat16 could be sampled, but not measured: it was given float32
    unet, levels = network(cls).to(torch.bfloat16), images()
    scheduler = VDMScheduler.from_diffusers(ddpm())
    schedule = scheduler.noise_schedule()
    assert VariationalBound(unet, schedule)(levels).total.dtype == torch.float32
    assert evaluate_vlb(unet, scheduler, levels, num_steps=3, progress_bar=False).per_image_bpd.isfinite().all()
    assert evaluate_ode(unet, schedule, levels[:1], rtol=1, atol=1, progress_bar=False).per_image_bpd.isfinite().all()
    assert drawn(VDMPipeline(unet, scheduler)).dtype == torch.float32


# ---- the ancestral step ------------------------------------------------------------------------------------------


def both_of_ours(theirs):
    """Our schedulers with the levels of one of diffusers'."""
    return VDMScheduler.from_diffusers(theirs), LinearBetaScheduler.from_config(theirs.config)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("variance_type", LEARNED)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_step_is_that_of_ddpm(variance_type, prediction_type, clip_sample):
    theirs = ddpm(variance_type, prediction_type=prediction_type, clip_sample=clip_sample)
    in_float64(theirs).set_timesteps(T)
    for ours, steps in zip(both_of_ours(theirs), (T - 1, T), strict=True):  # one of them ends at the first level
        assert ours.config.variance_type == variance_type
        ours.set_timesteps(steps)
        visited = 0
        for t in ours.timesteps:
            z, output = normal(2, 3, 4, 4, seed=int(t)), normal(2, 6, 4, 4, seed=1000 + int(t))
            output[:, 3:] = output[:, 3:].tanh() if variance_type == "learned_range" else output[:, 3:].abs()
            expected = theirs.step(output, int(t), z, generator=seeded())
            got = ours.step(output, t, z, generator=seeded())
            torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=0, atol=1e-10)
            torch.testing.assert_close(got.pred_original_sample, expected.pred_original_sample, rtol=1e-12, atol=1e-10)
            visited += 1
        assert visited == steps


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("variance_type", LEARNED)
def test_steps_over_several_levels_are_those_of_ddpm(steps, variance_type):
    theirs = in_float64(ddpm(variance_type))
    ours = LinearBetaScheduler.from_config(theirs.config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    for t in theirs.timesteps:
        z, output = normal(2, 3, 4, 4, seed=int(t)), normal(2, 6, 4, 4, seed=1000 + int(t))
        output[:, 3:] = output[:, 3:].abs()
        expected = theirs.step(output, int(t), z, generator=seeded()).prev_sample
        got = ours.step(output, t, z, generator=seeded()).prev_sample
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_the_ends_of_the_range_are_the_two_variances_of_ddpm():
    for value, variance_type in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        theirs = in_float64(ddpm(variance_type))
        theirs.set_timesteps(T)
        ours = VDMScheduler.from_diffusers(ddpm())
        ours.set_timesteps(T - 1)
        for t in ours.timesteps:
            z, output = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=4)
            expected = theirs.step(output, int(t), z, generator=seeded()).prev_sample
            both = torch.cat([output, torch.full_like(output, value)], 1)
            got = ours.step(both, t, z, generator=seeded()).prev_sample
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
def test_a_list_of_generators_makes_each_sample_its_own(cls):
    scheduler = cls(variance_type="learned_range")
    z, output, t = normal(3, 1, 4, 4), normal(3, 2, 4, 4, seed=4), scheduler.timesteps[400]
    together = scheduler.step(output, t, z, generator=[seeded(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(output[i : i + 1], t, z[i : i + 1], generator=[seeded(i)]).prev_sample
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
def test_half_precision_samples_come_back_in_their_type(cls, dtype):
    scheduler = cls(variance_type="learned_range")
    for t in scheduler.timesteps[[0, 400, 999]]:
        out = scheduler.step(torch.zeros(2, 6, 4, 4, dtype=dtype), t, torch.ones(2, 3, 4, 4, dtype=dtype))
        assert out.prev_sample.dtype == dtype and out.prev_sample.isfinite().all()


@pytest.mark.parametrize("algorithm", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("variance_type", ["fixed_small", *LEARNED])
@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
def test_steps_without_noise_ignore_the_variance(cls, variance_type, algorithm):
    plain, ours = cls(algorithm=algorithm), cls(algorithm=algorithm, variance_type=variance_type)
    z = [normal(2, 3, 4, 4)] * 3
    plain.set_timesteps(5)
    for steps in (ours, copy.deepcopy(ours)):
        steps.set_timesteps(5)
    other = copy.deepcopy(ours)
    for i, t in enumerate(plain.timesteps):
        output = normal(2, 6, 4, 4, seed=10 + i)
        z[0] = plain.step(output[:, :3], t, z[0]).prev_sample
        z[1] = ours.step(output, t, z[1]).prev_sample
        z[2] = other.step(output[:, :3], t, z[2]).prev_sample
    assert torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
def test_an_ancestral_step_needs_the_channels_of_its_variance_type(cls):
    z, t = torch.zeros(2, 3, 4, 4), cls().timesteps[5]
    with pytest.raises(ValueError, match="remove the predicted variances from the output, or set .*'learned_range'"):
        cls().step(torch.zeros(2, 6, 4, 4), t, z)
    for variance_type in LEARNED:
        with pytest.raises(ValueError, match=f"variance_type='{variance_type}' needs .* twice the channels"):
            cls(variance_type=variance_type).step(torch.zeros(2, 3, 4, 4), t, z)


# ---- configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
@pytest.mark.parametrize("variance_type", ["fixed_small", *LEARNED])
def test_the_variance_type_is_kept_by_save_and_load(cls, variance_type, tmp_path):
    cls(variance_type=variance_type).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.variance_type == variance_type
    assert cls.from_pretrained(tmp_path, algorithm="ddim").config.variance_type == variance_type
    assert cls.from_pretrained(tmp_path, variance_type="fixed_small").config.variance_type == "fixed_small"
    # as written by an earlier version
    path = tmp_path / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["variance_type"]
    path.write_text(json.dumps(config))
    assert cls.from_pretrained(tmp_path).config.variance_type == "fixed_small"
    path.write_text(json.dumps(config | {"variance_type": variance_type}))
    assert cls.from_pretrained(tmp_path).config.variance_type == variance_type


@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
@pytest.mark.parametrize("variance_type", ["fixed_large", "fixed_small_log", "learned-range", None, 3, ["learned"]])
def test_other_variance_types_are_refused(cls, variance_type):
    with pytest.raises(ValueError, match="variance_type must be one of"):
        cls(variance_type=variance_type)
    if variance_type in (None, "fixed_small_log"):  # words of diffusers' configs for what we do
        assert cls.from_config({**cls().config, "variance_type": variance_type}).config.variance_type == "fixed_small"
    else:
        with pytest.raises(ValueError, match="cannot honor variance_type="):
            cls.from_config({**cls().config, "variance_type": variance_type})


@pytest.mark.parametrize("variance_type", LEARNED)
@pytest.mark.parametrize("other", [DDPMScheduler, DDPMParallelScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_the_variance_type_is_kept_by_an_export_and_back(variance_type, other):
    theirs = ddpm(variance_type)
    for ours in both_of_ours(theirs):
        made = [other.from_config(ours.config)]
        assert type(ours).from_config(made[0].config).config.variance_type == variance_type
        made.append(ours.to_diffusers(other))
        for each in made:
            assert other is DDIMScheduler or each.config.variance_type == variance_type
            assert other is not DDIMScheduler or each.config.get("variance_type", variance_type) == variance_type
    assert VDMScheduler().to_diffusers(DDPMScheduler).config.variance_type == "fixed_small"
    assert ours.to_diffusers(DDPMScheduler, variance_type="fixed_large").config.variance_type == "fixed_large"


def test_fixed_variances_of_diffusers_stay_fixed_small():
    for variance_type in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"):
        assert VDMScheduler.from_diffusers(ddpm(variance_type)).config.variance_type == "fixed_small"
    chosen = VDMScheduler.from_diffusers(ddpm(), variance_type="fixed_small")
    assert chosen.config.variance_type == "fixed_small"
    assert VDMScheduler.from_diffusers(DPMSolverMultistepScheduler(variance_type="learned")).config.variance_type == (
        "learned"
    )


# ---- likelihood --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [UNet2DModel, VDMUNet2DModel])
def test_training_and_the_ode_use_the_prediction_alone(cls):
    unet, levels = network(cls), images()
    half = without_variances(unet)
    schedule = noise_schedule_of(ddpm())
    for objective in (VariationalBound, SimpleObjective):
        losses = [objective(each, schedule)(levels, generator=seeded()).loss for each in (unet, half)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    losses[0].backward()
    gradient = unet.conv_out.weight.grad
    assert gradient[:3].abs().min() > 0 and not gradient[3:].any()
    z, loose = normal(1, 3, 8, 8, dtype=torch.float32), {"rtol": 1e-1, "atol": 1e-1}
    ends = [ode.sample(each, schedule, z, **loose).z for each in (unet, half)]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
    for measure in (
        lambda each: evaluate_mc(VariationalBound(each, schedule), levels, num_samples=2, progress_bar=False),
        lambda each: evaluate_ode(each, schedule, levels[:1], progress_bar=False, **loose),
    ):
        torch.testing.assert_close(*(measure(each).per_image_bpd for each in (unet, half)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_large", *LEARNED])
@pytest.mark.parametrize("steps", [T - 1, 6])
def test_terms_down_to_z_0_are_divergences_of_two_gaussians(variance_type, steps):
    """KL(q(z_s|z_t,x) ‖ p(z_s|z_t)) by torch's own formula, with the moments of both in DDPM's α, β and ᾱ."""
    theirs, levels = ddpm(variance_type), images(n=1)
    if variance_type == "fixed_large" or steps < T - 1:
        chain = {"convention": "vdm", "timesteps": np.linspace(T - 1, 0, steps + 1).round().tolist()}
        scheduler = theirs
    else:
        chain, scheduler = {}, VDMScheduler.from_diffusers(theirs)
    unet = SmoothNet(2 if variance_type in LEARNED else 1)
    result = evaluate_vlb(unet, scheduler, levels, seed=5, progress_bar=False, **chain)
    assert result.variance_type == variance_type and result.num_steps == steps
    alphas_bar = torch.cumprod(1 - torch.linspace(1e-3, 0.3, T, dtype=F64), 0)
    visited = np.linspace(0, T - 1, steps + 1).round().astype(int)
    x = (2 * levels.double() + 1) / 256 - 1
    for k in range(steps):
        s, t = visited[k], visited[k + 1]
        bar_s, bar_t = alphas_bar[s], alphas_bar[t]
        alpha, beta = bar_t / bar_s, 1 - bar_t / bar_s
        eps = torch.randn(3, 8, 8, generator=keyed_generator(5, k, 0)).double()[None]
        z = bar_t.sqrt() * x + (1 - bar_t).sqrt() * eps
        out, values = split_output(unet(z, torch.tensor(t))[0], z)
        x_hat = (z - (1 - bar_t).sqrt() * out) / bar_t.sqrt()
        mean = lambda x: bar_s.sqrt() * beta / (1 - bar_t) * x + alpha.sqrt() * (1 - bar_s) / (1 - bar_t) * z  # noqa: E731, B023
        small = (1 - bar_s) / (1 - bar_t) * beta
        if variance_type == "learned_range":
            variance = beta ** ((values + 1) / 2) * small ** ((1 - values) / 2)
        else:
            variance = beta if values is None else values
        q = torch.distributions.Normal(mean(x), small.sqrt())
        p = torch.distributions.Normal(mean(x_hat), variance.sqrt())
        nats = torch.distributions.kl_divergence(q, p).mean()
        assert float(result.terms_bpd[0, k]) == pytest.approx(float(nats) / np.log(2), rel=1e-9), k


def test_the_bound_by_all_terms_needs_the_channels_of_the_variance_type():
    unet, levels = network(), images()
    measure = lambda unet, scheduler: evaluate_vlb(unet, scheduler, levels, num_steps=4, progress_bar=False)  # noqa: E731
    for scheduler in (VDMScheduler(), LinearBetaScheduler(), ddpm("fixed_large")):
        with pytest.raises(ValueError, match="or set variance_type='learned_range'"):
            measure(unet, scheduler)
    for scheduler in (VDMScheduler(variance_type="learned_range"), ddpm("learned")):
        with pytest.raises(ValueError, match="variance_type='learned.*' needs a network with twice the channels"):
            measure(without_variances(unet), scheduler)


def test_ours_and_theirs_give_one_bound_of_one_checkpoint():
    theirs, unet, levels = ddpm(), network(), images()
    for ours in both_of_ours(theirs):
        convention = "ddpm" if isinstance(ours, LinearBetaScheduler) else "vdm"
        results = [
            evaluate_vlb(unet, scheduler, levels, convention=convention, progress_bar=False)
            for scheduler in (theirs, ours)
        ]
        assert results[0].variance_type == results[1].variance_type == "learned_range"
        torch.testing.assert_close(results[0].terms_bpd, results[1].terms_bpd, rtol=1e-5, atol=1e-7)


# ---- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
def test_pipelines_of_both_libraries_draw_the_same(cls, channels):
    theirs, unet = ddpm(), network(channels=channels)
    ours = both_of_ours(theirs)[cls is LinearBetaScheduler]
    expected = drawn(VDMPipeline(unet, theirs), T)
    if isinstance(ours, LinearBetaScheduler):
        torch.testing.assert_close(drawn(VDMPipeline(unet, ours), T), expected, rtol=1e-3, atol=1e-3)
    # the loop of diffusers hands over all the channels
    pipe = DDPMPipeline(unet, ours)
    pipe.set_progress_bar_config(disable=True)
    by_stock = pipe(2, generator=seeded(), num_inference_steps=T, output_type="pt").images
    by_ours = (drawn(VDMPipeline(unet, ours), T) / 2 + 0.5).clamp(0, 1)
    if isinstance(by_stock, np.ndarray):  # of shape (B, H, W, C), in the oldest diffusers
        by_stock = torch.from_numpy(by_stock).permute(0, 3, 1, 2)
    torch.testing.assert_close(by_stock, by_ours, rtol=0, atol=1e-5)
    # and the variance matters
    fixed = VDMPipeline(without_variances(unet), type(ours).from_config(ours.config, variance_type="fixed_small"))
    assert float((drawn(fixed, T) - drawn(VDMPipeline(unet, ours), T)).abs().max()) > 0.05


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("algorithm", ["ddim", "dpmsolver++"])
def test_deterministic_samplers_draw_what_the_prediction_alone_gives(algorithm, channels):
    unet = network(channels=channels)
    half = without_variances(unet)
    stock = DDIMScheduler if algorithm == "ddim" else DPMSolverMultistepScheduler
    for ours in both_of_ours(ddpm()):
        ours = type(ours).from_config(ours.config, algorithm=algorithm)
        for scheduler in (ours, ours.to_diffusers(stock), stock.from_config(ours.config)):
            one, other = (drawn(VDMPipeline(each, scheduler)) for each in (unet, half))
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_scheduler_of_diffusers_that_does_not_fit_is_refused():
    for scheduler, unet in ((ddpm("fixed_small"), network()), (ddpm(), without_variances(network()))):
        with pytest.raises(ValueError, match="variance_type=.* needs a network with"):
            drawn(VDMPipeline(unet, scheduler))


# ---- saving, conversion, code ------------------------------------------------------------------------------------


def test_a_saved_pipeline_draws_the_same(tmp_path):
    for i, scheduler in enumerate(both_of_ours(ddpm())):
        pipe = VDMPipeline(network(VDMUNet2DModel), scheduler)
        pipe.save_pretrained(tmp_path / str(i))
        assert torch.equal(drawn(VDMPipeline.from_pretrained(tmp_path / str(i))), drawn(pipe))


@pytest.mark.parametrize(
    "sampler", ["ancestral", "ddim", "dpmsolver++", "DDPMScheduler", "DPMSolverMultistepScheduler"]
)
def test_every_sampler_of_the_command_takes_the_checkpoint(sampler, tmp_path):
    for i, scheduler in enumerate((*both_of_ours(ddpm()), ddpm())):
        pipe = VDMPipeline(network(), sample.choose_scheduler(scheduler, sampler))
        assert drawn(pipe, 4).isfinite().all()
        pipe.save_pretrained(tmp_path / str(i))
        again = VDMPipeline.from_pretrained(tmp_path / str(i))
        assert drawn(again, 4).shape == (2, 3, 8, 8) and drawn(again, 4).isfinite().all()


@pytest.mark.parametrize("variance_type", LEARNED)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_the_checkpoint_is_converted(variance_type, beta_schedule, tmp_path, capsys):
    theirs = DDPMPipeline(network(), ddpm(variance_type, beta_schedule=beta_schedule))
    theirs.save_pretrained(tmp_path / "ddpm")
    convert.main(["diffusers", str(tmp_path / "ddpm"), str(tmp_path / "ours")])
    assert "ignored" not in capsys.readouterr().out
    pipe = VDMPipeline.from_pretrained(tmp_path / "ours")
    assert isinstance(pipe.unet, VDMUNet2DModel) and pipe.unet.config.out_channels == 6
    assert pipe.scheduler.config.variance_type == variance_type
    z, t = normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor(7)
    with torch.no_grad():
        assert torch.equal(pipe.unet(z, t).sample, theirs.unet(z, t).sample)
    if variance_type == "learned":
        return  # this network's variances are negative
    one, other = (
        evaluate_vlb(each.unet, each.scheduler, images(), convention="vdm", progress_bar=False)
        for each in (theirs, pipe)
    )
    torch.testing.assert_close(one.terms_bpd, other.terms_bpd, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("variance_type", "outputs"), [("fixed_large", 6), ("learned_range", 3), ("fixed_small", 5)])
def test_a_network_that_does_not_fit_its_scheduler_is_not_converted(variance_type, outputs, tmp_path):
    DDPMPipeline(network(outputs=outputs), ddpm(variance_type)).save_pretrained(tmp_path / "ddpm")
    message = f"output channels for its 3 input channels .*variance_type='{variance_type}', got {outputs}"
    with pytest.raises(ValueError, match=message):
        load_diffusers(tmp_path / "ddpm")


def test_the_generated_code_draws_the_same_without_the_package(tmp_path):
    pipe = VDMPipeline(network(VDMUNet2DModel), VDMScheduler.from_diffusers(ddpm()))
    pipe.save_pretrained(tmp_path / "pipe")
    save_code(tmp_path / "pipe")
    code = f"""
import sys
sys.modules["diffusers_vdm"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "pipe")!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="latent").images
print(pipe.scheduler.config.variance_type, images.double().flatten().tolist())
"""
    done = run_python("-c", code, cwd=tmp_path, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    name, numbers = done.stdout.strip().split(" ", 1)
    assert name == "learned_range"
    torch.testing.assert_close(torch.tensor(json.loads(numbers)), drawn(pipe).flatten(), rtol=1e-5, atol=1e-5)


def test_the_network_is_called_in_one_place():
    """`training/cost.py` counts the operations of a stand-in; nothing else makes a prediction by itself."""
    package = Path(diffusers_vdm.__file__).parent
    callers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("unet", "network", "fake"):
                if any(keyword.arg == "return_dict" for keyword in node.keywords):
                    callers.add(path.relative_to(package).as_posix())
    assert callers == {"denoiser.py", "training/cost.py"}
