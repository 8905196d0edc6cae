"""Images as integers: decoded once, kept with their source and a fingerprint of every pixel."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..files import read_or_write, safetensors_header, whole_file
from ..threads import in_order
from .conditions import ConditionData
from .image_files import (
    DamagedImage,
    DecodedImage,
    check_frames,
    check_image_mode,
    decode_image,
    num_frames,
    row_name,
)
from .image_sources import MAX_CLASSES, ImageSource, check_label, missing_label, open_source

logger = logging.getLogger(__name__)

# version of the `decoded_cache` files; increase it if the same arguments give different pixels
CACHE_VERSION = 3
DIGITS = "scikit-learn digits"
MODE_OF = {1: "L", 3: "RGB"}  # by the number of channels
# images per thread that are decoded ahead of the consumer
LOOK_AHEAD = 16
# images per chunk of `histogram_bpd`, whose 8-byte index for each value must stay smaller than the data
_IMAGES_AT_ONCE = 4096


@dataclass(frozen=True)
class ImageSet:
    """Images as integers, decoded once and kept in memory or in a memory-mapped file.

    - `images`: uint8 levels in [0, num_levels), shape `(N, C, H, W)`.
    - `labels`: int64 classes, shape `(N,)`, or `None`.
    - `name`: the source of the images, recorded with every number.
    - `known_classes`, `class_names`: number and names of the classes of the whole data set, if known; this split may
      lack some of them.
    - `classes_in_split`: the classes in the whole split, of which this set may be a slice.
    - `image_column`, `label_column`: the columns that were read.
    - `files`: one line that says which files are used; `damaged` names the damaged ones that were left out.
    - `parts`: the rows of the data set, as (split, start, stop).
    - `conditions`: conditions beside the classes, or `None`.
    - `digests`: int64 digests of all pixels of each image before cropping, shape `(N,)`.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    num_levels: int
    name: str
    known_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    classes_in_split: frozenset[int] | None = None
    image_column: str | None = None
    label_column: str | None = None
    files: str | None = None
    damaged: tuple[str, ...] = ()
    parts: tuple[tuple[str, int, float], ...] = ()
    digests: torch.Tensor | None = None
    conditions: ConditionData | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the data set, or one more than the largest label; `None` without labels."""
        if self.labels is None:
            return None
        return self.known_classes or int(self.labels.max()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every pixel in order, which shows whether two numbers are of the same data; computed once."""
        digest = _new_digest(tuple(self.images.shape))
        digest.update(self.images.contiguous().numpy())
        return digest.hexdigest()


def labels_fingerprint(data: ImageSet) -> str | None:
    """Hash of the class of each image in order, `None` without classes."""
    if data.labels is None:
        return None
    return hashlib.blake2b(data.labels.numpy().tobytes(), digest_size=8).hexdigest()


def _new_digest(shape: tuple[int, ...]) -> Any:
    return hashlib.blake2b(repr(shape).encode(), digest_size=8)


