"""Reader of run folders, tolerant of missing and damaged files: reports matter most for runs that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.config.io import place_hint
from byol_fast.utils import records as checks

Record = dict[str, Any]

_INTERVAL = checks.list_of(checks.number, 2)
_RETRIEVAL = {
    "mean_ap": checks.number,
    "mean_ap_ci95": _INTERVAL,
    "recall": checks.list_of(checks.record_of({"k": checks.count, "recall": checks.number, "ci95": _INTERVAL})),
}
_EVALUATION = {
    **_RETRIEVAL,
    **dict.fromkeys(("protocol", "encoder", "curve_label"), checks.text),
    **dict.fromkeys(("step", "num_train", "num_test", "num_left_out"), checks.count),
    **dict.fromkeys(("top1", "top5"), checks.number),
    "top1_ci95": _INTERVAL,
    "classes": checks.list_of(checks.text),
    "baselines": checks.list_of(
        checks.record_of({"name": checks.text, "top1": checks.number, "top1_ci95": _INTERVAL, **_RETRIEVAL})
    ),
    "shots": checks.list_of(
        checks.record_of(
            {
                "name": checks.text,
                **dict.fromkeys(("shots", "k"), checks.count),
                **dict.fromkeys(("top1", "lowest", "highest"), checks.number),
                "top1_ci95": _INTERVAL,
            }
        )
    ),
    "per_class": checks.list_of(
        checks.record_of({"class": checks.text, "count": checks.count, "accuracy": checks.number, "ci95": _INTERVAL})
    ),
    "confusion": checks.list_of(checks.list_of(checks.count, 3)),
    "curve": checks.list_of(checks.record_of({"x": checks.number, "top1": checks.number})),
}
"""Kinds of the fields of an evaluation's record that the report computes with."""
_ENVIRONMENT = {"processes": checks.count}

NUM_LAST = 10
"""Steps whose mean is a run's last loss, as in `RunResult`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """Contents of a run folder."""

    folder: Path
    """Its path."""
    records: list[Record]
    """`metrics.jsonl`."""
    values: dict[str, Any]
    """`config.json` as parsed."""
    config: Config | None
    """The same as a configuration; None if it belongs to another version."""
    environment: dict[str, Any]
    """`environment.json`."""
    exported: dict[str, Any]
    """`encoder.json`."""
    evaluations: list[Record]
    """`eval/*.json`, by name."""
    corrupt_images: list[Record]
    """`corrupt_images*.jsonl`, of all processes."""
    starts: list[datetime]
    """Times at which the run was started and resumed, from the names of TensorBoard's files."""
    notes: list[str] = field(default_factory=list)
    """Descriptions of what could not be read."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.resolve().name

    @property
    def steps(self) -> list[Record]:
        """Records of training steps; the others are of evaluations."""
        return [r for r in self.records if "loss" in r]

    @property
    def last_step(self) -> int:
        """Number of completed steps."""
        return max((int(r["step"]) for r in self.records), default=0)

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the whole run; None if not known yet."""
        if self.config is None:
            return None
        if self.config.steps:
            return self.config.steps
        known = [r for r in self.steps if (r.get("epoch") or 0) > 0]
        if not known:
            return None
        step, epoch = int(known[-1]["step"]), float(known[-1]["epoch"])
        total = int(min(self.config.epochs * step / epoch, checks.LARGEST_COUNT) + 0.5)
        # The epoch is rounded to four digits, and gradient accumulation may leave a rest: exact to one step.
        return step if abs(total - step) <= 1 else total

    @property
    def complete(self) -> bool:
        """True if all steps are completed."""
        return self.total_steps is not None and self.last_step >= self.total_steps

    @property
    def global_batch_size(self) -> int | None:
        """Images per optimizer step; None if not known."""
        if self.config is None:
            return None
        return self.config.batch_size * self.config.grad_accum_steps * int(self.environment.get("processes", 1))

    @property
    def seconds(self) -> float | None:
        """Duration of the steps by the recorded throughput, without evaluations and pauses; None if not known."""
        speeds = [r.get("images_per_second") for r in self.steps]
        batch = self.global_batch_size
        if batch is None or not speeds or any(speed is None or speed <= 0 for speed in speeds):
            return None
        return math.fsum(batch / float(speed) for speed in speeds if speed)

    def curve(self, key: str, x: str = "step") -> tuple[list[float | None], list[float | None]]:
        """Positions and values of all records with a key; a value that was not recorded is None."""
        records = [r for r in self.records if key in r]
        return [r.get(x) for r in records], [r[key] for r in records]

    def last(self, key: str) -> float | None:
        """Mean of a key's last values; None if there is none."""
        values = [float(r[key]) for r in self.records if r.get(key) is not None][-NUM_LAST:]
        return sum(values) / len(values) if values else None

    def recorded_keys(self) -> list[str]:
        """Names of all recorded numbers."""
        kinds = dict.fromkeys(tuple(record) for record in self.records)  # few, among hundred thousands of records
        names = dict.fromkeys(key for kind in kinds for key in kind)
        samples = {k: next((r[k] for r in self.records if r.get(k) is not None), None) for k in names}
        return [k for k, v in samples.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def distinct_names(runs: Sequence[RunFiles]) -> list[str]:
    """Names of runs; their paths if two names are equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def check_is_run(folder: Path) -> None:
    """Raise a ConfigError unless a folder is a run's."""
    if not folder.exists():
        raise ConfigError(
            f"report: {folder} does not exist{place_hint(folder)}; give a run folder written by `byol-fast train`"
        )
    if not (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"report: {folder} must be a run folder, but it has neither config.json nor metrics.jsonl; pass a folder "
            "written by `byol-fast train`"
        )


def read_run(folder: Path) -> RunFiles:
    """Read a run folder, also one of an unfinished or damaged run.

    Args:
        folder: the run folder.

    Raises:
        ConfigError: it is not a run folder.
    """
    check_is_run(folder)
    notes: list[str] = []
    values = _read_json(folder / "config.json", notes)
    config = None
    if values:
        try:
            config = configs.from_dict(values)
        except ConfigError as error:
            notes.append(f"the meaning of config.json, which belongs to another version of byol_fast ({error})")
    evaluations = []
    for path in sorted((folder / "eval").glob("*.json")):
        evaluation = _valid(_read_json(path, notes), _EVALUATION, f"eval/{path.name}", notes)
        if evaluation:
            evaluations.append(evaluation | {"name": path.stem})
    corrupt_images = [
        line for path in sorted(folder.glob("corrupt_images*.jsonl")) for line in _read_lines(path, notes)
    ]
    return RunFiles(
        folder=folder,
        records=_read_metrics(folder / "metrics.jsonl", notes),
        values=values,
        config=config,
        environment=_valid(_read_json(folder / "environment.json", notes), _ENVIRONMENT, "environment.json", notes),
        exported=_read_json(folder / "encoder.json", notes) if (folder / "encoder.json").exists() else {},
        evaluations=evaluations,
        corrupt_images=corrupt_images,
        starts=_starts(folder / "tb"),
        notes=notes,
    )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return checks.read_json(path)
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}, which could not be read ({_reason(error)})")
        return {}


