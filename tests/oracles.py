"""Exact answers to test against, written from the papers and from the notes on the official code, not from ours.

VDM = Kingma et al. 2021 (arXiv 2107.00630), DDPM = Ho et al. 2020 (arXiv 2006.11239). γ = −log SNR grows with t.

* `mp_…`: the formulas of the papers in mpmath, in the form in which the papers print them (products and differences of
  α², σ², ᾱ), at 60 digits: no cancellation matters there, so none of the tricks of the package is needed.
* `GaussianData`: x ~ N(m, s²) has a closed-form denoiser, and a closed form for every term of the bound.
* `GaussianMixture`: the same in any dimension for a mixture of isotropic Gaussians, with its exact log-density at
  every noise level.
* `GaussianDenoiser`, `MixtureDenoiser`: these as networks, `net(z, timesteps, return_dict=False)[0]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from torch import nn

from tests.tensors import F64

MP = mpmath.mp.clone()
MP.dps = 60


# ---- the papers, in mpmath ---------------------------------------------------------------------------------------


def mp_alpha_squared(gamma):
    """α² = 1/(1 + e^γ) [VDM §3.2]."""
    return 1 / (1 + MP.exp(MP.mpf(gamma)))


def mp_sigma_squared(gamma):
    """σ² = 1 − α², variance preserving [VDM §3.1]."""
    return 1 - mp_alpha_squared(gamma)


def mp_posterior(gamma_s, gamma_t):
    """q(z_s | z_t, x) = N(on_z_t z_t + on_x x, variance) [VDM app. A.2], by α_{t|s} and σ²_{t|s}.

    Returns `(on_z_t, on_x, variance)`.
    """
    alpha_s, alpha_t = MP.sqrt(mp_alpha_squared(gamma_s)), MP.sqrt(mp_alpha_squared(gamma_t))
    variance_s, variance_t = mp_sigma_squared(gamma_s), mp_sigma_squared(gamma_t)
    alpha_t_given_s = alpha_t / alpha_s
    variance_t_given_s = variance_t - alpha_t_given_s**2 * variance_s
    return (
        alpha_t_given_s * variance_s / variance_t,
        alpha_s * variance_t_given_s / variance_t,
        variance_t_given_s * variance_s / variance_t,
    )


def mp_step_weight(gamma_s, gamma_t):
    """KL of one step for ‖ε − ε̂‖² = 1: ½ (SNR(s) − SNR(t)) ‖x − x̂‖² [VDM eq. 13] with x − x̂ = −(σ_t/α_t)(ε − ε̂)."""
    snr_s = mp_alpha_squared(gamma_s) / mp_sigma_squared(gamma_s)
    snr_t = mp_alpha_squared(gamma_t) / mp_sigma_squared(gamma_t)
    return (snr_s - snr_t) / snr_t / 2


def mp_prior_kl(x, gamma_1):
    """KL(N(α₁ x, σ₁²) ‖ N(0, 1)) in nats."""
    variance = mp_sigma_squared(gamma_1)
    return (mp_alpha_squared(gamma_1) * MP.mpf(x) ** 2 + variance - 1 - MP.log(variance)) / 2


def mp_level_log_probs(z_0, gamma_0, num_levels):
    """log p(x_k | z_0) for all k: the normalized q(z_0 | x_k), x_k = (2k + 1)/num_levels − 1 [VDM §3.3]."""
    alpha, variance = MP.sqrt(mp_alpha_squared(gamma_0)), mp_sigma_squared(gamma_0)
    values = [MP.mpf(2 * k + 1) / num_levels - 1 for k in range(num_levels)]
    logits = [-((MP.mpf(z_0) - alpha * x) ** 2) / (2 * variance) for x in values]
    top = max(logits)
    log_normalizer = top + MP.log(MP.fsum(MP.exp(logit - top) for logit in logits))
    return [logit - log_normalizer for logit in logits]


def mp_linear_beta_gammas(num_steps, beta_start, beta_end, indices):
    """γ_i = log((1 − ᾱ_i)/ᾱ_i) with ᾱ_i = Π_{j ≤ i} (1 − β_j) and β linear [DDPM §4], at the given indices."""
    first, last = MP.mpf(beta_start), MP.mpf(beta_end)
    alpha_bar, gammas = MP.mpf(1), []
    for i in range(num_steps):
        alpha_bar *= 1 - (first + (last - first) * i / (num_steps - 1))
        gammas.append(MP.log((1 - alpha_bar) / alpha_bar) if i in indices else None)
    return [gammas[i] for i in indices]


# ---- the official sampler, in numpy ------------------------------------------------------------------------------


def official_sampling_step(z, eps_hat, gamma_s, gamma_t, noise):
    """One step of the official code: c = −expm1(γ_s − γ_t), fresh noise also on the last step. numpy float64."""
    c = -np.expm1(gamma_s - gamma_t)
    alpha_ratio = np.sqrt(_np_sigmoid(-gamma_s) / _np_sigmoid(-gamma_t))
    return alpha_ratio * (z - np.sqrt(_np_sigmoid(gamma_t)) * c * eps_hat) + np.sqrt(_np_sigmoid(gamma_s) * c) * noise


def published_wrong_scale_step(z, eps_hat, gamma_s, gamma_t, noise):
    """The same with a published mistake: the noise is scaled by 1 − α_s where it should be 1 − α_s²."""
    c = -np.expm1(gamma_s - gamma_t)
    alpha_s, alpha_t = np.sqrt(_np_sigmoid(-gamma_s)), np.sqrt(_np_sigmoid(-gamma_t))
    return alpha_s / alpha_t * (z - np.sqrt(_np_sigmoid(gamma_t)) * c * eps_hat) + np.sqrt((1 - alpha_s) * c) * noise


def _np_sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---- Gaussian data -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianData:
    """x ~ N(mean, variance) in each dimension. All terms are expectations over x and the noise, nats per dimension."""

    mean: float = 0.0
    variance: float = 0.25

    def marginal(self, gamma):
        """Mean and variance of z_t at the noise level γ (float or tensor)."""
        alpha_squared, sigma_squared = _alpha_squared(gamma), _alpha_squared(-gamma)
        return alpha_squared**0.5 * self.mean, alpha_squared * self.variance + sigma_squared

    def eps_hat(self, z, gamma):
        """E[ε | z_t] = σ (z_t − α m)/(α² s² + σ²), the best ε̂ there is."""
        mean, variance = self.marginal(gamma)
        return _alpha_squared(-gamma) ** 0.5 * (z - mean) / variance

    def x_hat(self, z, gamma):
        """E[x | z_t] = m + α s² (z_t − α m)/(α² s² + σ²)."""
        mean, variance = self.marginal(gamma)
        return self.mean + _alpha_squared(gamma) ** 0.5 * self.variance * (z - mean) / variance

    def eps_mmse(self, gamma):
        """E(ε − ε̂)² = α² s²/(α² s² + σ²)."""
        return _alpha_squared(gamma) * self.variance / self.marginal(gamma)[1]

    def entropy_nats(self) -> float:
        return 0.5 * math.log(2 * math.pi * math.e * self.variance)

    def prior_nats(self, gamma_1: float) -> float:
        """E KL(q(z_1 | x) ‖ N(0, 1))."""
        alpha_squared, sigma_squared = _alpha_squared(gamma_1), _alpha_squared(-gamma_1)
        second_moment = self.mean**2 + self.variance
        return 0.5 * (alpha_squared * second_moment + sigma_squared - 1 - math.log(sigma_squared))

    def diffusion_nats(self, gamma_0: float, gamma_1: float) -> float:
        """Continuous time: ½ ∫ E(ε − ε̂)² dγ = ½ log[(1 + s² e^{−γ_0})/(1 + s² e^{−γ_1})]."""
        s2 = self.variance
        return 0.5 * (math.log1p(s2 * math.exp(-gamma_0)) - math.log1p(s2 * math.exp(-gamma_1)))

    def discrete_diffusion_nats(self, gammas) -> float:
        """Σ over the steps of a chain of increasing γ: ½ (SNR(s)/SNR(t) − 1) E(ε − ε̂)²."""
        gammas = np.asarray(gammas, dtype=np.float64)
        mmse = np.array([self.eps_mmse(float(gamma)) for gamma in gammas[1:]])
        return float((0.5 * np.expm1(np.diff(gammas)) * mmse).sum())

    def reconstruction_nats(self, gamma_0: float) -> float:
        """E[−log N(x; z_0/α_0, σ_0²/α_0²)]: the decoder of the paper, for data that are not integers."""
        return 0.5 * (math.log(2 * math.pi * math.e) + gamma_0)

    def best_reconstruction_nats(self, gamma_0: float) -> float:
        """E[−log q(x | z_0)], the decoder that knows the data: with it the continuous-time bound is
        entropy + KL(q(z_1) ‖ N(0, 1)), exactly."""
        posterior_variance = self.variance * _alpha_squared(-gamma_0) / self.marginal(gamma_0)[1]
        return 0.5 * math.log(2 * math.pi * math.e * posterior_variance)

    def marginal_prior_kl_nats(self, gamma_1: float) -> float:
        """KL(q(z_1) ‖ N(0, 1)), of the marginal, not of each x."""
        mean, variance = self.marginal(gamma_1)
        return 0.5 * (mean**2 + variance - 1 - math.log(variance))


@dataclass(frozen=True)
class GaussianMixture:
    """Σ_k w_k N(mean_k, variance_k I) in D dimensions; float64 tensors `(K,)`, `(K, D)`, `(K,)`."""

    weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def example(cls, dimensions: int = 2) -> GaussianMixture:
        """Three unequal components within [−1, 1]; in more than two dimensions with means at random."""
        means = torch.tensor([[-0.6, 0.3], [0.5, 0.5], [0.1, -0.7]], dtype=torch.float64)[:, :dimensions]
        if dimensions > 2:
            source = torch.Generator().manual_seed(5)
            means = 1.4 * torch.rand(3, dimensions, generator=source, dtype=torch.float64) - 0.7
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        return cls(weights, means, torch.tensor([0.01, 0.04, 0.0025], dtype=torch.float64))

    def _log_joint(self, z, gamma):
        """log w_k N(z; α mean_k, α² v_k + σ²), `(N, K)`, and the variances; `gamma` a float or `(N,)`."""
        gamma = torch.as_tensor(gamma, dtype=torch.float64)[..., None]
        a2, s2 = _alpha_squared(gamma), _alpha_squared(-gamma)
        variances = a2 * self.variances + s2
        distance = (z[:, None] - a2.sqrt()[..., None] * self.means).square().sum(-1)
        log_norm = -0.5 * z.shape[1] * torch.log(2 * math.pi * variances)
        return self.weights.log() + log_norm - 0.5 * distance / variances, variances

    def log_density_nats(self, z, gamma=-math.inf):
        """log q(z_t) at the noise level γ (a float or `(N,)`), the data's own density by default; `(N,)`."""
        return self._log_joint(z, gamma)[0].logsumexp(1)

    def eps_hat(self, z, gamma):
        """E[ε | z_t], `(N, D)`: each component's closed form, weighted by its responsibility."""
        log_joint, variances = self._log_joint(z, gamma)
        gamma = torch.as_tensor(gamma, dtype=torch.float64)[..., None, None]
        a, s = _alpha_squared(gamma) ** 0.5, _alpha_squared(-gamma) ** 0.5
        each = s * (z[:, None] - a * self.means) / variances[..., None]
        return (log_joint.softmax(1)[..., None] * each).sum(1)

    def x_hat(self, z, gamma):
        """E[x | z_t], `(N, D)`."""
        gamma = torch.as_tensor(gamma, dtype=torch.float64)
        a, s = _alpha_squared(gamma)[..., None] ** 0.5, _alpha_squared(-gamma)[..., None] ** 0.5
        return (z - s * self.eps_hat(z, gamma)) / a

    def sample(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """`(num, D)` draws."""
        k = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k, None].sqrt() * noise


