"""Bits per dimension with every term of T steps for every image, for our models and for diffusers' checkpoints.

(vlb.py's `evaluate_bound` estimates the bound by draws of t, also in continuous time.) Two conventions:

* `"vdm"`: x = 2(k + ½)/levels − 1, p(x|z_0) = softmax over the levels, T terms of the diffusion loss [VDM §4].
* `"ddpm"`: x = 2k/(levels − 1) − 1, T − 1 terms, and the discretised Gaussian decoder at index 0 [DDPM eq. 5 and 13;
  improved-diffusion's `calc_bpd_loop`].

γ = −log SNR grows with the noise. All randomness is keyed on (seed, step, image): no answer depends on the batch size,
the order, or the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from tqdm.auto import tqdm

from . import diffusion
from .diffusion import gammas_from_betas
from .noise_schedules import to_high_precision
from .schedulers import GammaScheduler, VDMScheduler
from .vlb import keyed_generator

Convention = Literal["vdm", "ddpm"]


@dataclass
class BpdEvaluation:
    """The T-step bound of a data set with every term of every image.

    Attributes:
        bpd (`float`): mean of the bound over the images, bits/dim.
        stderr_bpd (`float`): its standard error as an estimate for the *population* that the images are drawn from, by
            their spread; NaN for a single image. Every image has noise of its own, so that they are independent.
        prior_bpd, reconstruction_bpd, diffusion_bpd (`float`): its terms.
        num_images, num_steps (`int`): N, and T, the number of terms of the chain (of network calls for each image).
        convention (`str`): `"vdm"` or `"ddpm"`, see the head of the module.
        clip_sample (`bool`): whether x̂ was clamped.
        variance_type (`str`): the variance of p(z_s|z_t).
        gammas (`torch.Tensor` of shape `(T,)`): noise level of the latent in each diffusion term, increasing.
        terms_bpd (`torch.Tensor` of shape `(N, T)`): the diffusion terms; in the DDPM convention the first is 0 and
            the decoder stands in `reconstruction`.
        per_image_bpd (`torch.Tensor` of shape `(N,)`): the bound of each image.
        mse (`torch.Tensor` of shape `(N, T)`): mean of (ε − ε̂)² over the dimensions.
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
    gammas: torch.Tensor = field(repr=False)
    terms_bpd: torch.Tensor = field(repr=False)
    per_image_bpd: torch.Tensor = field(repr=False)
    mse: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class _Chain:
    """The levels of a T-step bound: term k goes from `gammas[k]` down to `gammas[k − 1]`, the first to `gamma_0`.

    γ_0 = −inf stands for DDPM's convention, where the network itself is the decoder at the first level.
    """

    gammas: torch.Tensor
    gamma_0: torch.Tensor
    timesteps: torch.Tensor
    convention: str
    prediction_type: str
    variance_type: str
    clip_sample: bool
    num_levels: int


