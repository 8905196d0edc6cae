"""One message of a file: its first bits are images in a plain code, and the network codes the others on top of them.

A bits-back code needs bits on the stack before it can draw latents. Here these are the plain code of a few images. The
batches grow with the stack, since each image leaves more bits on it. The tiles are encoded from the last to the first,
so that decoding yields them in order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .chain_code import Accounts, ChainCode
from .conditions import rows_of_tiles
from .container import ImageEntry, Segment, check_groups, message_check
from .errors import CodecError, NotCodable, NotEnoughBits, codec_error
from .model import CodingModel
from .plain import pop_plain, push_plain
from .rounding import Rounding
from .stack import Stack
from .tiles import join, padded, real_pixels, repeat_edges, split, tile_sizes

_FIRST_GUESS = 4.5  # bits of a value that a batch takes from the stack
_SLACK = 1.05
_LEFT_BITS = 128
_PLAIN_SAMPLE = 64  # tiles for which the plain code of all is estimated, if there are more


@dataclass
class Spent:
    """Where the bits of segments went.

    Attributes:
        plain_bits, plain_values, plain_tiles (`int`): the images in plain code.
        model_bits (`int`), model_values (`int`), bound_bits (`float`): the images that the network codes.
        edge_values (`int`): rounded values whose side is recorded.
    """

    plain_bits: int = 0
    plain_values: int = 0
    plain_tiles: int = 0
    model_bits: int = 0
    model_values: int = 0
    bound_bits: float = 0.0
    edge_values: int = 0

    def add(self, other: Spent) -> None:
        """Adds those of another segment."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# ---- encoding ----------------------------------------------------------------------------------------------------


def encode_segment(
    model: CodingModel,
    images: list[np.ndarray],
    entries: list[ImageEntry],
    first: int,
    max_batch: int,
    tick: Callable[[int], object],
) -> tuple[Segment, np.ndarray, Spent]:
    """Encodes images `(C, H, W)` as one message.

    Args:
        model ([`CodingModel`]): from `model_to_encode`.
        images (`list[np.ndarray]`): integers.
        entries (`list[ImageEntry]`): their descriptions.
        first (`int`): how many images of the file come before them.
        max_batch (`int`): tiles that are coded at the same time at most.
        tick (`Callable`): called with the number of tiles after each network call.

    Returns: the description, the words of the message, and what was spent.
    """
    header = model.header
    size = header.shape[1:]
    tiles = [tile for image in images for tile in split(image, size)]
    rounding = Rounding(model.tolerance)
    code = ChainCode(model.levels, model.steps, header.num_levels, rounding)
    conditions = rows_of_tiles(model.conditions, entries, first, header.shape)
    coded = _encode_tiles(code, tiles, conditions, model, max_batch, tick)
    if coded is None or (coded[1] and _plain_may_be_smaller(tiles, header.num_levels, coded[0].bits, model)):
        plain, spent = _plain_stack(tiles, header.num_levels, model)
        if coded is None or plain.bits < coded[0].bits:
            rounding.forget(0)
            coded = plain, [], len(tiles), spent
    stack, batches, num_plain, spent = coded
    spent.plain_tiles, spent.edge_values = num_plain, len(rounding.sides)
    words, groups, at = stack.words(), [], 0
    for count in check_groups(entries, header.shape[0]):
        groups.append(images[at : at + count])
        at += count
    segment = Segment(
        images=entries,
        num_plain=num_plain,
        batches=batches,
        checks=[_pixel_check(group, header.num_levels) for group in groups],
        sides=rounding.to_bytes(),
        num_words=len(words),
        words_check=message_check(words),
    )
    return segment, words, spent


