"""The small networks, noise schedules and pipelines that several test files use.

Random weights come from a fixed seed in a fork of the generator: no test draws its network from the global state.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from diffusers_vdm import MonotoneGammaNetwork, VDMMultiscale2DModel, VDMPipeline, VDMScheduler, VDMUNet2DModel
from tests.tensors import F64, normal, seeded

# ---- networks of diffusers' kind ----------------------------------------------------------------------------------


@contextlib.contextmanager
def fixed_weights(seed: int = 0) -> Iterator[None]:
    """What is built in this context has the same random weights in every test; the global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def tiny_unet(cls=VDMUNet2DModel, seed: int = 0, **arguments):
    """A network of one block of 8 channels for images of 8×8 pixels, with its random initial weights."""
    blocks = {
        "sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2,
        "attention_head_dim": 8, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    }  # fmt: skip
    with fixed_weights(seed):
        return cls(**blocks | arguments)


def tiny_preset(preset: str = "digits", seed: int = 0, **changes) -> VDMUNet2DModel:
    """The network of a preset with one block of 8 channels: a few thousand parameters."""
    blocks = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 8}
    with fixed_weights(seed):
        return VDMUNet2DModel.from_preset(preset, **blocks | changes)


def quiet_unet(**arguments) -> VDMUNet2DModel:
    """A network for one channel with an output so small that the ODE does not amplify rounding errors."""
    unet = tiny_unet(in_channels=1, out_channels=1, zero_init=False, **arguments)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.02)
    return unet.eval()


def network(channels: int = 3, cls=VDMUNet2DModel, **arguments):
    """A network of 16 channels whose every weight is random: no layer is at its zero initialization."""
    blocks = {
        "sample_size": 8, "block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 16, "in_channels": channels, "out_channels": channels,
    }  # fmt: skip
    if cls is VDMUNet2DModel:
        blocks |= {"input_residual": True}
    else:
        blocks |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with fixed_weights():
        net = cls(**blocks | arguments)
    source = seeded(42)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=source))
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(1.0)
    return net.eval()


TINY_MULTISCALE = {
    "sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2,
    "attention_head_dim": 8, "num_difference_filters": 6,
}  # fmt: skip


def tiny_multiscale(scale: float = 0.1, **arguments) -> VDMMultiscale2DModel:
    """A multiscale network out of its zero initialization."""
    with fixed_weights():
        net = VDMMultiscale2DModel(**TINY_MULTISCALE | arguments)
    generator = seeded(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return net.eval()


# ---- networks of a few numbers, in float64 -----------------------------------------------------------------------


class TinyNet(nn.Module):
    """A network of five numbers that depends on its input, the noise level, the labels and the flags.

    `seen` holds the inputs and timesteps of each call.
    """

    def __init__(self, dtype: torch.dtype = F64):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.6, 0.4, 1.3, -0.7, 0.2], dtype=dtype))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def forward(self, sample, timestep, class_labels=None, augmentation_flags=None, return_dict=True):
        self.seen.append((sample.detach(), timestep.detach()))
        a, b, c, d, e = self.weights
        time = (timestep / 1000).reshape(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
        out = a * sample + b * torch.tanh(c * sample + d * time) + e * time
        for condition in (class_labels, augmentation_flags):
            if condition is not None:
                out = out + 0.3 * condition.reshape(time.shape)
        return (out,)


class CountingNet(nn.Module):
    """A network of two numbers that counts the images it finished.

    In its call number `stop_at` it is interrupted, or returns NaN if `broken`.
    """

    dtype = F64

    def __init__(self, stop_at: int = -1, weight: float = 0.6, broken: bool = False):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([weight, 0.4], dtype=F64))
        self.stop_at, self.broken, self.calls, self.count = stop_at, broken, 0, 0

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls += 1
        if self.calls == self.stop_at:
            if self.broken:
                return (sample * math.nan,)
            raise KeyboardInterrupt
        self.count += len(sample)
        return (self.weights[0] * sample + self.weights[1] * (timestep / 1000).view(-1, 1),)


class SmoothNet(nn.Module):
    """A smooth function of (z, t) without parameters; float64, so that formulas can be compared to the last digits.

    With `outputs=2` it also predicts variances: values within [0.1, 0.5], a share of a range or a variance.
    """

    dtype = F64

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.outputs = outputs

    def forward(self, z, timestep, return_dict=False):
        out = torch.tanh(0.7 * z + 0.01 * timestep.double()) + 0.1 * z.flip(-1)
        return (torch.cat([out, 0.3 + 0.2 * torch.sin(3 * z)], 1) if self.outputs == 2 else out,)


# ---- noise schedules ---------------------------------------------------------------------------------------------


def bent_gamma(learn_ends: bool = False, seed: int = 1, hidden_dim: int = 16) -> MonotoneGammaNetwork:
    """A γ network in float64, from −7 to 4, that is far from a straight line."""
    schedule = MonotoneGammaNetwork(-7.0, 4.0, hidden_dim=hidden_dim, learn_ends=learn_ends).double()
    with torch.no_grad():
        for name, parameter in schedule.named_parameters():
            if name not in ("bias", "weight"):
                parameter.mul_(1 + 0.5 * normal(*parameter.shape, seed=seed))
        schedule.output_weight.mul_(30 * normal(hidden_dim, seed=seed + 1).abs())
    return schedule


def curved_gamma(gamma_min: float = -9.0, gamma_max: float = 4.5) -> MonotoneGammaNetwork:
    """A γ network in float32 that is not a straight line."""
    with fixed_weights():
        schedule = MonotoneGammaNetwork(gamma_min, gamma_max, hidden_dim=8)
    with torch.no_grad():
        schedule.output_weight.copy_(5 * torch.rand(8, generator=seeded(3)))
    return schedule


# ---- pipelines ---------------------------------------------------------------------------------------------------


def pipeline(scheduler=None, noise_schedule=None, num_levels: int = 256, **arguments) -> VDMPipeline:
    """A pipeline around [`network`] without a progress bar; `arguments` are those of the network."""
    pipe = VDMPipeline(network(**arguments), scheduler or VDMScheduler(), noise_schedule, num_levels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def curved_pipeline(**arguments) -> VDMPipeline:
    """A pipeline with [`curved_gamma`] as its schedule, and the scheduler of it."""
    schedule = curved_gamma()
    return pipeline(VDMScheduler.from_noise_schedule(schedule), schedule, **arguments)


def sample(pipe, **arguments) -> torch.Tensor:
    """The latents that a pipeline draws in four steps with a fixed seed."""
    return pipe(**{"num_inference_steps": 4, "generator": seeded(7), "output_type": "latent"} | arguments).images
