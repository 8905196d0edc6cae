"""calibration.py, and what schedulers and the pipeline do with it: the best variance, and the best timesteps."""

import json
import math
from itertools import pairwise

import pytest
import torch

from diffusers_vdm import Calibration, LinearBetaScheduler, VDMPipeline, VDMScheduler
from diffusers_vdm.diffusion import optimal_log_variance, posterior_log_variance
from diffusers_vdm.step_selection import best_levels
from tests.models import curved_gamma, network
from tests.oracles import GaussianData, GaussianDenoiser
from tests.tensors import F64

DATA = GaussianData(mean=0.2, variance=0.3)


def exact(gamma_min=-9.0, gamma_max=6.0, num_gammas=2001, data=DATA, pixels=None) -> Calibration:
    """The table of the best denoiser of Gaussian data."""
    gammas = torch.linspace(gamma_min, gamma_max, num_gammas, dtype=F64)
    mse = data.eps_mmse(gammas)
    if pixels is not None:
        mse = torch.stack([GaussianData(0.0, v).eps_mmse(gammas) for v in pixels.flatten().tolist()], 1)
        mse = mse.reshape(num_gammas, *pixels.shape)
    return Calibration(gammas, mse, num_images=1)


def levels(num_steps, gamma_min=-9.0, gamma_max=6.0):
    return torch.linspace(gamma_min, gamma_max, num_steps + 1, dtype=F64)


# ---- the equations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_the_best_variance_makes_the_chain_of_gaussian_data_exact(num_steps):
    """The terms sum up to I(x; z_0) − I(x; z_1), for any number of steps; the posterior's variance needs many."""
    gammas = levels(num_steps)
    m = torch.expm1(gammas[1:] - gammas[:-1]) * DATA.eps_mmse(gammas[1:])
    information = [0.5 * math.log1p(math.exp(-float(gamma)) * DATA.variance) for gamma in (gammas[0], gammas[-1])]
    assert float(0.5 * torch.log1p(m).sum()) == pytest.approx(information[0] - information[1], rel=1e-12)
    assert float(0.5 * m.sum()) > information[0] - information[1]


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_a_variance_of_each_pixel_makes_pixels_of_different_variances_exact(num_steps):
    pixels = torch.tensor([0.01, 0.1, 1.0, 3.0], dtype=F64).reshape(1, 2, 2)
    gammas = levels(num_steps)
    _, bits = best_levels(gammas, exact(pixels=pixels).mse_at(gammas[1:]), num_steps, "optimal")
    information = [0.5 * torch.log1p(torch.exp(-gamma) * pixels).mean() for gamma in (gammas[0], gammas[-1])]
    assert bits * math.log(2) == pytest.approx(float(information[0] - information[1]), rel=1e-4)
    one = exact(pixels=pixels).reduced("level")
    _, of_levels = best_levels(gammas, one.mse_at(gammas[1:]), num_steps, "optimal")
    assert of_levels > bits + 0.01


def test_the_log_variance_is_that_of_the_exact_reverse_step():
    """z_s given z_t is Gaussian for Gaussian data: its variance from the joint covariance, in another way."""
    gamma_s, gamma_t = torch.tensor(-1.5, dtype=F64), torch.tensor(0.75, dtype=F64)
    a_s, a_t = torch.sigmoid(-gamma_s).sqrt(), torch.sigmoid(-gamma_t).sqrt()
    var_s = a_s**2 * DATA.variance + torch.sigmoid(gamma_s)
    var_t = a_t**2 * DATA.variance + torch.sigmoid(gamma_t)
    covariance = a_t / a_s * var_s  # z_t = (α_t/α_s) z_s + independent noise
    found = optimal_log_variance(gamma_s, gamma_t, DATA.eps_mmse(gamma_t))
    assert float(found.exp()) == pytest.approx(float(var_s - covariance**2 / var_t), rel=1e-12)
    assert float(exact().log_variance(gamma_s, gamma_t)) == pytest.approx(float(found), abs=1e-5)


