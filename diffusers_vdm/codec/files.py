"""Compress images into a file, and decompress them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from .. import call_arguments
from ..calibration import Variance
from ..files import whole_file
from .chain_code import Accounts
from .conditions import check_count
from .container import SEGMENT_VALUES, Header, ImageEntry, Reader, Segment, Writer
from .errors import CodecError
from .model import CodingModel, Dtype, Timesteps, model_to_decode, model_to_encode, num_levels_of
from .rounding import Rounding
from .segments import Spent, decode_segment, encode_segment
from .sources import Images, images_of
from .summary import CompressionSummary
from .tiles import tile_sizes

logger = logging.get_logger(__name__)


def compress(
    pipe: Any,
    images: torch.Tensor | np.ndarray | Images | Iterable[tuple[ImageEntry, np.ndarray]],
    path: str | os.PathLike,
    *,
    num_steps: int = 100,
    timesteps: Timesteps | None = None,
    variance: Variance | None = None,
    spacing: float = 1.0,
    dtype: Dtype = "float64",
    batch_size: int = 64,
    verify: bool = True,
    progress_bar: bool = True,
    **conditions: torch.Tensor | None,
) -> CompressionSummary:
    """Writes images into a file from which [`decompress`] gets the same pixels back.

    Bits-back coding with the T-step chain of a diffusion model: the bits that the file grows by for each image are the
    bound that `evaluate_vlb` measures at the same T and variance, on average over the draws of the latents. A decoder
    needs the file and the same pipeline. It may run on another machine, with other numbers of threads.

    Args:
        pipe (`DiffusionPipeline`): with a `unet`, a `scheduler` of ours or one of diffusers with betas, and
            the `num_levels` of the pixels in its config, else 256.
        images (integer `torch.Tensor` or `np.ndarray` of shape `(N, C, H, W)`, or an iterable): in [0, num_levels).
            Images of another height or width than the network's are cut into tiles. An iterable yields pairs of an
            `ImageEntry` and an array `(C, H, W)`, and is read once.
        path (`str` or `os.PathLike`): the file to write.
        num_steps (`int`, defaults to 100): T, the network calls for each image. More of them give a smaller file.
        timesteps (`"best"` or `"uniform"`, *optional*): defaults to the best ones, if the scheduler has a calibration
            and T is at most 256, the number of levels among which they are chosen.
        variance (`"posterior"` or `"optimal"`, *optional*): defaults to the optimal one, if it has a calibration.
        spacing (`float`, defaults to 1): distance of the latents' values in standard deviations. A smaller one needs
            more initial bits and gains nothing; at 2 an image costs about 0.008 bits/dim more.
        dtype (`"float64"` or `"float32"`, defaults to `"float64"`): of the network. A file of float32 can be decoded
            on the same machine, with the same versions, threads and batch size.
        batch_size (`int`, defaults to 64): images that the network sees at once.
        verify (`bool`, defaults to `True`): decode the file in another process, with another number of threads and
            another batch size, before it replaces an earlier one.
        progress_bar (`bool`, defaults to `True`): show progress.
        conditions (`torch.Tensor`): those of the network, with a row for each image: `class_labels`, `cond_vectors`,
            `cond_images`, `encoder_hidden_states` and `encoder_attention_mask`. The file has a hash of them, and
            not the conditions themselves: [`decompress`] must be given the same ones. `cond_images` of networks of
            train.py are x in [−1, 1], `x_from_levels(levels, num_levels)`.

    Returns: [`CompressionSummary`].
    Raises: `TypeError` or `ValueError` for images and pipelines that cannot be coded, [`CodecError`] if the file could
        not be verified; `path` is then as before.
    """
    num_steps = call_arguments.positive_integer("num_steps", num_steps)
    batch_size = call_arguments.positive_integer("batch_size", batch_size)
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"path must name a file in an existing folder, got {os.fspath(path)!r}.")
    given = images_of(images, num_levels_of(pipe))
    start = time.perf_counter()
    model = model_to_encode(
        pipe,
        num_steps=num_steps,
        timesteps=timesteps,
        variance=variance,
        spacing=spacing,
        dtype=dtype,
        batch_size=batch_size,
        image_size=given.size,
        layout=given.layout,
        conditions=conditions,
    )
    if isinstance(images, torch.Tensor | np.ndarray):  # the number of others is not known yet
        check_count(model.conditions, len(images))
    spent = Spent(edge_values=len(Rounding.sides_from(model.header.sides, 0)[0]))
    with whole_file(path) as file:
        writer = Writer(file, model.header)
        with tqdm(desc="compressing", unit="call", disable=not progress_bar, leave=False) as bar:
            for entries, arrays in _segments(given.pairs, model):
                tiles = sum(len(tile_sizes(entry.height, entry.width, model.header.shape[1:])) for entry in entries)
                bar.total = (bar.total or 0) + tiles * num_steps
                bar.refresh()
                first = writer.num_images
                segment, words, of_segment = encode_segment(model, arrays, entries, first, batch_size, bar.update)
                writer.segment(segment, words)
                spent.add(of_segment)
        if writer.num_images == 0:
            raise ValueError("images must not be empty, got none.")
        check_count(model.conditions, writer.num_images)
        writer.end()
        seconds = time.perf_counter() - start
        if verify:
            from .verification import verify_file

            file.flush()
            is_portable = dtype == "float64"
            verify_file(
                pipe, file.name, batch_size, model.conditions, is_portable=is_portable, progress_bar=progress_bar
            )
    values = spent.plain_values + spent.model_values
    unknown = math.nan
    return CompressionSummary(
        file_bpd=8 * writer.size / values,
        marginal_bpd=spent.model_bits / spent.model_values if spent.model_values else unknown,
        bound_bpd=spent.bound_bits / spent.model_values if spent.model_values else unknown,
        plain_bpd=spent.plain_bits / spent.plain_values if spent.plain_values else unknown,
        num_images=writer.num_images,
        num_plain_images=spent.plain_tiles,
        num_values=values,
        file_bytes=writer.size,
        initial_bits=spent.plain_bits,
        num_steps=num_steps,
        num_edge_values=spent.edge_values,
        model_bytes=sum(4 * t.numel() for t in pipe.unet.state_dict().values()),
        seconds=seconds,
        verified=verify,
    )


def decompress(
    pipe: Any,
    path: str | os.PathLike,
    *,
    batch_size: int = 64,
    keep: bool = False,
    progress_bar: bool = True,
    **conditions: torch.Tensor | None,
) -> torch.Tensor | list[torch.Tensor]:
    """The images in a file, with the pixels that [`compress`] was given.

    Args:
        pipe (`DiffusionPipeline`): the one that the file was written with.
        path (`str` or `os.PathLike`): the file.
        batch_size (`int`, defaults to 64): images that the network sees at once.
        keep (`bool`, defaults to `False`): return the images before a damaged part, with a warning, instead of
            raising. Small images are only returned in groups of 32,768 values, which share a checksum.
        progress_bar (`bool`, defaults to `True`): show progress.
        conditions (`torch.Tensor`): those that [`compress`] was given, with a row for each image.

    Returns: uint8 `torch.Tensor` of shape `(N, C, H, W)`, int32 for more than 256 levels; a list of tensors
        `(C, H, W)` for images of several sizes.
    Raises: [`CodecError`] for a file that is damaged or from another model. No image is returned whose checksum is
        wrong.
    """
    images = []
    with opened(pipe, path, batch_size, conditions) as (reader, model):  # another model is no damage
        try:
            for _, image in decoded(reader, model, keep=keep, progress_bar=progress_bar):
                images.append(image)
        except CodecError as error:
            if not keep:
                raise
            logger.warning(f"{len(images)} images before a damage are kept: {error}")
    if images and all(image.shape == images[0].shape for image in images):
        return torch.stack(images)
    return images


def iterate(
    pipe: Any,
    path: str | os.PathLike,
    *,
    batch_size: int = 64,
    keep: bool = False,
    progress_bar: bool = True,
    **conditions: torch.Tensor | None,
) -> Iterator[tuple[ImageEntry, torch.Tensor]]:
    """Yields each image of a file with its description, in order, without holding all of them in memory.

    Arguments and errors are those of [`decompress`]; with `keep`, it yields what comes before a damage, then raises.
    """
    with opened(pipe, path, batch_size, conditions) as (reader, model):
        yield from decoded(reader, model, keep=keep, progress_bar=progress_bar)


@contextmanager
def opened(
    pipe: Any, path: str | os.PathLike, batch_size: int, conditions: Mapping[str, torch.Tensor | None]
) -> Iterator[tuple[Reader, CodingModel]]:
    """A file and the model that decodes it; raises [`CodecError`] if it was written with another one."""
    batch_size = call_arguments.positive_integer("batch_size", batch_size)
    with open(path, "rb") as file, _clear_errors():
        reader = Reader(file)
        yield reader, model_to_decode(pipe, reader.header, batch_size, conditions)


def decoded(
    reader: Reader,
    model: CodingModel,
    *,
    keep: bool = False,
    progress_bar: bool = True,
    inspect: Callable[[Accounts, np.ndarray], object] | None = None,
) -> Iterator[tuple[ImageEntry, torch.Tensor]]:
    """The images of an opened file; `inspect` is called with the [`Accounts`] and the integers of each batch."""
    dtype = torch.uint8 if reader.header.num_levels <= 256 else torch.int32
    with _clear_errors(), tqdm(desc="decompressing", unit="call", disable=not progress_bar, leave=False) as bar:
        first = 0
        for segment, words in reader.segments(keep):
            bar.total = (bar.total or 0) + sum(segment.batches) * reader.header.num_steps
            bar.refresh()
            images = decode_segment(model, segment, words, first, bar.update, inspect)
            first += len(segment.images)
            for entry, image in zip(segment.images, images, strict=False):
                yield entry, torch.from_numpy(np.ascontiguousarray(image)).to(dtype)


def read_header(path: str | os.PathLike) -> Header:
    """The header of a file."""
    with open(path, "rb") as file, _clear_errors():
        return Reader(file).header


def read_headers(path: str | os.PathLike) -> tuple[Reader, list[Segment]]:
    """The header and the segments of a file, which is read to its end and checked, but not decoded."""
    with open(path, "rb") as file, _clear_errors():
        reader = Reader(file)
        return reader, [segment for segment, _ in reader.segments()]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turns the errors that damaged numbers cause in numpy and in constriction into [`CodecError`]."""
    try:
        yield
    except CodecError:
        raise
    except (ArithmeticError, IndexError, AssertionError) as error:
        raise CodecError(f"the file is damaged: {error}") from error
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # constriction's, which is no `Exception`
            raise CodecError(f"the file is damaged: {error}") from error
        raise


