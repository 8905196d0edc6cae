"""codec/files.py: every image comes back with its pixels, at the size that the bound promises, or not at all."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vdm import VDMScheduler, calibrate, evaluate_vlb
from diffusers_vdm.codec import CodecError, compress, decompress, files, iterate, model
from diffusers_vdm.codec.container import SIGNATURE, ImageEntry, Reader, Segment, Writer, message_check
from diffusers_vdm.codec.files import read_headers
from diffusers_vdm.codec.sources import images_of_npz
from tests.codec.models import draw_pixels, pixel_pipeline

QUIET = {"progress_bar": False}


def pack(pipe, images, path, **arguments):
    return compress(pipe, images, path, **{"verify": False, "num_steps": 40} | QUIET | arguments)


@pytest.fixture(scope="module")
def pixels():
    """A pipeline for 256 levels, 60 of its images, and a file of them that the network codes."""
    pipe, probabilities = pixel_pipeline((3, 4, 4))
    return pipe, draw_pixels(probabilities, (60, 3, 4, 4))


@pytest.fixture(scope="module")
def packed(pixels, tmp_path_factory):
    pipe, images = pixels
    path = tmp_path_factory.mktemp("packed") / "images.vdm"
    summary = pack(pipe, images, path, batch_size=8)
    assert not summary.is_plain
    return path, summary


# ---- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("num_levels", [2, 3, 17, 256, 300])
def test_images_come_back_bit_for_bit(tmp_path, channels, num_levels):
    pipe, probabilities = pixel_pipeline((channels, 4, 3), num_levels)
    images = draw_pixels(probabilities, (40, channels, 4, 3))
    summary = pack(pipe, images, tmp_path / "f")
    back = decompress(pipe, tmp_path / "f", **QUIET)
    assert back.equal(images) and back.dtype == images.dtype
    assert summary.file_bytes == (tmp_path / "f").stat().st_size
    assert summary.file_bpd == pytest.approx(8 * summary.file_bytes / images.numel())
    assert summary.num_images == 40 and summary.num_values == images.numel()


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(data=st.data())
def test_anything_comes_back(tmp_path_factory, data):
    channels = data.draw(st.sampled_from([1, 3, 4]))
    num_levels = data.draw(st.integers(2, 256))
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    count = data.draw(st.integers(1, 12))
    kind = data.draw(st.sampled_from(["noise", "constant", "model", "two"]))
    pipe, probabilities = pixel_pipeline((channels, 4, 4), num_levels)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (count, channels, *size)
    images = {
        "noise": rng.integers(0, num_levels, shape),
        "constant": np.full(shape, rng.integers(0, num_levels)),
        "model": draw_pixels(probabilities, shape).numpy(),
        "two": rng.choice([0, num_levels - 1], size=shape),
    }[kind].astype(np.uint8)
    path = tmp_path_factory.mktemp("any") / "f"
    steps = data.draw(st.integers(1, 5))
    pack(pipe, images, path, num_steps=steps, batch_size=data.draw(st.integers(1, 9)))
    assert decompress(pipe, path, batch_size=3, **QUIET).equal(torch.from_numpy(images))


def test_images_that_the_model_does_not_expect_come_back_from_its_code(pixels, tmp_path):
    """Of 60 images, a few are noise: the network codes them at a high price, with escapes."""
    pipe, images = pixels
    images = images.clone()
    images[5:9] = torch.randint(0, 256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    summary = pack(pipe, images, tmp_path / "f")
    assert not summary.is_plain
    assert decompress(pipe, tmp_path / "f", **QUIET).equal(images)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_decoder_may_have_another_batch_size(pixels, packed, batch_size):
    assert decompress(pixels[0], packed[0], batch_size=batch_size, **QUIET).equal(pixels[1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"timesteps": "uniform"},
        {"spacing": 0.25},
        {"spacing": 2.0},
        {"dtype": "float32"},
        {"num_steps": 1},
        {"num_steps": 80},
    ],
    ids=str,
)
def test_options_come_back_from_the_header(pixels, tmp_path, arguments):
    pipe, images = pixels
    pack(pipe, images, tmp_path / "f", **arguments)
    assert decompress(pipe, tmp_path / "f", batch_size=64, **QUIET).equal(images)


def test_predicted_variances_are_coded(tmp_path):
    pipe, probabilities = pixel_pipeline((1, 4, 4), learned=True)
    images = draw_pixels(probabilities, (60, 1, 4, 4))
    assert not pack(pipe, images, tmp_path / "f").is_plain
    assert decompress(pipe, tmp_path / "f", **QUIET).equal(images)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("detail", ["level", "pixel"])
def test_a_calibrated_scheduler_codes_with_its_best_variance_and_levels(tmp_path, detail, clip_sample):
    pipe, probabilities = pixel_pipeline((1, 4, 4), clip_sample=clip_sample)
    train, images = draw_pixels(probabilities, (64, 1, 4, 4), seed=5), draw_pixels(probabilities, (80, 1, 4, 4))
    before = pack(pipe, images, tmp_path / "before")
    table = calibrate(pipe.unet, pipe.scheduler, train, num_gammas=33, detail=detail, **QUIET)
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, calibration=table)
    after = pack(pipe, images, tmp_path / "after")
    header = read_headers(tmp_path / "after")[0].header
    assert header.variance == "optimal" and len(header.levels) == 40
    assert after.file_bpd < before.file_bpd - 0.1
    assert decompress(pipe, tmp_path / "after", **QUIET).equal(images)


def test_images_of_several_sizes_keep_their_names_and_order(pixels, tmp_path):
    pipe, _ = pixels
    _, probabilities = pixel_pipeline((3, 4, 4))
    sizes = [(8, 8), (1, 1), (9, 8), (4, 12), (8, 7)] * 6
    images = [draw_pixels(probabilities, (3, *size), seed=i).numpy() for i, size in enumerate(sizes)]
    pairs = [
        (ImageEntry(*size, "RGB", f"a/{i}.png"), im) for i, (size, im) in enumerate(zip(sizes, images, strict=True))
    ]
    summary = pack(pipe, iter(pairs), tmp_path / "f")
    assert not summary.is_plain
    back = list(iterate(pipe, tmp_path / "f", **QUIET))
    assert [entry for entry, _ in back] == [entry for entry, _ in pairs]
    assert all(np.array_equal(image.numpy(), own) for (_, image), own in zip(back, images, strict=True))
    assert isinstance(decompress(pipe, tmp_path / "f", **QUIET), list)


def test_a_large_collection_has_several_segments(pixels, tmp_path, monkeypatch):
    pipe, images = pixels
    monkeypatch.setattr(files, "SEGMENT_VALUES", 20 * 48)
    pack(pipe, images, tmp_path / "f")
    assert [len(segment.images) for segment in read_headers(tmp_path / "f")[1]] == [20, 20, 20]
    assert decompress(pipe, tmp_path / "f", **QUIET).equal(images)


def test_decoding_yields_images_before_it_is_done(pixels, packed):
    """A group of images is checked before it is yielded; here all are one group, and the first comes first."""
    images = iterate(pixels[0], packed[0], **QUIET)
    assert next(images)[1].equal(pixels[1][0])
    images.close()


# ---- the size of a file ------------------------------------------------------------------------------------------


def test_an_image_costs_its_bound(tmp_path):
    """The codec's bits, its own bound at its latents, and the bound of `evaluate_vlb` agree within their noise."""
    pipe, probabilities = pixel_pipeline((1, 8, 8), num_levels=16)
    images = draw_pixels(probabilities, (300, 1, 8, 8))
    summary = pack(pipe, images, tmp_path / "f", num_steps=20)
    other = evaluate_vlb(pipe.unet, pipe.scheduler, images, num_steps=20, num_levels=16, **QUIET)
    # for small steps, the variance of log q/p is twice its mean, the bound, in nats
    noise = math.sqrt(2 * other.bpd / math.log(2) / images.numel())
    assert abs(summary.marginal_bpd - other.bpd) < 6 * noise
    assert abs(summary.bound_bpd - other.bpd) < 6 * noise
    assert summary.marginal_bpd < summary.file_bpd < summary.marginal_bpd + 0.12


