"""The probability-flow ODE in γ: exact log-density of a model by it, and samples.

    dz/dγ = ½ σ (ε̂(z, γ) − σ z)                                        [Song et al. 2021, eq. 13, with γ = −log SNR]
    log p(z at γ_0) = log N(z at γ_1; 0, I) + ∫ tr(∂(dz/dγ)/∂z) dγ     from γ_0 to γ_1 [ibid. eq. 39]

Every sample has γ and steps of its own: its answer does not depend on what else is in the batch, and a process never
waits for another. (Of the libraries with steps per sample torchode evaluates finished ones, too, and needs the retired
torchtyping.) γ and log-densities are float64; the network works in its own type.

For data that are integers, see dequantization.py. Paper: Song et al. 2021 (arXiv 2011.13456).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from . import denoiser, diffusion
from .diffusion import PredictionType, to_high_precision
from .noise_schedules import NoiseSchedule

# (z of shape (b, ...), γ of shape (b,), which samples of the batch these are, shape (b,)) → ε̂
EpsModel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Divergence = Literal["hutchinson", "exact"]

# Dormand & Prince 1980: nodes, stages, and the difference of the two orders; the last stage is the next step's first
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
    """What went wrong with one sample of a batch: `sample` is its position."""

    def __init__(self, message: str, sample: int):
        super().__init__(message)
        self.sample = sample


@dataclass
class OdeSolution:
    """What a solve returns.

    Attributes:
        z (`torch.Tensor` of shape `(B, ...)`): the latents at the other end.
        log_prob_nats (`torch.Tensor` of shape `(B,)` or `None`): log-density of what went in, float64 on the CPU.
        log_prob_by_probe_nats (`torch.Tensor` of shape `(P, B)` or `None`): the same by each probe.
        num_calls (`torch.Tensor` of shape `(B,)`): network calls that each sample took.
    """

    z: torch.Tensor
    log_prob_nats: torch.Tensor | None
    log_prob_by_probe_nats: torch.Tensor | None
    num_calls: torch.Tensor


def eps_model(
    unet: nn.Module,
    noise_schedule: NoiseSchedule,
    prediction_type: PredictionType = "epsilon",
    class_labels: torch.Tensor | None = None,
) -> EpsModel:
    """ε̂ of a network as a function of z, γ and the samples' places in the batch, in float32 or better.

    `class_labels` are those of the whole batch.
    """
    diffusion.check_prediction_type(prediction_type)
    dtype = denoiser.working_dtype(unet)

    def model(z: torch.Tensor, gamma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        timesteps = noise_schedule.timestep(None, gamma).to(z.device, dtype)
        labels = None if class_labels is None else class_labels[rows.to(class_labels.device)]
        return denoiser.predict(unet, z.to(dtype), gamma, timesteps, prediction_type, class_labels=labels).eps_hat

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
    """log p(z) of latents at the level `gamma_start`, by the ODE up to `gamma_end`, where p is N(0, I).

    Args:
        model (`Callable`): ε̂, see [`eps_model`].
        z (`torch.Tensor` of shape `(B, ...)`): latents.
        gamma_start, gamma_end (`float`): γ_0 < γ_1.
        divergence (`"hutchinson"` or `"exact"`): vᵀ (∂ε̂/∂z) v with noise v that is fixed for the whole solve, which is
            unbiased [Hutchinson 1989]; or the trace itself, at one backward pass for each dimension.
        probes (`torch.Tensor` of shape `(P, B, ...)`, *optional*): the v, ±1 say; the mean over P is taken.
        rtol, atol (`float`, default to 1e-5): allowed error of a step, root mean square over the dimensions of z and,
            as absolute error in nats per dimension, of the log-density.
        max_steps (`int`, defaults to 2000): most steps of a sample, counting rejected ones.

    Returns: [`OdeSolution`].
    Raises: [`SampleError`], a `ValueError` with the position of the sample, where the network returns NaN or where the
        steps do not suffice.
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {get_args(Divergence)}, got {divergence!r}.")
    if (probes is None) != (divergence == "exact"):
        raise ValueError("give probes for divergence='hutchinson', and none for 'exact'.")
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
    """The latents at `gamma_end` of latents at `gamma_start`: from noise to data γ falls, from data to noise it grows.

    Arguments, returns and errors as in [`log_prob_nats`], without a log-density.
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
    class_labels: torch.Tensor | None = None,
    **tolerances: float,
) -> OdeSolution:
    """z_0 from noise `z_1` along the probability-flow ODE, over the whole of `noise_schedule`: γ(1) down to γ(0).

    `tolerances` are `rtol`, `atol` and `max_steps` of [`solve`]. [`decode`] of diffusion.py makes images of z_0.
    """
    gamma_0, gamma_1 = (float(end) for end in noise_schedule.ends())
    return solve(eps_model(unet, noise_schedule, prediction_type, class_labels), z_1, gamma_1, gamma_0, **tolerances)


def _velocity(z: torch.Tensor, eps_hat: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    sigma = diffusion.expand_like(diffusion.sigma(gamma), z)
    return 0.5 * sigma * (eps_hat.to(z.dtype) - sigma * z)


def _quadratic_form(eps_hat: torch.Tensor, z: torch.Tensor, v: torch.Tensor, keep_graph: bool) -> torch.Tensor:
    """vᵀ (∂ε̂/∂z) v of each sample."""
    product = torch.autograd.grad(eps_hat, z, v, retain_graph=keep_graph)[0]
    return (to_high_precision(product) * to_high_precision(v)).flatten(1).sum(1)


def _trace(eps_hat: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """tr ∂ε̂/∂z of each sample, one dimension after another."""
    flat, total = eps_hat.flatten(1), 0
    for i in range(flat.shape[1]):
        row = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i + 1 < flat.shape[1])[0]
        total = total + to_high_precision(row.flatten(1)[:, i])
    return total


def _integrate(
    derivative: Callable, y: torch.Tensor, start: float, end: float, rtol: float, atol: float, max_steps: int,
    densities: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Dormand–Prince 5(4), each row of `y` with γ and a step of its own; only rows that are not done are worked on."""
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
                f"the ODE is at gamma = {float(gamma[rows[0]]):.4g} after {max_steps} steps, on the way to {end:.4g}; "
                f"allow larger errors by rtol and atol, or more steps by max_steps. (Sample {int(rows[0])}.)",
                int(rows[0]),
            )
        here = rows.to(y.device)
        left = end - gamma[rows]
        last = step[rows].abs() >= left.abs()
        h = torch.where(last, left, step[rows])
        h_device = to_high_precision(h.float() if y.device.type == "mps" else h).to(y.device)[:, None]
        y_0, stages = y[here], [slope[here]]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            y_k = y_0 + h_device * sum(w * k for w, k in zip(weights, stages, strict=True) if w)
            # γ + (end − γ) may round to beyond the end, where there is no noise level
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
        # order 5 of the error estimate; a shortened last step says nothing of the next
        step[rows] = h * (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 5)
        rows = rows[gamma[rows] != end]
    return y, calls


def _error_size(error, y_0, y_1, rtol: float, atol: float, densities: int) -> torch.Tensor:
    """Largest error of each row in units of what is allowed."""
    count = error.shape[1] - densities
    scale = atol + rtol * torch.maximum(y_0.abs(), y_1.abs())
    size = (error / scale)[:, :count].square().mean(1).sqrt()
    if densities:
        size = torch.maximum(size, error[:, count:].mean(1).abs() / (atol * count))
    return size
