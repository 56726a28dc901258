"""Ending a run on request: after the step under way, with everything saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class GracefulShutdown:
    """Remembers that SIGINT or SIGTERM has arrived."""

    def __init__(self) -> None:
        self.signum = 0
        """The signal; 0 while there was none."""

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Take note of signals during the block instead of dying; a second SIGINT ends the process at once."""

        def note(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            signal.signal(signal.SIGINT, signal.default_int_handler)
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: saving after this step; Ctrl-C again stops without saving\n".encode())

        self.signum = 0
        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns that one handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
