"""times.py: times that cover [0, 1] evenly, and more of them where the loss is large."""

import pytest
import torch

from diffusers_vdm import (
    FixedLinearGamma,
    VariationalBound,
)
from diffusers_vdm.times import UNIFORM_SHARE, ImportanceTimes, importance_warp, lattice_times, stratified_times
from tests.models import TinyNet, bent_gamma
from tests.tensors import F64, random_levels, seeded

# ---- evenly spread times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 128])
def test_stratified_times(batch_size):
    t = stratified_times(batch_size, seeded(3))
    assert t.dtype == F64 and t.shape == (batch_size,)
    assert t.min() >= 0 and t.max() < 1
    gaps = torch.diff(t.sort().values, append=t.min()[None] + 1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / batch_size), rtol=0, atol=1e-6)
    assert torch.equal(t, stratified_times(batch_size, seeded(3)))
    assert not torch.equal(t, stratified_times(batch_size, seeded(4)))


def test_each_stratified_time_is_uniform():
    source = seeded(0)
    draws = torch.stack([stratified_times(4, source) for _ in range(4000)])
    for i in (0, 3):
        counts = torch.histc(draws[:, i].float(), bins=10, min=0, max=1)
        assert float(((counts - 400) ** 2 / 400).sum()) < 30  # χ² of 9 degrees of freedom


def test_any_hundred_times_in_a_row_are_evenly_spread():
    for start in (0, 1, 37, 9_999, 10**6, 10**9):
        for shift in (0.0, 0.25, 0.9999):
            t = lattice_times(torch.arange(start, start + 100), torch.tensor(shift, dtype=F64))
            assert t.dtype == F64 and bool(((t >= 0) & (t < 1)).all())
            t, rank = t.sort().values, torch.arange(100, dtype=F64)
            discrepancy = torch.maximum((t - rank / 100).abs(), (t - (rank + 1) / 100).abs()).max()
            assert discrepancy < 0.03
            assert torch.diff(t).max() < 0.02 and torch.diff(t).min() > 0.004


# ---- importance sampling -----------------------------------------------------------------------------------------


class Alone:
    """Accelerate's `reduce` for a single process."""

    @staticmethod
    def reduce(tensor, reduction):
        return tensor


def peaked(t):
    return 0.02 + torch.exp(-(((t - 0.8) / 0.05) ** 2))


def trained_times(steps=200, batch_size=64):
    times = ImportanceTimes("cpu")
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        u = (torch.rand((), generator=generator, dtype=F64) + torch.arange(batch_size) / batch_size) % 1
        t, _ = times.warp(u)
        times.add(t, peaked(t) * (0.5 + torch.rand(batch_size, generator=generator)))
        times.step(Alone)
    return times


def test_importance_times_lower_the_variance_and_keep_the_mean():
    times = trained_times()
    u = torch.linspace(0, 1, 400_001, dtype=F64)[:-1]
    t, density = times.warp(u)
    estimates, plain = peaked(t) / density, peaked(u)
    assert float(estimates.mean()) == pytest.approx(float(plain.mean()), rel=1e-4)
    assert (1 / density).max() <= 1 / UNIFORM_SHARE + 1e-9
    # the least second moment of any density is (∫ loss)² here, where loss has no other noise
    excess = [float(e.square().mean() / plain.mean() ** 2) - 1 for e in (estimates, plain)]
    assert excess[0] < 0.2 * excess[1] and excess[1] > 3


def test_times_are_uniform_until_the_losses_are_known():
    times = ImportanceTimes("cpu", bins=8, warm_up=10)
    u = torch.rand(64, dtype=F64, generator=torch.Generator().manual_seed(1))
    for seen in (0, 64):  # eight of each part are not ten
        t, density = times.warp(u)
        torch.testing.assert_close(t, u, rtol=0, atol=1e-12)
        assert (density == 1).all(), seen
        times.add(u, peaked(u))
        times.step(Alone)
    assert not torch.allclose(times.warp(u)[0], u)


def test_losses_that_are_not_finite_and_empty_bins_are_ignored():
    times = ImportanceTimes("cpu", bins=4, warm_up=1)
    t = torch.full((50,), 0.1)
    times.add(t, torch.full((50,), 2.0))
    times.add(t, torch.full((50,), float("nan")))
    times.add(t, torch.tensor([float("inf")] + [1.0] * 49))
    times.step(Alone)
    assert times.sums[:, 0].tolist() == [200.0, 50.0] and times.sums[:, 1:].sum() == 0
    assert torch.allclose(times.warp(torch.rand(9))[1], torch.ones(9))  # parts that were not met: as the one that was
    assert torch.equal(
        importance_warp(torch.zeros(5, dtype=F64))(torch.rand(3, dtype=F64))[1], torch.ones(3, dtype=F64)
    )


@pytest.mark.parametrize("learned", [False, True])
def test_the_bound_and_its_gradients_are_the_same(learned):
    """By the lattice of u with one ε: the mean over t, and the gradients with the variance's for the inside of γ."""
    images = random_levels(1, 3, 2, 2).expand(4001, -1, -1, -1)
    eps = torch.randn(1, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(3)).expand(4001, -1, -1, -1)
    u = torch.arange(4001, dtype=F64) / 4001 + 0.5 / 4001
    results = []
    for warp in (lambda u: (u, None), trained_times().warp):
        schedule = bent_gamma() if learned else FixedLinearGamma(-8.0, 5.0)
        net = TinyNet().double()
        bound = VariationalBound(net, schedule)
        t, density = warp(u)
        out = bound(images, t=t, t_density=density, eps=eps, eps_0=eps)
        out.loss.backward()
        gradients = [p.grad for p in [*net.parameters(), *schedule.parameters()] if p.grad is not None]
        results.append((out.loss.item(), out.reconstruction[0].item(), gradients))
    (loss, reconstruction, one), (other_loss, other_reconstruction, other) = results
    assert other_loss == pytest.approx(loss, rel=1e-4) and other_reconstruction == reconstruction
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3 * float(a.abs().max()))
