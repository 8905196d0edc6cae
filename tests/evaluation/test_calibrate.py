"""evaluation/calibrate.py, and the bound with the variance that a calibration gives."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusers_vdm import (
    Calibration,
    LinearBetaScheduler,
    VDMScheduler,
    best_timesteps,
    calibrate,
    evaluate_vlb,
    noise_schedule_of,
)
from diffusers_vdm.diffusion import x_from_levels
from diffusers_vdm.randomness import keyed_generator
from tests.models import SmoothNet, tiny_unet
from tests.oracles import ENTROPY, X_DDPM, X_VDM, BestNetwork, draw_images, gamma_of_timestep
from tests.tensors import F64, random_levels

VDM = VDMScheduler(gamma_min=-9.0, gamma_max=6.0)
DDPM = DDPMScheduler(60, clip_sample=False, beta_end=0.2)
TRAIN, TEST = random_levels(6, 2, 4, 4, dtype=torch.uint8), random_levels(3, 2, 4, 4, dtype=torch.uint8, seed=5)


def best_network(scheduler):
    """The posterior mean of independent 8-bit pixels, for a scheduler of ours or of diffusers."""
    schedule = noise_schedule_of(scheduler)
    levels = X_DDPM if isinstance(scheduler, DDPMScheduler) else X_VDM
    return BestNetwork(lambda timesteps: gamma_of_timestep(schedule, timesteps), levels)


def quiet(net, scheduler, images, **arguments):
    return evaluate_vlb(net, scheduler, images, progress_bar=False, **arguments)


# ---- the measurement ---------------------------------------------------------------------------------------------


def test_the_table_is_the_mean_of_the_errors_at_its_levels():
    net = SmoothNet()
    table = calibrate(net, VDM, TRAIN, num_gammas=5, detail="pixel", num_draws=2, seed=4, progress_bar=False)
    x = x_from_levels(TRAIN, 256, F64)
    for k, gamma in enumerate(torch.linspace(-9, 6, 5, dtype=F64)):
        errors = []
        for i in range(len(TRAIN)):
            for draw in range(2):
                source = keyed_generator(4, "calibration", k, draw, i)
                eps = torch.randn(x[i].shape, generator=source).double()
                z = torch.sigmoid(-gamma).sqrt() * x[i] + torch.sigmoid(gamma).sqrt() * eps
                eps_hat = net(z[None], torch.tensor((float(gamma) + 9) / 15 * 1000))[0][0]
                errors.append((eps - eps_hat).square())
        torch.testing.assert_close(table.mse[k], torch.stack(errors).mean(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scheduler", [VDM, LinearBetaScheduler(60), DDPM], ids=lambda s: type(s).__name__)
def test_the_batch_size_changes_nothing_and_the_record_says_what_was_measured(scheduler):
    tables = [
        calibrate(SmoothNet(), scheduler, TRAIN, num_gammas=9, batch_size=size, data="d, train", progress_bar=False)
        for size in (1, 4)
    ]
    torch.testing.assert_close(tables[0].mse, tables[1].mse, rtol=2e-6, atol=0)
    record = tables[0]
    assert (record.num_images, record.num_draws, record.data, record.detail) == (6, 1, "d, train", "level")
    assert record.weights_fingerprint and record.data_fingerprint and not record.clip_sample


def test_a_network_in_training_mode_stays_in_it():
    net = SmoothNet().train()
    calibrate(net, VDM, TRAIN, num_gammas=2, progress_bar=False)
    assert net.training


def test_clamping_is_measured_as_it_is_done():
    clipping = LinearBetaScheduler(60, clip_sample=True)
    tables = [
        calibrate(SmoothNet(), s, TRAIN, num_gammas=9, progress_bar=False) for s in (clipping, LinearBetaScheduler(60))
    ]
    assert tables[0].clip_sample and not tables[1].clip_sample
    assert float(tables[0].mse[-1]) < float(tables[1].mse[-1])  # x̂ of a network that knows nothing is far outside


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_gammas": 1}, ValueError, "num_gammas must be at least 2"),
        ({"num_gammas": True}, ValueError, "num_gammas must be a positive integer"),
        ({"num_draws": 0}, ValueError, "num_draws must be"),
        ({"detail": "image"}, ValueError, "detail must be one of"),
        ({"num_levels": 4}, ValueError, "images"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
    ],
    ids=["one level", "bool", "no draws", "detail", "levels", "batch"],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        calibrate(SmoothNet(), VDM, TRAIN, progress_bar=False, **arguments)


def test_a_network_that_returns_nan_is_named_with_the_level():
    class Broken(SmoothNet):
        def forward(self, z, timestep, return_dict=False):
            return (z * math.nan if float(timestep) > 900 else z,)

    with pytest.raises(ValueError, match="NaN or infinity at gamma = 6"):
        calibrate(Broken(), VDM, TRAIN, num_gammas=3, progress_bar=False)


# ---- the bound with it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [VDM, DDPM], ids=["vdm", "ddpm"])
@pytest.mark.parametrize("detail", ["level", "channel", "pixel"])
def test_each_term_is_the_divergence_of_two_gaussians(scheduler, detail):
    """Written again from q(z_s | z_t, x) and p(z_s | z_t), with torch's own divergence."""
    net = SmoothNet()
    table = calibrate(net, scheduler, TRAIN, num_gammas=17, detail=detail, progress_bar=False)
    found = quiet(net, scheduler, TEST, num_steps=4, variance="optimal", calibration=table, seed=1)
    plain = quiet(net, scheduler, TEST, num_steps=4, seed=1)
    x = x_from_levels(TEST, 256, F64) if scheduler is VDM else TEST.double() / 127.5 - 1
    for k in range(1, 4):
        gamma_s, gamma_t = found.gammas[k - 1], found.gammas[k]
        a_s, a_t = torch.sigmoid(-gamma_s).sqrt(), torch.sigmoid(-gamma_t).sqrt()
        var_s, var_t = torch.sigmoid(gamma_s), torch.sigmoid(gamma_t)
        var_t_given_s = var_t - (a_t / a_s) ** 2 * var_s
        var_q = var_t_given_s * var_s / var_t
        for i in range(len(TEST)):
            eps = torch.randn(x[i].shape, generator=keyed_generator(1, k, i)).double()
            z_t = a_t * x[i] + var_t.sqrt() * eps
            eps_hat = net(z_t[None], torch.tensor(found.timesteps[::-1][k]))[0][0]
            x_hat = (z_t - var_t.sqrt() * eps_hat) / a_t
            means = [(a_t / a_s) * var_s / var_t * z_t + a_s * var_t_given_s / var_t * data for data in (x[i], x_hat)]
            var_p = var_q * (1 + torch.expm1(gamma_t - gamma_s) * table.mse_at(gamma_t))
            q = Normal(means[0], var_q.sqrt().expand(x[i].shape))
            p = Normal(means[1], var_p.sqrt().expand(x[i].shape))
            bits = kl_divergence(q, p).mean() / math.log(2)
            assert float(found.terms_bpd[i, k]) == pytest.approx(float(bits), rel=1e-6)
    assert torch.equal(found.mse, plain.mse) and found.variance_type == "optimal"
    assert found.prior_bpd == plain.prior_bpd


