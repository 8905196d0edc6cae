"""The network as the codec calls it: in float64, so that other machines compute almost the same numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import denoiser, diffusion
from ..evaluation.chain import Chain, log_variance, lower_level, term_nats
from ..evaluation.rows import device_of
from .lattice import PHASES, class_of_std
from .levels import Levels


class _TimestepFeatures(nn.Module):
    """The sinusoidal features of diffusers' `Timesteps`, which computes them in float32, in float64."""

    def __init__(self, features: Any):
        super().__init__()
        self.num_channels, self.flip_sin_to_cos = features.num_channels, features.flip_sin_to_cos
        self.shift, self.scale = features.downscale_freq_shift, getattr(features, "scale", 1)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        index = torch.arange(half, dtype=torch.float64, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000) * index / (half - self.shift))
        angles = self.scale * timesteps.double()[:, None] * frequencies
        parts = [angles.sin(), angles.cos()]
        features = torch.cat(parts[::-1] if self.flip_sin_to_cos else parts, dim=1)
        return torch.nn.functional.pad(features, (0, self.num_channels % 2))


def coding_network(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the network in `dtype` and `eval()` mode; raises `ValueError` on a device without float64."""
    if device_of(unet).type == "mps" and dtype == torch.float64:
        raise ValueError("pipe must be on a CPU or a CUDA device, got mps, which has no float64; use pipe.to('cpu').")
    # not `unet.to`: that of diffusers warns about modules for float32, which it has none of
    network = nn.Module.to(copy.deepcopy(unet), dtype).eval().requires_grad_(False)
    features = getattr(network, "time_proj", None)
    if dtype == torch.float64 and type(features).__name__ == "Timesteps":
        network.time_proj = _TimestepFeatures(features)
    return network


class Steps:
    """The means, and where needed the standard deviations, of p(z_k | z_{k+1}) in units of the lattice of z_k.

    Args:
        network (`nn.Module`): see [`coding_network`].
        chain ([`Chain`]): the levels.
        levels ([`Levels`]): their lattices.
        shape (`tuple[int, ...]`): C, H, W.
        batch_size (`int`): images in one call of the network; the results depend on it only by rounding errors.
    """

    def __init__(self, network: nn.Module, chain: Chain, levels: Levels, shape: tuple[int, ...], batch_size: int):
        self.network, self.chain, self.levels = network, chain, levels
        self.shape, self.batch_size = shape, batch_size
        self.device, self.dtype = device_of(network), denoiser.working_dtype(network)
        on_device = {name: getattr(chain, name).to(self.device) for name in ("gammas", "gamma_0")}
        self._on_device = replace(chain, **on_device)

    @torch.no_grad()
    def __call__(
        self,
        k: int,
        z: np.ndarray,
        x: torch.Tensor | None = None,
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Step k, from z_{k+1} down to z_k.

        Args:
            k (`int`): 0 to T − 1.
            z (`np.ndarray` of shape `(B, D)`): the integers of z_{k+1}.
            x (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): the data, to compute the bound.
            conditions (`Mapping[str, torch.Tensor]`, *optional*): those of the network, see [`Steps.rows`].

        Returns: means `(B D,)` in units of δ_k/PHASES, and predicted classes `(B D,)` or `None`, as float64 to be
            rounded; the bound's term of each image `(B,)` in bits, or `None` without `x`; and x̂ `(B, D)`, float32.
        """
        parts = []
        for i in range(0, len(z), self.batch_size):
            here = slice(i, i + self.batch_size)
            rows = {name: value[here] for name, value in (conditions or {}).items()}
            parts.append(self._part(k, z[here], None if x is None else x[here], rows))
        means, classes, bits, x_hat = zip(*parts, strict=True)
        whole = [None if part[0] is None else np.concatenate(part) for part in (means, classes, bits, x_hat)]
        return whole[0], whole[1], whole[2], whole[3]  # pyright: ignore[reportReturnType]

    def rows(self, conditions: Mapping[str, torch.Tensor], here: slice) -> dict[str, torch.Tensor]:
        """The conditions of some tiles on the device of the network, real numbers in its precision."""
        found = {name: value[here].to(self.device) for name, value in conditions.items()}
        return {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in found.items()}

    def _part(self, k: int, z: np.ndarray, x: torch.Tensor | None, conditions: Mapping[str, torch.Tensor]):
        chain, gamma_t, gamma_s = self._on_device, self._on_device.gammas[k], lower_level(self._on_device, k)
        spacing = self.levels.spacing
        latents = torch.from_numpy(z * spacing[k + 1]).reshape(len(z), *self.shape)
        z_t = latents.to(self.device, self.dtype)
        timestep = chain.timesteps[k].to(self.device)
        timestep = timestep if timestep.dtype == torch.long else timestep.to(self.dtype)
        prediction = denoiser.predict(self.network, z_t, gamma_t, timestep, chain.prediction_type, **conditions)
        values = prediction.variance_values
        denoiser.check_variance_values(chain.variance_type, values)
        z_t = z_t.double()
        eps_hat, x_hat = prediction.eps_hat.double(), prediction.x_hat.double()
        if chain.clip_sample:
            x_hat = x_hat.clamp(-chain.clip_range, chain.clip_range)
            eps_hat = diffusion.eps_from_x(z_t, x_hat, gamma_t)
        mean, _ = diffusion.ancestral_step(z_t, eps_hat, gamma_s, gamma_t)
        classes = log_var = None
        if chain.variance_type != "fixed_small":
            log_var = log_variance(chain, k, None if values is None else values.double(), z_t).double()
        if values is not None and log_var is not None:
            classes = class_of_std((torch.exp(0.5 * log_var) / float(spacing[k])).cpu().numpy()).flatten()
        bits = None
        if x is not None:
            error = eps_hat - diffusion.eps_from_x(z_t, x.to(self.device, torch.float64), gamma_t)
            nats = term_nats(chain, k, error.square(), log_var)
            bits = (nats.flatten(1).sum(1) / math.log(2)).cpu().numpy()
        scaled = mean.cpu().numpy().reshape(-1) * (PHASES / spacing[k])
        return scaled, classes, bits, x_hat.float().cpu().numpy().reshape(len(z), -1)
