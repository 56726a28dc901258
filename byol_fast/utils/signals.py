"""Graceful shutdown on SIGINT and SIGTERM: after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class GracefulShutdown:
    """Records SIGINT and SIGTERM, so that training can stop after the current step."""

    def __init__(self) -> None:
        self.signum = 0
        """Number of the received signal; 0 if none."""

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Record signals during the block instead of terminating; a second SIGINT terminates immediately."""

        def record(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            signal.signal(signal.SIGINT, signal.default_int_handler)
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: saving after this step; Ctrl-C again stops without saving\n".encode())

        self.signum = 0
        try:
            before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signal handlers can only be set in the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
