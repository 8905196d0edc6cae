"""codec/sources.py: images are read and written without changing a pixel, or are refused."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusers_vdm.codec.container import ImageEntry
from diffusers_vdm.codec.sources import (
    Images,
    file_name,
    images_of,
    images_of_folder,
    images_of_npz,
    write_array,
    write_image,
)
from tests.pictures import DEEP, encoded, picture


def write(folder, **files):
    """Writes pictures under names with `__` for a slash and `_` for a dot, or bytes as they are."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return folder


def pixels_of(image):
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_has_all_its_images_in_the_order_of_their_names(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"b_png": (5, 7), "a__z_png": (3, 3), "a__b__c_bmp": (8, 2), "Z_PNG": (1, 1), "a_tiff": (2, 9)}
    pictures = {name: picture(rng, size) for name, size in sizes.items()}
    write(tmp_path, **{name: encoded(each, "png") for name, each in pictures.items() if name.lower().endswith("png")})
    write(tmp_path, a__b__c_bmp=encoded(pictures["a__b__c_bmp"], "bmp"), a_tiff=encoded(pictures["a_tiff"], "tiff"))
    write(tmp_path, notes_txt=b"no image", a__notes_csv=b"1,2")
    images = images_of_folder(tmp_path, 3)
    assert (images.count, images.size, images.layout) == (5, None, "files")
    found = list(images.pairs)
    order = ["Z.PNG", "a.tiff", "a/b/c.bmp", "a/z.png", "b.png"]
    assert [entry.name for entry, _ in found] == order
    for entry, pixels in found:
        source = pictures[entry.name.replace("/", "__").replace(".", "_")]
        assert np.array_equal(pixels, pixels_of(source)) and pixels.dtype == np.uint8
        assert (entry.width, entry.height) == source.size and entry.mode == "RGB"


def test_a_gray_file_has_three_equal_channels_for_a_model_of_colors_and_comes_back_gray(tmp_path):
    gray = picture(np.random.default_rng(1), (6, 4), "L")
    [(entry, pixels)] = images_of_folder(write(tmp_path / "in", g_png=gray), 3).pairs
    assert entry.mode == "L" and np.array_equal(pixels, np.repeat(pixels_of(gray), 3, axis=0))
    write_image(tmp_path / "out.png", pixels, entry)
    with Image.open(tmp_path / "out.png") as again:
        assert again.mode == "L" and np.array_equal(pixels_of(again), pixels_of(gray))


def test_a_gray_file_has_one_channel_for_a_gray_model(tmp_path):
    gray = picture(np.random.default_rng(1), (6, 4), "L")
    [(entry, pixels)] = images_of_folder(write(tmp_path, g_png=gray), 1).pairs
    assert entry.mode == "L" and np.array_equal(pixels, pixels_of(gray))


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA"])
def test_opaque_modes_that_colors_can_hold_are_read_exactly(tmp_path, mode):
    source = picture(np.random.default_rng(2), (9, 5)).quantize(7) if mode == "P" else None
    if source is None:
        source = picture(np.random.default_rng(2), (9, 5), "L").convert("RGB").convert(mode)
    [(entry, pixels)] = images_of_folder(write(tmp_path, p_png=source), 3).pairs
    assert entry.mode == "RGB" and np.array_equal(pixels, pixels_of(source.convert("RGB")))


@pytest.mark.parametrize("kind", ["CMYK", "YCbCr", "LAB"])
def test_modes_that_colors_cannot_hold_exactly_are_refused(tmp_path, kind):
    content = encoded(Image.new(kind, (4, 4), (10, 20, 30, 40)[: 4 if kind == "CMYK" else 3]), "tiff")
    with Image.open(BytesIO(content)) as again:
        if again.mode != kind:
            pytest.skip(f"this Pillow reads it as {again.mode}")
    folder = write(tmp_path, c_tif=content)
    with pytest.raises(ValueError, match=rf"c\.tif: mode '{kind}'"):
        list(images_of_folder(folder, 3).pairs)


def test_transparent_files_are_for_a_model_of_four_channels(tmp_path):
    source = picture(np.random.default_rng(3), (6, 4), "RGBA")
    folder = write(tmp_path / "in", t_png=source)
    [(entry, pixels)] = images_of_folder(folder, 4).pairs
    assert entry == ImageEntry(4, 6, "RGBA", "t.png") and np.array_equal(pixels, pixels_of(source))
    write_image(tmp_path / "out.png", pixels, entry)
    with Image.open(tmp_path / "out.png") as again:
        assert again.mode == "RGBA" and np.array_equal(pixels_of(again), pixels_of(source))
    with pytest.raises(ValueError, match=r"t\.png: mode 'RGBA' with transparent pixels"):
        list(images_of_folder(folder, 3).pairs)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", DEEP)
