"""guidance.py: guided predictions against exact denoisers, by the pipeline, by the ODE and by guiders of diffusers."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

from diffusers_vdm import (
    FixedLinearGamma,
    LinearBetaScheduler,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    diffusion,
    evaluate_ode,
    evaluate_vlb,
    ode,
)
from diffusers_vdm.guidance import GuidedNetwork
from tests.models import curved_gamma, network, pipeline, sample
from tests.tensors import F64, f64, normal, random_levels, seeded

SCHEDULE = FixedLinearGamma(-9.0, 4.0)
MEANS, VARIANCE = f64([-0.6, 0.1, 0.7]), 0.04


class ExactMixture(nn.Module):
    """E[ε | z_t, c] of scalars with p(x | c) = N(MEANS[c], VARIANCE) and equally probable c; class 3 is the null.

    `prediction_type` is what it returns; with `outputs=2` also variances.
    """

    dtype = F64
    config = FrozenDict(num_class_embeds=3, null_class=True, in_channels=1, sample_size=2)

    def __init__(self, prediction_type: str = "epsilon", outputs: int = 1, variance: float = VARIANCE):
        super().__init__()
        self.prediction_type, self.outputs, self.variance, self.calls = prediction_type, outputs, variance, 0

    def forward(self, z_t, timesteps, class_labels=None, return_dict=True):
        self.calls += 1
        labels = torch.full((len(z_t),), 3) if class_labels is None else class_labels
        gamma_t = SCHEDULE.gamma_of_timestep(timesteps)
        a, s = (diffusion.expand_like(part(gamma_t), z_t) for part in (diffusion.alpha, diffusion.sigma))
        power = a**2 * self.variance + s**2
        log_likelihood = -0.5 * (z_t[..., None] - a[..., None] * MEANS).square() / power[..., None]
        x_hats = MEANS + (a * self.variance / power)[..., None] * (z_t[..., None] - a[..., None] * MEANS)
        by_class = x_hats.gather(-1, labels.clamp(max=2).view(-1, 1, 1, 1, 1).expand(*z_t.shape, 1))[..., 0]
        mixed = (torch.softmax(log_likelihood, dim=-1) * x_hats).sum(-1)
        x_hat = torch.where((labels == 3).view(-1, 1, 1, 1), mixed, by_class)
        eps_hat = (z_t - a * x_hat) / s
        output = {"epsilon": eps_hat, "sample": x_hat, "v_prediction": a * eps_hat - s * x_hat}[self.prediction_type]
        return (torch.cat([output, 0.5 * z_t], dim=1) if self.outputs == 2 else output,)


def inputs() -> dict:
    return {
        "sample": normal(6, 1, 2, 2),
        "timestep": SCHEDULE.timestep(None, f64([-9.0, -4.0, -1.0, 0.0, 2.0, 4.0])),
        "class_labels": torch.tensor([0, 1, 2, 0, 1, 2]),
    }


def conditional_and_null(net, given=None) -> tuple[torch.Tensor, torch.Tensor]:
    given = given or inputs()
    null = given | {"class_labels": torch.full_like(given["class_labels"], 3)}
    return tuple(net(each["sample"], each["timestep"], each["class_labels"])[0] for each in (given, null))


def test_scale_1_is_the_conditional_network_to_the_bit_and_0_the_unconditional():
    conditional, null = conditional_and_null(ExactMixture())
    assert torch.equal(GuidedNetwork(ExactMixture(), SCHEDULE, 1.0)(**inputs())[0], conditional)
    assert torch.equal(GuidedNetwork(ExactMixture(), SCHEDULE, 0.0)(**inputs())[0], null)
    assert not torch.equal(conditional, null)


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_guided_eps_is_that_of_the_paper_whatever_the_network_predicts(scale, prediction_type):
    given = inputs()
    conditional, null = conditional_and_null(ExactMixture())
    net = ExactMixture(prediction_type)
    output = GuidedNetwork(net, SCHEDULE, scale)(**given)[0]
    assert net.calls == 1  # one batch for both
    gamma_t = SCHEDULE.gamma_of_timestep(given["timestep"])
    _, eps_hat = diffusion.predicted_x_and_eps(output, given["sample"], gamma_t, prediction_type)
    torch.testing.assert_close(eps_hat, (1 - scale) * null + scale * conditional, rtol=1e-9, atol=1e-9)


def test_guidance_samples_a_sharpened_class():
    """With Gaussian classes, ε̂ at scale w has the score of p(z | c)^w p(z)^{1 − w}: so samples move."""
    labels = torch.ones(2000, dtype=torch.long)  # the class in the middle, which is nearer to class 0 than to class 2
    z = normal(2000, 1, 1, 1)
    means = []
    for scale in (1.0, 2.0):
        net = GuidedNetwork(ExactMixture(), SCHEDULE, scale)
        found = ode.sample(net, SCHEDULE, z, class_labels=labels, rtol=1e-3, atol=1e-3).z.flatten()
        means.append(float(found.mean()))
        assert float(found.std()) < math.sqrt(VARIANCE) * 1.05
    assert means[0] == pytest.approx(float(MEANS[1]), abs=0.02)
    assert abs(means[1] - means[0]) > 0.002


def test_noise_levels_outside_of_the_interval_are_not_guided():
    given, net = inputs(), ExactMixture()
    gamma_t = SCHEDULE.gamma_of_timestep(given["timestep"])
    inside = (gamma_t >= -1.5) & (gamma_t <= 2.5)
    assert inside.tolist() == [False, False, True, True, True, False]
    conditional, null = conditional_and_null(ExactMixture())
    for scale in (3.0, 0.0):
        output = GuidedNetwork(net, SCHEDULE, scale, (-1.5, 2.5))(**given)[0]
        assert torch.equal(output[~inside], conditional[~inside])
        torch.testing.assert_close(output[inside], (null + scale * (conditional - null))[inside])
    none = GuidedNetwork(net, SCHEDULE, 3.0, (5.0, 6.0))(**given)[0]
    assert torch.equal(none, conditional)


def test_variances_are_those_of_the_condition():
    output = GuidedNetwork(ExactMixture(outputs=2), SCHEDULE, 3.0)(**inputs())[0]
    guided = GuidedNetwork(ExactMixture(), SCHEDULE, 3.0)(**inputs())[0]
    assert torch.equal(output[:, :1], guided)
    assert torch.equal(output[:, 1:], 0.5 * inputs()["sample"])


def test_autoguidance_moves_away_from_the_other_network_with_the_same_condition():
    given, weak = inputs(), ExactMixture(variance=0.2)
    strong, _ = conditional_and_null(ExactMixture())
    other, _ = conditional_and_null(weak)
    for scale, expected in ((1.0, strong), (0.0, other)):
        assert torch.equal(GuidedNetwork(ExactMixture(), SCHEDULE, scale, None, weak)(**given)[0], expected)
    found = GuidedNetwork(ExactMixture(), SCHEDULE, 2.5, None, weak)(**given)[0]
    torch.testing.assert_close(found, other + 2.5 * (strong - other))
    # the same network is no direction
    same = GuidedNetwork(ExactMixture(), SCHEDULE, 2.5, None, ExactMixture())(**given)[0]
    torch.testing.assert_close(same, strong)


def test_autoguidance_needs_no_classes():
    net, weak = network(1), network(1)
    with torch.no_grad():
        weak.conv_out.weight.mul_(0.5)
    z_t, schedule = normal(2, 1, 8, 8, dtype=torch.float32), FixedLinearGamma()
    with torch.no_grad():
        strong, other = (each(z_t, 300.0).sample for each in (net, weak))
        found = GuidedNetwork(net, schedule, 2.0, None, weak)(z_t, 300.0)[0]
    torch.testing.assert_close(found, other + 2.0 * (strong - other))


def test_bits_per_dim_are_never_of_a_guided_network():
    net, images = network(1, num_class_embeds=4, null_class=True), random_levels(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    guided = GuidedNetwork(net, SCHEDULE, 2.0)
    with pytest.raises(ValueError, match="unet must not be guided"):
        VariationalBound(guided, SCHEDULE)
    for evaluate in (evaluate_vlb, evaluate_ode):
        source = VDMScheduler() if evaluate is evaluate_vlb else SCHEDULE
        with pytest.raises(ValueError, match="unet must not be guided"):
            evaluate(guided, source, images, class_labels=labels)


# ---- the pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> VDMPipeline:
    return pipeline(VDMScheduler.from_noise_schedule(curved_gamma()), num_class_embeds=4, null_class=True)


@pytest.mark.parametrize("scheduler", ["ancestral", "ddim", "dpmsolver++", "linear beta", "diffusers"])
def test_pipeline_guides_every_sampler(pipe, scheduler):
    if scheduler in ("linear beta", "diffusers"):
        pipe.scheduler = LinearBetaScheduler(timestep_spacing="trailing")
        if scheduler == "diffusers":
            from diffusers import DDIMScheduler

            pipe.scheduler = DDIMScheduler(clip_sample=False)
    else:
        pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, algorithm=scheduler)
    given = {"class_labels": [0, 3], "generator": [seeded(1), seeded(2)]}
    plain = sample(pipe, **given)
    assert torch.equal(sample(pipe, **given | {"generator": [seeded(1), seeded(2)]}, guidance_scale=1.0), plain)
    again = {"generator": [seeded(1), seeded(2)]}
    none = sample(pipe, batch_size=2, **again)
    again = {"generator": [seeded(1), seeded(2)]}
    torch.testing.assert_close(sample(pipe, **given | again, guidance_scale=0.0), none)
    again = {"generator": [seeded(1), seeded(2)]}
    guided = sample(pipe, **given | again, guidance_scale=3.0)
    again = {"generator": [seeded(1), seeded(2)]}
    by_guider = sample(pipe, **given | again, guider=ClassifierFreeGuidance(3.0))
    torch.testing.assert_close(guided, by_guider, rtol=1e-4, atol=1e-4)
    assert float((guided - plain).abs().max()) > 1e-3 < float((guided - none).abs().max())
    again = {"generator": [seeded(1), seeded(2)]}
    torch.testing.assert_close(sample(pipe, **given | again, guidance_scale=3.0, guidance_interval=(90, 99)), plain)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_guider_gets_eps_whatever_the_network_predicts(pipe, prediction_type):
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    given = {"class_labels": [0, 3]}
    seen = []

    class Spy(ClassifierFreeGuidance):
        def forward(self, pred_cond, pred_uncond=None):
            seen.append(pred_cond)
            return super().forward(pred_cond, pred_uncond)

    guided = sample(pipe, **given, guidance_scale=2.0)
    torch.testing.assert_close(sample(pipe, **given, guider=Spy(2.0)), guided, rtol=1e-3, atol=1e-3)
    z_1 = torch.randn(2, 3, 8, 8, generator=seeded(7))
    timestep = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        output = pipe.unet(z_1, timestep, torch.tensor([0, 3])).sample
    gamma_t = pipe.scheduler.noise_schedule().gamma_of_timestep(timestep)
    torch.testing.assert_close(seen[0], diffusion.predicted_x_and_eps(output, z_1, gamma_t, prediction_type)[1])


def test_guider_acts_only_in_its_steps(pipe):
    given = {"class_labels": [1], "num_inference_steps": 10}
    half = sample(pipe, **given, guider=ClassifierFreeGuidance(2.0, start=0.0, stop=0.5))
    pipe.scheduler.set_timesteps(10)
    gammas = pipe.scheduler.noise_schedule().gamma_of_timestep(pipe.scheduler.timesteps)
    interval = (float(gammas[4] + gammas[5]) / 2, 99.0)
    torch.testing.assert_close(half, sample(pipe, **given, guidance_scale=2.0, guidance_interval=interval))


def test_callback_sees_and_changes_the_scale(pipe):
    seen = []

    def stop_guiding(pipe, i, t, tensors):
        seen.append(pipe.guidance_scale)
        pipe._guidance_scale = 1.0

    given = {"class_labels": [2], "num_inference_steps": 3}
    changed = sample(pipe, **given, guidance_scale=4.0, callback_on_step_end=stop_guiding)
    assert seen == [4.0, 1.0, 1.0] and pipe.guidance_scale == 1.0
    pipe.scheduler.set_timesteps(3)
    gammas = pipe.scheduler.noise_schedule().gamma_of_timestep(pipe.scheduler.timesteps)
    first = (float(gammas[0]) - 1e-3, 99.0)
    torch.testing.assert_close(changed, sample(pipe, **given, guidance_scale=4.0, guidance_interval=first))


def test_callback_can_begin_guidance_and_its_scale_is_checked(pipe):
    given = {"class_labels": [2], "num_inference_steps": 3}

    def begin(pipe, i, t, tensors):
        pipe._guidance_scale = 4.0

    begun, plain = sample(pipe, **given, callback_on_step_end=begin), sample(pipe, **given)
    assert float((begun - plain).abs().max()) > 1e-3
    seen = sample(pipe, **given, callback_on_step_end=lambda *_: None)
    assert torch.equal(seen, plain)

    def fail(pipe, i, t, tensors):
        pipe._guidance_scale = math.nan

    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        sample(pipe, **given, callback_on_step_end=fail)


def test_numbers_of_numpy_are_numbers(pipe):
    given = {"class_labels": [2]}
    expected = sample(pipe, **given, guidance_scale=2.0)
    for two in (np.float32(2), np.int64(2)):
        assert torch.equal(sample(pipe, **given, guidance_scale=two), expected)


def test_guidance_in_half_precision(pipe):
    exact = sample(pipe, class_labels=[0, 1], guidance_scale=2.0)
    half = sample(pipe.to(torch.bfloat16), class_labels=[0, 1], guidance_scale=2.0)
    assert half.dtype == torch.float32 and float((half - exact).abs().max()) < 0.3


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale=2 needs a condition"),
        ({"guider": ClassifierFreeGuidance(2.0)}, ValueError, "guider needs a condition"),
        ({"guidance_scale": math.nan, "class_labels": 1}, ValueError, "guidance_scale must be a finite number"),
        ({"guidance_scale": -1, "class_labels": 1}, ValueError, "guidance_scale must be a finite number"),
        ({"guidance_scale": True, "class_labels": 1}, TypeError, "guidance_scale must be a number"),
        ({"guidance_scale": "2", "class_labels": 1}, TypeError, "guidance_scale must be a number"),
        ({"guidance_interval": (2, 1), "class_labels": 1}, ValueError, "guidance_interval must be two"),
        (
            {"guidance_interval": (2, math.nan), "class_labels": 1},
            ValueError,
            "guidance_interval must be two",
        ),
        (
            {"guidance_interval": 3, "class_labels": 1},
            TypeError,
            "guidance_interval must be the lowest",
        ),
        ({"guider": object(), "class_labels": 1}, TypeError, "guider must be one of diffusers.guiders"),
        (
            {"guider": ClassifierFreeGuidance(2.0), "guidance_scale": 2.0, "class_labels": 1},
            ValueError,
            "guider replaces guidance_scale",
        ),
        ({"autoguidance": "weak", "class_labels": 1}, TypeError, "autoguidance must be a network"),
        ({"autoguidance": network(1), "guidance_scale": 2.0}, ValueError, "autoguidance must have the in_channels"),
        (
            {"autoguidance": network(3).train(), "guidance_scale": 2.0},
            ValueError,
            "autoguidance must not be in training",
        ),
        ({"guider": ClassifierFreeGuidance, "class_labels": 1}, TypeError, "guider must be an object, got the class"),
        ({"guidance_scale": 10**400, "class_labels": 1}, ValueError, "guidance_scale must be a finite number"),
    ],
)
def test_wrong_guidance_is_refused_before_any_step(pipe, arguments, error, message):
    pipe.scheduler.step = None  # no step can be taken
    with pytest.raises(error, match=message):
        pipe(**{"num_inference_steps": 3} | arguments)


@pytest.mark.parametrize("arguments", [{"guidance_interval": (-1.0, 1.0)}, {"autoguidance": network(3)}])
def test_arguments_without_effect_are_refused(pipe, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} has no effect with guidance_scale=1"):
        sample(pipe, class_labels=[1], **arguments)


def test_guidance_needs_a_null_class():
    pipe = pipeline(num_class_embeds=4)
    with pytest.raises(ValueError, match="guidance_scale=2 needs a network with the null of a condition"):
        pipe(class_labels=1, guidance_scale=2.0, num_inference_steps=3)
    weak = network(num_class_embeds=4)
    assert sample(pipe, class_labels=[1], guidance_scale=2.0, autoguidance=weak).isfinite().all()


def test_arguments_are_documented():
    text = inspect.getdoc(VDMPipeline.__call__)
    assert all(f"{name} (" in text for name in ("guidance_scale", "guidance_interval", "autoguidance", "guider"))
