"""Where images come from: a split of a data set, opened; its columns and classes, found or refused by name."""

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

# files of these kinds beside those that are read are data that somebody may miss
_DATA_SUFFIXES = image_suffixes() | {".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".tar", ".zip"}
# a column of whole numbers with larger ones is no column of classes
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class ImageSource:
    """A split of a data set: rows with images, and which of the columns are which.

    `data` is a `datasets.Dataset`, or an `IterableDataset` where it is streamed. `label_column` and `class_names` are
    `None` where there are no classes or no names for them. `num_classes` counts the classes of the whole data set, as
    far as they are declared or in a column of labels, also those that no row of this split has. `files` says in one
    line which files are used, `parts` which rows of which splits (name, start, stop), `classes_in_split` which classes
    the whole split holds, `num_rows` how many rows there are, `listing` is a digest of the files of a folder and their
    classes, where these are known. `state` is another one whenever a file of a local data set changes.
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

    Raises: `ValueError` where there are no data, the split is unknown, the files cannot be read, a file is in two
        splits, or it is not clear which column holds the images or the classes; `OSError` for what the network or the
        disk reports.
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
    # what a stream declares may be nothing, or wrong
    own_splits = list(dict.fromkeys(split_names(split)))
    parts: list[tuple[str, int, float]] = [(name, 0, math.inf) for name in own_splits]
    if lengths and (folder is not None or not streaming or all(lengths.values())):
        parts = split_parts(split, lengths, path)
    image_column, label_column, declared_mode = find_columns(data, image_column, label_column)
    shared = folder.shared_files(image_column) if folder is not None and not allow_shared else []
    if shared:
        raise ValueError(
            f"{path!r} has {len(shared)} images in two splits, the first {shared[0][0]} and {shared[0][1]}; remove "
            "them from one, or set allow_shared to count them in both."
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
    """How many rows two selections of one data set have in common; see [`ImageSource.parts`]."""
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
    """Whether the copy of a data set is a folder of image files."""
    return stamps is not None and not _declares_files(path) and has_image_files(stamps)


def _declares_files(path: str | os.PathLike) -> bool:
    """Whether the README.md of a local data set says which files make which split."""
    try:
        text = (Path(path) / "README.md").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    header = re.match(r"---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    return bool(header and re.search(r"^configs:", header[1], re.MULTILINE))


# ---- other data sets ---------------------------------------------------------------------------------------------


def _open_dataset(path: str, split: str, *, config_name: str | None, cache: str | None, streaming: bool) -> Any:
    """The `datasets.Dataset`, or `IterableDataset` if `streaming`, of a name on the Hub or a folder of data files."""
    import datasets

    where = f"{path!r} ({split})"
    options: dict[str, Any] = {"cache_dir": cache}
    if int(datasets.__version__.split(".")[0]) < 4:
        options["trust_remote_code"] = False  # later versions run none
    try:
        check_data_files(datasets.load_dataset_builder(path, config_name, **options), path)
        return datasets.load_dataset(path, config_name, split=split, streaming=streaming, **options)
    except FileNotFoundError as error:
        raise ValueError(
            f"{where} has no data files; name a data set on the Hub, a folder of images or a folder of parquet files "
            f"(datasets says: {one_line(error)})."
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{where} cannot be read: {one_line(error.__cause__ or error)}") from error
    except _SplitError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{where} has no data: an empty split, or a folder without image files.") from error
        if str(error).startswith("Bad split"):  # what streaming calls it
            raise ValueError(
                f"Unknown split {split!r} of {path!r}.{str(error)[len(f'Bad split: {split}.') :]}"
            ) from error
        raise ValueError(f"{where} cannot be read: {one_line(error)}") from error


def _cache_of(state: str | None, cache_dir: str | None) -> str | None:
    """A cache of its own for each state of a local data set, which `datasets` may know by its last folder alone."""
    if state is None:
        return cache_dir
    import datasets

    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "local_data_sets" / state)


def _state_of(path: str, stamps: dict[str, tuple[int, ...]] | None) -> str | None:
    """Digest of where a local data set lies, and of the names, sizes and times of all its files."""
    if stamps is None:
        return None
    text = json.dumps([os.path.realpath(path), [[name, *stamp] for name, stamp in stamps.items()]])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _is_saved_to_disk(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_to_disk(path: str) -> dict[str, Any]:
    """The splits of what `save_to_disk` wrote.

    `datasets.load_dataset` would take every Arrow file in the folder, those that `map` has cached there included.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # whatever Arrow makes of a damaged file
        raise ValueError(f"{path!r} cannot be read: {one_line(error)}") from error
    if isinstance(loaded, datasets.Dataset):
        return {str(loaded.split or "train"): loaded}
    return {str(name): data for name, data in loaded.items()}


def _rows_on_disk(splits: dict[str, Any], path: str, split: str) -> Any:
    import datasets

    parts = split_parts(split, {name: len(data) for name, data in splits.items()}, path)
    return datasets.concatenate_datasets([splits[name].select(range(a, b)) for name, a, b in parts])


class _SplitError(ValueError):
    """Files that `datasets` has put into two splits, or into none, by words in their paths."""


def check_data_files(builder: Any, path: str) -> None:
    """Raises `ValueError` where a file of a data set is in two splits, or in none, by a guess of `datasets`.

    `datasets` takes any word such as "train" or "test" in a path for a split. A file that is in no split is noticed in
    a local folder without declared files, and in a data set on the Hub that consists of image files.
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
                    "path. Put it below a folder that is named by its split alone, or declare data_files in the "
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
            f"were taken for the splits {sorted(splits)}. Name files and folders by their split alone, or declare "
            "data_files in the README.md of the data set."
        )


def _check_whole(files: list[str], path: str) -> None:
    """`ValueError` where a file is there twice, or a numbered set of files is not complete."""
    numbered: dict[tuple[str, int], list[int]] = {}
    for file in files:
        found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(.*)", _short(file, path))
        if found:
            numbered.setdefault((found[1], int(found[3])), []).append(int(found[2]))
    for (name, total), numbers in numbered.items():
        missing = sorted(set(range(total)) - set(numbers))
        if missing:
            raise _SplitError(f"{path!r} lacks file {missing[0]} of the {total} that make up {name!r}; fetch it.")
        if len(numbers) > total:
            raise _SplitError(f"{path!r} has {len(numbers)} files of {name!r}, which are {total}; remove the others.")
    for first, file in equal_files({file: os.path.getsize(file) for file in files}):
        raise _SplitError(
            f"{path!r} holds one file twice, {_short(first, path)!r} and {_short(file, path)!r}; remove one."
        )


def _short(file: str, root: str | None = None) -> str:
    """A file's path within its data set, as far as it follows from where the data set lies."""
    if "://" in file:
        return re.sub(r"^hf://datasets/[^/]+/[^/@]+@[^/]+/", "", file)
    return os.path.relpath(os.path.realpath(file), os.path.realpath(root)).replace(os.sep, "/") if root else file


def _files_on_the_hub(builder: Any) -> list[str]:
    import fsspec

    try:
        base = builder.base_path
        system, folder = fsspec.core.url_to_fs(base)
        return [f"hf://{name}" if str(base).startswith("hf://") else name for name in system.find(folder)]
    except Exception as error:  # a Hub that cannot be asked, or a data set in the cache alone
        logger.info(f"the files of {getattr(builder, 'repo_id', None)} cannot be listed: {one_line(error)}")
        return []


# ---- columns and classes -----------------------------------------------------------------------------------------


def find_columns(data: Any, image_column: str | None, label_column: str | None) -> tuple[str, str | None, str | None]:
    """Names of the columns of images and classes (`None` without classes), and the mode that the data set declares.

    A column that is not named is found by its type; `label_column=""` takes no classes. `ClassLabel`s whose names are
    all words for splits are no classes: `datasets` makes them of folders named "train" and "test" (its issue 7880).

    Raises: `ValueError` for a column that is not there or holds no images, naming those that do, and where several
        columns of one type leave the choice open.
    """
    import datasets

    features = data.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is None and len(images) > 1:
        raise ValueError(f"image_column must name one of the columns of images, of which there are {images}.")
    if (image_column or next(iter(images), None)) not in images:
        raise ValueError(
            f"image_column must name a column of images, got {image_column!r}; there are {images or 'none'} among "
            f"{list(features)}."
        )
    image_column = image_column or images[0]
    if label_column is None:
        classes = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel) and not _are_splits(f)]
        if len(classes) > 1:
            raise ValueError(
                f"label_column must name one of the columns of classes, of which there are {classes}; label_column='' "
                "takes no classes."
            )
        label_column = next(iter(classes), None)
    elif label_column and label_column not in features:
        raise ValueError(f"label_column {label_column!r} is not in the data set, which has {list(features)}.")
    elif label_column and _are_splits(features[label_column]):
        raise ValueError(
            f"label_column {label_column!r} has the classes {features[label_column].names}, which are the names of "
            "splits; set label_column='' to take no classes."
        )
    mode = getattr(features[image_column], "mode", None)
    return image_column, label_column or None, mode if mode in MODES else None


