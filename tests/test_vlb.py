"""The variational bound: against closed forms, quadrature, and gradients taken another way."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from oracles import GaussianData, GaussianDenoiser
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_vdm import (
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaGamma,
    MonotoneGammaNetwork,
    SimpleObjective,
    TableGamma,
    VariationalBound,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_bound,
)
from diffusers_vdm.diffusion import prior_kl_nats
from diffusers_vdm.objectives import SimpleObjectiveOutput, VariationalBoundOutput
from diffusers_vdm.times import stratified_times

LN2 = math.log(2)
F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def levels(*shape: int, num_levels: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, num_levels, shape, generator=generator(seed), dtype=torch.int64)


class TinyNet(nn.Module):
    """A network of five numbers that depends on its input, the noise level, the labels and the flags."""

    def __init__(self, dtype: torch.dtype = F64):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.6, 0.4, 1.3, -0.7, 0.2], dtype=dtype))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def forward(self, sample, timestep, class_labels=None, augmentation_flags=None, return_dict=True):
        self.seen.append((sample.detach(), timestep.detach()))
        a, b, c, d, e = self.weights
        time = (timestep / 1000).reshape(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
        out = a * sample + b * torch.tanh(c * sample + d * time) + e * time
        for condition in (class_labels, augmentation_flags):
            if condition is not None:
                out = out + 0.3 * condition.reshape(time.shape)
        return (out,)


def bent(learn_ends: bool = False, seed: int = 1, hidden_dim: int = 16) -> MonotoneGammaNetwork:
    """A γ network in float64 whose weights are anything but a straight line."""
    schedule = MonotoneGammaNetwork(-7.0, 4.0, hidden_dim=hidden_dim, learn_ends=learn_ends).double()
    with torch.no_grad():
        for name, parameter in schedule.named_parameters():
            if name not in ("bias", "weight"):
                parameter.mul_(1 + 0.5 * normal(*parameter.shape, seed=seed))
        schedule.output_weight.mul_(30 * normal(hidden_dim, seed=seed + 1).abs())
    return schedule


SCHEDULES = {
    "fixed": lambda: FixedLinearGamma(-7.0, 4.0),
    "learned": lambda: LearnedLinearGamma(-7.0, 4.0).double(),
    "network": bent,
    "table": lambda: TableGamma([-7.0, -6.5, -1.0, 3.0, 4.0]),
}


def test_the_bent_network_is_bent():
    t = torch.linspace(0, 1, 101, dtype=F64)
    assert (bent()(t) - FixedLinearGamma(-7.0, 4.0)(t)).abs().max() > 0.5


# ---- the three terms, each worked out again ----------------------------------------------------------------------


def terms_by_hand(images, num_levels, net, schedule, t, eps, eps_0, num_timesteps):
    """Prior, reconstruction and diffusion in bits/dim, in numpy, from the formulas of the paper."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def column(v):
        return v.reshape(-1, *[1] * (images.ndim - 1))

    x = 2 * (images.numpy() + 0.5) / num_levels - 1
    gamma_0, gamma_1 = (float(end.detach()) for end in schedule.ends())
    variance = sigmoid(gamma_1)
    prior = 0.5 * ((1 - variance) * x**2 + variance - 1 - np.log(variance))
    # all levels at once, as nobody should in training
    values = 2 * (np.arange(num_levels) + 0.5) / num_levels - 1
    y = x + np.exp(gamma_0 / 2) * eps_0.numpy()
    logits = -0.5 * np.exp(-gamma_0) * (y[..., None] - values) ** 2
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    reconstruction = -np.take_along_axis(log_probs, images.numpy()[..., None], -1)[..., 0]
    with torch.no_grad():
        if num_timesteps is None:
            gamma_t, slope = (v.numpy() for v in schedule.gamma_and_slope(t))
            weight = 0.5 * slope
        else:
            step = np.ceil(t.numpy() * num_timesteps)
            gamma_t = schedule(torch.from_numpy(step / num_timesteps)).numpy()
            gamma_s = schedule(torch.from_numpy((step - 1) / num_timesteps)).numpy()
            # SNR(s)/SNR(t) − 1
            weight = 0.5 * num_timesteps * (np.exp(gamma_t - gamma_s) - 1)
        z_t = column(np.sqrt(sigmoid(-gamma_t))) * x + column(np.sqrt(sigmoid(gamma_t))) * eps.numpy()
        u = (gamma_t - schedule.config.gamma_min) / (schedule.config.gamma_max - schedule.config.gamma_min)
        eps_hat = net(torch.from_numpy(z_t), torch.from_numpy(1000 * u))[0].numpy()
    diffusion = column(weight) * (eps.numpy() - eps_hat) ** 2
    return [v.reshape(len(x), -1).mean(1) / LN2 for v in (prior, reconstruction, diffusion)]


@pytest.mark.parametrize("num_timesteps", [None, 1, 7, 1000])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_terms_by_hand(schedule, num_levels, num_timesteps):
    schedule, net = SCHEDULES[schedule](), TinyNet()
    images = levels(6, 2, 3, 3, num_levels=num_levels)
    noise = {"t": torch.rand(6, generator=generator(1), dtype=F64), "eps": normal(6, 2, 3, 3, seed=2)}
    noise["eps_0"] = normal(6, 2, 3, 3, seed=3)
    out = VariationalBound(net, schedule, num_timesteps=num_timesteps, num_levels=num_levels)(images, **noise)
    by_hand = terms_by_hand(images, num_levels, net, schedule, **noise, num_timesteps=num_timesteps)
    for name, expected in zip(("prior", "reconstruction", "diffusion"), by_hand, strict=True):
        # the sum of 1 − α² and its logarithm costs by hand what the package keeps
        np.testing.assert_allclose(out[name].detach().numpy(), expected, rtol=1e-9, atol=1e-11, err_msg=name)
    torch.testing.assert_close(out.total, out.prior + out.reconstruction + out.diffusion, rtol=1e-14, atol=0)
    torch.testing.assert_close(out.loss, out.total.mean(), rtol=1e-14, atol=0)


