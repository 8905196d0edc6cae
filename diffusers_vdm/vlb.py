"""The variational bound on −log₂ p(x), in bits per dimension: as a training objective, and over a data set.

−log p(x) ≤ prior KL(q(z_1|x) ‖ p(z_1)) + reconstruction E[−log p(x|z_0)] + diffusion loss        [VDM eq. 11]

Diffusion loss, T steps: ½ T E[expm1(γ_t − γ_s) ‖ε − ε̂‖²]; continuous time: ½ E[γ′(t) ‖ε − ε̂‖²]  [VDM §4, §5].
γ = −log SNR grows with t. Data are integers; see diffusion.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn
from tqdm.auto import tqdm

from . import diffusion
from .diffusion import PredictionType
from .noise_schedules import LinearBetaGamma, NoiseSchedule, to_high_precision


@dataclass
class VariationalBoundOutput(BaseOutput):
    """Terms of the bound, all in **bits per dimension**.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean of `total`, to be minimised.
        total (`torch.Tensor` of shape `(B,)`): prior + reconstruction + diffusion of each image.
        prior, reconstruction, diffusion (`torch.Tensor` of shape `(B,)`): the three terms of each image.
        gamma_t (`torch.Tensor` of shape `(B,)`): the noise level at which the diffusion term was estimated.
        mse (`torch.Tensor` of shape `(B,)`): mean of (ε − ε̂)² over the dimensions, there.
    """

    # BaseOutput can be rebuilt from a dict, as accelerate does under mixed precision, only if the rest has defaults
    loss: torch.Tensor
    total: torch.Tensor = None
    prior: torch.Tensor = None
    reconstruction: torch.Tensor = None
    diffusion: torch.Tensor = None
    gamma_t: torch.Tensor = None
    mse: torch.Tensor = None


@dataclass
class SimpleObjectiveOutput(BaseOutput):
    """DDPM's unweighted objective; not a likelihood.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean of `mse`.
        mse (`torch.Tensor` of shape `(B,)`): mean squared error of the network's output over the dimensions.
        gamma_t (`torch.Tensor` of shape `(B,)`): the noise levels that were drawn.
    """

    loss: torch.Tensor
    mse: torch.Tensor = None
    gamma_t: torch.Tensor = None


def key_to_seed(*key: int | str) -> int:
    """A 63-bit seed that is a function of `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream is a function of `key` alone, for randomness that does not depend on order or batch."""
    return torch.Generator(device).manual_seed(key_to_seed(*key))


def stratified_times(
    batch_size: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
) -> torch.Tensor:
    """t_i = (u + i/B) mod 1 with one uniform u: each is uniform, together they cover [0, 1] evenly [VDM app. I.1].

    Returns: float64 `torch.Tensor` of shape `(batch_size,)`.
    """
    source = generator.device if generator is not None else device
    u = torch.rand((), generator=generator, device=source, dtype=torch.float32)
    lattice = torch.arange(batch_size, device=source) / batch_size
    return to_high_precision((u + lattice) % 1.0).to(device or u.device)


def _check_times(t: torch.Tensor, batch_size: int) -> None:
    if not torch.is_tensor(t) or t.shape != (batch_size,):
        got = tuple(t.shape) if torch.is_tensor(t) else t
        raise ValueError(f"t must have shape ({batch_size},), a tensor with a time for each image, got {got}.")
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be within [0, 1], got values from {float(t.min()):.6g} to {float(t.max()):.6g}.")


class _Objective(nn.Module):
    """What both objectives share: the network, the schedule, and images that are integers."""

    def __init__(self, unet: nn.Module, noise_schedule: NoiseSchedule, num_levels: int, prediction_type: str):
        super().__init__()
        diffusion.check_prediction_type(prediction_type)
        if not isinstance(noise_schedule, NoiseSchedule):
            raise TypeError(
                f"noise_schedule must be a NoiseSchedule, got {type(noise_schedule).__name__}; of a scheduler take "
                "scheduler.noise_schedule()."
            )
        if not isinstance(num_levels, int) or not 2 <= num_levels <= 65536:
            raise ValueError(f"num_levels must be within [2, 65536], an integer, got {num_levels}.")
        self.unet = unet
        self.noise_schedule = noise_schedule
        self.num_levels = num_levels
        self.prediction_type = prediction_type

    def _data(self, images: torch.Tensor) -> torch.Tensor:
        diffusion.check_levels(images, self.num_levels)
        # float32 whatever the network's type: x in bfloat16 would be other data
        dtype = torch.promote_types(getattr(self.unet, "dtype", torch.float32), torch.float32)
        return diffusion.x_from_levels(images, self.num_levels, dtype)

    def _noise(self, x: torch.Tensor, eps: torch.Tensor | None, generator: torch.Generator | None) -> torch.Tensor:
        if eps is None:
            return diffusion.randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if eps.shape != x.shape:
            raise ValueError(f"eps and eps_0 must have the shape of images {tuple(x.shape)}, got {tuple(eps.shape)}.")
        return eps.to(x)

    def _squared_error(self, x, eps, t, gamma_t, **conditions) -> torch.Tensor:
        """Σ (target − output)² over the dimensions, at z_t = α_t x + σ_t ε; shape `(B,)`."""
        z_t = diffusion.q_sample(x, eps, gamma_t)
        timesteps = self.noise_schedule.timestep(t, gamma_t).to(x.dtype)
        conditions = {name: value for name, value in conditions.items() if value is not None}
        output = self.unet(z_t, timesteps, return_dict=False, **conditions)[0]
        if self.prediction_type == "epsilon":
            target = eps
        elif self.prediction_type == "sample":
            target = x
        else:
            target = diffusion.velocity(x, eps, gamma_t)
        return (target - output.to(x.dtype)).square().flatten(1).sum(1)


class VariationalBound(_Objective):
    """The variational bound as one module: what DDP, FSDP, `torch.compile` and Accelerate should wrap.

    In continuous time the bound does not depend on γ between its ends [VDM §5.1]: its gradient there is pure noise.
    What the inside of γ does change is the *variance* of the estimate. So the inside is trained by the gradient of the
    squared diffusion loss, which costs no second pass: what arrives at γ(t_i) and γ′(t_i) is multiplied by
    2 · diffusion_i [VDM app. I.2]. The ends always follow the bound, and with a finite T all of γ does.

    Args:
        unet (`nn.Module`): called as `unet(z_t, timesteps, return_dict=False, …)[0]`; a `VDMUNet2DModel`, a
            `UNet2DModel`.
        noise_schedule ([`NoiseSchedule`]): γ(t); of a scheduler, `scheduler.noise_schedule()`.
        num_timesteps (`int`, *optional*): T of the discrete-time bound; continuous time if not given.
        num_levels (`int`, defaults to 256): levels of the data, 2 to 65536.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`): what `unet` predicts.
        minimize_variance (`bool`, defaults to `True`): train the inside of γ as told above; `False` leaves it the
            bound's own gradient, as the published code does.
    """

    def __init__(
        self,
        unet: nn.Module,
        noise_schedule: NoiseSchedule,
        *,
        num_timesteps: int | None = None,
        num_levels: int = 256,
        prediction_type: PredictionType = "epsilon",
        minimize_variance: bool = True,
    ):
        super().__init__(unet, noise_schedule, num_levels, prediction_type)
        if num_timesteps is not None and (int(num_timesteps) != num_timesteps or num_timesteps < 1):
            raise ValueError(f"num_timesteps must be a positive integer, or None (continuous time): {num_timesteps}.")
        self.num_timesteps = num_timesteps
        self.minimize_variance = minimize_variance

    def forward(
        self,
        images: torch.Tensor,
        *,
        class_labels: torch.Tensor | None = None,
        augmentation_flags: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
        eps_0: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VariationalBoundOutput:
        """An unbiased estimate of the bound of each image, from one t, one ε and one ε_0 each.

        Args:
            images (integer `torch.Tensor` of shape `(B, ...)`): data in [0, num_levels), uint8 as a rule.
            class_labels, augmentation_flags (`torch.Tensor` of shape `(B,)`, *optional*): handed to the network.
            t (`torch.Tensor` of shape `(B,)`, *optional*): times in [0, 1], defaults to [`stratified_times`]. With
                `num_timesteps` they are rounded up to a multiple of 1/T.
            eps, eps_0 (`torch.Tensor` of shape `(B, ...)`, *optional*): noise of z_t and of z_0.
            generator (`torch.Generator`, *optional*): for what is not given, drawn in the order t, eps, eps_0.

        Returns: [`VariationalBoundOutput`], in bits per dimension.
        Raises: `TypeError` for images that are not integers, `ValueError` for values and shapes that do not fit.
        """
        x = self._data(images)
        if t is None:
            t = stratified_times(len(x), generator, x.device)
        _check_times(t, len(x))
        t = to_high_precision(t.to(x.device))
        eps, eps_0 = self._noise(x, eps, generator), self._noise(x, eps_0, generator)

        nats_per_bpd = math.log(2) * x[0].numel()
        gamma_0, gamma_1 = self.noise_schedule.ends()

        squared_loss_slope: list[torch.Tensor] = []
        hook = None
        if self.minimize_variance and self.num_timesteps is None:
            hook = lambda: squared_loss_slope[0]  # noqa: E731  known only once the loss is
        if self.num_timesteps is None:
            gamma_t, slope = self.noise_schedule.gamma_and_slope(t, scale_shape_grad=hook)
            weight = 0.5 * slope
        else:
            step = (t * self.num_timesteps).ceil().clamp(min=1)
            t = step / self.num_timesteps
            gamma_t = self.noise_schedule(t)
            # (step − 1)/T is exactly 0 for the first step, so that γ_s there is γ(0) itself
            gamma_s = self.noise_schedule((step - 1) / self.num_timesteps)
            weight = self.num_timesteps * diffusion.step_weight(gamma_s, gamma_t)
        weight = weight * diffusion.eps_error_weight(gamma_t, self.prediction_type)

        squared_error = self._squared_error(
            x, eps, t, gamma_t, class_labels=class_labels, augmentation_flags=augmentation_flags
        )
        diffusion_bpd = weight.to(x.dtype) * squared_error / nats_per_bpd
        squared_loss_slope.append(2 * diffusion_bpd.detach().to(t.dtype))

        z_0 = diffusion.q_sample(x, eps_0, gamma_0)
        log_prob = diffusion.decoder_log_prob_nats(images, z_0, gamma_0, self.num_levels, self._max_gamma_0())
        reconstruction_bpd = -log_prob.flatten(1).sum(1) / nats_per_bpd
        prior_bpd = diffusion.prior_kl_nats(x, gamma_1).flatten(1).sum(1) / nats_per_bpd
        total = prior_bpd + reconstruction_bpd + diffusion_bpd
        return VariationalBoundOutput(
            loss=total.mean(),
            total=total,
            prior=prior_bpd,
            reconstruction=reconstruction_bpd,
            diffusion=diffusion_bpd,
            gamma_t=gamma_t.detach(),
            mse=squared_error.detach() / x[0].numel(),
        )

    def _max_gamma_0(self) -> float | None:
        """γ_0 as a number where it is not learned, which spares a wait for the device in each step."""
        gamma_0 = self.noise_schedule.ends()[0]
        if gamma_0.requires_grad or gamma_0.device.type != "cpu":
            return None
        return float(gamma_0)


class SimpleObjective(_Objective):
    """DDPM's objective: the unweighted mean squared error, t uniform for each sample [DDPM eq. 14].

    γ is never trained by it: the minimiser would be one γ for all t > 0. With [`LinearBetaGamma`] t is one of DDPM's
    indices, else it is uniform in [0, 1].

    Args:
        unet, noise_schedule, num_levels, prediction_type: as in [`VariationalBound`].
    """

    def __init__(
        self,
        unet: nn.Module,
        noise_schedule: NoiseSchedule,
        *,
        num_levels: int = 256,
        prediction_type: PredictionType = "epsilon",
    ):
        super().__init__(unet, noise_schedule, num_levels, prediction_type)

    def forward(
        self,
        images: torch.Tensor,
        *,
        class_labels: torch.Tensor | None = None,
        augmentation_flags: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SimpleObjectiveOutput:
        """The loss of each image at one t and one ε each; arguments as in [`VariationalBound.forward`]."""
        x = self._data(images)
        if t is None:
            source = generator.device if generator is not None else x.device
            t = torch.rand(len(x), generator=generator, device=source)
        _check_times(t, len(x))
        t = to_high_precision(t.to(x.device))
        if isinstance(self.noise_schedule, LinearBetaGamma):
            last = self.noise_schedule.config.num_train_timesteps - 1
            t = (t * (last + 1)).floor().clamp(max=last) / last
        eps = self._noise(x, eps, generator)
        with torch.no_grad():
            gamma_t = self.noise_schedule(t)
        mse = (
            self._squared_error(x, eps, t, gamma_t, class_labels=class_labels, augmentation_flags=augmentation_flags)
            / x[0].numel()
        )
        return SimpleObjectiveOutput(loss=mse.mean(), mse=mse, gamma_t=gamma_t)


@dataclass
class BoundEvaluation:
    """The bound of a data set, every image once per repeat.

    Attributes:
        bpd (`float`): mean of the bound over images and repeats, bits/dim.
        stderr_bpd (`float`): standard error of `bpd` as an estimate for *these* images, by the spread of the repeats,
            NaN for a single one. (Images of one repeat share a lattice of t and are not independent.)
        prior_bpd, reconstruction_bpd, diffusion_bpd (`float`): its terms.
        num_images, num_samples (`int`): N, and how many draws of (t, ε, ε_0) each image got.
        num_timesteps (`int` or `None`): T, or `None` for continuous time. No bits/dim without its T.
        per_image_bpd (`torch.Tensor` of shape `(N,)`): mean over the draws of each image.
        gamma_t, mse, diffusion_terms_bpd (`torch.Tensor` of shape `(num_samples, N)`): draws of the diffusion term.
    """

    bpd: float
    stderr_bpd: float
    prior_bpd: float
    reconstruction_bpd: float
    diffusion_bpd: float
    num_images: int
    num_samples: int
    num_timesteps: int | None
    per_image_bpd: torch.Tensor = field(repr=False)
    gamma_t: torch.Tensor = field(repr=False)
    mse: torch.Tensor = field(repr=False)
    diffusion_terms_bpd: torch.Tensor = field(repr=False)


@torch.no_grad()
def evaluate_bound(
    bound: VariationalBound,
    images: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    num_samples: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    progress_bar: bool | Callable = True,
) -> BoundEvaluation:
    """Monte-Carlo estimate of the bound over a data set: each image once per repeat, none dropped.

    In a repeat the times of all images form one evenly spread set (a lattice of the golden ratio, randomly shifted).
    Noise is keyed on (seed, repeat, image index), so that the answer does not depend on the batch size.

    Args:
        bound ([`VariationalBound`]): evaluated in `eval()` mode, and put back after.
        images (integer `torch.Tensor` of shape `(N, ...)`): the data set.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): handed to the network.
        num_samples (`int`, defaults to 4): repeats K; the error falls as 1/√K.
        batch_size (`int`, defaults to 64): how many images go through the network at once.
        seed (`int`, defaults to 0): key of all randomness.
        device (`str` or `torch.device`, *optional*): where to work, defaults to that of the network.
        accelerator (`accelerate.Accelerator`, *optional*): share the images among its processes, which all must call
            this and all get the whole answer, the same as from one process. `bound` must not be wrapped (DDP).
        progress_bar (`bool` or `Callable`, defaults to `True`): show a tqdm bar, or the tqdm-like class to use.

    Returns: [`BoundEvaluation`].
    Raises: `ValueError` for an empty set, and where the network returns NaN, with the index of the image.
    """
    if len(images) == 0:
        raise ValueError("images must not be empty: there is no likelihood of nothing.")
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}.")
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if device is None:
        device = next((p.device for p in bound.parameters()), torch.device("cpu"))
    n = len(images)
    mine = torch.arange(rank, n, world)
    names = ("prior", "reconstruction", "diffusion", "gamma_t", "mse")
    draws = {name: torch.zeros(num_samples, n, dtype=torch.float64) for name in names}
    bar_class = progress_bar if callable(progress_bar) else tqdm
    hidden = progress_bar is False or rank > 0
    modes = {module: module.training for module in bound.modules()}
    bound.eval()
    try:
        with bar_class(total=num_samples * len(mine), desc="bits/dim", unit="img", disable=hidden, leave=False) as bar:
            for repeat in range(num_samples):
                shift = torch.rand((), generator=keyed_generator(seed, repeat), dtype=torch.float64)
                for index in mine.split(batch_size):
                    out = _evaluate_batch(bound, images, class_labels, index, seed, repeat, shift, device)
                    for name in names:
                        draws[name][repeat, index] = out[name].double().cpu()
                    bar.update(len(index))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if world > 1:
        shares = to_high_precision(torch.stack(list(draws.values())).to(device))
        draws = dict(zip(names, accelerator.reduce(shares, "sum").double().cpu(), strict=True))
    total = draws["prior"] + draws["reconstruction"] + draws["diffusion"]
    bad = (~total.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"the bound of image {int(bad[0, 1])} is not finite: the network returned NaN or infinity.")
    repeats = total.mean(1)
    return BoundEvaluation(
        bpd=float(total.mean()),
        stderr_bpd=float(repeats.std() / math.sqrt(num_samples)) if num_samples > 1 else math.nan,
        prior_bpd=float(draws["prior"].mean()),
        reconstruction_bpd=float(draws["reconstruction"].mean()),
        diffusion_bpd=float(draws["diffusion"].mean()),
        num_images=n,
        num_samples=num_samples,
        num_timesteps=bound.num_timesteps,
        per_image_bpd=total.mean(0),
        gamma_t=draws["gamma_t"],
        mse=draws["mse"],
        diffusion_terms_bpd=draws["diffusion"],
    )


_GOLDEN = (math.sqrt(5) - 1) / 2


def _evaluate_batch(bound, images, class_labels, index, seed, repeat, shift, device) -> VariationalBoundOutput:
    shape = images.shape[1:]
    noise = [torch.randn((2, *shape), generator=keyed_generator(seed, repeat, i)) for i in index.tolist()]
    eps, eps_0 = torch.stack(noise, 1).to(device)
    t = to_high_precision(((index.double() * _GOLDEN + shift) % 1.0).to(device))
    labels = None if class_labels is None else class_labels[index].to(device)
    return bound(images[index].to(device), class_labels=labels, t=t, eps=eps, eps_0=eps_0)