def test_the_rate_approaches_the_entropy(tmp_path):
    pipe, probabilities = pixel_pipeline((1, 8, 8), num_levels=16)
    images = draw_pixels(probabilities, (300, 1, 8, 8))
    entropy = -float((probabilities * np.log2(probabilities)).sum())
    train = draw_pixels(probabilities, (99, 1, 8, 8), 2)
    table = calibrate(pipe.unet, pipe.scheduler, train, detail="level", num_levels=16, **QUIET)
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, calibration=table)
    rates = [pack(pipe, images, tmp_path / "f", num_steps=steps).marginal_bpd for steps in (30, 100)]
    own = -float(np.log2(probabilities[images.numpy()]).mean())  # of these images
    assert abs(own - entropy) < 0.05
    assert own - 0.02 < rates[1] < own + 0.07 < rates[0]


def test_initial_bits_are_in_the_file(packed):
    path, summary = packed
    _, segments = read_headers(path)
    assert segments[0].num_plain == summary.num_plain_images > 0
    message = 32 * sum(segment.num_words for segment in segments)
    coded = summary.num_values - summary.num_plain_images * 48
    assert message == pytest.approx(summary.initial_bits + summary.marginal_bpd * coded, abs=32)


def test_a_collection_that_cannot_pay_the_initial_bits_has_the_plain_code(pixels, tmp_path):
    pipe, images = pixels
    summary = pack(pipe, images[:1], tmp_path / "f")
    assert summary.is_plain and summary.num_plain_images == 1 and math.isnan(summary.bound_bpd)
    assert summary.to_json()["bound_bpd"] is None
    assert decompress(pipe, tmp_path / "f", **QUIET).equal(images[:1])


