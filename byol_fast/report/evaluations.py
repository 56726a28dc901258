"""Sections about evaluations: accuracies beside their baselines, confusions, classes, settings."""

from __future__ import annotations

from collections.abc import Sequence

from byol_fast.report.evaluation_figures import (
    MAX_CLASSES,
    accuracy_chart,
    baselines_of,
    confusion_chart,
    curve_chart,
    curve_label,
)
from byol_fast.report.formatting import UNKNOWN, as_text, count, finite, flatten, interval_text, percent
from byol_fast.report.page import Section, chart_grid, details, facts, paragraph, table
from byol_fast.report.reading import Record, RunFiles


def evaluations(run: RunFiles) -> list[Section]:
    """A section for each result of `byol-fast eval`."""
    return [Section(f"Evaluation: {record['name']}", _evaluation(record)) for record in run.evaluations]


def weaker_than_baselines(record: Record) -> list[str]:
    """A sentence for each baseline with a higher accuracy."""
    top1 = finite(record.get("top1"))
    return [
        f"{record['name']}: {percent(top1)} is below the baseline {b.get('name', '?')}, {percent(b['top1'])}."
        for b in baselines_of(record)
        if top1 is not None and b["top1"] > top1
    ]


def _evaluation(record: Record) -> str:
    num_train = f"test images; {count(record.get('num_train'))} training images"
    entries = [
        (
            str(record.get("protocol", record["name"])),
            percent(record.get("top1")),
            interval_text(record, prefix="95 %: "),
        ),
        ("Top-5", percent(record.get("top5")), ""),
        ("Images", count(record.get("num_test")), num_train),
    ]
    parts = [facts([entry for entry in entries if entry[1] != UNKNOWN])]
    if isinstance(record.get("encoder"), str):
        parts.append(paragraph(f"{record['encoder']}, step {count(record.get('step'))}", "faint"))
    parts += [paragraph(text, "warn") for text in weaker_than_baselines(record)]
    confusion = _confusion(record)
    column = ""
    if baselines_of(record) and finite(record.get("top1")) is not None:
        column += accuracy_chart(record, "Compared with its baselines")
    if any(isinstance(point, dict) for point in record.get("curve") or []):
        column += curve_chart(record, f"Top-1 by {curve_label(record)}")
    charts = [f"<div>{column}</div>"] if column else []
    if confusion is not None and len(confusion[1]) <= MAX_CLASSES:
        charts.append(confusion_chart(*confusion, "Confusion, percent of each true class"))
    parts.append(chart_grid(charts) if charts else "")
    parts.append(_common_mistakes(*confusion) if confusion is not None else "")
    return "".join(parts) + _class_table(record) + _settings_table(record)


def _class_table(record: Record) -> str:
    classes = [c for c in record.get("per_class") or [] if isinstance(c, dict)]
    classes.sort(key=lambda c: finite(c.get("accuracy")) or 0.0)
    rows = [
        [str(c.get("class", "?")), c.get("count"), percent(c.get("accuracy")), interval_text(c, "ci95")]
        for c in classes
    ]
    headers = ["class", "images", "accuracy", "95 % interval"]
    return details("Accuracy by class, lowest first", table(headers, rows)) if rows else ""


def _settings_table(record: Record) -> str:
    keys = ("train", "test", "settings", "chosen", "interval", "date", "seconds", "environment")
    settings = flatten({key: record[key] for key in keys if key in record})
    rows = [[key, as_text(value)] for key, value in settings.items()]
    return details("Settings", table(["setting", "value"], rows)) if rows else ""


def _confusion(record: Record) -> tuple[list[list[float]], list[str]] | None:
    """The confusion matrix and the names of its classes, if they fit together."""
    matrix, classes = record.get("confusion"), [str(c) for c in record.get("classes") or []]
    if not isinstance(matrix, list) or not classes or len(matrix) != len(classes):
        return None
    if any(not isinstance(row, list) or len(row) != len(classes) for row in matrix):
        return None
    return [[finite(v) or 0.0 for v in row] for row in matrix], classes


def _common_mistakes(counts: Sequence[Sequence[float]], classes: Sequence[str]) -> str:
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n > 0]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [[classes[i], classes[j], int(n), f"{n / sum(counts[i]):.1%}"] for n, i, j in pairs[:10]]
    if not rows:
        return ""
    headers = ["true class", "predicted class", "images", "of the class"]
    return "<h3>Most common mistakes</h3>" + table(headers, rows)
