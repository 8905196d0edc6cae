"""Images streamed as they are needed, for data that fit neither in memory nor on disk, in a keyed random order.

The order of an epoch is a function of (seed, epoch): the shards (files) are permuted, their rows are concatenated and
cut into blocks of `buffer_size`, and each block is permuted. Resuming at any position needs only its block.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..randomness import keyed_generator
from .conditions import ConditionData
from .image_files import DamagedImage, check_image_mode, decode, row_name
from .image_sources import check_label, missing_label, open_source
from .images import ImageSet

logger = logging.getLogger(__name__)

# upper limit on the number of shards, because the state holds one number per shard
MAX_SHARDS = 1024


class ImageStream:
    """An image data set that is streamed with `datasets` while a model trains on it.

    `batch(positions)` returns the images at any positions of the endless training order, which is one epoch after
    another. Each epoch contains every image once. The image at a position depends only on the data, `seed`,
    `buffer_size` and the position: not on the order of the requests, the number of processes, or where a run stopped.

    - Request positions in increasing order and from one caller at a time, such as one background thread. Rows between
      them are read but not decoded, so each of several processes reads all rows and decodes its own. Do not call it
      in the workers of a `DataLoader`: `datasets` would give each worker only a part of the shards.
    - A jump back, and the first call of a resumed run, starts at the shard of that position if the lengths of the
      shards before it are known; [`state_dict`] keeps them. Otherwise the rows before it in its epoch are read again
      without decoding.
    - Rows are permuted within blocks, and blocks span shards, which shuffles well if the data have many files of mixed
      content. Files that are sorted by class need a block as large as several files. A folder of loose image files is
      one shard in the order of the file names: set `buffer_size` to the number of files, of which only the paths are
      held in memory. For other data, about `buffer_size` encoded images are held in memory.

    Args:
        path, split, config_name, is_folder (`str`, `str`, `str`, `bool`): as for [`load_images`], except that slices
            of a split cannot be streamed.
        resolution, center_crop, image_mode, image_column, label_column, allow_shared, cache_dir: as for
            [`load_images`]; the crop position is drawn once for each image.
        frames (`"first"`, *optional*): take the first frame of files with several; without it they are rejected.
        skip_damaged (`int`, defaults to 0): tolerate up to this many damaged or missing files. The next image in the
            order replaces such a file; [`ImageStream.damaged`] lists them.
        seed (`int`, defaults to 0): key of the order and of the crops.
        num_workers (`int`, defaults to 2): decoding threads.
        buffer_size (`int`, defaults to 1000): images per block.
        num_images (`int`, *optional*): images in the split. Without it, the number that the data set declares is used,
            or else the images are counted in the first epoch. A wrong number is an error at the end of that epoch.

    Raises: `ValueError` as [`load_images`], in the constructor for the first image and in `batch` for the others.
    """

    num_levels = 256

    def __init__(
        self,
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
        buffer_size: int = 1000,
        num_images: int | None = None,
    ):
        import datasets

        check_image_mode(image_mode)
        if frames not in (None, "first"):
            raise ValueError(f"frames must be 'first' or None in a stream, got {frames!r}; load_images takes 'all'.")
        if "[" in split:
            raise ValueError(f"slices of a split cannot be streamed, got split={split!r}; use the whole split.")
        for name, value in (("buffer_size", buffer_size), ("num_images", num_images)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        source = open_source(
            path,
            split,
            config_name=config_name,
            is_folder=is_folder,
            image_column=image_column,
            label_column=label_column,
            cache_dir=cache_dir,
            streaming=True,
            allow_shared=allow_shared,
        )
        data, found = source.data, label_column is None
        self._image_column, self._label_column = source.image_column, source.label_column
        self.class_names, self.files = source.class_names, source.files
        self.classes_in_split, self.parts = source.classes_in_split, source.parts
        declared = (data.info.splits or {}).get(split)
        self._declared = num_images or source.num_rows or getattr(declared, "num_examples", None) or None
        # otherwise image files on the Hub are decoded when the row is read, whatever type the column is cast to
        data = data.decode(False) if hasattr(data, "decode") else data
        self._rows = data.cast_column(self._image_column, datasets.Image(decode=False))
        self._num_shards = min(data.num_shards, MAX_SHARDS)
        self._lengths: dict[int, int] = {}
        self._seed, self._buffer_size, self._num_workers = seed, buffer_size, max(1, num_workers)
        self._resolution, self._center_crop = resolution, center_crop
        self.name = f"{path}, {split}, streamed"

        self._mode = image_mode or source.image_mode
        self._convert, self._frame = bool(self._mode), 0 if frames == "first" else None
        self._skip_damaged = skip_damaged
        self._damaged: dict[tuple[int, int], str] = {}  # by shard and row
        self.shape: tuple[int, int, int] | None = None
        self.conditions: ConditionData | None = None
        rows = ((s, i, row) for s in range(self._num_shards) for i, row in enumerate(self._read_shard(s)))
        first = next(rows, None)
        if first is None:
            raise ValueError(f"split {split!r} of {path!r} has no images; choose another split or slice.")
        if found and self._label_column and check_label(first[2][self._label_column], self._label_column) < 0:
            self._label_column = None  # a split without classes
        self.num_classes: int | None = source.num_classes if self._label_column else None
        decoded = self._decode_or_note(first)
        while decoded is None:
            first = next(rows, None)
            if first is None:
                raise ValueError(f"all images of {path!r} ({split}) are damaged: {self.damaged[0]}")
            decoded = self._decode_or_note(first)
        pixels, _ = decoded
        self.shape, self._mode = pixels.shape, "L" if pixels.shape[0] == 1 else "RGB"
        identity = [self._num_shards, self._image_column, self._label_column, self.num_classes, list(self.shape)]
        identity += [source.listing, self.class_names if self._label_column else None]
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8)
        digest.update(pixels.data)
        self._fingerprint = digest.hexdigest()

        self._following: Iterator[tuple[int, int, dict[str, Any]]] | None = None  # the next rows of the epoch
        self._epoch = self._offset = 0  # the position of the first of them

    @property
    def damaged(self) -> tuple[str, ...]:
        """The files left out so far, with the reasons."""
        return tuple(self._damaged.values())

    @property
    def image_column(self) -> str:
        """The image column."""
        return self._image_column

    @property
    def label_column(self) -> str | None:
        """The class column, `None` without classes."""
        return self._label_column

    @property
    def has_labels(self) -> bool:
        """Whether `batch` returns classes."""
        return self._label_column is not None

    @property
    def fingerprint(self) -> str:
        """Hash of the first decoded image, the number of shards, the columns and the class names.

        For a folder of images it also covers the names and sizes of all files. For other data sets it does not detect
        changes after the first image; that requires reading every pixel, as [`ImageSet.fingerprint`] does.
        """
        return self._fingerprint

    @property
    def num_images(self) -> int | None:
        """Images per epoch; if it is not declared, `None` until the end of the first epoch."""
        return self._declared or self._counted

    @property
    def _counted(self) -> int | None:
        return sum(self._lengths.values()) if len(self._lengths) == self._num_shards else None

    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON types, that lets another process resume at any position without reading earlier rows.

        It holds the lengths of the shards that were read and what the order depends on, but not the position, which
        the caller keeps.
        """
        lengths = [self._lengths.get(shard) for shard in range(self._num_shards)]
        return {**self._order_of_state(), "shard_lengths": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the shard lengths of a `state_dict`; raises `ValueError` if it is of other data or another order."""
        expected = self._order_of_state()
        wrong = {name: (state.get(name), value) for name, value in expected.items() if state.get(name) != value}
        lengths = state.get("shard_lengths", [])
        if wrong or len(lengths) != self._num_shards:
            raise ValueError(
                f"the state must be of the same data and order, but (state, now) differ in {wrong or 'the shards'}; "
                "use the data, seed and buffer_size of the run that saved it."
            )
        self._lengths |= {shard: length for shard, length in enumerate(lengths) if length is not None}
        self._following = None

    def _order_of_state(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "seed": self._seed, "buffer_size": self._buffer_size}

    def batch(self, positions: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images and classes at positions of the endless training order.

        Args:
            positions (iterable of `int`): positions, from 0; fastest in increasing order.

        Returns: images, uint8 `(B, C, H, W)`, and classes, int64 `(B,)`, or `None` without classes.
        Raises: `ValueError` that names the image if it cannot be read, differs from the first one in size or mode, or
            lacks a class; `OSError` for network errors. The next call then reads its rows from the source again.
        """
        positions = list(positions)
        if not positions or min(positions) < 0:
            raise ValueError(f"positions must be at least one integer, all of them at least 0, got {positions[:5]}.")
        rows = [self._row_at(position) for position in positions]
        with ThreadPoolExecutor(self._num_workers) as pool:
            decoded = list(pool.map(self._decode_or_note, rows))
        for k, position in enumerate(positions):
            while decoded[k] is None:  # damaged: the next image in the order replaces it
                position += 1
                decoded[k] = self._decode_or_note(self._row_at(position))
        pixels, labels = zip(*decoded, strict=True)
        images = torch.from_numpy(np.stack(pixels))
        return images, torch.tensor(labels, dtype=torch.int64) if self.has_labels else None

    def take(self, count: int) -> ImageSet:
        """The first `count` images of the order, or all images of a smaller split, kept in memory."""
        images, labels = self.batch(range(count))
        if self.num_images is not None and self.num_images < count:  # known once its end has been read
            count = self.num_images
            images, labels = images[:count], None if labels is None else labels[:count]
        return ImageSet(
            images,
            labels,
            self.num_levels,
            f"{self.name}, {count} images",
            known_classes=self.num_classes,
            class_names=self.class_names,
            image_column=self.image_column,
            label_column=self.label_column,
            files=self.files,
            parts=self.parts,
        )

    # ---- the order of the rows -----------------------------------------------------------------------------------

    def _row_at(self, position: int) -> tuple[int, int, dict[str, Any]]:
        """(shard, index in the shard, row) at a position of the endless order."""
        length = self.num_images
        epoch, offset = divmod(position, length) if length else (0, position)
        following, self._following = self._following, None  # stays None if an error is raised
        left = (length or 0) - self._offset  # rows of the epoch that were not given yet
        if following is not None and epoch != self._epoch and left <= self._buffer_size:
            self._check_end(following, left)
        if following is None or epoch != self._epoch or offset < self._offset:
            following, self._epoch, self._offset = self._ordered(epoch, offset), epoch, offset
        row = next(islice(following, offset - self._offset, None), None)
        if row is None:  # the epoch ended before this position, so its length is known now
            self._check_count()
            return self._row_at(position)
        self._following, self._offset = following, offset + 1
        return row

    def _check_end(self, following: Iterator, left: int) -> None:
        if sum(1 for _ in islice(following, left + 1)) > left:
            raise self._wrong_number(f"more than {self.num_images}")
        self._check_count()

    def _check_count(self) -> None:
        if self._declared and self._counted and self._counted != self._declared:
            raise self._wrong_number(str(self._counted))

    def _wrong_number(self, counted: str) -> ValueError:
        return ValueError(
            f"{self.name} was declared to have {self._declared} images, but has {counted}; set num_images to that."
        )

    def _ordered(self, epoch: int, start: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The rows of an epoch from `start` on: blocks of `_source`, each permuted by key; reads lazily."""
        number, offset = divmod(start, self._buffer_size)
        source = self._source(epoch, number * self._buffer_size)
        block: list = list(islice(source, self._buffer_size))
        while block:
            generator = keyed_generator(self._seed, "stream block", epoch, number)
            following: list = []
            for i in torch.randperm(len(block), generator=generator)[offset:].tolist():
                row, block[i] = block[i], None
                following.extend(islice(source, 1))
                yield row
            following.extend(islice(source, self._buffer_size - len(following)))  # after a start within the block
            block, number, offset = following, number + 1, 0

    def _source(self, epoch: int, start: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The rows from `start` on, shards permuted by key; skips earlier shards if their lengths are known."""
        passed = 0
        order = torch.randperm(self._num_shards, generator=keyed_generator(self._seed, "stream shards", epoch))
        for shard in order.tolist():
            length = self._lengths.get(shard)
            if length is not None and passed + length <= start:
                passed += length
                continue
            count = 0
            for count, row in enumerate(self._read_shard(shard), 1):
                if passed + count > start:
                    yield shard, count - 1, row
            if length not in (None, count):
                raise ValueError(
                    f"shard {shard} of {self.name} had {length} images and now has {count}; start a new run."
                )
            self._lengths[shard] = count
            passed += count

    def _read_shard(self, shard: int) -> Iterator[dict[str, Any]]:
        try:
            yield from self._shard(shard)
        except Exception as error:  # from the network, Arrow or datasets
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"shard {shard} of {self.name} cannot be read: {error}") from error

    def _shard(self, shard: int) -> Iterable[dict[str, Any]]:
        return self._rows.shard(num_shards=self._num_shards, index=shard) if self._num_shards > 1 else self._rows

    # ---- one row -------------------------------------------------------------------------------------------------

    def _decode(self, place: tuple[int, int, dict[str, Any]]) -> tuple[np.ndarray, int | None]:
        shard, i, row = place
        image, label = row[self._image_column], None
        crop_key = None if self._center_crop else (self._seed, "stream crop", shard, i)
        try:
            pixels = decode(image, self._mode, self._convert, self._resolution, crop_key, self._frame)
            if self.shape is not None and pixels.shape != self.shape:
                raise ValueError(f"size {pixels.shape[1:]}, but the first image has {self.shape[1:]}; set resolution.")
            if self._label_column is not None:
                label = check_label(row[self._label_column], self._label_column, self.num_classes)
                if label < 0:
                    raise missing_label(self._label_column)
        except (ValueError, OSError) as error:
            kind = DamagedImage if isinstance(error, DamagedImage) else ValueError
            raise kind(f"image {i} of shard {shard} of {self.name}{row_name(image)}: {error}") from error
        return pixels, label

    def _decode_or_note(self, place: tuple[int, int, dict[str, Any]]) -> tuple[np.ndarray, int | None] | None:
        """The image and its class; for up to `skip_damaged` damaged files, records the file and returns `None`."""
        try:
            return self._decode(place)
        except DamagedImage as error:
            if place[:2] not in self._damaged:
                if len(self._damaged) >= self._skip_damaged:
                    raise
                self._damaged[place[:2]] = str(error)
                logger.warning(f"left out: {error}")
            return None
