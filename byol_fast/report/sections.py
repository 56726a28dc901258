"""What the report of a run says without looking at an image: health, curves, judgement, machine, options."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from byol_fast import config as configs
from byol_fast.config import recipes
from byol_fast.report.charts import Series, bar_chart, heat_map, line_chart
from byol_fast.report.drawing import WIDTH
from byol_fast.report.page import Section, chart_grid, details, facts, paragraph, table
from byol_fast.report.reading import RunFiles

HEALTHY, COLLAPSED = 0.5, 0.2
"""Of the spread of the projections: above the one all is well, below the other all images look nearly the same."""

LARGE_CONFUSION = 60
"""With more classes than these, the pairs that are confused most are listed instead of a matrix."""

Curve = tuple[str, str, tuple[float, float] | None]

CURVES: dict[str, Curve] = {
    "loss": ("Loss (0 to 8)", "loss", None),
    "embedding_std": ("Spread of the projections (1 healthy, 0 collapsed)", "std", (0.0, 1.2)),
    "knn_top1": ("Nearest-neighbour accuracy", "top-1", None),
    "probe_top1": ("Linear probe, on the training views", "top-1", None),
    "probe_val_top1": ("Linear probe, on the validation images", "top-1", None),
    "rankme": ("Effective rank of the features (RankMe)", "rank", None),
    "lr": ("Learning rate", "lr", None),
    "tau": ("Decay of the target network", "tau", None),
    "images_per_second": ("Throughput", "images / s", None),
    "data_wait": ("Share of the time spent waiting for data", "share", None),
    "peak_memory_gib": ("Peak memory", "GiB", None),
}
LEARNING = ("loss", "knn_top1", "probe_val_top1", "probe_top1", "embedding_std", "rankme", "lr", "tau")
SPEED = ("images_per_second", "data_wait", "peak_memory_gib")
RARE = {"knn_top1", "probe_val_top1", "rankme"}
"""Recorded at evaluations only: each value gets a mark."""
NOT_CURVES = {"step", "epoch", "knn_k", "knn_top5"}


# ---- at a glance ---------------------------------------------------------------------------------------------------


def health(run: RunFiles) -> list[tuple[str, str]]:
    """What there is to say about a run, in sentences, each with "good", "warn" or "" before it."""
    said: list[tuple[str, str]] = []
    spread, loss = run.last("embedding_std"), run.last("loss")
    if not run.steps:
        said.append(("", "No step is recorded yet: there is nothing to judge."))
    elif loss is None or spread is None:
        said.append(("warn", "Every step was skipped: no loss was finite. A smaller optim.lr or precision fp32 helps."))
    elif spread >= HEALTHY:
        said.append(("good", f"Healthy: the spread of the projections is {spread:.2f} (1 is healthy, 0 is collapsed)."))
    elif spread >= COLLAPSED:
        text = (
            f"Partly collapsed: the spread of the projections is {spread:.2f} (above {HEALTHY} is healthy). If it "
            "keeps falling, try a smaller optim.lr, a longer warm-up or a larger tau.base."
        )
        said.append(("warn", text))
    else:
        text = (
            f"Collapsed: the spread of the projections is {spread:.2f} (1 is healthy, 0 is collapsed): all images look "
            "nearly the same to the network, and a small loss means nothing. A smaller optim.lr, a longer warm-up or a "
            "larger tau.base usually cures it."
        )
        said.append(("warn", text))
    judged = [r for r in run.records if r.get("knn_top1") is not None]
    if len(judged) > 1 and judged[0]["step"] == 0:
        before, after = judged[0]["knn_top1"], judged[-1]["knn_top1"]
        gain = round(100 * after, 1) - round(100 * before, 1)
        apart = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
        against = apart if abs(gain) >= 0.05 else "as many as with"
        text = (
            f"Nearest neighbours vote for the right class of {after:.1%} of the images, {against} the untrained "
            f"encoder ({before:.1%})."
        )
        said.append(("good" if gain >= 0.05 else "warn", text))
    said += [("warn", text) for found in run.evaluations for text in _behind(found)]
    skipped = sum(bool(r.get("skipped")) for r in run.steps)
    if skipped:
        said.append(
            ("warn", f"{_some(skipped, 'step was', 'steps were')} skipped: the loss or a gradient was not finite.")
        )
    waits = [float(r["data_wait"]) for r in run.steps if r.get("data_wait") is not None]
    if waits and sum(waits) / len(waits) > 0.1:
        said.append(("warn", f"Steps waited for data {sum(waits) / len(waits):.0%} of the time."))
    if run.bad_images:
        count = _some(len(run.bad_images), "image was", "images were")
        said.append(("warn", f"{count} passed over, as not readable (listed below)."))
    if len(run.starts) > 1:
        begun, *resumed = (f"{t:%Y-%m-%d %H:%M}" for t in run.starts)
        times = ", ".join(resumed[:5]) + (", ..." if len(resumed) > 5 else "")
        said.append(("", f"Begun {begun}, resumed {_some(len(resumed), 'time', 'times')}: {times}."))
    return said + [("warn", f"Left out: {note}.") for note in run.notes]


def progress(run: RunFiles) -> tuple[str, str]:
    """How far a run is: in a word or two, and in steps."""
    total, done = run.total_steps, run.last_step
    epochs = next((r["epoch"] for r in reversed(run.steps) if r.get("epoch") is not None), None)
    where = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    where += f", {epochs:.4g} epochs" if epochs else ""
    if run.complete:
        return "complete", where
    return (f"{done / total:.0%} done" if total and done else "not begun" if not done else "under way"), where


def summary(run: RunFiles) -> Section:
    """The figures one looks for first."""
    word, where = progress(run)
    entries = [("Progress", word, where)]
    model = run.values.get("model") or {}
    method, recipe = str(run.values.get("method", "byol")).upper(), run.values.get("recipe", "")
    if model:
        size = (run.values.get("view1") or {}).get("size", "?")
        entries.append((method, str(model.get("encoder", "?")), f"recipe {recipe}, {size} px"))
    if (loss := run.last("loss")) is not None:
        entries.append(("Loss", f"{loss:.4f}", "mean of the last ten steps"))
    judged = [r for r in run.records if r.get("knn_top1") is not None]
    if judged:
        best = max(r["knn_top1"] for r in judged)
        k = judged[-1].get("knn_k")
        entries.append(
            (
                f"kNN{f'-{k}' if k else ''} top-1",
                f"{judged[-1]['knn_top1']:.1%}",
                f"best {best:.1%}; step {judged[-1]['step']:,}",
            )
        )
    probed = [r["probe_val_top1"] for r in run.records if r.get("probe_val_top1") is not None]
    if probed:
        entries.append(("Linear probe top-1", f"{probed[-1]:.1%}", f"best {max(probed):.1%}"))
    for found in run.evaluations:
        if isinstance(found.get("top1"), int | float):
            interval, count = _interval(found), found.get("num_test")
            below = [f"95 %: {interval}"] if interval else []
            below += [f"{count:,} images"] if isinstance(count, int) else []
            entries.append((f"eval {found['name']} top-1", f"{found['top1']:.1%}", "; ".join(below)))
    if (spread := run.last("embedding_std")) is not None:
        entries.append(("Spread", f"{spread:.2f}", "1 healthy, 0 collapsed"))
    speeds = sorted(float(r["images_per_second"]) for r in run.steps if r.get("images_per_second"))
    if speeds:
        took = f"{_duration(run.seconds)} of steps" if run.seconds is not None else ""
        entries.append(
            ("Throughput", f"{speeds[len(speeds) // 2]:,.4g} img/s", f"median; {took}" if took else "median")
        )
    environment = run.environment
    if environment:
        machine = environment.get("gpu") or environment.get("cpu") or "?"
        processes = environment.get("processes", 1)
        more = f"{environment.get('precision', '?')}, {environment.get('mode', '?')}"
        entries.append(("Machine", str(machine), more + (f", {processes} processes" if processes > 1 else "")))
    return Section("Summary", facts(entries) + "".join(paragraph(text, kind) for kind, text in health(run)))


# ---- curves --------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[RunFiles]) -> list[Section]:
    """Everything that was recorded by step; several runs in the same charts, by epoch."""
    x = "step" if len(runs) == 1 else "epoch"
    recorded = dict.fromkeys(key for run in runs for key in run.keys())  # noqa: SIM118  (a method, not a mapping's)
    others = [key for key in recorded if key not in CURVES and key not in NOT_CURVES]
    # One end for all charts, so that they can be read one above the other.
    end = max((float(r[x]) for run in runs for r in run.records if r.get(x)), default=1.0)
    learning = [_curve(runs, key, x, end) for key in (*LEARNING, *others) if key in recorded]
    speed = [_curve(runs, key, x, end) for key in SPEED if key in recorded]
    if not learning:
        return [Section("Curves", paragraph("metrics.jsonl holds no record yet."))]
    numbers = "" if len(runs) > 1 else _in_numbers(runs[0])
    banded = any(len(run.steps) > 2 * WIDTH for run in runs)
    note = paragraph("Lines are means over neighbouring steps, bands reach from the lowest to the highest.", "faint")
    found = [Section("Learning", chart_grid(learning) + (note if banded else "") + numbers)]
    return found + ([Section("Speed and memory", chart_grid(speed))] if speed else [])


def _curve(runs: Sequence[RunFiles], key: str, x: str, end: float) -> str:
    title, label, limits = CURVES.get(key, (key, key, None))
    names = [run.name for run in runs]
    lines = []
    for run, name in zip(runs, _distinct(names, [str(run.folder) for run in runs]), strict=True):
        lines.append(Series(name if len(runs) > 1 else key, *run.curve(key, x), markers=key in RARE))
        if key == "loss" and len(runs) == 1:
            lines += _undone(run)
    top = max((v for line in lines for v in line.y if v is not None and math.isfinite(v)), default=0.0)
    if limits is not None and top > limits[1]:
        limits = (limits[0], top)
    if key in {"loss", "images_per_second", "peak_memory_gib"} and limits is None and top > 0:
        limits = (0.0, 1.05 * top)
    if key == "data_wait":
        limits = (0.0, max(0.05, 1.05 * top))
    return line_chart(lines, title=title, x_label=x, y_label=label, x_range=(0.0, end), y_range=limits)


def _undone(run: RunFiles) -> list[Series]:
    """Marks where steps were skipped, at the height of the loss before."""
    x: list[float | None] = []
    y: list[float | None] = []
    height = 0.0
    for record in run.steps:
        if record.get("skipped"):
            x += [record["step"], None]
            y += [height, None]
        elif record["loss"] is not None:
            height = record["loss"]
    return [Series("skipped", x, y, markers=True)] if x else []


def _distinct(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    return list(names) if len(set(names)) == len(names) else list(paths)


def _in_numbers(run: RunFiles) -> str:
    """A table of some steps, for those who want the numbers themselves."""
    steps = run.steps
    at = sorted({round(k * (len(steps) - 1) / 19) for k in range(20)}) if steps else []
    recorded = run.keys()
    keys = [k for k in ("loss", "embedding_std", "lr", "tau", "images_per_second", "data_wait") if k in recorded]
    rows = [[r["step"], r.get("epoch"), *(r.get(k) for k in keys)] for r in (steps[i] for i in at)]
    judged = [r for r in run.records if r.get("knn_top1") is not None]
    html = table(["step", "epoch", *keys], rows) if rows else ""
    if judged:
        more = [k for k in ("knn_top1", "knn_top5", "probe_val_top1", "rankme") if any(k in r for r in judged)]
        html += table(
            ["step", "epoch", *more], [[r["step"], r.get("epoch"), *(r.get(k) for k in more)] for r in judged]
        )
    return details("The same in numbers", html) if html else ""


# ---- evaluations ---------------------------------------------------------------------------------------------------


def evaluations(run: RunFiles) -> list[Section]:
    """What `byol-fast eval` found, each beside its baselines."""
    return [Section(f"Evaluation: {found['name']}", _evaluation(found)) for found in run.evaluations]


def _evaluation(found: dict[str, Any]) -> str:
    entries = [
        (str(found.get("protocol", found["name"])), _percent(found.get("top1")), _intervals(found)),
        ("Top-5", _percent(found.get("top5")), ""),
        ("Images", _count(found.get("num_test")), f"judged; {_count(found.get('num_train'))} to learn from"),
    ]
    parts = [facts([e for e in entries if e[1] != "?"])]
    if isinstance(found.get("encoder"), str):
        parts.append(paragraph(f"{found['encoder']}, step {_count(found.get('step'))}", "faint"))
    parts += [paragraph(text, "warn") for text in _behind(found)]
    left, matrix = _baselines(found) + _sweep(found), _matrix(found)
    charts = [f"<div>{''.join(left)}</div>"] if left else []
    if matrix is not None:
        counts, classes = matrix
        if len(classes) <= LARGE_CONFUSION:
            shown = [[round(100 * v / sum(row)) if sum(row) else None for v in row] for row in counts]
            title = "Confusion, percent of each true class"
            charts.append(heat_map(shown, classes, classes, title=title, x_label="taken for", y_label="true class"))
    parts.append(chart_grid(charts) if charts else "")
    parts.append(_confused(*matrix) if matrix is not None else "")
    per_class = [c for c in found.get("per_class") or [] if isinstance(c, dict)]
    per_class.sort(key=lambda c: _number(c.get("accuracy")) or 0.0)
    if per_class:
        shares = [(_percent(c.get("accuracy")), _interval(c, "ci95")) for c in per_class]
        rows = [[str(c.get("class", "?")), c.get("count"), *share] for c, share in zip(per_class, shares, strict=True)]
        parts.append(
            details("By class, the hardest first", table(["class", "images", "accuracy", "95 % interval"], rows))
        )
    shown_keys = ("train", "test", "settings", "chosen", "interval", "date", "seconds", "environment")
    settings = _flat({key: found[key] for key in shown_keys if key in found})
    if settings:
        parts.append(details("Settings", table(["setting", "value"], [[k, _plain(v)] for k, v in settings.items()])))
    return "".join(parts)


def _baselines_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [b for b in found.get("baselines") or [] if isinstance(b, dict) and _number(b.get("top1")) is not None]


def _behind(found: dict[str, Any]) -> list[str]:
    """Baselines that did better, in sentences."""
    top1 = _number(found.get("top1"))
    return [
        f"{found['name']}: {_percent(top1)} is below the baseline {b.get('name', '?')}, {_percent(b['top1'])}."
        for b in _baselines_of(found)
        if top1 is not None and b["top1"] > top1
    ]


def _baselines(found: dict[str, Any]) -> list[str]:
    rows = [*_baselines_of(found), found | {"name": "this encoder"}]
    if len(rows) == 1 or _number(found.get("top1")) is None:
        return []
    errors = [_ends(r) or (math.nan, math.nan) for r in rows]
    values, names = [_number(r["top1"]) for r in rows], [str(r.get("name", "?")) for r in rows]
    return [bar_chart(names, values, title="Beside its baselines", x_label="top-1", intervals=errors)]


def _sweep(found: dict[str, Any]) -> list[str]:
    """Accuracy by what was varied."""
    curve = [p for p in found.get("curve") or [] if isinstance(p, dict)]
    if not curve:
        return []
    label = str(found.get("curve_label") or "x")
    x, y = [_number(p.get("x")) for p in curve], [_number(p.get("top1")) for p in curve]
    known = [v for v in x if v is not None]
    wide = bool(known) and min(known) > 0 and max(known) >= 50 * min(known)
    line = Series("top-1", x, y, markers=True)
    return [line_chart([line], title=f"Top-1 by {label}", x_label=label, y_label="top-1", x_log=wide)]


def _matrix(found: dict[str, Any]) -> tuple[list[list[float]], list[str]] | None:
    """The confusion matrix and the names of its classes, where they fit together."""
    matrix, classes = found.get("confusion"), [str(c) for c in found.get("classes") or []]
    if not isinstance(matrix, list) or not classes or len(matrix) != len(classes):
        return None
    if any(not isinstance(row, list) or len(row) != len(classes) for row in matrix):
        return None
    return [[_number(v) or 0.0 for v in row] for row in matrix], classes


def _confused(counts: Sequence[Sequence[float]], classes: Sequence[str]) -> str:
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n > 0]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [[classes[i], classes[j], int(n), f"{n / sum(counts[i]):.1%}"] for n, i, j in pairs[:10]]
    if not rows:
        return ""
    return "<h3>Confused most often</h3>" + table(["true class", "taken for", "images", "of the class"], rows)


# ---- what the run was ----------------------------------------------------------------------------------------------


def bad_images(run: RunFiles) -> list[Section]:
    """Images that were passed over."""
    if not run.bad_images:
        return []
    shown = run.bad_images[:50]
    rows = [[str(b.get("image", "?")), str(b.get("reason", "?")), _plain(b.get("step", ""))] for b in shown]
    more = len(run.bad_images) - len(shown)
    rest = paragraph(f"{more} more are listed in bad_images.jsonl.", "faint") if more else ""
    return [Section("Images that could not be read", table(["image", "reason", "found at step"], rows) + rest)]


def options(run: RunFiles) -> list[Section]:
    """The configuration: first what differs from the recipe, the whole of it folded away."""
    if not run.values:
        return []
    html = ""
    if run.config is not None and run.config.recipe in recipes.RECIPES:
        differing = configs.differences(recipes.get(run.config.recipe), run.config)
        rows = [[k, _plain(b), _plain(a)] for k, (a, b) in differing.items() if k not in {"name", "out"}]
        html = (
            table(["option", "this run", f"recipe {run.config.recipe}"], rows)
            if rows
            else paragraph(f"All as in the recipe {run.config.recipe}.")
        )
    whole = table(["option", "value"], [[k, _plain(v)] for k, v in _flat(run.values).items()])
    return [Section("Options", html + details("All options", whole))]


def environment(run: RunFiles) -> list[Section]:
    """Machine and versions."""
    if not run.environment:
        return []
    rows = [[k, _plain(v)] for k, v in _flat(run.environment).items()]
    return [Section("Environment", table(["what", "value"], rows))]


def comparison(runs: Sequence[RunFiles]) -> list[Section]:
    """Several runs beside each other."""
    names = _distinct([run.name for run in runs], [str(run.folder) for run in runs])
    rows = []
    for run, name in zip(runs, names, strict=True):
        judged = [r["knn_top1"] for r in run.records if r.get("knn_top1") is not None]
        speeds = sorted(float(r["images_per_second"]) for r in run.steps if r.get("images_per_second"))
        rows.append(
            [
                name,
                ", ".join(progress(run)),
                f"{value:.4f}" if (value := run.last("loss")) is not None else "?",
                f"{value:.2f}" if (value := run.last("embedding_std")) is not None else "?",
                _percent(judged[-1] if judged else None),
                f"{speeds[len(speeds) // 2]:,.4g}" if speeds else "?",
                _duration(run.seconds) if run.seconds is not None else "?",
            ]
        )
    headers = ["run", "progress", "loss", "spread", "kNN top-1", "img/s", "time of the steps"]
    notes = [paragraph(f"{name}: {text}", "warn") for run, name in zip(runs, names, strict=True) for text in run.notes]
    found = [Section("Runs", table(headers, rows) + "".join(notes)), *curves(runs)]
    judged_rows = [
        [name, e["name"], _percent(e.get("top1")), _interval(e), _count(e.get("num_test"))]
        for run, name in zip(runs, names, strict=True)
        for e in run.evaluations
    ]
    if judged_rows:
        found.append(
            Section("Evaluations", table(["run", "protocol", "top-1", "95 % interval", "images"], judged_rows))
        )
    flat = [_flat(run.values) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    differing = [
        [key, *(_plain(values.get(key, "")) for values in flat)]
        for key in keys
        if key not in {"name", "out"} and len({_plain(values.get(key, "")) for values in flat}) > 1
    ]
    html = table(["option", *names], differing) if differing else paragraph("None.")
    return [*found, Section("Options that differ", html)]


# ---- words for values ----------------------------------------------------------------------------------------------


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _percent(value: object) -> str:
    number = _number(value)
    return "?" if number is None else f"{number:.1%}"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _ends(found: dict[str, Any], key: str = "top1_ci95") -> tuple[float, float] | None:
    ends = found.get(key)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = _number(ends[0]), _number(ends[1])
    return None if low is None or high is None else (low, high)


def _interval(found: dict[str, Any], key: str = "top1_ci95") -> str:
    ends = _ends(found, key)
    return "" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


def _intervals(found: dict[str, Any], key: str = "top1_ci95") -> str:
    interval = _interval(found, key)
    return f"95 %: {interval}" if interval and key == "top1_ci95" else interval


def _some(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
