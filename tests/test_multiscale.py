"""multiscale.py: `VDMMultiscale2DModel`, what it computes exactly, and what it shares with our other network."""

import math

import pytest
import torch

from diffusers_vdm import (
    FixedLinearGamma,
    LinearBetaGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    SimpleObjective,
    VariationalBound,
    VDMMultiscale2DModel,
    VDMPipeline,
    VDMScheduler,
    diffusion,
    evaluate_mc,
    evaluate_ode,
    evaluate_vlb,
)
from tests.models import TINY_MULTISCALE as TINY
from tests.models import fixed_weights
from tests.models import tiny_multiscale as tiny
from tests.tensors import F64, f64, normal, random_levels, seeded


def output(net, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return net(*args, **kwargs).sample


# ---- the mean of the levels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("std", [0.05, 0.3, 0.6, 0.79])
def test_mean_of_the_levels_is_the_posterior_mean_of_uniform_levels(num_levels, std):
    """Over a sum of all levels of an endless comb, at σ/α = `std` levels."""
    gamma_t = f64(2 * math.log(std * 2 / num_levels))
    x = diffusion.x_from_levels(random_levels(4, 50, num_levels=num_levels), num_levels, F64)
    z_t = diffusion.q_sample(x, normal(4, 50), gamma_t)
    comb = 2 * (torch.arange(-40, num_levels + 40, dtype=F64) + 0.5) / num_levels - 1
    distance = (z_t / diffusion.alpha(gamma_t))[..., None] - comb
    weights = torch.softmax(-0.5 * diffusion.snr(gamma_t) * distance.square(), dim=-1)
    expected = diffusion.eps_from_x(z_t, (weights * comb).sum(-1), gamma_t)
    found = diffusion.eps_of_levels(z_t, torch.zeros_like(z_t), gamma_t, num_levels)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_mean_of_the_levels_has_no_jump_and_ends_above_0_8_levels():
    edge = 2 * math.log(0.8 * 2 / 256)
    z_t, eps_hat = normal(1, 200), normal(1, 200, seed=1)
    below, above = (diffusion.eps_of_levels(z_t, eps_hat, f64(edge + d)) for d in (-1e-9, 1e-9))
    assert torch.equal(above, eps_hat)
    assert float((below - above).abs().max()) < 5e-5


def test_mean_of_the_levels_in_float32_and_its_gradient():
    gammas = torch.linspace(-15, -9, 25, dtype=F64)
    z_t, eps_hat = normal(25, 40), 0.3 * normal(25, 40, seed=1)
    found = diffusion.eps_of_levels(z_t.float(), eps_hat.float(), gammas)
    exact = diffusion.eps_of_levels(z_t.float().double(), eps_hat.float().double(), gammas)
    assert float((found - exact).abs().max()) < 2e-2  # of ε, next to an edge of two levels at σ = 0.1 levels
    assert float((found - exact).square().mean().sqrt()) < 1e-3
    assert torch.autograd.gradcheck(
        lambda z, e: diffusion.eps_of_levels(z, e, f64(-11.5)),
        (z_t[:2, :5].requires_grad_(), eps_hat[:2, :5].requires_grad_()),
    )


# ---- the distribution of the levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [-14.0, -7.0, -3.0, 0.0, 6.0])
def test_level_logits_give_the_posterior_mean_of_independent_levels(gamma):
    """Against Bayes' rule over the levels, in other terms: E[ε | z] = (z − α E[x | z])/σ."""
    probabilities = torch.softmax(2 * normal(17), dim=-1)
    x = diffusion.x_from_levels(torch.multinomial(probabilities, 200, True, generator=seeded(0)), 17, F64)
    z_t = diffusion.q_sample(x, normal(200), f64(gamma))
    levels = 2 * (torch.arange(17, dtype=F64) + 0.5) / 17 - 1
    alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
    likelihood = torch.distributions.Normal(alpha * levels, sigma).log_prob(z_t[:, None])
    posterior = torch.softmax(probabilities.log() + likelihood, dim=-1)
    expected = (z_t - alpha * (posterior * levels).sum(-1)) / sigma
    logits = (probabilities.log() + 3.0).expand(200, 17)  # a constant makes no difference
    found = diffusion.eps_of_level_logits(z_t, logits, f64(gamma))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    single = diffusion.eps_of_level_logits(z_t.float(), logits.float(), f64(gamma))
    assert float((single - expected).abs().max()) < 1e-3


def test_gradient_of_the_level_logits():
    assert torch.autograd.gradcheck(
        lambda z, logits: diffusion.eps_of_level_logits(z, logits, f64([-6.0, 1.0])),
        (normal(2, 3).requires_grad_(), normal(2, 3, 5, seed=1).requires_grad_()),
    )


@pytest.mark.parametrize("num_levels", [2, 17])
def test_a_new_network_with_level_logits_codes_uniform_levels_optimally(num_levels):
    with fixed_weights():
        net = VDMMultiscale2DModel(**TINY | {"in_channels": 2, "num_levels": num_levels, "level_logits": True})
    bound = VariationalBound(net, FixedLinearGamma(), num_levels=num_levels)
    images = random_levels(200, 2, 8, 8, num_levels=num_levels)
    result = evaluate_mc(bound, images, num_samples=8, progress_bar=False)
    assert abs(result.bpd - math.log2(num_levels)) < 4 * result.stderr_bpd + 0.003


def test_level_logits_of_a_channel_are_next_to_each_other():
    net = tiny(in_channels=2, num_levels=5, level_logits=True).double()
    z_t, gamma_t = normal(2, 2, 8, 8), f64(-2.0)
    timestep = FixedLinearGamma().timestep(None, gamma_t)
    before = output(net, z_t, timestep)
    with torch.no_grad():
        net.conv_out.bias[5 + 4] += 400.0  # the highest level of the second channel
    after = output(net, z_t, timestep)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    x_hat = diffusion.x_from_eps(z_t, after, gamma_t)[:, 1]
    torch.testing.assert_close(x_hat, torch.full_like(x_hat, 0.8), rtol=0, atol=1e-6)


# ---- what the network computes -------------------------------------------------------------------------------------


def test_a_new_network_codes_independent_gaussian_values_optimally():
    """Its bound is the entropy of the rounded values: nothing is lost at any noise level, at low noise either."""
    with fixed_weights():
        net = VDMMultiscale2DModel(**TINY | {"data_variance": 0.02})
    bound = VariationalBound(net, FixedLinearGamma())
    images = (128 * (1 + math.sqrt(0.02) * normal(400, 1, 8, 8)) - 0.5).round().long()
    result = evaluate_mc(bound, images, num_samples=4, progress_bar=False)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.02) + 7
    assert result.bpd == pytest.approx(entropy, abs=0.02)
    assert result.reconstruction_bpd < 0.02


