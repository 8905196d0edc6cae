"""Open a split of an image data set, and find its image column, its class column and its classes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .image_files import MODES, one_line, read_content
from .image_folder import (
    METADATA_NAMES,
    SPLIT_WORDS,
    equal_files,
    has_image_files,
    image_suffixes,
    read_image_folder,
    split_names,
    split_parts,
    walk,
)

logger = logging.getLogger(__name__)

# a file of these kinds that is in no split is probably data that was overlooked
_DATA_SUFFIXES = image_suffixes() | {".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".tar", ".zip"}
# a column with larger integers is not a class column
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class ImageSource:
    """A split of an image data set and the roles of its columns.

    - `data`: a `datasets.Dataset`, or an `IterableDataset` if it is streamed.
    - `label_column`, `class_names`: `None` if the data set has no classes or no names for them.
    - `num_classes`: the classes of the whole data set, as declared or found in the label column, including those that
      this split lacks.
    - `files`: one line that says which files are used.
    - `parts`: the rows that are used, as (split, start, stop).
    - `classes_in_split`: the classes that the whole split contains, if known.
    - `num_rows`: the number of rows, if known.
    - `listing`: digest of the files of a folder and their classes, if known.
    - `state`: digest of a local data set that changes with any of its files.
    """

    data: Any
    image_column: str
    label_column: str | None
    image_mode: str | None
    class_names: tuple[str, ...] | None
    num_classes: int | None
    files: str
    parts: tuple[tuple[str, int, float], ...]
    classes_in_split: frozenset[int] | None = None
    num_rows: int | None = None
    listing: str | None = None
    state: str | None = None


def open_source(
    path: str,
    split: str,
    *,
    config_name: str | None = None,
    is_folder: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    allow_shared: bool = False,
) -> ImageSource:
    """Opens a split of a data set of images; the arguments are those of [`load_images`].

    Raises: `ValueError` if the data are missing, the split is unknown, the files cannot be read, a file is in two
        splits, or the image or class column is ambiguous; `OSError` for errors of the network or the disk.
    """
    stamps = _stamps_of(path)
    state, folder = _state_of(path, stamps), None
    if is_folder or _is_image_folder(path, stamps):
        folder = read_image_folder(path, stamps)
        if config_name is not None:
            raise ValueError(f"config_name must be None for a folder of images, got {config_name!r} for {path!r}.")
        lengths, rows_of = {name: part.num_rows for name, part in folder.splits.items()}, folder.dataset
    elif _is_saved_to_disk(path):
        saved = _saved_to_disk(path)
        lengths, rows_of = {name: len(part) for name, part in saved.items()}, partial(_rows_on_disk, saved, path)
    else:
        cache = _cache_of(state, cache_dir)
        lengths, rows_of = (
            None,
            partial(_open_dataset, path, config_name=config_name, cache=cache, streaming=streaming),
        )
    data = rows_of(split)
    if lengths is None:
        lengths = {name: part.num_examples or 0 for name, part in (data.info.splits or {}).items()}
    num_rows = len(data) if hasattr(data, "__len__") else None
    count = "all" if num_rows is None else num_rows
    files = folder.summary(split) if folder is not None else f"{count} images of {path} ({split}) are used"
    # the lengths that a stream declares may be missing or wrong
    own_splits = list(dict.fromkeys(split_names(split)))
    parts: list[tuple[str, int, float]] = [(name, 0, math.inf) for name in own_splits]
    if lengths and (folder is not None or not streaming or all(lengths.values())):
        parts = [*split_parts(split, lengths, path)]
    image_column, label_column, declared_mode = find_columns(data, image_column, label_column)
    shared = folder.shared_files(image_column) if folder is not None and not allow_shared else []
    if shared:
        raise ValueError(
            f"{path!r} has {len(shared)} images in two splits, the first {shared[0][0]} and {shared[0][1]}; remove "
            "them from one split, or set allow_shared to use them in both."
        )
    names = class_names_of(data, label_column)
    classes = folder.classes_in(split) if folder is not None and label_column == "label" and names else None
    count = len(names) if names else None
    if label_column and not names and (folder is not None or not streaming):
        count = _count_classes(rows_of("+".join(own_splits)) if "[" in split else data, label_column)
    if num_rows is not None and streaming:
        data = data.to_iterable_dataset()
    return ImageSource(
        data=data,
        image_column=image_column,
        label_column=label_column,
        image_mode=declared_mode,
        class_names=names,
        num_classes=count,
        files=files,
        parts=tuple(parts),
        classes_in_split=None if classes is None else frozenset(classes),
        num_rows=num_rows,
        listing=folder.listing(split) if folder is not None and streaming else None,
        state=state,
    )


def overlap(parts: Iterable[tuple[str, int, float]], others: Iterable[tuple[str, int, float]]) -> float:
    """Number of rows that two selections of one data set have in common; see [`ImageSource`] for `parts`."""
    return sum(
        max(0, min(stop, end) - max(start, begin))
        for name, start, stop in parts
        for other, begin, end in others
        if name == other or "all" in (name, other)
    )


def _stamps_of(path: str) -> dict[str, tuple[int, ...]] | None:
    """The files of a local data set and their stamps; `None` for a name on the Hub."""
    return walk(path) if os.path.isdir(path) else None


def _is_image_folder(path: str, stamps: dict[str, tuple[int, ...]] | None) -> bool:
    """Whether a local data set is a folder of image files."""
    return stamps is not None and not _declares_files(path) and has_image_files(stamps)


def _declares_files(path: str | os.PathLike) -> bool:
    """Whether the README.md of a local data set declares the files of each split."""
    try:
        text = (Path(path) / "README.md").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    header = re.match(r"---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    return bool(header and re.search(r"^configs:", header[1], re.MULTILINE))


# ---- other data sets ---------------------------------------------------------------------------------------------


def _open_dataset(path: str, split: str, *, config_name: str | None, cache: str | None, streaming: bool) -> Any:
    """The `datasets.Dataset`, or `IterableDataset` if `streaming`, of a Hub data set or a folder of data files."""
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"{path!r} ({split})"
    options: dict[str, Any] = {"cache_dir": cache}
    if int(datasets.__version__.split(".")[0]) < 4:
        options["trust_remote_code"] = False  # later versions never run remote code
    try:
        check_data_files(datasets.load_dataset_builder(path, config_name, **options), path)
        return datasets.load_dataset(path, config_name, split=split, streaming=streaming, **options)
    except FileNotFoundError as error:
        raise ValueError(
            f"{where} has no data files; name a data set on the Hub, a folder of images or a folder of parquet files "
            f"(datasets says: {one_line(error)})."
        ) from error
    except DatasetsError as error:
        raise ValueError(f"{where} cannot be read: {one_line(error.__cause__ or error)}") from error
    except _SplitError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{where} has no data: an empty split, or a folder without image files.") from error
        if str(error).startswith("Bad split"):  # the wording of the streaming code
            raise ValueError(
                f"Unknown split {split!r} of {path!r}.{str(error)[len(f'Bad split: {split}.') :]}"
            ) from error
        raise ValueError(f"{where} cannot be read: {one_line(error)}") from error


def _cache_of(state: str | None, cache_dir: str | None) -> str | None:
    """A separate cache for each state of a local data set, because `datasets` may key it by the last folder only."""
    if state is None:
        return cache_dir
    from datasets.config import HF_DATASETS_CACHE

    return str(Path(cache_dir or HF_DATASETS_CACHE).expanduser() / "local_data_sets" / state)


def _state_of(path: str, stamps: dict[str, tuple[int, ...]] | None) -> str | None:
    """Digest of the location of a local data set and of the names, sizes and times of all its files."""
    if stamps is None:
        return None
    text = json.dumps([os.path.realpath(path), [[name, *stamp] for name, stamp in stamps.items()]])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _is_saved_to_disk(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_to_disk(path: str) -> dict[str, Any]:
    """The splits of a data set written by `save_to_disk`.

    `datasets.load_dataset` would read every Arrow file in the folder, including those that `map` has cached there.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # a damaged file can raise any exception in Arrow
        raise ValueError(f"{path!r} cannot be read: {one_line(error)}") from error
    if isinstance(loaded, datasets.Dataset):
        return {str(loaded.split or "train"): loaded}
    return {str(name): data for name, data in loaded.items()}