def test_an_error_of_zero_gives_the_variance_of_the_posterior_to_the_bit():
    gamma_s, gamma_t = torch.tensor(-3.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    assert optimal_log_variance(gamma_s, gamma_t, torch.zeros(2, dtype=F64)).unique().tolist() == [
        float(posterior_log_variance(gamma_s, gamma_t))
    ]


def test_the_variance_at_the_data_is_the_limit_of_the_others():
    gamma_t, mse = torch.tensor(-4.0, dtype=F64), torch.tensor([0.2, 0.9], dtype=F64)
    limit = optimal_log_variance(torch.tensor(-math.inf, dtype=F64), gamma_t, mse)
    near = optimal_log_variance(torch.tensor(-40.0, dtype=F64), gamma_t, mse)
    torch.testing.assert_close(limit, near, rtol=1e-12, atol=0)
    torch.testing.assert_close(limit.exp(), mse * torch.exp(gamma_t), rtol=1e-12, atol=0)  # mse / SNR


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_is_exact_at_its_levels_and_between_its_neighbors():
    table = exact(num_gammas=33)
    torch.testing.assert_close(table.mse_at(table.gammas), table.mse, rtol=1e-12, atol=0)
    between = table.mse_at((table.gammas[1:] + table.gammas[:-1]) / 2)
    assert bool(((between < table.mse[1:].maximum(table.mse[:-1])) & (between > 0)).all())
    torch.testing.assert_close(between, DATA.eps_mmse((table.gammas[1:] + table.gammas[:-1]) / 2), rtol=0.02, atol=0)
    assert table.mse_at(-100.0) == table.mse[0] and table.mse_at(100.0) == table.mse[-1]


def test_a_table_of_zeros_stays_zero_between_its_levels():
    table = Calibration(torch.tensor([-1.0, 1.0]), torch.zeros(2), num_images=1)
    assert table.mse_at(torch.tensor([-2.0, -1.0, 0.3, 1.0, 2.0])).tolist() == [0.0] * 5


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 1, 1), None])
def test_a_table_comes_back_from_json_as_it_was(shape):
    mse = torch.rand(5, *(shape or ()), generator=torch.Generator().manual_seed(0), dtype=F64)
    table = Calibration(
        torch.arange(5.0), mse, num_images=7, num_draws=2, data="d, train", data_fingerprint="ab",
        weights_fingerprint="cd", clip_sample=True, seed=3,
    )  # fmt: skip
    again = Calibration.from_json(json.loads(json.dumps(table.to_json())))
    assert torch.equal(again.mse, table.mse) and torch.equal(again.gammas, table.gammas)
    assert again.to_json() == table.to_json() and again.detail == table.detail
    torch.testing.assert_close(table.mse, mse, rtol=1e-5, atol=0)  # rounded once