def load_digits_split() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's bundled 8×8 digits with 17 levels: a fixed split into 1,500 training and 297 held-out images."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    names = tuple(str(digit) for digit in range(10))
    train, test = (
        ImageSet(images[part], labels[part], 17, f"{DIGITS}, {name}", len(names), names)
        for part, name in ((order[:1500], "1500 training"), (order[1500:], "297 held-out"))
    )
    return train, test


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
    frames: str | None = None,
    allow_shared: bool = False,
    skip_damaged: int = 0,
    cache_dir: str | None = None,
    seed: int = 0,
    num_workers: int = 2,
    progress_bar: bool = True,
    decoded_cache: bool = False,
) -> ImageSet:
    """An image data set from the Hub, a local copy of one, or a folder of image files.

    Args:
        path (`str`): name on the Hub, or a folder of parquet files or images; [`read_image_folder`] describes how
            folders of images define splits and classes.
        split, config_name (`str`): split, slices allowed (`"train[:2000]"`), and configuration of the data set.
        is_folder (`bool`, defaults to `False`): read `path` as a folder of image files, whatever else it contains.
        resolution (`int`, *optional*): side of the square images; the shorter side is resized to it and the longer
            side is cropped. Without it, images keep their size and must all have the same one.
        center_crop (`bool`, defaults to `False`): crop the center; otherwise at a position drawn once for each image.
        image_mode (`"RGB"` or `"L"`, *optional*): convert images to it. Without it, all images must have the mode of
            the first one, which must be one of these two. See [`image_files.decode`] for images that are always
            rejected.
        image_column, label_column (`str`, *optional*): columns; if not given, the only column of the right type. A
            class column that was found this way but holds no classes is ignored; `label_column=""` disables classes.
        frames (`"first"` or `"all"`, *optional*): frames to use from a file with several (TIFF, GIF, APNG, WebP);
            without it such files are rejected.
        allow_shared (`bool`, defaults to `False`): accept a folder of image files that has a file in two splits.
        skip_damaged (`int`, defaults to 0): leave out up to this many damaged or missing files, each with a warning
            in the log.
        cache_dir (`str`, *optional*): cache of `datasets`.
        seed (`int`, defaults to 0): key of the crops.
        num_workers (`int`, defaults to 2): decoding threads.
        progress_bar (`bool`, defaults to `True`): show a tqdm bar while decoding.
        decoded_cache (`bool`, defaults to `False`): decode into a file below `cache_dir`, or reuse an existing one,
            and map it into memory. The images are then decoded once, shared by all processes of a machine, and only
            the pages in use are in memory. The file name is a hash of everything that determines the pixels,
            including the source files.

    Returns: [`ImageSet`] with 256 levels. Writing to images of a decoded cache changes only this process's copy.
    Raises: `ValueError` for missing data, columns or classes, for a file in two splits, and for an image, which it
        names, that cannot be read, differs in size or mode, or is not 8-bit grayscale or RGB.
    """
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    check_image_mode(image_mode)
    check_frames(frames)
    source = open_source(
        path,
        split,
        config_name=config_name,
        is_folder=is_folder,
        image_column=image_column,
        label_column=label_column,
        cache_dir=cache_dir,
        allow_shared=allow_shared,
    )
    data, found = source.data, label_column is None
    if len(data) == 0:
        raise ValueError(f"split {split!r} of {path!r} has no images; choose another split or slice.")
    rows, workers = data.cast_column(source.image_column, datasets.Image(decode=False)), max(1, num_workers)
    declared_mode = image_mode or source.image_mode

    def read(place: tuple[int, int | None], shape: tuple[int, ...] | None) -> DecodedImage:
        i, frame = place
        row, mode = None, declared_mode or (MODE_OF[shape[0]] if shape else None)
        crop_key = None if center_crop else (seed, i) if not frame else (seed, i, frame)
        try:
            row = rows[i][source.image_column]
            image = decode_image(row, mode, declared_mode is not None, resolution, crop_key, frame)
            size = image.pixels.shape
            if shape and size != shape:
                raise ValueError(f"size {size[1:]}, but the first image has {shape[1:]}; set resolution.")
            return image
        except (ValueError, OSError) as error:
            kind = DamagedImage if isinstance(error, DamagedImage) else ValueError
            raise kind(f"image {i} of {path!r} ({split}{row_name(row)}): {error}") from error

    def in_threads(function: Callable, keys: Iterable) -> Iterable:
        return in_order(function, keys, workers, LOOK_AHEAD * workers - 1)

    def places(left_out: set[int]) -> list[tuple[int, int | None]]:
        """The (row, frame) pairs of all images."""
        kept = [i for i in range(len(data)) if i not in left_out]
        if frames != "all":
            return [(i, 0 if frames == "first" else None) for i in kept]
        counts = in_threads(lambda i: num_frames(rows[i][source.image_column]), kept)
        return [(i, frame) for i, count in zip(kept, counts, strict=True) for frame in range(count)]

    def decoded() -> _ImagesToStore:
        damaged = _find_damaged(len(data), lambda i: read((i, 0), None), in_threads, skip_damaged, progress_bar)
        chosen = places(set(damaged))
        if not chosen:
            raise ValueError(f"all images of {path!r} ({split}) are damaged.")
        shape = read(chosen[0], None).pixels.shape
        labels = _labels(source, found, f"{path!r} ({split}", [i for i, _ in chosen])
        results = in_threads(lambda place: read(place, shape), chosen)
        bar = tqdm(results, total=len(chosen), desc="decoding", disable=not progress_bar)
        return _ImagesToStore((len(chosen), *shape), labels, bar, list(damaged.values()))

    name = f"{path}, {split}"
    if decoded_cache:
        pixels_of = {
            "version": CACHE_VERSION, "pillow": PIL.__version__, "data": data._fingerprint, "name": name,
            "state": source.state, "paths": _path_stamps(rows, source.image_column),
            "columns": [source.image_column, source.label_column], "found": found, "mode": declared_mode,
            "resolution": resolution, "crop": None if resolution is None else "center" if center_crop else seed,
            "frames": frames, "skip_damaged": skip_damaged,
        }  # fmt: skip
        folder = Path(cache_dir or HF_DATASETS_CACHE).expanduser() / "decoded_images"
        stored = _load_or_write_cache(folder, pixels_of, name, decoded)
    else:
        stored = _in_memory(decoded())
    for reason in stored.damaged:
        logger.warning(f"left out: {reason}")
    classes = source.classes_in_split
    if classes is None and stored.labels is not None and "[" not in split:
        classes = frozenset(stored.labels.tolist())
    result = ImageSet(
        stored.images,
        stored.labels,
        256,
        name,
        known_classes=source.num_classes,
        class_names=source.class_names,
        classes_in_split=classes,
        image_column=source.image_column,
        label_column=source.label_column,
        files=source.files + (f", but for {len(stored.damaged)} that are damaged" if stored.damaged else ""),
        damaged=stored.damaged,
        parts=source.parts,
        digests=stored.digests,
    )
    if stored.fingerprint is not None:
        vars(result)["fingerprint"] = stored.fingerprint  # fills the cached property
    return result


