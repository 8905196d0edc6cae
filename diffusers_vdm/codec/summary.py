"""What a compressed file costs, in bits/dim."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CompressionSummary:
    """The sizes of a compressed file. A dim is a value of a pixel: one of its channels.

    Attributes:
        file_bpd (`float`): the whole file, with its header and initial bits.
        marginal_bpd (`float`): what an image adds to a file that has begun, NaN if no image is coded by the network.
        bound_bpd (`float`): the bound of these images at this number of steps and variance, at the latents of the
            code; NaN as above. `marginal_bpd` differs from it by the noise of a single draw of the latents.
        plain_bpd (`float`): the plain code of the first images.
        num_images, num_plain_images (`int`): all images, and how many of their tiles have the plain code.
        num_values (`int`): values of all pixels.
        file_bytes (`int`): size of the file.
        initial_bits (`int`): bits of the plain code, which the network's code starts from; all bits if nothing else
            is in the file.
        num_steps (`int`): T.
        num_edge_values (`int`): rounded values whose side the file records, see rounding.py.
        model_bytes (`int`): size of the weights that a decoder needs, in float32.
        seconds (`float`): time of encoding, without the verification.
        verified (`bool`): whether another process has decoded the file.
    """

    file_bpd: float
    marginal_bpd: float
    bound_bpd: float
    plain_bpd: float
    num_images: int
    num_plain_images: int
    num_values: int
    file_bytes: int
    initial_bits: int
    num_steps: int
    num_edge_values: int
    model_bytes: int
    seconds: float
    verified: bool

    @property
    def is_plain(self) -> bool:
        """Whether all images have the plain code, because the collection is too small for the network's code."""
        return self.marginal_bpd != self.marginal_bpd

    def to_json(self) -> dict[str, Any]:
        """The attributes; NaN is `None`."""
        return {name: None if value != value else value for name, value in asdict(self).items()}
