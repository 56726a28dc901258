"""A tracker that records its calls, and can fail and wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from byol_fast.trackers import Metrics, RunInfo, Status


class Recorder:
    """Records what it gets.

    Args:
        name: of the tracker.
        failing: methods that raise an error, each time.
        waiting: methods that wait until `release` is set.
        error: what failing methods raise.
    """

    def __init__(
        self,
        name: str = "recorder",
        failing: Sequence[str] = (),
        waiting: Sequence[str] = (),
        error: BaseException | None = None,
    ) -> None:
        self.name, self.failing, self.waiting, self.error = name, failing, waiting, error
        self.reached, self.release = threading.Event(), threading.Event()
        self.runs: list[RunInfo] = []
        self.metrics: list[Metrics] = []
        self.files: dict[str, str] = {}
        self.ends: list[Status] = []
        self.threads: set[str] = set()

    def begin(self, run: RunInfo) -> str:
        self._enter("begin")
        self.runs.append(run)
        return f"{self.name} {len(self.runs)}"

    def log(self, metrics: Sequence[Metrics]) -> None:
        self._enter("log")
        self.metrics += metrics

    def artifact(self, path: Path) -> None:
        self._enter("artifact")
        self.files[path.name] = path.read_text()

    def end(self, status: Status) -> None:
        self._enter("end")
        self.ends.append(status)

    def _enter(self, method: str) -> None:
        self.threads.add(threading.current_thread().name)
        if method in self.waiting:
            self.reached.set()
            assert self.release.wait(60)
        if method in self.failing:
            raise self.error or ConnectionError(f"{method}: no server\nat this address")
