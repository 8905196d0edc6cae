"""Integers of any size as bytes: seven bits a byte, the lowest first (LEB128)."""

from __future__ import annotations

from .errors import CodecError


def write_varint(content: bytearray, value: int) -> None:
    """Appends an integer of at least 0."""
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    content.append(value)


def read_varint(content: bytes, at: int, most: int) -> tuple[int, int]:
    """The integer at an offset, and the offset behind it; raises [`CodecError`] beyond the end or above `most`."""
    value = shift = 0
    while True:
        if at >= len(content) or shift > 63:
            raise CodecError("the file is damaged: it ends within a number.")
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if value > most:
        raise CodecError(f"the file is damaged: a number is {value}, and at most {most} is possible.")
    return value, at
