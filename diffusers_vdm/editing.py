"""Editing of given images by a model that was not trained for it: parts of the pipeline.

* A start in the middle: z_t ~ q(z_t | x) instead of noise [Meng et al. 2022].
* Inpainting: after each step, the known values are replaced by a sample of q(z_s | x). With resampling, a step is
  repeated from z_t ~ q(z_t | z_s), so that the new values fit the known ones [Lugmayr et al. 2022].
* Interpolation on a great circle between two latents, where both look like noise.

Papers: Meng et al. 2022, "SDEdit" (arXiv 2108.01073); Lugmayr et al. 2022, "RePaint" (arXiv 2201.09865).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from . import call_arguments, diffusion
from .diffusion import Generators
from .gamma_scheduler import GammaScheduler


@dataclass
class Edit:
    """An image that sampling starts from, and which of its values are repainted.

    Attributes:
        levels (integer `torch.Tensor` of shape `(B, C, H, W)`): the image, B is 1 or the size of the batch.
        num_levels (`int`): levels of the model.
        repainted (bool `torch.Tensor` of shape `(B, 1, H, W)` or `None`): where the image may change; `None` if
            everywhere, and the start only has less noise.
        strength (`float`): share of the steps that are done.
        num_resamples (`int`): how often each step is done.
    """

    levels: torch.Tensor
    num_levels: int
    repainted: torch.Tensor | None
    strength: float
    num_resamples: int

    @property
    def batch_size(self) -> int:
        """Number of images and masks."""
        return max(len(self.levels), 1 if self.repainted is None else len(self.repainted))

    def check_batch(self, batch_size: int) -> None:
        """Raises `ValueError` unless there is one image, and one mask, for all or for each."""
        for name, values in (("image", self.levels), ("mask_image", self.repainted)):
            if values is not None and len(values) not in (1, batch_size):
                raise ValueError(f"{name} must be one for all or one for each of {batch_size}, got {len(values)}.")

    def first_step(self, scheduler: Any) -> int:
        """The index in `scheduler.timesteps` of the first step that is done.

        Raises: `ValueError` for a scheduler that cannot start in the middle.
        """
        num_steps, calls = len(scheduler.timesteps), getattr(scheduler, "order", 1)
        first = num_steps - max(1, round(num_steps * self.strength))
        if first and type(scheduler).__name__ == "PNDMScheduler":
            raise ValueError("strength must be 1 for a PNDMScheduler, whose first steps prepare the others.")
        return first - first % calls  # never between the calls of one step

    def noisy(self, scheduler: Any, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """z = α x + σ ε at a timestep, of shape `(1,)`, or at the end of the chain if it is empty."""
        x = diffusion.x_from_levels(self.levels.to(noise.device), self.num_levels, noise.dtype).expand_as(noise)
        if len(timestep):
            return scheduler.add_noise(x, noise, timestep)
        gamma = getattr(scheduler, "final_gamma", None)
        return x if gamma is None else diffusion.q_sample(x, noise, gamma)

    def after_step(
        self, z_s: torch.Tensor, scheduler: Any, following: torch.Tensor, generator: Generators
    ) -> torch.Tensor:
        """z_s with the known values replaced by a sample of q(z_s | x); `following` is the next timestep, if any."""
        if self.repainted is None:
            return z_s
        noise = randn_tensor(z_s.shape, generator=generator, device=z_s.device, dtype=z_s.dtype)
        return torch.where(self.repainted.to(z_s.device), z_s, self.noisy(scheduler, following, noise))

    def keep(self, levels: torch.Tensor) -> torch.Tensor:
        """The levels of new images, with the known values as they were."""
        if self.repainted is None:
            return levels
        return torch.where(self.repainted.to(levels.device), levels, self.levels.to(levels))


def checked_edit(
    image: Any,
    strength: float | None,
    mask_image: Any,
    num_resamples: int,
    scheduler: Any,
    shape: tuple[int, int, int],
    num_levels: int,
) -> Edit | None:
    """The [`Edit`] that these arguments of the pipeline want, `None` if there is no image.

    Raises: `TypeError` or `ValueError` for arguments that do not fit each other, the model or the scheduler.
    """
    if strength is not None:
        call_arguments.share("strength", strength)
    num_resamples = call_arguments.positive_integer("num_resamples", num_resamples)
    if image is None:
        for name, is_given in (
            ("mask_image", mask_image is not None),
            ("strength", strength is not None),
            ("num_resamples", num_resamples > 1),
        ):
            if is_given:
                raise ValueError(f"{name} needs image; got no image.")
        return None
    levels = image_levels("image", image, shape, num_levels)
    if mask_image is None:
        if num_resamples > 1:
            raise ValueError(f"num_resamples={num_resamples} needs mask_image.")
        return Edit(levels, num_levels, None, strength or 0.8, 1)
    repeatable = isinstance(scheduler, GammaScheduler) and scheduler.config.get("algorithm") != "dpmsolver++"
    if num_resamples > 1 and not repeatable:
        algorithm = scheduler.config.get("algorithm", "of diffusers")
        raise ValueError(
            f"num_resamples={num_resamples} needs the ancestral or ddim sampler of a VDMScheduler or "
            f"LinearBetaScheduler, got {type(scheduler).__name__}, {algorithm}."
        )
    return Edit(levels, num_levels, repainted_values(mask_image, shape), strength or 1.0, num_resamples)


def image_levels(name: str, image: Any, shape: tuple[int, int, int] | None, num_levels: int) -> torch.Tensor:
    """Images as integers in [0, `num_levels`).

    Args:
        name (`str`): the argument that `image` is, for errors.
        image: a PIL image, an array `(H, W, C)` or `(B, H, W, C)`, a tensor `(C, H, W)` or `(B, C, H, W)`, with values
            in [0, 1] or, if they are uint8, in [0, 255]; or a list of these.
        shape (`tuple[int, int, int]`, *optional*): `(C, H, W)` that they must have; any if not given.
        num_levels (`int`): levels of the model; values are rounded to k/(num_levels − 1).

    Returns: int64 `torch.Tensor` of shape `(B, C, H, W)`.
    Raises: `TypeError` for other types; `ValueError` for another shape, and for values outside of the range.
    """
    values = _unit_values(name, image)
    if shape is not None and (tuple(values.shape[1:]) != shape or not len(values)):
        raise ValueError(
            f"{name} must have the {shape[0]} channels and the size {shape[1:]} of the model, got "
            f"{values.shape[1]} channels and {tuple(values.shape[2:])}; convert and resize it."
        )
    return (values * (num_levels - 1)).round().long()


def repainted_values(mask: Any, shape: tuple[int, int, int]) -> torch.Tensor:
    """Which values a mask wants to be repainted: bool, `(B, 1, H, W)`. White, above ½, or true is repainted.

    Raises: `TypeError` and `ValueError` as [`image_levels`]; the mask has one channel.
    """
    values = _unit_values("mask_image", mask, is_mask=True)
    if values.shape[1] == 3 and bool((values == values[:, :1]).all()):  # gray, saved in color
        values = values[:, :1]
    if tuple(values.shape[1:]) != (1, *shape[1:]):
        raise ValueError(
            f"mask_image must have one channel and the size {shape[1:]} of the model, got {values.shape[1]} channels "
            f"and {tuple(values.shape[2:])}."
        )
    return values > 0.5


def great_circle(a: torch.Tensor, b: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(sin((1 − u) φ) a + sin(u φ) b)/sin φ, φ the angle of `a` and `b` [Shoemake 1985].

    Args:
        a, b (`torch.Tensor` of shape `(C, H, W)`): latents.
        share (`torch.Tensor` of shape `(n,)`): u; 0 is `a` and 1 is `b`.

    Returns: `torch.Tensor` of shape `(n, C, H, W)`.
    """
    a64, b64, u = a.double(), b.double(), share.double().view(-1, 1, 1, 1)
    cosine = (a64 * b64).sum() / (a64.norm() * b64.norm()).clamp(min=1e-30)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if float(torch.sin(angle)) < 1e-6:  # the same direction, or opposite ones, which have no great circle
        mixed = (1 - u) * a64 + u * b64
    else:
        mixed = (torch.sin((1 - u) * angle) * a64 + torch.sin(u * angle) * b64) / torch.sin(angle)
    return mixed.to(a.dtype)


