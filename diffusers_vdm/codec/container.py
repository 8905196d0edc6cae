"""The format of a compressed file, version 1, or version 2 for files with conditions.

    signature, header, segment, segment, …, end

The header says how the network is used. A segment is a message of its own and holds at most 2^25 pixel values, or one
larger image, so the memory does not grow with the collection. Each part has a CRC-32. All numbers are LEB128, except
the words of a message, which are uint32 in little-endian order, the top of the stack first: of a truncated file, the
first images can still be decoded.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ..conditions import NAMES
from .errors import CodecError
from .integers import read_varint, write_varint

SIGNATURE = b"\x89VDM"
VERSION, VERSION_WITH_CONDITIONS = 1, 2
SEGMENT_VALUES = 1 << 25
HASH_BYTES = 8  # of the hash of a condition
CHECKED_VALUES = 1 << 15  # a CRC-32 covers at least as many values, or one image
_MOST_PART = 1 << 28  # bytes of a part other than a message
_SEGMENT, _END = 1, 0
_DTYPES = ("float64", "float32")
_VARIANCES = ("posterior", "optimal")
LAYOUTS = ("NCHW", "NHWC", "NHW", "files")


@dataclass(frozen=True)
class Header:
    """How a file was coded.

    Attributes:
        num_steps (`int`): T.
        levels (`tuple[int, ...]`, *optional*): the chosen levels of the chain on the grid of the scheduler; `None`
            for evenly spaced ones.
        variance (`"posterior"` or `"optimal"`): the variance of a step.
        spacing (`int`): spacing of the lattices in 1/64 of a standard deviation.
        dtype (`"float64"` or `"float32"`): of the network.
        shape (`tuple[int, int, int]`): C, H, W of the network.
        num_levels (`int`): levels of the pixels.
        image_size (`tuple[int, int]`, *optional*): height and width of all images; `None` if each has its own.
        layout (`str`): one of `LAYOUTS`, what a decoder should write.
        weights (`bytes`): 8 bytes of the hash of the weights.
        numbers (`bytes`): 4 bytes of the hash of the levels, spacings and variances.
        coder (`bytes`): 2 bytes of the hash of a test message of the entropy coder.
        versions (`str`): of torch, diffusers, constriction and this package.
        sides (`bytes`): recorded sides of rounded values, see rounding.py.
        conditions (`dict[str, bytes]`): the conditions that the decoder must be given, and 8 bytes of a hash of each.
    """

    num_steps: int
    levels: tuple[int, ...] | None
    variance: str
    spacing: int
    dtype: str
    shape: tuple[int, int, int]
    num_levels: int
    image_size: tuple[int, int] | None
    layout: str
    weights: bytes
    numbers: bytes
    coder: bytes
    versions: str
    sides: bytes = b"\0"
    conditions: dict[str, bytes] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the format."""
        return VERSION_WITH_CONDITIONS if self.conditions else VERSION

    def to_bytes(self) -> bytes:
        content = bytearray()
        flags = (
            _DTYPES.index(self.dtype)
            | _VARIANCES.index(self.variance) << 1
            | (self.levels is not None) << 2
            | (self.image_size is not None) << 3
            | LAYOUTS.index(self.layout) << 4
        )
        for value in (flags, self.num_steps, self.spacing, *self.shape, self.num_levels, *(self.image_size or ())):
            write_varint(content, value)
        if self.levels is not None:
            bits = np.zeros(self.levels[-1] + 1, dtype=np.uint8)
            bits[list(self.levels)] = 1
            packed = np.packbits(bits, bitorder="little").tobytes()
            write_varint(content, len(packed))
            content += packed
        content += self.weights + self.numbers + self.coder
        text = self.versions.encode()
        write_varint(content, len(text))
        content += text
        if self.conditions:
            write_varint(content, len(self.conditions))
        for name, digest in self.conditions.items():
            content += bytes([NAMES.index(name)]) + digest
        return bytes(content + self.sides)

    @classmethod
    def from_bytes(cls, content: bytes, version: int = VERSION) -> Header:
        at, values = 0, []
        for most in (63, 1 << 20, 1 << 12, 1 << 10, 1 << 16, 1 << 16, 1 << 16):
            value, at = read_varint(content, at, most)
            values.append(value)
        flags, num_steps, spacing, channels, height, width, num_levels = values
        if num_steps < 1 or spacing < 1 or channels * height * width < 1 or num_levels < 2:
            raise CodecError("the file is damaged: its header has impossible values.")
        image_size = None
        if flags & 8:
            rows, at = read_varint(content, at, 1 << 20)
            columns, at = read_varint(content, at, 1 << 20)
            image_size = (rows, columns)
            if rows < 1 or columns < 1:
                raise CodecError("the file is damaged: its header has impossible values.")
        levels = None
        if flags & 4:
            length, at = read_varint(content, at, 1 << 17)
            bits = np.unpackbits(np.frombuffer(_slice(content, at, length), dtype=np.uint8), bitorder="little")
            levels, at = tuple(np.flatnonzero(bits).tolist()), at + length
        weights, numbers, coder = _slice(content, at, 8), _slice(content, at + 8, 4), _slice(content, at + 12, 2)
        length, at = read_varint(content, at + 14, 1 << 10)
        versions = _slice(content, at, length).decode("utf-8", "replace")
        at += length
        conditions: dict[str, bytes] = {}
        if version == VERSION_WITH_CONDITIONS:
            count, at = read_varint(content, at, len(NAMES))
            for _ in range(count):
                name, digest = _slice(content, at, 1)[0], _slice(content, at + 1, HASH_BYTES)
                if name >= len(NAMES):
                    raise CodecError("the file is damaged: its header has impossible values.")
                conditions[NAMES[name]] = digest
                at += 1 + HASH_BYTES
        return cls(
            num_steps=num_steps,
            levels=levels,
            variance=_VARIANCES[flags >> 1 & 1],
            spacing=spacing,
            dtype=_DTYPES[flags & 1],
            shape=(channels, height, width),
            num_levels=num_levels,
            image_size=image_size,
            layout=LAYOUTS[flags >> 4],
            weights=weights,
            numbers=numbers,
            coder=coder,
            versions=versions,
            sides=content[at:],
            conditions=conditions,
        )


