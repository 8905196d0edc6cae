"""The equations of the diffusion process, as pure functions of γ.

γ = −log SNR, so **γ grows with the noise**: α² = sigmoid(−γ), σ² = sigmoid(γ), SNR = α²/σ² = exp(−γ).
The rest of the package calls these functions instead of repeating the equations.

Conventions of every function:

* `gamma…` is a tensor of shape `()` or `(B,)`, float64 where the device supports it. Coefficients are computed in the
  precision of γ and only then cast to that of the data, because γ_t − γ_s of neighboring steps loses its digits in
  float32. γ = −inf is the noise-free end (α = 1, σ = 0).
* Data and latents have shape `(B, ...)`; half precision is promoted to float32.
* s < t, hence γ_s < γ_t: s is the cleaner of the two levels.

Papers: VDM = Kingma et al. 2021, "Variational Diffusion Models" (arXiv 2107.00630); DDPM = Ho et al. 2020 (arXiv
2006.11239); v = Salimans & Ho 2022 (arXiv 2202.00512).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

PredictionType = Literal["epsilon", "sample", "v_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

Generators = torch.Generator | list[torch.Generator] | None


def to_high_precision(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64 where the device supports it, else in float32 (Apple's GPUs)."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def high_precision_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` of the CPU on `device`, in the precision of [`to_high_precision`] there."""
    return tensor.to(torch.float32 if device.type == "mps" else torch.float64).to(device)


def alpha(gamma: torch.Tensor) -> torch.Tensor:
    """Scale of the data in z_t: α = √sigmoid(−γ) [VDM §3.2]. Shape of `gamma`."""
    return torch.sigmoid(-gamma).sqrt()


def sigma(gamma: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the noise in z_t: σ = √sigmoid(γ), never √(1 − α²) [VDM §3.2]. Shape of `gamma`."""
    return torch.sigmoid(gamma).sqrt()


def snr(gamma: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio α²/σ² = exp(−γ) [VDM §3.2]. Shape of `gamma`."""
    return torch.exp(-gamma)


def log_alpha_squared(gamma: torch.Tensor) -> torch.Tensor:
    """log α² = logsigmoid(−γ), which is log ᾱ in DDPM's notation. Shape of `gamma`."""
    return F.logsigmoid(-gamma)


def gamma_from_log_alpha_squared(log_alpha_squared: torch.Tensor) -> torch.Tensor:
    """γ = log((1 − ᾱ)/ᾱ) from log ᾱ ≤ 0, as log(expm1(−log ᾱ)), which stays accurate near ᾱ = 1. Same shape."""
    y = -log_alpha_squared
    # log(expm1(y)) = y + log(1 − e^{−y}): the second form does not overflow for large y
    return torch.where(y < 30, torch.log(torch.expm1(y.clamp(max=30))), y + torch.log1p(-torch.exp(-y)))


def linear_betas(
    num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = True
) -> torch.Tensor:
    """β_i linear from `beta_start` to `beta_end`, times 1000/T if `rescale` [DDPM §4]; float64, shape `(T,)`.

    Raises: `ValueError` unless T ≥ 2, 0 < β_start ≤ β_end, and all β < 1 after rescaling.
    """
    if not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps must be an integer of at least 2, got {num_train_timesteps!r}.")
    scale = 1000 / num_train_timesteps if rescale else 1.0
    if not 0 < beta_start <= beta_end or not beta_end * scale < 1:
        raise ValueError(
            f"betas must satisfy 0 < beta_start <= beta_end and beta_end < 1 after rescaling, got "
            f"beta_start={beta_start}, beta_end={beta_end} times {scale:g} for num_train_timesteps="
            f"{num_train_timesteps}; use more steps, or rescale_betas=False with your own betas."
        )
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64) * scale


def gammas_from_betas(betas: torch.Tensor) -> torch.Tensor:
    """γ_i = log((1 − ᾱ_i)/ᾱ_i), ᾱ_i = Π_{j ≤ i} (1 − β_j), summing log(1 − β) in float64. Shape of `betas`."""
    return gamma_from_log_alpha_squared(torch.log1p(-betas.double()).cumsum(0))


