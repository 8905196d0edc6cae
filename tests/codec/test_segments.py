"""codec/segments.py: what happens if the network's code is not possible, or not enough for its latents."""

import numpy as np
import pytest

from diffusers_vdm.codec import compress, decompress, segments
from diffusers_vdm.codec.errors import NotCodable
from tests.codec.models import draw_pixels, pixel_pipeline

QUIET = {"verify": False, "progress_bar": False, "num_steps": 40}


def test_latents_that_cannot_be_coded_leave_the_plain_code(tmp_path):
    """A network with an enormous error: latents are more than 2^24 lattice steps from their means."""
    pipe, probabilities = pixel_pipeline((1, 4, 4))
    images = draw_pixels(probabilities, (60, 1, 4, 4))
    assert not compress(pipe, images, tmp_path / "f", **QUIET).is_plain
    pipe.unet.shift = 1e9
    assert compress(pipe, images, tmp_path / "f", **QUIET).is_plain
    assert decompress(pipe, tmp_path / "f", progress_bar=False).equal(images)


@pytest.mark.parametrize("guess", [0.2, 1.0, 60.0])
def test_a_wrong_guess_of_the_bits_that_a_batch_needs_is_corrected(tmp_path, monkeypatch, guess):
    """Too low: the first batches find too few bits, and are tried again. Too high: more images have the plain code."""
    monkeypatch.setattr(segments, "_FIRST_GUESS", guess)
    pipe, probabilities = pixel_pipeline((1, 4, 4))
    images = draw_pixels(probabilities, (120, 1, 4, 4))
    summary = compress(pipe, images, tmp_path / "f", **QUIET)
    assert not summary.is_plain and summary.num_plain_images < 40
    assert decompress(pipe, tmp_path / "f", progress_bar=False).equal(images)


def test_batches_grow_with_the_stack(tmp_path):
    from diffusers_vdm.codec.files import read_headers

    pipe, probabilities = pixel_pipeline((1, 4, 4))
    images = draw_pixels(probabilities, (400, 1, 4, 4))
    compress(pipe, images, tmp_path / "f", batch_size=32, **QUIET)
    [segment] = read_headers(tmp_path / "f")[1]
    assert segment.batches[0] <= 4 and max(segment.batches) == 32
    assert sum(segment.batches) + segment.num_plain == 400
    grown = np.maximum.accumulate(segment.batches)
    assert (np.diff(grown) > 0).sum() >= 3


def test_errors_of_the_encoder_are_not_errors_of_a_file():
    assert not issubclass(NotCodable, ValueError)


def test_many_images_of_no_information_take_no_time(tmp_path):
    """Their plain code never pays the initial bits, and is computed for ever larger parts of the collection."""
    pipe, _ = pixel_pipeline((1, 4, 4))
    images = np.full((2000, 1, 4, 4), 7, dtype=np.uint8)
    summary = compress(pipe, images, tmp_path / "f", **QUIET)
    assert summary.is_plain and summary.file_bpd < 0.5  # the first pixel of each
    assert decompress(pipe, tmp_path / "f", progress_bar=False).shape == images.shape
