"""Graceful shutdown on SIGINT, SIGTERM and SIGHUP: after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from byol_fast.utils.output import write_from_signal_handler


class GracefulShutdown:
    """Records SIGINT, SIGTERM and SIGHUP (a closed terminal), so that training can stop after the current step."""

    def __init__(self) -> None:
        self.signum = 0
        """Number of the received signal; 0 if none."""

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Record signals during the block instead of terminating; a second SIGINT terminates immediately.

        A signal that is ignored (`nohup`) stays ignored.
        """

        def record(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            if signal.SIGINT in numbers:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            name = signal.Signals(signum).name
            write_from_signal_handler(f"\n{name}: saving after this step; Ctrl-C again stops without saving\n")

        self.signum = 0
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
