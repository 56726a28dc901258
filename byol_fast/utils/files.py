"""Atomic file writes: readers never see a partial file, also after a crash."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Temporary path that replaces `path`, synced to disk, when the block succeeds.

    If the block raises, `path` is unchanged and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def printable_name(name: str) -> str:
    r"""A file name, which may hold any bytes, as text that every encoding of Unicode has: others become `\xHH`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while writing into a folder.

    A write that is going on there in another process fails.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if _TEMPORARY_NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot synchronize folders
            raise
    finally:
        os.close(handle)
