"""A folder of image files as a data set: its splits, classes and metadata, with every file accounted for.

Splits come only from the names of top-level folders, and classes only from the names of folders. The `imagefolder`
builder of `datasets` looks for words such as "train" and "test" anywhere in a path instead, so an image can end up in
two splits or in none (datasets issues 4015 and 5021). An ambiguous layout is an error that names the folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import file_digest

# the words that name a split, as in `datasets`
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# formats that Pillow identifies but does not decode
_UNREADABLE = {"HDF5", "GRIB", "BUFR", "MPEG", "WMF"}
# hidden files, and the thumbnails of Synology systems
_HIDDEN = (".", "__", "@eaDir")
_BROKEN_LINK = (0,) * 5  # the stamp of a broken link
# a message lists at most this many names
_NAMES_SHOWN = 3


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the image files that Pillow decodes, in lower case and with the dot."""
    Image.init()
    return frozenset(
        suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in _UNREADABLE
    )


@dataclass
class FolderSplit:
    """The rows of one split, column by column, and the files that are left out.

    `columns` holds lists of equal length. Image columns (`image_columns`) hold paths relative to the root. `num_files`
    counts the files in the split, and `left_out` counts those that are in no row, by reason.
    """

    columns: dict[str, list] = field(default_factory=dict)
    image_columns: list[str] = field(default_factory=list)
    num_files: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    why_no_classes: str | None = None

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> list:
        """One value per row; `None` in each row if this split lacks the column."""
        return self.columns.get(name) or [None] * self.num_rows


@dataclass(frozen=True)
class ImageFolder:
    """The contents of a folder of image files; see [`read_image_folder`].

    `class_names` are those of all splits together, sorted, so that an index means the same class in every split.
    `stamps` maps each file to what changes with it: size, modification times, device and inode.
    """

    path: str
    splits: dict[str, FolderSplit]
    class_names: tuple[str, ...] | None
    stamps: dict[str, tuple[int, ...]]

    def dataset(self, split: str) -> Any:
        """The `datasets.Dataset` of a split or a slice of it, such as `"train[:100]"`, with paths for images.

        Raises: `ValueError` for an unknown split and for overlapping slices.
        """
        import datasets

        parts = [(self.splits[name], slice(start, stop)) for name, start, stop in self._parts(split) if start < stop]
        # an empty slice keeps all columns
        used = [part for part, _ in parts] or self.splits.values()
        names = dict.fromkeys(column for part in used for column in part.columns)
        images = {column for part in self.splits.values() for column in part.image_columns}
        columns, features, stamps = {}, {}, []
        for column in names:
            values = [value for part, rows in parts for value in part.column(column)[rows]]
            if column in images:
                columns[column] = [None if value is None else os.path.join(self.path, value) for value in values]
                features[column] = datasets.Image()
                stamps += [self.stamps.get(value) for value in values]
            elif column == "label" and self.class_names:
                columns[column], features[column] = values, datasets.ClassLabel(names=list(self.class_names))
            else:
                columns[column], features[column] = _column_and_feature(values)
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        real = os.path.realpath(self.path)
        state = json.dumps([real, columns, list(map(str, features.values())), stamps], default=str)
        # hash the current state of the files, not only their paths
        data._fingerprint = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
        return data

    def summary(self, split: str) -> str:
        """One line: how many of the files in the splits are used, and why the others are not."""
        parts = self._parts(split)
        names = list(dict.fromkeys(name for name, _, _ in parts))
        used = sum(stop - start for _, start, stop in parts)
        cut = sum(self.splits[name].num_rows for name in names) - used
        total = sum(self.splits[name].num_files for name in names)
        reasons: Counter[str] = sum((self.splits[name].left_out for name in names), Counter())
        why = [f"{cut} outside of the slice"] if cut else []
        why += [f"{count} {reason}" for reason, count in sorted(reasons.items())]
        why += [f"no classes, since {self.splits[n].why_no_classes}" for n in names if self.splits[n].why_no_classes]
        return f"{used} of {total} files of {self.path} ({split}) are used" + (f"; {'; '.join(why)}" if why else "")

    def listing(self, split: str) -> str:
        """Digest of the names, sizes and classes of the files of whole splits, wherever the folder is."""
        parts = [self.splits[name] for name, _, _ in self._parts(split)]
        files = [file for part in parts for column in part.image_columns for file in part.columns[column]]
        sizes = [[file, self.stamps[file][0] if file else None] for file in files]
        text = json.dumps([sizes, self.class_names, [part.columns.get("label") for part in parts]], default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def classes_in(self, split: str) -> set[int] | None:
        """The class indices in a whole split, ignoring slices; `None` without classes."""
        names = [name for name, _, _ in self._parts(split)]
        labels = [self.splits[name].columns.get("label") for name in names]
        known = [values for values in labels if values]
        return {label for values in known for label in values} if self.class_names and known == labels else None

    def shared_files(self, column: str = "image") -> list[tuple[str, str]]:
        """Pairs of files from two splits that are the same file, also through a link, or have equal bytes."""
        split_of: dict[str, str] = {}
        pairs = []
        for name, part in self.splits.items():
            for file in part.columns.get(column, ()):
                if file is not None and split_of.setdefault(file, name) != name:
                    pairs.append((file, file))
        sizes = {file: self.stamps[file][0] for file in split_of}
        return pairs + equal_files({file: size for file, size in sizes.items() if size}, self.path, split_of)

    def _parts(self, split: str) -> list[tuple[str, int, int]]:
        """(name, start, stop) of each part of a split such as `"train[:100]+test"`."""
        lengths = {name: part.num_rows for name, part in self.splits.items()}
        return split_parts(split, lengths, self.path, ", by the names of the folders at its top level")


def split_parts(split: str, lengths: dict[str, int], path: str, why: str = "") -> list[tuple[str, int, int]]:
    """(name, start, stop) of each part of a split such as `"train[:100]+test"`, for splits of these lengths.

    Raises: `ValueError` for an unknown split (`why` is appended to the list of known ones), for an invalid
        specification, and for parts that overlap.
    """
    import datasets

    unknown = [name for name in split_names(split) if name not in lengths]
    if unknown:
        raise ValueError(f"Unknown split {unknown[0]!r} of {path!r}; there are {sorted(lengths)}{why}.")
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r} of {path!r} must be a split or a slice of it ({error}).") from error
    ranges = sorted((p.splitname, p.from_ or 0, lengths[p.splitname] if p.to is None else p.to) for p in parts)
    for name, start, stop in ranges:
        if start > stop:
            raise ValueError(f"split {split!r} of {path!r} must not end before it starts, got {name}[{start}:{stop}].")
    reached: dict[str, int] = {}
    for name, start, stop in ranges:
        if start < min(reached.get(name, 0), stop):
            raise ValueError(f"split {split!r} of {path!r} takes some images twice; its parts must not overlap.")
        reached[name] = max(reached.get(name, 0), stop)
    return [(p.splitname, p.from_ or 0, lengths[p.splitname] if p.to is None else p.to) for p in parts]


