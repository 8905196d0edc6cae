"""Atomic writes, files that one process writes for all, hashes, and a lock that is released when its process ends."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_Content = TypeVar("_Content")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, synced and renamed to `path` at the end, or removed if there is an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes `content` to `path` without ever replacing a good file by an incomplete one."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None) -> bytes:
    """The start of a safetensors file, up to the values of its tensors, which follow in the same order.

    Args:
        tensors: the type, one of `"U8"`, `"F32"` and `"I64"`, and the shape of each; the largest type must come first.
        metadata (`Mapping[str, str]`, *optional*): texts about the file.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + {"U8": 1, "F32": 4, "I64": 8}[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def read_or_write(
    path: Path, what: str, read: Callable[[bool], _Content | None], write: Callable[[], None]
) -> _Content:
    """What is in a file that one process writes if it does not exist or is damaged.

    Args:
        path (`Path`): the file; its folder is created.
        what (`str`): its content, for the error.
        read: returns its content, or `None`; called with whether it should warn of a damaged file.
        write: writes it, while no other process does.

    Raises: `OSError` if it cannot be read after it was written.
    """
    from filelock import FileLock

    found = read(True)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # released even if the process dies
            found = read(False)  # another process may have written it meanwhile
            if found is None:
                write()
                found = read(True)
    if found is None:
        raise OSError(f"{what} cannot be read from {path}, although they were just written.")
    return found


def file_digest(path: str | os.PathLike) -> str:
    """Hash of a file's content, 16 bytes of BLAKE2b in hexadecimal; `OSError` if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class Lock:
    """A file lock that one process at a time can hold; it is released when the process ends, for whatever reason.

    Missing parent folders are created. [`release`] removes the file, and those folders if they are still empty.

    Args:
        path (`str` or `os.PathLike`): the file; nothing is written to it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> bool:
        """Acquires the lock without waiting; `False` if another process, or another `Lock` of this one, holds it.

        On a file system without locks it warns and returns `True`.

        Raises: `OSError` if the file cannot be created.
        """
        for attempt in range(_ATTEMPTS):
            parents = [self.path.parent, *self.path.parent.parents]
            self._created += [folder for folder in parents if not folder.exists() and folder not in self._created]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except (FileNotFoundError, FileExistsError):  # the holder just released the lock and removed the folder
                if attempt == _ATTEMPTS - 1:  # or the folder's name is taken by a file
                    raise
                time.sleep(0.005)
                continue
            if not _lock(handle, self.path):
                os.close(handle)
                return False
            if _is_same_file(handle, self.path):
                self._handle = handle
                _HELD.append(self)
                return True
            os.close(handle)  # the holder just removed this file, so another process may hold a new one
        raise OSError(f"{self.path} could not be locked: other processes keep removing it.")

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        if self._handle is None:
            return
        if os.name == "nt":  # Windows cannot remove an open file
            self._close()
            with suppress(OSError):
                self.path.unlink()
        else:
            self.path.unlink(missing_ok=True)
            self._close()
        for folder in sorted(self._created, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()
        self._created.clear()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            _HELD.remove(self)


_HELD: list[Lock] = []
_ATTEMPTS = 200


def _close_in_a_child() -> None:
    """A forked child that outlives its parent must not hold the parent's locks."""
    for lock in list(_HELD):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_a_child)


def _lock(handle: int, path: Path) -> bool:
    try:
        if os.name == "nt":
            # not an import statement: diffusers searches a repository's code for these, and asks to install each
            msvcrt = import_module("msvcrt")
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl = import_module("fcntl")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            return False
        warnings.warn(
            f"the file system of {path} does not support locks; make sure that no other run writes there.",
            stacklevel=3,
        )
    return True


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
