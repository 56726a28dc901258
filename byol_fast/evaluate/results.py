"""The outcome of an evaluation: a record, pictures of it, and a table for the terminal."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from byol_fast.config import ConfigError
from byol_fast.evaluate.metrics import Interval, Scores
from byol_fast.report.charts import Series, bar_chart, heat_map, line_chart
from byol_fast.utils.files import atomic_path, atomic_write

# With more classes a matrix shows nothing, and a picture of it is megabytes.
MATRIX_CLASSES = 60
SHOWN_CLASSES = 20
_ROWS = {"per_class", "confusion", "baselines"}
_JUDGED = ("encoder", "step", "train", "test", "num_train", "num_test", "settings")
"""Of a record: what was judged, on what and how."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The same protocol on something that was not learned."""

    name: str
    top1: float
    top1_ci95: Interval
    top5: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """An encoder judged by a protocol."""

    protocol: str
    """knn, linear, linear_reference, finetune_10pct, ...: the name of its files."""
    encoder: str
    """What was judged."""
    step: int | None
    """Steps it was trained for."""
    train: str
    """Images learned from, for people."""
    test: str
    num_train: int
    """Images learned from; held-out ones count where the final classifier has learned from them too."""
    num_test: int
    classes: tuple[str, ...]
    scores: Scores
    settings: dict[str, Any]
    """All options of the protocol."""
    chosen: dict[str, Any]
    """What was chosen on held-out images, and other facts of this evaluation."""
    baselines: tuple[Baseline, ...]
    curve: tuple[tuple[float, float], ...]
    """Points (x, top-1)."""
    curve_label: str
    """What x is, and which images the accuracies are of."""
    seconds: float
    date: str
    environment: dict[str, Any]

    @property
    def top1(self) -> float:
        """Share of the test images that is recognised, 0..1."""
        return self.scores.top1

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `NAME.json`."""
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


def check_writable(folder: Path) -> None:
    """Make the folder, and try to write into it.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"eval: {folder} cannot be written ({error}); choose another folder with --output") from None


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `NAME.json` and the pictures `NAME.svg`, `NAME_classes.svg`, `NAME_confusion.svg`, `NAME_curve.svg`.

    Each file appears whole, the record last; those of an earlier evaluation of this name are replaced. The earlier
    record goes to the folder `earlier` first, unless it is of the same encoder, images and options.

    Returns:
        The files, the record first, an earlier record that was kept last.

    Raises:
        ConfigError: the folder cannot be written.
    """
    record, text = folder / f"{evaluation.protocol}.json", as_json(evaluation.to_dict())
    pictures = {folder / f"{evaluation.protocol}{part}.svg": svg for part, svg in charts(evaluation).items()}
    possible = {folder / f"{evaluation.protocol}{part}.svg" for part in ("", "_classes", "_confusion", "_curve")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = _keep_earlier(record, text)
        for path, svg in pictures.items():
            atomic_write(path, svg + "\n")
        atomic_write(record, text)
        for path in possible - pictures.keys():
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"eval: {folder} cannot be written ({error}); choose another folder with --output") from None
    return [record, *pictures, *kept]


def _keep_earlier(record: Path, text: str) -> list[Path]:
    """Copy the record that is about to be replaced, where it says something else than a repetition would."""
    if not record.exists():
        return []
    content = record.read_bytes()
    try:
        old, new = json.loads(content), json.loads(text)
        same = all(old.get(field) == new[field] for field in _JUDGED)
    except (ValueError, AttributeError):  # not one of ours
        same = False
    if same:
        return []
    number = 1
    while (path := record.parent / "earlier" / f"{record.stem}_{number}.json").exists():
        number += 1
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return [path]


def as_json(record: dict[str, Any]) -> str:
    """JSON with a line for each field, and for each row of a table: a thousand classes are a thousand lines."""
    lines = []
    for name, value in record.items():
        if name in _ROWS and value:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def charts(evaluation: Evaluation) -> dict[str, str]:
    """Pictures of an evaluation as SVG, by what is added to its name."""
    scores, title = evaluation.scores, f"{evaluation.protocol}, {evaluation.encoder}"
    entries = [("this encoder", scores.top1, scores.top1_ci95)]
    entries += [(b.name, b.top1, b.top1_ci95) for b in evaluation.baselines]
    found = {
        "": bar_chart(
            [name for name, _, _ in entries],
            [100 * top1 for _, top1, _ in entries],
            intervals=[_percent(ci) for _, _, ci in entries],
            title=title,
            x_label="top-1, %",
        )
    }
    worst = sorted((c for c in scores.per_class if c.accuracy is not None), key=lambda c: c.accuracy or 0.0)
    found["_classes"] = bar_chart(
        [c.name for c in worst[:MATRIX_CLASSES]],
        [None if c.accuracy is None else 100 * c.accuracy for c in worst[:MATRIX_CLASSES]],
        intervals=[_percent(c.ci95) for c in worst[:MATRIX_CLASSES]],
        title=f"{title}: " + ("classes" if len(worst) <= MATRIX_CLASSES else f"the {MATRIX_CLASSES} hardest classes"),
        x_label="top-1, %",
    )
    if len(evaluation.classes) <= MATRIX_CLASSES:
        found["_confusion"] = heat_map(
            scores.confusion.tolist(),
            evaluation.classes,
            evaluation.classes,
            title=f"{title}: confusion",
            x_label="taken for",
            y_label="is",
        )
    if len(evaluation.curve) > 1:
        xs = [x for x, _ in evaluation.curve]
        found["_curve"] = line_chart(
            [Series("top-1", xs, [100 * y for _, y in evaluation.curve], markers=True)],
            title=title,
            x_label=evaluation.curve_label,
            y_label="top-1, %",
            x_log=min(xs) > 0 and max(xs) > 20 * min(xs),
        )
    return found


def _percent(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]


def summary(evaluations: list[Evaluation]) -> RenderableType:
    """Tables for the terminal: all accuracies, and of the last evaluation the classes and the common mistakes."""
    last = evaluations[-1]
    parts: list[RenderableType] = [_accuracies(evaluations)]
    judged = [c for c in last.scores.per_class if c.accuracy is not None]
    shown = sorted(judged, key=lambda c: c.accuracy or 0.0)[:SHOWN_CLASSES]
    table = Table(
        title=f"{last.protocol}: "
        + ("classes" if len(shown) == len(judged) else f"the {SHOWN_CLASSES} hardest classes")
    )
    for heading in ("class", "images", "top-1", "95 % interval", "most often taken for"):
        table.add_column(heading, justify="right" if heading in {"images", "top-1"} else "left")
    numbers = {name: i for i, name in enumerate(last.classes)}
    for c in shown:
        row = last.scores.confusion[numbers[c.name]].copy()
        row[numbers[c.name]] = 0
        mistake = f"{last.classes[row.argmax()]} ({row.max() / c.count:.0%})" if row.max() else ""
        table.add_row(c.name, str(c.count), f"{c.accuracy:.1%}", _shown(c.ci95), mistake)
    parts.append(table)
    return Group(*parts)


def _accuracies(evaluations: list[Evaluation]) -> Table:
    first = evaluations[0]
    top5 = len(first.classes) > 5
    table = Table(title=f"{first.encoder}" + ("" if first.step is None else f", step {first.step}"))
    table.add_column("protocol")
    table.add_column("encoder")
    for heading in ("top-1", "95 % interval", *(("top-5",) if top5 else ())):
        table.add_column(heading, justify="right")
    for e in evaluations:
        chosen = ", ".join(
            f"{k} {v:.3g}" for k, v in e.chosen.items() if k in {"k", "temperature", "l2", "lr", "epochs"}
        )
        rows = [("this", e.scores.top1, e.scores.top1_ci95, e.scores.top5)]
        rows += [(b.name, b.top1, b.top1_ci95, b.top5) for b in e.baselines]
        for number, (name, top1, interval, five) in enumerate(rows):
            label = (e.protocol + (f" ({chosen})" if chosen else "")) if number == 0 else ""
            table.add_row(
                label,
                name,
                f"{top1:.1%}",
                _shown(interval),
                *((f"{five:.1%}",) if top5 else ()),
                end_section=number == len(rows) - 1,
            )
    return table


def _shown(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}"