def split_names(split: str) -> list[str]:
    return [re.sub(r"(\[.*|\(.*)$", "", part.strip()) for part in split.split("+")]


def has_image_files(files: Iterable[str]) -> bool:
    """Whether the files are loose image files rather than parquet, Arrow or tar files."""
    found = False
    for file in files:
        suffix = posixpath.splitext(file)[1].lower()
        if suffix in (".parquet", ".arrow", ".tar") and posixpath.basename(file) not in METADATA_NAMES:
            return False
        found = found or suffix in image_suffixes()
    return found


def read_image_folder(path: str | os.PathLike, stamps: dict[str, tuple[int, ...]] | None = None) -> ImageFolder:
    """The splits, classes, metadata and files of a folder of images.

    - A top-level folder named like a split ("train", "val", "test", …) holds that split. Without such a folder, all
      images belong to the split "train".
    - The images of a split have classes if all of them are in folders at the same depth below it; the class is the
      name of the innermost folder. Folders named like splits are not classes.
    - If a split has a metadata.csv, metadata.jsonl or metadata.parquet, the images that it lists are used, in its
      order, with its columns. `file_name` and `…_file_name` are paths relative to the metadata file.
    - Symbolic links are followed. Hidden files and files other than images are left out and counted.

    Args:
        path (`str` or `PathLike`): the folder.
        stamps (`dict`, *optional*): result of [`walk`] for this folder, if it is known already.

    Raises: `ValueError` if the layout is ambiguous, and if the metadata cannot be read, list an image twice or list a
        missing image.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{str(path)!r} has no data files: the folder does not exist.")
    stamps = walk(root) if stamps is None else stamps
    seen = [file for file in stamps if not any(part.startswith(_HIDDEN) for part in file.split("/"))]
    metadata = [file for file in seen if posixpath.basename(file) in METADATA_NAMES]
    rows = _metadata_rows(root, metadata, stamps)
    listed = {row["file_name"] for row in rows}
    images = sorted(listed | {file for file in seen if _is_image(file)})
    others = sorted(set(seen) - set(images) - set(metadata))
    hidden = [file for file in sorted(set(stamps) - set(seen) - listed) if _is_image(file)]
    if not images:
        archives = [file for file in others if file.lower().endswith(_ARCHIVES)]
        why = (
            f"; archives are not opened, extract {_shorten(archives)} first" if archives else f": {_by_suffix(others)}"
        )
        raise ValueError(f"{str(path)!r} has no data files that Pillow decodes{why if others else ''}.")
    split_of_folder = _splits_of(images, str(path))

    def split_of(file: str) -> str | None:
        if not split_of_folder:
            return "train"
        return split_of_folder.get(file.split("/")[0]) if "/" in file else None

    splits = {name: FolderSplit() for name in sorted(set(split_of_folder.values()) or {"train"})}
    by_split: dict[str, list[str]] = {name: [] for name in splits}
    beside: Counter[str] = Counter()
    for file in images:
        name = split_of(file)
        if name is None:
            beside["beside the folders of the splits"] += 1
        else:
            by_split[name].append(file)
            splits[name].num_files += 1
    for kind, files in (("hidden", hidden), ("not an image that Pillow decodes", others)):
        for file in files:
            reason = kind if kind == "hidden" else f"{_suffix(file)}: {kind}"
            reason = "links that lead nowhere" if stamps[file] == _BROKEN_LINK else reason
            name = split_of(file)
            if name in splits:
                splits[name].num_files += 1
                splits[name].left_out[reason] += 1
    for part in splits.values():  # files at the top level could belong to any split
        part.left_out += beside
        part.num_files += sum(beside.values())
    for name, part in splits.items():
        _check_links(by_split[name], stamps, str(path))
        own = [row for row in rows if split_of(row["file_name"]) == name]
        if own:
            _fill_from_metadata(part, own, by_split[name], str(path))
        else:
            part.columns, part.image_columns = {"image": by_split[name]}, ["image"]
    class_names = _add_classes(splits, bool(split_of_folder))
    return ImageFolder(str(path), splits, class_names, stamps)


# ---- files -------------------------------------------------------------------------------------------------------


def walk(root: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The stamp of every file, by its path relative to `root` (with "/"), sorted; follows links."""
    found = []
    real_root = os.path.realpath(root)
    # path, prefix of the names in it, real path, and the real paths of the root and the links above
    folders: list[tuple[str, str, str, tuple[str, ...]]] = [(os.fspath(root), "", real_root, (real_root,))]
    while folders:
        folder, prefix, real, above = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                try:
                    name.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{str(root)!r} has a name that is not UTF-8, {name!r}; rename it.") from error
                if entry.is_dir():
                    if not entry.is_symlink():
                        folders.append((entry.path, f"{name}/", os.path.join(real, entry.name), above))
                        continue
                    target = os.path.realpath(entry.path)
                    leads_back = target in above or f"{real}{os.sep}".startswith(f"{target}{os.sep}")
                    if not leads_back:  # a link to a folder above it would never end
                        folders.append((entry.path, f"{name}/", target, (*above, target)))
                    continue
                try:
                    stat = entry.stat()
                    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)
                    found.append((name, stamp))
                except OSError:  # a broken link
                    found.append((name, _BROKEN_LINK))
    return dict(sorted(found))


