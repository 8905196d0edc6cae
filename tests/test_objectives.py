"""objectives.py: the bound and DDPM's objective, against closed forms, quadrature and other gradients."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

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
)
from diffusers_vdm.diffusion import prior_kl_nats
from diffusers_vdm.objectives import SimpleObjectiveOutput, VariationalBoundOutput
from diffusers_vdm.times import stratified_times
from tests.models import TinyNet, bent_gamma, fixed_weights
from tests.oracles import GaussianData, GaussianDenoiser, expected_diffusion_bpd, legendre
from tests.tensors import F64, TensorSizes, normal, random_levels, seeded

LN2 = math.log(2)
SCHEDULES = {
    "fixed": lambda: FixedLinearGamma(-7.0, 4.0),
    "learned": lambda: LearnedLinearGamma(-7.0, 4.0).double(),
    "network": bent_gamma,
    "table": lambda: TableGamma([-7.0, -6.5, -1.0, 3.0, 4.0]),
}


def test_the_bent_network_is_bent():
    t = torch.linspace(0, 1, 101, dtype=F64)
    assert (bent_gamma()(t) - FixedLinearGamma(-7.0, 4.0)(t)).abs().max() > 0.5


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
    # all levels at once, which would take too much memory in training
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
    images = random_levels(6, 2, 3, 3, num_levels=num_levels)
    noise = {"t": torch.rand(6, generator=seeded(1), dtype=F64), "eps": normal(6, 2, 3, 3, seed=2)}
    noise["eps_0"] = normal(6, 2, 3, 3, seed=3)
    out = VariationalBound(net, schedule, num_timesteps=num_timesteps, num_levels=num_levels)(images, **noise)
    by_hand = terms_by_hand(images, num_levels, net, schedule, **noise, num_timesteps=num_timesteps)
    for name, expected in zip(("prior", "reconstruction", "diffusion"), by_hand, strict=True):
        # by hand, 1 − α² and its logarithm lose digits that the package keeps
        np.testing.assert_allclose(out[name].detach().numpy(), expected, rtol=1e-9, atol=1e-11, err_msg=name)
    torch.testing.assert_close(out.total, out.prior + out.reconstruction + out.diffusion, rtol=1e-14, atol=0)
    torch.testing.assert_close(out.loss, out.total.mean(), rtol=1e-14, atol=0)


# ---- Gaussian data: schedule invariance --------------------------------------------------------------------------


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


@pytest.mark.parametrize("num_timesteps", [None, 20])
@pytest.mark.parametrize("schedule", ["fixed", "network"])
def test_bound_of_the_gaussian_denoiser_by_sampling(schedule, num_timesteps):
    schedule, data = SCHEDULES[schedule](), GaussianData(0.1, 0.3)
    net = GaussianDenoiser(schedule, data.mean, data.variance)
    images = random_levels(20_000, 1, num_levels=17)
    with torch.no_grad():
        out = VariationalBound(net, schedule, num_timesteps=num_timesteps, num_levels=17)(
            images, generator=seeded(5), t=torch.rand(20_000, generator=seeded(6), dtype=F64)
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
            means["stratified"].append(float(bound(images, eps=eps, generator=seeded(seed)).diffusion.mean()))
            t = torch.rand(64, generator=seeded(1000 + seed), dtype=F64)
            means["independent"].append(float(bound(images, eps=eps, t=t, generator=seeded(seed)).diffusion.mean()))
    for values in means.values():
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(60)
    assert np.std(means["stratified"]) < 0.3 * np.std(means["independent"])


# ---- data of few levels: the bound against the entropy -----------------------------------------------------------

PROBS = np.array([0.1, 0.35, 0.05, 0.3, 0.2])
VALUES = 2 * (np.arange(5) + 0.5) / 5 - 1
ENTROPY_BPD = float(-(PROBS * np.log2(PROBS)).sum())


class PosteriorMean(nn.Module):
    """E[ε | z_t] of independent dimensions, each on five values with known probabilities: the best network."""

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
    images, t = random_levels(50, 3, num_levels=5), torch.rand(50, generator=seeded(4), dtype=F64)
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
    out = bound(random_levels(6, 2, num_levels=5), t=t, generator=seeded())
    assert torch.equal(out.gamma_t, schedule(step / n).detach())
    # each multiple of 1/T stays what it is: one step up would be a whole other noise level
    exact = torch.arange(1, n + 1, dtype=F64) / n
    out = bound(random_levels(n, 2, num_levels=5), t=exact, generator=seeded())
    assert torch.equal(out.gamma_t, schedule(exact).detach())


@pytest.mark.parametrize("schedule", ["fixed", "learned", "network", "table"])
def test_first_step_ends_at_gamma_0(schedule):
    schedule = SCHEDULES[schedule]()
    n = 250
    out = VariationalBound(TinyNet(), schedule, num_timesteps=n, num_levels=5)(
        random_levels(1, 1, num_levels=5), t=torch.tensor([0.5 / n], dtype=F64), generator=seeded()
    )
    gamma_0 = schedule.ends()[0]
    weight = 0.5 * n * torch.expm1(schedule(torch.tensor([1 / n], dtype=F64)) - gamma_0)
    torch.testing.assert_close(out.diffusion, weight * out.mse / LN2, rtol=1e-13, atol=0)
    assert torch.equal(schedule(torch.zeros(1, dtype=F64))[0], gamma_0)


def test_gamma_0_learns_from_reconstruction_and_from_the_first_step():
    schedule = LearnedLinearGamma(-7.0, 4.0).double()
    bound = VariationalBound(TinyNet(), schedule, num_timesteps=10, num_levels=256)
    images, noise = random_levels(4, 3), {"eps": normal(4, 3), "eps_0": normal(4, 3, seed=1)}
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
        random_levels(8, 2, 2, num_levels=9), t=torch.rand(8, generator=seeded(7), dtype=F64),
        eps=normal(8, 2, 2), eps_0=normal(8, 2, 2, seed=1),
    )  # fmt: skip
    (out.loss if objective is None else objective(out)).backward()
    return {name: p.grad.clone() for name, p in bound.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learn_ends", [False, True])
def test_inside_of_gamma_follows_the_variance_and_nothing_else_does(learn_ends):
    schedule = bent_gamma(learn_ends)
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
                random_levels(4, 3), generator=seeded(1)
            ).total
            for flag in (False, True)
        ]
        assert torch.equal(*outs)
    finite = [gradients(SCHEDULES[schedule](), flag, num_timesteps=10) for flag in (False, True)]
    assert all(torch.equal(finite[0][name], finite[1][name]) for name in finite[0])


def test_gradient_of_the_variance_survives_accumulation_and_a_scaled_loss():
    # a loss scale, or one part of an accumulated batch, must scale every gradient by the same factor
    schedule = bent_gamma(True)
    once = gradients(schedule, True)
    scaled = gradients(schedule, True, objective=lambda out: 0.25 * out.loss)
    for name, value in once.items():
        torch.testing.assert_close(4 * scaled[name], value, rtol=1e-12, atol=0)


def test_inside_of_gamma_is_what_lowers_the_variance():
    # one small step against the gradient: the mean of the bound stays, and its spread becomes smaller
    schedule = bent_gamma()
    net = GaussianDenoiser(schedule, 0.0, 0.1)
    bound = VariationalBound(net, schedule, num_levels=9)
    images, t = random_levels(4096, 1, num_levels=9), stratified_times(4096, seeded(3))
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


def test_no_tensor_has_an_axis_of_levels():
    size = 4 * 3 * 8 * 8
    bound = VariationalBound(TinyNet(torch.float32), LearnedLinearGamma(-13.3, 5.0))
    saved = []

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), TensorSizes() as made:
        out = bound(random_levels(4, 3, 8, 8).to(torch.uint8), generator=seeded())
        out.loss.backward()
    assert max(made.sizes) <= 2 * size
    # nor one tensor for each level: that would be the same memory
    assert sum(saved) < 40 * size


# ---- inputs ------------------------------------------------------------------------------------------------------


def test_random_numbers_are_drawn_in_the_documented_order():
    bound = VariationalBound(TinyNet(), bent_gamma(), num_levels=5)
    images = random_levels(4, 3, num_levels=5)
    source = seeded(11)
    t = stratified_times(4, source)
    eps = torch.randn(4, 3, generator=source, dtype=F64)
    eps_0 = torch.randn(4, 3, generator=source, dtype=F64)
    assert torch.equal(bound(images, generator=seeded(11)).total, bound(images, t=t, eps=eps, eps_0=eps_0).total)
    assert not torch.equal(bound(images, generator=seeded(12)).total, bound(images, generator=seeded(11)).total)


def test_conditions_reach_the_network():
    images, fixed = random_levels(3, 2), {"t": torch.tensor([0.1, 0.5, 0.9], dtype=F64), "eps": normal(3, 2)}
    for objective in (VariationalBound, SimpleObjective):
        bound = objective(TinyNet(), bent_gamma())
        plain = bound(images, **fixed, generator=seeded()).mse
        for name in ("class_labels", "augmentation_flags"):
            changed = bound(images, **fixed, generator=seeded(), **{name: torch.tensor([0, 1, 0])}).mse
            assert (changed != plain).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_images_may_have_any_integer_type(dtype):
    bound = VariationalBound(TinyNet(), bent_gamma())
    images = random_levels(4, 3)
    images = images.clamp(max=127) if dtype is torch.int8 else images
    assert torch.equal(bound(images.to(dtype), generator=seeded()).total, bound(images, generator=seeded()).total)


def test_half_precision_network_gives_float32_losses():
    net = VDMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4
    )
    images = random_levels(4, 1, 8, 8, num_levels=17)
    outs = [
        VariationalBound(unet, FixedLinearGamma(-7.0, 4.0), num_levels=17)(images, generator=seeded())
        for unet in (net, net.to(torch.bfloat16))
    ]
    assert outs[1].loss.dtype == torch.float32
    torch.testing.assert_close(outs[1].prior, outs[0].prior, rtol=0, atol=0)
    torch.testing.assert_close(outs[1].reconstruction, outs[0].reconstruction, rtol=0, atol=0)
    torch.testing.assert_close(outs[1].total, outs[0].total, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_images_must_be_integers(objective, dtype):
    with pytest.raises(TypeError, match="images must be integers of shape"):
        objective(TinyNet(), bent_gamma())(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
def test_images_must_be_a_batch(objective):
    with pytest.raises(TypeError, match="shape"):
        objective(TinyNet(), bent_gamma())(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.tensor([[0, 17]])}, r"within \[0, 17\), got values from .* to 17"),
        ({"images": torch.tensor([[-1, 3]])}, r"within \[0, 17\), got values from -1"),
        ({"eps": torch.zeros(2, 4)}, "eps and eps_0 must have the shape of images"),
        ({"t": torch.zeros(3)}, r"t must be a tensor of shape \(2,\).*got \(3,\)"),
    ],
    ids=["too high", "too low", "eps", "t"],
)
def test_values_and_shapes_that_do_not_fit_are_refused(objective, arguments, message):
    bound = objective(TinyNet(), bent_gamma(), num_levels=17)
    with pytest.raises(ValueError, match=message):
        bound(**{"images": random_levels(2, 3, num_levels=17)} | arguments)


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "eps"}, "prediction_type"),
        ({"num_levels": 1}, r"num_levels must be an integer within \[2, 65536\]"),
    ],
    ids=["prediction type", "levels"],
)
def test_wrong_options_are_refused(objective, options, message):
    with pytest.raises(ValueError, match=message):
        objective(TinyNet(), bent_gamma(), **options)


@pytest.mark.parametrize("objective", [VariationalBound, SimpleObjective])
def test_a_scheduler_in_the_place_of_a_schedule_is_refused(objective):
    with pytest.raises(TypeError, match=r"scheduler.noise_schedule\(\)"):
        objective(TinyNet(), VDMScheduler())


@pytest.mark.parametrize("t", [1.5, -0.1, math.nan])
@pytest.mark.parametrize("num_timesteps", [None, 10])
def test_times_outside_of_the_schedule_are_refused(t, num_timesteps):
    # γ beyond its ends would give a wrong number without an error
    bound = VariationalBound(TinyNet(), FixedLinearGamma(-7.0, 4.0), num_timesteps=num_timesteps)
    with pytest.raises(ValueError, match=r"t must be within \[0, 1\]"):
        bound(random_levels(2, 3), t=torch.tensor([0.5, t]))


@pytest.mark.parametrize("num_timesteps", [0, -3, 2.5])
def test_wrong_numbers_of_steps_are_refused(num_timesteps):
    with pytest.raises(ValueError, match="num_timesteps must be a positive integer"):
        VariationalBound(TinyNet(), bent_gamma(), num_timesteps=num_timesteps)


# ---- a trained schedule and the table that a scheduler keeps of it -----------------------------------------------


@pytest.mark.parametrize("num_timesteps", [None, 250, 1000])
@pytest.mark.parametrize("learn_ends", [False, True])
def test_bound_through_the_scheduler_is_that_of_the_module(learn_ends, num_timesteps):
    schedule = bent_gamma(learn_ends, hidden_dim=64)
    if learn_ends:
        with torch.no_grad():
            schedule.bias.sub_(0.3)
            schedule.weight.add_(0.5)
    table = VDMScheduler.from_noise_schedule(schedule).noise_schedule()
    images = random_levels(64, 3)
    noise = {"t": stratified_times(64, seeded()), "eps": normal(64, 3), "eps_0": normal(64, 3, seed=1)}
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
    with fixed_weights():
        net = ToyNet()
    bound = VariationalBound(net, schedule, num_levels=9, **kwargs)
    groups = [{"params": net.parameters()}, {"params": [*schedule.parameters()], "lr": 0.02}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)
    source, held_out = seeded(1), toy_data(2000, seeded(2))
    with torch.no_grad():
        first = float(bound(held_out, generator=seeded(3)).loss)
    for _ in range(steps):
        optimizer.zero_grad()
        bound(toy_data(128, source), generator=source).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return first, float(bound(held_out, generator=seeded(3)).loss)


# bits/dim: the first value is uniform over 7, the second of two given it
TOY_ENTROPY = 0.5 * (math.log2(7) + 1)


@pytest.mark.parametrize("num_timesteps", [None, 20])
def test_training_changes_a_learned_schedule_between_its_ends(num_timesteps):
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
    images, eps = random_levels(6, 2, 3), normal(6, 2, 3)
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
        torch.zeros(100_000, 1, dtype=torch.uint8), generator=seeded(4)
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
    images, eps, t = random_levels(5, 3), normal(5, 3), torch.rand(5, generator=seeded(1), dtype=F64)
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
    SimpleObjective(net, schedule)(random_levels(4, 3), generator=seeded()).loss.backward()
    assert net.weights.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in schedule.parameters())


@pytest.mark.parametrize("output", [VariationalBoundOutput, SimpleObjectiveOutput])
def test_outputs_are_converted_by_accelerate_under_mixed_precision(output):
    """It rebuilds what the forward returns from a dict, which a BaseOutput allows only with defaults."""
    from accelerate.utils import convert_to_fp32

    names = [field.name for field in dataclasses.fields(output)]
    out = output(**{name: torch.ones(2, dtype=torch.bfloat16) for name in names})
    assert all(convert_to_fp32(out)[name].dtype == torch.float32 for name in names)