def _pair(pair: Any) -> tuple[ImageEntry, Any]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], ImageEntry)):
        raise TypeError(
            f"images must be one tensor or array, or yield pairs of an ImageEntry and an array, got a "
            f"{type(pair).__name__}."
        )
    return pair


def _segments(
    pairs: Iterable[tuple[ImageEntry, np.ndarray]], model: CodingModel
) -> Iterator[tuple[list[ImageEntry], list[np.ndarray]]]:
    """Groups of images that are coded as one message, checked."""
    channels, num_levels = model.header.shape[0], model.header.num_levels
    entries: list[ImageEntry] = []
    arrays: list[np.ndarray] = []
    values = 0
    for i, (entry, given) in enumerate(map(_pair, pairs)):
        image = np.asarray(given)
        what = f" for image {i}{f', {entry.name}' if entry.name else ''}"
        if not np.issubdtype(image.dtype, np.integer):
            raise TypeError(f"images must hold integers in [0, {num_levels}), got {image.dtype}{what}.")
        if image.ndim != 3 or image.shape[0] != channels:
            raise ValueError(
                f"images must have the {channels} channels of the network, got shape {image.shape}{what}; convert "
                "them, or use a model for them."
            )
        if (entry.height, entry.width) != image.shape[1:]:
            raise ValueError(f"images must have the size of their ImageEntry, got {entry} and {image.shape}{what}.")
        if image.size == 0 or image.min() < 0 or image.max() >= num_levels:
            found = f"values from {image.min()} to {image.max()}" if image.size else "no pixels"
            raise ValueError(f"images must have values within [0, {num_levels}), got {found}{what}.")
        if values and values + image.size > SEGMENT_VALUES:
            yield entries, arrays
            entries, arrays, values = [], [], 0
        entries.append(entry)
        arrays.append(image)
        values += image.size
    if entries:
        yield entries, arrays
