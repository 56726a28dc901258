"""Sections about evaluations: accuracies beside their baselines, confusions, classes, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from byol_fast.report.evaluation_figures import (
    MAX_CLASSES,
    MEAN_AP,
    SHOTS_TITLE,
    accuracy_chart,
    baselines_of,
    confusion_chart,
    confusion_matrix,
    curve_chart,
    curve_label,
    metric_of,
    shots_chart,
    shots_of,
)
from byol_fast.report.formatting import (
    UNKNOWN,
    as_text,
    count,
    differ,
    finite,
    interval,
    interval_text,
    percent,
)
from byol_fast.report.page import Section, chart_grid, details, facts, paragraph, table
from byol_fast.report.reading import Record, RunFiles
from byol_fast.utils.records import flatten

MAX_ROWS = 1000
"""Largest number of classes in a table."""


def evaluations(run: RunFiles) -> list[Section]:
    """A section for each result of `byol-fast eval`."""
    return [Section(f"Evaluation: {record['name']}", _evaluation(record)) for record in run.evaluations]


def weaker_than_baselines(record: Record) -> list[str]:
    """A sentence for each baseline with a higher accuracy, or mAP, if their intervals do not overlap."""
    key, ends, _ = metric_of(record)
    value = finite(record.get(key))
    return [
        f"{record['name']}: {percent(value)} is below the baseline {b.get('name', '?')}, {percent(b[key])}."
        for b in baselines_of(record)
        if value is not None and b[key] > value and differ(interval(record, ends), interval(b, ends))
    ]


def _evaluation(record: Record) -> str:
    metric = metric_of(record)
    num_train = f"; {count(record['num_train'])} training images" if "num_train" in record else ""
    name = str(record.get("protocol", record["name"])) + (f", {metric.label}" if metric.key != "top1" else "")
    entries = [
        (name, percent(record.get(metric.key)), interval_text(record, metric.interval, prefix="95 %: ")),
        ("Top-5", percent(record.get("top5")), ""),
        ("Images", count(record.get("num_test")), f"test images{num_train}"),
    ]
    parts = [facts([entry for entry in entries if entry[1] != UNKNOWN])]
    if isinstance(record.get("encoder"), str):
        parts.append(paragraph(f"{record['encoder']}, step {count(record.get('step'))}", "faint"))
    parts += [paragraph(text, "warn") for text in weaker_than_baselines(record)]
    classes: list[str] = record.get("classes") or []
    cells = _confusion(record, len(classes))
    column = ""
    if baselines_of(record) and finite(record.get(metric.key)) is not None:
        column += accuracy_chart(record, "Compared with its baselines")
    if shots_of(record):
        column += shots_chart(record, f"Top-1 by {SHOTS_TITLE}")
    if any(isinstance(point, dict) for point in record.get("curve") or []):
        column += curve_chart(record, f"Top-1 by {curve_label(record)}")
    charts = [f"<div>{column}</div>"] if column else []
    if cells and len(classes) <= MAX_CLASSES:
        matrix = confusion_matrix(cells, len(classes))
        charts.append(confusion_chart(matrix, classes, "Confusion, percent of each true class"))
    parts += [_retrieval_table(record), _shots_table(record)]
    parts.append(chart_grid(charts) if charts else "")
    parts.append(_common_mistakes(cells, classes) if cells else "")
    if cells is None:
        parts.append(paragraph("The confusion matrix is left out: it was written by an earlier version.", "faint"))
    return "".join(parts) + _class_table(record) + _settings_table(record)


def _retrieval_table(record: Record) -> str:
    """Table of mAP and recall of the encoder and its baselines, and the number of images that are no queries."""
    if metric_of(record) != MEAN_AP:
        return ""
    rows = []
    for row in (record | {"name": "this encoder"}, *baselines_of(record)):
        name = row.get("name", UNKNOWN)
        rows.append([name, MEAN_AP.label, percent(row.get(MEAN_AP.key)), interval_text(row, MEAN_AP.interval)])
        for recall in row.get("recall") or []:
            label = f"recall at {count(recall.get('k'))}"
            rows.append([name, label, percent(recall.get("recall")), interval_text(recall, "ci95")])
    left_out, num_test = record.get("num_left_out"), count(record.get("num_test"))
    text = f"{count(left_out)} of {num_test} images are no queries: no other one has their class."
    return table(["encoder", "metric", "value", "95 % interval"], rows) + (paragraph(text) if left_out else "")


def _shots_table(record: Record) -> str:
    rows = [
        [
            count(row.get("shots")),
            row.get("name", UNKNOWN),
            *(percent(row["top1"]), interval_text(row)),
            *(percent(row.get("lowest")), percent(row.get("highest"))),
        ]
        for row in shots_of(record)
    ]
    headers = [SHOTS_TITLE, "encoder", "mean top-1", "95 % interval", "lowest", "highest"]
    return table(headers, rows) if rows else ""


def _class_table(record: Record) -> str:
    classes = [c for c in record.get("per_class") or [] if isinstance(c, dict)]
    classes.sort(key=lambda c: finite(c.get("accuracy")) or 0.0)
    rows = [
        [str(c.get("class", "?")), c.get("count"), percent(c.get("accuracy")), interval_text(c, "ci95")]
        for c in classes[:MAX_ROWS]
    ]
    headers = ["class", "images", "accuracy", "95 % interval"]
    title = "Accuracy by class, lowest first" + (f" ({MAX_ROWS:,} of {len(classes):,})" if classes[MAX_ROWS:] else "")
    return details(title, table(headers, rows)) if rows else ""


def _settings_table(record: Record) -> str:
    keys = ("train", "test", "settings", "chosen", "interval", "date", "seconds", "environment")
    settings = flatten({key: record[key] for key in keys if key in record})
    rows = [[key, as_text(value)] for key, value in settings.items()]
    return details("Settings", table(["setting", "value"], rows)) if rows else ""


def _confusion(record: Record, num_classes: int) -> list[list[int]] | None:
    """Cells of the confusion matrix, none without one; None if they do not fit the other fields."""
    cells: list[list[int]] = record.get("confusion") or []
    places = [(true, predicted) for true, predicted, _ in cells]
    fits = all(max(place) < num_classes for place in places) and places == sorted(set(places))
    # Matrices of earlier versions, of three classes, look like three cells.
    total = sum(number for *_, number in cells)
    return cells if not cells or (fits and total == record.get("num_test")) else None


def _common_mistakes(cells: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    sizes = Counter[int]()
    for true, _, number in cells:
        sizes[true] += number
    mistakes = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    rows = [[classes[i], classes[j], number, f"{number / sizes[i]:.1%}"] for i, j, number in mistakes[:10]]
    if not rows:
        return ""
    headers = ["true class", "predicted class", "images", "of the class"]
    return "<h3>Most common mistakes</h3>" + table(headers, rows)
