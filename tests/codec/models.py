"""The best network for images of independent pixels, as part of a pipeline."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from diffusers_vdm import FixedLinearGamma, VDMScheduler
from tests.oracles import gamma_of_timestep


class IndependentPixels(nn.Module):
    """ε̂ = (z_t − α E[x | z_t])/σ for pixels that are independent with one distribution over the levels.

    Args:
        shape (`tuple[int, int, int]`): C, H, W.
        probabilities (`np.ndarray`): of each level.
        schedule (`NoiseSchedule`): what a timestep means.
        learned (`bool`): also return channels for `variance_type="learned_range"`.
    """

    def __init__(self, shape, probabilities, schedule, learned=False):
        super().__init__()
        count = len(probabilities)
        levels = (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1
        self.register_buffer("levels", levels)
        self.register_buffer("log_probabilities", torch.from_numpy(np.log(np.maximum(probabilities, 1e-30))))
        self.schedule, self.learned = schedule, learned
        self.config = {"in_channels": shape[0], "sample_size": tuple(shape[1:])}
        self.shift = 0.0  # relative error, as another machine would have

    @property
    def dtype(self):
        return self.levels.dtype

    def forward(self, z, timestep, return_dict=False):
        return self.of_distribution(z, timestep, self.log_probabilities)

    def of_distribution(self, z, timestep, log_probabilities):
        gamma = gamma_of_timestep(self.schedule, torch.as_tensor(timestep).reshape(-1)).to(z)
        gamma = gamma.reshape(-1, 1, 1, 1)
        a, s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        logits = log_probabilities - 0.5 * ((z[..., None] - a[..., None] * self.levels) / s[..., None]).square()
        eps_hat = (z - a * (logits.softmax(-1) @ self.levels)) / s * (1 + self.shift)
        return (torch.cat([eps_hat, 0.3 * torch.tanh(z)], dim=1) if self.learned else eps_hat,)


class PixelsOfClasses(IndependentPixels):
    """The same for pixels with one distribution for each class; without a label, for their mean."""

    def __init__(self, shape, probabilities, schedule):
        super().__init__(shape, probabilities.mean(0), schedule)
        own = torch.from_numpy(np.log(np.concatenate([probabilities, probabilities.mean(0)[None]])))
        self.register_buffer("log_probabilities_of_class", own)
        self.config |= {"num_class_embeds": len(probabilities), "null_class": True}

    def forward(self, z, timestep, class_labels=None, return_dict=False):
        null = torch.full((len(z),), self.config["num_class_embeds"])
        labels = null if class_labels is None else class_labels
        return self.of_distribution(z, timestep, self.log_probabilities_of_class[labels][:, None, None, None])


def pixel_pipeline(shape=(1, 4, 4), num_levels=256, seed=0, learned=False, gamma_min=None, **scheduler):
    """A pipeline for independent pixels with a random distribution, and that distribution."""
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.05, size=num_levels) + 1e-6
    probabilities = weights / weights.sum()
    # the levels are 2/num_levels apart; σ_0 is a tenth of that
    gamma_min = 2 * np.log(0.2 / num_levels) if gamma_min is None else gamma_min
    schedule = FixedLinearGamma(gamma_min=float(gamma_min), gamma_max=6.0)
    ours = VDMScheduler.from_noise_schedule(schedule)
    if learned:
        scheduler["variance_type"] = "learned_range"
    if scheduler:
        ours = VDMScheduler.from_config(ours.config, **scheduler)
    unet = IndependentPixels(shape, probabilities, schedule, learned)
    return SimpleNamespace(unet=unet, scheduler=ours, config={"num_levels": num_levels}), probabilities


def draw_pixels(probabilities, shape, seed=1):
    """Images with that distribution, int64 or uint8."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(probabilities), size=shape, p=probabilities)
    return torch.from_numpy(drawn).to(torch.uint8 if len(probabilities) <= 256 else torch.int32)
