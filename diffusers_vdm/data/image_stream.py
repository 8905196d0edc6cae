"""Images read as they are needed, for data that fit neither in memory nor on the disk, in an order that is a key's.

The order of an epoch is a function of (seed, epoch): the shards (files) in keyed order, and the rows that follow from
them in blocks of `buffer_size`, each block in keyed order. To go on anywhere, only the block of that place is needed.
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
from .image_files import DamagedImage, check_image_mode, decode, row_name
from .image_sources import check_label, missing_label, open_source
from .images import ImageSet

logger = logging.getLogger(__name__)

# files are gathered into so many shards at most: the state holds a number for each
MAX_SHARDS = 1024


class ImageStream:
    """A data set of images that is read while it is trained on, by the streaming of `datasets`.

    `batch(positions)` gives the images at any places of the endless order of training, one epoch after another. Each
    epoch holds every image once. What stands at a place is a function of the data, `seed`, `buffer_size` and the place
    alone: not of how places are asked for, of the number of processes, or of where a run was stopped.

    - Places are meant to be asked for in increasing order, by one caller at a time, such as one background thread.
      What lies between them is read, but not decoded: each of several processes reads all and decodes its own rows.
      Do not call it in the workers of a `DataLoader`: `datasets` would give each a part of the shards.
    - A jump back, and the first call of a resumed run, starts at the shard of that place if the lengths of those
      before it are known, which [`state_dict`] keeps. Else what is before it in its epoch is read again, undecoded.
    - Images are shuffled within blocks and blocks across shards: well if the files are many and each mixed. Files that
      are sorted by class want a block as large as several files. A folder of loose image files is one shard in the
      order of its names: give a `buffer_size` of all of them, of which only the paths are held. About `buffer_size`
      encoded images are held otherwise.

    Args:
        path, split, config_name, is_folder (`str`, `str`, `str`, `bool`): as for [`load_images`], but that slices of a
            split cannot be streamed.
        resolution, center_crop, image_mode, image_column, label_column, allow_shared, cache_dir: as for
            [`load_images`]; the place of a crop is drawn once for each image.
        frames (`"first"`, *optional*): take the first frame of files with several, which are refused else.
        skip_damaged (`int`, defaults to 0): go on in spite of up to so many files that are damaged or missing. The
            image that follows in the order takes the place of such a one; [`ImageStream.damaged`] lists them.
        seed (`int`, defaults to 0): key of the order and of the crops.
        num_workers (`int`, defaults to 2): decoding threads.
        buffer_size (`int`, defaults to 1000): images of a block.
        num_images (`int`, *optional*): images of the split. Without it what the data set declares is taken, and else
            it is counted in the first epoch; a wrong number is an error when the first epoch ends.

    Raises: `ValueError` as [`load_images`], here for the first image and in `batch` for those it is asked for.
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
            raise ValueError(f"slices of a split cannot be streamed, got split={split!r}; name a whole one.")
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
        # image files on the Hub are read and decoded as soon as a row is, whatever type the column is cast to
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
        rows = ((s, i, row) for s in range(self._num_shards) for i, row in enumerate(self._read_shard(s)))
        first = next(rows, None)
        if first is None:
            raise ValueError(f"split {split!r} of {path!r} is empty; there is nothing to train on.")
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
        digest.update(pixels)
        self._fingerprint = digest.hexdigest()

        self._following: Iterator[tuple[int, int, dict[str, Any]]] | None = None  # rows of an epoch, from a place on
        self._epoch = self._offset = 0  # the place of the next of them

    @property
    def damaged(self) -> tuple[str, ...]:
        """The files that were left out so far, and why."""
        return tuple(self._damaged.values())

    @property
    def image_column(self) -> str:
        """The column of the images."""
        return self._image_column

    @property
    def label_column(self) -> str | None:
        """The column of the classes, `None` without classes."""
        return self._label_column

    @property
    def has_labels(self) -> bool:
        """Whether `batch` gives classes."""
        return self._label_column is not None

    @property
    def fingerprint(self) -> str:
        """Hash of the first image as it is given, the number of shards, the columns, and the names of the classes.

        Of a folder of images also of the names and sizes of all files. It differs for other data and other settings,
        but not a data set of another kind that changed after its first image: to see every pixel is to read all of it,
        which [`ImageSet.fingerprint`] does.
        """
        return self._fingerprint

    @property
    def num_images(self) -> int | None:
        """Images of an epoch; `None` until the first one ended, if nobody declared it."""
        return self._declared or self._counted

    @property
    def _counted(self) -> int | None:
        return sum(self._lengths.values()) if len(self._lengths) == self._num_shards else None

    def state_dict(self) -> dict[str, Any]:
        """What lets another process go on at any place without reading what is before it; JSON holds it.

        The lengths of the shards that were read, and what the order depends on; not the place, which the caller knows.
        """
        lengths = [self._lengths.get(shard) for shard in range(self._num_shards)]
        return {**self._order_of_state(), "shard_lengths": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the lengths of `state_dict`; `ValueError` if it is of other data or of another order."""
        expected = self._order_of_state()
        wrong = {name: (state.get(name), value) for name, value in expected.items() if state.get(name) != value}
        lengths = state.get("shard_lengths", [])
        if wrong or len(lengths) != self._num_shards:
            raise ValueError(
                f"the state must be of the same data and order, but (state, now) differ in {wrong or 'the shards'}; "
                "name the data and the seed of the run that it is of."
            )
        self._lengths |= {shard: length for shard, length in enumerate(lengths) if length is not None}
        self._following = None

    def _order_of_state(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "seed": self._seed, "buffer_size": self._buffer_size}

    def batch(self, positions: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images and classes at places of the endless order of training.

        Args:
            positions (iterable of `int`): places, from 0; best in increasing order.

        Returns: uint8 `(B, C, H, W)`, and int64 `(B,)` or `None`.
        Raises: `ValueError` that names the image that cannot be read, differs from the first one in size or mode, or
            lacks a class; `OSError` for what the network reports. What is asked for next is then read afresh.
        """
        positions = list(positions)
        if not positions or min(positions) < 0:
            raise ValueError(f"positions must be whole numbers from 0, at least one, got {positions[:5]}.")
        rows = [self._row_at(position) for position in positions]
        with ThreadPoolExecutor(self._num_workers) as pool:
            decoded = list(pool.map(self._decode_or_note, rows))
        for k, position in enumerate(positions):
            while decoded[k] is None:  # damaged: the next image in the order takes its place
                position += 1
                decoded[k] = self._decode_or_note(self._row_at(position))
        pixels, labels = zip(*decoded, strict=True)
        images = torch.from_numpy(np.stack(pixels))
        return images, torch.tensor(labels, dtype=torch.int64) if self.has_labels else None

    def take(self, count: int) -> ImageSet:
        """The first `count` images of the order, or all of a split that holds fewer, kept in memory."""
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

    # ---- which row stands where ----------------------------------------------------------------------------------

    def _row_at(self, position: int) -> tuple[int, int, dict[str, Any]]:
        """(shard, row in it, the row) at a place of the endless order."""
        length = self.num_images
        epoch, offset = divmod(position, length) if length else (0, position)
        following, self._following = self._following, None  # none, if an error ends it
        if following is not None and epoch != self._epoch and length - self._offset <= self._buffer_size:
            self._check_end(following, length - self._offset)
        if following is None or epoch != self._epoch or offset < self._offset:
            following, self._epoch, self._offset = self._ordered(epoch, offset), epoch, offset
        row = next(islice(following, offset - self._offset, None), None)
        if row is None:  # the epoch ended before
            self._check_count()
            return self._row_at(position)  # its length is known now
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
            f"{self.name} was said to hold {self._declared} images, but has {counted}; set num_images to their number."
        )

    def _ordered(self, epoch: int, start: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Rows of an epoch from a place on: blocks of `_source`, each in keyed order; reads as it gives."""
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
        """Rows from a place on, shards in keyed order; those before it are not opened if their lengths are known."""
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
                    f"shard {shard} of {self.name} had {length} images and now has {count}; start afresh."
                )
            self._lengths[shard] = count
            passed += count

    def _read_shard(self, shard: int) -> Iterator[dict[str, Any]]:
        try:
            yield from self._shard(shard)
        except Exception as error:  # of the network, of Arrow, or of datasets
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
        """The image and its class; `None` for a damaged file, which is noted, while there are few enough of them."""
        try:
            return self._decode(place)
        except DamagedImage as error:
            if place[:2] not in self._damaged:
                if len(self._damaged) >= self._skip_damaged:
                    raise
                self._damaged[place[:2]] = str(error)
                logger.warning(f"left out: {error}")
            return None
