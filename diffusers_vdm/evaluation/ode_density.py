"""Bits per dimension of a data set from the density of the probability-flow ODE (ode.py)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import denoiser
from ..conditions import check_conditions, rows_of_conditions
from ..denoiser import working_dtype
from ..diffusion import PredictionType
from ..noise_schedules import NoiseSchedule
from ..ode import Divergence, SampleError, eps_model, log_prob_nats
from ..randomness import keyed_generator
from .dequantization import Dequantization, cross_fitted_bpd, dequantization_start, dequantize, importance_weighted_bpd
from .rows import (
    Rows,
    batches,
    check_images,
    check_rows_finite,
    device_of,
    evaluating,
    identity_of,
    progress_text,
)


@dataclass
class OdeEvaluation:
    """A bound on −log₂ P(x) of a data set from the density of the probability-flow ODE.

    Attributes:
        bpd (`float`): mean over images and repeats, bits/dim.
        stderr_bpd (`float`): its standard error as an estimate for the *population* that the images are drawn from,
            computed from the spread over images; NaN for a single image.
        draws_stderr_bpd (`float`): its standard error as an estimate for *these* images, computed from the spread over
            repeats (dequantization, probes); NaN for a single repeat.
        num_images, num_samples, num_importance_samples, num_probes (`int`): N, repeats, K and P.
        dequantization, divergence (`str`): the arguments of [`evaluate_ode`].
        gamma_start, gamma_end (`float`): noise levels at which the ODE started and ended.
        rtol, atol (`float`): tolerances of the solver.
        per_image_bpd (`torch.Tensor` of shape `(N,)`): mean over the repeats of each image.
        num_calls (`torch.Tensor` of shape `(N,)`): network calls per solve, averaged over the repeats of each image.
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
    **conditions: torch.Tensor | None,
) -> OdeEvaluation:
    """A bound on −log₂ P(x) of a data set by the probability-flow ODE; each repeat uses every image exactly once.

    Args:
        unet (`nn.Module`): a `VDMUNet2DModel` or `UNet2DModel`, not wrapped in DDP.
        noise_schedule ([`NoiseSchedule`]): γ(t); for a scheduler, `noise_schedule_of(scheduler)`.
        images (integer `torch.Tensor` of shape `(N, ...)`): data in [0, num_levels).
        prediction_type, num_levels: as in `VariationalBound` and `evaluate_mc`.
        dequantization (`str`, defaults to `"truncated_normal"`): see [`dequantize`]; `"uniform"`, as in older papers,
            costs 0.13 ± 0.01 bits/dim on the digits; `"decoder"` uses z_0 and p(x|z_0) of the variational bound.
        num_samples (`int`, defaults to 1): repeats, each with its own noise.
        num_importance_samples (`int`, defaults to 1): K of the importance-weighted bound. K > 1 with `"hutchinson"`
            needs `num_probes` of 2 or more, see [`cross_fitted_bpd`]: noisy weights used directly do not give a bound.
            (On the digits, they give 0.19 bits/dim less at K = 16 with one probe.)
        divergence, num_probes, rtol, atol, max_steps: see [`log_prob_nats`]; probes are ±1.
        batch_size, seed, device, accelerator, resume_dir, progress_bar, conditions: as in `evaluate_mc`.

    A solve is exact only up to `rtol` and `atol`. Float32 rounding depends on the batch and can change the solver's
    steps: with the defaults, single images of the digits change by up to 0.006 bits/dim.

    Returns: [`OdeEvaluation`].
    Raises: `TypeError` or `ValueError` for images that are not integers in range, arguments out of range, or a
        `resume_dir` of another evaluation; `ValueError` with the index of the image if the network returns NaN.
    """
    for name, value in {
        "num_samples": num_samples,
        "num_importance_samples": num_importance_samples,
        "num_probes": num_probes,
        "batch_size": batch_size,
    }.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    fitted = divergence == "hutchinson" and num_importance_samples > 1
    if fitted and num_probes < 2:
        raise ValueError(
            "num_importance_samples above 1 needs num_probes of at least 2, or divergence='exact': weights with the "
            "noise of a single probe do not give a bound."
        )
    check_images(images, num_levels, unet)
    denoiser.check_network(unet, noise_schedule, prediction_type, num_levels)
    given = check_conditions(unet, len(images), conditions)
    gamma_start, gamma_end = dequantization_start(dequantization, noise_schedule, num_levels)
    if device is None:
        device = device_of(unet)
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
        identity = identity_of(unet, noise_schedule, images, given)
        identity |= {"method": "ODE", "seed": seed, "prediction_type": prediction_type, "num_levels": num_levels}
        identity |= {name: value for name, value in settings.items() if name != "num_samples"}
    n, dimensions = len(images), images[0].numel()
    probes_each = num_probes if fitted else 1
    columns = num_importance_samples * probes_each

    def bits_of(log_weights: torch.Tensor) -> torch.Tensor:
        """bits/dim from rows of log-weights."""
        log_weights = log_weights.T.reshape(num_importance_samples, probes_each, -1)
        if fitted:
            return cross_fitted_bpd(log_weights, dimensions)
        return importance_weighted_bpd(log_weights[:, 0], dimensions)

    rows = Rows(1 + columns, accelerator=accelerator, resume_dir=resume_dir, identity=identity)
    rows.grow(num_samples * n)
    mine = rows.mine(0, num_samples * n)

    def draws(repeat: int, index: torch.Tensor) -> torch.Tensor:
        """Columns with the network calls and the log-weights, in nats, of a batch of images."""
        levels, keys = images[index].to(device), index.tolist()
        here = rows_of_conditions(given, index, device)
        model = eps_model(unet, noise_schedule, prediction_type, **here)
        dtype = working_dtype(unet)
        probes = None
        if divergence == "hutchinson":
            signs = [_signs((num_probes, *images.shape[1:]), seed, "probe", repeat, i) for i in keys]
            probes = torch.stack(signs, 1).to(device, dtype)
        log_weights, num_calls = [], torch.zeros(len(keys), dtype=torch.float64)
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
            log_prob: Any = solution.log_prob_by_probe_nats if fitted else solution.log_prob_nats
            log_prob = log_prob if fitted else log_prob[None]
            log_weights.extend(log_prob + rest)
            num_calls = solution.num_calls.double()
        return torch.stack([num_calls, *log_weights], 1)

    hidden = not progress_bar or rows.rank > 0
    with evaluating(unet, rows), tqdm(total=len(mine), unit="img", disable=hidden, leave=False) as bar:
        for repeat, index, row in batches(mine, n, batch_size):
            try:
                rows.values[row] = check_rows_finite(draws(repeat, index), index)
            except SampleError as error:
                raise ValueError(f"image {int(index[error.sample])}: {error}") from error
            rows.keep()
            bar.update(len(row))
            so_far = bits_of(rows.values[~rows.values.isnan().any(1), 1:])
            bar.set_description(progress_text(so_far, rows.world))
        values = rows.share(0, num_samples * n).view(num_samples, n, -1)
    bits = bits_of(values[..., 1:].flatten(0, 1)).view(num_samples, n)
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
    """Random signs ±1 with equal probability, a function of the key."""
    return 2.0 * torch.randint(0, 2, shape, generator=keyed_generator(*key)) - 1