def test_the_plain_code_is_used_where_it_is_smaller(pixels, tmp_path):
    """Gradients, which the network of independent pixels does not expect."""
    pipe, _ = pixels
    ramp = torch.arange(4)[:, None] + torch.arange(4)
    images = (ramp + torch.arange(90)[:, None, None, None] + torch.zeros(1, 3, 1, 1, dtype=torch.long)).to(torch.uint8)
    summary = pack(pipe, images, tmp_path / "f")
    assert summary.is_plain and summary.file_bpd < 2.5
    assert decompress(pipe, tmp_path / "f", **QUIET).equal(images)


# ---- another machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1e-14, -3e-12, 2e-11])
def test_a_machine_with_slightly_other_numbers_decodes(pixels, packed, shift):
    other, _ = pixel_pipeline((3, 4, 4))
    other.unet.shift = shift
    assert decompress(other, packed[0], **QUIET).equal(pixels[1])


@pytest.mark.parametrize("shift", [1e-5, 1e-3])
def test_a_machine_with_very_other_numbers_says_so(packed, shift):
    other, _ = pixel_pipeline((3, 4, 4))
    other.unet.shift = shift
    with pytest.raises(CodecError, match=r"other numbers"):
        decompress(other, packed[0], **QUIET)


def test_recorded_sides_let_a_machine_with_large_errors_decode(pixels, tmp_path, monkeypatch):
    """With a tolerance of 0.05, a tenth of the values is recorded, and errors of 0.02 of the grid change nothing."""
    monkeypatch.setattr(model, "TOLERANCE", 0.05)
    pipe, images = pixels
    summary = pack(pipe, images, tmp_path / "f")
    assert 0.05 < summary.num_edge_values / (images.numel() * 40) < 0.15
    other, _ = pixel_pipeline((3, 4, 4))
    other.unet.shift = 2e-6
    assert decompress(other, tmp_path / "f", **QUIET).equal(images)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_another_model_is_refused(packed, pixels):
    other, _ = pixel_pipeline((3, 4, 4), seed=1)
    with pytest.raises(CodecError, match=r"another model: the weights"):
        decompress(other, packed[0], **QUIET)


def test_other_levels_are_refused(packed):
    other, _ = pixel_pipeline((3, 4, 4), gamma_min=-9.0)
    with pytest.raises(CodecError, match=r"another scheduler|other numbers"):
        decompress(other, packed[0], **QUIET)


