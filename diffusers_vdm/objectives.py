"""Training objectives: the variational bound on −log₂ p(x) in bits/dim, and DDPM's simple objective.

−log p(x) ≤ prior KL(q(z_1|x) ‖ p(z_1)) + reconstruction E[−log p(x|z_0)] + diffusion loss        [VDM eq. 11]

Diffusion loss, T steps: ½ T E[expm1(γ_t − γ_s) ‖ε − ε̂‖²]; continuous time: ½ E[γ′(t) ‖ε − ε̂‖²]  [VDM §4, §5].
γ = −log SNR grows with t. Data are integers; see diffusion.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from . import denoiser, diffusion
from .conditions import given_conditions
from .diffusion import PredictionType, to_high_precision
from .noise_schedules import LinearBetaGamma, NoiseSchedule
from .times import stratified_times

# accelerate rebuilds an output from a dict under mixed precision, for which all fields but the first need defaults
_UNSET: Any = None


@dataclass
class SimpleObjectiveOutput(BaseOutput):
    """Output of DDPM's unweighted objective, which is not a likelihood.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean of `mse`.
        mse (`torch.Tensor` of shape `(B,)`): mean squared error of the network's output over the dimensions.
        gamma_t (`torch.Tensor` of shape `(B,)`): the sampled noise levels.
    """

    loss: torch.Tensor
    mse: torch.Tensor = _UNSET
    gamma_t: torch.Tensor = _UNSET


def check_times(t: torch.Tensor, batch_size: int) -> None:
    if not torch.is_tensor(t) or t.shape != (batch_size,):
        got = tuple(t.shape) if torch.is_tensor(t) else t
        raise ValueError(f"t must be a tensor of shape ({batch_size},), one time for each image, got {got}.")
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be within [0, 1], got values from {float(t.min()):.6g} to {float(t.max()):.6g}.")


class Objective(nn.Module):
    """Base class of both objectives: the network, the schedule, and integer images."""

    def __init__(
        self, unet: nn.Module, noise_schedule: NoiseSchedule, num_levels: int, prediction_type: PredictionType
    ):
        super().__init__()
        diffusion.check_prediction_type(prediction_type)
        if not isinstance(noise_schedule, NoiseSchedule):
            raise TypeError(
                f"noise_schedule must be a NoiseSchedule, got {type(noise_schedule).__name__}; for a scheduler use "
                "scheduler.noise_schedule()."
            )
        diffusion.check_num_levels(num_levels)
        denoiser.check_network(unet, noise_schedule, prediction_type, num_levels)
        self.unet = unet
        self.noise_schedule = noise_schedule
        self.num_levels = num_levels
        self.prediction_type: PredictionType = prediction_type

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the blocks that Accelerate shards separately under FSDP."""
        names = getattr(self.unet, "_no_split_modules", None) or ["ResnetBlock2D"]
        here = {type(module).__name__ for module in self.unet.modules()}
        return [name for name in names if name in here]

    def _data(self, images: torch.Tensor) -> torch.Tensor:
        diffusion.check_levels(images, self.num_levels)
        return diffusion.x_from_levels(images, self.num_levels, denoiser.working_dtype(self.unet))

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
        prediction = denoiser.predict(self.unet, z_t, gamma_t, timesteps, self.prediction_type, **conditions)
        if self.prediction_type == "epsilon":
            target = eps
        elif self.prediction_type == "sample":
            target = x
        else:
            target = diffusion.velocity(x, eps, gamma_t)
        return (target - prediction.output).square().flatten(1).sum(1)


@dataclass
class VariationalBoundOutput(BaseOutput):
    """The terms of the bound, all in **bits per dimension**.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean of `total`, to be minimized.
        total (`torch.Tensor` of shape `(B,)`): prior + reconstruction + diffusion of each image.
        prior, reconstruction, diffusion (`torch.Tensor` of shape `(B,)`): the three terms of each image.
        gamma_t (`torch.Tensor` of shape `(B,)`): the noise level at which the diffusion term was estimated.
        mse (`torch.Tensor` of shape `(B,)`): mean of (ε − ε̂)² over the dimensions at that level.
    """

    # accelerate rebuilds a BaseOutput from a dict under mixed precision, which needs defaults for all but one field
    loss: torch.Tensor
    total: torch.Tensor = _UNSET
    prior: torch.Tensor = _UNSET
    reconstruction: torch.Tensor = _UNSET
    diffusion: torch.Tensor = _UNSET
    gamma_t: torch.Tensor = _UNSET
    mse: torch.Tensor = _UNSET


