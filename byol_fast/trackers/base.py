"""The protocol of an experiment tracker, and the names of the metrics that it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Status = Literal["finished", "interrupted", "failed"]
"""End of a run: complete or ended by a callback; a signal, after which it can be resumed; an error."""

METHODS = ("begin", "log", "artifact", "end")
"""Methods of a tracker."""

_PERF = {"images_per_second", "data_wait", "peak_memory_gib"}
# A second curve of the epochs, and constants.
_EVAL_LEFT_OUT = {"epoch", "knn_k", "knn_num_train", "knn_num_val"}


class Metrics(NamedTuple):
    """Metrics of a training step or an evaluation."""

    step: int
    """Optimizer steps done, 0 for the untrained encoder."""
    values: dict[str, float]
    """Values by name, as `train/loss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """Description of a run for a tracker."""

    name: str
    """Name of the run folder."""
    folder: Path
    """The run folder."""
    config: dict[str, Any]
    """All options, as in `config.json`."""
    environment: dict[str, Any]
    """Machine and versions, as in `environment.json`."""
    first_step: int
    """Steps done before: of the checkpoint that a resumed run goes on from, otherwise 0."""
    tracker_run: str | None
    """Result of the tracker's `begin` before a resumed run was interrupted; None for a new run."""


class Tracker(Protocol):
    """Destination of a run's metrics and files, for `byol_fast.TrackerCallback`.

    All methods are called in one thread of the tracker's own, on the main process only. They may be slow and may raise
    any exception: training goes on, and the metrics that could not be logged are counted.
    """

    @property
    def name(self) -> str:
        """Short name for messages, unique among the trackers of a run; a plain file name."""
        ...

    def begin(self, run: RunInfo) -> str | int | None:
        """Open the tracker's run, once and before all else; for a resumed run, go on with `run.tracker_run`.

        Returns:
            The tracker's identifier of the run, which is kept in the run folder as text, or None.
        """
        ...

    def log(self, metrics: Sequence[Metrics]) -> None:
        """Log metrics of one or more steps, in order. An evaluation comes after the metrics of its step."""
        ...

    def artifact(self, path: Path) -> None:
        """Save a file of the run: `config.json` and `environment.json` at the start, `report.html` at the end."""
        ...

    def end(self, status: Status) -> None:
        """Close the tracker's run, with all that was logged delivered."""
        ...


def check_tracker(tracker: object) -> None:
    """Raise a TypeError unless an object has the name and the methods of a tracker."""
    if isinstance(tracker, str):
        raise TypeError(
            f"trackers: must be objects of your own, got {tracker!r}; built-in trackers are named by log=({tracker!r},)"
        )
    if isinstance(tracker, type):
        raise TypeError(f"trackers: must be objects, got the class {tracker.__name__}; pass {tracker.__name__}()")
    missing = [] if hasattr(tracker, "name") else ["name"]
    missing += [method for method in METHODS if not callable(getattr(tracker, method, None))]
    if missing:
        raise TypeError(
            f"trackers: must have a name and the methods {', '.join(METHODS)}, got {type(tracker).__name__} without "
            f"{', '.join(missing)}; see byol_fast.trackers.Tracker"
        )


def named_metrics(record: Mapping[str, Any], *, evaluation: bool) -> Metrics:
    """A record of `metrics.jsonl` with the names for trackers: `train/`, `eval/` or `perf/` and the record's name.

    Args:
        record: of a step or an evaluation; values that are unknown (None) or no numbers are left out.
        evaluation: the record is an evaluation's.
    """
    values = {}
    for name, value in record.items():
        if name == "step" or not isinstance(value, int | float) or (evaluation and name in _EVAL_LEFT_OUT):
            continue
        group = "perf" if name in _PERF else "eval" if evaluation else "train"
        values[f"{group}/{name}"] = float(value)
    return Metrics(record["step"], values)
