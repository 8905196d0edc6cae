"""What a network of ours gets beside z_t: timesteps, classes, augmentation flags, vectors and images.

The functions take the network as an argument, because [`VDMUNet2DModel`] and [`VDMMultiscale2DModel`] share them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn


def one_for_each(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """The timestep of each row of `sample`, shape `(B,)`; a number is taken in float32."""
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(timestep, dtype=torch.float32)
    return timestep.to(sample.device).reshape(-1).expand(sample.shape[0])


def num_augmentation_flags(config: Any) -> int:
    """The number of inputs of a network of ours that say how an image was augmented; 0 if it has none."""
    return int(config.get("num_augmentation_flags", config.get("augmentation_flag", 0)))


def embed(
    network: Any,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None,
    augmentation_flags: torch.Tensor | None,
    cond_vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """The embedding of timesteps, classes, flags and vectors by the layers of a network of ours, `(B, channels)`.

    A missing label becomes the null class, a missing flag 0, and a missing vector or one of NaN the null vector.
    """
    config = network.config
    if config.get("time_embedding_type") == "learned":
        timesteps = timesteps.long()  # indices of a table
    t_emb = network.time_proj(timesteps).to(network.dtype)
    count = num_augmentation_flags(config)
    if count:
        flags = t_emb.new_zeros(len(t_emb), count) if augmentation_flags is None else augmentation_flags
        t_emb = torch.cat([t_emb, flags.to(t_emb).reshape(-1, count)], dim=1)
    emb = network.time_embedding(t_emb)
    if network.class_embedding is not None:
        if class_labels is None:
            class_labels = torch.full_like(timesteps, config.num_class_embeds, dtype=torch.long)
        if config.get("class_embed_type") == "timestep":
            class_labels = network.time_proj(class_labels).to(network.dtype)
        emb = emb + network.class_embedding(class_labels).to(network.dtype)
    if network.cond_embedding is not None:
        emb = emb + _vector_embedding(network, cond_vectors).to(emb.dtype)
    return emb


def add_vector_embedding(network: Any, cond_dim: int | None, null_vectors: bool, channels: int) -> None:
    """Gives a network of ours the layers that embed a vector; without `cond_dim`, `None` instead."""
    network.cond_embedding = None if cond_dim is None else TimestepEmbedding(cond_dim, channels)
    network.null_cond_embedding = nn.Parameter(torch.zeros(channels)) if null_vectors else None


def _vector_embedding(network: Any, cond_vectors: torch.Tensor | None) -> torch.Tensor:
    """The embedding of the standardized vectors, `(B, channels)`, or `(channels,)` of the null vector."""
    null, config = network.null_cond_embedding, network.config
    if cond_vectors is None:
        return null
    vectors = cond_vectors.to(torch.promote_types(cond_vectors.dtype, torch.float32))
    missing = vectors.isnan().any(1, keepdim=True)
    if config.cond_mean is not None:  # before any rounding to half precision
        vectors = vectors - torch.tensor(config.cond_mean, dtype=vectors.dtype, device=vectors.device)
    if config.cond_std is not None:
        vectors = vectors / torch.tensor(config.cond_std, dtype=vectors.dtype, device=vectors.device)
    embedded = network.cond_embedding(torch.where(missing, 0.0, vectors).to(network.dtype))
    # without a null, a NaN must not pass as a vector
    return torch.where(missing, torch.nan if null is None else null.to(embedded.dtype), embedded)


def condition_channels(cond_channels: int | None, null_images: bool) -> int:
    """The number of input channels for an image that a network is conditioned on."""
    return (cond_channels or 0) + null_images


def condition_features(config: Any, sample: torch.Tensor, cond_images: torch.Tensor | None) -> torch.Tensor:
    """The input channels for images that a network is conditioned on, of the size of `sample`, in float32 or better.

    Smaller images are enlarged by repeating their pixels. With `null_images`, another channel is 1 where there is an
    image; a missing one and one of NaN are 0.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    if cond_images is None:
        shape = (len(sample), condition_channels(config.cond_channels, config.null_images), *sample.shape[2:])
        return torch.zeros(shape, dtype=dtype, device=sample.device)
    images = cond_images.to(sample.device, dtype)
    if images.shape[2:] != sample.shape[2:]:
        images = nn.functional.interpolate(images, size=sample.shape[2:], mode="nearest-exact")
    if not config.null_images:
        return images
    missing = images.isnan().flatten(1).any(1)[:, None, None, None]
    given = (~missing).to(dtype).expand(-1, 1, *sample.shape[2:])
    return torch.cat([torch.where(missing, 0.0, images), given], dim=1)