def test_prediction_of_a_new_network_is_the_linear_one():
    with fixed_weights():
        net = VDMMultiscale2DModel(**TINY | {"data_variance": 0.1}).double()
    z_t, gamma_t = normal(2, 1, 8, 8), f64([-4.0, 3.0])
    timesteps = FixedLinearGamma().timestep(None, gamma_t)
    expected = [0.1 * diffusion.alpha(g) / (0.1 * diffusion.alpha(g) ** 2 + diffusion.sigma(g) ** 2) for g in gamma_t]
    x_hat = diffusion.x_from_eps(z_t, output(net, z_t, timesteps), gamma_t)
    for k in range(2):  # the Wiener filter of white data with this variance
        torch.testing.assert_close(x_hat[k], expected[k] * z_t[k])


def test_differences_see_no_brightness_and_are_in_units_of_the_noise():
    net = tiny().double()
    z_t, gamma_t = normal(1, 1, 8, 8), f64(-8.0)
    a = net._differences(z_t, gamma_t)
    torch.testing.assert_close(net._differences(z_t + 0.25, gamma_t), a)
    half = net._differences(z_t / 2, gamma_t)
    torch.testing.assert_close(torch.sinh(half), torch.sinh(a) / 2)
    noise = normal(200, 1, 8, 8, seed=3) * diffusion.sigma(gamma_t)
    inner = torch.sinh(net._differences(noise, gamma_t)).detach()[:, :, 1:-1, 1:-1]
    assert float(inner.square().mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_are_float32_whatever_the_network(dtype):
    """Half precision would lose 0.002 next to 1: the network in half precision is the one in float32, rounded."""
    net = tiny()
    z_t = 0.7 + 0.002 * normal(2, 1, 8, 8, dtype=torch.float32)
    expected = output(net, z_t, 100.0)
    with torch.autocast("cpu", dtype=dtype):
        found = output(net, z_t, 100.0)
    cast = output(tiny().to(dtype), z_t, 100.0)
    for other in (found, cast):
        assert other.dtype == torch.float32
        assert float((other - expected).square().mean().sqrt()) < 0.03 * float(expected.std())


def test_each_part_can_be_left_out():
    z_t, low, high = normal(1, 1, 8, 8, dtype=torch.float32), 50.0, 800.0
    whole, none = tiny(), tiny(num_difference_filters=0)
    assert not any("difference" in name for name in none.state_dict())
    continuous = tiny(predict_levels=False)
    assert torch.equal(output(continuous, z_t, high), output(whole, z_t, high))
    assert not torch.equal(output(continuous, z_t, low), output(whole, z_t, low))
    expected = diffusion.eps_of_levels(z_t, output(continuous, z_t, low), whole.gamma_of_timestep(torch.tensor([low])))
    torch.testing.assert_close(output(whole, z_t, low), expected)


def test_timesteps_mean_the_gamma_of_the_schedule():
    schedule = MonotoneGammaNetwork(-7.5, 4.0, num_train_timesteps=500)
    net = tiny(gamma_min=-7.5, gamma_max=4.0, num_train_timesteps=500)
    gamma = torch.linspace(-8, 4, 7, dtype=F64)
    torch.testing.assert_close(net.gamma_of_timestep(schedule.timestep(None, gamma)), gamma)


# ---- the likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_likelihoods_of_one_network_agree():
    """The bound in continuous time, with many steps, and the density of the ODE, for a network that was trained."""
    torch.manual_seed(0)
    with fixed_weights():
        net = VDMMultiscale2DModel(**TINY | {"num_levels": 17, "gamma_min": -7.5, "layers_per_block": 1})
    schedule = FixedLinearGamma(-7.5, 5.0)
    bound, generator = VariationalBound(net, schedule, num_levels=17), seeded(5)
    columns = torch.arange(8).float()

    def images(n):  # slanted edges with noise of one level
        edge = 8 * torch.rand((n, 1, 1, 1), generator=generator) + 0.5 * columns.view(1, 1, 8, 1) - 2
        clean = 16 * torch.sigmoid(1.5 * (columns.view(1, 1, 1, 8) - edge))
        return (clean + torch.randn(n, 1, 8, 8, generator=generator)).round().clamp(0, 16).long()

    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        bound(images(32), generator=generator).loss.backward()
        optimizer.step()
    net.eval()
    held_out = images(48)
    mc = evaluate_mc(bound, held_out, num_samples=40, progress_bar=False)
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    vlb = evaluate_vlb(net, scheduler, held_out, num_steps=200, num_levels=17, progress_bar=False)
    ode = evaluate_ode(net, schedule, held_out, num_levels=17, num_samples=2, progress_bar=False, rtol=1e-4, atol=1e-4)
    assert mc.bpd < 3.1  # it has learned: uniform levels would be 4.09
    assert vlb.bpd == pytest.approx(mc.bpd, abs=0.03 + 4 * mc.stderr_bpd)
    assert ode.bpd == pytest.approx(mc.bpd, abs=0.15)


# ---- inputs that are refused ---------------------------------------------------------------------------------------


def test_timesteps_of_another_schedule_are_refused():
    net = tiny()
    with pytest.raises(ValueError, match="gamma_min=-7.5 instead of -13.3"):
        VariationalBound(net, FixedLinearGamma(-7.5, 5.0))
    with pytest.raises(ValueError, match="num_train_timesteps=500 instead of 1000"):
        SimpleObjective(net, FixedLinearGamma(-13.3, 5.0, num_train_timesteps=500))
    with pytest.raises(ValueError, match="normalized γ, got those of a LinearBetaGamma"):
        VariationalBound(net, LinearBetaGamma())
    with pytest.raises(ValueError, match="LinearBetaScheduler"):
        VDMPipeline(net, LinearBetaScheduler())
    with pytest.raises(ValueError, match="gamma_max=6.0 instead of 5.0"):
        VDMPipeline(net, VDMScheduler(gamma_max=6.0))
    images = random_levels(2, 1, 8, 8)
    for evaluate in (
        lambda: evaluate_vlb(net, VDMScheduler(gamma_max=6.0), images, num_steps=2, progress_bar=False),
        lambda: evaluate_ode(net, FixedLinearGamma(-13.3, 6.0), images, progress_bar=False),
    ):
        with pytest.raises(ValueError, match="was built for other timesteps"):
            evaluate()


def test_other_levels_and_predictions_are_refused():
    net = tiny()
    with pytest.raises(ValueError, match="num_levels must be that of the network, 256, got 17"):
        VariationalBound(net, FixedLinearGamma(), num_levels=17)
    with pytest.raises(ValueError, match="prediction_type must be 'epsilon' for a VDMMultiscale2DModel"):
        VariationalBound(net, FixedLinearGamma(), prediction_type="v_prediction")
    with pytest.raises(ValueError, match="num_levels must be that of the network"):
        VDMPipeline(net, VDMScheduler(), num_levels=17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block must be a positive integer, or one for each of the 2"),
        ({"layers_per_block": 0}, "layers_per_block must be a positive integer"),
        ({"attention_head_dim": 5}, "attention_head_dim must divide the channels of the lowest level, got 5 and 16"),
        ({"num_difference_filters": -1}, "num_difference_filters must be an integer of at least 0, got -1"),
        ({"num_levels": 1}, r"num_levels must be an integer within \[2, 65536\], got 1"),
        ({"data_variance": 0.0}, r"data_variance, E\[x²\] of data in"),
        ({"null_class": True}, "null_class needs num_class_embeds"),
        ({"sample_size": 9}, "sample_size must be divisible by 2"),
        ({"norm_num_groups": 3}, "norm_num_groups must divide all of block_out_channels"),
        ({"gamma_min": 6.0}, "gamma_min must be below gamma_max"),
        ({"conv_in_kernel": 2}, "conv_in_kernel must be a positive odd integer, got 2"),
        ({"conv_in_kernel": True}, "conv_in_kernel must be a positive odd integer, got True"),
        ({"conv_out_kernel": 0}, "conv_out_kernel must be a positive odd integer, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VDMMultiscale2DModel(**TINY | arguments)


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((1, 3, 8, 8), {}, r"sample must have shape \(B, 1, H, W\)"),
        ((1, 1, 7, 8), {}, "divisible by 2"),
        ((1, 1, 8, 8), {"class_labels": torch.tensor([0])}, "network without classes"),
        ((1, 1, 8, 8), {"augmentation_flags": torch.ones(1)}, "network without that input"),
    ],
)
def test_wrong_inputs(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape), 1.0, **kwargs)


