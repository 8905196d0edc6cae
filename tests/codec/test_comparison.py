"""codec/comparison.py: the other formats are those that Pillow writes."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffusers_vdm.codec.comparison import OtherFormats
from diffusers_vdm.codec.container import ImageEntry


def image(seed, channels, height, width):
    """Smooth levels and a little noise, uint8 `(C, H, W)`."""
    rng = np.random.default_rng(seed)
    ramp = np.arange(height)[:, None] + np.arange(width) + 20 * np.arange(channels)[:, None, None]
    return ((ramp + rng.integers(0, 4, (channels, height, width))) % 256).astype(np.uint8)


def pairs(*images, mode=""):
    return [(ImageEntry(*pixels.shape[1:], mode), pixels) for pixels in images]


def measured(given, num_levels=256):
    others = OtherFormats(num_levels)
    seen = list(others.watch(given))
    assert [entry for entry, _ in seen] == [entry for entry, _ in given]
    assert all(after is before for (_, after), (_, before) in zip(seen, given, strict=True))
    return others.bpd(), others.note


def sizes(pixels):
    """Bytes of an image `(H, W, C)` as Pillow writes it."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    result = {}
    for name, options in {"PNG": {"optimize": True}, "WebP": {"lossless": True, "quality": 100, "method": 6}}.items():
        content = BytesIO()
        picture.save(content, name, **options, **({"exact": True} if name == "WebP" else {}))
        with Image.open(content) as again:
            assert np.array_equal(np.asarray(again.convert(picture.mode)), np.asarray(picture))
        result[name] = len(content.getvalue())
    return result


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_large_image_is_a_file_of_its_own(channels):
    pixels = image(0, channels, 70, 66)
    bpd, note = measured(pairs(pixels))
    for name, size in sizes(pixels.transpose(1, 2, 0)).items():
        assert bpd[name] == 8 * size / pixels.size
    assert note is None


def test_large_images_are_added_up():
    images = [image(seed, 3, 70, 66 + seed) for seed in range(2)]
    bpd, _ = measured(pairs(*images))
    parts = [measured(pairs(each))[0] for each in images]
    values = [each.size for each in images]
    for name, total in bpd.items():
        assert total == pytest.approx(sum(p[name] * n for p, n in zip(parts, values, strict=True)) / sum(values))


@pytest.mark.parametrize(("count", "rows", "columns"), [(400, 20, 20), (1, 1, 1), (5, 2, 3), (6, 2, 3)])
def test_small_images_are_in_a_mosaic(count, rows, columns):
    images = [image(seed, 3, 4, 6) for seed in range(count)]
    bpd, note = measured(pairs(*images))
    whole = np.zeros((rows * columns, 3, 4, 6), dtype=np.uint8)
    whole[:count] = images
    mosaic = whole.reshape(rows, columns, 3, 4, 6).transpose(0, 3, 1, 4, 2).reshape(rows * 4, columns * 6, 3)
    for name, size in sizes(np.ascontiguousarray(mosaic)).items():
        assert bpd[name] == 8 * size / (count * 72)
    assert note == "in mosaics of up to 400"


def test_a_mosaic_holds_images_of_one_size():
    first, second = [image(0, 1, 4, 4)] * 3, [image(1, 1, 4, 5)] * 2
    bpd, _ = measured(pairs(*first, *second))
    parts = [measured(pairs(*each))[0] for each in (first, second)]
    for name, total in bpd.items():
        assert total == pytest.approx((48 * parts[0][name] + 40 * parts[1][name]) / 88)


def test_a_gray_file_is_compared_as_gray():
    gray = image(0, 1, 70, 70)
    three, _ = measured(pairs(np.repeat(gray, 3, axis=0), mode="L"))
    one, _ = measured(pairs(gray))
    assert three == pytest.approx({name: bpd / 3 for name, bpd in one.items()})


def test_more_levels_and_other_channels_are_not_compared():
    assert measured(pairs(image(0, 3, 8, 8)), num_levels=1000)[0] == {}
    assert measured(pairs(image(0, 2, 8, 8), image(0, 2, 70, 70)))[0] == {}


def test_jpeg_xl_is_measured_where_it_can_be():
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = image(0, 3, 70, 66)
    size = len(imagecodecs.jpegxl_encode(np.ascontiguousarray(pixels.transpose(1, 2, 0)), lossless=True, effort=9))
    assert measured(pairs(pixels))[0]["JPEG XL"] == 8 * size / pixels.size


def test_a_format_that_cannot_hold_an_image_is_left_out():
    """WebP has at most 16,383 pixels on a side."""
    others = OtherFormats(256)
    image = np.zeros((3, 1, 17_000), dtype=np.uint8)
    assert len(list(others.watch([(ImageEntry(1, 17_000), image)]))) == 1
    assert "PNG" in others.bpd() and "WebP" not in others.bpd()