def _alpha_squared(gamma):
    """1/(1 + e^γ) for a float or a tensor."""
    return 1 / (1 + (torch.exp(gamma) if torch.is_tensor(gamma) else math.exp(gamma)))


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
        return (0.5 * weights * mse(gamma)).sum(1) / math.log(2)
    with torch.no_grad():
        gamma = schedule(torch.linspace(0, 1, num_timesteps + 1, dtype=F64)).numpy()
    return (0.5 * np.expm1(np.diff(gamma)) * mse(gamma[1:])).sum(1) / math.log(2)


def legendre(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre on [low, high]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return 0.5 * (high - low) * nodes + 0.5 * (high + low), 0.5 * (high - low) * weights


# ---- the same as networks ----------------------------------------------------------------------------------------


def gamma_of_timestep(noise_schedule, timesteps):
    """γ for the timesteps that the network is given: the inverse of `noise_schedule.timestep`, in float64.

    Normalized γ, or DDPM's index for a schedule of betas.
    """
    timesteps = torch.as_tensor(timesteps, dtype=torch.float64)
    if type(noise_schedule).__name__ in ("LinearBetaGamma", "BetaGamma"):
        return noise_schedule(timesteps / (len(noise_schedule.table()) - 1))
    total, low = noise_schedule.config.num_train_timesteps, noise_schedule.config.gamma_min
    high = noise_schedule.config.gamma_max
    return low + (high - low) * timesteps / total


class _ClosedFormDenoiser(nn.Module):
    """A network without parameters, in float64, that returns eps_hat, x_hat or v_hat of `data`."""

    dtype = torch.float64  # as a network of diffusers says: the bound then works in float64 as well

    def __init__(self, data, noise_schedule=None, prediction_type="epsilon", gamma_of=None):
        super().__init__()
        if (noise_schedule is None) == (gamma_of is None):
            raise ValueError("give a noise_schedule, or a function gamma_of(timesteps)")
        self.data = data
        self.prediction_type = prediction_type
        self.gamma_of: Callable = gamma_of or (lambda timesteps: gamma_of_timestep(noise_schedule, timesteps))
        self.calls = 0

    def forward(self, sample, timestep, class_labels=None, return_dict=True, **kwargs):
        self.calls += 1
        gamma = torch.as_tensor(self.gamma_of(timestep), dtype=torch.float64)
        flat = sample.double().flatten(1)
        gamma = gamma.flatten().expand(len(flat)) if gamma.numel() == 1 else gamma.flatten()
        eps_hat, x_hat = self._predict(flat, gamma)
        if self.prediction_type == "v_prediction":
            a, s = _alpha_squared(gamma)[:, None] ** 0.5, _alpha_squared(-gamma)[:, None] ** 0.5
            output = a * eps_hat - s * x_hat
        else:
            output = eps_hat if self.prediction_type == "epsilon" else x_hat
        output = output.reshape(sample.shape).to(sample.dtype)
        return {"sample": output} if return_dict else (output,)


class GaussianDenoiser(_ClosedFormDenoiser):
    """The best possible network for data that are N(mean, variance) in each dimension.

    Args:
        noise_schedule: whose `timestep` is inverted to know γ; or `gamma_of`, a function timesteps → γ.
        mean, variance (`float`): of the data.
        prediction_type (`str`): what it says.
    """

    def __init__(self, noise_schedule=None, mean=0.0, variance=0.25, prediction_type="epsilon", gamma_of=None):
        super().__init__(GaussianData(mean, variance), noise_schedule, prediction_type, gamma_of)

    def _predict(self, z, gamma):
        return self.data.eps_hat(z, gamma[:, None]), self.data.x_hat(z, gamma[:, None])


class MixtureDenoiser(_ClosedFormDenoiser):
    """The best possible network for a [`GaussianMixture`] whose D is the number of elements of one sample."""

    def __init__(self, mixture, noise_schedule=None, prediction_type="epsilon", gamma_of=None):
        super().__init__(mixture, noise_schedule, prediction_type, gamma_of)

    def _predict(self, z, gamma):
        return self.data.eps_hat(z, gamma), self.data.x_hat(z, gamma)


class LabelledGaussianDenoiser(nn.Module):
    """The best network for data N(mean, variance) in each dimension, one pair for each label; counts what it does."""

    dtype = torch.float64

    def __init__(self, means, variances, schedule, interrupt_at=None):
        super().__init__()
        self.data = GaussianData(torch.tensor(means).double(), torch.tensor(variances).double())
        self.schedule, self.interrupt_at = schedule, interrupt_at
        self.batches = []

    def forward(self, z, timestep, class_labels, return_dict=True):
        self.batches.append(len(z))
        if len(self.batches) == self.interrupt_at:
            raise KeyboardInterrupt
        low, high = self.schedule.config.gamma_min, self.schedule.config.gamma_max
        gamma = low + (high - low) * timestep.double() / self.schedule.config.num_train_timesteps
        mean, variance = (v[class_labels] for v in (self.data.mean, self.data.variance))
        each = GaussianData(*(v.reshape(-1, *[1] * (z.ndim - 1)) for v in (mean, variance)))
        return (each.eps_hat(z, gamma.reshape(-1, *[1] * (z.ndim - 1))),)


# ---- images of independent pixels, with one pmf over the 256 levels ----------------------------------------------

X_VDM, X_DDPM = 2 * (np.arange(256) + 0.5) / 256 - 1, np.arange(256) / 127.5 - 1


def pmf():
    """Two unequal bumps with holes in them, both outer levels, and nothing elsewhere: levels and probabilities."""
    k = np.arange(256)
    pi = np.exp(-(((k - 70) / 6) ** 2)) + 0.4 * np.exp(-(((k - 180) / 12) ** 2))
    pi[(pi < 0.01) | (k % 7 == 3)] = 0
    pi[[0, 255]] = 0.1, 0.3
    return np.flatnonzero(pi), pi[pi > 0] / pi.sum()


USED, PI = pmf()


X_USED, ENTROPY = X_VDM[USED], float(-(PI * np.log2(PI)).sum())


class BestNetwork(nn.Module):
    """E[x | z_t] as x̂, ε̂ or v̂, in float64; `gamma_of` says what a timestep means."""

    dtype = torch.float64

    def __init__(self, gamma_of, x_levels, prediction="epsilon"):
        super().__init__()
        self.gamma_of, self.prediction = gamma_of, prediction
        self.x, self.log_pi = torch.from_numpy(x_levels[USED]), torch.from_numpy(np.log(PI))

    def forward(self, z, timestep, return_dict=False):
        gamma = self.gamma_of(timestep).reshape(-1, 1, 1, 1)
        a, s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        logits = self.log_pi - 0.5 * ((z[..., None] - a[..., None] * self.x) / s[..., None]).square()
        x_hat = logits.softmax(-1) @ self.x
        eps_hat = (z - a * x_hat) / s
        return ({"epsilon": eps_hat, "sample": x_hat, "v_prediction": a * eps_hat - s * x_hat}[self.prediction],)


def draw_images(*shape):
    generator = torch.Generator().manual_seed(11)
    drawn = torch.multinomial(torch.from_numpy(PI), math.prod(shape), replacement=True, generator=generator)
    return torch.from_numpy(USED)[drawn].reshape(shape).to(torch.uint8)