def _rows_on_disk(splits: dict[str, Any], path: str, split: str) -> Any:
    import datasets

    parts = split_parts(split, {name: len(data) for name, data in splits.items()}, path)
    return datasets.concatenate_datasets([splits[name].select(range(a, b)) for name, a, b in parts])


class _SplitError(ValueError):
    """`datasets` has put files into two splits, or into none, because of words in their paths."""


def check_data_files(builder: Any, path: str) -> None:
    """Raises `ValueError` if `datasets` has put a file of a data set into two splits, or into none.

    `datasets` takes any word such as "train" or "test" in a path for a split. Files in no split are detected in a
    local folder without declared files, and in a Hub data set that consists of image files.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as ImageFolderBuilder

    splits = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    split_of: dict[str, str] = {}
    for name, files in splits.items():
        for file in files:
            other = split_of.setdefault(file, name)
            if other != name:
                raise _SplitError(
                    f"the file {_short(file)!r} of {path!r} is in the splits {other!r} and {name!r}, by words in its "
                    "path. Put it below a folder that is named by its split only, or declare data_files in the "
                    "README.md of the data set."
                )
    is_local = os.path.isdir(path)
    if not splits or (is_local and _declares_files(path)):
        return
    if is_local:
        there: Iterable[str] = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    elif isinstance(builder, ImageFolderBuilder):
        there = _files_on_the_hub(builder)
    else:
        return
    if is_local:
        _check_whole(list(split_of), path)
    suffixes = {posixpath.splitext(file)[1].lower() for file in split_of} | _DATA_SUFFIXES
    used = {_short(file, path) for file in split_of}
    ignored = {"dataset_info.json", "dataset_infos.json", "state.json", "config.json", "dataset_dict.json"}
    ignored |= set(METADATA_NAMES)
    unused = sorted(
        name
        for name in (_short(file, path) for file in there)
        if posixpath.splitext(name)[1].lower() in suffixes
        and name not in used
        and posixpath.basename(name) not in ignored
        and not any(part.startswith((".", "__")) for part in name.split("/"))
    )
    if unused:
        raise _SplitError(
            f"{len(unused)} files of {path!r} are in no split, the first {unused[0]!r}: words in the paths of others "
            f"were taken for the splits {sorted(splits)}. Name files and folders by their split only, or declare "
            "data_files in the README.md of the data set."
        )


def _check_whole(files: list[str], path: str) -> None:
    """Raises `ValueError` if the data set has a file twice, or if a numbered set of files is incomplete."""
    numbered: dict[tuple[str, int], list[int]] = {}
    for file in files:
        found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(.*)", _short(file, path))
        if found:
            numbered.setdefault((found[1], int(found[3])), []).append(int(found[2]))
    for (name, total), numbers in numbered.items():
        missing = sorted(set(range(total)) - set(numbers))
        if missing:
            raise _SplitError(f"{path!r} lacks file {missing[0]} of the {total} that make up {name!r}; download it.")
        if len(numbers) > total:
            raise _SplitError(f"{path!r} has {len(numbers)} files of {name!r} instead of {total}; remove the others.")
    for first, file in equal_files({file: os.path.getsize(file) for file in files}):
        raise _SplitError(
            f"{path!r} contains one file twice, {_short(first, path)!r} and {_short(file, path)!r}; remove one."
        )


def _short(file: str, root: str | None = None) -> str:
    """A file's path within its data set, where it can be derived from the location of the data set."""
    if "://" in file:
        return re.sub(r"^hf://datasets/[^/]+/[^/@]+@[^/]+/", "", file)
    return os.path.relpath(os.path.realpath(file), os.path.realpath(root)).replace(os.sep, "/") if root else file


