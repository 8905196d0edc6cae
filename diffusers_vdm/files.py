"""Files that are whole or not there, what they hold, and a lock that ends with its process."""

from __future__ import annotations

import errno
import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write into, beside `path`, which gets that name when all is in it and on the disk; else it is gone."""
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
    """Writes `content` to `path` so that no half file ever stands in the place of a good one."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def file_digest(path: str | os.PathLike) -> str:
    """Hash of all that a file holds, 16 bytes of BLAKE2b in hexadecimal; `OSError` for one that cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class Lock:
    """A file that one process at a time can hold. A process that dies, however it dies, holds nothing any more.

    Folders that `path` lacks are created. [`release`] removes the file, and those folders if they are still empty.

    Args:
        path (`str` or `os.PathLike`): the file; nothing is written into it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> bool:
        """Takes the lock without waiting: `False` if another process holds it, or another `Lock` of this one.

        On a file system without locks a warning says so, and the answer is `True`.

        Raises: `OSError` if the file cannot be created.
        """
        for attempt in range(_ATTEMPTS):
            parents = [self.path.parent, *self.path.parent.parents]
            self._created += [folder for folder in parents if not folder.exists() and folder not in self._created]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except (FileNotFoundError, FileExistsError):  # the holder ended just now, and removed the folder
                if attempt == _ATTEMPTS - 1:  # or a file stands in its place
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
            os.close(handle)  # the holder ended just now, and removed this file: another process may hold a new one
        raise OSError(f"{self.path} could not be locked: it is removed again and again.")

    def release(self) -> None:
        """Gives the lock back; nothing happens if it is not held."""
        if self._handle is None:
            return
        if os.name == "nt":  # Windows removes no open file
            self._close()
            with suppress(OSError):
                self.path.unlink()
        else:
            self.path.unlink(missing_ok=True)
            self._close()
        for folder in sorted(self._created, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # something else is in it
                folder.rmdir()
        self._created.clear()

    def _close(self) -> None:
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
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            return False
        warnings.warn(
            f"the file system of {path} has no locks; make sure that no other run writes there.", stacklevel=3
        )
    return True


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