def test_augmentation_flags_of_the_wrong_shape_are_refused():
    net = tiny(num_augmentation_flags=6)
    z_t = torch.zeros(2, 1, 8, 8)
    for wrong in (torch.ones(2), torch.ones(2, 1), torch.ones(1, 6)):
        with pytest.raises(ValueError, match=r"augmentation_flags must have shape \(2, 6\)"):
            net(z_t, 1.0, augmentation_flags=wrong)


# ---- what a component does -----------------------------------------------------------------------------------------


def test_classes_and_flags_change_the_output():
    net = tiny(num_class_embeds=3, null_class=True, num_augmentation_flags=1)
    z_t = normal(1, 1, 8, 8, dtype=torch.float32)
    null = output(net, z_t, 600.0)
    assert torch.equal(output(net, z_t, 600.0, class_labels=torch.tensor([3])), null)
    assert torch.equal(output(net, z_t, 600.0, augmentation_flags=torch.zeros(1)), null)
    assert not torch.equal(output(net, z_t, 600.0, class_labels=torch.tensor([1])), null)
    assert not torch.equal(output(net, z_t, 600.0, augmentation_flags=torch.ones(1)), null)
    several = tiny(num_augmentation_flags=6)
    plain = output(several, z_t, 600.0)
    assert torch.equal(output(several, z_t, 600.0, augmentation_flags=torch.zeros(1, 6)), plain)
    assert all(
        not torch.equal(output(several, z_t, 600.0, augmentation_flags=row[None]), plain) for row in torch.eye(6)
    )


