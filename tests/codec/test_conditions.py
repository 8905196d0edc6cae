"""codec/conditions.py: files that are smaller by what a condition says, and that only its owner can decode."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_vdm import FixedLinearGamma, VDMPipeline, VDMScheduler, evaluate_vlb
from diffusers_vdm.codec import CodecError, compress, decompress, iterate
from diffusers_vdm.codec.conditions import read_conditions
from diffusers_vdm.codec.container import ImageEntry
from diffusers_vdm.codec.files import read_header
from diffusers_vdm.codec.inspection import inspect_bits
from tests.codec.models import PixelsOfClasses, draw_pixels, pixel_pipeline
from tests.models import network
from tests.tensors import normal, seeded
from tests.text_models import text_pipeline

QUIET = {"progress_bar": False}
NUM_LEVELS = 16


def pack(pipe, images, path, **arguments):
    return compress(pipe, images, path, **{"verify": False, "num_steps": 40} | QUIET | arguments)


@pytest.fixture(scope="module")
def classes():
    """The best network for two classes of images, 120 images, and their labels."""
    weights = np.random.default_rng(0).gamma(0.1, size=(2, NUM_LEVELS)) + 1e-4
    probabilities = weights / weights.sum(1, keepdims=True)
    schedule = FixedLinearGamma(gamma_min=float(2 * np.log(0.2 / NUM_LEVELS)), gamma_max=6.0)
    pipe = SimpleNamespace(
        unet=PixelsOfClasses((1, 6, 6), probabilities, schedule),
        scheduler=VDMScheduler.from_noise_schedule(schedule),
        config={"num_levels": NUM_LEVELS},
    )
    labels = torch.arange(120) % 2
    images = torch.stack([draw_pixels(probabilities[c], (1, 6, 6), seed=i) for i, c in enumerate(labels.tolist())])
    return pipe, images, labels, probabilities


@pytest.fixture(scope="module")
def three_conditions():
    """A network of ours with random weights that takes classes, vectors and images, and has no nulls."""
    unet = network(
        sample_size=8, num_class_embeds=3, null_class=False, cond_dim=2, cond_mean=[5.0, -1.0], cond_std=[2.0, 3.0],
        cond_channels=1,
    )  # fmt: skip
    scheduler = VDMScheduler.from_noise_schedule(FixedLinearGamma(gamma_min=-8.0, gamma_max=5.0))
    pipe = VDMPipeline(unet, scheduler, num_levels=17)
    count, channels = 60, unet.config.in_channels
    # slow gradients, so that the code by the network is smaller than the plain one
    images = torch.randint(0, 17, (count, channels, 8, 8), generator=seeded(1))
    conditions = {
        "class_labels": torch.arange(count) % 3,
        "cond_vectors": 5 + normal(count, 2, seed=2).float(),
        "cond_images": normal(count, 1, 4, 4, seed=3).float(),
    }
    return pipe, images, conditions


def coded_by_network(pipe, images, path, monkeypatch, **arguments):
    """As `pack`, also where the plain code is smaller."""
    monkeypatch.setattr("diffusers_vdm.codec.segments._plain_may_be_smaller", lambda *_: False)
    summary = pack(pipe, images, path, **{"num_steps": 3} | arguments)
    assert not summary.is_plain
    return summary


# ---- sizes -------------------------------------------------------------------------------------------------------


def test_a_file_of_known_classes_has_the_conditional_bound(classes, tmp_path):
    pipe, images, labels, _ = classes
    summary = pack(pipe, images, tmp_path / "f", class_labels=labels)
    bound = evaluate_vlb(
        pipe.unet, pipe.scheduler, images, num_steps=40, num_levels=NUM_LEVELS, class_labels=labels,
        **QUIET,
    )  # fmt: skip
    noise = np.sqrt(2 * bound.bpd / np.log(2) / images.numel())
    assert abs(summary.marginal_bpd - bound.bpd) < 6 * noise
    assert abs(summary.bound_bpd - bound.bpd) < 6 * noise
    assert decompress(pipe, tmp_path / "f", class_labels=labels, **QUIET).equal(images)


def test_what_the_classes_save_is_what_they_say(classes, tmp_path):
    """−log₂ p(x) + log₂ p(x | c) of these images, summed over independent pixels."""
    pipe, images, labels, probabilities = classes
    known = pack(pipe, images, tmp_path / "known", num_steps=100, class_labels=labels)
    unknown = pack(pipe, images, tmp_path / "unknown", num_steps=100)
    own = np.stack([probabilities[c][x] for c, x in zip(labels.tolist(), images.numpy(), strict=True)])
    expected = float(np.log2(own / probabilities.mean(0)[images.numpy()]).mean())
    assert unknown.marginal_bpd - known.marginal_bpd == pytest.approx(expected, abs=0.15 * expected)
    assert decompress(pipe, tmp_path / "unknown", **QUIET).equal(images)


# ---- round trips -------------------------------------------------------------------------------------------------


def test_classes_vectors_and_images_at_once_are_decoded_in_another_process(three_conditions, tmp_path, monkeypatch):
    pipe, images, conditions = three_conditions
    coded_by_network(pipe, images, tmp_path / "f", monkeypatch, verify=True, **conditions)
    assert decompress(pipe, tmp_path / "f", batch_size=7, **conditions, **QUIET).equal(images)
    assert list(read_header(tmp_path / "f").conditions) == sorted(conditions)


def test_other_types_with_the_same_values_decode(three_conditions, tmp_path, monkeypatch):
    pipe, images, conditions = three_conditions
    coded_by_network(pipe, images, tmp_path / "f", monkeypatch, **conditions)
    same = {
        "class_labels": conditions["class_labels"].to(torch.int32),
        "cond_vectors": conditions["cond_vectors"].double(),
        "cond_images": conditions["cond_images"].double(),
    }
    assert decompress(pipe, tmp_path / "f", **same, **QUIET).equal(images)


def test_texts_are_conditions(tmp_path, monkeypatch):
    pipe = text_pipeline()
    images = torch.randint(0, 17, (40, 1, 8, 8), generator=seeded(1))
    texts = {
        "encoder_hidden_states": normal(40, 5, 16, seed=2).float(),
        "encoder_attention_mask": torch.arange(5)[None] < 2 + torch.arange(40)[:, None] % 4,
    }
    coded_by_network(pipe, images, tmp_path / "f", monkeypatch, **texts)
    assert decompress(pipe, tmp_path / "f", **texts, **QUIET).equal(images)


def test_all_tiles_of_an_image_have_its_condition(classes, tmp_path):
    """Images of 2 × 2, of 1 and of 2 × 1 tiles, in this order: a label given to the wrong tiles costs many bits."""
    pipe, _, _, probabilities = classes
    sizes, labels = [(12, 12), (6, 6), (12, 6)] * 20, torch.arange(60) // 3 % 2
    arrays = [draw_pixels(probabilities[c], (1, *size), seed=i).numpy()
              for i, (size, c) in enumerate(zip(sizes, labels.tolist(), strict=True))]  # fmt: skip
    pairs = [(ImageEntry(*size), array) for size, array in zip(sizes, arrays, strict=True)]
    right = pack(pipe, pairs, tmp_path / "f", num_steps=100, class_labels=labels)
    wrong = pack(pipe, pairs, tmp_path / "g", num_steps=100, class_labels=1 - labels)
    own = [-np.log2(probabilities[c][a]).sum() for a, c in zip(arrays, labels.tolist(), strict=True)]
    entropy = sum(own) / sum(a.size for a in arrays)
    assert right.marginal_bpd < entropy + 0.2 < wrong.file_bpd - 1
    for (_, back), array in zip(iterate(pipe, tmp_path / "f", class_labels=labels, **QUIET), arrays, strict=True):
        assert np.array_equal(back.numpy(), array)


def test_several_segments_continue_with_the_rows_that_follow(classes, tmp_path, monkeypatch):
    pipe, images, labels, _ = classes
    whole = pack(pipe, images, tmp_path / "whole", class_labels=labels)
    monkeypatch.setattr("diffusers_vdm.codec.files.SEGMENT_VALUES", 40 * images[0].numel())
    monkeypatch.setattr("diffusers_vdm.codec.container.SEGMENT_VALUES", 40 * images[0].numel())
    parts = pack(pipe, images, tmp_path / "parts", class_labels=labels)
    assert parts.marginal_bpd < whole.marginal_bpd + 0.2
    assert decompress(pipe, tmp_path / "parts", class_labels=labels, **QUIET).equal(images)


def test_the_bits_of_a_conditional_file_can_be_inspected(classes, tmp_path):
    pipe, images, labels, _ = classes
    summary = pack(pipe, images, tmp_path / "f", class_labels=labels)
    found = inspect_bits(pipe, tmp_path / "f", class_labels=labels, **QUIET)
    assert found.image_bits.sum() / found.num_values == pytest.approx(summary.marginal_bpd, abs=0.02)


# ---- the format --------------------------------------------------------------------------------------------------


def test_files_without_conditions_keep_version_1(classes, tmp_path):
    pipe, images, labels, _ = classes
    pack(pipe, images, tmp_path / "f")
    pack(pipe, images, tmp_path / "g", class_labels=labels)
    assert (tmp_path / "f").read_bytes()[4] == 1 and (tmp_path / "g").read_bytes()[4] == 2
    assert read_header(tmp_path / "f").conditions == {}


@pytest.mark.parametrize("at", range(5, 100, 7))
def test_a_damaged_header_with_conditions_is_an_error(classes, tmp_path, at):
    pipe, images, labels, _ = classes
    pack(pipe, images[:40], tmp_path / "f", class_labels=labels[:40], num_steps=2)
    content = bytearray((tmp_path / "f").read_bytes())
    content[at] ^= 0x55
    (tmp_path / "f").write_bytes(bytes(content))
    with pytest.raises(CodecError):
        decompress(pipe, tmp_path / "f", class_labels=labels[:40], **QUIET)


# ---- errors ------------------------------------------------------------------------------------------------------


def test_a_decoder_needs_exactly_the_same_conditions(classes, tmp_path):
    pipe, images, labels, _ = classes
    pack(pipe, images, tmp_path / "f", class_labels=labels)
    other = labels.clone()
    other[77] = 1 - other[77]
    for wrong in (other, labels[:-1], labels.flip(0)):
        with pytest.raises(CodecError, match="coded with other class_labels"):
            decompress(pipe, tmp_path / "f", class_labels=wrong, **QUIET)
    with pytest.raises(CodecError, match="coded with class_labels, which a decoder must be given"):
        decompress(pipe, tmp_path / "f", **QUIET)
    pack(pipe, images, tmp_path / "g")
    with pytest.raises(CodecError, match="coded without class_labels; leave the argument out"):
        decompress(pipe, tmp_path / "g", class_labels=labels, **QUIET)


@pytest.mark.parametrize("count", [119, 121])
def test_a_row_for_each_image(classes, tmp_path, count):
    pipe, images, _, _ = classes
    with pytest.raises(ValueError, match=f"class_labels must have a row for each image, got {count}"):
        pack(pipe, images, tmp_path / "f", class_labels=torch.zeros(count, dtype=torch.long))
    pairs = ((ImageEntry(6, 6), image.numpy()) for image in images)  # their number is not known before
    with pytest.raises(ValueError, match=f"class_labels must have a row for each image, got {count}"):
        pack(pipe, pairs, tmp_path / "f", num_steps=2, class_labels=torch.zeros(count, dtype=torch.long))
    with pytest.raises(TypeError, match=r"class_labels must be a tensor of integers, got torch.float32; use"):
        pack(pipe, images, tmp_path / "f", class_labels=torch.zeros(120))
    assert not list(tmp_path.iterdir())


def test_conditions_that_the_network_misses_or_cannot_take(three_conditions, classes, tmp_path):
    pipe, images, conditions = three_conditions
    for name in conditions:
        given = {other: value for other, value in conditions.items() if other != name}
        with pytest.raises(ValueError, match=f"{name} must be given"):
            pack(pipe, images, tmp_path / "f", **given)
    with pytest.raises(ValueError, match="cond_vectors were given, but this network takes none"):
        pack(classes[0], classes[1], tmp_path / "f", cond_vectors=conditions["cond_vectors"])
    with pytest.raises(TypeError, match="unexpected argument 'labels'"):
        pack(pipe, images, tmp_path / "f", labels=conditions["class_labels"])
    conditions = conditions | {"cond_vectors": torch.full((60, 2), torch.nan)}
    with pytest.raises(ValueError, match="cond_vectors must be finite"):
        pack(pipe, images, tmp_path / "f", **conditions)
    assert not list(tmp_path.iterdir())


def test_a_decoder_of_a_network_without_nulls_says_what_the_file_needs(three_conditions, tmp_path, monkeypatch):
    pipe, images, conditions = three_conditions
    coded_by_network(pipe, images, tmp_path / "f", monkeypatch, **conditions)
    for name in conditions:
        given = {other: value for other, value in conditions.items() if other != name}
        with pytest.raises(CodecError, match=f"coded with {name}, which a decoder must be given"):
            decompress(pipe, tmp_path / "f", **given, **QUIET)


def test_images_conditioned_on_images_are_not_cut_into_tiles(three_conditions, tmp_path):
    pipe, _, conditions = three_conditions
    images = torch.zeros(60, pipe.unet.config.in_channels, 16, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="images must be of 8×8 pixels.* coded with cond_images, got 16×8"):
        pack(pipe, images, tmp_path / "f", **conditions)


def test_files_of_conditions(tmp_path):
    save_file({"class_labels": torch.arange(3)}, tmp_path / "good")
    assert read_conditions(tmp_path / "good")["class_labels"].tolist() == [0, 1, 2]
    save_file({"labels": torch.arange(3)}, tmp_path / "names")
    (tmp_path / "bad").write_bytes(b"no safetensors")
    save_file({}, tmp_path / "empty")
    with pytest.raises(ValueError, match="got none"):
        read_conditions(tmp_path / "empty")
    for name, message in (
        ("names", "got 'labels'"),
        ("bad", "must be a safetensors file"),
        ("none", "which is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_conditions(tmp_path / name)


def test_a_pipeline_without_conditions_is_as_before(tmp_path):
    pipe, probabilities = pixel_pipeline((1, 4, 4))
    images = draw_pixels(probabilities, (60, 1, 4, 4))
    pack(pipe, images, tmp_path / "f")
    with pytest.raises(CodecError, match="coded without class_labels"):
        decompress(pipe, tmp_path / "f", class_labels=torch.zeros(60, dtype=torch.long), **QUIET)
