"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pscope.errors import PscopeError


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path that was given as a text or a path. Raises PscopeError for anything else, and for nothing."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise PscopeError(f"a file or folder is named by a text or a pathlib.Path, not by {path!r}")
    return Path(path)


def beside(path: Path) -> Path:
    """Where this process writes what is to become a file."""
    return path.with_name(f".{os.getpid()}.{path.name}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to; what stands there afterwards becomes the file, and nothing is left if writing fails."""
    unfinished = beside(path)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
