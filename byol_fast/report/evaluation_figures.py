"""Charts of evaluations: accuracy beside the baselines, by class and by hyperparameter, and the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from byol_fast.report.charts import Series, bar_chart, heat_map, line_chart
from byol_fast.report.formatting import finite, interval
from byol_fast.report.reading import Record
from byol_fast.utils.files import atomic_write, write_errors


class Metric(NamedTuple):
    """Fields of a metric in a record."""

    key: str
    interval: str
    label: str
    """Its name in charts and tables."""


TOP1, MEAN_AP = Metric("top1", "top1_ci95", "top-1"), Metric("mean_ap", "mean_ap_ci95", "mAP")
CLASS_TOP1 = Metric("accuracy", "ci95", "top-1")
SHOTS_TITLE = "training images per class"
MAX_CLASSES = 60
"""Largest number of classes in a chart; more would be illegible."""


def save_figures(record: Record, folder: Path) -> list[Path]:
    """Write the charts of an evaluation that it has values for.

    These are `NAME.svg`, `NAME_shots.svg`, `NAME_classes.svg`, `NAME_confusion.svg` and `NAME_curve.svg`.

    Files of an earlier evaluation of this name are replaced, and removed if the chart does not exist any more.

    Args:
        record: `EvalResult.to_dict()`, or the content of `NAME.json`.
        folder: an existing folder.

    Returns:
        The files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    name, title = record["protocol"], f"{record['protocol']}, {record['encoder']}"
    charts = {"": accuracy_chart(record, title)}
    if shots_of(record):
        charts["_shots"] = shots_chart(record, f"{title}: {SHOTS_TITLE}")
    num_classes = len(record.get("classes") or [])
    if num_classes:
        hardest = "classes" if num_classes <= MAX_CLASSES else f"the {MAX_CLASSES} hardest classes"
        charts["_classes"] = _class_chart(record, f"{title}: {hardest}")
    if 0 < num_classes <= MAX_CLASSES:
        counts = confusion_matrix(record["confusion"], num_classes)
        charts["_confusion"] = confusion_chart(counts, record["classes"], f"{title}: confusion, percent")
    if len(record.get("curve") or []) > 1:
        charts["_curve"] = curve_chart(record, title)
    with write_errors(folder, "eval", "choose another folder with --output"):
        for suffix in ("", "_shots", "_classes", "_confusion", "_curve"):
            path = folder / f"{name}{suffix}.svg"
            if suffix in charts:
                atomic_write(path, charts[suffix] + "\n")
            else:
                path.unlink(missing_ok=True)
    return [folder / f"{name}{suffix}.svg" for suffix in charts]


def metric_of(record: Record) -> Metric:
    """The metric that a record and its baselines are compared by."""
    return MEAN_AP if "mean_ap" in record else TOP1


def baselines_of(record: Record) -> list[Record]:
    """Baselines of a record whose accuracy, or mAP, is known."""
    return _known(record.get("baselines"), metric_of(record))


def shots_of(record: Record) -> list[Record]:
    """Accuracies of a record with few training images per class."""
    return _known(record.get("shots"), TOP1)


def _known(rows: object, metric: Metric) -> list[Record]:
    rows = rows if isinstance(rows, list | tuple) else []
    return [row for row in rows if isinstance(row, dict) and finite(row.get(metric.key)) is not None]


def accuracy_chart(record: Record, title: str) -> str:
    """Accuracy, or mAP, of the baselines and the encoder, with confidence intervals."""
    rows, metric = [*baselines_of(record), record | {"name": "this encoder"}], metric_of(record)
    return _bars([str(row.get("name", "?")) for row in rows], rows, title, metric)


def shots_chart(record: Record, title: str) -> str:
    """Accuracy with each number of training images per class, with confidence intervals."""
    rows = shots_of(record)
    return _bars([f"{row.get('name', '?')}, {row.get('shots', '?')}" for row in rows], rows, title, TOP1)


def _bars(names: Sequence[str], rows: Sequence[Record], title: str, metric: Metric) -> str:
    """Bars of a metric in percent."""
    values = [None if (share := finite(row[metric.key])) is None else 100 * share for row in rows]
    intervals = [interval(row, metric.interval) or (math.nan, math.nan) for row in rows]
    percents = [(100 * low, 100 * high) for low, high in intervals]
    return bar_chart(names, values, title=title, x_label=f"{metric.label}, %", intervals=percents, unit="%")


def _class_chart(record: Record, title: str) -> str:
    """Accuracy of each class with test images, lowest first."""
    tested = [c for c in record["per_class"] if c["accuracy"] is not None]
    rows = sorted(tested, key=lambda c: float(c["accuracy"]))[:MAX_CLASSES]
    return _bars([c["class"] for c in rows], rows, title, CLASS_TOP1)


def confusion_matrix(cells: Sequence[Sequence[int]], num_classes: int) -> list[list[int]]:
    """Number of images of each class (row) that were classified as each class (column), from `Scores.confusion`."""
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for true, predicted, count in cells:
        matrix[true][predicted] = count
    return matrix


def confusion_chart(counts: Sequence[Sequence[float]], classes: Sequence[str], title: str) -> str:
    """Confusion matrix in percent of each true class."""
    shares = [[round(100 * v / sum(row)) if sum(row) else None for v in row] for row in counts]
    return heat_map(shares, classes, classes, title=title, x_label="predicted class", y_label="true class")


def curve_chart(record: Record, title: str) -> str:
    """Accuracy by the hyperparameter or epoch that the record has a curve over."""
    curve = [p for p in record.get("curve") or [] if isinstance(p, dict)]
    x = [finite(p.get("x")) for p in curve]
    y = [None if (share := finite(p.get("top1"))) is None else 100 * share for p in curve]
    known = [v for v in x if v is not None]
    x_log = bool(known) and min(known) > 0 and max(known) >= 50 * min(known)
    line = Series("top-1", x, y, markers=True)
    return line_chart([line], title=title, x_label=curve_label(record), y_label="top-1, %", x_log=x_log, unit="%")


def curve_label(record: Record) -> str:
    """Name of the horizontal axis of a record's curve."""
    return str(record.get("curve_label") or "x")