def _unit_values(name: str, image: Any, is_mask: bool = False) -> torch.Tensor:
    """Images of any kind as float32 values in [0, 1], `(B, C, H, W)`."""
    each = image if isinstance(image, list | tuple) else [image]
    if not each:
        raise ValueError(f"{name} must not be an empty list.")
    processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_resize=False)
    tensors = [processor.preprocess(_readable(name, one, is_mask)) for one in each]
    if len({tuple(tensor.shape[1:]) for tensor in tensors}) > 1:
        raise ValueError(f"{name} must be images of one size, got {sorted({tuple(t.shape[2:]) for t in tensors})}.")
    values = torch.cat(tensors).float()
    low, high = (float(end) for end in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must have values in [0, 1], got values from {low:g} to {high:g}.")
    return values


def _readable(name: str, one: Any, is_mask: bool) -> Any:
    """One image as the image processor of diffusers reads it: a gray or RGB picture, or floats of four dimensions."""
    if isinstance(one, Image.Image):
        if one.mode[0] in "IF":
            raise ValueError(f"{name} must be a PIL image of 8 bits per channel, got the mode {one.mode}; convert it.")
        return one if one.mode in ("L", "RGB") else one.convert("RGB" if "A" in one.getbands() else "L")
    is_tensor = torch.is_tensor(one)
    if not is_tensor and not isinstance(one, np.ndarray):
        raise TypeError(f"{name} must be PIL images, arrays or tensors, got a {type(one).__name__}.")
    kind, scale = str(one.dtype).removeprefix("torch."), 1.0
    if not kind.startswith("float"):
        is_binary = kind == "bool" or (one.min() >= 0 and one.max() <= 1)
        if not (is_mask and is_binary):
            if kind != "uint8":
                raise TypeError(f"{name} must have float or uint8 values, got {one.dtype}.")
            scale = 255.0
    if one.ndim == 2:  # gray
        one = one[None] if is_tensor else one[..., None]
    if one.ndim not in (3, 4):
        raise ValueError(f"{name} must have 2 to 4 dimensions, got shape {tuple(one.shape)}.")
    floats: Any = one.float() if torch.is_tensor(one) else one.astype(np.float32)
    return (floats if floats.ndim == 4 else floats[None]) / scale
