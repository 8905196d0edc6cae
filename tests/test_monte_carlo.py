"""The Monte-Carlo evaluation of the bound: its error bars, when it stops, importance sampling, and going on.

200 runs with seeds of their own stand against the exact bound, worked out by quadrature.
"""

import functools
import math

import numpy as np
import pytest
import torch
from oracles import GaussianData, GaussianDenoiser
from scipy import stats
from torch import nn

from diffusers_vdm import FixedLinearGamma, LearnedLinearGamma, VariationalBound, evaluate_bound
from diffusers_vdm.randomness import key_to_seed, keyed_generator, keyed_noise, lattice_times
from diffusers_vdm.vlb import _importance_warp

pytestmark = pytest.mark.usefixtures("untouched_global_rng")
LN2 = math.log(2)
F64 = torch.float64
RUNS = 200
N, LEVELS = 48, 9
DATA = GaussianData(0.1, 0.3)
GAMMA_0, GAMMA_1 = -3.0, 4.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, LEVELS, shape, generator=generator(seed))


def evaluate(net, images, schedule=None, num_timesteps=None, **kwargs):
    schedule = schedule or FixedLinearGamma(GAMMA_0, GAMMA_1)
    bound = VariationalBound(net, schedule, num_levels=LEVELS, num_timesteps=num_timesteps)
    return evaluate_bound(bound, images, **{"progress_bar": False, "batch_size": 64} | kwargs)


# ---- the truth ---------------------------------------------------------------------------------------------------


def exact_bpd(images: torch.Tensor, num_timesteps: int | None = None) -> np.ndarray:
    """The bound of each image with the denoiser of `DATA`, by quadrature over t and over each pixel's noise."""
    values = (2 * np.arange(LEVELS) + 1) / LEVELS - 1
    variance = 1 / (1 + math.exp(-GAMMA_1))
    prior = 0.5 * ((1 - variance) * values**2 + variance - 1 - math.log(variance))
    noise, step = np.linspace(-9, 9, 4001, retstep=True)
    noisy = values[:, None] + math.exp(GAMMA_0 / 2) * noise  # z_0/α_0 of each level
    logits = -0.5 * math.exp(-GAMMA_0) * (noisy[..., None] - values) ** 2
    own = np.take_along_axis(logits, np.arange(LEVELS)[:, None, None], 2)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - own
    reconstruction = step * (nats * np.exp(-0.5 * noise**2)).sum(1) / math.sqrt(2 * math.pi)
    if num_timesteps is None:
        nodes, weights = np.polynomial.legendre.leggauss(96)
        gamma, weight = GAMMA_0 + (GAMMA_1 - GAMMA_0) * (nodes + 1) / 2, weights / 4 * (GAMMA_1 - GAMMA_0)
    else:
        edges = np.linspace(GAMMA_0, GAMMA_1, num_timesteps + 1)
        gamma, weight = edges[1:], 0.5 * np.expm1(np.diff(edges))
    alpha_squared = 1 / (1 + np.exp(gamma))
    total = alpha_squared * DATA.variance + 1 - alpha_squared
    # ε − ε̂ = ε α² s²/(α² s² + σ²) − σ α (x − m)/(α² s² + σ²)
    of_noise = alpha_squared * DATA.variance / total
    of_data = np.sqrt(alpha_squared * (1 - alpha_squared)) * (values[:, None] - DATA.mean) / total
    diffusion = ((of_noise**2 + of_data**2) * weight).sum(1)
    per_level = (prior + reconstruction + diffusion) / LN2
    return per_level[images.numpy()].reshape(len(images), -1).mean(1)


IMAGES = levels(N, 2)
DENOISER = GaussianDenoiser(FixedLinearGamma(GAMMA_0, GAMMA_1), DATA.mean, DATA.variance)
TARGET = 0.09
KINDS = {
    "plain": {"num_samples": 8},
    "importance": {"num_samples": 8, "importance_sampling": True},
    "target": {"num_samples": 2, "target_stderr_bpd": TARGET},
    "discrete importance": {"num_samples": 8, "importance_sampling": True, "num_timesteps": 7},
}


@functools.cache
def runs(kind: str) -> list:
    return [evaluate(DENOISER, IMAGES, seed=seed, **KINDS[kind]) for seed in range(RUNS)]


def attributes(kind: str, *names: str) -> list[np.ndarray]:
    return [np.array([getattr(run, name) for run in runs(kind)]) for name in names]


# ---- error bars --------------------------------------------------------------------------------------------------