def test_a_calibration_of_zeros_gives_the_bound_of_the_posterior_to_the_bit():
    zeros = Calibration(torch.tensor([-9.0, 6.0]), torch.zeros(2), num_images=1)
    for scheduler in (VDM, LinearBetaScheduler(60)):
        plain = quiet(SmoothNet(), scheduler, TEST, num_steps=5)
        with_zeros = quiet(SmoothNet(), scheduler, TEST, num_steps=5, variance="optimal", calibration=zeros)
        assert torch.equal(plain.per_image_bpd, with_zeros.per_image_bpd)


@pytest.mark.parametrize("scheduler", [VDM, DDPM], ids=["vdm", "ddpm"])
def test_with_the_best_network_it_is_a_bound_and_smaller_than_with_the_posterior(scheduler):
    """Independent 8-bit pixels: no chain can code them in fewer bits than their entropy."""
    net = best_network(scheduler)
    table = calibrate(net, scheduler, draw_images(32, 1, 8, 8), num_gammas=65, progress_bar=False)
    test = draw_images(48, 1, 8, 8).flip(0)[:40].roll(1, 2)  # other arrangements, so that no image is in both
    last = math.inf
    for num_steps in (4, 12, 60):
        best = quiet(net, scheduler, test, num_steps=num_steps, variance="optimal", calibration=table)
        plain = quiet(net, scheduler, test, num_steps=num_steps)
        assert ENTROPY - 4 * best.stderr_bpd < best.bpd < plain.bpd
        assert best.bpd < last
        last = best.bpd


