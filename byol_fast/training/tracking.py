"""The callback that feeds a run's trackers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast import config as configs
from byol_fast.trackers.base import RunInfo, Status, Tracker, check_tracker
from byol_fast.trackers.thread import TrackerThread
from byol_fast.training.callbacks import Callback
from byol_fast.training.errors import Interrupted
from byol_fast.utils.files import atomic_write

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult
    from byol_fast.training.trainer import Trainer

END_SECONDS = 30.0
"""Longest time that the end of a run waits for its trackers, all together."""
INTERRUPTED_SECONDS = 10.0
"""The same after a signal or an error: a scheduler kills soon."""


class TrackerCallback(Callback):
    """Passes metrics, configuration, environment and report of a run on to trackers, each in a thread of its own.

    With several processes, only the main process does. The trackers of `Config.log` need no callback.

    Args:
        trackers: with different names.

    Raises:
        TypeError: one of them is no tracker.
        ValueError: a name is repeated, or no plain file name.

    Examples:
        >>> byol_fast.pretrain("photos", callbacks=[byol_fast.TrackerCallback([MyTracker()])])
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        if isinstance(trackers, str) or not isinstance(trackers, Iterable):
            check_tracker(trackers)
            name = type(trackers).__name__
            raise TypeError(f"trackers: must be a list of trackers, got {name}; pass TrackerCallback([...])")
        self.trackers = list(trackers)
        for tracker in self.trackers:
            check_tracker(tracker)
        names = [tracker.name for tracker in self.trackers]
        is_file_name = all(name not in {"", ".", ".."} and Path(name).name == name for name in map(str, names))
        if len(set(names)) != len(names) or not is_file_name:
            raise ValueError(f"trackers: names must differ and be plain file names, got {', '.join(map(repr, names))}")
        self._threads: list[TrackerThread] = []

    def on_run_begin(self, trainer: Trainer) -> None:
        """Start the threads; a resumed run continues the trackers' runs."""
        if not trainer.world.is_main_process:
            return
        for tracker in self.trackers:
            path = trainer.run_dir / "trackers" / tracker.name
            if not trainer.resumed:
                path.unlink(missing_ok=True)  # of a start without a checkpoint
            run = RunInfo(
                name=trainer.run_dir.name,
                folder=trainer.run_dir,
                config=configs.to_dict(trainer.config),
                environment=trainer.environment,
                first_step=trainer.state.step,
                tracker_run=_read(path),
            )
            self._threads.append(TrackerThread(tracker, run, partial(_write, path)))
        self._save("config.json", "environment.json", folder=trainer.run_dir)

    def on_log(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Queue the records of steps."""
        for thread in self._threads:
            thread.log(records)

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Queue the record of an evaluation."""
        for thread in self._threads:
            thread.log([record], evaluation=True)

    def on_full_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Queue the record of the last evaluation."""
        self.on_evaluation(trainer, record)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """End the trackers' runs; a resumed run continues them."""
        is_interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        self._end(trainer, "interrupted" if is_interrupted else "failed", INTERRUPTED_SECONDS)

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        """Pass the report on and end the trackers' runs."""
        self._end(trainer, "finished", END_SECONDS)

    def _save(self, *names: str, folder: Path) -> None:
        for name in names:
            if (folder / name).exists():
                for thread in self._threads:
                    thread.artifact(folder / name)

    def _end(self, trainer: Trainer, status: Status, seconds: float) -> None:
        self._save("report.html", folder=trainer.run_dir)
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.end(status)
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(deadline)


def _read(path: Path) -> str | None:
    """Identifier of a tracker's run; None if there is none."""
    try:
        return path.read_text().strip() or None
    except (OSError, ValueError):
        return None


def _write(path: Path, tracker_run: str) -> None:
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, tracker_run + "\n")
