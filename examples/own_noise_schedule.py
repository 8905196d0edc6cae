"""A custom noise schedule γ(t): train it, put it into a scheduler, save it with the pipeline, and load it again.

A subclass of `NoiseSchedule` must define three methods: `ends()`, `gamma_and_slope(t)`, and an `__init__` with
`register_to_config` whose arguments include gamma_min, gamma_max and num_train_timesteps, which scale the timestep.

    python examples/own_noise_schedule.py

saves a pipeline in `runs/own_schedule` and prints, in about a minute on one CPU core:

    t                      0.00     0.20     0.40     0.60     0.80     1.00
    γ(t) when it began   -7.500   -4.064   -2.048   -0.452    1.564    5.000
    γ(t) trained         -7.500   -5.903   -4.739   -3.291   -0.586    5.000
    γ(t) loaded          -7.500   -5.903   -4.739   -3.291   -0.586    5.000
    largest difference of the loaded schedule: 0.0e+00
    largest difference of the loaded scheduler, by its table: 1.7e-08

What is saved, and how it is loaded:
* `VDMScheduler.from_noise_schedule` writes γ(t) as a table into the scheduler's JSON. Sampling and likelihoods need
  nothing else, so the scheduler loads wherever diffusers_vdm is installed, without this file.
* The schedule itself is only needed to continue training. The saved pipeline names the module of its class. This
  module must be importable (not `__main__`) and must import `ModelMixin`, by which diffusers recognizes components.
  Import it before you call `VDMPipeline.from_pretrained`, which does not import modules named in files. Diffusers logs
  "Expected types for noise_schedule" for a class that is not in the package, and loads it anyway.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name in this module
from sklearn.datasets import load_digits
from torch import nn
from tqdm.auto import tqdm

from diffusers_vdm import NoiseSchedule, VariationalBound, VDMPipeline, VDMScheduler, VDMUNet2DModel


class PowersGamma(NoiseSchedule):
    """γ(t) = γ_min + (γ_max − γ_min) u(t), where u is a mixture of t^k and 1 − (1 − t)^k for k = 1 … `degree`.

    Each of these rises from 0 to 1, and so does their mixture for any weights: γ is monotone by construction.
    """

    @register_to_config
    def __init__(self, gamma_min=-13.3, gamma_max=5.0, degree=6, num_train_timesteps=1000):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, degree))

    def ends(self):
        """γ(0) and γ(1) in float64. Here they are fixed; learned ends must be differentiable."""
        ends = (self.config.gamma_min, self.config.gamma_max)
        return tuple(torch.tensor(end, dtype=torch.float64, device=self.logits.device) for end in ends)

    def gamma_and_slope(self, t, scale_shape_grad=None):
        """γ(t) and dγ/dt, with the shape and dtype of `t`, which is float64."""
        weights = self.logits.to(t).flatten().softmax(0).view(self.logits.shape)
        k = torch.arange(1, self.logits.shape[1] + 1).to(t)
        rising, falling = t[..., None], 1 - t[..., None]
        unit = (weights[0] * rising**k + weights[1] * (1 - falling**k)).sum(-1)
        slope = (weights[0] * k * rising ** (k - 1) + weights[1] * k * falling ** (k - 1)).sum(-1)
        if scale_shape_grad is not None and unit.requires_grad:
            # In continuous time the interior of γ does not change the bound, only the variance of its estimate, which
            # `VariationalBound` minimizes: these hooks turn the gradient of the loss into that of its square.
            unit.register_hook(lambda grad: grad * scale_shape_grad())
            slope.register_hook(lambda grad: grad * scale_shape_grad())
        gamma_0, gamma_1 = self.ends()
        return torch.lerp(gamma_0, gamma_1, unit), (gamma_1 - gamma_0) * slope


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_steps", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/own_schedule"))
    args = parser.parse_args()
    torch.manual_seed(0)  # for the network's weights
    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(load_digits().images.astype(np.uint8))[:, None]
    unet, schedule = VDMUNet2DModel.from_preset("digits"), PowersGamma(gamma_min=-7.5, gamma_max=5.0)
    bound = VariationalBound(unet, schedule, num_levels=17)
    groups = [{"params": unet.parameters()}, {"params": schedule.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in (bar := tqdm(range(args.train_steps))):
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        loss = bound(batch, generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(bits_per_dim=f"{loss.item():.3f}")

    scheduler = VDMScheduler.from_noise_schedule(schedule)
    VDMPipeline(unet.eval(), scheduler, schedule, num_levels=17).save_pretrained(args.output_dir)
    loaded = VDMPipeline.from_pretrained(args.output_dir)
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    with torch.no_grad():
        trained, again, by_table = (f(t) for f in (schedule, loaded.noise_schedule, loaded.scheduler.noise_schedule()))
    print("t                 ", *(f"{x:8.2f}" for x in t[::2000].tolist()))
    print("γ(t) when it began", *(f"{x:8.3f}" for x in PowersGamma(-7.5, 5.0)(t[::2000]).tolist()))
    print("γ(t) trained      ", *(f"{x:8.3f}" for x in trained[::2000].tolist()))
    print("γ(t) loaded       ", *(f"{x:8.3f}" for x in by_table[::2000].tolist()))
    print(f"largest difference of the loaded schedule: {(trained - again).abs().max():.1e}")
    print(f"largest difference of the loaded scheduler, by its table: {(trained - by_table).abs().max():.1e}")


if __name__ == "__main__":
    import own_noise_schedule  # import this file, so that the module of PowersGamma is not __main__

    own_noise_schedule.main()
