"""Errors in one line, for messages that quote them; the error of checkpoints."""

from __future__ import annotations

import errno


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or from another run."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if it has none; with the second one if it ends in a colon."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def reason(error: BaseException) -> str:
    """Type of an error and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def write_advice(error: OSError) -> str:
    """Remedy of a file that could not be written, as the imperative of a message."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "free space"
    return "put its folder back" if error.errno == errno.ENOENT else "make it writable"
