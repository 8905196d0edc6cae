"""Images to latents and back along the probability-flow ODE: methods of the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from . import call_arguments, denoiser, diffusion, ode
from .condition_arguments import batch_of_conditions, conditions_of_call
from .diffusers_schedulers import noise_schedule_of
from .diffusion import Generators
from .editing import great_circle, image_levels


class ImageFlowMixin:
    """`encode`, `decode` and `interpolate` of a pipeline with a `unet` and a `scheduler`."""

    @torch.no_grad()
    def encode(
        self: Any,
        image: Any,
        class_labels: int | list[int] | torch.Tensor | None = None,
        tolerance: float = 1e-5,
        generator: Generators = None,
    ) -> torch.Tensor:
        """The latents z_1 of images by the probability-flow ODE; `decode` gets the images back from them.

        It starts from a sample of q(z_0 | x): α_0 x alone is not a value that z_0 has, and its latents are too small.

        Args:
            image: PIL images, or arrays or tensors in [0, 1].
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): one class for all images, or one for each.
            tolerance (`float`, defaults to 1e-5): `rtol` and `atol` of [`ode.solve`].
            generator (`torch.Generator` or a list of them, *optional*): for the noise of z_0.

        Returns: `torch.Tensor` of shape `(B, C, H, W)`.
        """
        levels = image_levels("image", image, self.image_shape, self.config.num_levels)
        dtype = denoiser.working_dtype(self.unet)
        x = diffusion.x_from_levels(levels.to(self.device), self.config.num_levels, dtype)
        gamma_0, gamma_1, model = self._flow(len(x), class_labels)
        generator = call_arguments.generators(generator, len(x), self.device)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        z_0 = diffusion.q_sample(x, noise, torch.tensor(gamma_0, dtype=torch.float64))
        return ode.solve(model, z_0, gamma_0, gamma_1, rtol=tolerance, atol=tolerance).z

    @torch.no_grad()
    def decode(
        self: Any,
        latents: torch.Tensor,
        class_labels: int | list[int] | torch.Tensor | None = None,
        tolerance: float = 1e-5,
        output_type: str = "pil",
    ) -> Any:
        """Images from latents z_1 along the probability-flow ODE, as the most probable levels of p(x | z_0).

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): such as those of `encode`.
            class_labels, tolerance: as in `encode`.
            output_type (`"pil"`, `"np"` or `"pt"`, defaults to `"pil"`): as in `__call__`.
        """
        call_arguments.one_of("output_type", output_type, ("pil", "np", "pt"))
        count = len(latents) if torch.is_tensor(latents) and latents.ndim == 4 else 1
        z_1 = call_arguments.latents(latents, (count, *self.image_shape)).to(self.device)
        gamma_0, gamma_1, model = self._flow(count, class_labels)
        z_0 = ode.solve(model, z_1, gamma_1, gamma_0, rtol=tolerance, atol=tolerance).z
        levels = diffusion.decode(z_0, torch.tensor(gamma_0, dtype=torch.float64), self.config.num_levels)
        return self._of_type(levels, output_type)

    def interpolate(
        self: Any,
        image: Any,
        num_images: int = 8,
        class_labels: int | list[int] | torch.Tensor | None = None,
        tolerance: float = 1e-5,
        generator: Generators = None,
        output_type: str = "pil",
    ) -> Any:
        """Images on a great circle between the latents of two images, which are the first and the last of them.

        Args:
            image: two PIL images, or arrays or tensors in [0, 1].
            num_images (`int`, defaults to 8): images, with both ends; at least 2.
            class_labels (`int`, *optional*): one class for all.
            tolerance, generator, output_type: as in `encode` and `decode`.
        """
        num_images = call_arguments.positive_integer("num_images", num_images)
        latents = self.encode(image, class_labels, tolerance, generator)
        if len(latents) != 2 or num_images < 2:
            raise ValueError(
                f"image must be two images, and num_images at least 2, got {len(latents)} images and {num_images}."
            )
        path = great_circle(latents[0], latents[1], torch.linspace(0, 1, num_images, device=latents.device))
        return self.decode(path, class_labels, tolerance, output_type)

    def _flow(self: Any, count: int, class_labels: Any) -> tuple[float, float, ode.EpsModel]:
        """The ends of γ, and ε̂ for the ODE, for `count` images."""
        given, single = conditions_of_call(self.unet, self.config.num_levels, class_labels)
        _, conditions = batch_of_conditions(self.unet, count, 1, given, single)
        schedule = noise_schedule_of(self.scheduler)
        gamma_0, gamma_1 = (float(end.detach()) for end in schedule.ends())
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        return gamma_0, gamma_1, ode.eps_model(self.unet, schedule, prediction_type, **conditions)

    def _of_type(self: Any, levels: torch.Tensor, output_type: str) -> Any:
        """Levels as PIL images, or as an array or a tensor in [0, 1]."""
        pixels = levels.to(torch.float32) / (self.config.num_levels - 1)
        if output_type == "pt":
            return pixels
        array = pixels.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