def check_inputs(
    network: Any,
    sample: torch.Tensor,
    class_labels: torch.Tensor | None,
    augmentation_flags: torch.Tensor | None,
    cond_vectors: torch.Tensor | None = None,
    cond_images: torch.Tensor | None = None,
) -> None:
    """Raises `ValueError` for a sample, conditions or flags that a network of ours cannot take."""
    config = network.config
    check_sample(config, sample)
    factor = 2 ** (len(config.block_out_channels) - 1)
    if sample.shape[2] % factor or sample.shape[3] % factor:
        raise ValueError(
            f"sample must have a height and a width divisible by {factor} (the network halves them "
            f"{len(config.block_out_channels) - 1} times), got {tuple(sample.shape[2:])}; resize or pad it."
        )
    if class_labels is not None and network.class_embedding is None:
        raise ValueError("class_labels were given to a network without classes; build it with num_class_embeds.")
    if class_labels is None and network.class_embedding is not None and not config.null_class:
        raise ValueError("class_labels must be given to this network; build it with null_class=True to omit them.")
    if augmentation_flags is not None:
        count = num_augmentation_flags(config)
        if not count:
            raise ValueError(
                "augmentation_flags were given to a network without that input; build it with augmentation_flag=True, "
                "or a VDMMultiscale2DModel with num_augmentation_flags."
            )
        allowed = [(len(sample), count)] + ([(len(sample),)] if count == 1 else [])
        if tuple(augmentation_flags.shape) not in allowed:
            raise ValueError(
                f"augmentation_flags must have shape {allowed[-1]}, got {tuple(augmentation_flags.shape)}."
            )
    _check_condition(config, sample, "cond_vectors", cond_vectors, "cond_dim", "null_vectors", 2)
    check_cond_images(config, sample, cond_images)


def check_sample(config: Any, sample: torch.Tensor) -> None:
    """Raises `ValueError` for a sample of another number of dimensions or channels."""
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(f"sample must have shape (B, {config.in_channels}, H, W), got {tuple(sample.shape)}.")


def check_cond_images(config: Any, sample: torch.Tensor, cond_images: torch.Tensor | None) -> None:
    """Raises `ValueError` for images that a network of ours cannot take as a condition of `sample`."""
    _check_condition(config, sample, "cond_images", cond_images, "cond_channels", "null_images", 4)
    if cond_images is not None and any(a > b for a, b in zip(cond_images.shape[2:], sample.shape[2:], strict=True)):
        raise ValueError(
            f"cond_images must be of at most the size of sample, {tuple(sample.shape[2:])}, got "
            f"{tuple(cond_images.shape[2:])}; make them smaller."
        )


def _check_condition(config, sample, name, value, size_name, null_name, ndim) -> None:
    """Raises `ValueError` unless a condition has the shape that the config states, and is given if it has no null."""
    size = config[size_name]
    if value is None:
        if size is not None and not config[null_name]:
            raise ValueError(f"{name} must be given to this network; build it with {null_name}=True to omit them.")
        return
    if size is None:
        raise ValueError(f"{name} were given to a network without them; build it with {size_name}.")
    if value.ndim != ndim or tuple(value.shape[:2]) != (len(sample), size):
        expected = f"({len(sample)}, {size}{', h, w' if ndim == 4 else ''})"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}.")


def check_condition_arguments(
    cond_dim=None, cond_mean=None, cond_std=None, null_vectors=False, cond_channels=None, null_images=False
) -> None:
    """Raises `ValueError` for arguments of a network of ours that do not describe its conditions."""
    for name, size in (("cond_dim", cond_dim), ("cond_channels", cond_channels)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {size!r}.")
    for name, numbers in (("cond_mean", cond_mean), ("cond_std", cond_std)):
        if numbers is None:
            continue
        if len(numbers) != cond_dim or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} must be cond_dim={cond_dim} finite numbers, got {len(numbers)} of them.")
    if cond_std is not None and not min(cond_std) > 0:
        raise ValueError(f"cond_std must be positive, got {min(cond_std)}; leave out numbers that are constant.")
    for name, null, needed, size in (
        ("null_vectors", null_vectors, "cond_dim", cond_dim),
        ("null_images", null_images, "cond_channels", cond_channels),
    ):
        if null and size is None:
            raise ValueError(f"{name} needs {needed}, got None.")