def test_saved_pipeline_samples_the_same(tmp_path):
    net = tiny(num_levels=17)
    pipe = VDMPipeline(net, VDMScheduler(), num_levels=17)
    pipe.save_pretrained(tmp_path)
    loaded = VDMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.unet, VDMMultiscale2DModel) and loaded.unet.config.num_levels == 17
    loaded.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    samples = [p(2, 5, seeded(3), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*samples)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_kernels_of_any_odd_size_keep_the_size_of_the_image(kernel):
    """And each output of the first layer sees as many pixels as the kernel has."""
    net = tiny(conv_in_kernel=kernel, conv_out_kernel=kernel)
    assert net.conv_in.weight.shape[2:] == net.conv_out.weight.shape[2:] == (kernel, kernel)
    z_t = normal(1, 1, 8, 8, dtype=torch.float32)
    assert output(net, z_t, 600.0).shape == z_t.shape
    seen = normal(1, net.conv_in.in_channels, 8, 8, dtype=torch.float32).requires_grad_()
    net.conv_in(seen)[0, :, 4, 4].sum().backward()
    assert int(seen.grad.abs().sum((0, 1)).gt(0).sum()) == kernel**2


def test_gradient_checkpointing_changes_no_gradient():
    net = tiny().train()
    gradients = []
    for enable in (False, True):
        if enable:
            net.enable_gradient_checkpointing()
        net.zero_grad()
        net(normal(2, 1, 8, 8, dtype=torch.float32), torch.tensor([3.0, 700.0])).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(float(g.abs().max()) > 0 for g in gradients[0])  # every weight is used


def test_compiles_to_one_graph_without_recompilation():
    torch.compiler.reset()
    net = tiny()
    z_t = normal(2, 1, 8, 8, dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(z_t, torch.tensor(3.5))
        with torch.compiler.set_stance("fail_on_recompile"):
            for timestep in (torch.tensor(3.5), torch.tensor(700.25)):
                torch.testing.assert_close(compiled(z_t, timestep).sample, net(z_t, timestep).sample)
