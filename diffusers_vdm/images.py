"""Images as integers: decoded once, kept with where they come from and a fingerprint of every pixel."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .randomness import keyed_generator


@dataclass(frozen=True)
class ImageSet:
    """Images as integers, decoded once and kept in memory.

    `images` are uint8 levels in [0, num_levels) of shape `(N, C, H, W)`, `labels` are int64 classes of shape `(N,)` or
    `None`, `name` tells where they come from, to be recorded with every number.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    num_levels: int
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Hash of every pixel in order, so that a number can be told to be of the same data."""
        digest = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=8)
        digest.update(self.images.contiguous().numpy())
        return digest.hexdigest()


def load_digits_split() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's bundled 8×8 digits with 17 levels: a fixed split into 1,500 training and 297 held-out images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return tuple(
        ImageSet(images[part], labels[part], 17, f"scikit-learn digits, {name}")
        for part, name in ((order[:1500], "1500 training"), (order[1500:], "297 held-out"))
    )


def load_images(
    path: str,
    split: str,
    *,
    config_name: str | None = None,
    is_folder: bool = False,
    resolution: int | None = None,
    center_crop: bool = False,
    image_mode: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    num_workers: int = 2,
    progress_bar: bool = True,
) -> ImageSet:
    """A data set of images, from the Hub, a local copy of one, or a folder of image files.

    Args:
        path (`str`): name on the Hub, or folder.
        split, config_name (`str`): split, slices allowed (`"train[:2000]"`), and configuration of the data set.
        is_folder (`bool`, defaults to `False`): read `path` with the `imagefolder` builder.
        resolution (`int`, *optional*): side of the square images; smaller sides are resized to it and the rest is
            cropped. Without it images stay as they are and must all have one size.
        center_crop (`bool`, defaults to `False`): crop the middle; else a place drawn once for each image.
        image_mode (`"RGB"` or `"L"`, *optional*): convert to it; else all images must have the mode of the first one,
            which must be one of these two.
        image_column, label_column (`str`, *optional*): columns; found by their type if not given.
        cache_dir (`str`, *optional*): datasets' cache.
        seed (`int`, defaults to 0): key of the crops.
        num_workers (`int`, defaults to 2): decoding threads.
        progress_bar (`bool`, defaults to `True`): show a tqdm bar while decoding.

    Returns: [`ImageSet`] with 256 levels.
    Raises: `ValueError` for an empty split, missing columns, images that differ in size or mode, naming the image.
    """
    import datasets

    if is_folder:
        data = datasets.load_dataset("imagefolder", data_dir=path, split=split, cache_dir=cache_dir)
    else:
        data = datasets.load_dataset(path, config_name, split=split, cache_dir=cache_dir)
    if len(data) == 0:
        raise ValueError(f"split {split!r} of {path!r} is empty; there is nothing to train on.")
    image_column = _column(data, image_column, "image_column", datasets.Image)
    if label_column is None:
        label_column = next((n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)), None)
    elif label_column not in data.features:
        raise ValueError(f"label_column {label_column!r} is not in the data set, which has {list(data.features)}.")
    mode = image_mode or data[0][image_column].mode

    def read(i: int) -> np.ndarray:
        try:
            image = data[i][image_column]
            return _pixels(image, mode, image_mode is not None, resolution, None if center_crop else (seed, i))
        except (ValueError, OSError) as error:
            raise ValueError(f"image {i} of {path!r} ({split}): {error}") from error

    first = read(0)
    images = torch.empty((len(data), *first.shape), dtype=torch.uint8)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        decoded = pool.map(read, range(len(data)))
        for i, pixels in enumerate(tqdm(decoded, total=len(data), desc="decoding", disable=not progress_bar)):
            if pixels.shape != first.shape:
                raise ValueError(
                    f"image {i} of {path!r} has shape {pixels.shape[1:]}, the first one {first.shape[1:]}; "
                    "set resolution."
                )
            images[i] = torch.from_numpy(pixels)
    labels = None if label_column is None else torch.tensor(data[label_column][:], dtype=torch.int64)
    return ImageSet(images, labels, 256, f"{path}, {split}")


def _column(data: Any, name: str | None, argument: str, feature_type: type) -> str:
    found = [column for column, feature in data.features.items() if isinstance(feature, feature_type)]
    if name is None and found:
        return found[0]
    if name is None or name not in found:
        raise ValueError(f"{argument} must name a column of images, got {name!r}; there are {found or 'none'}.")
    return name


def _pixels(
    image: Image.Image, mode: str, convert: bool, resolution: int | None, crop_key: tuple | None
) -> np.ndarray:
    """uint8 array `(C, H, W)` of a PIL image, resized and cropped."""
    if mode not in ("L", "RGB"):
        raise ValueError(
            f"images must be 8-bit grayscale ('L') or RGB, got mode {mode!r}; set image_mode to convert them, knowing "
            "that transparency and 16-bit depth are lost, and that bits/dim are then of the converted images."
        )
    if image.mode != mode:
        if not convert:
            raise ValueError(f"mode {image.mode!r}, but the first image has {mode!r}; set image_mode to convert all.")
        image = image.convert(mode)
    if resolution is not None and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        if crop_key is not None:
            share = torch.rand(2, generator=keyed_generator(*crop_key)).tolist()
            left, top = int(share[0] * (width - resolution + 1)), int(share[1] * (height - resolution + 1))
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.array(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def histogram_bpd(train: ImageSet, test: ImageSet) -> float:
    """Bits/dim of `test` under the histogram of each pixel of `train`, with a tenth of a count added to each level."""
    counts = torch.full((train.images[0].numel(), train.num_levels), 0.1, dtype=torch.float64)
    flat = train.images.flatten(1).long().T
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    log_p = torch.log2(counts / counts.sum(1, keepdim=True))
    return -float(log_p.gather(1, test.images.flatten(1).long().T).mean())
