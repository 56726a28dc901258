"""Graceful shutdown on SIGINT, SIGTERM and SIGHUP, after the current step, with a checkpoint; Ctrl-C before and after.

Imports the standard library only: the command line sets its handler before it imports anything that takes time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SHOW_CURSOR = b"\033[?25h"


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process at once, with one line and exit code 130, until another handler is set.

    A KeyboardInterrupt while torch is being imported would show a long traceback, or be swallowed. A SIGINT that is
    ignored, or handled by somebody else, stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
        # A forked process, as of a data loader, is ended without a word.
        os.register_at_fork(after_in_child=_end_silently)


def raise_on_interrupt() -> None:
    """Undo `exit_on_interrupt`: Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_silently() -> None:
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _exit(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a further one ends the process even if its output blocks
    with suppress(Exception):  # also interrupted in the stream's own `write`
        sys.__stdout__.flush()  # type: ignore[union-attr]
    if os.environ.get("TERM", "").lower() not in {"dumb", "unknown"}:
        for descriptor in filter(os.isatty, (1, 2)):  # a progress bar hides the cursor
            with suppress(OSError):
                os.write(descriptor, _SHOW_CURSOR)
    begin = "\n" if os.isatty(2) else ""  # behind a bar, or behind the ^C of the terminal
    _write(f"{begin}{signal.Signals(signum).name}: stopped\n")
    os._exit(128 + signum)


def _write(text: str) -> None:
    """Write to standard error at once: a signal may have interrupted the stream's own `write`."""
    with suppress(OSError, ValueError, AttributeError):  # as for streams: gone, closed, None
        os.write(sys.stderr.fileno(), text.encode())


class GracefulShutdown:
    """Records SIGINT, SIGTERM and SIGHUP (a closed terminal), so that training can stop after the current step."""

    def __init__(self) -> None:
        self.signum = 0
        """Number of the received signal; 0 if none."""
        self.is_ending = False
        """True once a signal stops nothing, because the run is ending; it is for the message."""

    def finish(self) -> None:
        """Set `is_ending`, and say so if a signal came too late to stop anything."""
        self.is_ending = True
        if self.signum:
            self._announce()

    def _announce(self) -> None:
        if self.is_ending:
            text = "the run is ending, its last files are being written; Ctrl-C again ends at once"
        else:
            text = "saving after this step; Ctrl-C again stops without saving"
        _write(f"\n{signal.Signals(self.signum).name}: {text}\n")

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Record signals during the block instead of terminating; a second SIGINT terminates immediately.

        A signal that is ignored (`nohup`) stays ignored.
        """

        def record(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            if signal.SIGINT in numbers:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self._announce()

        self.signum, self.is_ending = 0, False
        # None: a handler that is no Python function; it could not be restored.
        untouched = (signal.SIG_IGN, None)
        numbers = [
            number
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) not in untouched
        ]
        try:
            before = {number: signal.signal(number, record) for number in numbers}
        except ValueError:  # signal handlers can only be set in the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
