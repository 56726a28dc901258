"""Charts of all that a run recorded by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from byol_fast.report.charts import Series, line_chart
from byol_fast.report.drawing import WIDTH
from byol_fast.report.page import Section, chart_grid, details, paragraph, table
from byol_fast.report.reading import RunFiles, distinct_names

Curve = tuple[str, str, tuple[float, float] | None]
"""Title, label of the vertical axis, and its range."""

CURVES: dict[str, Curve] = {
    "loss": ("Loss", "loss", None),
    "embedding_std": ("Embedding standard deviation (1 healthy, 0 collapsed)", "std", (0.0, 1.2)),
    "knn_top1": ("kNN accuracy", "top-1", None),
    "probe_top1": ("Linear probe, on the training views", "top-1", None),
    "probe_val_top1": ("Linear probe, on the validation images", "top-1", None),
    "rankme": ("Effective rank of the features (RankMe)", "rank", None),
    "lr": ("Learning rate", "lr", None),
    "tau": ("EMA decay of the target network", "tau", None),
    "images_per_second": ("Throughput", "images / s", None),
    "data_wait": ("Share of the time spent waiting for data", "share", None),
    "peak_memory_gib": ("Peak memory", "GiB", None),
}
LEARNING = ("loss", "knn_top1", "probe_val_top1", "probe_top1", "embedding_std", "rankme", "lr", "tau")
SPEED = ("images_per_second", "data_wait", "peak_memory_gib")
FROM_ZERO = {"loss", "images_per_second", "peak_memory_gib"}
AT_EVALUATIONS = {"knn_top1", "probe_val_top1", "rankme"}
"""Recorded at evaluations only: each value gets a mark."""
NO_CURVES = {"step", "epoch", "knn_k", "knn_num_train", "knn_num_val", "knn_top5", "knn_full_top1", "knn_full_top5"}


def curves(runs: Sequence[RunFiles]) -> list[Section]:
    """Charts of all numbers recorded by step; several runs share the charts, by epoch."""
    x = "step" if len(runs) == 1 else "epoch"
    recorded = list(dict.fromkeys(key for run in runs for key in run.recorded_keys()))
    others = [key for key in recorded if key not in CURVES and key not in NO_CURVES]
    # The same range for all charts, so that they can be compared one above the other.
    end = max((float(r[x]) for run in runs for r in run.records if r.get(x)), default=1.0)
    learning = [_curve(runs, key, x, end) for key in (*LEARNING, *others) if key in recorded]
    speed = [_curve(runs, key, x, end) for key in SPEED if key in recorded]
    if not learning:
        return [Section("Curves", paragraph("metrics.jsonl contains no record yet."))]
    tables = "" if len(runs) > 1 else _tables(runs[0])
    has_bands = any(len(run.steps) > 2 * WIDTH for run in runs)
    note = paragraph("Lines are means over neighboring steps, bands reach from the lowest to the highest.", "faint")
    sections = [Section("Learning", chart_grid(learning) + (note if has_bands else "") + tables)]
    return sections + ([Section("Speed and memory", chart_grid(speed))] if speed else [])


def _curve(runs: Sequence[RunFiles], key: str, x: str, end: float) -> str:
    title, label, y_range = CURVES.get(key, (key, key, None))
    lines = []
    for run, name in zip(runs, distinct_names(runs), strict=True):
        lines.append(Series(name if len(runs) > 1 else key, *run.curve(key, x), markers=key in AT_EVALUATIONS))
        if key == "loss" and len(runs) == 1:
            lines += _skipped_steps(run)
    values = [v for line in lines for v in line.y if v is not None and math.isfinite(v)]
    top = max(values, default=0.0)
    if y_range is not None and top > y_range[1]:
        y_range = (y_range[0], top)
    if key in FROM_ZERO and top > 0 and min(values) >= 0:
        y_range = (0.0, 1.05 * top)
    if key == "data_wait":
        y_range = (0.0, max(0.05, 1.05 * top))
    return line_chart(lines, title=title, x_label=x, y_label=label, x_range=(0.0, end), y_range=y_range)


def _skipped_steps(run: RunFiles) -> list[Series]:
    """Marks at skipped steps, at the height of the loss before."""
    x: list[float | None] = []
    y: list[float | None] = []
    height = 0.0
    for record in run.steps:
        if record.get("skipped"):
            x += [record["step"], None]  # None: no line between the marks
            y += [height, None]
        elif record["loss"] is not None:
            height = record["loss"]
    return [Series("skipped", x, y, markers=True)] if x else []


def _tables(run: RunFiles) -> str:
    """Tables of twenty steps and of all evaluations, folded away."""
    steps, recorded = run.steps, run.recorded_keys()
    shown = sorted({round(k * (len(steps) - 1) / 19) for k in range(20)}) if steps else []
    html = ""
    for keys, records in (
        (("loss", "embedding_std", "lr", "tau", "images_per_second", "data_wait"), [steps[i] for i in shown]),
        (
            ("knn_top1", "knn_top5", "probe_val_top1", "rankme"),
            [r for r in run.records if r.get("knn_top1") is not None],
        ),
    ):
        columns = ["step", "epoch", *(k for k in keys if k in recorded)]
        html += table(columns, [[record.get(k) for k in columns] for record in records]) if records else ""
    return details("The same as tables", html) if html else ""