@dataclass
class Segment:
    """The description of one message, without its words.

    Attributes:
        images (`list[ImageEntry]`): the images, in order.
        num_plain (`int`): how many of the last tiles have the plain code.
        batches (`list[int]`): tiles of each batch, in the order of encoding, which is from the last tile to the first.
        checks (`list[int]`): a CRC-32 of each group of images, see [`check_groups`].
        sides (`bytes`): recorded sides of rounded values.
        num_words, words_check (`int`): length and CRC-32 of the message.
    """

    images: list[ImageEntry]
    num_plain: int
    batches: list[int]
    checks: list[int]
    sides: bytes
    num_words: int
    words_check: int

    def to_bytes(self, header: Header) -> bytes:
        content = bytearray()
        write_varint(content, len(self.images))
        if header.image_size is None:
            listed = json.dumps([[i.height, i.width, i.mode, i.name] for i in self.images], separators=(",", ":"))
            packed = zlib.compress(listed.encode(), 9)
            write_varint(content, len(packed))
            content += packed
        for value in (self.num_plain, len(self.batches), *_runs(self.batches)):
            write_varint(content, value)
        for check in self.checks:
            content += check.to_bytes(4, "little")
        write_varint(content, self.num_words)
        return bytes(content) + self.words_check.to_bytes(4, "little") + self.sides

    @classmethod
    def from_bytes(cls, content: bytes, header: Header) -> Segment:
        count, at = read_varint(content, 0, SEGMENT_VALUES)
        if header.image_size is None:
            length, at = read_varint(content, at, len(content))
            images = _entries(_slice(content, at, length), count)
            at += length
        else:
            height, width = header.image_size
            if count > max(1, SEGMENT_VALUES // (header.shape[0] * height * width)):
                raise CodecError("the file is damaged: a segment has too many images.")
            images = [ImageEntry(height, width)] * count
        num_plain, at = read_varint(content, at, 1 << 30)
        num_batches, at = read_varint(content, at, 1 << 26)
        batches: list[int] = []
        while len(batches) < num_batches:
            size, at = read_varint(content, at, 1 << 26)
            run, at = read_varint(content, at, num_batches - len(batches))
            if size < 1 or run < 1:
                raise CodecError("the file is damaged: an impossible batch.")
            batches += [size] * run
        groups = check_groups(images, header.shape[0])
        checks = []
        for _ in groups:
            checks.append(int.from_bytes(_slice(content, at, 4), "little"))
            at += 4
        num_words, at = read_varint(content, at, 1 << 30)
        words_check = int.from_bytes(_slice(content, at, 4), "little")
        return cls(images, num_plain, batches, checks, content[at + 4 :], num_words, words_check)


@dataclass(frozen=True)
class ImageEntry:
    """An image of a file: its size, and for files their name and mode."""

    height: int
    width: int
    mode: str = ""
    name: str = ""


def check_groups(images: list[ImageEntry], channels: int) -> list[int]:
    """The number of images that each CRC-32 covers."""
    groups, values, size = [], 0, 0
    for image in images:
        values, size = values + channels * image.height * image.width, size + 1
        if values >= CHECKED_VALUES:
            groups.append(size)
            values = size = 0
    return [*groups, size] if size else groups


def _runs(values: list[int]) -> list[int]:
    """Each value with how often it is repeated."""
    result: list[int] = []
    for value in values:
        if result and result[-2] == value:
            result[-1] += 1
        else:
            result += [value, 1]
    return result


def _entries(packed: bytes, count: int) -> list[ImageEntry]:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, _MOST_PART)
        listed: Any = json.loads(text)
        entries = [ImageEntry(int(h), int(w), str(mode), str(name)) for h, w, mode, name in listed]
    except (zlib.error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CodecError(f"the file is damaged: its list of images cannot be read ({error}).") from error
    if len(entries) != count or any(not (0 < e.height < 1 << 20 and 0 < e.width < 1 << 20) for e in entries):
        raise CodecError("the file is damaged: its list of images is impossible.")
    return entries


def _slice(content: bytes, at: int, length: int) -> bytes:
    if at + length > len(content):
        raise CodecError("the file is damaged: a part of it is too short.")
    return content[at : at + length]


# ---- files -------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a file in order; [`Writer.end`] must come last."""

    def __init__(self, file: BinaryIO, header: Header):
        self.file, self.header, self.num_images = file, header, 0
        self.size = file.write(SIGNATURE + bytes([header.version]))
        self._part(header.to_bytes())

    def segment(self, segment: Segment, words: np.ndarray) -> None:
        self.num_images += len(segment.images)
        self.size += self.file.write(bytes([_SEGMENT]))
        self._part(segment.to_bytes(self.header))
        self.size += self.file.write(message_bytes(words))

    def end(self) -> None:
        self.size += self.file.write(bytes([_END]))
        content = bytearray()
        write_varint(content, self.num_images)
        self._part(bytes(content))

    def _part(self, content: bytes) -> None:
        length = bytearray()
        write_varint(length, len(content))
        self.size += self.file.write(bytes(length) + content + zlib.crc32(content).to_bytes(4, "little"))


@dataclass
class Reader:
    """Reads a file in order.

    Attributes:
        header ([`Header`]): what it says.
        size (`int`): bytes read so far.
    """

    file: BinaryIO
    header: Header = field(init=False)
    size: int = 0

    def __post_init__(self):
        start = self.file.read(len(SIGNATURE) + 1)
        if start[: len(SIGNATURE)] != SIGNATURE:
            raise CodecError("the file is not one that `diffusers-vdm compress` wrote.")
        if len(start) == len(SIGNATURE):
            raise CodecError("the file is truncated.")
        if start[-1] not in (VERSION, VERSION_WITH_CONDITIONS):
            raise CodecError(
                f"the file has version {start[-1]} of the format, and this package reads {VERSION} and "
                f"{VERSION_WITH_CONDITIONS}."
            )
        self.size = len(start)
        self.header = Header.from_bytes(self._part(), start[-1])

    def segments(self, keep: bool = False):
        """Yields each segment with its words; `keep` yields a damaged or truncated message as well.

        Raises: [`CodecError`] if a part is damaged or the end is missing.
        """
        count = 0
        while True:
            kind = self.file.read(1)
            self.size += len(kind)
            if kind == bytes([_END]):
                total, _ = read_varint(self._part(), 0, 1 << 62)
                if total != count or self.file.read(1):
                    raise CodecError("the file is damaged: its end does not fit its content.")
                return
            if kind != bytes([_SEGMENT]):
                raise CodecError("the file is damaged or truncated: a segment is missing.")
            segment = Segment.from_bytes(self._part(), self.header)
            count += len(segment.images)
            content = self.file.read(4 * segment.num_words)
            self.size += len(content)
            whole = len(content) == 4 * segment.num_words and zlib.crc32(content) == segment.words_check
            damage = CodecError("the file is damaged or truncated: the message of a segment has another checksum.")
            if not whole and not keep:
                raise damage
            content += bytes(4 * segment.num_words - len(content)) if segment.num_words < 1 << 28 else b""
            yield segment, message_words(content)
            if not whole:
                raise damage

    def _part(self) -> bytes:
        length = shift = 0
        while True:
            byte = self.file.read(1)
            if not byte or shift > 35:
                raise CodecError("the file is truncated.")
            length |= (byte[0] & 127) << shift
            shift += 7
            self.size += 1
            if byte[0] < 128:
                break
        if length > _MOST_PART:
            raise CodecError("the file is damaged: a part has an impossible length.")
        content, check = self.file.read(length), self.file.read(4)
        self.size += len(content) + len(check)
        if len(content) < length or len(check) < 4:
            raise CodecError("the file is truncated.")
        if zlib.crc32(content) != int.from_bytes(check, "little"):
            raise CodecError("the file is damaged: a part has another checksum.")
        return content


def message_bytes(words: np.ndarray) -> bytes:
    """A message as it is in a file, the top of the stack first."""
    return np.ascontiguousarray(words[::-1], dtype="<u4").tobytes()


def message_check(words: np.ndarray) -> int:
    """The CRC-32 of a message."""
    return zlib.crc32(message_bytes(words))


def message_words(content: bytes) -> np.ndarray:
    """The inverse of [`message_bytes`]."""
    return np.frombuffer(content, dtype="<u4")[::-1].astype(np.uint32)
