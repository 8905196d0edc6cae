"""The errors of the codec."""

from __future__ import annotations


class CodecError(ValueError):
    """A file that cannot be decoded: it is damaged, from another model, or this machine computes other numbers."""


class NotCodable(Exception):  # as below
    """A latent is too far from its mean for the network's code."""


class NotEnoughBits(Exception):  # a signal within the encoder, never seen by a user
    """The stack has too few bits to draw the latents of a batch."""


def codec_error(what: str) -> CodecError:
    """The error of an impossible value while decoding."""
    return CodecError(
        f"the file cannot be decoded ({what}): it is damaged, or this machine computes other numbers than the one "
        "that wrote it."
    )
