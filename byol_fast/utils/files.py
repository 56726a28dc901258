"""Atomic file writes: readers never see a partial file, also after a crash."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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


class JSONLine(NamedTuple):
    """A line of a file of JSON objects that is not blank."""

    number: int
    """Counted from 1."""
    content: dict[str, Any] | None
    """The object; None for a line that is damaged or holds something else."""
    is_whole: bool
    """The line ends with a line feed. The last one does not if a crash has cut it off."""


def read_json_lines(path: Path) -> Iterator[JSONLine]:
    """Lines of a file with a JSON object each, none if the file does not exist."""
    if not path.exists():
        return
    *whole, cut_off = path.read_text(errors="replace").split("\n")
    for number, line in enumerate([*whole, cut_off], 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        yield JSONLine(number, content if isinstance(content, dict) else None, number <= len(whole))


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
