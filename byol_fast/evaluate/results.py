"""The result of an evaluation, its JSON record, and a table for the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from byol_fast.evaluate.metrics import Scores
from byol_fast.utils.files import atomic_path, atomic_write, write_errors
from byol_fast.utils.intervals import Interval

MAX_CLASSES_SHOWN = 20
"""Largest number of classes in the table for the terminal."""
_TABLES = {"per_class", "confusion", "baselines"}
"""Fields of a record with one line per row."""
_INPUTS = ("encoder", "step", "train", "test", "num_train", "num_test", "settings")
"""Fields of a record that are equal if an evaluation is repeated."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Accuracy of an untrained encoder or of raw pixels by the same protocol."""

    name: str
    top1: float
    top1_ci95: Interval
    top5: float

    @classmethod
    def of(cls, name: str, scores: Scores) -> Baseline:
        """The baseline with these scores."""
        return cls(name, scores.top1, scores.top1_ci95, scores.top5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """Result of evaluating an encoder by a protocol."""

    protocol: str
    """knn, linear, linear_reference, finetune_10pct, ...; the name of its files."""
    encoder: str
    """Name of the encoder."""
    step: int | None
    """Number of its training steps."""
    train: str
    """Description of the training images."""
    test: str
    """Description of the test images."""
    num_train: int
    """Number of images that the final classifier was trained on."""
    num_test: int
    classes: tuple[str, ...]
    scores: Scores
    settings: dict[str, Any]
    """All options of the protocol."""
    chosen: dict[str, Any]
    """Hyperparameters selected on held-out images, and other facts of this evaluation."""
    baselines: tuple[Baseline, ...]
    curve: tuple[tuple[float, float], ...]
    """Points (x, top-1)."""
    curve_label: str
    """Name of x, and the images of the accuracies."""
    seconds: float
    date: str
    environment: dict[str, Any]

    @property
    def top1(self) -> float:
        """Accuracy on the test images, 0..1."""
        return self.scores.top1

    def to_dict(self) -> dict[str, Any]:
        """Content of the JSON record."""
        return {
            "protocol": self.protocol,
            "encoder": self.encoder,
            "step": self.step,
            "train": self.train,
            "test": self.test,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "classes": list(self.classes),
            "top1": self.scores.top1,
            "top1_ci95": list(self.scores.top1_ci95),
            "top5": self.scores.top5,
            "interval": "Wilson",
            "settings": self.settings,
            "chosen": self.chosen,
            "baselines": [
                {"name": b.name, "top1": b.top1, "top1_ci95": list(b.top1_ci95), "top5": b.top5} for b in self.baselines
            ],
            "per_class": [c.to_dict() for c in self.scores.per_class],
            "confusion": self.scores.confusion.tolist(),
            "curve": [{"x": x, "top1": y} for x, y in self.curve],
            "curve_label": self.curve_label,
            "seconds": round(self.seconds, 2),
            "date": self.date,
            "environment": self.environment,
        }


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write the record `PROTOCOL.json`, atomically.

    An earlier record is moved to the folder `earlier`, unless it is of the same encoder, images and settings.

    Returns:
        The path of the record, and that of the earlier one if it was moved.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path, text = folder / f"{evaluation.protocol}.json", as_json(evaluation.to_dict())
    with write_errors(folder, "eval", "choose another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _keep_earlier(path, text)
        atomic_write(path, text)
    return [path, *earlier]


def _keep_earlier(record: Path, text: str) -> list[Path]:
    """Copy the existing record to the folder `earlier` if it differs in more than the results of a repetition."""
    if not record.exists():
        return []
    content = record.read_bytes()
    try:
        old, new = json.loads(content), json.loads(text)
        is_repetition = all(old.get(field) == new[field] for field in _INPUTS)
    except (ValueError, AttributeError):  # not a record
        is_repetition = False
    if is_repetition:
        return []
    number = 1
    while (path := record.parent / "earlier" / f"{record.stem}_{number}.json").exists():
        number += 1
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return [path]


def as_json(record: dict[str, Any]) -> str:
    """JSON with one line per field and per row of a table."""
    lines = []
    for name, value in record.items():
        if name in _TABLES and value:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def summary(evaluations: list[Evaluation]) -> RenderableType:
    """Tables for the terminal: accuracies of all evaluations, and the classes and common mistakes of the last one."""
    return Group(_accuracy_table(evaluations), _class_table(evaluations[-1]))


def _accuracy_table(evaluations: list[Evaluation]) -> Table:
    first = evaluations[0]
    show_top5 = len(first.classes) > 5
    table = Table(title=f"{first.encoder}" + ("" if first.step is None else f", step {first.step}"))
    table.add_column("protocol")
    table.add_column("encoder")
    for heading in ("top-1", "95 % interval", *(("top-5",) if show_top5 else ())):
        table.add_column(heading, justify="right")
    for e in evaluations:
        hyperparameters = ", ".join(
            f"{k} {v:.3g}" for k, v in e.chosen.items() if k in {"k", "temperature", "l2", "lr", "epochs"}
        )
        rows = [Baseline.of("this", e.scores), *e.baselines]
        for number, row in enumerate(rows):
            label = (e.protocol + (f" ({hyperparameters})" if hyperparameters else "")) if number == 0 else ""
            cells = [label, row.name, f"{row.top1:.1%}", _interval_text(row.top1_ci95)]
            cells += [f"{row.top5:.1%}"] if show_top5 else []
            table.add_row(*cells, end_section=number == len(rows) - 1)
    return table


def _class_table(evaluation: Evaluation) -> Table:
    """Classes with the lowest accuracies, and the class that each is confused with most often."""
    tested = [c for c in evaluation.scores.per_class if c.accuracy is not None]
    shown = sorted(tested, key=lambda c: c.accuracy or 0.0)[:MAX_CLASSES_SHOWN]
    which = "classes" if len(shown) == len(tested) else f"the {MAX_CLASSES_SHOWN} hardest classes"
    table = Table(title=f"{evaluation.protocol}: {which}")
    for heading in ("class", "images", "top-1", "95 % interval", "most common mistake"):
        table.add_column(heading, justify="right" if heading in {"images", "top-1"} else "left")
    number_of = {name: i for i, name in enumerate(evaluation.classes)}
    confusion = evaluation.scores.confusion
    mistakes = confusion[confusion[:, 0] != confusion[:, 1]]
    for c in shown:
        of_class = mistakes[mistakes[:, 0] == number_of[c.name]]
        mistake = ""
        if len(of_class):
            _, predicted, count = of_class[of_class[:, 2].argmax()]
            mistake = f"{evaluation.classes[predicted]} ({count / c.count:.0%})"
        table.add_row(c.name, str(c.count), f"{c.accuracy:.1%}", _interval_text(c.ci95), mistake)
    return table


def _interval_text(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}"