def _files_on_the_hub(builder: Any) -> list[str]:
    import fsspec

    try:
        base = builder.base_path
        system, folder = fsspec.core.url_to_fs(base)
        return [f"hf://{name}" if str(base).startswith("hf://") else name for name in system.find(folder)]
    except Exception as error:  # the Hub is unreachable, or the data set is only in the cache
        logger.info(f"the files of {getattr(builder, 'repo_id', None)} cannot be listed: {one_line(error)}")
        return []


# ---- columns and classes -----------------------------------------------------------------------------------------


def find_columns(data: Any, image_column: str | None, label_column: str | None) -> tuple[str, str | None, str | None]:
    """Names of the image column and the class column (`None` without classes), and the declared image mode.

    A column that is not given is found by its type; `label_column=""` disables classes. A `ClassLabel` whose names are
    all split words is not a class column: `datasets` creates it from folders named "train" and "test" (issue 7880).

    Raises: `ValueError` for a missing column or one without images, and if several columns have the right type.
    """
    import datasets

    features: dict[str, Any] = data.features or {}
    images: list[str] = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is None and len(images) > 1:
        raise ValueError(f"image_column must name one of the image columns, which are {images}.")
    if (image_column or next(iter(images), None)) not in images:
        raise ValueError(
            f"image_column must name an image column, got {image_column!r}; the image columns are {images or 'none'} "
            f"of {list(features)}."
        )
    image_column = image_column or images[0]
    if label_column is None:
        classes = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel) and not _are_splits(f)]
        if len(classes) > 1:
            raise ValueError(
                f"label_column must name one of the class columns, which are {classes}; label_column='' disables "
                "classes."
            )
        label_column = next(iter(classes), None)
    elif label_column and label_column not in features:
        raise ValueError(f"label_column {label_column!r} is not in the data set, which has {list(features)}.")
    elif label_column and _are_splits(features[label_column]):
        raise ValueError(
            f"label_column {label_column!r} has the classes {features[label_column].names}, which are the names of "
            "splits; set label_column='' to disable classes."
        )
    mode = getattr(features[image_column], "mode", None)
    return image_column, label_column or None, mode if mode in MODES else None