class VariationalBound(Objective):
    """The variational bound as one module, to be wrapped by DDP, FSDP, `torch.compile` or Accelerate.

    In continuous time the bound does not depend on γ between its ends [VDM §5.1], so its gradient there is pure noise.
    The interior of γ only changes the *variance* of the estimate. It is therefore trained with the gradient of the
    squared diffusion loss, without a second pass: the gradients at γ(t_i) and γ′(t_i) are multiplied by
    2 · diffusion_i [VDM app. I.2]. The ends always follow the bound, and so does all of γ for finite T.

    Args:
        unet (`nn.Module`): called as `unet(z_t, timesteps, return_dict=False, …)[0]`, such as a `VDMUNet2DModel` or a
            `UNet2DModel`.
        noise_schedule ([`NoiseSchedule`]): γ(t); for a scheduler, `scheduler.noise_schedule()`.
        num_timesteps (`int`, *optional*): T of the discrete-time bound; continuous time if not given.
        num_levels (`int`, defaults to 256): number of levels of the data, 2 to 65536.
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`): what `unet` predicts.
        minimize_variance (`bool`, defaults to `True`): train the interior of γ as described above; `False` uses the
            gradient of the bound instead, as in the published code.
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
            raise ValueError(
                f"num_timesteps must be a positive integer or None (continuous time), got {num_timesteps}."
            )
        self.num_timesteps = num_timesteps
        self.minimize_variance = minimize_variance

    def forward(
        self,
        images: torch.Tensor,
        *,
        augmentation_flags: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        t_density: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
        eps_0: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **conditions: torch.Tensor | None,
    ) -> VariationalBoundOutput:
        """An unbiased estimate of the bound for each image, from one t, one ε and one ε_0 per image.

        Args:
            images (integer `torch.Tensor` of shape `(B, ...)`): data in [0, num_levels), usually uint8.
            augmentation_flags (`torch.Tensor` of shape `(B,)`, *optional*): passed to the network.
            t (`torch.Tensor` of shape `(B,)`, *optional*): times in [0, 1], defaults to [`stratified_times`]. With
                `num_timesteps` they are rounded up to a multiple of 1/T.
            t_density (`torch.Tensor` of shape `(B,)`, *optional*): density from which `t` was drawn, uniform if not
                given; the diffusion term is divided by it (times.py).
            eps, eps_0 (`torch.Tensor` of shape `(B, ...)`, *optional*): noise of z_t and of z_0.
            generator (`torch.Generator`, *optional*): for the values that are not given, drawn in the order t, eps,
                eps_0.
            conditions: `class_labels` and the other arguments of conditions.py, passed to the network.

        Returns: [`VariationalBoundOutput`], in bits per dimension.
        Raises: `TypeError` for images that are not integers, `ValueError` for invalid values and shapes.
        """
        x = self._data(images)
        if t is None:
            t = stratified_times(len(x), generator, x.device)
        check_times(t, len(x))
        rounding = torch.finfo(t.dtype).eps
        t = to_high_precision(t.to(x.device))
        eps, eps_0 = self._noise(x, eps, generator), self._noise(x, eps_0, generator)

        nats_per_bpd = math.log(2) * x[0].numel()
        gamma_0, gamma_1 = self.noise_schedule.ends()

        squared_loss_slope: list[torch.Tensor] = []
        hook = None
        if self.minimize_variance and self.num_timesteps is None:
            hook = lambda: squared_loss_slope[0]  # noqa: E731  set below, once the loss is known
        if self.num_timesteps is None:
            gamma_t, slope = self.noise_schedule.gamma_and_slope(t, scale_shape_grad=hook)
            weight = 0.5 * slope
        else:
            # t = k/T must give step k, although (k/T) T may round to slightly more than k
            step = (t * self.num_timesteps - self.num_timesteps * rounding).ceil().clamp(min=1)
            t = step / self.num_timesteps
            gamma_t = self.noise_schedule(t)
            # (step − 1)/T is exactly 0 for the first step, so that γ_s there is γ(0) itself
            gamma_s = self.noise_schedule((step - 1) / self.num_timesteps)
            weight = self.num_timesteps * diffusion.step_weight(gamma_s, gamma_t)
        weight = weight * diffusion.eps_error_weight(gamma_t, self.prediction_type)

        squared_error = self._squared_error(
            x, eps, t, gamma_t, augmentation_flags=augmentation_flags, **given_conditions(conditions)
        )
        diffusion_bpd = weight.to(x.dtype) * squared_error / nats_per_bpd
        squared_loss_slope.append(2 * diffusion_bpd.detach().to(t.dtype))
        if t_density is not None:
            diffusion_bpd = diffusion_bpd / t_density.to(diffusion_bpd)

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
        """γ_0 as a number if it is not learned, which avoids a device synchronization in each step."""
        gamma_0 = self.noise_schedule.ends()[0]
        if gamma_0.requires_grad or gamma_0.device.type != "cpu":
            return None
        return float(gamma_0)


class SimpleObjective(Objective):
    """DDPM's objective: the unweighted mean squared error, with t uniform for each sample [DDPM eq. 14].

    It never trains γ, because its minimizer would be a constant γ for all t > 0. With [`LinearBetaGamma`] t is one of
    DDPM's indices; otherwise it is uniform in [0, 1].

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
        augmentation_flags: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **conditions: torch.Tensor | None,
    ) -> SimpleObjectiveOutput:
        """The loss at one t and one ε per image; arguments as in [`VariationalBound.forward`]."""
        x = self._data(images)
        if t is None:
            source = generator.device if generator is not None else x.device
            t = torch.rand(len(x), generator=generator, device=source)
        check_times(t, len(x))
        t = to_high_precision(t.to(x.device))
        if isinstance(self.noise_schedule, LinearBetaGamma):
            last = self.noise_schedule.config.num_train_timesteps - 1
            t = (t * (last + 1)).floor().clamp(max=last) / last
        eps = self._noise(x, eps, generator)
        with torch.no_grad():
            gamma_t = self.noise_schedule(t)
        given = {"augmentation_flags": augmentation_flags, **given_conditions(conditions)}
        mse = self._squared_error(x, eps, t, gamma_t, **given) / x[0].numel()
        return SimpleObjectiveOutput(loss=mse.mean(), mse=mse, gamma_t=gamma_t)