def test_files_of_more_than_eight_bits_are_refused(tmp_path, kind, channels):
    content = DEEP[kind]
    suffix = "png" if content.startswith(b"\x89PNG") else "ppm" if content.startswith(b"P6") else "tif"
    folder = write(tmp_path, **{f"deep_{suffix}": content})
    with pytest.raises(ValueError, match=r"^deep\."):
        list(images_of_folder(folder, channels).pairs)


@pytest.mark.parametrize("channels", [3, 4])
def test_animations_are_refused(tmp_path, channels):
    frames = [picture(np.random.default_rng(seed), (4, 4), "RGBA") for seed in range(2)]
    for frame in frames:
        frame.putalpha(255)
    folder = write(tmp_path, a_png=encoded(frames[0], "png", save_all=True, append_images=frames[1:]))
    with pytest.raises(ValueError, match=r"a\.png: .*has 2 frames"):
        list(images_of_folder(folder, channels).pairs)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_damaged_files_are_named(tmp_path, channels):
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    good = encoded(picture(np.random.default_rng(4), (30, 30), mode))
    for content in (good[:-200], good[:20], b"", b"no image at all"):
        folder = write(tmp_path, bad_png=content)
        with pytest.raises(ValueError, match=r"^bad\.png: cannot be decoded"):
            list(images_of_folder(folder, channels).pairs)


def test_files_of_other_channels_are_refused(tmp_path):
    rng = np.random.default_rng(5)
    folder = write(tmp_path, c_png=picture(rng))
    for channels, message in (
        (1, r"c\.png: mode 'RGB'"),
        (4, "images of RGBA"),
        (2, "2 channels, which no image file"),
    ):
        with pytest.raises(ValueError, match=message):
            list(images_of_folder(folder, channels).pairs)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no image files"):
        images_of_folder(write(tmp_path, notes_txt=b"x"), 3)


# ---- names -------------------------------------------------------------------------------------------------------


def named(*names):
    taken: set[str] = set()
    return [file_name(ImageEntry(1, 1, "L", name), taken) for name in names]


def test_files_come_back_as_png_under_their_names():
    assert named("a.jpg", "b/c.tiff", "d", "e.f.bmp", "G.PNG") == ["a.png", "b/c.png", "d.png", "e.f.png", "G.png"]


def test_files_of_one_stem_have_names_of_their_own():
    assert named("a.jpg", "a.png", "a.webp") == ["a.png", "a.png.png", "a.webp.png"]


@given(st.lists(st.sampled_from(["a.jpg", "a.png", "a.png.jpg", "a.png.png", "a.jpg.png", "b/a.png", "", "1", "0"])))
def test_no_two_files_have_one_name(names):
    assert len(set(named(*names))) == len(names)


@pytest.mark.parametrize("name", ["12:30.png", "a\\b.png", "C:x.png"])
def test_names_that_another_system_would_take_for_paths_come_back_within_the_folder(name):
    [found] = named(name)
    assert found.endswith(".png") and "\\" not in found and ":" not in found and "/" not in found


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/a.png", "..", "a/..", ".", "/", "..\\a.png"])
def test_names_that_lead_out_of_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="no name within a folder"):
        named(name)


# ---- arrays ------------------------------------------------------------------------------------------------------


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("shape", "channels", "layout"),
    [((4, 5, 6, 3), 3, "NHWC"), ((4, 3, 5, 6), 3, "NCHW"), ((4, 5, 6), 1, "NHW"), ((4, 5, 6, 1), 1, "NHWC"),
     ((4, 1, 5, 6), 1, "NCHW"), ((4, 2, 5, 6), 2, "NCHW")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, ">i4"])
def test_arrays_come_back_in_their_layout(tmp_path, shape, channels, layout, dtype):
    array = np.random.default_rng(6).integers(0, 256, shape).astype(dtype)
    images = images_of_npz(saved(tmp_path / "in.npz", data=array), channels)
    assert (images.count, images.size, images.layout) == (4, (5, 6), layout)
    found = list(images.pairs)
    assert all(entry == ImageEntry(5, 6) and pixels.shape == (channels, 5, 6) for entry, pixels in found)
    write_array(tmp_path / "out.npz", [pixels for _, pixels in found], layout)
    with np.load(tmp_path / "out.npz") as again:
        assert again.files == ["images"] and np.array_equal(again["images"], array)


def test_more_than_256_levels_come_back(tmp_path):
    images = list(np.random.default_rng(7).integers(0, 65536, (2, 1, 3, 3)).astype(np.int32))
    write_array(tmp_path / "out.npz", images, "NHW")
    with np.load(tmp_path / "out.npz") as again:
        assert np.array_equal(again["images"], np.stack(images)[:, 0])


def test_of_several_arrays_the_one_named_images_is_read(tmp_path):
    images, labels = np.zeros((2, 4, 4, 3), dtype=np.uint8), np.arange(2)
    assert images_of_npz(saved(tmp_path / "a.npz", labels=labels, images=images), 3).count == 2
    with pytest.raises(ValueError, match=r"one array, or one named images, got \['labels', 'pictures'\]"):
        images_of_npz(saved(tmp_path / "b.npz", labels=labels, pictures=images), 3)


