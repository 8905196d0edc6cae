"""data/image_files.py: image files become integers exactly, or are refused with a message that names the reason."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusers_vdm.data.image_files import _pixels, decode
from diffusers_vdm.data.image_stream import ImageStream
from tests.pictures import DEEP, encoded, indices, loaded, picture, png, write_images


def transparent(mode, alpha):
    image = Image.new("RGBA", (4, 4), (10, 200, 30, alpha))
    return image if mode == "RGBA" else image.convert(mode)


def keyed_palette():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


@pytest.mark.parametrize("image_mode", [None, "RGB", "L"])
@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_refused_always(kind, image_mode):
    # Pillow silently opens a 16-bit RGB PNG as 8-bit RGB, and clips 'I;16' to 255 when it converts it
    with pytest.raises(ValueError, match="more than 8 bits") as error:
        decode({"bytes": DEEP[kind], "path": None}, image_mode, image_mode is not None)
    assert kind in str(error.value) and "convert the files" in str(error.value)


CONVERTED = {
    "RGBA": (encoded(transparent("RGBA", 255)), [10, 200, 30]),
    "LA": (encoded(Image.new("LA", (4, 4), (77, 255))), [77, 77, 77]),
    "P": (encoded(keyed_palette()), [0, 0, 0]),
    "1": (encoded(Image.new("1", (4, 4), 1)), [255, 255, 255]),
    "CMYK": (encoded(Image.new("CMYK", (4, 4), 0), "tiff"), [255, 255, 255]),
}


@pytest.mark.parametrize("mode", CONVERTED)
def test_other_modes_are_converted_on_request(mode):
    content, expected = CONVERTED[mode]
    row = {"bytes": content, "path": None}
    with pytest.raises(ValueError, match="set image_mode") as error:
        decode(row, None, False)
    assert f"'{mode}'" in str(error.value)
    pixels = decode(row, "RGB", True)
    assert pixels.shape == (3, 4, 4) and pixels[:, 0, 0].tolist() == expected
    assert decode(row, "L", True).shape == (1, 4, 4)


@pytest.mark.parametrize(
    "content",
    [
        encoded(transparent("RGBA", 254)),
        encoded(transparent("LA", 0)),
        encoded(keyed_palette(), transparency=0),
        encoded(keyed_palette(), transparency=b"\x80\xff"),
        encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
    ],
)
def test_transparent_pixels_are_refused(content):
    with pytest.raises(ValueError, match="transparent pixels") as error:
        decode({"bytes": content, "path": None}, "RGB", True)
    assert "composite" in str(error.value)


def test_a_color_key_that_no_pixel_has_is_ignored():
    content = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(9, 9, 9))
    assert decode({"bytes": content, "path": None}, "RGB", False)[:, 0, 0].tolist() == [1, 2, 3]


def test_eight_bit_images_change_only_by_their_exif_orientation():
    rng = np.random.default_rng(0)
    for mode in ("RGB", "L"):
        image = picture(rng, (5, 3), mode)
        pixels = decode({"bytes": encoded(image), "path": None}, None, False)
        assert np.array_equal(pixels, np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode({"bytes": encoded(image, exif=exif), "path": None}, None, False)
    assert np.array_equal(turned[0], np.rot90(np.asarray(image), -1))
    with pytest.raises(ValueError, match="image_mode"):
        decode({"bytes": encoded(image), "path": None}, "CMYK", True)


def test_crops_are_drawn_once_for_each_image():
    rng = np.random.default_rng(1)
    wide = picture(rng, (32, 8))
    crops = [_pixels(wide, 8, (0, i)) for i in range(20)]
    assert all(crop.shape == (3, 8, 8) for crop in crops)
    assert np.array_equal(crops[3], _pixels(wide, 8, (0, 3)))
    assert len({crop.tobytes() for crop in crops}) > 5
    array = np.asarray(wide).transpose(2, 0, 1)
    assert np.array_equal(_pixels(wide, 8, None), array[:, :, 12:20])


def test_values_that_pillow_would_rescale_are_refused():
    with pytest.raises(ValueError, match="a range other than 0 to 255"):
        decode({"bytes": b"P5 2 2 200\n" + bytes([0, 100, 150, 200])}, None, False)
    pixels = decode({"bytes": b"P5 2 2 255\n" + bytes([0, 100, 150, 200])}, None, False)
    assert pixels.flatten().tolist() == [0, 100, 150, 200]


# ---- files of a data set -----------------------------------------------------------------------------------------


def frames(kind, count=3):
    pictures = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(count)]
    options = {"webp": {"lossless": True}}.get(kind, {})
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


FRAMES = pytest.mark.parametrize("kind", ["tiff", "png", "webp", "gif"])


@pytest.fixture
def frames_folder(tmp_path, kind):
    """A folder with a file of three frames, whose red is 0, 60 and 120, and an image whose red is 9."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"1.{kind}").write_bytes(frames(kind))
    (tmp_path / "data" / "2.png").write_bytes(png(9))
    return str(tmp_path / "data")


