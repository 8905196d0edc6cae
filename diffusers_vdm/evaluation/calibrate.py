"""Measure mse_ε(γ) of a network, the table that gives the best variance and the best timesteps of few steps.

Measure it on training images, never on the images of an evaluation: the variance would be fitted to them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from tqdm.auto import tqdm

from .. import call_arguments, denoiser, diffusion
from ..calibration import Calibration, Detail, check_detail, digests_of
from ..conditions import check_conditions, rows_of_conditions
from ..diffusers_schedulers import noise_schedule_of
from ..randomness import keyed_noise
from ..schedulers import VDMScheduler
from .chain import Convention, chain_of, default_convention, x_of_levels
from .rows import check_images, device_of, evaluation_mode, fingerprint, weights_fingerprint

# significant digits of the table
_DIGITS = 6


@torch.no_grad()
def calibrate(
    unet: nn.Module,
    scheduler: ConfigMixin,
    images: torch.Tensor,
    *,
    num_gammas: int = 65,
    detail: Detail = "level",
    num_draws: int = 1,
    num_levels: int = 256,
    convention: Convention | None = None,
    clip_sample: bool | None = None,
    data: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    progress_bar: bool = True,
    **conditions: torch.Tensor | None,
) -> Calibration:
    """mse_ε(γ) = E(ε − ε̂)² at levels from γ(0) to γ(1), over some training images, see [`Calibration`].

    Args:
        unet (`nn.Module`): a `VDMUNet2DModel`, a `UNet2DModel`; called as `unet(z_t, timestep, return_dict=False)[0]`.
        scheduler: one of ours, or a diffusers scheduler with betas. Its levels are measured evenly spaced in γ, those
            of a table of betas at the nearest indices.
        images (integer `torch.Tensor` of shape `(N, C, H, W)`): **training** images in [0, num_levels).
        num_gammas (`int`, defaults to 65): levels of the table, at least 2; fewer than about 17 are too coarse to
            choose timesteps by.
        detail (`"level"`, `"channel"` or `"pixel"`, defaults to `"level"`): one error for each level, or one for each
            channel or pixel, too. Pixels need many draws: the relative error of each is √(2/(N · num_draws)).
        num_draws (`int`, defaults to 1): draws of ε for each image at every level.
        num_levels (`int`, defaults to 256): levels of the data, 2 to 65536.
        convention (`"vdm"` or `"ddpm"`, *optional*): the map from levels to x, as in `evaluate_vlb`.
        clip_sample (`bool`, *optional*): clamp x̂ to ± the scheduler's `clip_sample_range`; defaults to the
            scheduler's setting.
        data (`str`, *optional*): what the images are called, to be recorded.
        batch_size, seed, device, accelerator, progress_bar, conditions: as in `evaluate_mc`. The result
            does not depend on the batch size and the number of processes, up to rounding.

    Returns: [`Calibration`], to be given to a scheduler as `calibration`.
    Raises: `TypeError`, `ValueError` as `evaluate_vlb`.
    """
    check_detail(detail)
    check_images(images, num_levels, unet)
    given = check_conditions(unet, len(images), conditions)
    num_draws = call_arguments.positive_integer("num_draws", num_draws)
    num_gammas = call_arguments.positive_integer("num_gammas", num_gammas)
    batch_size = call_arguments.positive_integer("batch_size", batch_size)
    device = device_of(unet) if device is None else torch.device(device)
    convention = convention or default_convention(scheduler)
    chain_of(scheduler, None, None, convention, clip_sample, num_levels)  # raises for what evaluate_vlb refuses
    gammas, timesteps = _levels(scheduler, num_gammas)
    config: Any = getattr(scheduler, "config", {})
    prediction_type = config.get("prediction_type", "epsilon")
    denoiser.check_network(unet, scheduler, prediction_type, num_levels)
    clip_sample = bool(config.get("clip_sample", False)) if clip_sample is None else clip_sample
    limit = float(config.get("clip_sample_range", 1.0))
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    mine = torch.arange(rank, len(images), world)
    dtype = denoiser.working_dtype(unet)
    sums = diffusion.to_high_precision(torch.zeros(len(gammas), *images.shape[1:], device=device))
    bar = tqdm(
        total=len(mine) * len(gammas) * num_draws, desc="calibrating", unit="call", leave=False,
        disable=not progress_bar or rank > 0,
    )  # fmt: skip
    with evaluation_mode(unet), bar:
        for index in mine.split(batch_size):
            x = x_of_levels(images[index].to(device), convention, num_levels, dtype)
            here = rows_of_conditions(given, index, device)
            for k, (gamma, timestep) in enumerate(zip(gammas, timesteps, strict=True)):
                gamma_t = diffusion.high_precision_on(gamma, x.device)
                t = timestep.to(device) if timestep.dtype == torch.long else timestep.to(device, x.dtype)
                for draw in range(num_draws):
                    eps = keyed_noise([(seed, "calibration", k, draw, int(i)) for i in index], x.shape[1:], x)
                    z_t = diffusion.q_sample(x, eps, gamma_t)
                    prediction = denoiser.predict(unet, z_t, gamma_t, t, prediction_type, **here)
                    eps_hat = prediction.eps_hat
                    if clip_sample:
                        eps_hat = diffusion.eps_from_x(z_t, prediction.x_hat.clamp(-limit, limit), gamma_t)
                    sums[k] += diffusion.to_high_precision((eps - eps_hat).square()).sum(0)
                    bar.update(len(index))
    if accelerator is not None and world > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    sums = sums.cpu().double()
    if not bool(sums.isfinite().all()):
        k = int((~sums.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the network returned NaN or infinity at gamma = {float(gammas[k]):.4g}.")
    mse = sums / (len(images) * num_draws)
    whole = Calibration(
        gammas,
        mse,
        num_images=len(images),
        num_draws=num_draws,
        data=data,
        data_fingerprint=fingerprint([images]),
        weights_fingerprint=weights_fingerprint(unet),
        clip_sample=clip_sample,
        seed=seed,
        image_digests=digests_of(images),
    )
    table = whole.reduced(detail)
    # more digits would say nothing, and would make the JSON of a table of pixels twice as long
    rounded = [float(f"{value:.{_DIGITS}g}") for value in table.mse.flatten().tolist()]
    return replace(table, mse=torch.tensor(rounded, dtype=torch.float64).reshape(table.mse.shape))


def _levels(scheduler: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels evenly spaced in γ, increasing, and the network's timesteps there."""
    if count < 2:
        raise ValueError(f"num_gammas must be at least 2, got {count}.")
    schedule = noise_schedule_of(scheduler)
    gamma_0, gamma_1 = (float(end) for end in schedule.ends())
    gammas = torch.linspace(gamma_0, gamma_1, count, dtype=torch.float64)
    if isinstance(scheduler, VDMScheduler):
        return gammas, schedule.timestep(None, gammas)
    table = schedule.table()
    indices = torch.searchsorted(table, gammas).clamp(1, len(table) - 1)
    nearer_left = gammas - table[indices - 1] < table[indices] - gammas
    indices = torch.unique(indices - nearer_left.long())
    return table[indices], indices
