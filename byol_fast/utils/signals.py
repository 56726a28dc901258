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
        self.is_ending = False
        """True once a signal stops nothing, because the run is ending: set by the trainer, for the message."""

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Record signals during the block instead of terminating; a second SIGINT terminates immediately.

        A signal that is ignored (`nohup`) stays ignored.
        """

        def record(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            if signal.SIGINT in numbers:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.is_ending:
                text = "the run is ending, its last files are being written; Ctrl-C again ends at once"
            else:
                text = "saving after this step; Ctrl-C again stops without saving"
            write_from_signal_handler(f"\n{signal.Signals(signum).name}: {text}\n")

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