@dataclass(frozen=True)
class _DecodedImages:
    """Decoded images, in memory or memory-mapped: fields of [`ImageSet`], and the fingerprint if it is known."""

    images: torch.Tensor
    labels: torch.Tensor | None
    digests: torch.Tensor
    damaged: tuple[str, ...]
    fingerprint: str | None = None


@dataclass(frozen=True)
class _ImagesToStore:
    """Images to be stored: their total shape, their classes, an iterator of the images, and the files left out."""

    shape: tuple[int, ...]
    labels: torch.Tensor | None
    images: Iterable[DecodedImage]
    damaged: list[str]


def _path_stamps(rows: Any, column: str) -> str:
    """Digest of the state of the local files behind rows that hold a path instead of the bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for chunk in rows.data.column(column).chunks:  # Arrow views, so the image bytes are not copied
        for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist():
            if path is not None and os.path.exists(path):
                stat = os.stat(path)
                digest.update(repr((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)).encode())
    return digest.hexdigest()


def _in_memory(new: _ImagesToStore) -> _DecodedImages:
    images, digests = torch.empty(new.shape, dtype=torch.uint8), []
    for target, image in zip(images, new.images, strict=True):
        target.copy_(torch.from_numpy(image.pixels))
        digests.append(image.digest)
    return _DecodedImages(images, new.labels, torch.tensor(digests), tuple(new.damaged))


def _find_damaged(
    count: int, read: Callable[[int], Any], in_threads: Callable, limit: int, progress_bar: bool
) -> dict[int, str]:
    """The reasons of damaged files by row; `ValueError` for more than `limit` of them. With `limit` 0, checks none."""

    def reason(i: int) -> str | None:
        try:
            read(i)
        except DamagedImage as error:
            return str(error)
        except ValueError:  # the file is intact; decoding rejects it
            pass
        return None

    damaged: dict[int, str] = {}
    if limit:
        reasons = tqdm(
            in_threads(reason, range(count)), total=count, desc="looking for damage", disable=not progress_bar
        )
        for i, text in enumerate(reasons):
            if text is not None:
                damaged[i] = text
            if len(damaged) > limit:
                raise ValueError(f"more than skip_damaged={limit} images are damaged; the last of them: {text}")
    return damaged


def _labels(source: ImageSource, found: bool, where: str, rows: list[int]) -> torch.Tensor | None:
    """int64 classes `(N,)` of `rows`; `None` without classes, or if the column found by type holds no class."""
    column = source.label_column
    if column is None:
        return None
    values, labels, i = source.data[column][:], [], 0
    try:
        for i in rows:
            labels.append(check_label(values[i], column, source.num_classes and min(source.num_classes, MAX_CLASSES)))
        if found and max(labels) < 0:
            return None
        if min(labels) < 0:
            i = rows[labels.index(-1)]
            raise missing_label(column)
    except ValueError as error:
        raise ValueError(f"image {i} of {where}): {error}") from error
    return torch.tensor(labels, dtype=torch.int64)


# ---- the decoded cache -------------------------------------------------------------------------------------------


def _load_or_write_cache(
    folder: Path,
    pixels_of: dict[str, Any],
    name: str,
    decoded: Callable[[], _ImagesToStore],
) -> _DecodedImages:
    """The images of the cache file in `folder` for `pixels_of`; one process writes the file if it does not exist."""
    key = json.dumps(pixels_of, sort_keys=True)
    path = folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"
    return read_or_write(
        path,
        f"the decoded images of {name}",
        lambda warn: _read_cache(path, name, warn),
        lambda: _write_cache(path, decoded(), {"pixels_of": key}),
    )


def _read_cache(path: Path, name: str, warn: bool = True) -> _DecodedImages | None:
    """The images of a cache file, memory-mapped; `None` if it does not exist or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:  # checks the size of the file against its header
            metadata, images = file.metadata(), file.get_tensor("images")
            digests = file.get_tensor("digests").clone()
            labels = file.get_tensor("labels").clone() if "labels" in file.keys() else None
    except (SafetensorError, OSError) as error:
        if warn:
            logger.warning(f"the decoded images in {path} are damaged ({error}); {name} is decoded again.")
        return None
    return _DecodedImages(images, labels, digests, tuple(json.loads(metadata["damaged"])), metadata["fingerprint"])


