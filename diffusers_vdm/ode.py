"""The probability-flow ODE in γ: exact log-densities and samples of a model.

    dz/dγ = ½ σ (ε̂(z, γ) − σ z)                                        [Song et al. 2021, eq. 13, with γ = −log SNR]
    log p(z at γ_0) = log N(z at γ_1; 0, I) + ∫ tr(∂(dz/dγ)/∂z) dγ     from γ_0 to γ_1 [ibid. eq. 39]

Every sample has its own γ and step size, so its result does not depend on the rest of the batch, and processes do not
wait for each other. (torchode also has steps per sample, but it keeps evaluating finished samples and needs the
retired torchtyping.) γ and log-densities are float64; the network uses its own dtype.

For integer data, see dequantization.py. Paper: Song et al. 2021 (arXiv 2011.13456).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from . import denoiser, diffusion
from .conditions import rows_of_conditions
from .diffusion import PredictionType, high_precision_on, to_high_precision
from .noise_schedules import NoiseSchedule

# (z of shape (b, ...), γ of shape (b,), indices of these samples in the batch, shape (b,)) → ε̂
EpsModel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Divergence = Literal["hutchinson", "exact"]

# Dormand & Prince 1980: nodes, stages, and the difference of the two orders; the last stage starts the next step
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class SampleError(ValueError):
    """An error with one sample of a batch; `sample` is its index."""

    def __init__(self, message: str, sample: int):
        super().__init__(message)
        self.sample = sample


@dataclass
class OdeSolution:
    """The solution of the ODE.

    Attributes:
        z (`torch.Tensor` of shape `(B, ...)`): the latents at the end of the solve.
        log_prob_nats (`torch.Tensor` of shape `(B,)` or `None`): log-density of the input, float64 on the CPU.
        log_prob_by_probe_nats (`torch.Tensor` of shape `(P, B)` or `None`): the log-density estimate of each probe.
        num_calls (`torch.Tensor` of shape `(B,)`): number of network calls for each sample.
    """

    z: torch.Tensor
    log_prob_nats: torch.Tensor | None
    log_prob_by_probe_nats: torch.Tensor | None
    num_calls: torch.Tensor


def eps_model(
    unet: nn.Module,
    noise_schedule: NoiseSchedule,
    prediction_type: PredictionType = "epsilon",
    **conditions: torch.Tensor | None,
) -> EpsModel:
    """ε̂ of a network as a function of z, γ and the indices of the samples in the batch, in float32 or better.

    `conditions`, see conditions.py, are those of the whole batch.
    """
    diffusion.check_prediction_type(prediction_type)
    dtype = denoiser.working_dtype(unet)

    def model(z: torch.Tensor, gamma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        timesteps = noise_schedule.timestep(None, gamma).to(z.device, dtype)
        here = rows_of_conditions(conditions, rows)
        return denoiser.predict(unet, z.to(dtype), gamma, timesteps, prediction_type, **here).eps_hat

    return model


@torch.no_grad()
def log_prob_nats(
    model: EpsModel,
    z: torch.Tensor,
    gamma_start: float,
    gamma_end: float,
    *,
    divergence: Divergence = "hutchinson",
    probes: torch.Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 2000,
) -> OdeSolution:
    """log p(z) of latents at the level `gamma_start`, from the ODE up to `gamma_end`, where p is N(0, I).

    Args:
        model (`Callable`): ε̂, see [`eps_model`].
        z (`torch.Tensor` of shape `(B, ...)`): latents.
        gamma_start, gamma_end (`float`): γ_0 < γ_1.
        divergence (`"hutchinson"` or `"exact"`): vᵀ (∂ε̂/∂z) v with noise v that is fixed for the whole solve, an
            unbiased estimate [Hutchinson 1989]; or the exact trace, which takes one backward pass per dimension.
        probes (`torch.Tensor` of shape `(P, B, ...)`, *optional*): the v, such as ±1; the result is the mean over P.
        rtol, atol (`float`, default to 1e-5): tolerances of a step. They bound the root mean square error over the
            dimensions of z; atol also bounds the error of the log-density in nats per dimension.
        max_steps (`int`, defaults to 2000): maximum number of steps of a sample, including rejected ones.

    Returns: [`OdeSolution`].
    Raises: [`SampleError`], a `ValueError` with the index of the sample, if the network returns NaN or `max_steps` is
        not enough.
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {get_args(Divergence)}, got {divergence!r}.")
    if (probes is None) != (divergence == "exact"):
        raise ValueError("probes must be given for divergence='hutchinson' and left out for divergence='exact'.")
    if probes is not None and probes.shape[1:] != z.shape:
        raise ValueError(f"probes must have shape (P, {', '.join(map(str, z.shape))}), got {tuple(probes.shape)}.")
    if not gamma_start < gamma_end:
        raise ValueError(f"gamma_start must be below gamma_end, got {gamma_start} and {gamma_end}.")
    shape, dimensions = z.shape[1:], z[0].numel()
    densities = 1 if probes is None else len(probes)

    def derivative(y: torch.Tensor, gamma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            z_t = y[:, :dimensions].reshape(-1, *shape).clone().requires_grad_()
            eps_hat = model(z_t, gamma, rows)
            if probes is not None:
                v = probes[:, rows.to(probes.device)].to(eps_hat)
                trace = [_quadratic_form(eps_hat, z_t, v_p, i + 1 < len(v)) for i, v_p in enumerate(v)]
            else:
                trace = [_trace(eps_hat, z_t)]
        trace = torch.stack(trace, 1)
        half_sigma = 0.5 * diffusion.sigma(gamma).to(trace)[:, None]
        slope = _velocity(y[:, :dimensions], eps_hat.detach().flatten(1), gamma)
        return torch.cat([slope, half_sigma * (trace - 2 * half_sigma * dimensions)], 1)

    y = torch.cat([to_high_precision(z).flatten(1), to_high_precision(z.new_zeros(len(z), densities))], 1)
    y, calls = _integrate(derivative, y, gamma_start, gamma_end, rtol, atol, max_steps, densities)
    z_1 = y[:, :dimensions]
    log_normal = -0.5 * (z_1.square().sum(1) + dimensions * math.log(2 * math.pi))
    each = (log_normal[:, None] + y[:, dimensions:]).T.cpu().double()
    return OdeSolution(z_1.reshape(z.shape).to(z.dtype), each.mean(0), each, calls)


@torch.no_grad()
def solve(
    model: EpsModel,
    z: torch.Tensor,
    gamma_start: float,
    gamma_end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 2000,
) -> OdeSolution:
    """Latents at `gamma_end` from latents at `gamma_start`: γ decreases from noise to data, and increases vice versa.

    Arguments, results and errors as in [`log_prob_nats`], without a log-density.
    """
    shape = z.shape[1:]

    def derivative(y: torch.Tensor, gamma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return _velocity(y, model(y.reshape(-1, *shape), gamma, rows).flatten(1), gamma)

    y = to_high_precision(z).flatten(1)
    y, calls = _integrate(derivative, y, gamma_start, gamma_end, rtol, atol, max_steps, densities=0)
    return OdeSolution(y.reshape(z.shape).to(z.dtype), None, None, calls)


def sample(
    unet: nn.Module,
    noise_schedule: NoiseSchedule,
    z_1: torch.Tensor,
    *,
    prediction_type: PredictionType = "epsilon",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 2000,
    **conditions: torch.Tensor | None,
) -> OdeSolution:
    """z_0 from noise `z_1` along the probability-flow ODE, from γ(1) down to γ(0) of `noise_schedule`.

    `rtol`, `atol` and `max_steps` are those of [`solve`], `conditions` those of [`eps_model`].

    [`decode`] of diffusion.py turns z_0 into images.
    """
    gamma_0, gamma_1 = (float(end) for end in noise_schedule.ends())
    model = eps_model(unet, noise_schedule, prediction_type, **conditions)
    return solve(model, z_1, gamma_1, gamma_0, rtol=rtol, atol=atol, max_steps=max_steps)


def _velocity(z: torch.Tensor, eps_hat: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    sigma = diffusion.expand_like(diffusion.sigma(gamma), z)
    return 0.5 * sigma * (eps_hat.to(z.dtype) - sigma * z)


def _quadratic_form(eps_hat: torch.Tensor, z: torch.Tensor, v: torch.Tensor, keep_graph: bool) -> torch.Tensor:
    """vᵀ (∂ε̂/∂z) v of each sample."""
    product = torch.autograd.grad(eps_hat, z, v, retain_graph=keep_graph)[0]
    return (to_high_precision(product) * to_high_precision(v)).flatten(1).sum(1)


def _trace(eps_hat: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """tr ∂ε̂/∂z of each sample, one dimension at a time."""
    flat, total = eps_hat.flatten(1), torch.zeros((), device=eps_hat.device)
    for i in range(flat.shape[1]):
        row = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i + 1 < flat.shape[1])[0]
        total = total + to_high_precision(row.flatten(1)[:, i])
    return total


def _integrate(
    derivative: Callable, y: torch.Tensor, start: float, end: float, rtol: float, atol: float, max_steps: int,
    densities: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Dormand–Prince 5(4), where each row of `y` has its own γ and step size; finished rows are not evaluated."""
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol and atol must be positive, got {rtol} and {atol}.")
    batch, span = len(y), end - start
    y = y.clone()
    gamma = torch.full((batch,), start, dtype=torch.float64)
    step = torch.full((batch,), span / 100, dtype=torch.float64)
    calls, tries = torch.ones(batch, dtype=torch.long), 0
    slope = derivative(y, gamma, torch.arange(batch))
    rows = torch.arange(batch)
    while len(rows):
        tries += 1
        if tries > max_steps:
            raise SampleError(
                f"the ODE must reach gamma = {end:.4g} within max_steps={max_steps} steps, got to "
                f"{float(gamma[rows[0]]):.4g}; increase rtol and atol, or max_steps. (Sample {int(rows[0])}.)",
                int(rows[0]),
            )
        here = rows.to(y.device)
        left = end - gamma[rows]
        last = step[rows].abs() >= left.abs()
        h = torch.where(last, left, step[rows])
        h_device = high_precision_on(h, y.device)[:, None]
        y_k = y_0 = y[here]
        stages = [slope[here]]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            y_k = y_0 + h_device * sum(w * k for w, k in zip(weights, stages, strict=True) if w)
            # γ + (end − γ) may round to beyond the end, where γ is outside the schedule
            gamma_k = torch.where(last & (node == 1), end, gamma[rows] + node * h).clamp(
                min(start, end), max(start, end)
            )
            stages.append(derivative(y_k, gamma_k, rows))
        calls[rows] += len(_NODES) - 1
        error = h_device * sum(w * k for w, k in zip(_ERROR, stages, strict=True) if w)
        size = _error_size(error, y_0, y_k, rtol, atol, densities).cpu().double()
        bad = size.isnan().nonzero()
        if len(bad):
            i = int(rows[bad[0, 0]])
            raise SampleError(f"the network returned NaN or infinity. (Sample {i}.)", i)
        accepted = size <= 1
        done = rows[accepted]
        gamma[done] = torch.where(last, end, gamma[rows] + h)[accepted]
        y[done.to(y.device)] = y_k[accepted.to(y.device)]
        slope[done.to(y.device)] = stages[-1][accepted.to(y.device)]
        # order 5 of the error estimate
        step[rows] = h * (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 5)
        rows = rows[gamma[rows] != end]
    return y, calls


def _error_size(error, y_0, y_1, rtol: float, atol: float, densities: int) -> torch.Tensor:
    """The largest error of each row in units of the tolerance."""
    count = error.shape[1] - densities
    scale = atol + rtol * torch.maximum(y_0.abs(), y_1.abs())
    size = (error / scale)[:, :count].square().mean(1).sqrt()
    if densities:
        size = torch.maximum(size, error[:, count:].mean(1).abs() / (atol * count))
    return size
