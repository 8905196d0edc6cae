"""What a network is trained on: the part that every objective shares, and DDPM's simple one (vlb.py has the bound).

γ = −log SNR grows with t. Data are integers; see diffusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import nn

from . import diffusion
from .diffusion import PredictionType, to_high_precision
from .noise_schedules import LinearBetaGamma, NoiseSchedule


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


def check_times(t: torch.Tensor, batch_size: int) -> None:
    if not torch.is_tensor(t) or t.shape != (batch_size,):
        got = tuple(t.shape) if torch.is_tensor(t) else t
        raise ValueError(f"t must have shape ({batch_size},), a tensor with a time for each image, got {got}.")
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be within [0, 1], got values from {float(t.min()):.6g} to {float(t.max()):.6g}.")


class Objective(nn.Module):
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

    @property
    def _no_split_modules(self) -> list[str]:
        """The blocks that Accelerate shards one by one under FSDP, by their classes."""
        names = getattr(self.unet, "_no_split_modules", None) or ["ResnetBlock2D"]
        here = {type(module).__name__ for module in self.unet.modules()}
        return [name for name in names if name in here]

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
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]  # the rest predicts variances, which the bound in ε̂ does not use
        if output.shape != x.shape:
            raise ValueError(f"the network returned {tuple(output.shape)} for images of {tuple(x.shape)}.")
        if self.prediction_type == "epsilon":
            target = eps
        elif self.prediction_type == "sample":
            target = x
        else:
            target = diffusion.velocity(x, eps, gamma_t)
        return (target - output.to(x.dtype)).square().flatten(1).sum(1)


class SimpleObjective(Objective):
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
        check_times(t, len(x))
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