@torch.no_grad()
def evaluate_bpd(
    unet: nn.Module,
    scheduler: ConfigMixin,
    images: torch.Tensor,
    *,
    num_steps: int | None = None,
    convention: Convention | None = None,
    clip_sample: bool | None = None,
    num_levels: int = 256,
    class_labels: torch.Tensor | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    progress_bar: bool = True,
) -> BpdEvaluation:
    """The bound with T steps, in full: all T terms for every image, each image exactly once.

    Args:
        unet (`nn.Module`): a `VDMUNet2DModel`, a `UNet2DModel`; called as `unet(z_t, timestep, return_dict=False)[0]`.
        scheduler: ours, or one of diffusers with betas (linear, scaled_linear, squaredcos_cap_v2, sigmoid,
            trained_betas). Its γ are worked out in float64 from its config.
        images (integer `torch.Tensor` of shape `(N, C, H, W)`): data in [0, num_levels).
        num_steps (`int`, *optional*): T; defaults to 1000 for a [`VDMScheduler`], to all steps for betas, of which
            fewer are taken evenly.
        convention (`"vdm"` or `"ddpm"`, *optional*): defaults to `"vdm"` for our schedulers and to `"ddpm"` for those
            of diffusers. Numbers of different conventions do not compare.
        clip_sample (`bool`, *optional*): clamp x̂ to [−1, 1]; defaults to what the scheduler does. It changes p(x).
        num_levels, class_labels, batch_size, seed, device, accelerator, progress_bar: as in `evaluate_bound`.

    Returns: [`BpdEvaluation`].
    Raises: `TypeError`, `ValueError` for images that are not integers in range, schedulers without a usable table of
        betas, sizes that differ, and where the network returns NaN, with the index of the image.
    """
    chain = _chain(scheduler, num_steps, convention, clip_sample, num_levels)
    _check_images(images, unet, num_levels)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if device is None:
        device = next((p.device for p in unet.parameters()), torch.device("cpu"))
    n, total = len(images), len(chain.gammas)
    mine = torch.arange(rank, n, world)
    # columns: prior, reconstruction, then the terms and the errors of the chain
    table = torch.zeros(n, 2 + 2 * total, dtype=torch.float64)
    modes = {module: module.training for module in unet.modules()}
    unet.eval()
    try:
        with tqdm(total=len(mine) * total, unit="call", disable=not progress_bar or rank > 0, leave=False) as bar:
            seen = 0.0
            for index in mine.split(batch_size):
                labels = None if class_labels is None else class_labels[index].to(device)
                table[index] = _evaluate_chain(
                    unet, chain, images[index].to(device), labels, index.tolist(), seed, bar
                )
                bad = (~table[index].isfinite()).any(1).nonzero()
                if len(bad):
                    i = int(index[bad[0, 0]])
                    raise ValueError(f"the bound of image {i} is not finite: the network returned NaN or infinity.")
                seen += float(table[index, : 2 + total].sum())
                done = int((mine <= index[-1]).sum())
                bar.set_description(f"{seen / done:.4f} bits/dim")
    finally:
        for module, mode in modes.items():
            module.training = mode
    if world > 1:
        table = accelerator.reduce(to_high_precision(table.to(device)), "sum").double().cpu()
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
        gammas=chain.gammas,
        terms_bpd=terms,
        per_image_bpd=per_image,
        mse=table[:, 2 + total :],
    )


def _chain(scheduler, num_steps: int | None, convention, clip_sample: bool | None, num_levels: int) -> _Chain:
    """What a scheduler says of the chain, checked."""
    ours = isinstance(scheduler, GammaScheduler)
    convention = convention or ("vdm" if ours else "ddpm")
    if convention not in ("vdm", "ddpm"):
        raise ValueError(f"convention must be 'vdm' or 'ddpm', got {convention!r}.")
    if not 2 <= num_levels <= 65536:
        raise ValueError(f"num_levels must be within [2, 65536], got {num_levels}.")
    config = getattr(scheduler, "config", {})
    variance_type = config.get("variance_type", "fixed_small").removesuffix("_log")
    if variance_type not in ("fixed_small", "fixed_large", "learned", "learned_range"):
        raise ValueError(f"the scheduler's variance_type {variance_type!r} is unknown.")
    if isinstance(scheduler, VDMScheduler):
        if convention == "ddpm":
            raise ValueError("a VDMScheduler has no DDPM decoder; use convention='vdm'.")
        schedule, steps = scheduler.noise_schedule(), _steps(1000 if num_steps is None else num_steps)
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        gammas = schedule(t)
        timesteps = schedule.timestep(t, gammas)
    else:
        table = scheduler.noise_schedule().table() if ours else gammas_from_betas(_diffusers_betas(scheduler))
        indices = torch.arange(len(table))
        if num_steps is not None and _steps(num_steps) < len(table):
            indices = torch.linspace(0, len(table) - 1, num_steps, dtype=torch.float64).round().long()
        elif num_steps is not None and num_steps > len(table):
            raise ValueError(
                f"num_steps must be at most {len(table)}, the levels that the network knows, got {num_steps}."
            )
        gammas, timesteps = table[indices], indices
    gamma_0 = torch.tensor(-math.inf, dtype=torch.float64)
    if convention == "vdm":
        if len(gammas) < 2:
            raise ValueError(
                f"num_steps must be at least 2 for a table of betas in the vdm convention, got {num_steps}."
            )
        gamma_0, gammas, timesteps = gammas[0], gammas[1:], timesteps[1:]
    return _Chain(
        gammas=gammas,
        gamma_0=gamma_0,
        timesteps=timesteps,
        convention=convention,
        prediction_type=config.get("prediction_type", "epsilon"),
        variance_type=variance_type,
        clip_sample=bool(config.get("clip_sample", False)) if clip_sample is None else clip_sample,
        num_levels=num_levels,
    )