def _are_splits(feature: Any) -> bool:
    names = getattr(feature, "names", None)
    return bool(names) and all(str(name).lower() in SPLIT_WORDS for name in names)


def class_names_of(data: Any, label_column: str | None) -> tuple[str, ...] | None:
    """The names of the classes if the column is a `ClassLabel`, else `None`."""
    names = getattr((data.features or {}).get(label_column), "names", None) if label_column else None
    return tuple(names) if names else None


def _count_classes(data: Any, column: str) -> int | None:
    """The number of classes without names: one more than the largest label."""
    labels = [label for label in data[column][:] if isinstance(label, int)]
    return max(labels) + 1 if labels and max(labels) >= 0 else None


def check_label(label: Any, column: str, num_classes: int | None = None) -> int:
    """The class index of a row, -1 if it has no class; raises `ValueError` if the value is not a class index."""
    if label is None:
        return -1
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(
            f"label_column {column!r} must hold integers, the indices of the classes, got {label!r}; cast it to "
            "datasets.ClassLabel, or choose another column."
        )
    limit = MAX_CLASSES if num_classes is None else num_classes
    if label >= limit:
        raise ValueError(
            f"label_column {column!r} must hold class indices from 0 to {limit - 1}, got {label}; cast it to "
            "datasets.ClassLabel, which numbers the values, or choose another column."
        )
    return max(label, -1)


def missing_label(column: str) -> ValueError:
    """The error for a row without a class."""
    return ValueError(
        f"label_column {column!r} holds no class (None or -1) here; leave such images out, or set label_column='' to "
        "use all images without classes."
    )


# ---- images in two splits ----------------------------------------------------------------------------------------


def shared_with_other_splits(path: str, split: str, *, progress_bar: bool = True, **options: Any) -> dict[str, int]:
    """For each other split, the number of image files that it shares with `split`, byte for byte.

    Splits without shared files are left out. A folder of images gives `{}`, because [`open_source`] compares its
    splits. `options` are those of [`open_source`].
    """
    if options.get("is_folder") or _is_image_folder(path, _stamps_of(path)):
        return {}
    source = open_source(path, split, **options)
    own = {name for name, _, _ in source.parts}
    splits = source.data.info.splits or {}
    others = [str(name) for name, part in splits.items() if name not in own and part.num_examples != 0]
    digests = set(_file_digests(source, f"hashing {split}", progress_bar)) if others else set()
    counts = {}
    for name in others if digests else ():
        other = open_source(path, name, **options)
        counts[name] = len(digests & set(_file_digests(other, f"comparing with {name}", progress_bar)))
    return {name: count for name, count in counts.items() if count}


def _file_digests(source: ImageSource, title: str, progress_bar: bool) -> Iterator[bytes]:
    import datasets

    column = source.image_column
    rows = source.data.cast_column(column, datasets.Image(decode=False)).select_columns(column)
    for row in tqdm(rows, desc=title, disable=not progress_bar):
        try:
            content = read_content(row[column])
        except (ValueError, OSError):  # a damaged image matches no other; decoding reports it
            continue
        yield hashlib.blake2b(content, digest_size=16).digest()
