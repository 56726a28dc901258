"""Tables of docs/results.md, and the demo's output in README.md, by name in `TABLES`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import (
    KINDS,
    Record,
    demo_runs,
    demo_trials,
    local_view_runs,
    machine,
    mean_percent,
    other_records,
    recipe_records,
    source,
    speed_runs,
)
from byol_fast.bench.published import CIFAR10_KNN, PUBLISHED, THRESHOLDS, Published
from byol_fast.bench.speed_log import median_minutes
from byol_fast.cli.demo import NAMES
from byol_fast.config import recipes
from byol_fast.report.formatting import duration, plural
from byol_fast.training.resume import config_digest

NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
NUM_TRIALS = 5
"""Best trials of each round in the tables of the demo's search."""
SEARCH, NUM_HELD_OUT = "python -m benchmarks.demo_search search --save FOLDER", 2000
"""Command of that search, and the training images that it holds out for the accuracies."""


def recipes_table(results: Path) -> list[str]:
    """A row for each recipe: its digest, published figures, and what it reached here."""
    records = recipe_records(results)
    rows = []
    for name in recipes.RECIPES:
        config = recipes.get(name)
        own = [record for record in records if record.recipe == name]
        cells = (
            [_published(result) for result in PUBLISHED if result.recipe == name] or ["none"],
            [f"{record.quantity}: {record.value}" for record in own] or [NOT_MEASURED],
            [f"{duration(record.seconds)}, {machine(record.environment)}" for record in own],
            [record.status(config) for record in own] or [NOT_MEASURED],
        )
        rows.append([f"`{name}`", f"`{config_digest(config)}`", *("<br>".join(lines) for lines in cells)])
    return _table(("recipe", "configuration today", "published", "reached here", "time and machine", "status"), rows)


def numbers_table(results: Path) -> list[str]:
    """A row for each record: its figures, and what it takes to repeat them."""

    def link(text: str, path: Path) -> str:
        return f"[{text}](../benchmarks/results/{path.relative_to(results).as_posix()})"

    def environment(record: Record) -> str:
        if record.environment_file is None:
            return NOT_RECORDED
        return link(source(record.environment), record.environment_file)

    rows = [
        [
            record.run,
            f"{record.quantity}: {record.value}",
            f"`{record.command}`",
            f"`{record.digest}`" if record.digest else NOT_RECORDED,
            environment(record),
            ", ".join(link(path.name, path) for path in record.logs) or NOT_RECORDED,
        ]
        for record in [*recipe_records(results), *other_records(results)]
    ]
    return _table(("run", "figures", "command", "configuration", "environment", "log"), rows)


def demo_table(results: Path) -> list[str]:
    """Accuracies of the demo by kind of test images, means over seeds."""
    lines: list[str] = []
    for runs in demo_runs(results):
        num_val, top1 = runs.runs[0]["num_val"], [run["top1"] for run in runs.runs]
        rows = [
            [kind, *(mean_percent([seed[name][kind] for seed in top1], num_val) for name in NAMES)] for kind in KINDS
        ]
        lines += _table(("test images", *NAMES.values()), rows)
        lines += ["", _demo_caption(runs.paths[0], runs.runs), ""]
    return lines[:-1] or ["Not measured."]


def trials_table(results: Path) -> list[str]:
    """The best trials in each round of the search for the demo's settings, by the mean of all kinds of images."""
    lines: list[str] = []
    for path, trials in demo_trials(results).items():
        for cpu_seconds in sorted({trial["cpu_seconds"] for trial in trials}):
            in_round = [trial for trial in trials if trial["cpu_seconds"] == cpu_seconds]
            ranked = sorted(in_round, key=lambda trial: -trial["score"])
            rows = [
                [
                    ", ".join(f"{name} {value}" for name, value in trial["trial"].items()),
                    *(mean_percent([trial["top1"][kind]], NUM_HELD_OUT) for kind in KINDS),
                    f"{100 * trial['score']:.1f} %",
                ]
                for trial in ranked[:NUM_TRIALS]
            ]
            lines += _table((f"settings, {cpu_seconds:g} CPU-seconds of training", *KINDS, "mean"), rows)
            lines += ["", f"(the best {len(rows)} of {len(ranked)})", ""]
        time = duration(sum(trial["process_cpu_seconds"] for trial in trials))
        lines += [f"({_file(path)}, `{SEARCH}`: all {len(trials)} trials took {time} of CPU time)", ""]
    return lines[:-1] or ["Not measured."]