def _steps(num_steps: int) -> int:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}.")
    return num_steps


def _diffusers_betas(scheduler) -> torch.Tensor:
    """The betas that a scheduler of diffusers means, in float64 (its own table is float32: 1.7e-4 in γ)."""
    config = getattr(scheduler, "config", {})
    if config.get("rescale_betas_zero_snr", False):
        raise ValueError("rescale_betas_zero_snr leaves no signal at the last step: ε̂ says nothing of x there.")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    elif "beta_schedule" not in config or not hasattr(scheduler, "betas"):
        raise ValueError(
            f"{type(scheduler).__name__} has no table of betas, so no likelihood can be read off it; give the "
            "scheduler that the network was trained with."
        )
    else:
        steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
        kind = config["beta_schedule"]
        if kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":
            t = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            betas = scheduler.betas.double()
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("the scheduler's betas must be at least two numbers within (0, 1).")
    return betas


def _check_images(images: torch.Tensor, unet: nn.Module, num_levels: int) -> None:
    diffusion.check_levels(images, num_levels)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}.")
    config = getattr(unet, "config", {})
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else size
    if config.get("in_channels", images.shape[1]) != images.shape[1] or (size and tuple(size) != images.shape[2:]):
        raise ValueError(
            f"images must be of the network's size, {config.get('in_channels')} channels of {size}, got "
            f"{tuple(images.shape[1:])}."
        )


def _evaluate_chain(unet, chain: _Chain, images, labels, indices: list[int], seed: int, bar) -> torch.Tensor:
    """Prior, reconstruction, terms and errors of some images, bits/dim and mse, float64 of shape `(B, 2 + 2T)`."""
    dtype = torch.promote_types(getattr(unet, "dtype", torch.float32), torch.float32)
    if chain.convention == "vdm":
        x = diffusion.x_from_levels(images, chain.num_levels, dtype)
    else:
        x = 2 * images.to(dtype) / (chain.num_levels - 1) - 1
    dimensions, total = x[0].numel(), len(chain.gammas)

    def noise(name) -> torch.Tensor:
        draws = [torch.randn(x.shape[1:], generator=keyed_generator(seed, name, i)) for i in indices]
        return torch.stack(draws).to(x)

    def per_image(nats: torch.Tensor) -> torch.Tensor:
        return nats.double().flatten(1).sum(1).cpu() / (dimensions * math.log(2))

    out = torch.zeros(len(x), 2 + 2 * total, dtype=torch.float64)
    out[:, 0] = per_image(diffusion.prior_kl_nats(x, chain.gammas[-1]))
    if chain.convention == "vdm":
        z_0 = diffusion.q_sample(x, noise("z_0"), chain.gamma_0)
        log_prob = diffusion.decoder_log_prob_nats(images, z_0, chain.gamma_0, chain.num_levels)
        out[:, 1] = per_image(-log_prob)
    conditions = {} if labels is None else {"class_labels": labels}
    for k in range(total - 1, -1, -1):
        gamma_t = chain.gammas[k]
        gamma_s = chain.gammas[k - 1] if k > 0 else chain.gamma_0
        eps = noise(k)
        z_t = diffusion.q_sample(x, eps, gamma_t)
        timestep = chain.timesteps[k].to(x.device)
        timestep = timestep if timestep.dtype == torch.long else timestep.to(x.dtype)
        output = unet(z_t, timestep, return_dict=False, **conditions)[0].to(x.dtype)
        value = None
        if chain.variance_type.startswith("learned"):
            output, value = output.split(x.shape[1], dim=1)
        if output.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for images of {tuple(x.shape)}; set the "
                "scheduler's variance_type where it predicts variances, too."
            )
        x_hat, eps_hat = diffusion.predicted_x_and_eps(output, z_t, gamma_t, chain.prediction_type)
        if chain.clip_sample:
            x_hat = x_hat.clamp(-1, 1)
            error = diffusion.expand_like(diffusion.snr(gamma_t), x) * (x - x_hat).square()
        else:  # not through x̂, which would cost digits where there is little noise
            error = (eps - eps_hat).square()
        if k == 0 and chain.convention == "ddpm":
            log_std = 0.5 * _log_variance(chain, k, value, x)
            out[:, 1] = per_image(-discretized_gaussian_log_prob_nats(x, x_hat, log_std, chain.num_levels))
        else:
            nats = diffusion.expand_like(diffusion.step_weight(gamma_s, gamma_t), x) * error
            if chain.variance_type != "fixed_small":
                # KL of two Gaussians of unlike variance; r = q's over p's
                r = torch.exp(_posterior_log_variance(chain, k) - _log_variance(chain, k, value, x).double()).to(
                    x.dtype
                )
                nats = r * nats + 0.5 * (r - 1 - torch.log(r))
            out[:, 2 + k] = per_image(nats)
        out[:, 2 + total + k] = error.double().flatten(1).mean(1).cpu()
        bar.update(len(x))
    return out


