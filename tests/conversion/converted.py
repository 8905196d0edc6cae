"""Pipelines to convert, and what every converted pipeline must do."""

import math
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from diffusers_vdm import FixedLinearGamma, VDMPipeline, VDMScheduler, VDMUNet2DModel
from tests.models import fixed_weights


def convertible_pipeline(exponents=(6, 7), scheduler=None, noise_schedule=None, num_levels=256, **more) -> VDMPipeline:
    """A pipeline of one level with 64 channels, which the official code and addtt's can hold."""
    arguments = {"sample_size": 8, "block_out_channels": (64,), "layers_per_block": 1, "input_residual": True}
    arguments |= {"fourier_exponents": exponents, "attention_head_dim": 64} | more
    with fixed_weights():
        unet = VDMUNet2DModel(**arguments).eval()
    scheduler = scheduler or VDMScheduler.from_noise_schedule(noise_schedule or FixedLinearGamma())
    return VDMPipeline(unet, scheduler, noise_schedule=noise_schedule, num_levels=num_levels)


def ddpm_pipeline(**scheduler) -> DDPMPipeline:
    """A pipeline of diffusers with two levels and attention; `scheduler` are the arguments of its DDPMScheduler."""
    with fixed_weights():
        unet = UNet2DModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
                           down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
                           up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return DDPMPipeline(unet.eval(), DDPMScheduler(**scheduler))


class ExactTimesteps(nn.Module):
    """The sinusoidal embedding in the precision of its input.

    diffusers' own casts to float32, which costs 3e-5 at t = 1000: a comparison in float64 would see little else. Only
    the precision differs, and `test_time_embedding_is_the_official_one` of test_official.py holds the two together.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        k = torch.arange(self.half, dtype=timesteps.dtype)
        angles = timesteps[:, None] * torch.exp(-k * math.log(10000) / (self.half - 1))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def inputs(rng, colors, size=8):
    z = torch.from_numpy(rng.normal(size=(3, colors, size, size)))
    return z, torch.tensor([-12.0, -3.3, 4.1], dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)


def our_eps_hat(pipe, z, gamma_t, flags=None):
    unet = pipe.unet.double()
    unet.time_proj = ExactTimesteps(unet.config.block_out_channels[0])
    timesteps = pipe.noise_schedule.timestep(None, gamma_t)
    with torch.no_grad():
        return unet(z, timesteps, augmentation_flags=flags if unet.config.augmentation_flag else None).sample


def near(actual, expected, tolerance=1e-9):
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def samples(pipe: VDMPipeline, folder: Path) -> None:
    """A converted pipeline draws images, as it is and loaded, moved and cast."""
    pipe.save_pretrained(folder)
    for each in (
        pipe,
        VDMPipeline.from_pretrained(folder),
        VDMPipeline.from_pretrained(folder).to("cpu", torch.bfloat16),
    ):
        each.set_progress_bar_config(disable=True)
        size, channels = each.unet.config.sample_size, each.unet.config.in_channels
        images = each(2, 2, torch.Generator().manual_seed(0), output_type="pt").images
        assert images.shape == (2, channels, size, size) and images.isfinite().all()