def test_another_calibration_is_refused(pixels, tmp_path):
    pipe, probabilities = pixel_pipeline((1, 4, 4))
    tables = [
        calibrate(pipe.unet, pipe.scheduler, draw_pixels(probabilities, (9, 1, 4, 4), seed), detail="level", **QUIET)
        for seed in (1, 2)
    ]
    images = draw_pixels(probabilities, (60, 1, 4, 4))
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, calibration=tables[0])
    pack(pipe, images, tmp_path / "f")
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, calibration=tables[1])
    with pytest.raises(CodecError, match=r"calibration"):
        decompress(pipe, tmp_path / "f", **QUIET)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), ValueError, "empty"),
        (iter([]), ValueError, "empty"),
        (torch.rand(2, 3, 4, 4), TypeError, "integers"),
        (torch.full((2, 3, 4, 4), 256), ValueError, r"within \[0, 256\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ValueError, "3 channels"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError, r"\(N, C, H, W\)"),
        ([(ImageEntry(4, 4, "L", "a.png"), np.zeros((1, 4, 4), np.uint8))], ValueError, "a.png"),
        ([(ImageEntry(4, 4), np.full((3, 4, 4), 0.5))], TypeError, "integers .* float64 for image 0"),
        ([(ImageEntry(5, 4), np.zeros((3, 4, 4), np.uint8))], ValueError, "size of their ImageEntry"),
        ([(ImageEntry(4, 4), np.full((3, 4, 4), 300))], ValueError, "values from 300 to 300 for image 0"),
        ([np.zeros((3, 4, 4), np.uint8)], TypeError, "pairs of an ImageEntry"),
        ("photos", TypeError, "pairs of an ImageEntry"),
        (7, TypeError, "iterable"),
    ],
)
def test_wrong_images_are_refused_and_leave_an_earlier_file(pixels, tmp_path, images, error, message):
    (tmp_path / "f").write_bytes(b"earlier")
    with pytest.raises(error, match=message):
        pack(pixels[0], images, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"timesteps": "some"}, "timesteps"),
        ({"timesteps": "best"}, "calibration"),
        ({"variance": "optimal"}, "calibration"),
        ({"variance": "large"}, "variance"),
        ({"dtype": "float16"}, "dtype"),
        ({"spacing": 0.0}, "spacing"),
        ({"spacing": "1"}, "spacing"),
    ],
)
def test_wrong_arguments_are_refused(pixels, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*pixels, tmp_path / "f", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_network_that_returns_nan_writes_nothing(pixels, tmp_path):
    other, _ = pixel_pipeline((3, 4, 4))
    other.unet.shift = math.nan
    with pytest.raises(CodecError, match=r"NaN"):
        pack(other, pixels[1], tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_no_file_and_other_files_are_refused(pixels, tmp_path):
    with pytest.raises(FileNotFoundError):
        decompress(pixels[0], tmp_path / "none", **QUIET)
    for content in (b"", b"\x89PNG\r\n", SIGNATURE, SIGNATURE + b"\x07"):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(CodecError):
            decompress(pixels[0], tmp_path / "f", **QUIET)


# ---- damage ------------------------------------------------------------------------------------------------------


def _decoded(pipe, content, path, keep=False):
    """The images that come out of bytes, or the error."""
    path.write_bytes(content)
    try:
        return decompress(pipe, path, keep=keep, **QUIET), None
    except CodecError as error:
        return None, error


def _small(tmp_path):
    pipe, probabilities = pixel_pipeline((1, 4, 4), 16)
    images = draw_pixels(probabilities, (30, 1, 4, 4))
    assert not pack(pipe, images, tmp_path / "f", num_steps=16).is_plain
    return pipe, images, (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("count", [100, pytest.param(800, marks=pytest.mark.slow)])
def test_mutations_of_a_file_never_give_a_wrong_image(tmp_path, count):
    pipe, images, content = _small(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(count):
        mutated = bytearray(content)
        kind = rng.integers(4)
        at = int(rng.integers(len(content)))
        if kind == 0:
            mutated[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del mutated[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            mutated[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            mutated[at : at + 4] = rng.bytes(4)
        if bytes(mutated) == content:
            continue
        back, error = _decoded(pipe, bytes(mutated), tmp_path / "g")
        assert error is not None or back.equal(images)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_messages_with_right_checksums_never_give_a_wrong_image(tmp_path, count):
    """Damage that the checksums of the parts do not show: what comes out is checked against those of the pixels."""
    pipe, images, _ = _small(tmp_path)
    rng = np.random.default_rng(1)
    with open(tmp_path / "f", "rb") as file:
        reader = Reader(file)
        ((segment, words),) = reader.segments()
    for _ in range(count):
        other, values = words.copy(), dict(vars(segment))
        if rng.random() < 0.6:
            other[rng.integers(len(other))] ^= np.uint32(1 << int(rng.integers(32)))
        elif rng.random() < 0.5:
            other = rng.integers(1, 1 << 32, rng.integers(1, 2 * len(words)), dtype=np.uint32)
        else:
            values["batches"] = [*segment.batches[:-1], segment.batches[-1] - 1]
            values["num_plain"] = segment.num_plain + 1
        values |= {"num_words": len(other), "words_check": message_check(other)}
        with open(tmp_path / "g", "wb") as file:
            writer = Writer(file, reader.header)
            writer.segment(Segment(**values), other)
            writer.end()
        back, error = _decoded(pipe, (tmp_path / "g").read_bytes(), tmp_path / "g")
        assert error is not None or back.equal(images)


def test_every_truncation_is_found(tmp_path):
    pipe, _, content = _small(tmp_path)
    for length in range(0, len(content), 5):
        _, error = _decoded(pipe, content[:length], tmp_path / "g")
        assert error is not None


def test_images_before_a_damage_can_be_kept(tmp_path):
    """The top of the stack is at the beginning of the message, so that a truncated file has its first images."""
    pipe, probabilities = pixel_pipeline((3, 32, 32), 16)
    images = draw_pixels(probabilities, (40, 3, 32, 32))
    pack(pipe, images, tmp_path / "f", num_steps=2, batch_size=4)
    content = (tmp_path / "f").read_bytes()
    kept = []
    for share in (0.3, 0.6, 0.9):
        cut = content[: int(share * len(content))]
        assert _decoded(pipe, cut, tmp_path / "g")[0] is None
        back, _ = _decoded(pipe, cut, tmp_path / "g", keep=True)
        assert len(back) == 0 or torch.equal(back, images[: len(back)])
        kept.append(len(back))
    assert 0 < kept[0] < kept[1] < kept[2] < 40


def test_another_model_is_no_damage_to_keep_images_before(packed, tmp_path):
    other, _ = pixel_pipeline((3, 4, 4), seed=1)
    with pytest.raises(CodecError, match=r"another model"):
        decompress(other, packed[0], keep=True, **QUIET)
    (tmp_path / "f").write_bytes(b"something else")
    with pytest.raises(CodecError, match=r"not one that"):
        decompress(other, tmp_path / "f", keep=True, **QUIET)


def test_the_file_must_be_in_an_existing_folder(pixels, tmp_path):
    for path in (tmp_path, tmp_path / "none" / "f"):
        with pytest.raises(ValueError, match=r"path must name a file"):
            pack(*pixels, path)


def test_more_steps_than_levels_to_choose_from_are_even(tmp_path):
    pipe, probabilities = pixel_pipeline((1, 4, 4))
    table = calibrate(pipe.unet, pipe.scheduler, draw_pixels(probabilities, (9, 1, 4, 4)), num_gammas=9, **QUIET)
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, calibration=table)
    images = draw_pixels(probabilities, (2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"at most 256 .* timesteps='uniform'"):
        pack(pipe, images, tmp_path / "f", num_steps=257, timesteps="best")
    for steps, chosen in ((256, True), (257, False)):
        pack(pipe, images, tmp_path / "f", num_steps=steps)
        assert (read_headers(tmp_path / "f")[0].header.levels is not None) == chosen


def test_npz_layouts_are_those_of_the_header(pixels, tmp_path):
    pipe, images = pixels
    for name, array in {"NCHW": images.numpy(), "NHWC": images.permute(0, 2, 3, 1).numpy()}.items():
        np.savez(tmp_path / "a.npz", images=array)
        pack(pipe, images_of_npz(tmp_path / "a.npz", 3), tmp_path / name)
        assert read_headers(tmp_path / name)[0].header.layout == name
        assert decompress(pipe, tmp_path / name, **QUIET).equal(images)


def test_the_same_images_give_the_same_file(pixels, packed, tmp_path):
    pipe, images = pixels
    pack(pipe, images, tmp_path / "f", batch_size=8)
    assert (tmp_path / "f").read_bytes() == packed[0].read_bytes()


def test_the_header_is_small(packed):
    """Digits have 14 bytes an image: everything but the message is below 200 bytes."""
    path, summary = packed
    message = 4 * sum(segment.num_words for segment in read_headers(path)[1])
    assert summary.file_bytes - message < 200


def test_no_two_files_have_one_fingerprint_of_the_levels(pixels):
    """Levels, variances and spacings are in it."""
    prints = set()
    for steps, spacing in itertools.product((5, 6), (0.5, 1.0)):
        coding = model.model_to_encode(
            pixels[0], num_steps=steps, timesteps=None, variance=None, spacing=spacing, dtype="float64", batch_size=1,
            image_size=None, layout="files", conditions={},
        )  # fmt: skip
        prints.add(coding.header.numbers)
    assert len(prints) == 4