def _are_splits(feature: Any) -> bool:
    names = getattr(feature, "names", None)
    return bool(names) and all(str(name).lower() in SPLIT_WORDS for name in names)


def class_names_of(data: Any, label_column: str | None) -> tuple[str, ...] | None:
    """The names of the classes, where the column is a `ClassLabel`."""
    names = getattr((data.features or {}).get(label_column), "names", None) if label_column else None
    return tuple(names) if names else None


def _count_classes(data: Any, column: str) -> int | None:
    """One more than the largest class, for classes without names."""
    labels = [label for label in data[column][:] if isinstance(label, int)]
    return max(labels) + 1 if labels and max(labels) >= 0 else None


def check_label(label: Any, column: str, num_classes: int | None = None) -> int:
    """The class as it stands in the row, -1 where there is none; `ValueError` if it is no index of a class."""
    if label is None:
        return -1
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(
            f"label_column {column!r} must hold whole numbers, the indices of the classes, got {label!r}; cast it to "
            "datasets.ClassLabel, or take another column."
        )
    limit = MAX_CLASSES if num_classes is None else num_classes
    if label >= limit:
        raise ValueError(
            f"label_column {column!r} must hold indices of classes from 0 to {limit - 1}, got {label}; cast it to "
            "datasets.ClassLabel, which numbers the values, or take another column."
        )
    return max(label, -1)


def missing_label(column: str) -> ValueError:
    """The error for a row without a class."""
    return ValueError(
        f"label_column {column!r} holds no class (none, or -1) here; leave such images out, or set label_column='' to "
        "take all images without classes."
    )


# ---- images in two splits ----------------------------------------------------------------------------------------


def shared_with_other_splits(path: str, split: str, *, progress_bar: bool = True, **options: Any) -> dict[str, int]:
    """How many image files of a split each other split holds as well, byte for byte.

    Splits without such files are left out. A folder of images is compared when it is opened, and not here. `options`
    are those of [`open_source`].
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
        except (ValueError, OSError):  # a damaged image is none of two; decoding it will name it
            continue
        yield hashlib.blake2b(content, digest_size=16).digest()