def _posterior_log_variance(chain: _Chain, k: int) -> torch.Tensor:
    """log Var q(z_s | z_t, x) of term k = log σ_s² c; that of term 1 at the first level, where it would be −inf."""
    k = max(k, 1)
    gamma_s, gamma_t = chain.gammas[k - 1] if chain.convention == "ddpm" or k > 1 else chain.gamma_0, chain.gammas[k]
    return torch.nn.functional.logsigmoid(gamma_s) + torch.log(-torch.expm1(gamma_s - gamma_t))


def _log_variance(chain: _Chain, k: int, value: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """log Var p(z_s | z_t), as the checkpoint has it: fixed, or by interpolation [Nichol & Dhariwal 2021, eq. 15]."""
    small = _posterior_log_variance(chain, k)
    if chain.variance_type == "fixed_small":
        return diffusion.expand_like(small, x)
    if chain.variance_type == "learned":
        return torch.log(value)
    gamma_s = chain.gammas[k - 1] if k > 0 else chain.gamma_0
    ratio = diffusion.log_alpha_squared(chain.gammas[k]) - diffusion.log_alpha_squared(gamma_s)
    large = torch.log(-torch.expm1(ratio))  # β
    if chain.variance_type == "fixed_large":
        return diffusion.expand_like(large if k > 0 else small, x)
    share = (value + 1) / 2
    return share * diffusion.expand_like(large, x) + (1 - share) * diffusion.expand_like(small, x)


def discretized_gaussian_log_prob_nats(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, num_levels: int = 256
) -> torch.Tensor:
    """log of the mass that N(mean, std²) has in the bin of each level; the outer bins reach to infinity [DDPM eq. 13].

    With Φ by the tanh approximation and the floor of 1e-12 that the public code of DDPM has, so that its numbers are
    reproduced.

    Args:
        x (`torch.Tensor` of shape `(B, ...)`): data 2k/(num_levels − 1) − 1.
        mean, log_std (`torch.Tensor`, broadcastable to `x`): of the Gaussian.
        num_levels (`int`, defaults to 256): number of levels.

    Returns: `torch.Tensor` of the shape of `x`, nats.
    """

    def phi(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    half_bin, centred, scale = 1 / (num_levels - 1), x - mean, torch.exp(-log_std)
    above, below = phi(scale * (centred + half_bin)), phi(scale * (centred - half_bin))
    mass = torch.where(x < -1 + half_bin, above, torch.where(x > 1 - half_bin, 1 - below, above - below))
    return torch.log(mass.clamp(min=1e-12))
