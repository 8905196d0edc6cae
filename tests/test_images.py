"""images.py: images as integers, exactly as they are in the files, and what does not fit is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vdm.images import ImageSet, _pixels, histogram_bpd, load_digits_split, load_images


def random_images(n, generator, channels=1):
    images = torch.randint(0, 17, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n), 17, "random")


def test_digits_split_is_the_one_of_the_readme():
    train, test = load_digits_split()
    assert (len(train), len(test), train.num_levels) == (1500, 297, 17)
    assert train.images.dtype == torch.uint8 and int(train.images.max()) == 16
    # all 1,797 images of the original, each once
    from sklearn.datasets import load_digits

    original = sorted(map(bytes, load_digits().images.astype(np.uint8)))
    assert sorted(bytes(i.numpy()) for i in torch.cat([train.images, test.images])) == original
    assert round(histogram_bpd(train, test), 4) == 2.4185


def test_histogram_of_uniform_data_costs_the_logarithm_of_the_levels(generator):
    data = random_images(20000, generator)
    assert histogram_bpd(data, data) == pytest.approx(np.log2(17), abs=1e-3)


# ---- images from files -------------------------------------------------------------------------------------------


def write_folder(folder, images):
    """An imagefolder with a train and a test split and two classes."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / ("train" if i < len(images) - 1 else "test") / "ab"[i % 2] / f"{i:03d}.png")
    return str(folder)


def picture(rng, size=(8, 8), mode="RGB"):
    channels = {"RGB": 3, "L": 0, "RGBA": 4}[mode]
    shape = (size[1], size[0], channels) if channels else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=None)


def test_a_folder_of_images_is_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(5)]
    path = write_folder(tmp_path / "data", images)
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), "progress_bar": False}
    train = load_images(path, "train", **options)
    assert train.images.shape == (4, 3, 8, 8) and train.num_levels == 256
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1]
    expected = sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image in images[:4])
    assert sorted(image.numpy().tobytes() for image in train.images) == expected
    again = load_images(path, "train", **options)
    assert again.fingerprint == train.fingerprint
    assert load_images(path, "test", **options).fingerprint != train.fingerprint

    small = load_images(path, "train", resolution=4, center_crop=True, **options)
    assert small.images.shape == (4, 3, 4, 4)
    gray = load_images(path, "train", image_mode="L", **options)
    assert gray.images.shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="image_column"):
        load_images(path, "train", image_column="img", **options)
    with pytest.raises(ValueError, match="label_column"):
        load_images(path, "train", label_column="labels", **options)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (lambda rng: [picture(rng), picture(rng), picture(rng, (8, 9)), picture(rng)], "set resolution"),
        (lambda rng: [picture(rng), picture(rng), picture(rng, mode="L"), picture(rng)], "set image_mode"),
        (lambda rng: [picture(rng, mode="RGBA")] * 4, "transparency"),
    ],
)
def test_images_that_do_not_fit_are_named(tmp_path, pictures, message):
    path = write_folder(tmp_path / "data", pictures(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=message) as error:
        load_images(path, "train", is_folder=True, cache_dir=str(tmp_path / "cache"), progress_bar=False)
    assert "image " in str(error.value)


def test_crops_are_drawn_once_for_each_image():
    rng = np.random.default_rng(1)
    wide = picture(rng, (32, 8))
    crops = [_pixels(wide, "RGB", False, 8, (0, i)) for i in range(20)]
    assert all(crop.shape == (3, 8, 8) for crop in crops)
    assert np.array_equal(crops[3], _pixels(wide, "RGB", False, 8, (0, 3)))
    assert len({crop.tobytes() for crop in crops}) > 5
    array = np.asarray(wide).transpose(2, 0, 1)
    assert np.array_equal(_pixels(wide, "RGB", False, 8, None), array[:, :, 12:20])
