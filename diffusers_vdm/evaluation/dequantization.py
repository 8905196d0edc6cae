"""Dequantization: turn a density log p(z) into a bound on the probability log P(x) of integers.

log P(x) ≥ E_q(z|x) [log p(z) − log q(z|x)], with K draws log P(x) ≥ E[log (1/K) Σ p(z_k)/q(z_k|x)]
[Burda et al. 2016, arXiv 1509.00519]. The truncated normal is from Zheng et al. 2023 (arXiv 2305.03935).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from .. import diffusion
from ..noise_schedules import NoiseSchedule

Dequantization = Literal["truncated_normal", "uniform", "decoder"]


def dequantization_start(
    dequantization: Dequantization, noise_schedule: NoiseSchedule, num_levels: int
) -> tuple[float, float]:
    """The noise level at which the ODE starts for integer data, and γ(1), at which it ends.

    It starts at γ(0), but for `"uniform"` at least at the level where σ/α is 0.7 half-bins (−11.8 for 256 levels):
    below that level, the density has a narrow peak at each integer, and uniform noise falls between the peaks.
    """
    if dequantization not in get_args(Dequantization):
        raise ValueError(f"dequantization must be one of {get_args(Dequantization)}, got {dequantization!r}.")
    gamma_0, gamma_1 = (float(end.detach()) for end in noise_schedule.ends())
    if dequantization == "uniform":
        gamma_0 = max(gamma_0, -11.8 + 2 * math.log(256 / num_levels))
    return gamma_0, gamma_1


def dequantize(
    dequantization: Dequantization,
    levels: torch.Tensor,
    noise: torch.Tensor,
    gamma_0: float,
    num_levels: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws z at γ_0 from q(z | x); also returns the term to add to log p(z) for a bound on log P(x), in nats.

    * `"truncated_normal"`: z = α_0 x + σ_0 ε with ε ~ N(0, 1) truncated to keep z in the bin of x; term −log q(z|x).
    * `"uniform"`: z = α_0 (x + u), u uniform in the bin; term log(2 α_0/levels) per dimension.
    * `"decoder"`: z = α_0 x + σ_0 ε as in the variational bound; term log p(x|z) − log q(z|x).

    Args:
        dequantization (`str`): one of the above.
        levels (integer `torch.Tensor` of shape `(B, ...)`): data in [0, num_levels).
        noise (`torch.Tensor` of shape `(B, ...)`): uniform in (0, 1), the quantiles of the draws.
        gamma_0 (`float`): noise level of z.
        num_levels (`int`): number of levels.
        dtype (`torch.dtype`, defaults to float32): type of z.

    Returns: z of shape `(B, ...)` on the device of `levels`, and the term of shape `(B,)`, float64 on the CPU.
    """
    gamma = torch.tensor(gamma_0, dtype=torch.float64)
    alpha, sigma = float(diffusion.alpha(gamma)), float(diffusion.sigma(gamma))
    device, levels, noise = levels.device, levels.cpu(), noise.cpu().double()
    x = diffusion.x_from_levels(levels, num_levels, torch.float64)
    half_bin, dimensions = 1 / num_levels, x[0].numel()
    if dequantization == "uniform":
        z = alpha * (x + half_bin * (2 * noise - 1))
        rest = torch.full((len(x),), dimensions * math.log(2 * half_bin * alpha), dtype=torch.float64)
        return z.to(dtype).to(device), rest
    if dequantization == "truncated_normal":
        tau = alpha * half_bin / sigma
        mass = math.erf(tau / math.sqrt(2))
    elif dequantization == "decoder":
        tau, mass = math.inf, 1.0
    else:
        raise ValueError(f"dequantization must be one of {get_args(Dequantization)}, got {dequantization!r}.")
    # Φ(ε) is uniform in ½(1 ± mass); erfinv of the centered value keeps its precision
    eps = math.sqrt(2) * torch.erfinv((mass * (2 * noise - 1)).clamp(-1 + 1e-15, 1 - 1e-15)).clamp(-tau, tau)
    z = alpha * x + sigma * eps
    log_q = -0.5 * eps.square() - 0.5 * math.log(2 * math.pi) - math.log(sigma * mass)
    rest = -log_q.flatten(1).sum(1)
    if dequantization == "decoder":
        log_prob = diffusion.decoder_log_prob_nats(levels, z, gamma.to(z), num_levels)
        rest = rest + log_prob.flatten(1).sum(1)
    return z.to(dtype).to(device), rest


def importance_weighted_bpd(log_weights_nats: torch.Tensor, dimensions: int) -> torch.Tensor:
    """−log₂ of the mean of K weights, bits/dim: the bound with K draws [Burda et al. 2016, eq. 8].

    Args:
        log_weights_nats (`torch.Tensor` of shape `(K, ...)`): log p(z) − log q(z|x) of each draw.
        dimensions (`int`): number of dimensions of an image.
    """
    log_mean = log_weights_nats.logsumexp(0) - math.log(len(log_weights_nats))
    return -log_mean / (dimensions * math.log(2))


def cross_fitted_bpd(log_weights_nats: torch.Tensor, dimensions: int) -> torch.Tensor:
    """The bound with K draws if each log-weight has zero-mean noise, such as that of Hutchinson's estimator.

    Zero-mean noise in w raises the mean of exp(w) (Jensen), so [`importance_weighted_bpd`] of noisy weights is not a
    bound. But log (1/K) Σ exp(w_k) ≥ Σ r_k (w_k − log r_k) − log K for any distribution r over the draws (Gibbs), and
    the right side is linear in w. So one half of the probes determines r = softmax(β w′), the other half is averaged
    with r, and then the halves are swapped. The bound holds for any zero-mean noise. β, one number for all images, is
    the fraction of the spread of the draws that both halves share: for pure noise β = 0, the mean of K draws.

    Args:
        log_weights_nats (`torch.Tensor` of shape `(K, P, N)`): K draws with P ≥ 2 probes each, for N images.
        dimensions (`int`): number of dimensions of an image.

    Returns: bits/dim of shape `(N,)`.
    """
    count, probes = log_weights_nats.shape[:2]
    if probes < 2:
        raise ValueError(f"log_weights_nats must have at least 2 probes, got shape {tuple(log_weights_nats.shape)}.")
    halves = log_weights_nats[:, 0::2].mean(1), log_weights_nats[:, 1::2].mean(1)
    a, b = (half - half.mean(0) for half in halves)
    beta = (2 * (a * b).sum() / (a.square() + b.square()).sum().clamp(min=1e-300)).clamp(0, 1)
    bound = 0
    for choosing, chosen in (halves, halves[::-1]):
        log_r = (beta * choosing).log_softmax(0)
        bound = bound + 0.5 * (log_r.exp() * (chosen - log_r)).sum(0)
    return (math.log(count) - bound) / (dimensions * math.log(2))