def test_less_detail_is_the_mean():
    mse = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    pixels = Calibration(torch.arange(4.0), mse, num_images=9, data="x")
    channels, level = pixels.reduced("channel"), pixels.reduced("level")
    assert (channels.detail, level.detail, level.num_images, level.data) == ("channel", "level", 9, "x")
    torch.testing.assert_close(channels.mse[:, :, 0, 0], mse.mean((2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(level.mse, mse.mean((1, 2, 3)), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="detail must be at most that of the table, 'level', got 'pixel'"):
        level.reduced("pixel")


@pytest.mark.parametrize(
    ("gammas", "mse", "message"),
    [
        ([0.0], [1.0], "gammas must be at least two"),
        ([1.0, 0.0], [1.0, 1.0], "gammas must be at least two finite increasing"),
        ([0.0, math.nan], [1.0, 1.0], "gammas must be at least two finite"),
        ([0.0, 1.0], [1.0, -1.0], "mse must hold finite numbers of at least 0"),
        ([0.0, 1.0], [1.0, math.nan], "mse must hold finite numbers"),
        ([0.0, 1.0], [1.0], r"mse must hold .* of shape \(2,\)"),
        ([0.0, 1.0], [[1.0], [1.0]], r"got shape \(2, 1\)"),
    ],
    ids=["one", "falling", "nan level", "negative", "nan", "short", "shape"],
)
def test_tables_that_are_none_are_refused(gammas, mse, message):
    with pytest.raises(ValueError, match=message):
        Calibration(torch.tensor(gammas), torch.tensor(mse), num_images=1)


@pytest.mark.parametrize(
    "values", [{}, {"gammas": [0, 1], "mse": [1, 1]}, {"gammas": "a", "mse": [1], "num_images": 1}, [1], "optimal"]
)
def test_json_that_is_no_calibration_is_refused(values):
    with pytest.raises(ValueError, match="calibration|gammas"):
        Calibration.from_json(values)


# ---- schedulers --------------------------------------------------------------------------------------------------


def schedulers():
    vdm = VDMScheduler(gamma_min=-9.0, gamma_max=6.0, variance="optimal", calibration=exact())
    betas = LinearBetaScheduler(200, variance="optimal", calibration=exact(-12.0, 8.0, 4001))
    return {"vdm": vdm, "betas": betas}


@pytest.mark.parametrize("kind", ["vdm", "betas"])
def test_samples_of_the_exact_chain_have_the_variance_of_the_data_after_three_steps(kind):
    scheduler = schedulers()[kind]
    plain = type(scheduler).from_config(scheduler.config, variance="posterior")
    for each, is_exact in ((scheduler, True), (plain, False)):
        net = GaussianDenoiser(each.noise_schedule(), DATA.mean, DATA.variance)
        each.set_timesteps(3)
        generator = torch.Generator().manual_seed(1)
        gamma = each._gammas_at(each.timesteps[0])
        mean, variance = DATA.marginal(gamma)
        z = mean + variance**0.5 * torch.randn(40_000, 1, 2, 2, generator=generator, dtype=F64)
        for t in each.timesteps[: 3 if kind == "vdm" else 2]:  # the last one leads to x̂ for a table of betas
            z = each.step(net(z, t, return_dict=False)[0], t, z, generator).prev_sample
        end = each.final_gamma if kind == "vdm" else each._gammas_at(each.timesteps[-1])
        ratio = float(z.var()) / float(DATA.marginal(end)[1])
        assert (abs(ratio - 1) < 0.015) == is_exact, ratio  # the error of this estimate is 0.0035


@pytest.mark.parametrize("kind", ["vdm", "betas"])
def test_a_scheduler_keeps_its_calibration_when_it_is_saved(kind, tmp_path):
    scheduler = schedulers()[kind]
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert again.config.variance == "optimal" and torch.equal(again.calibration.mse, scheduler.calibration.mse)
    assert again.best_timesteps(7) == scheduler.best_timesteps(7)
    assert type(scheduler).from_config(again.config, algorithm="ddim").calibration.num_images == 1


@pytest.mark.parametrize("algorithm", ["ddim", "dpmsolver++"])
def test_steps_without_noise_have_no_variance(algorithm):
    scheduler = schedulers()["vdm"]
    z, eps_hat = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    results = []
    for variance in ("posterior", "optimal"):
        each = VDMScheduler.from_config(scheduler.config, algorithm=algorithm, variance=variance)
        each.set_timesteps(4)
        results.append(each.step(eps_hat, each.timesteps[0], z).prev_sample)
    assert torch.equal(*results)


def test_a_zero_calibration_steps_like_the_posterior_to_the_bit():
    zeros = Calibration(torch.tensor([-9.0, 6.0]), torch.zeros(2), num_images=1)
    z, eps_hat = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    results = []
    for arguments in ({}, {"variance": "optimal", "calibration": zeros}):
        scheduler = VDMScheduler(gamma_min=-9.0, gamma_max=6.0, **arguments)
        scheduler.set_timesteps(4)
        noise = torch.Generator().manual_seed(2)
        results.append(scheduler.step(eps_hat, scheduler.timesteps[0], z, noise).prev_sample)
    torch.testing.assert_close(*results, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance": "optimal"}, "variance='optimal' needs a calibration"),
        ({"variance": "best"}, "variance must be one of"),
        ({"variance": "optimal", "calibration": {"mse": [1]}}, "calibration must be what calibrate returns"),
        (
            {"variance": "optimal", "calibration": exact(num_gammas=3), "variance_type": "learned_range"},
            "variance must be 'posterior' for variance_type='learned_range'",
        ),
    ],
    ids=["no calibration", "name", "json", "learned"],
)
@pytest.mark.parametrize("cls", [VDMScheduler, LinearBetaScheduler])
def test_wrong_variances_of_a_scheduler_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_a_calibration_for_other_images_is_refused():
    pixels = torch.ones(3, 4, 4, dtype=F64)
    scheduler = VDMScheduler(gamma_min=-9.0, gamma_max=6.0, variance="optimal", calibration=exact(pixels=pixels))
    scheduler.set_timesteps(2)
    z = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"must be for images of shape \(3, 8, 8\), got one for \(3, 4, 4\)"):
        scheduler.step(z, scheduler.timesteps[0], z)


# ---- the best timesteps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vdm", "betas"])
@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_the_best_timesteps_have_a_smaller_bound_than_even_ones(kind, variance):
    scheduler = type(schedulers()[kind]).from_config(schedulers()[kind].config, variance=variance)
    pixels = exact(-12.0, 8.0, 801, pixels=torch.tensor([[[0.001, 0.5]]], dtype=F64)).reduced("level")
    scheduler = type(scheduler).from_config(scheduler.config, calibration=pixels)

    def bits(timesteps):
        gammas = scheduler._gammas_at(torch.tensor(timesteps, dtype=F64)).flip(0)
        if kind == "vdm":
            gammas = torch.cat([scheduler.final_gamma[None], gammas])
        return best_levels(gammas, pixels.mse_at(gammas[1:]), len(gammas) - 1, variance)[1]

    for num_steps in (2, 5, 20):
        best = scheduler.best_timesteps(num_steps)
        assert len(best) == num_steps and all(b < a for a, b in pairwise(best))
        scheduler.set_timesteps(num_steps)
        assert bits(best) <= bits(scheduler.timesteps.tolist()) + 1e-12
        scheduler.set_timesteps(timesteps=best)
        assert scheduler.timesteps.tolist() == pytest.approx(best)


def test_the_ends_of_the_best_timesteps_are_those_of_the_chain():
    vdm, betas = schedulers().values()
    assert vdm.best_timesteps(5)[0] == pytest.approx(1000) and betas.best_timesteps(5)[0] == 199
    assert betas.best_timesteps(5)[-1] == 0 and vdm.best_timesteps(5)[-1] > 0


@pytest.mark.parametrize(("kind", "low", "high"), [("vdm", 1, 256), ("betas", 2, 200)])
def test_numbers_of_best_timesteps_that_do_not_exist_are_refused(kind, low, high):
    scheduler = schedulers()[kind]
    assert len(scheduler.best_timesteps(low)) == low and len(scheduler.best_timesteps(high)) == high
    for wrong in {max(1, low - 1), high + 1} - {low}:
        with pytest.raises(ValueError, match=rf"num_steps must be within \[{low}, {high}\]"):
            scheduler.best_timesteps(wrong)
    with pytest.raises(ValueError, match="the best timesteps need a calibration"):
        type(scheduler).from_config(scheduler.config, calibration=None, variance="posterior").best_timesteps(4)


def test_the_pipeline_takes_the_best_timesteps(generator):
    schedule = curved_gamma()
    gammas = torch.linspace(*(float(end) for end in schedule.ends()), 65, dtype=F64)
    table = Calibration(gammas, DATA.eps_mmse(gammas), num_images=1)
    scheduler = VDMScheduler.from_noise_schedule(schedule, calibration=table, variance="optimal")
    pipe = VDMPipeline(network(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, 5, generator, timesteps="best", output_type="pt").images
    assert images.shape[0] == 2 and pipe.scheduler.timesteps.tolist() == pytest.approx(scheduler.best_timesteps(5))


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [("worst", "timesteps must be a decreasing list, 'best' or None"), ("best", "need a calibration")],
)
def test_timesteps_of_the_pipeline_by_a_wrong_name_are_refused(timesteps, message):
    pipe = VDMPipeline(network(), VDMScheduler.from_noise_schedule(curved_gamma()))
    with pytest.raises(ValueError, match=message):
        pipe(1, 5, timesteps=timesteps)
