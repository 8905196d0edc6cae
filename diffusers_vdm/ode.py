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
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from . import diffusion
from .dequantization import Dequantization, dequantization_start, dequantize, importance_weighted_bpd
from .diffusion import PredictionType, to_high_precision
from .noise_schedules import NoiseSchedule
from .randomness import keyed_generator
from .rows import Rows, batches, check_class_labels, check_rows_finite, identity_of

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
        num_calls (`torch.Tensor` of shape `(B,)`): network calls that each sample took.
    """

    z: torch.Tensor
    log_prob_nats: torch.Tensor | None
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
    conditions = {} if class_labels is None else {"class_labels": class_labels}
    dtype = torch.promote_types(getattr(unet, "dtype", torch.float32), torch.float32)

    def model(z: torch.Tensor, gamma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        timesteps = noise_schedule.timestep(None, gamma).to(z.device, dtype)
        chosen = {name: values[rows.to(values.device)] for name, values in conditions.items()}
        z = z.to(dtype)
        output = unet(z, timesteps, return_dict=False, **chosen)[0].to(dtype)
        if output.shape != z.shape:
            output = output.split(z.shape[1], dim=1)[0]  # the rest predicts variances
        return diffusion.predicted_x_and_eps(output, z, gamma, prediction_type)[1]

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

    def derivative(y: torch.Tensor, gamma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            z_t = y[:, :-1].reshape(-1, *shape).clone().requires_grad_()
            eps_hat = model(z_t, gamma, rows)
            if probes is not None:
                v = probes[:, rows.to(probes.device)].to(eps_hat)
                trace = [_quadratic_form(eps_hat, z_t, v_p, i + 1 < len(v)) for i, v_p in enumerate(v)]
                trace = torch.stack(trace).mean(0)
            else:
                trace = _trace(eps_hat, z_t)
        half_sigma = 0.5 * diffusion.sigma(gamma).to(trace)
        slope = _velocity(y[:, :-1], eps_hat.detach().flatten(1), gamma)
        return torch.cat([slope, (half_sigma * (trace - 2 * half_sigma * dimensions))[:, None]], 1)

    y = torch.cat([to_high_precision(z).flatten(1), to_high_precision(z.new_zeros(len(z), 1))], 1)
    y, calls = _integrate(derivative, y, gamma_start, gamma_end, rtol, atol, max_steps, with_density=True)
    z_1 = y[:, :-1]
    log_normal = -0.5 * (z_1.square().sum(1) + dimensions * math.log(2 * math.pi))
    return OdeSolution(z_1.reshape(z.shape).to(z.dtype), (log_normal + y[:, -1]).cpu().double(), calls)


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
    y, calls = _integrate(derivative, y, gamma_start, gamma_end, rtol, atol, max_steps, with_density=False)
    return OdeSolution(y.reshape(z.shape).to(z.dtype), None, calls)


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
    with_density: bool,
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
            stages.append(derivative(y_k, gamma[rows] + node * h, rows))
        calls[rows] += len(_NODES) - 1
        error = h_device * sum(w * k for w, k in zip(_ERROR, stages, strict=True) if w)
        size = _error_size(error, y_0, y_k, rtol, atol, with_density).cpu().double()
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


def _error_size(error, y_0, y_1, rtol: float, atol: float, with_density: bool) -> torch.Tensor:
    """Largest error of each row in units of what is allowed."""
    count = error.shape[1] - with_density
    scale = atol + rtol * torch.maximum(y_0.abs(), y_1.abs())
    size = (error / scale)[:, :count].square().mean(1).sqrt()
    if with_density:
        size = torch.maximum(size, error[:, -1].abs() / (atol * count))
    return size


# ---- over a data set ---------------------------------------------------------------------------------------------


@dataclass
class OdeEvaluation:
    """A bound on −log₂ P(x) of a data set by the ODE's density.

    Attributes:
        bpd (`float`): mean over images and repeats, bits/dim.
        stderr_bpd (`float`): its standard error as an estimate for the *population* that the images are drawn from, by
            their spread; NaN for a single image.
        draws_stderr_bpd (`float`): its standard error as an estimate for *these* images, by the spread of the repeats
            (dequantisation, probes); NaN for a single one.
        num_images, num_samples, num_importance_samples, num_probes (`int`): N, repeats, K and P.
        dequantization, divergence (`str`): as asked for.
        gamma_start, gamma_end (`float`): where the ODE started and ended.
        rtol, atol (`float`): of the solver.
        per_image_bpd (`torch.Tensor` of shape `(N,)`): mean over the repeats of each image.
        num_calls (`torch.Tensor` of shape `(N,)`): network calls of one solve, mean for each image.
    """

    bpd: float
    stderr_bpd: float
    draws_stderr_bpd: float
    num_images: int
    num_samples: int
    num_importance_samples: int
    num_probes: int
    dequantization: str
    divergence: str
    gamma_start: float
    gamma_end: float
    rtol: float
    atol: float
    per_image_bpd: torch.Tensor = field(repr=False)
    num_calls: torch.Tensor = field(repr=False)


def evaluate_ode(
    unet: nn.Module,
    noise_schedule: NoiseSchedule,
    images: torch.Tensor,
    *,
    prediction_type: PredictionType = "epsilon",
    num_levels: int = 256,
    class_labels: torch.Tensor | None = None,
    dequantization: Dequantization = "truncated_normal",
    num_samples: int = 1,
    num_importance_samples: int = 1,
    divergence: Divergence = "hutchinson",
    num_probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    resume_dir: str | os.PathLike | None = None,
    progress_bar: bool = True,
) -> OdeEvaluation:
    """−log₂ P(x) of a data set by the probability-flow ODE, every image once a repeat, none dropped.

    Args:
        unet (`nn.Module`): a `VDMUNet2DModel`, a `UNet2DModel`; without DDP.
        noise_schedule ([`NoiseSchedule`]): γ(t), of a scheduler `noise_schedule_of(scheduler)`.
        images (integer `torch.Tensor` of shape `(N, ...)`): data in [0, num_levels).
        prediction_type, num_levels, class_labels: as in `VariationalBound` and `evaluate_bound`.
        dequantization (`str`, defaults to `"truncated_normal"`): see [`dequantize`]; `"uniform"`, as in older papers,
            costs about 0.03 bits/dim; `"decoder"` is the z_0 and the p(x|z_0) of the variational bound.
        num_samples (`int`, defaults to 1): repeats, each with noise of its own.
        num_importance_samples (`int`, defaults to 1): K of the importance-weighted bound. The K draws share probes;
            with `"hutchinson"` what noise is left in their differences makes the bound look better than it is.
        divergence, num_probes, rtol, atol, max_steps: see [`log_prob_nats`]; probes are ±1.
        batch_size, seed, device, accelerator, resume_dir, progress_bar: as in `evaluate_bound`.

    Returns: [`OdeEvaluation`].
    Raises: `TypeError`, `ValueError` for images that are not integers in range, arguments out of range, a `resume_dir`
        of another evaluation, and where the network returns NaN, with the index of the image.
    """
    for name, value in {
        "num_samples": num_samples,
        "num_importance_samples": num_importance_samples,
        "num_probes": num_probes,
        "batch_size": batch_size,
    }.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    diffusion.check_levels(images, num_levels)
    check_class_labels(class_labels, images)
    gamma_start, gamma_end = dequantization_start(dequantization, noise_schedule, num_levels)
    if device is None:
        device = next((p.device for p in unet.parameters()), torch.device("cpu"))
    settings = {
        "num_samples": num_samples,
        "num_importance_samples": num_importance_samples,
        "num_probes": num_probes if divergence == "hutchinson" else 0,
        "dequantization": dequantization,
        "divergence": divergence,
        "gamma_start": gamma_start,
        "gamma_end": gamma_end,
        "rtol": rtol,
        "atol": atol,
    }
    identity = None
    if resume_dir is not None:
        identity = identity_of(unet, noise_schedule, images, class_labels)
        identity |= {"method": "ODE", "seed": seed, "prediction_type": prediction_type, "num_levels": num_levels}
        identity |= {name: value for name, value in settings.items() if name != "num_samples"}
    n, dimensions = len(images), images[0].numel()
    rows = Rows(1 + num_importance_samples, accelerator=accelerator, resume_dir=resume_dir, identity=identity)
    rows.grow(num_samples * n)
    mine = rows.mine(0, num_samples * n)
    modes = {module: module.training for module in unet.modules()}
    unet.eval()

    def draws(repeat: int, index: torch.Tensor) -> torch.Tensor:
        """Calls, and K log-weights in nats, of some images."""
        levels, keys = images[index].to(device), index.tolist()
        labels = None if class_labels is None else class_labels[index].to(device)
        model = eps_model(unet, noise_schedule, prediction_type, labels)
        dtype = torch.promote_types(getattr(unet, "dtype", torch.float32), torch.float32)
        probes = None
        if divergence == "hutchinson":
            signs = [_signs((num_probes, *images.shape[1:]), seed, "probe", repeat, i) for i in keys]
            probes = torch.stack(signs, 1).to(device, dtype)
        columns = []
        for k in range(num_importance_samples):
            noise = [
                torch.rand(images.shape[1:], generator=keyed_generator(seed, "z", repeat, k, i), dtype=torch.float64)
                for i in keys
            ]
            z, rest = dequantize(dequantization, levels, torch.stack(noise), gamma_start, num_levels, dtype)
            solution = log_prob_nats(
                model, z, gamma_start, gamma_end, divergence=divergence, probes=probes, rtol=rtol, atol=atol,
                max_steps=max_steps,
            )  # fmt: skip
            columns.append(solution.log_prob_nats + rest)
        return torch.stack([solution.num_calls.double(), *columns], 1)

    try:
        with tqdm(total=len(mine), unit="img", disable=not progress_bar or rows.rank > 0, leave=False) as bar:
            for repeat, index, row in batches(mine, n, batch_size):
                try:
                    rows.values[row] = check_rows_finite(draws(repeat, index), index)
                except SampleError as error:
                    raise ValueError(f"image {int(index[error.sample])}: {error}") from error
                rows.keep()
                bar.update(len(row))
                done = rows.values[~rows.values.isnan().any(1), 1:]
                bits = importance_weighted_bpd(done.T, dimensions)
                error = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else math.nan
                bar.set_description(f"{float(bits.mean()):.4f} ± {error:.4f} bits/dim")
        values = rows.share(0, num_samples * n).view(num_samples, n, -1)
    finally:
        rows.keep(now=True)
        for module, mode in modes.items():
            module.training = mode
    bits = importance_weighted_bpd(values[..., 1:].movedim(-1, 0), dimensions)
    per_image, draws_stderr = bits.mean(0), math.nan
    if num_samples > 1:
        draws_stderr = float(bits.std(0).square().mean() / (num_samples * n)) ** 0.5
    return OdeEvaluation(
        bpd=float(per_image.mean()),
        stderr_bpd=float(per_image.std() / math.sqrt(n)) if n > 1 else math.nan,
        draws_stderr_bpd=draws_stderr,
        num_images=n,
        per_image_bpd=per_image,
        num_calls=values[..., 0].mean(0),
        **settings,
    )


def _signs(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """±1 with even chances, a function of the key."""
    return 2.0 * torch.randint(0, 2, shape, generator=keyed_generator(*key)) - 1
