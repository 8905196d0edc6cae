"""noise_schedules.py: γ(t) increases, is exact at its ends, can be inverted, and is not changed by casts."""

import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.interpolate import PchipInterpolator
from torch import nn

from diffusers_vdm import (
    BetaGamma,
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    NoiseSchedule,
    TableGamma,
    VDMPipeline,
    VDMScheduler,
)
from diffusers_vdm.noise_schedules import check_gamma_table, gammas_from_betas, linear_betas
from tests.models import tiny_unet
from tests.oracles import mp_linear_beta_gammas

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
CURVED_TABLE = [-13.3, -12.9, -7.0, -6.9, 0.0, 1.0, 4.5, 5.0]
SCHEDULES = {
    "fixed": FixedLinearGamma,
    "learned_linear": LearnedLinearGamma,
    "network": lambda: bent(MonotoneGammaNetwork(hidden_dim=64), seed=1),
    "network_learned_ends": lambda: bent(MonotoneGammaNetwork(hidden_dim=64, learn_ends=True), seed=2, ends=True),
    "table": lambda: TableGamma(CURVED_TABLE),
    "linear_beta": LinearBetaGamma,
    "linear_beta_200": lambda: LinearBetaGamma(200),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> NoiseSchedule:
    return SCHEDULES[request.param]()


def bent(network: MonotoneGammaNetwork, seed: int, scale: float = 3.0, ends: bool = False) -> MonotoneGammaNetwork:
    """The network with random parameters, its ends left alone unless `ends`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in ("bias", "weight"):
                parameter += 0.7 * ends * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def number(value: torch.Tensor) -> float:
    return float(value.detach())


def times(num: int = 257) -> torch.Tensor:
    return torch.linspace(0, 1, num, dtype=torch.float64)


# ---- what every schedule promises --------------------------------------------------------------------------------


def test_gamma_increases_from_end_to_end(schedule):
    gamma = schedule(times(5000)).detach()
    assert gamma.dtype == torch.float64 and gamma.shape == (5000,)
    assert bool((gamma.diff() > 0).all())
    gamma_0, gamma_1 = (end.detach() for end in schedule.ends())
    assert gamma_0.shape == gamma_1.shape == () and gamma_0.dtype == torch.float64
    assert float(gamma[0]) == float(gamma_0) and float(gamma[-1]) == float(gamma_1)


def test_slope_is_that_of_autograd_and_of_finite_differences(schedule):
    t = torch.rand(100, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.998 + 0.001
    # away from the knots, where the second derivative of a table jumps
    n = len(getattr(schedule, "_gammas", [0, 0])) - 1
    t = ((t * n).floor() + 0.1 + 0.8 * (t * n).frac()) / n
    slope = schedule.slope(t).detach()
    assert slope.dtype == torch.float64 and bool((slope > 0).all())
    leaf = t.clone().requires_grad_()
    by_autograd = torch.autograd.grad(schedule(leaf).sum(), leaf)[0]
    torch.testing.assert_close(slope, by_autograd, rtol=1e-10, atol=1e-10)
    h = 1e-6
    by_difference = (schedule(t + h) - schedule(t - h)).detach() / (2 * h)
    torch.testing.assert_close(slope, by_difference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0, 0, 1])
def test_numbers_and_tensors_give_the_same_gamma(schedule, t):
    expected = schedule(torch.tensor([[t]], dtype=torch.float64))
    assert expected.shape == (1, 1)
    assert number(schedule(t)) == number(expected) and schedule(t).shape == ()


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, math.nan, math.inf])
def test_numbers_out_of_range_are_refused(schedule, t):
    with pytest.raises(ValueError, match=r"t must be within \[0, 1\]"):
        schedule(t)
    with pytest.raises(ValueError, match=r"t must be within \[0, 1\]"):
        schedule.slope(t)


def test_inverse_recovers_t(schedule):
    t = torch.cat([times(101), torch.tensor([1e-12, 1e-6, 1 - 1e-9], dtype=torch.float64)])
    middle = slice(0, 101)  # where the slope is not 0, as it may be at the first and last knot of a table
    gamma = schedule(t).detach()
    back = schedule.inverse(gamma)
    assert not back.requires_grad and back.dtype == torch.float64
    # γ = −13.3 is known to 2e-15, so t to that over the slope
    torch.testing.assert_close(back[middle], t[middle], rtol=0, atol=1e-13)
    torch.testing.assert_close(schedule(back).detach(), gamma, rtol=0, atol=1e-14)
    assert float(back[0]) == 0 and float(back[100]) == 1
    assert schedule.inverse(gamma.reshape(2, 52)).shape == (2, 52)
    assert float(schedule.inverse(float(gamma[50]))) == pytest.approx(0.5, abs=1e-13)


@pytest.mark.parametrize("beyond", [-1e-6, 1e-6, math.nan, math.inf])
def test_inverse_refuses_levels_beyond_its_ends(schedule, beyond):
    end = number(schedule.ends()[0 if beyond < 0 else 1])
    with pytest.raises(ValueError, match="gamma must be within"):
        schedule.inverse(torch.tensor([end + beyond], dtype=torch.float64))


@pytest.mark.parametrize("num_steps", [1, 3, 7, 49, 1000, 4000])
def test_the_first_step_of_a_finite_chain_ends_at_gamma_0_itself(schedule, num_steps):
    # otherwise γ_0 would get its gradient from one of two places only, and the chain would have a gap
    t = torch.tensor([1 / num_steps], dtype=torch.float64)
    for first in (t - 1 / num_steps, t.float() - torch.tensor(1 / num_steps)):
        assert number(schedule(first)) == number(schedule.ends()[0])


def test_table_is_gamma_at_equidistant_times(schedule):
    for num_knots in (2, 17):
        table = schedule.table(num_knots)
        assert table.dtype == torch.float64 and not table.requires_grad
        assert torch.equal(table, schedule(times(num_knots)).detach())
    check_gamma_table(schedule.table())


def test_the_timestep_of_gamma_is_normalized_by_the_configured_ends(schedule):
    t = times(9)
    gamma = schedule(t).detach()
    if isinstance(schedule, LinearBetaGamma):
        expected = t * (schedule.config.num_train_timesteps - 1)
    else:
        low, high = schedule.config.gamma_min, schedule.config.gamma_max
        expected = 1000 * (gamma - low) / (high - low)
    torch.testing.assert_close(schedule.timestep(t, gamma), expected, rtol=1e-14, atol=1e-11)


def test_describe_names_the_ends(schedule):
    summary = schedule.describe()
    assert (summary.gamma_0, summary.gamma_1) == tuple(number(end) for end in schedule.ends())
    assert summary.alpha_bar_1 == pytest.approx(1 / (1 + math.exp(summary.gamma_1)), rel=1e-12)
    assert summary.log_snr_range == (-summary.gamma_1, -summary.gamma_0)
    for part in (f"{-summary.gamma_0:.3f}", f"{summary.alpha_bar_1:.3e}", f"{summary.prior_kl_bpd:.3e}"):
        assert part in str(summary)


@pytest.mark.parametrize("data_power", [-0.1, 1.1, math.nan])
def test_describe_refuses_impossible_data_powers(schedule, data_power):
    with pytest.raises(ValueError, match="data_power"):
        schedule.describe(data_power)


# ---- casts, saving -----------------------------------------------------------------------------------------------


class Parent(nn.Module):
    def __init__(self, schedule):
        super().__init__()
        self.inner = nn.ModuleDict({"schedule": schedule})
        self.other = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float16)],
    ids=["half", "bfloat16", "to", "to_device"],
)
def test_no_cast_changes_gamma(schedule, cast):
    # γ(1) = 11.30 would become 11.25
    before = schedule(times()).detach()
    parent = cast(Parent(schedule))
    assert parent.other.dtype in (torch.float16, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in schedule.parameters())
    assert torch.equal(schedule(times()).detach(), before)


def test_upward_casts_still_work(schedule):
    before = schedule(times()).detach()
    Parent(schedule).double()
    assert all(p.dtype == torch.float64 for p in schedule.parameters())
    torch.testing.assert_close(schedule(times()).detach(), before, rtol=0, atol=1e-13)
    Parent(schedule).to("meta")
    assert all(p.device.type == "meta" for p in schedule.parameters())


@pytest.mark.parametrize("torch_dtype", [None, torch.bfloat16, torch.float16])
def test_saved_and_loaded_gamma_is_the_same_to_the_last_bit(schedule, tmp_path, torch_dtype):
    schedule.save_pretrained(tmp_path)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in os.listdir(tmp_path))
    loaded = type(schedule).from_pretrained(tmp_path, **({} if torch_dtype is None else {"torch_dtype": torch_dtype}))
    assert not loaded.training
    assert torch.equal(loaded(times()).detach(), schedule(times()).detach())
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in schedule.config.items() if k[0] != "_"
    }


def test_a_copy_from_config_and_state_dict_is_the_same(schedule):
    copy = type(schedule)(**{name: value for name, value in schedule.config.items() if name[0] != "_"})
    copy.load_state_dict(schedule.state_dict())
    assert torch.equal(copy(times()).detach(), schedule(times()).detach())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearBetaGamma(200),
        lambda: TableGamma(CURVED_TABLE),
        lambda: FixedLinearGamma(-10.0, 3.0),
        lambda: LearnedLinearGamma(-10.0, 3.0),
        lambda: MonotoneGammaNetwork(-10.0, 3.0, 16),
    ],
    ids=["linear_beta", "table", "fixed", "learned_linear", "network"],
)
def test_from_config_keeps_what_was_given_by_position(make):
    # diffusers records positional arguments as "default values", which its from_config then silently drops
    schedule = make()
    copy = type(schedule).from_config(schedule.config)
    assert torch.equal(copy(times()).detach(), schedule(times()).detach())


# ---- the network -------------------------------------------------------------------------------------------------


def test_the_network_increases_for_any_parameters():
    for seed in range(200):
        scale = [0.01, 1.0, 10.0, 1000.0][seed % 4]
        network = bent(MonotoneGammaNetwork(hidden_dim=[1, 5, 64][seed % 3]), seed, scale)
        gamma = network(times(2001)).detach()
        assert bool((gamma.diff() > 0).all()), seed
        assert float(gamma[0]) == -13.3 and float(gamma[-1]) == 5.0, seed
        assert bool((network.slope(times(101)) > 0).all()), seed
        near_the_ends = torch.tensor([0, 1e-17, 1e-16, 1e-12, 1 - 1e-12, 1 - 1.2e-16, 1], dtype=torch.float64)
        assert bool((network(near_the_ends).detach().diff() >= 0).all()), seed


def test_learned_ends_stay_exact_and_in_order():
    for seed in range(50):
        for schedule in (
            bent(MonotoneGammaNetwork(hidden_dim=8, learn_ends=True), seed, ends=True),
            LearnedLinearGamma(),
        ):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                schedule.weight.copy_(20 * torch.randn(1, generator=generator))  # of either sign: |w| is what counts
                schedule.bias.copy_(5 * torch.randn(1, generator=generator))
            gamma_0, gamma_1 = (float(end.detach()) for end in schedule.ends())
            assert gamma_0 == number(schedule.bias) and gamma_1 == gamma_0 + abs(number(schedule.weight))
            gamma = schedule(times(300)).detach()
            assert bool((gamma.diff() > 0).all())
            assert float(gamma[0]) == gamma_0 and float(gamma[-1]) == gamma_1


def test_a_fresh_network_is_nearly_straight():
    # training starts from the linear schedule, as the official code's does
    network = MonotoneGammaNetwork()
    deviation = (network(times()) - FixedLinearGamma()(times())).detach().abs()
    assert 0 < float(deviation.max()) < 0.2


def test_the_network_is_the_formula_of_its_docstring():
    network = bent(MonotoneGammaNetwork(hidden_dim=7), seed=3)
    w, b, a = (
        p.detach().double().numpy() for p in (network.hidden_weight, network.hidden_bias, network.output_weight)
    )

    def f(t):
        return t + (np.abs(a) * 2 / (1 + np.exp(-(np.abs(w) * (2 * t - 1) + b)))).sum() / 7

    for t in (0.0, 0.1, 0.77, 1.0):
        expected = -13.3 + 18.3 * (f(t) - f(0)) / (f(1) - f(0))
        assert number(network(t)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["learned_linear", "network", "network_learned_ends"])
def test_all_parameters_get_gradients_from_gamma_and_slope(name):
    schedule = SCHEDULES[name]().double()
    parameters = list(schedule.parameters())
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)

    def function(*values):
        gamma, slope = torch.func.functional_call(
            _Both(schedule),
            {f"schedule.{n}": v for (n, _), v in zip(schedule.named_parameters(), values, strict=True)},
            t,
        )
        return gamma, slope

    inputs = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-4, atol=1e-6)
    gamma, slope = function(*inputs)
    assert all(bool((g != 0).any()) for g in torch.autograd.grad((gamma + slope).sum(), inputs))


class _Both(nn.Module):
    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, t):
        return self.schedule.gamma_and_slope(t)


def test_scaled_gradients_reach_the_inside_and_leave_the_ends_alone():
    network = bent(MonotoneGammaNetwork(hidden_dim=6, learn_ends=True), seed=4, ends=True)
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    of_gamma = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    of_slope = torch.tensor([0.3, 1.5, -1.0], dtype=torch.float64)
    inside = [network.hidden_weight, network.hidden_bias, network.output_weight]
    ends = [network.bias, network.weight]

    def gradients(weights):
        gamma, slope = network.gamma_and_slope(t)
        grads = torch.autograd.grad((weights * (of_gamma * gamma + of_slope * slope)).sum(), inside + ends)
        return grads[:3], grads[3:]

    scale = torch.tensor([2.0, -3.0, 10.0], dtype=torch.float64)
    calls = []

    def late():
        calls.append(1)
        return scale

    gamma, slope = network.gamma_and_slope(t, late)
    assert not calls, "what scales the gradient is known only after the loss: it must be asked for in backward"
    grads = torch.autograd.grad((of_gamma * gamma + of_slope * slope).sum(), inside + ends)
    assert calls
    plain_inside, plain_ends = gradients(torch.ones(3, dtype=torch.float64))
    scaled_inside, _ = gradients(scale)
    for mine, expected in zip(grads, [*scaled_inside, *plain_ends], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(scaled_inside[0], plain_inside[0])


@pytest.mark.parametrize("name", ["fixed", "learned_linear", "table", "linear_beta"])
def test_schedules_without_an_inside_ignore_the_scale(name):
    schedule = SCHEDULES[name]()
    plain = schedule.gamma_and_slope(times(5))
    scaled = schedule.gamma_and_slope(times(5), lambda: 1 / 0)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a, b)
        if a.requires_grad:
            grads = [torch.autograd.grad(v.sum(), schedule.weight, retain_graph=True)[0] for v in (a, b)]
            assert torch.equal(*grads)


# ---- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_knots", [2, 3, 4, 11, 200])
def test_table_is_scipys_pchip(num_knots):
    for seed in range(10):
        generator = np.random.default_rng(seed)
        # rises over five orders of magnitude: where a spline overshoots, and where the end slopes must be clamped
        table = -13.3 + np.cumsum(10.0 ** generator.uniform(-5, 0, num_knots))
        t = np.concatenate([np.linspace(0, 1, 1003), np.linspace(0, 1, num_knots)])
        reference = PchipInterpolator(np.linspace(0, 1, num_knots), table)
        schedule = TableGamma(table.tolist())
        gamma, slope = schedule.gamma_and_slope(torch.from_numpy(t))
        np.testing.assert_allclose(gamma.numpy(), reference(t), rtol=1e-12, atol=1e-12)
        inside = np.abs(t * (num_knots - 1) - np.round(t * (num_knots - 1))) > 1e-6
        np.testing.assert_allclose(slope.numpy()[inside], reference.derivative()(t)[inside], rtol=1e-8, atol=1e-8)
        assert np.array_equal(schedule.table(num_knots).numpy(), table) or num_knots not in (2, 3)
        np.testing.assert_allclose(schedule.table(num_knots).numpy(), table, rtol=1e-14, atol=0)


def test_a_table_keeps_its_values_to_the_last_bit_at_the_knots():
    # knots of 2^n + 1 points are exact binary fractions of t
    schedule = bent(MonotoneGammaNetwork(hidden_dim=16), seed=8)
    table = schedule.table()
    assert len(table) == 1025
    assert torch.equal(TableGamma(table.tolist())(times(1025)), table)


def test_a_baked_network_is_within_what_the_docs_say():
    # "about 2e-8 in γ for a smooth learned schedule": after training, the units are spread and of order one
    network = MonotoneGammaNetwork()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # output weights of order 1: the slope varies by a factor of about three
        network.output_weight.copy_(torch.rand(1024, generator=generator) * 4 * torch.linspace(0, 1, 1024))
    slope = network.slope(times()).detach()
    assert float(slope.max() / slope.min()) > 1.8
    t = times(20011)
    error = (TableGamma(network.table().tolist())(t) - network(t).detach()).abs().max()
    assert float(error) < 2e-8


def test_more_knots_are_better_at_third_order_or_more():
    network = bent(MonotoneGammaNetwork(hidden_dim=16), seed=9, scale=2.0)
    t = times(5001)
    errors = [
        float((TableGamma(network.table(n).tolist())(t) - network(t).detach()).abs().max()) for n in (129, 257, 513)
    ]
    assert errors[0] > 6 * errors[1] > 36 * errors[2]


def test_linear_schedules_need_two_knots():
    for schedule in (FixedLinearGamma(-5.0, 3.0), LearnedLinearGamma(-5.0, 3.0)):
        assert len(schedule.table()) == 2
        error = TableGamma(schedule.table().tolist())(times()) - schedule(times()).detach()
        assert float(error.abs().max()) < 1e-14


def test_a_table_keeps_the_scale_of_the_timestep_apart_from_its_ends():
    schedule = TableGamma([-12.0, 0.0, 4.0], gamma_min=-13.3, gamma_max=5.0, num_train_timesteps=100)
    timestep = schedule.timestep(times(2), schedule(times(2)))
    torch.testing.assert_close(timestep, torch.tensor([130 / 18.3, 1730 / 18.3], dtype=torch.float64))
    assert TableGamma([-12.0, 4.0]).config.gamma_min == -12.0


INVERTIBLE = SCHEDULES | {
    "betas": lambda: BetaGamma([0.01, 0.3, 0.02, 0.5, 0.1]),
    "table_of_other_ends": lambda: TableGamma(CURVED_TABLE, gamma_min=-15.0, gamma_max=3.0, num_train_timesteps=77),
    "fixed_of_other_steps": lambda: FixedLinearGamma(-4.0, 1.5, num_train_timesteps=7),
}


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_level_of_a_timestep_is_the_inverse_of_the_timestep_of_a_level(name):
    schedule = INVERTIBLE[name]()
    t = torch.cat([times(), torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)])
    gamma = schedule(t).detach()
    for given in (t, None):
        timesteps = schedule.timestep(given, gamma)
        again = schedule.gamma_of_timestep(timesteps)
        assert again.dtype == torch.float64 and again.shape == gamma.shape
        torch.testing.assert_close(again, gamma, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.timestep(None, again), timesteps, rtol=1e-12, atol=1e-9)
    # any shape, also a number
    torch.testing.assert_close(schedule.gamma_of_timestep(timesteps[:6].view(2, 3)), gamma[:6].view(2, 3))
    assert float(schedule.gamma_of_timestep(float(timesteps[5]))) == pytest.approx(float(gamma[5]), abs=1e-11)
    # the float32 that networks get costs no more than its rounding
    rounded = schedule.gamma_of_timestep(timesteps.float())
    assert rounded.dtype == torch.float64
    slope = (gamma.diff().abs() / timesteps.diff().abs().clamp(min=1e-9)).max()
    assert float((rounded - gamma).abs().max()) <= 2e-7 * float(timesteps.abs().max()) * max(1.0, float(slope))


@pytest.mark.parametrize("timestep", [-0.5, 4.001, math.nan, math.inf])
def test_indices_without_a_level_are_refused(timestep):
    with pytest.raises(ValueError, match=r"timesteps must be within \[0, 4\]"):
        BetaGamma([0.01, 0.3, 0.02, 0.5, 0.1]).gamma_of_timestep(torch.tensor([1.0, timestep]))


def test_the_config_of_a_table_is_json_in_full_digits(tmp_path):
    table = [-13.3 + 0.1 / 3, 1 / 7, 5.000000000000001]
    TableGamma(table).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["gammas"] == table


# ---- linear betas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [200, 1000, 4000])
def test_linear_betas_are_the_products_of_ddpm(num_steps):
    indices = [0, 1, 7, num_steps // 2, num_steps - 2, num_steps - 1]
    scale = 1000 / num_steps
    exact = [float(g) for g in mp_linear_beta_gammas(num_steps, 1e-4 * scale, 0.02 * scale, indices)]
    table = LinearBetaGamma(num_steps).table()
    assert len(table) == num_steps
    np.testing.assert_allclose(table[indices].numpy(), exact, rtol=0, atol=2e-13)


@pytest.mark.parametrize("num_steps", [200, 1000])
def test_without_rescaling_the_table_is_that_of_diffusers(num_steps):
    reference = DDPMScheduler(num_steps)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64), 0)
    torch.testing.assert_close(alphas_cumprod.float(), reference.alphas_cumprod, rtol=1e-5, atol=0)
    schedule = LinearBetaGamma(num_steps, rescale_betas=False)
    torch.testing.assert_close(torch.sigmoid(-schedule.table()), alphas_cumprod, rtol=1e-12, atol=0)
    # the same at t = i/(T − 1), and the network gets i
    t = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    torch.testing.assert_close(schedule(t), schedule.table(), rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.timestep(t, schedule(t)), torch.arange(num_steps).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", [100, 200, 4000, 10000])
def test_rescaled_betas_keep_the_ends_of_a_thousand_steps(num_steps):
    alpha_bar = 1 / (1 + math.exp(float(LinearBetaGamma(num_steps).ends()[1])))
    assert 2e-5 < alpha_bar < 8e-5
    assert float(LinearBetaGamma(num_steps).ends()[0]) == pytest.approx(math.log(1e-4 * 1000 / num_steps), abs=0.01)


def test_betas_kept_for_two_hundred_steps_leave_13_percent_and_warn():
    with pytest.warns(UserWarning, match=r"prior KL.* 0\.0308 bits/dim.*fraction 0\.132") as caught:
        summary = LinearBetaGamma(200, rescale_betas=False).describe()
    assert caught[0].filename == __file__
    assert summary.alpha_bar_1 == pytest.approx(0.132, abs=5e-4)
    assert summary.prior_kl_bpd == pytest.approx(0.031, abs=5e-4)


@pytest.mark.parametrize("make", [LinearBetaGamma, lambda: LinearBetaGamma(200), FixedLinearGamma])
def test_good_schedules_do_not_warn(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = make().describe()
    assert summary.prior_kl_bpd < 2e-3 and summary.data_power == 0.25


def test_describe_uses_the_data_power():
    # the network may do nothing about α₁² x²: ½ α₁² E[x²] at the least
    small, large = (FixedLinearGamma().describe(power).prior_kl_bpd for power in (0.0, 1.0))
    assert large - small == pytest.approx(0.5 / (1 + math.exp(5)) / math.log(2), rel=1e-10)


def test_linear_betas_reach_log_snr_9_21():
    assert LinearBetaGamma().describe().log_snr_range[1] == pytest.approx(9.21, abs=5e-3)


def test_gammas_from_betas_take_float32_without_losing_more_than_it_has():
    betas = linear_betas(1000)
    torch.testing.assert_close(gammas_from_betas(betas.float()), gammas_from_betas(betas), rtol=0, atol=1e-5)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FixedLinearGamma, LearnedLinearGamma, MonotoneGammaNetwork])
@pytest.mark.parametrize("ends", [(5.0, -13.3), (1.0, 1.0), (math.nan, 5.0), (-13.3, math.inf), (-math.inf, 5.0)])
def test_ends_in_the_wrong_order_are_refused(cls, ends):
    with pytest.raises(ValueError, match=r"gamma_min must be below gamma_max.*-13\.3 and 5"):
        cls(*ends)


@pytest.mark.parametrize("cls", [FixedLinearGamma, LearnedLinearGamma, MonotoneGammaNetwork])
@pytest.mark.parametrize("num", [0, -5, 1000.0, "1000", None])
def test_wrong_step_counts_are_refused(cls, num):
    with pytest.raises(ValueError, match="num_train_timesteps must be an integer"):
        cls(num_train_timesteps=num)


def test_a_network_without_units_is_refused():
    with pytest.raises(ValueError, match="hidden_dim"):
        MonotoneGammaNetwork(hidden_dim=0)


@pytest.mark.parametrize(
    ("gammas", "message"),
    [
        ([], "at least 2"),
        ([1.0], "at least 2"),
        ([[1.0, 2.0], [3.0, 4.0]], "at least 2 numbers, got shape"),
        ([1.0, math.nan, 2.0], "must be finite"),
        ([1.0, 2.0, math.inf], "must be finite"),
        ([1.0, 2.0, 2.0], "must increase.* index 1"),
        ([3.0, 2.0, 1.0], "must increase.* index 0"),
    ],
)
def test_wrong_tables_are_refused(gammas, message):
    with pytest.raises(ValueError, match=message):
        TableGamma(gammas)


def test_a_table_with_a_reversed_timestep_scale_is_refused():
    with pytest.raises(ValueError, match="gamma_min must be below gamma_max"):
        TableGamma([1.0, 2.0], gamma_min=3.0)
    with pytest.raises(ValueError, match="num_train_timesteps"):
        TableGamma([1.0, 2.0], num_train_timesteps=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta_start": 0.0},
        {"beta_start": -1e-4},
        {"beta_start": 0.03},
        {"beta_end": 1.0},
        {"beta_end": math.nan},
        {"num_train_timesteps": 20},  # 0.02 · 1000/20 = 1
    ],
)
def test_betas_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="betas must satisfy"):
        LinearBetaGamma(**arguments)


@pytest.mark.parametrize("num", [1, 0, 10.5])
def test_betas_need_two_steps(num):
    with pytest.raises(ValueError, match="num_train_timesteps must be an integer of at least 2"):
        LinearBetaGamma(num)


def test_few_steps_work_without_rescaling():
    assert len(LinearBetaGamma(20, rescale_betas=False).table()) == 20


def test_the_base_class_names_the_missing_methods():
    for method in (lambda s: s.ends(), lambda s: s.gamma_and_slope(times(2))):
        with pytest.raises(NotImplementedError, match="NoiseSchedule must define"):
            method(NoiseSchedule())


def test_a_schedule_without_parameters_moves_with_its_pipeline():
    # diffusers' own dtype property fails for a module without parameters
    for schedule in (FixedLinearGamma(), TableGamma([-5.0, 0.0, 5.0]), LinearBetaGamma(50)):
        assert schedule.dtype == torch.float32
        gamma = schedule(torch.tensor(0.3, dtype=torch.float64))
        cls = LinearBetaScheduler if isinstance(schedule, LinearBetaGamma) else VDMScheduler
        pipe = VDMPipeline(tiny_unet(), cls.from_noise_schedule(schedule), schedule).to("cpu", torch.bfloat16)
        assert pipe.unet.dtype == torch.bfloat16
        assert torch.equal(pipe.noise_schedule(torch.tensor(0.3, dtype=torch.float64)), gamma)