def _write_cache(
    path: Path,
    new: _ImagesToStore,
    metadata: dict[str, str],
) -> None:
    """Writes a temporary safetensors file row by row and renames it to `path` when it is complete."""
    shape, labels, metadata = new.shape, new.labels, metadata | {"damaged": json.dumps(new.damaged)}
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"the decoded images need {size / 1e9:.3g} GB, but {path.parent} has {free / 1e9:.3g} GB free; set "
            "cache_dir to a folder on a larger disk, or turn decoded_cache off."
        )
    digest, digests = _new_digest(shape), np.zeros(shape[0], "<i8")
    with whole_file(path) as file:
        file.write(_header(shape, labels is not None, metadata | {"fingerprint": "0" * 16}))
        start = file.tell()
        file.write(digests.tobytes())
        if labels is not None:
            file.write(labels.numpy().tobytes())
        for i, image in enumerate(new.images):
            digest.update(image.pixels)
            digests[i] = image.digest
            file.write(image.pixels.data)
        file.seek(start)
        file.write(digests.tobytes())
        file.seek(0)
        file.write(_header(shape, labels is not None, metadata | {"fingerprint": digest.hexdigest()}))


def _header(shape: tuple[int, ...], has_labels: bool, metadata: dict[str, str]) -> bytes:
    """Header of a safetensors file with `digests`, `labels` and `images`; the int64 tensors go first for alignment."""
    names = ("digests", "labels") if has_labels else ("digests",)
    return safetensors_header({**dict.fromkeys(names, ("I64", shape[:1])), "images": ("U8", shape)}, metadata)


def count_shared(train: ImageSet, test: ImageSet) -> int:
    """Number of images of `test` that are also in `train`, pixel for pixel, and so are not held out.

    Compares the images before cropping if both sets have digests.
    """
    if train.digests is not None and test.digests is not None:
        return int(torch.isin(test.digests, train.digests).sum())
    known = {hash(image.tobytes()) for image in train.images.numpy()}
    return sum(hash(image.tobytes()) in known for image in test.images.numpy())


def histogram_bpd(train: ImageSet, test: ImageSet) -> float:
    """Bits/dim of `test` under the histogram of each pixel of `train`, with a tenth of a count added to each level."""
    counts = torch.full((train.images[0].numel(), train.num_levels), 0.1, dtype=torch.float64)
    for part in train.images.split(_IMAGES_AT_ONCE):
        levels = part.flatten(1).long().T
        counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float64))
    log_p = torch.log2(counts / counts.sum(1, keepdim=True))
    total = sum(float(log_p.gather(1, part.flatten(1).long().T).sum()) for part in test.images.split(_IMAGES_AT_ONCE))
    return -total / test.images.numel()