def gamma_of_timestep(
    timesteps: torch.Tensor, gamma_min: float, gamma_max: float, num_train_timesteps: int
) -> torch.Tensor:
    """γ of timesteps that are normalized γ: 0 is γ_min, `num_train_timesteps` is γ_max. Float64, same shape."""
    position = to_high_precision(timesteps) / num_train_timesteps
    return gamma_min * (1 - position) + gamma_max * position


def expand_like(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A coefficient of shape `()` or `(B,)` in float32 or better, with the device and number of axes of `x`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"gamma must have shape () or ({x.shape[0]},) for data of shape {tuple(x.shape)}, "
            f"got {tuple(coefficient.shape)}; give one noise level, or one for each sample."
        )
    # with the dimensions of x, because a zero-dimensional tensor would not promote a half-precision x
    return coefficient.to(device=x.device, dtype=dtype).reshape(-1, *[1] * (x.ndim - 1))


def q_sample(x: torch.Tensor, eps: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """Sample of q(z_t | x) for the given noise: z_t = α_t x + σ_t ε [VDM eq. 1; DDPM eq. 4].

    Args:
        x, eps (`torch.Tensor` of shape `(B, ...)`): data in [−1, 1] and standard normal noise.
        gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise level.
    """
    return expand_like(alpha(gamma_t), x) * x + expand_like(sigma(gamma_t), eps) * eps


def forward_step(z_s: torch.Tensor, eps: torch.Tensor, gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """A sample of q(z_t | z_s): z_t = (α_t/α_s) z_s + σ_{t|s} ε, σ_{t|s}² = 1 − α_t²/α_s² [VDM app. A.1].

    Args:
        z_s, eps (`torch.Tensor` of shape `(B, ...)`): the less noisy latents, and standard normal noise.
        gamma_s, gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise levels, γ_s < γ_t.
    """
    std = torch.exp(0.5 * forward_log_variance(gamma_s, gamma_t))
    return expand_like(_alpha_ratio(gamma_t, gamma_s), z_s) * z_s + expand_like(std, z_s) * eps


def velocity(x: torch.Tensor, eps: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """The target of v-prediction: v = α_t ε − σ_t x [Salimans & Ho 2022, §4]. Shape of `x`."""
    return expand_like(alpha(gamma_t), eps) * eps - expand_like(sigma(gamma_t), x) * x


def x_from_eps(z_t: torch.Tensor, eps: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """x = (z_t − σ_t ε)/α_t [VDM §3.4]. Shape of `z_t`."""
    return (z_t - expand_like(sigma(gamma_t), eps) * eps) / expand_like(alpha(gamma_t), z_t)


def eps_from_x(z_t: torch.Tensor, x: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """ε = (z_t − α_t x)/σ_t, the inverse of [`x_from_eps`]. Shape of `z_t`."""
    return (z_t - expand_like(alpha(gamma_t), x) * x) / expand_like(sigma(gamma_t), z_t)


def predicted_x_and_eps(
    model_output: torch.Tensor, z_t: torch.Tensor, gamma_t: torch.Tensor, prediction_type: PredictionType
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ and ε̂ from the network's output, in any parameterization.

    epsilon: the output is ε̂; sample: it is x̂; v_prediction: x̂ = α z_t − σ v̂ and ε̂ = σ z_t + α v̂.

    Args:
        model_output, z_t (`torch.Tensor` of shape `(B, ...)`): the network's output and input.
        gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise level of `z_t`.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`): what `model_output` is.

    Returns: `(x_hat, eps_hat)`, each of the shape of `z_t`.
    Raises: `ValueError` for another `prediction_type`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return x_from_eps(z_t, model_output, gamma_t), model_output
    if prediction_type == "sample":
        return model_output, eps_from_x(z_t, model_output, gamma_t)
    a, s = expand_like(alpha(gamma_t), z_t), expand_like(sigma(gamma_t), z_t)
    return a * z_t - s * model_output, s * z_t + a * model_output


def posterior(
    z_t: torch.Tensor, x: torch.Tensor, gamma_s: torch.Tensor, gamma_t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of q(z_s | z_t, x) [VDM app. A.2; DDPM eq. 7].

    mean = (α_s/α_t) e^{γ_s − γ_t} z_t + α_s c x,  std = σ_s √c,  c = −expm1(γ_s − γ_t)

    Args:
        z_t, x (`torch.Tensor` of shape `(B, ...)`): the noisier latent, and the data.
        gamma_s, gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise levels, γ_s < γ_t.

    Returns: `(mean, std)`, of shape `(B, ...)` and broadcastable to it.
    Raises: `ValueError` if any γ_s ≥ γ_t.
    """
    check_order(gamma_s, gamma_t)
    c = -torch.expm1(gamma_s - gamma_t)
    on_z_t = _alpha_ratio(gamma_s, gamma_t) * torch.exp(gamma_s - gamma_t)
    mean = expand_like(on_z_t, z_t) * z_t + expand_like(alpha(gamma_s) * c, x) * x
    return mean, expand_like(sigma(gamma_s) * c.sqrt(), z_t)


def ancestral_step(
    z_t: torch.Tensor, eps_hat: torch.Tensor, gamma_s: torch.Tensor, gamma_t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of p(z_s | z_t), one ancestral step from γ_t down to γ_s [VDM app. A.4, eq. 34].

    mean = (α_s/α_t)(z_t − c σ_t ε̂),  std = σ_s √c,  c = −expm1(γ_s − γ_t)

    Equal to [`posterior`] at x̂ = (z_t − σ_t ε̂)/α_t. Add **standard normal** noise times std to the mean.

    Args:
        z_t, eps_hat (`torch.Tensor` of shape `(B, ...)`): latent at the noisier level and its predicted noise.
        gamma_s, gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise levels, γ_s < γ_t.

    Returns: `(mean, std)`, of shape `(B, ...)` and broadcastable to it.
    Raises: `ValueError` if any γ_s ≥ γ_t.
    """
    check_order(gamma_s, gamma_t)
    c = -torch.expm1(gamma_s - gamma_t)
    mean = expand_like(_alpha_ratio(gamma_s, gamma_t), z_t) * (z_t - expand_like(c * sigma(gamma_t), z_t) * eps_hat)
    return mean, expand_like(sigma(gamma_s) * c.sqrt(), z_t)


def ddim_step(z_t: torch.Tensor, eps_hat: torch.Tensor, gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """z_s = α_s x̂ + σ_s ε̂ = (α_s/α_t)(z_t + expm1((γ_s − γ_t)/2) σ_t ε̂) [Song et al. 2021, DDIM with η = 0].

    The first-order step of the probability-flow ODE, exact for a constant ε̂. Shapes and errors as [`ancestral_step`].
    """
    check_order(gamma_s, gamma_t)
    on_eps = torch.expm1(0.5 * (gamma_s - gamma_t)) * sigma(gamma_t)
    return expand_like(_alpha_ratio(gamma_s, gamma_t), z_t) * (z_t + expand_like(on_eps, z_t) * eps_hat)


def posterior_log_variance(gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """log Var q(z_s | z_t, x) = log σ_s² c, c = −expm1(γ_s − γ_t), log β̃ in DDPM's notation [DDPM eq. 7].

    −inf at γ_s = −inf. Shape of `gamma_s` and `gamma_t`.
    """
    return F.logsigmoid(gamma_s) + torch.log(-torch.expm1(gamma_s - gamma_t))


def forward_log_variance(gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """log Var q(z_t | z_s) = log(1 − α_t²/α_s²), log β in DDPM's notation [VDM app. A.1]. Shape of `gamma_s`."""
    return torch.log(-torch.expm1(log_alpha_squared(gamma_t) - log_alpha_squared(gamma_s)))


def optimal_log_variance(gamma_s: torch.Tensor, gamma_t: torch.Tensor, mse: torch.Tensor) -> torch.Tensor:
    """log of the variance of p(z_s | z_t) with the best bound: σ_Q² (1 + m), m = expm1(γ_t − γ_s) mse.

    σ_Q² is the variance of q(z_s | z_t, x), see [`posterior_log_variance`], and mse = E(ε − ε̂)² at γ_t [Bao et al.
    2022, arXiv 2201.06503, theorem 1]. At γ_s = −inf it is the variance of x given z_t, mse/SNR(t).

    Args:
        gamma_s, gamma_t (`torch.Tensor` of shape `()`): levels, γ_s < γ_t.
        mse (`torch.Tensor`): errors of any shape, at least 0.

    Returns: `torch.Tensor` of the shape of `mse`.
    """
    if bool(gamma_s == -math.inf):
        return gamma_t + torch.log(mse)
    return posterior_log_variance(gamma_s, gamma_t) + torch.log1p(torch.expm1(gamma_t - gamma_s) * mse)


def dpm_solver_2m_correction(
    x_hat: torch.Tensor,
    last_x_hat: torch.Tensor,
    gamma_s: torch.Tensor,
    gamma_t: torch.Tensor,
    last_gamma: torch.Tensor,
) -> torch.Tensor:
    """The term DPM-Solver++ 2M adds to [`ddim_step`]: −α_s expm1(−h) (x̂ − x̂_last)/(2r) [Lu et al. 2022, alg. 2].

    h = (γ_t − γ_s)/2 is the step in half log SNR, r = (γ_last − γ_t)/(γ_t − γ_s). Shape of `x_hat`.
    """
    step = gamma_t - gamma_s
    weight = -alpha(gamma_s) * torch.expm1(-0.5 * step) * step / (2 * (last_gamma - gamma_t))
    return expand_like(weight, x_hat) * (x_hat - last_x_hat)


def step_weight(gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """KL(q(z_s|z_t,x) ‖ p(z_s|z_t)) per ‖ε − ε̂‖², in nats: ½ expm1(γ_t − γ_s) [VDM §4, discrete time].

    Its limit for small steps is ½ (dγ/dt)(t − s) [VDM §5, continuous time]. Shape of `gamma_s` and `gamma_t`.
    """
    return 0.5 * torch.expm1(gamma_t - gamma_s)


def eps_error_weight(gamma_t: torch.Tensor, prediction_type: PredictionType) -> torch.Tensor:
    """Factor that turns the squared error of the network's output into ‖ε − ε̂‖².

    epsilon: 1; sample: SNR, as ε − ε̂ = −(α/σ)(x − x̂); v_prediction: α², as ε − ε̂ = α (v − v̂). Shape of `gamma_t`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return torch.ones_like(gamma_t)
    return snr(gamma_t) if prediction_type == "sample" else torch.sigmoid(-gamma_t)


def prior_kl_nats(x: torch.Tensor, gamma_1: torch.Tensor) -> torch.Tensor:
    """KL(q(z_1 | x) ‖ N(0, I)) of each element of `x`, in nats: ½(α₁² x² + σ₁² − 1 − log σ₁²) [VDM §3.5].

    Args:
        x (`torch.Tensor` of shape `(B, ...)`): data in [−1, 1].
        gamma_1 (`torch.Tensor` of shape `()` or `(B,)`): noise level at t = 1.

    Returns: `torch.Tensor` of the shape of `x`.
    """
    alpha_squared = torch.sigmoid(-gamma_1)
    # σ₁² − 1 − log σ₁² = −α₁² − log(1 − α₁²) is of order α₁⁴; log1p keeps its digits
    constant = -alpha_squared - torch.log1p(-alpha_squared)
    return 0.5 * (expand_like(alpha_squared, x) * x * x + expand_like(constant, x))


# ---- integer data ------------------------------------------------------------------------------------------------


def low_resolution(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Images smaller by `factor`: the mean of each square of pixels, rounded to a level; uint8 `(B, C, h, w)`.

    `x_from_levels(low_resolution(images, factor), num_levels)` are the `cond_images` of `train.py --upscale_factor`.

    Raises: `ValueError` for a size that `factor` does not divide.
    """
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"upscale_factor must divide the size of the images, {height}×{width}, got {factor}.")
    # of integers, so that every machine rounds the same way
    squares = images.to(torch.int64).unflatten(-2, (-1, factor)).unflatten(-1, (-1, factor))
    return ((2 * squares.sum((-3, -1)) + factor**2) // (2 * factor**2)).to(torch.uint8)


def x_from_levels(levels: torch.Tensor, num_levels: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Integers k in [0, num_levels) to data x = 2(k + ½)/num_levels − 1, so |x| ≤ 1 − 1/num_levels. Same shape."""
    return (2 * levels.to(dtype) + 1) / num_levels - 1


def nearest_levels(x: torch.Tensor, num_levels: int = 256) -> torch.Tensor:
    """The level whose value is nearest to x, the inverse of [`x_from_levels`] on its range; int64, shape of `x`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.floor((x + 1) * (num_levels / 2)).clamp(0, num_levels - 1).long()


def decoder_log_prob_nats(
    levels: torch.Tensor,
    z_0: torch.Tensor,
    gamma_0: torch.Tensor,
    num_levels: int = 256,
    max_gamma_0: float | None = None,
) -> torch.Tensor:
    """log p(x | z_0) of each element, normalized over all levels, in nats [VDM §3.3 and the official decoder].

    p(x = x_k | z_0) = softmax_k(−½ e^{−γ_0} (z_0/α_0 − x_k)²) over the `num_levels` values x_k.

    No tensor with a level axis is allocated: levels are visited one by one, levels that weigh less than e^{−72} times
    the nearest one are skipped, and the gradient is computed in closed form.

    Args:
        levels (integer `torch.Tensor` of shape `(B, ...)`): the true data, in [0, num_levels).
        z_0 (`torch.Tensor` of shape `(B, ...)`): the least noisy latent.
        gamma_0 (`torch.Tensor` of shape `()` or `(B,)`): its noise level.
        num_levels (`int`, defaults to 256): number of levels of the data.
        max_gamma_0 (`float`, *optional*): an upper bound of `gamma_0`, which avoids a device synchronization.

    Returns: `torch.Tensor` of shape `(B, ...)`, ≤ 0.
    """
    y = z_0 / expand_like(alpha(gamma_0), z_0)
    precision = expand_like(snr(gamma_0), y)
    radius = _decoder_radius(gamma_0, num_levels, max_gamma_0)
    nearest = nearest_levels(y.detach(), num_levels)
    d = y - x_from_levels(nearest, num_levels, y.dtype)
    # relative to the nearest level, (y − x_k)² − d² = offset (offset + 2d) with the exact offset = x_nearest − x_k:
    # the difference of squares of y itself would cancel where y is far outside the data range
    offset = (nearest - levels).to(y.dtype) * (2 / num_levels)
    log_normalizer = _LogNormalizer.apply(d, precision, nearest, num_levels, radius)
    # at most 0 in exact arithmetic; rounding must not push a likelihood above 1
    return (-0.5 * precision * offset * (offset + 2 * d) - log_normalizer).clamp(max=0)


def decode(
    z_0: torch.Tensor,
    gamma_0: torch.Tensor,
    num_levels: int = 256,
    draw: bool = False,
    generator: Generators = None,
) -> torch.Tensor:
    """Data from the least noisy latent through p(x | z_0): its mode, or with `draw` a sample.

    Args:
        z_0 (`torch.Tensor` of shape `(B, ...)`): latent at `gamma_0`; with γ_0 = −inf, `z_0` is x itself.
        gamma_0 (`torch.Tensor` of shape `()` or `(B,)`): its noise level.
        num_levels (`int`, defaults to 256): number of levels of the data.
        draw (`bool`, defaults to `False`): draw from p(x | z_0) instead of taking its most probable level.
        generator (`torch.Generator` or a list of them, *optional*): for `draw`.

    Returns: int64 `torch.Tensor` of the shape of `z_0`, in [0, num_levels).
    """
    y = z_0 / expand_like(alpha(gamma_0), z_0)
    mode = nearest_levels(y, num_levels)
    if not draw or bool((gamma_0 == -math.inf).all()):
        return mode
    gamma_0 = gamma_0.clamp(min=-40)  # for noise-free samples of a batch, where only the mode has any weight
    precision = expand_like(snr(gamma_0), y)
    radius = _decoder_radius(gamma_0, num_levels, None)
    # uniform numbers Φ(n) from normal ones, because randn_tensor accepts lists of generators
    noise = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    d = y - x_from_levels(mode, num_levels, y.dtype)
    threshold = 0.5 * torch.erfc(-noise / math.sqrt(2)) * _level_sums(d, precision, mode, num_levels, radius)[0]
    level, passed = mode.clone(), torch.zeros_like(y)
    found = torch.zeros_like(y, dtype=torch.bool)
    for k, weight, _ in _visit_levels(d, precision, mode, num_levels, radius):
        passed = passed + weight
        hit = ~found & (passed >= threshold) & (weight > 0)
        level = torch.where(hit, torch.as_tensor(k, device=y.device), level)
        found |= hit
    return level


# standard deviation, in levels, above which a mean over the levels is the mean of the Gaussian, up to 3e-5
_MAX_STD_OF_LEVELS = 0.8


def eps_of_levels(
    z_t: torch.Tensor, eps_hat: torch.Tensor, gamma_t: torch.Tensor, num_levels: int = 256
) -> torch.Tensor:
    """ε̂ with its x̂ replaced by the mean of the levels near it, for data that are integers.

    x̂′ = Σ_k w_k x_k / Σ_k w_k, w_k = exp(−½ (α_t/σ_t)² (x̂ − x_k)²), x_k = 2(k + ½)/`num_levels` − 1, over all integers
    k. If `eps_hat` is 0, so that x̂ = z_t/α_t, this is E[x | z_t] for independent, equally probable levels: the exact
    prediction at low noise, except at the ends of the range. If the standard deviation σ_t/α_t is above 0.8 levels,
    x̂′ would be x̂ up to 3e-5 levels, and ε̂ is returned unchanged.

    Args:
        z_t, eps_hat (`torch.Tensor` of shape `(B, ...)`): latents and predicted noise.
        gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise level.
        num_levels (`int`, defaults to 256): number of levels of the data.

    Returns: `torch.Tensor` of the shape of `z_t`; differentiable.
    """
    std = expand_like(sigma(gamma_t) / alpha(gamma_t), z_t) * (num_levels / 2)
    # x̂ in levels, and its distance from the nearest one
    x_hat = (x_from_eps(z_t, eps_hat, gamma_t) + 1) * (num_levels / 2) - 0.5
    distance = x_hat - x_hat.detach().round()
    steps = torch.arange(-4, 5, device=z_t.device, dtype=z_t.dtype)  # the others weigh less than 1e-6
    precision = 1 / std.clamp(max=_MAX_STD_OF_LEVELS).square()[..., None]
    weights = torch.softmax(-0.5 * precision * (distance[..., None] - steps).square(), dim=-1)
    # ε̂′ = ε̂ + (α/σ)(x̂ − x̂′)
    change = (distance - (weights * steps).sum(-1)) / std
    return torch.where(std < _MAX_STD_OF_LEVELS, eps_hat + change, eps_hat)


def eps_of_level_logits(z_t: torch.Tensor, logits: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    """ε̂ = (z_t − α_t x̂)/σ_t with x̂ the mean of the levels under a predicted distribution, for data that are integers.

    x̂ = Σ_k p_k x_k, p_k ∝ exp(logits_k) N(z_t; α_t x_k, σ_t²), x_k = 2(k + ½)/K − 1. The logits describe a
    value given the others; what its own z_t says about it is exact at every noise level. For independent values whose
    levels have the probabilities softmax(logits), this is E[ε | z_t].

    Args:
        z_t (`torch.Tensor` of shape `(B, ...)`): latents.
        logits (`torch.Tensor` of shape `(B, ..., K)`): of the K levels of each value.
        gamma_t (`torch.Tensor` of shape `()` or `(B,)`): noise level.

    Returns: `torch.Tensor` of the shape of `z_t`; differentiable.
    """
    num_levels = logits.shape[-1]
    levels = x_from_levels(torch.arange(num_levels, device=z_t.device), num_levels, z_t.dtype)
    noise = (z_t[..., None] - expand_like(alpha(gamma_t), z_t)[..., None] * levels) / expand_like(sigma(gamma_t), z_t)[
        ..., None
    ]  # the ε of each level
    return (torch.softmax(logits - 0.5 * noise.square(), dim=-1) * noise).sum(-1)


def _decoder_radius(gamma_0: torch.Tensor, num_levels: int, max_gamma_0: float | None) -> int:
    """Number of levels on each side of the nearest one that weigh more than e^{−72}, i.e. within 12 σ_0/α_0."""
    gamma = max_gamma_0
    if gamma is None:
        low, gamma = torch.stack(gamma_0.detach().aminmax()).tolist()  # one copy, for which a GPU is waited for once
        if not (math.isfinite(low) and math.isfinite(gamma)):
            raise ValueError(
                f"gamma_0 must be finite, as it sets the width of p(x | z_0), got {low if low < gamma else gamma}."
            )
    reach = 12 * math.exp(min(0.5 * gamma, 50.0)) * num_levels / 2
    return min(math.ceil(reach) + 1, num_levels - 1)


def _visit_levels(d: torch.Tensor, precision: torch.Tensor, nearest: torch.Tensor, num_levels: int, radius: int):
    """Yields `(k, weight, offset)` in increasing order of k; the weight of level k is relative to the nearest level.

    offset = x_nearest − x_k, d = y − x_nearest, weight = exp(−½ P ((d + offset)² − d²)).
    """
    whole = 2 * radius + 1 >= num_levels
    levels: Iterable[Any] = range(num_levels) if whole else (nearest + step for step in range(-radius, radius + 1))
    for k in levels:
        offset = (nearest - k).to(d.dtype) * (2 / num_levels)
        weight = torch.exp(-0.5 * precision * offset * (offset + 2 * d))
        if not whole:
            is_level: Any = (k >= 0) & (k < num_levels)
            weight = torch.where(is_level, weight, 0)
        yield k, weight, offset


def _level_sums(d, precision, nearest, num_levels: int, radius: int) -> tuple[torch.Tensor, ...]:
    """Σ weight, Σ weight · offset and Σ weight · offset (offset + 2d) over the levels, see [`_visit_levels`]."""
    total, first, second = torch.zeros_like(d), torch.zeros_like(d), torch.zeros_like(d)
    for _, weight, offset in _visit_levels(d, precision, nearest, num_levels, radius):
        total += weight
        first += weight * offset
        second += weight * offset * (offset + 2 * d)
    return total, first, second


class _LogNormalizer(torch.autograd.Function):
    """log Σ_k exp(−½ P offset_k (offset_k + 2d)); saves only P and two moments for the backward pass."""

    @staticmethod
    def forward(ctx, d, precision, nearest, num_levels, radius):
        total, first, second = _level_sums(d, precision, nearest, num_levels, radius)
        ctx.save_for_backward(precision, first / total, second / total)
        return torch.log(total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        precision, first, second = ctx.saved_tensors
        grad_d = grad_precision = None
        if ctx.needs_input_grad[0]:
            grad_d = -grad * precision * first
        if ctx.needs_input_grad[1]:
            grad_precision = (-0.5 * grad * second).sum_to_size(precision.shape)
        return grad_d, grad_precision, None, None, None


# ---- checks ------------------------------------------------------------------------------------------------------


def _alpha_ratio(gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> torch.Tensor:
    return torch.exp(0.5 * (log_alpha_squared(gamma_s) - log_alpha_squared(gamma_t)))


def check_order(gamma_s: torch.Tensor, gamma_t: torch.Tensor) -> None:
    """Raises `ValueError` unless γ_s < γ_t everywhere; NaN raises too."""
    if not bool((gamma_s < gamma_t).all()):
        raise ValueError(
            f"gamma_s must be below gamma_t (less noise), got gamma_s={_show(gamma_s)}, gamma_t={_show(gamma_t)}; "
            "swap the arguments to add noise."
        )


def check_levels(images: torch.Tensor, num_levels: int) -> None:
    """Raises `TypeError` unless `images` are integers of shape `(B, ...)`, `ValueError` unless in [0, num_levels)."""
    if not torch.is_tensor(images):
        raise TypeError(f"images must be a torch.Tensor of integers, got {type(images).__name__}.")
    if images.ndim < 2 or images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise TypeError(
            f"images must be integers of shape (B, ...) in [0, {num_levels}), got {images.dtype} of shape "
            f"{tuple(images.shape)}; the likelihood is that of integer data, so pass uint8 pixels unchanged."
        )
    if images.numel() == 0:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}.")
    if images.device.type == "cpu":  # on an accelerator this would synchronize with the device
        low, high = int(images.min()), int(images.max())
        if low < 0 or high >= num_levels:
            raise ValueError(
                f"images must be within [0, {num_levels}), got values from {low} to {high}; set num_levels."
            )


def check_num_levels(num_levels: int) -> None:
    """Raises `ValueError` unless `num_levels` is an integer within [2, 65536]."""
    if not isinstance(num_levels, int) or not 2 <= num_levels <= 65536:
        raise ValueError(f"num_levels must be an integer within [2, 65536], got {num_levels}.")


def check_prediction_type(prediction_type: str) -> None:
    """Raises `ValueError` unless `prediction_type` is one of `PREDICTION_TYPES`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")


def _show(gamma: torch.Tensor) -> str:
    values = gamma.detach().flatten().tolist()
    return f"{values[0]:.6g}" if len(values) == 1 else "[" + ", ".join(f"{v:.6g}" for v in values[:4]) + ", …]"