# ---- Gaussian data: schedule invariance --------------------------------------------------------------------------


def legendre(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return 0.5 * (high - low) * nodes + 0.5 * (high + low), 0.5 * (high - low) * weights


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_continuous_bound_of_gaussian_data_is_entropy_plus_prior_kl_for_every_schedule(schedule):
    data, schedule = GaussianData(0.1, 0.3), SCHEDULES[schedule]()
    # in pieces: a table is smooth between its knots only
    pieces = [legendre(i / 16, (i + 1) / 16, 60) for i in range(16)]
    nodes, weights = (np.concatenate(part) for part in zip(*pieces, strict=True))
    t = torch.from_numpy(nodes)
    with torch.no_grad():
        gamma_t, slope = schedule.gamma_and_slope(t)
        gamma_0, gamma_1 = (float(end) for end in schedule.ends())
    diffusion = float((torch.from_numpy(weights) * 0.5 * slope * data.eps_mmse(gamma_t)).sum())
    assert diffusion == pytest.approx(data.diffusion_nats(gamma_0, gamma_1), rel=1e-10)
    # E over x of the package's prior, by Gauss–Hermite quadrature
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x = torch.from_numpy(data.mean + data.variance**0.5 * nodes)
    prior = prior_kl_nats(x, torch.tensor(gamma_1, dtype=F64)).numpy() @ weights / weights.sum()
    bound = prior + diffusion + data.best_reconstruction_nats(gamma_0)
    assert bound == pytest.approx(data.entropy_nats() + data.marginal_prior_kl_nats(gamma_1), abs=1e-10)


def expected_diffusion_bpd(x: np.ndarray, data: GaussianData, schedule, num_timesteps: int | None) -> np.ndarray:
    """E over ε (and t) of the diffusion term of each x, for the best network of Gaussian data.

    ε − ε̂ = (α² s² ε − α σ (x − m))/(α² s² + σ²), of which the square has a closed form.
    """

    def mse(gamma):
        a2, s2 = 1 / (1 + np.exp(gamma)), 1 / (1 + np.exp(-gamma))
        v = a2 * data.variance + s2
        return (a2 * data.variance / v) ** 2 + a2 * s2 * (x[:, None] - data.mean) ** 2 / v**2

    gamma_0, gamma_1 = (float(end.detach()) for end in schedule.ends())
    if num_timesteps is None:
        gamma, weights = legendre(gamma_0, gamma_1, 400)
        return (0.5 * weights * mse(gamma)).sum(1) / LN2
    with torch.no_grad():
        gamma = schedule(torch.linspace(0, 1, num_timesteps + 1, dtype=F64)).numpy()
    return (0.5 * np.expm1(np.diff(gamma)) * mse(gamma[1:])).sum(1) / LN2


@pytest.mark.parametrize("num_timesteps", [None, 20])
@pytest.mark.parametrize("schedule", ["fixed", "network"])
def test_bound_of_the_gaussian_denoiser_by_sampling(schedule, num_timesteps):
    schedule, data = SCHEDULES[schedule](), GaussianData(0.1, 0.3)
    net = GaussianDenoiser(schedule, data.mean, data.variance)
    images = levels(20_000, 1, num_levels=17)
    with torch.no_grad():
        out = VariationalBound(net, schedule, num_timesteps=num_timesteps, num_levels=17)(
            images, generator=generator(5), t=torch.rand(20_000, generator=generator(6), dtype=F64)
        )
    x = (2 * images[:, 0].numpy() + 1) / 17 - 1
    difference = out.diffusion.numpy() - expected_diffusion_bpd(x, data, schedule, num_timesteps)
    error = difference.std() / math.sqrt(len(x))
    assert abs(difference.mean()) < 4 * error
    assert error < 0.02 * out.diffusion.mean()  # else the test could not fail


def test_stratified_times_estimate_the_same_with_less_variance():
    schedule, data = SCHEDULES["fixed"](), GaussianData(0.1, 0.3)
    bound = VariationalBound(GaussianDenoiser(schedule, data.mean, data.variance), schedule, num_levels=17)
    images = torch.full((64, 1), 3)
    expected = expected_diffusion_bpd(np.array([7 / 17 - 1]), data, schedule, None)[0]
    means = {"stratified": [], "independent": []}
    with torch.no_grad():
        for seed in range(60):
            # ε = ±1 has the mean and the variance of a normal one, and leaves t the only thing that is random
            eps = torch.ones(64, 1, dtype=F64)
            eps[::2] = -1
            means["stratified"].append(float(bound(images, eps=eps, generator=generator(seed)).diffusion.mean()))
            t = torch.rand(64, generator=generator(1000 + seed), dtype=F64)
            means["independent"].append(float(bound(images, eps=eps, t=t, generator=generator(seed)).diffusion.mean()))
    for values in means.values():
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(60)
    assert np.std(means["stratified"]) < 0.3 * np.std(means["independent"])


# ---- data of few levels: the bound against the entropy -----------------------------------------------------------

PROBS = np.array([0.1, 0.35, 0.05, 0.3, 0.2])
VALUES = 2 * (np.arange(5) + 0.5) / 5 - 1
ENTROPY_BPD = float(-(PROBS * np.log2(PROBS)).sum())


class PosteriorMean(nn.Module):
    """E[ε | z_t] of independent dimensions, each on five values with known probabilities: nothing is better."""

    dtype = F64

    def __init__(self, schedule, prediction_type: str = "epsilon"):
        super().__init__()
        self.low, self.high = schedule.config.gamma_min, schedule.config.gamma_max
        self.prediction_type = prediction_type

    def forward(self, sample, timestep, return_dict=True):
        gamma = self.low + (self.high - self.low) * timestep.double() / 1000
        gamma = gamma.reshape(-1, *[1] * (sample.ndim - 1))
        a, s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        values = torch.from_numpy(VALUES)
        distance = (sample[..., None] - a[..., None] * values) / s[..., None]
        logits = torch.from_numpy(np.log(PROBS)) - 0.5 * distance**2
        x_hat = (logits.softmax(-1) * values).sum(-1)
        eps_hat = (sample - a * x_hat) / s
        if self.prediction_type == "epsilon":
            return (eps_hat,)
        return (x_hat,) if self.prediction_type == "sample" else (a * eps_hat - s * x_hat,)


def normal_grid(n: int = 241, width: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the trapezoid rule for N(0, 1): exact to rounding for smooth functions."""
    nodes = np.linspace(-width, width, n)
    weights = np.exp(-0.5 * nodes**2)
    return nodes, weights / weights.sum()


def bound_by_quadrature(schedule, num_timesteps: int | None, num_t: int = 96, **kwargs) -> dict[str, float]:
    """The expectation of what `VariationalBound` returns: it is given all levels × a grid of t × a grid of ε."""
    if num_timesteps is None:
        t, t_weights = legendre(0, 1, num_t)
    else:
        t, t_weights = np.arange(1, num_timesteps + 1) / num_timesteps, np.full(num_timesteps, 1 / num_timesteps)
    eps, eps_weights = normal_grid()
    k = np.arange(5)
    grid = [torch.from_numpy(v.ravel()) for v in np.meshgrid(k, t, eps, indexing="ij")]
    weights = torch.from_numpy((PROBS[:, None, None] * t_weights[:, None] * eps_weights).ravel())
    bound = VariationalBound(
        PosteriorMean(schedule, kwargs.get("prediction_type", "epsilon")),
        schedule, num_timesteps=num_timesteps, num_levels=5, **kwargs,
    )  # fmt: skip
    with torch.no_grad():
        out = bound(grid[0][:, None], t=grid[1], eps=grid[2][:, None], eps_0=grid[2][:, None])
    return {name: float((weights * out[name]).sum()) for name in ("prior", "reconstruction", "diffusion", "total")}


def marginal_prior_kl_bpd(gamma_1: float) -> float:
    """KL(q(z_1) ‖ N(0, 1)) of the mixture that z_1 is."""
    a, s = math.sqrt(1 / (1 + math.exp(gamma_1))), math.sqrt(1 / (1 + math.exp(-gamma_1)))
    z = np.linspace(-12, 12, 20_001)
    density = (PROBS * np.exp(-0.5 * ((z[:, None] - a * VALUES) / s) ** 2)).sum(1) / (s * math.sqrt(2 * math.pi))
    reference = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return float((density * np.log2(density / reference)).sum() * (z[1] - z[0]))


@pytest.mark.parametrize("schedule", ["fixed", "learned", "network"])
def test_continuous_bound_of_discrete_data_is_the_entropy(schedule):
    schedule = SCHEDULES[schedule]()
    bound = bound_by_quadrature(schedule, None)
    # where γ_0 separates all levels, what is left above the entropy is the mismatch of q(z_1) and the prior
    assert bound["total"] == pytest.approx(ENTROPY_BPD + marginal_prior_kl_bpd(4.0), abs=2e-7)
    assert bound["reconstruction"] < 1e-9
    assert bound["total"] > ENTROPY_BPD
    assert bound["total"] == pytest.approx(bound["prior"] + bound["reconstruction"] + bound["diffusion"], abs=1e-12)


def test_finite_bound_falls_to_the_continuous_one():
    schedule = SCHEDULES["fixed"]()
    steps = (1, 2, 4, 16, 64, 250)
    bounds = [bound_by_quadrature(schedule, n)["total"] for n in steps]
    limit = bound_by_quadrature(schedule, None)["total"]
    assert all(a > b for a, b in zip(bounds, bounds[1:], strict=False))
    assert all(b > limit for b in bounds)
    assert bounds[-1] - limit < 0.05
    # the gap is of first order in 1/T
    assert (bounds[-2] - limit) / (bounds[-1] - limit) == pytest.approx(250 / 64, rel=0.1)


@pytest.mark.parametrize("num_timesteps", [None, 10])
def test_prediction_types_give_the_same_bound(num_timesteps):
    schedule = SCHEDULES["network"]()
    images, t = levels(50, 3, num_levels=5), torch.rand(50, generator=generator(4), dtype=F64)
    outs = []
    for kind in ("epsilon", "sample", "v_prediction"):
        bound = VariationalBound(
            PosteriorMean(schedule, kind), schedule,
            num_timesteps=num_timesteps, num_levels=5, prediction_type=kind,
        )  # fmt: skip
        outs.append(bound(images, t=t, eps=normal(50, 3), eps_0=normal(50, 3, seed=1)))
    for out in outs[1:]:
        torch.testing.assert_close(out.total, outs[0].total, rtol=1e-9, atol=1e-10)
    # the squared error itself is of what the network says
    assert not torch.allclose(outs[1].mse, outs[0].mse)


# ---- a finite number of steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [1, 250, 1000])
@pytest.mark.parametrize("schedule", ["fixed", "network"])
def test_times_are_rounded_up(schedule, num_timesteps):
    schedule = SCHEDULES[schedule]()
    n = num_timesteps
    t = torch.tensor([0.0, 1e-9, 0.4 / n, 1 / n, 1.0 - 0.3 / n, 1.0], dtype=F64)
    step = torch.tensor([1, 1, 1, 1, n, n], dtype=F64)
    bound = VariationalBound(TinyNet(), schedule, num_timesteps=n, num_levels=5)
    out = bound(levels(6, 2, num_levels=5), t=t, generator=generator())
    assert torch.equal(out.gamma_t, schedule(step / n).detach())
    # each multiple of 1/T stays what it is: one step up would be a whole other noise level
    exact = torch.arange(1, n + 1, dtype=F64) / n
    out = bound(levels(n, 2, num_levels=5), t=exact, generator=generator())
    assert torch.equal(out.gamma_t, schedule(exact).detach())


@pytest.mark.parametrize("schedule", ["fixed", "learned", "network", "table"])
def test_first_step_ends_at_gamma_0(schedule):
    schedule = SCHEDULES[schedule]()
    n = 250
    out = VariationalBound(TinyNet(), schedule, num_timesteps=n, num_levels=5)(
        levels(1, 1, num_levels=5), t=torch.tensor([0.5 / n], dtype=F64), generator=generator()
    )
    gamma_0 = schedule.ends()[0]
    weight = 0.5 * n * torch.expm1(schedule(torch.tensor([1 / n], dtype=F64)) - gamma_0)
    torch.testing.assert_close(out.diffusion, weight * out.mse / LN2, rtol=1e-13, atol=0)
    assert torch.equal(schedule(torch.zeros(1, dtype=F64))[0], gamma_0)


def test_gamma_0_learns_from_reconstruction_and_from_the_first_step():
    schedule = LearnedLinearGamma(-7.0, 4.0).double()
    bound = VariationalBound(TinyNet(), schedule, num_timesteps=10, num_levels=256)
    images, noise = levels(4, 3), {"eps": normal(4, 3), "eps_0": normal(4, 3, seed=1)}
    t = torch.full((4,), 0.05, dtype=F64)

    # γ(1/T) moves with the bias as well: finite differences of the whole bound, and of its parts
    h = 1e-5
    out = bound(images, t=t, **noise)
    names = ("total", "reconstruction", "diffusion")
    slopes = [torch.autograd.grad(out[name].mean(), schedule.bias, retain_graph=True)[0] for name in names]
    with torch.no_grad():
        schedule.bias.fill_(-7.0 + h)
        up = bound(images, t=t, **noise)
        schedule.bias.fill_(-7.0 - h)
        down = bound(images, t=t, **noise)
    for slope, name in zip(slopes, names, strict=True):
        expected = (up[name] - down[name]).mean() / (2 * h)
        torch.testing.assert_close(slope[0], expected, rtol=1e-5, atol=1e-9)
        assert abs(float(expected)) > 1e-4


# ---- gradients of γ ----------------------------------------------------------------------------------------------

INSIDE = ("hidden_weight", "hidden_bias", "output_weight")


def gradients(schedule, minimize_variance: bool, num_timesteps: int | None = None, objective=None) -> dict:
    """Gradients of all parameters; `objective` of the output instead of its loss, by plain autograd."""
    net = TinyNet()
    bound = VariationalBound(
        net, schedule, num_timesteps=num_timesteps, num_levels=9, minimize_variance=minimize_variance
    )
    bound.zero_grad()
    out = bound(
        levels(8, 2, 2, num_levels=9), t=torch.rand(8, generator=generator(7), dtype=F64),
        eps=normal(8, 2, 2), eps_0=normal(8, 2, 2, seed=1),
    )  # fmt: skip
    (out.loss if objective is None else objective(out)).backward()
    return {name: p.grad.clone() for name, p in bound.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learn_ends", [False, True])
def test_inside_of_gamma_follows_the_variance_and_nothing_else_does(learn_ends):
    schedule = bent(learn_ends)
    plain = gradients(schedule, False)
    ours = gradients(schedule, True)
    squared = gradients(schedule, False, objective=lambda out: out.diffusion.square().mean())
    assert plain.keys() == ours.keys()
    for name in plain:
        if name.removeprefix("noise_schedule.") in INSIDE:
            torch.testing.assert_close(ours[name], squared[name], rtol=1e-10, atol=1e-14)
            assert not torch.allclose(ours[name], plain[name], rtol=0.1), name
        else:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-12, atol=1e-15)
    assert ("noise_schedule.bias" in plain) == learn_ends


@pytest.mark.parametrize("schedule", ["learned", "network"])
def test_minimized_variance_changes_neither_the_values_nor_a_finite_bound(schedule):
    for num_timesteps in (None, 10):
        outs = [
            VariationalBound(TinyNet(), SCHEDULES[schedule](), num_timesteps=num_timesteps, minimize_variance=flag)(
                levels(4, 3), generator=generator(1)
            ).total
            for flag in (False, True)
        ]
        assert torch.equal(*outs)
    finite = [gradients(SCHEDULES[schedule](), flag, num_timesteps=10) for flag in (False, True)]
    assert all(torch.equal(finite[0][name], finite[1][name]) for name in finite[0])


def test_gradient_of_the_variance_survives_accumulation_and_a_scaled_loss():
    # a loss scale, or one part of an accumulated batch, must scale every gradient by the same factor
    schedule = bent(True)
    once = gradients(schedule, True)
    scaled = gradients(schedule, True, objective=lambda out: 0.25 * out.loss)
    for name, value in once.items():
        torch.testing.assert_close(4 * scaled[name], value, rtol=1e-12, atol=0)


def test_inside_of_gamma_is_what_lowers_the_variance():
    # one small step against the gradient: the bound is not made worse in mean, its spread is made smaller
    schedule = bent()
    net = GaussianDenoiser(schedule, 0.0, 0.1)
    bound = VariationalBound(net, schedule, num_levels=9)
    images, t = levels(4096, 1, num_levels=9), stratified_times(4096, generator(3))
    noise = {"eps": normal(4096, 1), "eps_0": normal(4096, 1, seed=1)}
    before = bound(images, t=t, **noise)
    before.loss.backward()
    with torch.no_grad():
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in schedule.parameters()))
        for p in schedule.parameters():
            p.sub_(0.3 * p.grad / norm)
        after = bound(images, t=t, **noise)
    assert after.diffusion.square().mean() < before.diffusion.square().mean()
    assert after.diffusion.mean() == pytest.approx(float(before.diffusion.detach().mean()), rel=0.02)


# ---- memory ------------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_has_an_axis_of_levels():
    size = 4 * 3 * 8 * 8
    bound = VariationalBound(TinyNet(torch.float32), LearnedLinearGamma(-13.3, 5.0))
    saved = []

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), LargestResult() as made:
        out = bound(levels(4, 3, 8, 8).to(torch.uint8), generator=generator())
        out.loss.backward()
    assert made.largest <= 2 * size
    # nor one tensor for each level: that would be the same memory
    assert sum(saved) < 40 * size


# ---- inputs ------------------------------------------------------------------------------------------------------


def test_randomness_is_drawn_in_the_order_that_is_told():
    bound = VariationalBound(TinyNet(), bent(), num_levels=5)
    images = levels(4, 3, num_levels=5)
    source = generator(11)
    t = stratified_times(4, source)
    eps = torch.randn(4, 3, generator=source, dtype=F64)
    eps_0 = torch.randn(4, 3, generator=source, dtype=F64)
    assert torch.equal(bound(images, generator=generator(11)).total, bound(images, t=t, eps=eps, eps_0=eps_0).total)
    assert not torch.equal(bound(images, generator=generator(12)).total, bound(images, generator=generator(11)).total)


def test_conditions_reach_the_network():
    images, fixed = levels(3, 2), {"t": torch.tensor([0.1, 0.5, 0.9], dtype=F64), "eps": normal(3, 2)}
    for objective in (VariationalBound, SimpleObjective):
        bound = objective(TinyNet(), bent())
        plain = bound(images, **fixed, generator=generator()).mse
        for name in ("class_labels", "augmentation_flags"):
            changed = bound(images, **fixed, generator=generator(), **{name: torch.tensor([0, 1, 0])}).mse
            assert (changed != plain).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_integers_of_any_kind(dtype):
    bound = VariationalBound(TinyNet(), bent())
    images = levels(4, 3)
    images = images.clamp(max=127) if dtype is torch.int8 else images
    assert torch.equal(
        bound(images.to(dtype), generator=generator()).total, bound(images, generator=generator()).total
    )


def test_half_precision_network_gives_float32_losses():
    net = VDMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4
    )
    images = levels(4, 1, 8, 8, num_levels=17)
    outs = [
        VariationalBound(unet, FixedLinearGamma(-7.0, 4.0), num_levels=17)(images, generator=generator())
        for unet in (net, net.to(torch.bfloat16))
    ]
    assert outs[1].loss.dtype == torch.float32
    torch.testing.assert_close(outs[1].prior, outs[0].prior, rtol=0, atol=0)
    torch.testing.assert_close(outs[1].reconstruction, outs[0].reconstruction, rtol=0, atol=0)
    torch.testing.assert_close(outs[1].total, outs[0].total, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
def test_floats_are_no_data(objective):
    bound = objective(TinyNet(), bent())
    for images in (torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="images must be integers of shape"):
            bound(images)
    with pytest.raises(TypeError, match="shape"):
        bound(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
def test_values_and_shapes_that_do_not_fit(objective):
    bound = objective(TinyNet(), bent(), num_levels=17)
    images = levels(2, 3, num_levels=17)
    with pytest.raises(ValueError, match=r"within \[0, 17\), got values from .* to 17"):
        bound(torch.tensor([[0, 17]]))
    with pytest.raises(ValueError, match=r"within \[0, 17\), got values from -1"):
        bound(torch.tensor([[-1, 3]]))
    with pytest.raises(ValueError, match="eps and eps_0 must have the shape of images"):
        bound(images, eps=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"must have shape .*\(2,\).*got \(3,\)"):
        bound(images, t=torch.zeros(3))
    with pytest.raises(ValueError, match="prediction_type"):
        objective(TinyNet(), bent(), prediction_type="eps")
    with pytest.raises(ValueError, match=r"num_levels must be within \[2, 65536\]"):
        objective(TinyNet(), bent(), num_levels=1)
    with pytest.raises(TypeError, match=r"scheduler.noise_schedule\(\)"):
        objective(TinyNet(), VDMScheduler())


@pytest.mark.parametrize("t", [1.5, -0.1, math.nan])
@pytest.mark.parametrize("num_timesteps", [None, 10])
def test_times_outside_of_the_schedule(t, num_timesteps):
    # a γ beyond its ends would be a number like any other
    bound = VariationalBound(TinyNet(), FixedLinearGamma(-7.0, 4.0), num_timesteps=num_timesteps)
    with pytest.raises(ValueError, match=r"t must be within \[0, 1\]"):
        bound(levels(2, 3), t=torch.tensor([0.5, t]))


@pytest.mark.parametrize("num_timesteps", [0, -3, 2.5])
def test_wrong_number_of_steps(num_timesteps):
    with pytest.raises(ValueError, match="num_timesteps must be a positive integer"):
        VariationalBound(TinyNet(), bent(), num_timesteps=num_timesteps)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 128])
def test_stratified_times(batch_size):
    t = stratified_times(batch_size, generator(3))
    assert t.dtype == F64 and t.shape == (batch_size,)
    assert t.min() >= 0 and t.max() < 1
    gaps = torch.diff(t.sort().values, append=t.min()[None] + 1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / batch_size), rtol=0, atol=1e-6)
    assert torch.equal(t, stratified_times(batch_size, generator(3)))
    assert not torch.equal(t, stratified_times(batch_size, generator(4)))


def test_each_stratified_time_is_uniform():
    source = generator(0)
    draws = torch.stack([stratified_times(4, source) for _ in range(4000)])
    for i in (0, 3):
        counts = torch.histc(draws[:, i].float(), bins=10, min=0, max=1)
        assert float(((counts - 400) ** 2 / 400).sum()) < 30  # χ² of 9 degrees of freedom


# ---- a trained schedule and the table that a scheduler keeps of it -----------------------------------------------


@pytest.mark.parametrize("num_timesteps", [None, 250, 1000])
@pytest.mark.parametrize("learn_ends", [False, True])
def test_bound_through_the_scheduler_is_that_of_the_module(learn_ends, num_timesteps):
    schedule = bent(learn_ends, hidden_dim=64)
    if learn_ends:
        with torch.no_grad():
            schedule.bias.sub_(0.3)
            schedule.weight.add_(0.5)
    table = VDMScheduler.from_noise_schedule(schedule).noise_schedule()
    images = levels(64, 3)
    noise = {"t": stratified_times(64, generator()), "eps": normal(64, 3), "eps_0": normal(64, 3, seed=1)}
    with torch.no_grad():
        module = VariationalBound(TinyNet(), schedule, num_timesteps=num_timesteps)(images, **noise)
        baked = VariationalBound(TinyNet(), table, num_timesteps=num_timesteps)(images, **noise)
    for name in ("prior", "reconstruction"):
        torch.testing.assert_close(baked[name], module[name], rtol=1e-12, atol=1e-12)
    assert baked.loss == pytest.approx(float(module.loss), rel=1e-6)
    torch.testing.assert_close(baked.total, module.total, rtol=1e-5, atol=1e-6)


# ---- training ----------------------------------------------------------------------------------------------------


class ToyNet(nn.Module):
    """Two dimensions, enough to learn the toy data in a second."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, sample, timestep, return_dict=True):
        time = timestep[:, None] / 1000
        return (sample + self.layers(torch.cat([sample, time, torch.cos(3 * time)], 1)),)


def toy_data(n: int, source: torch.Generator) -> torch.Tensor:
    first = torch.randint(1, 8, (n,), generator=source)
    return torch.stack([first, (first + torch.randint(0, 2, (n,), generator=source)) % 9], 1)


def train(schedule, steps: int = 250, **kwargs) -> tuple[float, float]:
    """The bound before and after."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ToyNet()
    bound = VariationalBound(net, schedule, num_levels=9, **kwargs)
    groups = [{"params": net.parameters()}, {"params": [*schedule.parameters()], "lr": 0.02}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)
    source, held_out = generator(1), toy_data(2000, generator(2))
    with torch.no_grad():
        first = float(bound(held_out, generator=generator(3)).loss)
    for _ in range(steps):
        optimizer.zero_grad()
        bound(toy_data(128, source), generator=source).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return first, float(bound(held_out, generator=generator(3)).loss)


# bits/dim: the first value is uniform over 7, the second of two given it
TOY_ENTROPY = 0.5 * (math.log2(7) + 1)


@pytest.mark.parametrize("num_timesteps", [None, 20])
def test_training_with_a_learned_schedule(num_timesteps):
    schedule = MonotoneGammaNetwork(-6.0, 4.0, hidden_dim=32)
    start = schedule.table(257)
    first, last = train(schedule, num_timesteps=num_timesteps)
    assert TOY_ENTROPY < last < first - 1
    after = schedule.table(257)
    assert (after - start).abs().max() > 0.1  # it did learn
    assert (after[1:] > after[:-1]).all()
    # the ends are fixed, to the last bit, and so is what the network gets
    assert after[0] == -6.0 and after[-1] == 4.0
    assert [float(end) for end in schedule.ends()] == [-6.0, 4.0]


@pytest.mark.parametrize("kind", ["network", "linear"])
def test_training_moves_learned_ends(kind):
    if kind == "network":
        schedule = MonotoneGammaNetwork(-2.0, 3.0, hidden_dim=32, learn_ends=True)
    else:
        schedule = LearnedLinearGamma(-2.0, 3.0)
    first, last = train(schedule)
    assert last < first - 0.8
    gamma_0, gamma_1 = (float(end.detach()) for end in schedule.ends())
    # at −2 neighboring levels blur: the reconstruction pulls γ_0 down. Where γ_1 goes depends on the network's errors
    assert gamma_0 < -3 and abs(gamma_1 - 3) > 0.1
    assert (schedule.config.gamma_min, schedule.config.gamma_max) == (-2.0, 3.0)
    t = torch.linspace(0, 1, 100, dtype=F64)
    assert (torch.diff(schedule(t).detach()) > 0).all()


# ---- DDPM's objective --------------------------------------------------------------------------------------------


def test_simple_objective_is_the_mean_squared_error_at_the_indices_of_ddpm():
    schedule, net = LinearBetaGamma(1000), TinyNet()
    index = torch.tensor([0, 1, 499, 500, 998, 999])
    images, eps = levels(6, 2, 3), normal(6, 2, 3)
    out = SimpleObjective(net, schedule)(images, t=index.double() / 999, eps=eps)
    # DDPM's own arithmetic: the product of 1 − β, in float64
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index.numpy()][:, None, None]
    x = (2 * images.numpy() + 1) / 256 - 1
    z_t = torch.from_numpy(np.sqrt(alpha_bar) * x + np.sqrt(1 - alpha_bar) * eps.numpy())
    sample, timesteps = net.seen[-1]
    torch.testing.assert_close(timesteps, index.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(sample, z_t, rtol=0, atol=1e-11)
    expected = (eps - net(z_t, index.double())[0]).square().mean((1, 2))
    torch.testing.assert_close(out.mse, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.loss, expected.mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_simple_objective_draws_every_index_alike(num_train_timesteps):
    net = TinyNet()
    betas = {"beta_start": 1e-4, "beta_end": 0.005} if num_train_timesteps == 10 else {}
    SimpleObjective(net, LinearBetaGamma(num_train_timesteps, **betas))(
        torch.zeros(100_000, 1, dtype=torch.uint8), generator=generator(4)
    )
    timesteps = net.seen[0][1]
    index = timesteps.round().long()
    torch.testing.assert_close(timesteps, index.double(), rtol=0, atol=1e-9)
    counts = torch.bincount(index, minlength=num_train_timesteps).double()
    assert len(counts) == num_train_timesteps and counts.min() > 0
    chi_squared = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    n = num_train_timesteps - 1
    assert abs(chi_squared - n) < 5 * math.sqrt(2 * n)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_simple_objective_of_each_prediction_type(prediction_type):
    schedule, net = FixedLinearGamma(-7.0, 4.0), TinyNet()
    images, eps, t = levels(5, 3), normal(5, 3), torch.rand(5, generator=generator(1), dtype=F64)
    out = SimpleObjective(net, schedule, prediction_type=prediction_type)(images, t=t, eps=eps)
    gamma = (-7 + 11 * t)[:, None]
    a, s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    x = (2 * images.double() + 1) / 256 - 1
    target = {"epsilon": eps, "sample": x, "v_prediction": a * eps - s * x}[prediction_type]
    expected = (target - net(a * x + s * eps, 1000 * t)[0]).square().mean(1)
    torch.testing.assert_close(out.mse, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", ["learned", "network"])
def test_simple_objective_never_trains_gamma(schedule):
    schedule = SCHEDULES[schedule]()
    net = TinyNet()
    SimpleObjective(net, schedule)(levels(4, 3), generator=generator()).loss.backward()
    assert net.weights.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in schedule.parameters())


# ---- evaluation over a data set ----------------------------------------------------------------------------------


def evaluate(net, images, schedule=None, **kwargs):
    num_timesteps = kwargs.pop("num_timesteps", None)
    bound = VariationalBound(net, schedule or FixedLinearGamma(-7.0, 4.0), num_levels=9, num_timesteps=num_timesteps)
    return evaluate_bound(bound, images, progress_bar=False, **kwargs)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_every_image_once_per_repeat_whatever_the_batch(batch_size):
    images = levels(11, 1, 2, 2, num_levels=9)
    net = TinyNet()
    out = evaluate(net, images, num_samples=3, batch_size=batch_size)
    assert sum(len(sample) for sample, _ in net.seen) == 3 * 11
    assert max(len(sample) for sample, _ in net.seen) <= batch_size
    assert (out.num_images, out.num_samples, out.num_timesteps) == (11, 3, None)
    assert out.per_image_bpd.shape == (11,) and out.gamma_t.shape == out.mse.shape == (3, 11)
    reference = evaluate(TinyNet(), images, num_samples=3, batch_size=5)
    torch.testing.assert_close(out.per_image_bpd, reference.per_image_bpd, rtol=1e-13, atol=0)
    assert torch.equal(out.gamma_t, reference.gamma_t)
    assert out.bpd == pytest.approx(float(out.per_image_bpd.mean()), rel=1e-13)
    assert out.bpd == pytest.approx(out.prior_bpd + out.reconstruction_bpd + out.diffusion_bpd, rel=1e-13)
    assert out.diffusion_bpd == pytest.approx(float(out.diffusion_terms_bpd.mean()), rel=1e-13)


def test_an_image_keeps_its_value_whatever_follows_it():
    images = levels(11, 4, num_levels=9)
    all_of_them = evaluate(TinyNet(), images)
    torch.testing.assert_close(evaluate(TinyNet(), images[:5]).per_image_bpd, all_of_them.per_image_bpd[:5])
    images = images.clone()
    images[7] = 0
    changed = evaluate(TinyNet(), images).per_image_bpd != all_of_them.per_image_bpd
    assert changed.nonzero().flatten().tolist() == [7]


def test_evaluation_is_keyed_by_its_seed_alone():
    images = levels(6, 4, num_levels=9)
    state = torch.get_rng_state()
    first = evaluate(TinyNet(), images, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(evaluate(TinyNet(), images, seed=1).per_image_bpd, first.per_image_bpd)
    assert not torch.equal(evaluate(TinyNet(), images, seed=2).per_image_bpd, first.per_image_bpd)
    # more repeats go on where fewer stopped
    more = evaluate(TinyNet(), images, seed=1, num_samples=6)
    assert torch.equal(more.gamma_t[:4], first.gamma_t)
    # no two images share their noise, and no repeat is another one
    assert len(first.mse.unique()) == first.mse.numel()
    # a repeat's times cover [0, 1] evenly
    t = (evaluate(TinyNet(), levels(200, 1, num_levels=9), num_samples=1).gamma_t[0] + 7) / 11
    assert torch.diff(t.sort().values).max() < 3 / 200


def test_error_bar_covers_the_truth():
    schedule, data = FixedLinearGamma(-7.0, 4.0), GaussianData(0.1, 0.3)
    images = levels(16, 1, num_levels=9)
    net = GaussianDenoiser(schedule, data.mean, data.variance)
    x = (2 * images[:, 0].numpy() + 1) / 9 - 1
    truth = float(expected_diffusion_bpd(x, data, schedule, None).mean())
    hits, estimates, errors = 0, [], []
    for seed in range(60):
        out = evaluate(net, images, schedule, num_samples=6, seed=seed, batch_size=16)
        expected = truth + out.prior_bpd + out.reconstruction_bpd  # nothing random in the one, little in the other
        hits += abs(out.bpd - expected) < 2.571 * out.stderr_bpd  # 95 % of Student's t with 5 degrees of freedom
        estimates.append(out.bpd - expected)
        errors.append(out.stderr_bpd)
    assert 50 <= hits
    # and it is not too wide: the spread of the estimates is what it says
    assert np.std(estimates) == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=0.4)


def test_a_single_repeat_has_no_error_bar():
    out = evaluate(TinyNet(), levels(4, 2, num_levels=9), num_samples=1, num_timesteps=50)
    assert math.isnan(out.stderr_bpd)
    assert out.num_timesteps == 50


def test_labels_go_with_their_images():
    images, labels = levels(7, 2, num_levels=9), torch.tensor([0, 0, 0, 0, 0, 1, 0])
    plain = evaluate(TinyNet(), images, class_labels=torch.zeros(7, dtype=torch.long), batch_size=3)
    changed = evaluate(TinyNet(), images, class_labels=labels, batch_size=3).per_image_bpd != plain.per_image_bpd
    assert changed.nonzero().flatten().tolist() == [5]


class Breaks(TinyNet):
    """NaN for images of zeros, at any noise level: z_t of the image in hand is known by its mean."""

    def forward(self, sample, timestep, **kwargs):
        out = super().forward(sample, timestep, **kwargs)[0]
        return (torch.where(self.bad.reshape(-1, 1), torch.nan, out),)


def test_nan_is_an_error_that_names_the_image():
    net = Breaks()
    net.bad = torch.tensor([False])
    images = levels(3, 2, num_levels=9)
    assert math.isfinite(evaluate(net, images, batch_size=1).bpd)
    net.bad = torch.tensor([False, True, False])
    bound = VariationalBound(net, FixedLinearGamma(-7.0, 4.0), num_levels=9).train()
    with pytest.raises(ValueError, match="image 1 is not finite"):
        evaluate_bound(bound, images, batch_size=3, progress_bar=False)
    assert bound.training and net.training


class Dropping(TinyNet):
    """Notes the mode in which it is called."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes: set[bool] = set()

    def forward(self, sample, timestep, return_dict=True):
        self.modes |= {self.training, self.dropout.training}
        return super().forward(self.dropout(sample), timestep)


def test_evaluation_is_in_eval_mode():
    net = Dropping().train()
    evaluate(net, levels(3, 2, num_levels=9))
    assert net.modes == {False}


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_every_mode_as_it_was(training):
    # a network from `from_pretrained` is in eval mode, the bound around it is fresh and so in training mode
    images = levels(3, 2, num_levels=9)
    bound = VariationalBound(Dropping().train(training), bent().train(training), num_levels=9)
    modes = {name: module.training for name, module in bound.named_modules()}
    evaluate_bound(bound, images, progress_bar=False)
    assert {name: module.training for name, module in bound.named_modules()} == modes
    with pytest.raises(ValueError, match="within"):
        evaluate_bound(bound, images + 9, progress_bar=False)
    assert {name: module.training for name, module in bound.named_modules()} == modes


def test_no_gradients_are_kept():
    out = evaluate(TinyNet(), levels(3, 2, num_levels=9), bent())
    assert not out.per_image_bpd.requires_grad and not out.gamma_t.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [7, 25, 50, 100, 250, 1000])
def test_a_time_on_the_grid_is_its_own_step(steps, dtype):
    schedule = FixedLinearGamma(-6.0, 4.0)
    bound = VariationalBound(TinyNet(), schedule, num_levels=9, num_timesteps=steps)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    out = bound(levels(steps, 2, num_levels=9), t=t.to(dtype))
    torch.testing.assert_close(out.gamma_t, schedule(t), rtol=0, atol=1e-12)


def test_progress_bar(capsys):
    bound = VariationalBound(TinyNet(), bent(), num_levels=9)
    images = levels(5, 2, num_levels=9)
    evaluate_bound(bound, images, progress_bar=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    counts, texts = [], []

    class Bar:
        def __init__(self, total, **kwargs):
            counts.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def update(self, n):
            counts.append(-n)

        def set_description(self, text):
            texts.append(text)

    evaluate_bound(bound, images, num_samples=2, batch_size=3, progress_bar=Bar)
    assert counts[0] == 10 and sum(counts) == 0
    assert texts[-1].endswith(" bits/dim") and " ± " in texts[-1] and " ± " not in texts[0]


def test_evaluation_of_nothing():
    bound = VariationalBound(TinyNet(), bent(), num_levels=9)
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate_bound(bound, levels(3, 2)[:0])
    for kwargs in ({"num_samples": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            evaluate_bound(bound, levels(3, 2, num_levels=9), **kwargs)
    with pytest.raises(TypeError, match="integers"):
        evaluate_bound(bound, torch.rand(3, 2), progress_bar=False)


@pytest.mark.parametrize("output", [VariationalBoundOutput, SimpleObjectiveOutput])
def test_outputs_survive_what_accelerate_does_under_mixed_precision(output):
    """It rebuilds what the forward returns from a dict, which a BaseOutput allows only with defaults."""
    from accelerate.utils import convert_to_fp32

    names = [field.name for field in dataclasses.fields(output)]
    out = output(**{name: torch.ones(2, dtype=torch.bfloat16) for name in names})
    assert all(convert_to_fp32(out)[name].dtype == torch.float32 for name in names)
