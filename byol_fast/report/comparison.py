"""The report of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from byol_fast.report.curves import curves
from byol_fast.report.formatting import UNKNOWN, as_text, count, duration, interval_text, percent, readable
from byol_fast.report.page import Section, paragraph, table
from byol_fast.report.reading import RunFiles, distinct_names
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
        [name, e["name"], percent(e.get("top1")), interval_text(e), count(e.get("num_test"))]
        for run, name in zip(runs, names, strict=True)
        for e in run.evaluations
    ]
    if evaluations:
        headers = ["run", "protocol", "top-1", "95 % interval", "images"]
        sections.append(Section("Evaluations", table(headers, evaluations)))
    return [*sections, Section("Options that differ", _differences(runs, names))]


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
