"""Charts of all that a run recorded by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from byol_fast.report.charts import Series, line_chart
from byol_fast.report.drawing import WIDTH
from byol_fast.report.formatting import accuracy_interval, percent
from byol_fast.report.page import Section, chart_grid, details, paragraph, table
from byol_fast.report.reading import Record, RunFiles, distinct_names
from byol_fast.utils.intervals import Interval

CURVES: dict[str, tuple[str, str]] = {
    "loss": ("Loss", "loss"),
    "embedding_std": ("Embedding std (1 healthy, 0 collapsed)", "std"),
    "knn_top1": ("kNN accuracy on the validation images", "top-1, %"),
    "probe_top1": ("Linear probe accuracy on the training views", "top-1, %"),
    "probe_val_top1": ("Linear probe accuracy on the validation images", "top-1, %"),
    "rankme": ("Effective rank of the features (RankMe)", "rank"),
    "lr": ("Learning rate", "lr"),
    "tau": ("EMA decay of the target network", "tau"),
    "images_per_second": ("Throughput", "images / s"),
    "data_wait": ("Time spent waiting for data", "% of the step"),
    "peak_memory_gib": ("Peak memory", "GiB"),
}
"""Title and label of the vertical axis."""
LEARNING = ("loss", "knn_top1", "probe_val_top1", "probe_top1", "embedding_std", "rankme")
SCHEDULES = ("lr", "tau")
SPEED = ("images_per_second", "data_wait", "peak_memory_gib")
ACCURACIES = {"knn_top1": "kNN", "probe_val_top1": "linear probe"}
"""Shares of the validation images, with an interval."""
PERCENT = {"knn_top1", "knn_top5", "probe_val_top1", "probe_top1", "data_wait"}
"""Shares, shown in percent."""
FROM_ZERO = {"loss", "images_per_second", "data_wait", "peak_memory_gib"}
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
    groups: list[tuple[str, ...]] = [(key,) for key in (*LEARNING, *others) if key in recorded]
    if len(runs) == 1 and all((key,) in groups for key in ACCURACIES):
        groups[groups.index(("knn_top1",))] = tuple(ACCURACIES)
        groups.remove(("probe_val_top1",))
    learning = [_chart(runs, keys, x, end) for keys in groups]
    schedules = [_chart(runs, (key,), x, end) for key in SCHEDULES if key in recorded]
    speed = [_chart(runs, (key,), x, end) for key in SPEED if key in recorded]
    if not learning:
        return [Section("Curves", paragraph("metrics.jsonl contains no record yet."))]
    notes = []
    if len(runs) == 1 and (config := runs[0].config) is not None and config.extend is not None:
        run, last = config.extend.name, f"{config.extended_at:,}"
        notes.append(f"To step {last}: the run {run}, which this one extends; the schedules begin again there.")
    if any(len(run.steps) > 2 * WIDTH for run in runs):
        notes.append("Lines are means over neighboring steps, bands reach from the lowest to the highest.")
    sizes = {r["knn_num_val"] for run in runs for r in run.records if r.get("knn_top1") and r.get("knn_num_val")}
    if sizes:
        images = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
        notes.append(f"Error bars: 95 % intervals for {images} validation images.")
    html = chart_grid(learning) + (chart_grid(schedules) if schedules else "")
    html += "".join(paragraph(note, "faint") for note in notes) + ("" if len(runs) > 1 else _tables(runs[0]))
    return [Section("Learning", html), *([Section("Speed and memory", chart_grid(speed))] if speed else [])]


def _chart(runs: Sequence[RunFiles], keys: tuple[str, ...], x: str, end: float) -> str:
    """Chart of one number of several runs, or of several numbers of one run."""
    together = ("Accuracy on the validation images", "top-1, %")
    title, label = CURVES.get(keys[0], (keys[0], keys[0])) if len(keys) == 1 else together
    names = distinct_names(runs) if len(runs) > 1 else [ACCURACIES.get(key, key) for key in keys]
    pairs = [(run, key) for run in runs for key in keys]
    lines = [_series(run, key, x, name) for (run, key), name in zip(pairs, names, strict=True)]
    if keys == ("loss",) and len(runs) == 1:
        lines += _skipped_steps(runs[0])
    values = [v for line in lines for v in line.y if v is not None and math.isfinite(v)]
    low, top = min(values, default=0.0), max(values, default=0.0)
    y_range = None
    if keys == ("embedding_std",):
        y_range = (0.0, max(1.2, top))
    elif keys[0] in FROM_ZERO and top > 0 and low >= 0:
        y_range = (0.0, max(1.05 * top, 5.0 if keys == ("data_wait",) else 0.0))
    return line_chart(
        lines,
        title=title,
        x_label=x,
        y_label=label,
        x_range=(0.0, end),
        y_range=y_range,
        unit="%" if keys[0] in PERCENT else "",
        low=keys[0] in SCHEDULES,
    )


def _series(run: RunFiles, key: str, x: str, name: str) -> Series:
    """A recorded number, shares in percent, with intervals where the number of images is known."""
    positions, values = run.curve(key, x)
    intervals: list[Interval | None] = []
    if key in ACCURACIES:
        ends = [accuracy_interval(r[key], r.get("knn_num_val")) for r in run.records if key in r]
        intervals = [None if pair is None else (100 * pair[0], 100 * pair[1]) for pair in ends]
    if key in PERCENT:
        values = [None if v is None else 100 * v for v in values]
    return Series(name, positions, values, markers=key in AT_EVALUATIONS, intervals=intervals)


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
        html += table(columns, [[_cell(record, k) for k in columns] for record in records]) if records else ""
    return details("The same as tables", html) if html else ""


def _cell(record: Record, key: str) -> object:
    value = record.get(key)
    return percent(value) if key in PERCENT and value is not None else value