def _check_links(files: list[str], stamps: dict[str, tuple[int, ...]], path: str) -> None:
    """Raises `ValueError` if two names in a split are the same file through a symbolic or hard link."""
    first_at: dict[tuple[int, ...], str] = {}
    for file in files:
        first = first_at.setdefault(stamps[file], file)
        if first != file and stamps[file] != _BROKEN_LINK:
            raise ValueError(f"{path!r} has one image under two names, {first} and {file} (a link); remove one.")


def _is_image(file: str) -> bool:
    return posixpath.splitext(file)[1].lower() in image_suffixes()


def equal_files(
    sizes: dict[str, int], root: str | os.PathLike = "", split_of: dict[str, str] | None = None
) -> list[tuple[str, str]]:
    """Pairs (first, other) of files below `root` with equal bytes; with `split_of`, only pairs from two splits.

    A file is read only if a file of another split has the same size. `sizes` are in bytes.
    """
    split_of = {file: file for file in sizes} if split_of is None else split_of
    by_size: dict[int, list[str]] = {}
    for file, size in sizes.items():
        by_size.setdefault(size, []).append(file)
    pairs = []
    for files in by_size.values():
        first_with: dict[str, str] = {}
        for file in files if len({split_of[file] for file in files}) > 1 else ():
            try:
                first = first_with.setdefault(file_digest(os.path.join(root, file)), file)
            except OSError:  # an unreadable file matches no other; decoding reports it
                continue
            if split_of[first] != split_of[file]:
                pairs.append((first, file))
    return pairs


