"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
