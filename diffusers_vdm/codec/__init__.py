"""Lossless compression in which an image costs its variational bound: bits-back coding with a diffusion model.

from diffusers_vdm.codec import compress, decompress

summary = compress(pipe, images, "images.vdm", num_steps=100)
same = decompress(pipe, "images.vdm")
"""

from .errors import CodecError
from .files import compress, decompress, iterate
from .summary import CompressionSummary

__all__ = ["CodecError", "CompressionSummary", "compress", "decompress", "iterate"]