@FRAMES
def test_files_with_several_frames_are_refused_by_default(frames_folder, tmp_path):
    with pytest.raises(ValueError, match="has 3 frames; set frames='first'"):
        loaded(frames_folder, "train", tmp_path, image_mode="RGB")
    with pytest.raises(ValueError, match="has 3 frames; set frames='first'"):
        ImageStream(frames_folder, "train", is_folder=True, image_mode="RGB")


@FRAMES
def test_the_first_frame_is_taken_on_request(frames_folder, tmp_path):
    assert indices(loaded(frames_folder, "train", tmp_path, frames="first", image_mode="RGB")) == [0, 9]
    stream = ImageStream(frames_folder, "train", is_folder=True, frames="first", image_mode="RGB")
    assert sorted(stream.batch(range(2))[0][:, 0, 0, 0].tolist()) == [0, 9]


@FRAMES
def test_all_frames_are_taken_on_request(frames_folder, tmp_path):
    options = {"frames": "all", "image_mode": "RGB"}
    every = loaded(frames_folder, "train", tmp_path, **options)
    assert np.allclose(indices(every), [0, 9, 60, 120], atol=1)
    cached = loaded(frames_folder, "train", tmp_path, decoded_cache=True, **options)
    assert cached.fingerprint == every.fingerprint


@FRAMES
def test_other_choices_of_frames_are_refused(frames_folder, tmp_path):
    with pytest.raises(ValueError, match="frames must be 'first' or None in a stream"):
        ImageStream(frames_folder, "train", is_folder=True, frames="all", image_mode="RGB")
    with pytest.raises(ValueError, match="frames must be"):
        loaded(frames_folder, "train", tmp_path, frames="last", image_mode="RGB")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (png(0)[:40], "cannot be decoded"),
        (b"anything", "cannot identify image file its content"),
    ],
)
def test_a_file_that_is_no_image_is_described(tmp_path, content, message):
    path = write_images(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "data" / "2.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"2.png.*{message}"):
        loaded(path, "train", tmp_path)


def test_a_broken_link_is_named(tmp_path):
    path = write_images(tmp_path / "data", "1.png")
    os.symlink("gone.png", tmp_path / "data" / "2.png")
    with pytest.raises(ValueError, match="2.png.*missing, or it is a broken link"):
        loaded(path, "train", tmp_path)


def test_images_above_the_limit_of_pillow_are_refused(tmp_path, monkeypatch):
    path = write_images(tmp_path / "data", "1.png")
    for limit in (7, 15):  # an error above twice the limit, a warning above it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="too many pixels for Pillow.*MAX_IMAGE_PIXELS"):
            loaded(path, "train", tmp_path)


@pytest.mark.parametrize("decoded_cache", [False, True])
def test_damaged_files_are_skipped_on_request(tmp_path, decoded_cache):
    path = write_images(tmp_path / "data", *(f"{name}/{i}.png" for name in "ab" for i in range(4)))
    for name in ("a/1.png", "b/3.png"):
        (tmp_path / "data" / name).write_bytes(b"")
    options = {"decoded_cache": decoded_cache}
    with pytest.raises(ValueError, match="more than skip_damaged=1"):
        loaded(path, "train", tmp_path, skip_damaged=1, **options)
    for _ in range(2):  # decoded, and read from the cache
        data = loaded(path, "train", tmp_path, skip_damaged=2, **options)
        assert indices(data) == [0, 2, 3, 4, 5, 6] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert len(data.damaged) == 2 and "a/1.png" in data.damaged[0] and data.files.endswith("2 that are damaged")


def test_a_stream_skips_damaged_files_in_a_fixed_order(tmp_path):
    path = write_images(tmp_path / "data", *(f"{i}.png" for i in range(12)))
    expected = {i for i in range(12)} - {0, 4, 7}
    for i in (0, 4, 7):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"")
    options = {"is_folder": True, "buffer_size": 5}

    def read(data, size, start=0):
        return [
            i for p in range(start, 36, size) for i in data.batch(range(p, min(p + size, 36)))[0][:, 0, 0, 0].tolist()
        ]

    with pytest.raises(ValueError, match=r"(0|4|7).png.*empty"):
        read(ImageStream(path, "train", skip_damaged=2, **options), 4)
    data = ImageStream(path, "train", skip_damaged=3, **options)
    images = read(data, 4)
    assert len(images) == 36 and set(images[:12]) == expected and len(data.damaged) == 3
    assert images == read(ImageStream(path, "train", skip_damaged=3, **options), 1)
    assert images[20:] == read(ImageStream(path, "train", skip_damaged=3, **options), 4, start=20)
    with pytest.raises(ValueError, match="0.png.*empty"):
        ImageStream(path, "train", **options)
