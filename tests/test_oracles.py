"""oracles.py: the exact answers that other tests compare with agree with each other."""

import numpy as np
import pytest
import torch

from diffusers_vdm import diffusion
from tests.oracles import GaussianData, GaussianMixture
from tests.tensors import f64, normal_from


def test_gaussian_oracle_adds_up():
    # mean bound = H(x) + KL(q(z_1) ‖ p), and the T-step sum falls to the integral from above
    for data in (GaussianData(), GaussianData(0.3, 0.04)):
        bound = data.best_reconstruction_nats(-13.3) + data.diffusion_nats(-13.3, 5.0) + data.prior_nats(5.0)
        assert bound == pytest.approx(data.entropy_nats() + data.marginal_prior_kl_nats(5.0), abs=1e-11)
        sums = [data.discrete_diffusion_nats(np.linspace(-13.3, 5, n + 1)) for n in (100, 1000, 10000)]
        assert sums[0] > sums[1] > sums[2] > data.diffusion_nats(-13.3, 5.0)
        assert sums[2] == pytest.approx(data.diffusion_nats(-13.3, 5.0), abs=5e-3)


def test_mixture_oracle_is_its_own_score(generator):
    # ε̂ = −σ ∇ log q(z_t) [Tweedie]: ties the denoiser to the density
    mixture = GaussianMixture.example()
    gamma = f64(-1.5)
    z = diffusion.q_sample(mixture.sample(20, generator), normal_from(generator, 20, 2), gamma).requires_grad_()
    score = torch.autograd.grad(mixture.log_density_nats(z, gamma).sum(), z)[0]
    torch.testing.assert_close(
        mixture.eps_hat(z.detach(), gamma), -diffusion.sigma(gamma) * score, rtol=1e-10, atol=1e-10
    )
    one = GaussianMixture(f64([1.0]), f64([[0.3]]), f64([0.04]))
    torch.testing.assert_close(one.x_hat(f64([[0.8]]), gamma), GaussianData(0.3, 0.04).x_hat(f64([[0.8]]), gamma))
    assert float(
        GaussianMixture.example(1)
        .log_density_nats(torch.linspace(-8, 8, 16001, dtype=torch.float64)[:, None], gamma)
        .exp()
        .sum()
        / 1000
    ) == pytest.approx(1, abs=1e-9)