def test_the_scheduler_says_which_variance_and_the_argument_overrules_it():
    net = SmoothNet()
    table = calibrate(net, VDM, TRAIN, num_gammas=9, progress_bar=False)
    scheduler = VDMScheduler.from_config(VDM.config, variance="optimal", calibration=table)
    by_argument = quiet(net, VDM, TEST, num_steps=3, variance="optimal", calibration=table)
    assert torch.equal(quiet(net, scheduler, TEST, num_steps=3).per_image_bpd, by_argument.per_image_bpd)
    posterior = quiet(net, scheduler, TEST, num_steps=3, variance="posterior")
    assert torch.equal(posterior.per_image_bpd, quiet(net, VDM, TEST, num_steps=3).per_image_bpd)


def test_the_best_timesteps_of_an_evaluation_with_the_best_variance_have_the_predicted_bound():
    net = best_network(VDM)
    table = calibrate(net, VDM, draw_images(32, 1, 8, 8), num_gammas=65, progress_bar=False)
    other = draw_images(64, 1, 8, 8).roll(1, 2)[32:]
    fine = quiet(net, VDM, other, num_steps=100, variance="optimal", calibration=table)
    timesteps, predicted = best_timesteps(fine, 6)
    measured = quiet(net, VDM, other, timesteps=timesteps, variance="optimal", calibration=table, seed=1)
    assert measured.bpd == pytest.approx(predicted, abs=5 * measured.stderr_bpd + 0.02)
    uniform = quiet(net, VDM, other, num_steps=6, variance="optimal", calibration=table, seed=1)
    assert measured.bpd < uniform.bpd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance": "optimal"}, "variance='optimal' needs a calibration"),
        ({"variance": "largest"}, "variance must be one of"),
    ],
)
def test_wrong_variances_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quiet(SmoothNet(), VDM, TEST, num_steps=3, **arguments)


@pytest.mark.parametrize("images", [TEST, TEST.flip(0), TEST.long(), TEST[:1]], ids=["all", "order", "dtype", "one"])
def test_the_images_of_the_calibration_are_not_measured_with_it(images):
    table = calibrate(SmoothNet(), VDM, TEST, num_gammas=3, progress_bar=False)
    with pytest.raises(ValueError, match="images must not be those of the calibration"):
        quiet(SmoothNet(), VDM, images, num_steps=3, variance="optimal", calibration=table)


def test_images_of_the_calibration_among_others_are_counted(caplog):
    table = calibrate(SmoothNet(), VDM, torch.cat([TRAIN, TEST[:2]]), num_gammas=3, progress_bar=False)
    again = Calibration.from_json(table.to_json())
    quiet(SmoothNet(), VDM, TEST, num_steps=3, variance="optimal", calibration=again)
    assert "2 of the 3 images were used for the calibration" in "".join(r.getMessage() for r in caplog.records)


def test_a_scheduler_of_diffusers_made_of_ours_has_the_variance_of_its_own_steps():
    table = calibrate(SmoothNet(), LinearBetaScheduler(60), TRAIN, num_gammas=9, progress_bar=False)
    ours = LinearBetaScheduler(60, variance="optimal", calibration=table)
    theirs = DDPMScheduler.from_config(ours.config)
    found = quiet(SmoothNet(), theirs, TEST, num_steps=5)
    assert found.variance_type == "fixed_small"
    with_table = quiet(SmoothNet(), theirs, TEST, num_steps=5, variance="optimal", calibration=table.to_json())
    assert with_table.variance_type == "optimal" and with_table.calibration.num_images == 6