def _encode_tiles(
    code: ChainCode,
    tiles: list[np.ndarray],
    conditions: Mapping[str, torch.Tensor],
    model: CodingModel,
    max_batch: int,
    tick: Callable[[int], object],
) -> tuple[Stack, list[int], int, Spent] | None:
    """The message, the sizes of its batches, the number of tiles in plain code, and what was spent.

    `None` if a latent is too far from its mean, as it is for images that the network does not expect at all.
    """
    header, dims = model.header, int(np.prod(model.header.shape))
    needs = _FIRST_GUESS * dims  # bits of a tile, corrected by each batch
    num_plain = 0
    while True:
        # as many tiles in plain code as the first batch of one tile needs
        num_plain = min(max(num_plain + 1, num_plain * 5 // 4), len(tiles))
        stack, spent = _plain_stack(tiles[len(tiles) - num_plain :], header.num_levels, model)
        if num_plain == len(tiles):
            return stack, [], num_plain, spent
        if stack.bits < _SLACK * needs + _LEFT_BITS:
            continue
        batches: list[int] = []
        rest, position = len(tiles) - num_plain, 0
        while rest:
            count = int((stack.bits - _LEFT_BITS) / (_SLACK * needs))
            count = min(max(count, 1), max_batch, rest)
            before, trial = stack.bits, stack.copy()
            here = slice(rest - count, rest)
            batch, of_batch = tiles[here], model.steps.rows(conditions, here)
            try:
                accounts = _encode_batch(code, trial, batch, of_batch, model, position, tick)
            except NotEnoughBits:
                code.rounding.forget(position)
                needs *= 1.25
                if count == 1:
                    break
                continue
            except NotCodable:
                return None
            stack, needs = trial, max(0.8 * needs, (before - accounts.low) / count)
            spent.model_bits += stack.bits - before
            spent.model_values += sum(tile.size for tile in batch)
            spent.bound_bits += float(accounts.bound.sum())
            batches.append(count)
            position += code.positions(count)
            rest -= count
        if rest == 0:
            return stack, batches, num_plain, spent
        code.rounding.forget(0)


def _encode_batch(
    code: ChainCode,
    stack: Stack,
    batch: list[np.ndarray],
    conditions: Mapping[str, torch.Tensor],
    model: CodingModel,
    position: int,
    tick: Callable[[int], object],
) -> Accounts:
    shape = model.header.shape
    items = padded(batch, shape[1:]).reshape(len(batch), -1)
    real = real_pixels([tile.shape[1:] for tile in batch], shape)
    return code.encode(stack, items, real, position, tick, conditions)


def _plain_stack(tiles: list[np.ndarray], num_levels: int, model: CodingModel) -> tuple[Stack, Spent]:
    stack = Stack(tables=model.tables)
    push_plain(stack, tiles, num_levels)
    return stack, Spent(plain_bits=stack.bits, plain_values=sum(tile.size for tile in tiles))


def _plain_may_be_smaller(tiles: list[np.ndarray], num_levels: int, bits: int, model: CodingModel) -> bool:
    """Whether the plain code of all tiles probably has fewer bits, by that of a sample of many tiles."""
    step = max(1, len(tiles) // _PLAIN_SAMPLE)
    sample = tiles[::step]
    values = sum(tile.size for tile in sample)
    own = _plain_stack(sample, num_levels, model)[0].bits / values
    return own < 1.1 * bits / sum(tile.size for tile in tiles)  # a sample has less time to adapt


def _pixel_check(images: list[np.ndarray], num_levels: int) -> int:
    """The CRC-32 of a group of images."""
    return zlib.crc32(b"".join(_bytes_of(image, num_levels) for image in images))


def _bytes_of(image: np.ndarray, num_levels: int) -> bytes:
    return np.ascontiguousarray(image, dtype=np.uint8 if num_levels <= 256 else "<u2").tobytes()


# ---- decoding ----------------------------------------------------------------------------------------------------


def decode_segment(
    model: CodingModel,
    segment: Segment,
    words: np.ndarray,
    first: int,
    tick: Callable[[int], object],
    inspect: Callable[[Accounts, np.ndarray], object] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the images of a message in order, int64 `(C, H, W)`, each after its checksum was found right.

    Args:
        model ([`CodingModel`]): from `model_to_decode`.
        segment, words: from `Reader.segments`.
        first, tick: as in [`encode_segment`].
        inspect (`Callable`, *optional*): called with the [`Accounts`] and the items of each batch, `(B, D)`.

    Raises: [`CodecError`] if the message is damaged or this machine computes other numbers, `ValueError` as
        [`rows_of_tiles`].
    """
    header = model.header
    sizes = [tile_sizes(entry.height, entry.width, header.shape[1:]) for entry in segment.images]
    counts = [len(of_image) for of_image in sizes]
    conditions = rows_of_tiles(model.conditions, segment.images, first, header.shape)
    decoded = _tiles(model, segment, words, [s for of_image in sizes for s in of_image], conditions, tick, inspect)
    groups, at = check_groups(segment.images, header.shape[0]), 0
    for size, check in zip(groups, segment.checks, strict=True):
        images = []
        for entry, count in zip(segment.images[at : at + size], counts[at : at + size], strict=True):
            tiles = [next(decoded) for _ in range(count)]
            images.append(join(tiles, entry.height, entry.width, header.shape[1:]))
        if _pixel_check(images, header.num_levels) != check:
            raise codec_error("the pixels have another checksum")
        yield from images
        at += size


def _tiles(
    model: CodingModel,
    segment: Segment,
    words: np.ndarray,
    sizes: list[tuple[int, int]],
    conditions: Mapping[str, torch.Tensor],
    tick: Callable[[int], object],
    inspect: Callable[[Accounts, np.ndarray], object] | None,
) -> Iterator[np.ndarray]:
    header, shape = model.header, model.header.shape
    if sum(segment.batches) + segment.num_plain != len(sizes) or (len(words) and words[-1] == 0):
        raise CodecError("the file is damaged: the parts of a segment do not fit together.")
    sides, end = Rounding.sides_from(segment.sides, 0)
    if end != len(segment.sides):
        raise CodecError("the file is damaged: the parts of a segment do not fit together.")
    code = ChainCode(model.levels, model.steps, header.num_levels, Rounding(model.tolerance, sides))
    stack = Stack(words, model.tables)
    stack.measures = inspect is not None
    position, at = sum(code.positions(count) for count in segment.batches), 0
    for count in reversed(segment.batches):
        position -= code.positions(count)
        of_batch = sizes[at : at + count]
        rows = model.steps.rows(conditions, slice(at, at + count))

        def fill(items: np.ndarray, of_batch: list[tuple[int, int]] = of_batch) -> np.ndarray:
            images = items.reshape(-1, *shape)
            repeat_edges(images, of_batch)
            return images.reshape(len(of_batch), -1)

        items, accounts = code.decode(stack, real_pixels(of_batch, shape), fill, position, tick, rows)
        if inspect is not None:
            inspect(accounts, items)
        for item, (height, width) in zip(items.reshape(-1, *shape), of_batch, strict=True):
            yield item[:, :height, :width]
        at += count
    rest = [(shape[0], height, width) for height, width in sizes[at:]]
    if rest:
        yield from pop_plain(stack, rest, header.num_levels)
    if stack.bits:
        raise codec_error("bits are left over")