def local_views_table(results: Path) -> list[str]:
    """Accuracies of the demo with and without local views, means over seeds."""
    lines: list[str] = []
    for path, (speeds, *runs) in local_view_runs(results).items():
        rows = []
        for setting in dict.fromkeys(run["setting"] for run in runs):
            own = [run for run in runs if run["setting"] == setting]
            cells = [mean_percent([run["top1"][kind] for run in own], own[0]["num_val"]) for kind in KINDS]
            rows.append([setting, f"{own[0]['epochs']:g}", *cells])
        ratios, first = speeds["time_ratios"], runs[0]
        time = (
            f"an image takes {speeds['time_ratio']:.2f} [{min(ratios):.2f} - {max(ratios):.2f}] times as long with them"
        )
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
        about = f"seed {seeds}; {time}; {first['num_val']:,} images; {source(first['environment'])}"
        lines += [*_table(("setting", "epochs", *KINDS), rows), "", f"({_file(path)}: {about})", ""]
    return lines[:-1] or ["Not measured."]


def speed_table(results: Path) -> list[str]:
    """Accuracy of the speed runs and their time to lightly's accuracies, below the published results."""
    rows = [
        [
            result.name,
            f"{100 * result.top1:.1f} %",
            f"{result.minutes}",
            *(f"{result.minutes}" if result.top1 == threshold else "" for threshold in THRESHOLDS),
            result.device,
        ]
        for result in CIFAR10_KNN
    ]
    groups = speed_runs(results)
    for runs in groups:
        last = [run["evaluations"][-1] for run in runs.runs]
        rows.append([
            f"**`{runs.runs[0]['recipe']}`**, {plural(len(runs.runs), 'seed', 'seeds')}",
            mean_percent([line["knn_top1"] for line in last], last[0]["num_val"]),
            _minutes([run["seconds"] / 60 for run in runs.runs]),
            *(_minutes([run["minutes_to"][top1] for run in runs.runs]) for top1 in THRESHOLDS),
            machine(runs.runs[0]["environment"]),
        ])  # fmt: skip
    if not groups:
        rows.append(["**byol_fast**", NOT_MEASURED, *[""] * (len(THRESHOLDS) + 2)])
    heads = ("run", "kNN-200 at the end", "minutes", *(f"minutes to {100 * t:.1f} %" for t in THRESHOLDS), "machine")
    return _table(heads, rows)


def demo_output(results: Path) -> list[str] | None:
    """Output of the demo with the smallest seed, with its source; None if there is none."""
    path = results / "demo_cpu" / "final.jsonl"
    runs = [run for group in demo_runs(results) if path in group.paths for run in group.runs]
    if not runs:
        return None
    run = min(runs, key=lambda run: run["seed"])
    plain, *moved = KINDS
    lines = ["```", f"{plain:>41}" + "".join(f"{kind:>10}" for kind in moved)]
    for name, label in NAMES.items():
        top1 = run["top1"][name]
        lines.append(f" {label:<28}{top1[plain]:>12.1%}" + "".join(f"{top1[kind]:>10.1%}" for kind in moved))
    return [*lines, "```", "", _demo_caption(path, [run])]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def _published(result: Published) -> str:
    time = f"; {result.minutes:g} min on {result.device}" if result.minutes else ""
    return f"{result.protocol}: {100 * result.top1:.4g} % ([{result.name}]({result.source}){time})"


def _demo_caption(path: Path, runs: Sequence[dict[str, Any]]) -> str:
    """Source of the demo's figures."""
    first, seeds = runs[0], ", ".join(str(run["seed"]) for run in runs)
    seconds = statistics.median(run["seconds"] for run in runs)
    length = f"{first['epochs']:g} epochs in {duration(seconds)}"
    return f"({_file(path)}: seed {seeds}, {length}, {first['num_val']:,} images; {source(first['environment'])})"


def _file(path: Path) -> str:
    return f"`benchmarks/results/{path.parent.name}/{path.name}`"


def _minutes(minutes: Sequence[float | None]) -> str:
    """Median over seeds, and the values of several."""

    def shown(value: float | None) -> str:
        return "not reached" if value is None else f"{value:.1f}"

    median = shown(median_minutes(minutes))
    return median if len(minutes) == 1 else f"{median} ({', '.join(map(shown, minutes))})"


TABLES: dict[str, Callable[[Path], list[str] | None]] = {
    "recipes": recipes_table,
    "numbers": numbers_table,
    "demo": demo_table,
    "trials": trials_table,
    "local-views": local_views_table,
    "speed": speed_table,
    "demo-output": demo_output,
}