@pytest.mark.parametrize("scheduler", [VDM, LinearBetaScheduler(60)], ids=["vdm", "betas"])
def test_the_bound_takes_the_best_timesteps_by_name(scheduler):
    table = calibrate(SmoothNet(), scheduler, TRAIN, num_gammas=33, progress_bar=False)
    chosen = type(scheduler).from_config(scheduler.config, variance="optimal", calibration=table)
    by_name = quiet(SmoothNet(), chosen, TEST, num_steps=4, timesteps="best")
    how = {"variance": "optimal", "calibration": table}
    by_argument = quiet(SmoothNet(), scheduler, TEST, num_steps=4, timesteps="best", **how)
    by_hand = quiet(SmoothNet(), chosen, TEST, timesteps=chosen.best_timesteps(4))
    assert by_name.bpd == by_argument.bpd == by_hand.bpd


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (VDM, {"timesteps": "best"}, "'best' with num_steps"),
        (VDM, {"timesteps": "worst", "num_steps": 3}, "'best' with num_steps, got 'worst'"),
        (DDPM, {"timesteps": "best", "num_steps": 3}, "got a DDPMScheduler; convert the model"),
        (VDM, {"timesteps": "best", "num_steps": 3}, "the best timesteps need a calibration"),
    ],
)
def test_best_timesteps_that_are_not_known_are_refused(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        quiet(SmoothNet(), scheduler, TEST, **arguments)


@pytest.mark.parametrize("detail", ["level", "pixel"])
def test_the_best_of_all_timesteps_have_the_bound_itself(detail):
    """By the calibration of another network, whose variance is far from the best one."""
    table = calibrate(
        best_network(VDM), VDM, draw_images(8, 2, 4, 4), num_gammas=17, detail=detail, progress_bar=False
    )
    found = quiet(SmoothNet(), VDM, TEST, num_steps=7, variance="optimal", calibration=table)
    if detail == "pixel":
        with pytest.raises(ValueError, match="must be of detail 'level', got 'pixel'"):
            best_timesteps(found, 7)
    else:
        assert best_timesteps(found, 7)[1] == pytest.approx(found.bpd, rel=1e-9)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (VDM, {"convention": "foo"}, "convention must be"),
        (VDM, {"convention": "ddpm"}, "VDMScheduler has no DDPM decoder"),
        (DDPMScheduler(60, thresholding=True), {}, "thresholding"),
    ],
)
def test_what_the_bound_refuses_is_not_calibrated(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(SmoothNet(), scheduler, TRAIN, progress_bar=False, **arguments)


def test_a_cast_of_the_weights_is_not_taken_for_other_weights(caplog):
    unet = tiny_unet(in_channels=2, out_channels=2, sample_size=4).eval().half().float()
    table = calibrate(unet.half(), VDM, TRAIN, num_gammas=3, progress_bar=False)
    quiet(unet.float(), VDM, TEST, num_steps=2, variance="optimal", calibration=table)
    assert "other weights" not in "".join(r.getMessage() for r in caplog.records)


def test_a_network_that_predicts_variances_needs_no_calibration():
    table = calibrate(SmoothNet(outputs=2), VDM, TRAIN, num_gammas=3, progress_bar=False)
    learned = VDMScheduler.from_config(VDM.config, variance_type="learned_range")
    with pytest.raises(ValueError, match="variance must be 'posterior' for variance_type='learned_range'"):
        quiet(SmoothNet(outputs=2), learned, TEST, num_steps=3, variance="optimal", calibration=table)


def test_a_calibration_of_other_weights_or_clamping_is_named(caplog):
    table = calibrate(SmoothNet(), VDM, TRAIN, num_gammas=3, progress_bar=False)
    record = table.to_json() | {"weights_fingerprint": "00", "clip_sample": True}
    quiet(SmoothNet(), VDM, TEST, num_steps=2, variance="optimal", calibration=Calibration.from_json(record))
    messages = "\n".join(r.getMessage() for r in caplog.records)
    assert "was measured with clip_sample=True" in messages and "was measured with other weights" in messages


def test_an_interrupted_bound_with_another_calibration_is_another_one(tmp_path):
    tables = [calibrate(SmoothNet(), VDM, TRAIN, num_gammas=3, seed=seed, progress_bar=False) for seed in (0, 1)]
    arguments = {"num_steps": 3, "variance": "optimal", "resume_dir": tmp_path}
    quiet(SmoothNet(), VDM, TEST, calibration=tables[0], **arguments)
    with pytest.raises(ValueError, match="calibration"):
        quiet(SmoothNet(), VDM, TEST, calibration=tables[1], **arguments)
