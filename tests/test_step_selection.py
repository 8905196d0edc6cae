"""step_selection.py: the best timesteps, against all paths and against an evenly spaced chain."""

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_vdm import (
    LinearBetaScheduler,
    VDMScheduler,
    best_timesteps,
    evaluate_vlb,
    noise_schedule_of,
)
from diffusers_vdm.step_selection import best_levels
from tests.models import SmoothNet
from tests.oracles import GaussianDenoiser
from tests.tensors import random_levels

IMAGES = random_levels(3, 2, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("pixels", [(), (2, 1, 3)])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
def test_best_levels_by_trying_all_paths(num_steps, pixels, variance):
    generator = torch.Generator().manual_seed(num_steps)
    gammas = torch.rand(9, generator=generator, dtype=torch.float64).mul(3).cumsum(0) - 8
    mse = torch.rand(8, *pixels, generator=generator, dtype=torch.float64)

    def bits_of_step(s, t):
        m = [math.expm1(gammas[t] - gammas[s]) * error for error in mse[t - 1].flatten().tolist()]
        nats = [0.5 * (math.log(1 + each) if variance == "optimal" else each) for each in m]
        return sum(nats) / len(nats) / math.log(2)

    bits = {}
    for inner in combinations(range(1, 8), num_steps - 1):
        path = (0, *inner, 8)
        bits[path] = sum(bits_of_step(s, t) for s, t in pairwise(path))
    path, value = best_levels(gammas, mse, num_steps, variance)
    best = min(bits, key=bits.get)
    assert tuple(path.tolist()) == best and value == pytest.approx(float(bits[best]), rel=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "steps"),
    [
        (LinearBetaScheduler(200), {}, (3, 10, 50, 199)),
        (DDPMScheduler(200, clip_sample=False), {}, (3, 10, 50, 200)),
        (VDMScheduler(gamma_min=-9.0, gamma_max=6.0), {"num_steps": 200}, (3, 10, 50, 200)),
    ],
)
def test_best_timesteps_are_better_and_their_bound_is_the_predicted_one(scheduler, arguments, steps):
    """Predicted from other noise than it is measured with, so that they agree within the error."""
    data = torch.randint(0, 256, (64, 2, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    gammas = noise_schedule_of(scheduler)
    net = GaussianDenoiser(gammas, variance=1 / 3)
    fine = evaluate_vlb(net, scheduler, data, batch_size=64, progress_bar=False, **arguments)
    predicted = []
    for num_steps in steps:
        timesteps, bpd = best_timesteps(fine, num_steps)
        best = evaluate_vlb(net, scheduler, data, timesteps=timesteps, seed=1, progress_bar=False)
        assert best.num_steps == num_steps
        assert best.bpd == pytest.approx(bpd, abs=5 * best.stderr_bpd + 0.02)
        predicted.append(bpd)
    assert all(b < a + 0.01 for a, b in pairwise(predicted))  # but for what fits the noise of the measurement
    assert predicted[-1] == pytest.approx(fine.bpd, rel=1e-12)  # all the steps there are
    even = evaluate_vlb(net, scheduler, data, num_steps=steps[1] + (fine.num_steps == 199), seed=1, progress_bar=False)
    assert even.num_steps == steps[1] and even.bpd > predicted[1] + 0.1


@pytest.fixture
def result():
    """An evaluation by DDPM's 12 steps."""
    return evaluate_vlb(SmoothNet(), DDPMScheduler(12), IMAGES, progress_bar=False)


def test_more_steps_than_were_measured_are_refused(result):
    with pytest.raises(ValueError, match="num_steps must be an integer within"):
        best_timesteps(result, 13)


def test_best_timesteps_need_fixed_variances(result):
    with pytest.raises(ValueError, match="fixed_small"):
        best_timesteps(replace(result, variance_type="learned_range"), 3)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [([3, 5], "decreasing"), ([], "decreasing"), ([20, 0], "within|in "), ([2.5, 0], "integers")],
    ids=["increasing", "none", "range", "fraction"],
)
def test_wrong_timesteps_are_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        evaluate_vlb(SmoothNet(), DDPMScheduler(12), IMAGES, timesteps=timesteps, progress_bar=False)


def test_steps_are_given_by_number_or_by_list():
    with pytest.raises(ValueError, match="not both"):
        evaluate_vlb(SmoothNet(), DDPMScheduler(12), IMAGES, num_steps=3, timesteps=[3, 0], progress_bar=False)


def test_a_chain_does_not_start_at_its_end():
    with pytest.raises(ValueError, match=r"above that of γ\(0\)"):
        evaluate_vlb(SmoothNet(), VDMScheduler(), IMAGES, timesteps=[500.0, 0.0], progress_bar=False)
