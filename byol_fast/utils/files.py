"""Atomic file writes: readers never see a partial file, also after a crash."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from byol_fast.config import ConfigError

_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # not on all systems
_TEMPORARY_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")


@contextmanager
def atomic_path(path: Path, *, trial: bool = False) -> Iterator[Path]:
    """Temporary path that replaces `path`, synced to disk, when the block succeeds.

    If the block raises, `path` is unchanged and the temporary file is removed.

    Args:
        path: the file.
        trial: remove the temporary file in any case: an error now, not after the work that it is written for.

    Raises:
        OSError: the file cannot be written.
    """
    if not path.name:  # `.` and `/`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # A part of the name: all of it and more could be too long for the file system.
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if trial:
            with suppress(FileNotFoundError):
                path.lstat()  # fails if the name is too long
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            temporary.unlink()
            return
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def write_errors(path: Path, command: str, remedy: str = "choose another file") -> Iterator[None]:
    """Turn an OSError into the ConfigError `<command>: <path> cannot be written (<error>); <remedy>`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{command}: {path} cannot be written ({error}); {remedy}") from error


@contextmanager
def output_file(path: Path, command: str, *, trial: bool = False) -> Iterator[Path]:
    """`atomic_path` of a file that the user named, in a folder that is created if missing, with `write_errors`."""
    with write_errors(path, command):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, trial=trial) as temporary:
            yield temporary


def check_output_file(path: Path, command: str) -> None:
    """Raise a ConfigError for a file that cannot be written: before the work, not after it."""
    with output_file(path, command, trial=True):
        pass


def check_png_file(path: Path, command: str, arg_name: str) -> None:
    """Raise a ConfigError unless a path has the suffix of a PNG file and can be written."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{command}: {arg_name} must be a file that ends in .png, got {path}")
    check_output_file(path, command)


def check_features_path(path: Path) -> None:
    """Raise an error for a path that features cannot be written to, before they are computed.

    Raises:
        ConfigError: the suffix is neither .npz nor .parquet, or pyarrow is missing for the latter.
    """
    if path.suffix not in {".npz", ".parquet"}:
        raise ConfigError(f"embed: output must be a file that ends in .npz or .parquet, got {path}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"embed: output is {path}, which needs pyarrow; pip install pyarrow, or write .npz")


def check_output_folder(folder: Path, command: str, remedy: str) -> None:
    """Raise a ConfigError for a folder that cannot be created or written; nothing is left there."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with write_errors(folder, command, remedy):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    finally:
        for path in missing:
            with suppress(OSError):  # it could not be created, or another process writes there
                path.rmdir()


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """File descriptor of a regular file; the argument `opener` of `open`.

    A FIFO without a writer would block a reader for good, a device such as /dev/zero fill the memory.

    Raises:
        OSError: the file cannot be opened, or is something else; `strerror` says what.
    """
    try:
        descriptor = os.open(path, flags | _WITHOUT_WAITING)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, "it is a socket or a device, not a regular file", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = "FIFO" if stat.S_ISFIFO(mode) else "device"
    raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))


def printable_name(name: str | Path) -> str:
    r"""A name, which may hold anything, on one line that every encoding of Unicode has; `original_name` reverses it.

    A byte that is not UTF-8 becomes `\xHH`, a backslash two; control characters, line breaks and marks of direction
    become what Python writes for them: `\n`, `\x1b`, `\u202e`.
    """
    return _UNPRINTABLE.sub(_escape, str(name).replace("\\", "\\\\"))


def original_name(text: str) -> str:
    """Inverse of `printable_name`: the name as Python opens it, with surrogates for bytes that are not UTF-8."""
    return _ESCAPED.sub(_unescape, text)


def printable_text(text: str) -> str:
    """A message, which may quote names, without control characters and without those that an encoding lacks.

    Line breaks, tabs and backslashes are left, so that names that are printable already do not change.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match), text)


# Control characters, separators of lines, marks of direction, and surrogates: Python's form of bytes beyond UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|([ntr\\]))")
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code > 0x7F else repr(match[0])[1:-1]


def _unescape(match: re.Match[str]) -> str:
    byte, code, letter = match.groups()
    if letter is not None:
        return _LETTERS[letter]
    if code is not None:
        return chr(int(code, 16))
    value = int(byte, 16)
    return chr(value + 0xDC00 if value > 0x7F else value)


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
