"""Bits per dimension from all T terms of the bound for each image, for our models and diffusers checkpoints.

`evaluate_mc` in monte_carlo.py estimates the bound from random t instead, also in continuous time. chain.py states the
two conventions.

γ = −log SNR grows with the noise. All randomness is keyed on (seed, step, image), so results do not depend on the
batch size, the order, or the number of processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import logging
from torch import nn
from tqdm.auto import tqdm

from .. import denoiser, diffusion
from ..calibration import Calibration, Variance
from ..conditions import check_conditions, rows_of_conditions
from ..diffusers_schedulers import noise_schedule_of
from ..diffusion import high_precision_on, to_high_precision
from ..gamma_scheduler import best_timesteps_of
from ..randomness import keyed_noise
from ..step_selection import best_levels
from .chain import (
    Chain,
    Convention,
    chain_of,
    chosen_variance,
    log_variance,
    term_nats,
    with_variance,
    x_of_levels,
)
from .rows import (
    Rows,
    batches,
    check_images,
    check_rows_finite,
    device_of,
    evaluating,
    fingerprint,
    identity_of,
    progress_text,
    weights_fingerprint,
)

logger = logging.get_logger(__name__)

# number of terms copied from the device at a time, because each copy synchronizes
_TERMS_AT_ONCE = 16


@dataclass
class BpdEvaluation:
    """The T-step bound of a data set, with each term for each image.

    Attributes:
        bpd (`float`): mean of the bound over the images, bits/dim.
        stderr_bpd (`float`): its standard error as an estimate for the *population* that the images are drawn from,
            computed from the spread over images; NaN for a single image. Each image has its own noise, so images are
            independent.
        prior_bpd, reconstruction_bpd, diffusion_bpd (`float`): the terms of `bpd`.
        num_images, num_steps (`int`): N, and T, the number of terms of the chain and of network calls per image.
        convention (`str`): `"vdm"` or `"ddpm"`, see the module docstring.
        clip_sample (`bool`): whether x̂ was clamped.
        variance_type (`str`): the variance of p(z_s|z_t).
        gamma_0 (`float`): noise level at which the chain ends; −inf in the DDPM convention, where it ends at the data.
        gammas (`torch.Tensor` of shape `(T,)`): noise level of the latent in each diffusion term, increasing.
        timesteps (`list`): decreasing timesteps that reproduce this chain in `evaluate_vlb` and `set_timesteps`.
        terms_bpd (`torch.Tensor` of shape `(N, T)`): the diffusion terms; in the DDPM convention the first is 0, and
            the decoder's term is in `reconstruction_bpd`.
        per_image_bpd (`torch.Tensor` of shape `(N,)`): the bound of each image.
        mse (`torch.Tensor` of shape `(N, T)`): mean of (ε − ε̂)² over the dimensions.
        calibration ([`Calibration`], *optional*): what the variance is made of, with `variance_type="optimal"`.
    """

    bpd: float
    stderr_bpd: float
    prior_bpd: float
    reconstruction_bpd: float
    diffusion_bpd: float
    num_images: int
    num_steps: int
    convention: str
    clip_sample: bool
    variance_type: str
    gamma_0: float
    gammas: torch.Tensor = field(repr=False)
    timesteps: list[float] = field(repr=False)
    terms_bpd: torch.Tensor = field(repr=False)
    per_image_bpd: torch.Tensor = field(repr=False)
    mse: torch.Tensor = field(repr=False)
    calibration: Calibration | None = field(repr=False, default=None)


@torch.no_grad()
def evaluate_vlb(
    unet: nn.Module,
    scheduler: ConfigMixin,
    images: torch.Tensor,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | Literal["best"] | None = None,
    convention: Convention | None = None,
    clip_sample: bool | None = None,
    variance: Variance | None = None,
    calibration: Calibration | None = None,
    num_levels: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    resume_dir: str | os.PathLike | None = None,
    progress_bar: bool = True,
    **conditions: torch.Tensor | None,
) -> BpdEvaluation:
    """The T-step bound from all T terms for each image; each image is used exactly once.

    Args:
        unet (`nn.Module`): a `VDMUNet2DModel` or `UNet2DModel`, called as `unet(z_t, timestep, return_dict=False)[0]`.
        scheduler: one of ours, or a diffusers scheduler with betas (linear, scaled_linear, squaredcos_cap_v2, sigmoid,
            trained_betas). Its γ are computed in float64 from its config.
        images (integer `torch.Tensor` of shape `(N, C, H, W)`): data in [0, num_levels).
        num_steps (`int`, *optional*): T; defaults to 1000 for a [`VDMScheduler`], and to all steps for betas. With
            betas, a smaller T takes evenly spaced steps.
        timesteps (`Sequence[float]` or `"best"`, *optional*): custom decreasing timesteps instead of `num_steps`, as
            for `set_timesteps`; for example those of [`best_timesteps`]. `"best"` chooses `num_steps` of them by the
            calibration. The prior is that of the first timestep's level.
        convention (`"vdm"` or `"ddpm"`, *optional*): defaults to `"vdm"` for our schedulers and to `"ddpm"` for those
            of diffusers. Results of different conventions are not comparable.
        variance (`"posterior"` or `"optimal"`, *optional*): the variance of p(z_s|z_t), by default what the scheduler
            has; `"posterior"` is that of its `variance_type`, `"optimal"` the one with the lowest bound, by the
            calibration.
        calibration ([`Calibration`], *optional*): defaults to that of the scheduler; diffusers' schedulers have none.
        clip_sample (`bool`, *optional*): clamp x̂ to ± the scheduler's `clip_sample_range`; defaults to the
            scheduler's setting. Clamping changes p(x).
        num_levels, batch_size, seed, device, accelerator, resume_dir, progress_bar, conditions: as in
            `evaluate_mc`. An interruption loses at most the last 16 terms of the current batch.

    Returns: [`BpdEvaluation`].
    Raises: `TypeError` or `ValueError` for images that are not integers in range, schedulers without a usable table of
        betas, and mismatched sizes; `ValueError` with the index of the image if the network returns NaN.
    """
    if isinstance(timesteps, str):
        if timesteps != "best" or num_steps is None:
            raise ValueError(f"timesteps must be a decreasing list, or 'best' with num_steps, got {timesteps!r}.")
        changed = {"variance": chosen_variance(scheduler, variance), "calibration": calibration}
        changed = {name: value for name, value in changed.items() if value is not None}
        num_steps, timesteps = None, best_timesteps_of(scheduler, num_steps, **changed)
    chain = chain_of(scheduler, num_steps, timesteps, convention, clip_sample, num_levels)
    check_images(images, num_levels, unet)
    denoiser.check_network(unet, scheduler, chain.prediction_type, num_levels)
    chain = with_variance(chain, scheduler, variance, calibration, tuple(images.shape[1:]))
    _check_calibration(chain.calibration, unet, images)
    given = check_conditions(unet, len(images), conditions)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if device is None:
        device = device_of(unet)
    n, total = len(images), len(chain.gammas)
    identity = None
    if resume_dir is not None:
        identity = identity_of(unet, noise_schedule_of(scheduler), images, given)
        identity |= {"method": "all terms", "seed": seed, "chain": fingerprint([chain.gammas, chain.timesteps])}
        names = ("convention", "prediction_type", "variance_type", "clip_sample", "clip_range", "num_levels")
        identity |= {name: getattr(chain, name) for name in names}
        if chain.calibration is not None:
            identity["calibration"] = fingerprint([chain.calibration.gammas, chain.calibration.mse])
    # columns: prior, reconstruction, then the T terms and the T squared errors
    rows = Rows(2 + 2 * total, accelerator=accelerator, resume_dir=resume_dir, identity=identity)
    rows.grow(n)
    mine = rows.mine(0, n)
    hidden = not progress_bar or rows.rank > 0
    with (
        evaluating(unet, rows),
        tqdm(total=len(mine) * total, unit="call", disable=hidden, leave=False) as bar,
    ):
        for _, index, row in batches(mine, n, batch_size):
            here = rows_of_conditions(given, index, device)
            _evaluate_chain(unet, chain, images[index].to(device), here, index, seed, rows, bar)
            check_rows_finite(rows.values[row], index)
            bits = rows.values[:, : 2 + total].sum(1)
            bar.set_description(progress_text(bits[~bits.isnan()], rows.world))
        table = rows.share(0, n)
    terms, per_image = table[:, 2 : 2 + total], table[:, : 2 + total].sum(1)
    return BpdEvaluation(
        bpd=float(per_image.mean()),
        stderr_bpd=float(per_image.std() / math.sqrt(n)) if n > 1 else math.nan,
        prior_bpd=float(table[:, 0].mean()),
        reconstruction_bpd=float(table[:, 1].mean()),
        diffusion_bpd=float(terms.sum(1).mean()),
        num_images=n,
        num_steps=total,
        convention=chain.convention,
        clip_sample=chain.clip_sample,
        variance_type=chain.variance_type,
        gamma_0=float(chain.gamma_0),
        gammas=chain.gammas,
        timesteps=chain.visited.flip(0).tolist(),
        terms_bpd=terms,
        per_image_bpd=per_image,
        mse=table[:, 2 + total :],
        calibration=chain.calibration,
    )


evaluate_bpd = evaluate_vlb  # the name in earlier versions


def best_timesteps(result: BpdEvaluation, num_steps: int) -> tuple[list[float], float]:
    """The T of the timesteps visited by a chain that give the best bound, see [`best_levels`].

    Args:
        result ([`BpdEvaluation`]): a chain of many steps, measured on images other than those used for evaluation.
        num_steps (`int`): T, the number of network calls, at most that of `result`.

    Returns: decreasing timesteps for `evaluate_vlb`, `set_timesteps` and `VDMPipeline`, and the bound with them
        according to these measurements, in bits/dim.
    Raises: `ValueError` if T is out of range, or if p(z_s|z_t) does not have the posterior's variance: a term is then
        not a step weight times an error that depends only on t.
    """
    if not isinstance(result, BpdEvaluation):
        raise TypeError(f"result must be what evaluate_vlb returns, got {type(result).__name__}.")
    if result.calibration is not None and result.calibration.detail != "level":
        raise ValueError(
            f"the calibration of result must be of detail 'level', got {result.calibration.detail!r}: the errors of "
            "each pixel are not known here. scheduler.best_timesteps(T) chooses by the calibration itself."
        )
    if result.variance_type not in ("fixed_small", "optimal"):
        raise ValueError(f"variance_type must be 'fixed_small' to choose timesteps, got {result.variance_type!r}.")
    ddpm = result.convention == "ddpm"  # in this convention the last network call is the decoder
    if not isinstance(num_steps, int) or not 1 + ddpm <= num_steps <= result.num_steps:
        raise ValueError(
            f"num_steps must be an integer within [{1 + ddpm}, {result.num_steps}], the steps that were measured, got "
            f"{num_steps!r}."
        )
    gamma_0 = torch.tensor([result.gamma_0], dtype=torch.float64)
    levels = result.gammas if ddpm else torch.cat([gamma_0, result.gammas])
    variance = "optimal" if result.variance_type == "optimal" else "posterior"
    table = None if result.calibration is None else result.calibration.mse_at(levels[1:])
    mse = result.mse.mean(0)[int(ddpm) :]
    path, diffusion_bpd = best_levels(levels, mse, num_steps - int(ddpm), variance, table)
    timesteps = result.timesteps[::-1]
    # the list of a VDMScheduler lacks the timestep of γ(0), at which the chain always ends
    visited = path if len(timesteps) == len(levels) else path[1:] - 1
    bpd = result.prior_bpd + result.reconstruction_bpd + diffusion_bpd
    return [timesteps[i] for i in visited.flip(0).tolist()], bpd


def _check_calibration(calibration: Calibration | None, unet: nn.Module, images: torch.Tensor) -> None:
    """Refuses to evaluate the images of the calibration; warns about some of them, and about other weights."""
    if calibration is None:
        return
    shared = calibration.count_shared(images)
    if shared == len(images):
        raise ValueError(
            "images must not be those of the calibration, which would make the bound too small; calibrate on training "
            "images."
        )
    if shared:
        logger.warning(
            f"{shared} of the {len(images)} images were used for the calibration, which makes the bound too small."
        )
    if calibration.weights_fingerprint not in (None, weights_fingerprint(unet)):
        logger.warning("the calibration was measured with other weights: its variance is not the best one for these.")


def _evaluate_chain(unet, chain: Chain, images, conditions, index, seed: int, rows: Rows, bar) -> None:
    """Fills the rows of a batch of images: prior, reconstruction, terms and errors. Existing terms are kept."""
    row, keys = rows.values[index], index.tolist()  # with one repeat, an image's index is its row
    device, total = images.device, len(chain.gammas)
    dtype = denoiser.working_dtype(unet)
    x = x_of_levels(images, chain.convention, chain.num_levels, dtype)
    nats_per_bpd = x[0].numel() * math.log(2)
    # moved to the device once: copying a coefficient from the CPU at each step would synchronize
    on_device = {name: high_precision_on(getattr(chain, name), device) for name in ("gammas", "gamma_0")}
    if chain.log_variances is not None:
        on_device["log_variances"] = _mps_float(chain.log_variances, device).to(device)
    chain = replace(chain, **on_device, timesteps=_mps_float(chain.timesteps, device).to(device))

    def noise(name: int | str) -> torch.Tensor:
        return keyed_noise([(seed, name, i) for i in keys], x.shape[1:], x)

    def per_image(nats: torch.Tensor) -> torch.Tensor:
        return to_high_precision(nats).flatten(1).sum(1) / nats_per_bpd

    columns = {0: per_image(diffusion.prior_kl_nats(x, chain.gammas[-1]))}
    if chain.convention == "vdm":
        z_0 = diffusion.q_sample(x, noise("z_0"), chain.gamma_0)
        log_prob = diffusion.decoder_log_prob_nats(images, z_0, chain.gamma_0, chain.num_levels)
        columns[1] = per_image(-log_prob)
    for k in range(total - 1, -1, -1):
        bar.update(len(x))
        if not bool(row[:, [1, 2 + k, 2 + total + k] if k == 0 else [2 + k, 2 + total + k]].isnan().any()):
            continue
        gamma_t = chain.gammas[k]
        eps = noise(k)
        z_t = diffusion.q_sample(x, eps, gamma_t)
        timestep = chain.timesteps[k]
        timestep = timestep if timestep.dtype == torch.long else timestep.to(x.dtype)
        prediction = denoiser.predict(unet, z_t, gamma_t, timestep, chain.prediction_type, **conditions)
        values = prediction.variance_values
        denoiser.check_variance_values(chain.variance_type, values)
        x_hat = None
        if chain.clip_sample:
            x_hat = prediction.x_hat.clamp(-chain.clip_range, chain.clip_range)
            error = diffusion.expand_like(diffusion.snr(gamma_t), x) * (x - x_hat).square()
        else:  # computing it from x̂ would lose precision at low noise
            error = (eps - prediction.eps_hat).square()
        if k == 0 and chain.convention == "ddpm":
            log_std = 0.5 * log_variance(chain, k, values, x)
            mean = prediction.x_hat if x_hat is None else x_hat
            columns[1] = per_image(-discretized_gaussian_log_prob_nats(x, mean, log_std, chain.num_levels))
            columns[2] = torch.zeros_like(columns[1])
        else:
            log_var = None if chain.variance_type == "fixed_small" else log_variance(chain, k, values, x)
            nats = term_nats(chain, k, error, log_var)
            columns[2 + k] = per_image(nats)
        columns[2 + total + k] = to_high_precision(error).flatten(1).mean(1)
        if k % _TERMS_AT_ONCE == 0:
            rows.values[index[:, None], torch.tensor([list(columns)])] = (
                torch.stack([*columns.values()], 1).cpu().double()
            )
            rows.keep()
            columns = {}


def _mps_float(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.float() if device.type == "mps" and tensor.dtype == torch.float64 else tensor


def discretized_gaussian_log_prob_nats(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, num_levels: int = 256
) -> torch.Tensor:
    """Log of the mass of N(mean, std²) in the bin of each level; the outer bins extend to infinity [DDPM eq. 13].

    Φ has the tanh approximation and the floor of 1e-12 of the public DDPM code, to reproduce its numbers.

    Args:
        x (`torch.Tensor` of shape `(B, ...)`): data 2k/(num_levels − 1) − 1.
        mean, log_std (`torch.Tensor`, broadcastable to `x`): parameters of the Gaussian.
        num_levels (`int`, defaults to 256): number of levels.

    Returns: `torch.Tensor` of the shape of `x`, nats.
    """

    def phi(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    half_bin, centered, scale = 1 / (num_levels - 1), x - mean, torch.exp(-log_std)
    above, below = phi(scale * (centered + half_bin)), phi(scale * (centered - half_bin))
    mass = torch.where(x < -1 + half_bin, above, torch.where(x > 1 - half_bin, 1 - below, above - below))
    return torch.log(mass.clamp(min=1e-12))
