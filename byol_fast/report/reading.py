"""What a run folder holds, read with patience: a report is wanted most of runs that went wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError

Record = dict[str, Any]

COUNTED = 10
"""Steps whose mean is a run's last loss and spread, as in `RunResult`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """A run folder."""

    folder: Path
    """Where it is."""
    records: list[Record]
    """`metrics.jsonl`."""
    values: dict[str, Any]
    """`config.json` as it is."""
    config: Config | None
    """The same as a configuration, where this version understands it."""
    environment: dict[str, Any]
    """`environment.json`."""
    exported: dict[str, Any]
    """`encoder.json`."""
    evaluations: list[Record]
    """`eval/*.json`, by name."""
    bad_images: list[Record]
    """`bad_images*.jsonl`, of all processes."""
    starts: list[datetime]
    """When the run was begun and resumed, as far as TensorBoard's files tell."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.resolve().name

    @property
    def steps(self) -> list[Record]:
        """Records of training steps; the others are of evaluations."""
        return [r for r in self.records if "loss" in r]

    @property
    def last_step(self) -> int:
        """Steps that are done."""
        return max((int(r["step"]) for r in self.records), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, or None where nothing tells yet."""
        if self.config is None:
            return None
        if self.config.steps:
            return self.config.steps
        known = [r for r in self.steps if r.get("epoch")]
        if not known:
            return None
        step, epoch = int(known[-1]["step"]), float(known[-1]["epoch"])
        total = int(self.config.epochs * step / epoch + 0.5)
        # The epoch is rounded to four digits, and accumulated batches may leave a rest: exact to a step.
        return step if abs(total - step) <= 1 else total

    @property
    def complete(self) -> bool:
        """Whether all steps are done."""
        return self.total_steps is not None and self.last_step >= self.total_steps

    @property
    def global_batch_size(self) -> int | None:
        """Images of an optimizer step, where they are known."""
        if self.config is None:
            return None
        return self.config.batch_size * self.config.grad_accum_steps * int(self.environment.get("processes", 1))

    @property
    def seconds(self) -> float | None:
        """Time that the steps took, by the throughput that was recorded; evaluations and pauses not counted."""
        speeds = [r.get("images_per_second") for r in self.steps]
        batch = self.global_batch_size
        if batch is None or not speeds or any(not speed for speed in speeds):
            return None
        return sum(batch / float(speed) for speed in speeds if speed)

    def curve(self, key: str, x: str = "step") -> tuple[list[float | None], list[float | None]]:
        """All records that have a key: positions and values, None where there was none to record."""
        found = [r for r in self.records if key in r]
        return [r.get(x) for r in found], [r[key] for r in found]

    def last(self, key: str) -> float | None:
        """Mean of a key's last values."""
        counted = [float(r[key]) for r in self.records if r.get(key) is not None][-COUNTED:]
        return sum(counted) / len(counted) if counted else None

    def keys(self) -> list[str]:
        """Names of all numbers that were recorded."""
        shapes = dict.fromkeys(tuple(record) for record in self.records)  # of a few kinds, in their hundred thousands
        names = dict.fromkeys(key for shape in shapes for key in shape)
        samples = {k: next((r[k] for r in self.records if r.get(k) is not None), None) for k in names}
        return [k for k, v in samples.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def read_run(folder: Path) -> RunFiles:
    """Read a run folder, also one of an unfinished or broken run.

    Args:
        folder: the run folder.

    Raises:
        ConfigError: it is no run folder.
    """
    if not (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"report: {folder} must be a run folder, it has neither config.json nor metrics.jsonl; give a folder made "
            "by `byol-fast train`"
        )
    notes: list[str] = []
    values = _read_json(folder / "config.json", notes)
    config = None
    if values:
        try:
            config = configs.from_dict(values)
        except ConfigError as error:
            notes.append(f"what config.json means: it is not of this version of byol_fast ({error})")
    records = [r for r in _read_lines(folder / "metrics.jsonl", notes) if isinstance(r.get("step"), int)]
    evaluations = []
    for path in sorted((folder / "eval").glob("*.json")):
        found = _read_json(path, notes)
        if found:
            evaluations.append({"name": path.stem} | found)
    bad = [line for path in sorted(folder.glob("bad_images*.jsonl")) for line in _read_lines(path, notes)]
    return RunFiles(
        folder=folder,
        records=records,
        values=values,
        config=config,
        environment=_read_json(folder / "environment.json", notes),
        exported=_read_json(folder / "encoder.json", notes) if (folder / "encoder.json").exists() else {},
        evaluations=evaluations,
        bad_images=bad,
        starts=_starts(folder / "tb"),
        notes=notes,
    )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}, which could not be read ({_reason(error)})")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name}, which holds no JSON object")
        return {}
    return found


def _read_lines(path: Path, notes: list[str]) -> list[Record]:
    if not path.exists():
        return []
    found, damaged = [], []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        elif line.strip():
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        which = f"line{'s' * (len(damaged) > 1)}"
        notes.append(f"{len(damaged)} damaged {which} of {path.name} ({shown})")
    return found


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _starts(folder: Path) -> list[datetime]:
    """TensorBoard begins a file each time; its name holds the time."""
    times = []
    for path in folder.glob("events.out.tfevents.*"):
        stamp = path.name.split(".")[3]
        if stamp.isdigit():
            times.append(datetime.fromtimestamp(int(stamp)))
    return sorted(times)
