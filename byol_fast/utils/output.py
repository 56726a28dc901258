"""Standard output and error that may go away: a killed `tee`, a closed terminal, a full disk end no run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from byol_fast.utils.files import printable_text

# After these a later write may succeed again; after others (EPIPE, EIO of a closed terminal, EBADF) none will.
_TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}


class PlainConsole(Console):
    """Console that prints every text as it is: a name or a message may look like markup or hold control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a line or cell."""
        return super().render_str(printable_text(text), **options | {"markup": False, "emoji": False})


class _OptionalStream:
    """A text stream that drops what cannot be written.

    Args:
        stream: where everything goes as long as that is possible.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are escaped."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def finish(self) -> None:
        """Write what is buffered, or drop it: otherwise Python tries once more at exit, and exits with 120."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._redirect_to_devnull()

    def _drop(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno not in _TEMPORARY:
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        """Redirect the descriptor itself: other libraries and child processes write to it, too."""
        with suppress(OSError, ValueError, AttributeError):  # closed, or without a descriptor
            number = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)


@contextmanager
def ignore_output_errors() -> Iterator[None]:
    """Within this, the program goes on without standard output and standard error once they cannot be written."""
    _open_standard_descriptors()
    out, err = (
        _OptionalStream(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") if stream is None else stream)
        for stream in (sys.stdout, sys.stderr)
    )
    try:
        with redirect_stdout(cast("TextIO", out)), redirect_stderr(cast("TextIO", err)):
            yield
    finally:
        out.finish()
        err.finish()


def _open_standard_descriptors() -> None:
    """Open those that are closed: the next file would get their number, and with it the output of other libraries."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
