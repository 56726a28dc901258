"""The report of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from byol_fast.report.curves import curves
from byol_fast.report.evaluation_figures import SHOTS_TITLE, TOP1, metric_of, shots_of
from byol_fast.report.formatting import UNKNOWN, as_text, count, duration, interval_text, percent, readable
from byol_fast.report.page import Section, paragraph, table
from byol_fast.report.reading import Record, RunFiles, distinct_names
from byol_fast.report.summary import progress
from byol_fast.utils.records import flatten


def comparison(runs: Sequence[RunFiles]) -> list[Section]:
    """Several runs compared: figures, curves, evaluations, and the options that differ."""
    names = distinct_names(runs)
    headers = ["run", "progress", "loss", "embedding std", "kNN top-1", "probe top-1", "img/s", "time of the steps"]
    rows = [_figures(run, name) for run, name in zip(runs, names, strict=True)]
    notes = [paragraph(f"{name}: {text}", "warn") for run, name in zip(runs, names, strict=True) for text in run.notes]
    sections = [Section("Runs", table(headers, rows) + "".join(notes)), *curves(runs)]
    evaluations = [
        [name, *row] for run, name in zip(runs, names, strict=True) for e in run.evaluations for row in _results(e)
    ]
    if evaluations:
        headers = ["run", "protocol", "metric", "value", "95 % interval", "images"]
        sections.append(Section("Evaluations", table(headers, evaluations)))
    return [*sections, Section("Options that differ", _differences(runs, names))]


def _results(evaluation: Record) -> list[list[str]]:
    """Rows of an evaluation: its result, and those of its encoder with few training images per class."""
    (key, ends, label), num_test = metric_of(evaluation), count(evaluation.get("num_test"))
    rows = [[evaluation["name"], label, percent(evaluation.get(key)), interval_text(evaluation, ends), num_test]]
    for row in shots_of(evaluation):
        if row.get("name") == "this encoder":
            name = f"{evaluation['name']}, {count(row.get('shots'))} {SHOTS_TITLE}"
            rows.append([name, TOP1.label, percent(row["top1"]), interval_text(row), num_test])
    return rows


def _figures(run: RunFiles, name: str) -> list[str]:
    knn, probe = ([r[key] for r in run.records if r.get(key) is not None] for key in ("knn_top1", "probe_val_top1"))
    speeds = sorted(float(r["images_per_second"]) for r in run.steps if r.get("images_per_second"))
    return [
        name,
        ", ".join(progress(run)),
        f"{value:.4f}" if (value := run.last("loss")) is not None else UNKNOWN,
        f"{value:.2f}" if (value := run.last("embedding_std")) is not None else UNKNOWN,
        percent(knn[-1] if knn else None),
        percent(probe[-1] if probe else None),
        readable(speeds[len(speeds) // 2], 4) if speeds else UNKNOWN,
        duration(run.seconds),
    ]


def _differences(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    flat = [flatten(run.values) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in {"name", "out"})
    rows = [[key, *(as_text(values.get(key, "")) for values in flat)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return table(["option", *names], rows) if rows else paragraph("None.")
