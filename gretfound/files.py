"""Files on a local disk that are there whole or not at all: written under another name, synchronised, then renamed."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path`` to write under; the file gets its own name when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file; an earlier one is replaced.

    Args:
        path: The file; its folder is made.
        content: What it holds.
        mode: Its permissions, less those that the process masks.
    """
    with whole(path) as partial:
        _write(partial, content, mode)


def create(path: Path, content: bytes, *, mode: int = 0o666) -> bool:
    """Writes a file unless there is one already; of several writers exactly one wins.

    Returns:
        Whether this call wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _write(partial, content, mode)
        os.link(partial, path)  # the one operation that fails if the name is taken and never tears
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _write(path: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
