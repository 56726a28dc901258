"""Logs of speed runs (`byol-fast bench cifar10`) and their summary; without torch, so that errors come at once."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.bench.published import CIFAR10_KNN, THRESHOLDS
from byol_fast.config import Config, ConfigError
from byol_fast.training.resume import config_digest
from byol_fast.utils.errors import CheckpointError, write_advice
from byol_fast.utils.files import atomic_write
from byol_fast.utils.records import count, flag, number, read_json_lines, record_of, share, text

FORMAT = 1
SUMMARY = "summary.json"
_HEADER = record_of(
    {
        "format": count,
        "recipe": text,
        "seed": count,
        "config": record_of({}),
        "config_digest": text,
        "epochs": count,
        "images": record_of({"train": count, "val": count, "fingerprint": text}, required=True),
        "environment": record_of({}),
        "starts": count,
        "setup_seconds": number,
        "seconds": number,
        "finished": flag,
    },
    required=True,
)
_EVALUATION = record_of(
    {"seconds": number, "epoch": number, "step": count, "knn_top1": share, "knn_low": share, "knn_high": share},
    required=True,
)


@dataclass
class SpeedLog:
    """Log of a run: a file of JSON lines, the first about the run, each further one an evaluation."""

    path: Path
    header: dict[str, Any]
    """First line; docs/benchmarks.md describes the fields."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, path: Path, config: Config, *, command: str, minutes: float | None) -> SpeedLog:
        """Log of a run that has not begun.

        Args:
            path: of the file, which is written by `save`.
            config: of the run, with its planned epochs.
            command: as the user has entered it.
            minutes: that the epochs were planned for; None if they were given.
        """
        header = {
            "format": FORMAT,
            "recipe": config.recipe,
            "seed": config.seed,
            "command": command,
            "minutes": minutes,
            "epochs": config.epochs,
            "config": configs.to_dict(configs.without_paths(config)),
            "config_digest": config_digest(config),
            "images": None,
            "environment": None,
            "changes": [],
            "starts": 0,
            "decode_seconds": 0.0,
            "setup_seconds": 0.0,
            "seconds": 0.0,
            "finished": False,
            "problem": None,
        }
        return cls(path, header)

    @property
    def name(self) -> str:
        """`RECIPE-seedN`."""
        return f"{self.header['recipe']}-seed{self.header['seed']}"

    def save(self) -> None:
        """Write the file, atomically.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        try:
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in (self.header, *self.evaluations)))
        except OSError as error:
            raise CheckpointError(
                f"bench cifar10: {self.path} could not be written ({error}); {write_advice(error)}, then give the same "
                "command again"
            ) from error

    def drop_after(self, step: int, *, evaluated: bool) -> None:
        """Remove the evaluations after the checkpoint of a step, which are about to be made again; their time stays.

        Args:
            step: of the checkpoint.
            evaluated: the checkpoint's state counts the evaluation at its step.
        """
        last = step if evaluated else step - 1
        self.evaluations = [line for line in self.evaluations if line["step"] <= last]

    def check_same(self, config: Config, minutes: float | None) -> None:
        """Check that the run has the configuration of this command.

        Args:
            config: of this command; its paths may differ.
            minutes: of this command.

        Raises:
            ConfigError: it has another; names the differences.
        """
        stored = configs.from_dict(self.header["config"])
        changed = configs.differences(stored, configs.without_paths(config))
        if minutes != self.header["minutes"]:
            changed["minutes"] = (self.header["minutes"], minutes)
        if changed:
            listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, (a, b) in changed.items())
            raise ConfigError(
                f"bench cifar10: {self.path} must be continued as it was started, but {listed}; drop these options, "
                "or choose another --output"
            )

    def minutes_to(self, knn_top1: float) -> float | None:
        """Minutes of training until the first evaluation at or above an accuracy (0..1); None: not reached."""
        reached = (line["seconds"] / 60 for line in self.evaluations if line["knn_top1"] >= knn_top1)
        return next(reached, None)


def read_log(path: Path) -> SpeedLog:
    """Read a log.

    Raises:
        ConfigError: the file is damaged or of another format.
    """
    lines = list(read_json_lines(path))
    problem = "it is empty" if not lines else None
    for line in lines:
        kind = _HEADER if line is lines[0] else _EVALUATION
        problem = problem or ("it is no JSON object" if line.content is None else kind(line.content, ""))
        if problem is not None:
            problem = f"line {line.number}: {problem}"
            break
    contents = [line.content for line in lines if line.content is not None]
    if problem is None and contents[0]["format"] != FORMAT:
        problem = f"its format is {contents[0]['format']}"
    if problem is not None:
        raise ConfigError(
            f"bench cifar10: {path} must be a log of format {FORMAT} that this command wrote, but {problem}; delete it "
            "and its run folder, or choose another --output"
        )
    return SpeedLog(path, contents[0], contents[1:])


def read_logs(folder: Path) -> list[SpeedLog]:
    """All logs in a folder, by recipe and seed."""
    logs = [read_log(path) for path in folder.glob("*-seed*.jsonl")]
    return sorted(logs, key=lambda log: (log.header["recipe"], log.header["seed"]))


def median_minutes(minutes: Iterable[float | None]) -> float | None:
    """Median of times, of which None is longer than all others; None if that is the median."""
    median = statistics.median(math.inf if m is None else m for m in minutes)
    return median if math.isfinite(median) else None


def summarize(logs: Sequence[SpeedLog]) -> dict[str, Any]:
    """Content of `summary.json`: the times to the thresholds, of every recipe over its seeds.

    Args:
        logs: of the runs, sorted by recipe.
    """
    recipes: dict[str, Any] = {}
    for recipe in dict.fromkeys(log.header["recipe"] for log in logs):
        runs = [log for log in logs if log.header["recipe"] == recipe]
        times = {threshold: [log.minutes_to(threshold) for log in runs] for threshold in THRESHOLDS}
        recipes[recipe] = {
            "seeds": [log.header["seed"] for log in runs],
            "config_digests": [log.header["config_digest"] for log in runs],
            "finished": [log.header["finished"] for log in runs],
            "knn_top1": [log.evaluations[-1]["knn_top1"] if log.evaluations else None for log in runs],
            "minutes": [log.header["seconds"] / 60 for log in runs],
            "minutes_to": {str(t): {"all": values, "median": median_minutes(values)} for t, values in times.items()},
        }
    return {
        "format": FORMAT,
        "thresholds": list(THRESHOLDS),
        "recipes": recipes,
        "published": [asdict(published) | {"name": published.name} for published in CIFAR10_KNN],
    }


def table(summary: dict[str, Any]) -> list[str]:
    """Lines for the terminal: the times to the thresholds of every recipe, and the published ones.

    Args:
        summary: result of `summarize`.
    """
    lines = ["minutes of training to a kNN top-1 accuracy (the first evaluation at or above it):"]
    for recipe, values in summary["recipes"].items():
        num = len(values["seeds"])
        for threshold in THRESHOLDS:
            times = values["minutes_to"][str(threshold)]
            shown = _minutes(times["median"])
            if num > 1:
                shown += f" (median of {num} seeds: {', '.join(map(_minutes, times['all']))})"
            lines.append(f"  {recipe}: {threshold:.1%} {shown}")
        last = ", ".join("none" if value is None else f"{value:.1%}" for value in values["knn_top1"])
        lines.append(f"  {recipe}: last accuracy {last}")
    lines += [f"  published, {p.device}: {p.top1:.1%} in {p.minutes:.1f} by {p.name}" for p in CIFAR10_KNN]
    return lines


def _minutes(minutes: float | None) -> str:
    return "not reached" if minutes is None else f"after {minutes:.1f}"
