"""The thread of a tracker, between training, which never waits for it, and the tracker, which may be slow or fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from byol_fast.trackers.base import RunInfo, Status, Tracker, named_metrics
from byol_fast.utils.errors import first_line, reason
from byol_fast.utils.progress import current

log = logging.getLogger(__name__)

MAX_WAITING = 20_000
"""Largest number of records that wait for a tracker, about 20 MB; further ones are dropped."""
_AT_ONCE = 1000
"""Largest number of records in a call of `Tracker.log`."""
_SILENT_SECONDS = 2.0
"""Seconds of waiting at the end of a run without a message."""


class TrackerThread:
    """Passes the metrics and files of a run on to a tracker, in a thread of its own.

    No method but `join` waits, and none raises an exception of the tracker.

    Args:
        tracker: that is called.
        run: to begin with.
        on_begin: is called in the thread with the result of `Tracker.begin`, if it is not None.
    """

    def __init__(self, tracker: Tracker, run: RunInfo, on_begin: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._info, self._on_begin = run, on_begin
        self._changed = threading.Condition()
        self._waiting: list[tuple[dict[str, Any], bool]] = []
        self._files: list[Path] = []
        self._status: Status | None = None
        self._is_off = self._has_warned = False
        self._total = self._delivered = self._failed = 0
        # A daemon, because a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def log(self, records: Sequence[dict[str, Any]], *, evaluation: bool = False) -> None:
        """Queue records of `metrics.jsonl`; those for which there is no room are dropped and counted."""
        with self._changed:
            self._total += len(records)
            if not self._is_off:
                room = MAX_WAITING - len(self._waiting)
                self._waiting += [(record, evaluation) for record in records[:room]]
                self._changed.notify()

    def artifact(self, path: Path) -> None:
        """Queue a file."""
        with self._changed:
            self._files.append(path)
            self._changed.notify()

    def end(self, status: Status) -> None:
        """Ask the thread to deliver what waits and to end the tracker's run."""
        with self._changed:
            self._status = status
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for the thread after `end`, then say once what was not delivered.

        Args:
            deadline: of `time.monotonic`; afterwards the thread is left to itself.
        """
        begin, name = time.monotonic(), self.tracker.name
        self._thread.join(min(_SILENT_SECONDS, max(0.0, deadline - begin)))
        if self._thread.is_alive() and deadline > time.monotonic():
            current().print(f"waiting for {name}, at most {deadline - time.monotonic():.0f} s")
            self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            was_off, self._is_off = self._is_off, True
            lost, total, is_late = self._total - self._delivered, self._total, self._thread.is_alive()
            self._waiting.clear()
        if was_off:  # `begin` has failed, which was said then
            return
        if lost:
            reasons = {"it failed": self._failed, "it was too slow": lost > self._failed}
            reason = " and ".join(text for text, applies in reasons.items() if applies)
            log.warning(
                "%s: %s of %s records were not logged there, because %s; metrics.jsonl has them",
                name,
                f"{lost:,}",
                f"{total:,}",
                reason,
            )
        elif is_late:
            log.warning("%s: it did not finish in time; files or the state of its run may be missing there", name)

    # --- in the thread

    def _run(self) -> None:
        if not self._begin():
            return
        status = None
        while status is None:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._files or self._status)
                waiting, files, status = self._waiting, self._files, self._status
                self._waiting, self._files = [], []
            metrics = [named_metrics(record, evaluation=evaluation) for record, evaluation in waiting]
            for start in range(0, len(metrics), _AT_ONCE):
                some = metrics[start : start + _AT_ONCE]
                self._call(self.tracker.log, some, num_records=len(some))
            for path in files:
                self._call(self.tracker.artifact, path)
        self._call(self.tracker.end, status)

    def _begin(self) -> bool:
        name = self.tracker.name
        try:
            tracker_run = self.tracker.begin(self._info)
        except BaseException as error:  # a SystemExit, too, would end the thread without a word
            with self._changed:
                self._is_off, was_off = True, self._is_off
                self._waiting.clear()
            if not was_off:
                log.warning("%s: this run is not logged there: %s", name, _text(error))
            return False
        try:
            self._keep(tracker_run)
        except (OSError, ValueError) as error:
            log.warning("%s: a resumed run would be a new one there, its identifier cannot be kept: %s", name, error)
        return True

    def _keep(self, tracker_run: object) -> None:
        """Keep the result of `Tracker.begin` for a resumed run."""
        if type(tracker_run) is int:
            tracker_run = str(tracker_run)
        if isinstance(tracker_run, str):
            self._on_begin(tracker_run)
        elif tracker_run is not None:
            raise ValueError(f"begin must return text, an integer or None, got {type(tracker_run).__name__}")

    def _call(self, method: Callable[[Any], None], argument: Any, num_records: int = 0) -> None:
        """Call a method of the tracker; the first error is a warning."""
        try:
            method(argument)
        except BaseException as error:
            with self._changed:
                is_first, self._has_warned = not (self._has_warned or self._is_off), True
                self._failed += num_records
            if is_first:
                log.warning("%s: %s; training goes on", self.tracker.name, _text(error))
        else:
            with self._changed:
                self._delivered += num_records


def _text(error: BaseException) -> str:
    """First line of an error's message; with its type if it is a request to exit, whose message is a number."""
    return first_line(error) if isinstance(error, Exception) else reason(error)