def _valid(record: Record, fields: Mapping[str, checks.Kind], name: str, notes: list[str]) -> Record:
    """The record without the fields of another kind, which are noted."""
    problems = {field: kind(record[field], field) for field, kind in fields.items() if record.get(field) is not None}
    notes += [f"a field of {name}: {problem}" for problem in problems.values() if problem is not None]
    return {field: value for field, value in record.items() if problems.get(field) is None}


def _read_lines(path: Path, notes: list[str]) -> list[Record]:
    try:
        lines = list(checks.read_json_lines(path))
    except OSError as error:
        notes.append(f"{path.name}, which could not be read ({_reason(error)})")
        return []
    if damaged := [line.number for line in lines if line.content is None]:
        notes.append(f"{len(damaged)} damaged line{'s' * (len(damaged) > 1)} of {path.name} ({_some(damaged)})")
    return [line.content for line in lines if line.content is not None]


def _read_metrics(path: Path, notes: list[str]) -> list[Record]:
    """Records with a step; values that are no numbers are unknown (null)."""
    records: list[Record] = []
    wrong: dict[str, list[str]] = {}
    for record in _read_lines(path, notes):
        step = record.get("step")
        if checks.count(step, "step") is not None:
            wrong.setdefault("step", []).append("after " + str(records[-1]["step"] if records else 0))
            continue
        for name, value in record.items():
            if value is not None and name != "skipped" and checks.number(value, name) is not None:
                record[name] = None
                wrong.setdefault(name, []).append(str(step))
        records.append(record)
    for name, steps in wrong.items():
        notes.append(f"{len(steps)} of the values of {name} in {path.name} that are no numbers (step {_some(steps)})")
    return records


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _starts(folder: Path) -> list[datetime]:
    """Times in the names of TensorBoard's files: it creates one at each start."""
    times = []
    for path in folder.glob("events.out.tfevents.*"):
        stamp = path.name.split(".")[3]
        with suppress(ValueError, OverflowError, OSError):  # another file's name, or no time
            times.append(datetime.fromtimestamp(int(stamp)))
    return sorted(times)