@pytest.mark.parametrize("dtype", [np.float32, bool, np.complex64, "U3"])
def test_arrays_of_other_than_integers_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="must hold integers"):
        images_of_npz(saved(tmp_path / "a.npz", a=np.zeros((2, 4, 4, 3), dtype=dtype)), 3)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (2, 4, 4, 2), (1, 2, 3, 4, 3), ()])
def test_arrays_of_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"the 3 channels of the model, got shape \("):
        images_of_npz(saved(tmp_path / "a.npz", a=np.zeros(shape, dtype=np.uint8)), 3)


class Trap:
    """Unpickling it would be noticed."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_objects_are_refused_without_unpickling_them(tmp_path):
    trapped = np.empty(1, dtype=object)
    trapped[0] = Trap()
    with pytest.raises(ValueError, match="cannot be read"):
        images_of_npz(saved(tmp_path / "a.npz", images=trapped), 3)
    np.save(tmp_path / "b.npy", trapped)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="cannot be read"):
        images_of_npz(tmp_path / "b.npz", 3)
    assert not Trap.sprung


def damaged(kind, path):
    good = saved(path, images=np.zeros((2, 4, 4, 3), dtype=np.uint8)).read_bytes()
    if kind == "npy":
        np.save(path.with_suffix(".npy"), np.zeros((2, 4, 4, 3), dtype=np.uint8))
        return path.with_suffix(".npy").read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", b"not an array")
        return path.read_bytes()
    flipped = good[:170] + bytes([good[170] ^ 255]) + good[171:]
    return {"empty": b"", "cut": good[:100], "text": b"no array", "flipped": flipped}[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "flipped", "npy", "zip"])
def test_damaged_arrays_are_named(tmp_path, kind):
    path = tmp_path / "a.npz"
    path.write_bytes(damaged(kind, path))
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        images_of_npz(path, 3)


def test_an_array_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        images_of_npz(tmp_path / "a.npz", 3)


# ---- images in memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.int64, ">i4"])
def test_arrays_and_tensors_of_any_integers_are_taken(dtype):
    array = np.random.default_rng(8).integers(0, 200, (3, 2, 4, 5)).astype(dtype)
    given_images = [array, array[:, :, ::-1], array.transpose(0, 1, 3, 2)]
    if array.dtype.isnative:
        given_images.append(torch.from_numpy(array))
    for each in given_images:
        images = images_of(each, 256)
        assert (images.count, images.size, images.layout) == (3, tuple(each.shape[2:]), "NCHW")
        assert np.array_equal(np.stack([pixels for _, pixels in images.pairs]), np.asarray(each))


def test_an_iterable_is_taken_as_it_is():
    given_images = [(ImageEntry(2, 2), np.zeros((1, 2, 2), dtype=np.uint8))]
    images = images_of(iter(given_images), 256)
    assert list(images.pairs) == given_images and images.size is images.count is None
    assert images_of(images, 256) is images and isinstance(images, Images)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (3, TypeError, "tensor, an array or an iterable, got int"),
        (torch.zeros(1, 1, 2, 2), TypeError, "must be integers"),
        (np.zeros((1, 1, 2, 2), dtype=bool), TypeError, "must be integers"),
        (np.full((1, 1, 2, 2), 17), ValueError, r"within \[0, 17\)"),
        (np.full((1, 1, 2, 2), -1), ValueError, r"within \[0, 17\)"),
        (np.zeros((2, 2), dtype=np.uint8), ValueError, r"shape \(N, C, H, W\), got \(2, 2\)"),
        (np.zeros((0, 1, 2, 2), dtype=np.uint8), ValueError, "must not be empty"),
    ],
)
def test_what_is_no_images_is_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        images_of(wrong, 17)


# ---- written files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
def test_written_images_have_the_same_pixels(tmp_path, channels, mode, size):
    pixels = np.random.default_rng(9).integers(0, 256, (channels, *size))
    for named_mode in (mode, ""):
        path = tmp_path / "folder" / "inner" / "a.png"
        write_image(path, pixels, ImageEntry(*size, named_mode, "a.jpg"))
        with Image.open(path) as again:
            assert again.mode == mode and again.format == "PNG" and np.array_equal(pixels_of(again), pixels)
        path.unlink()


def test_levels_that_no_image_file_holds_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="at most 256 levels"):
        write_image(tmp_path / "a.png", np.full((1, 2, 2), 256), ImageEntry(2, 2))
    with pytest.raises(ValueError, match="2 channels, which no image file has"):
        write_image(tmp_path / "a.png", np.zeros((2, 2, 2), dtype=np.uint8), ImageEntry(2, 2))
    assert list(tmp_path.iterdir()) == []