# ---- splits and classes ------------------------------------------------------------------------------------------


def _splits_of(images: list[str], path: str) -> dict[str, str]:
    """The split of each top-level folder, empty if none is named like a split; `ValueError` if ambiguous."""
    tops = sorted({file.split("/")[0] for file in images if "/" in file})
    named = {top: SPLIT_WORDS[top.lower()] for top in tops if top.lower() in SPLIT_WORDS}
    if not named:
        _check_for_hidden_splits(images, tops, path)
        return {}
    for split, count in Counter(named.values()).items():
        if count > 1:
            folders = [top for top in named if named[top] == split]
            raise ValueError(f"{path!r} has several folders for the split {split!r}: {folders}; keep one of them.")
    rest = [top for top in tops if top not in named]
    if rest:
        raise ValueError(
            f"{path!r} has folders that name splits ({_shorten(list(named))}) beside others with images "
            f"({_shorten(rest)}). If all of them are classes, move them into one folder 'train'; if not, move "
            f"{_shorten(rest)} elsewhere."
        )
    return named


def _check_for_hidden_splits(images: list[str], tops: list[str], path: str) -> None:
    """Raises `ValueError` if folders look like splits but are not at the top level or not named like splits."""
    words = {}
    for top in tops:
        found = [SPLIT_WORDS.get(part.lower()) for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", top)]
        if any(found):
            words[top] = next(filter(None, found))
    if words and (len(words) == len(tops) or len(set(words.values())) > 1):
        raise ValueError(
            f"{path!r} has folders that look like splits ({_shorten(list(words))}); name them train, validation or "
            "test. If they are classes, move all of them into one folder 'train'."
        )
    inner = sorted({file.split("/")[1] for file in images if file.count("/") > 1})
    inner = [name for name in inner if name.lower() in SPLIT_WORDS]
    if len(tops) == 1 and inner:
        raise ValueError(
            f"{path!r} has the splits {_shorten(inner)} one folder deeper; use {os.path.join(path, tops[0])!r} "
            "instead."
        )
    parents = sorted({file.split("/")[-2] for file in images if "/" in file})
    if parents and all(parent.lower() in SPLIT_WORDS for parent in parents):
        raise ValueError(
            f"{path!r} has folders that name splits ({_shorten(parents)}) within other folders ({_shorten(tops)}); "
            "splits must be at the top level, as in train/cat/1.png."
        )


def _add_classes(splits: dict[str, FolderSplit], has_splits: bool) -> tuple[str, ...] | None:
    """Adds the column "label" where folders are classes; returns the names of all classes, or `None`."""
    names_of: dict[str, list[str]] = {}
    if any("label" in part.columns for part in splits.values()):  # the metadata define the labels
        return None
    for name, part in splits.items():
        files = part.columns[part.image_columns[0]]
        depths = Counter(file.count("/") - has_splits for file in files)
        if set(depths) == {0}:
            continue
        if len(depths) > 1:
            usual = depths.most_common(1)[0][0]
            odd = [file for file in files if file.count("/") - has_splits != usual]
            part.why_no_classes = f"{_shorten(odd)} not in a folder of a class as the others are"
            continue
        names_of[name] = [file.split("/")[-2] for file in files]
    known = sorted({name for names in names_of.values() for name in names})
    if len(known) == 1 and known[0].lower() not in SPLIT_WORDS:
        for name in names_of:
            splits[name].why_no_classes = f"all are of one, {known[0]!r}"
    if len(known) < 2 or all(name.lower() in SPLIT_WORDS for name in known):
        return None
    index = {name: i for i, name in enumerate(known)}
    for name, labels in names_of.items():
        splits[name].columns["label"] = [index[label] for label in labels]
    return tuple(known)


# ---- metadata ----------------------------------------------------------------------------------------------------


def _metadata_rows(root: Path, files: Iterable[str], known: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all metadata files, with paths made relative to the root."""
    rows = []
    for file in files:
        where, folder = str(root / file), posixpath.dirname(file)
        found = _read_metadata(root / file)
        if not found:
            raise ValueError(f"{where} lists no image; fill it, or remove it to take all images.")
        for number, row in enumerate(found, 1):
            row = {str(name).strip(): value for name, value in row.items()}
            if not isinstance(row.get("file_name"), str):
                raise ValueError(
                    f"{where} must have a file_name in each row, row {number} has {row.get('file_name')!r} among the "
                    f"columns {sorted(row)}."
                )
            for column in [column for column in row if column == "file_name" or column.endswith("_file_name")]:
                value = row[column]
                if value is None:
                    continue
                target = posixpath.normpath(posixpath.join(folder, str(value)))
                if "://" in str(value) or posixpath.isabs(str(value)) or target.startswith("../"):
                    raise ValueError(f"{where} must name files within {str(root)!r}, row {number} has {value!r}.")
                if target not in known:
                    raise ValueError(f"{where} lists {value!r} in row {number}, but that file does not exist.")
                row[column] = target
            rows.append(row)
    return rows


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            wrong = next((row for row in rows if not isinstance(row, dict)), None)
            if wrong is not None:
                raise ValueError(f"each line must be an object, got {str(wrong)[:60]!r}")
            return rows
        import pandas

        names = pandas.read_csv(path, nrows=0, encoding="utf-8-sig").columns
        paths = {name: str for name in names if name == "file_name" or str(name).endswith("_file_name")}
        table = pandas.read_csv(path, dtype=paths, encoding="utf-8-sig").convert_dtypes()
        return [
            {name: None if pandas.isna(value) else value for name, value in row.items()}
            for row in table.to_dict("records")
        ]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8, but its byte {error.start} is {error.object[error.start]:#04x} ({error.reason}); "
            "save it as UTF-8."
        ) from error
    except Exception as error:  # a damaged file can raise any exception in pandas, JSON or Arrow
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _fill_from_metadata(part: FolderSplit, rows: list[dict[str, Any]], files: list[str], path: str) -> None:
    """Fills the columns of a split from the metadata rows that list its images."""
    counts = Counter(row["file_name"] for row in rows)
    twice = [file for file, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"the metadata of {path!r} list some images more than once ({_shorten(twice)}); list each image in one "
            "row."
        )
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        is_path = name == "file_name" or name.endswith("_file_name")
        column = (name.removesuffix("file_name").removesuffix("_") or "image") if is_path else name
        if column in part.columns:
            raise ValueError(
                f"the metadata of {path!r} have several columns named {column!r}, one of them {name!r} (file_name "
                "becomes the column 'image'); rename one."
            )
        part.columns[column] = [row.get(name) for row in rows]
        if is_path:
            part.image_columns.append(column)
    named = {file for column in part.image_columns for file in part.columns[column]}
    other = len((named - set(counts)) & set(files))
    part.left_out += Counter({"named by other columns of the metadata": other})
    part.left_out += Counter({"not listed in the metadata": len(set(files) - named)})
    part.image_columns.sort(key=lambda column: column != "image")


def _column_and_feature(values: list) -> tuple[list, Any]:
    """A column and its feature; a column of mixed types becomes text."""
    import datasets
    import pyarrow as pa

    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        values = [None if value is None else str(value) for value in values]
        array = pa.array(values, pa.string())
    return array.to_pylist(), datasets.Features.from_arrow_schema(pa.schema({"column": array.type}))["column"]


# ---- messages ----------------------------------------------------------------------------------------------------


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _suffix(file: str) -> str:
    return posixpath.splitext(file)[1].lower() or posixpath.basename(file)


def _by_suffix(files: list[str]) -> str:
    counts = Counter(_suffix(file) for file in files)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
