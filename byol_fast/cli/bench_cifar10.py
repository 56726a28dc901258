"""`byol-fast bench cifar10`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from byol_fast.bench.published import CIFAR10_KNN
from byol_fast.bench.speed_log import SUMMARY, SpeedLog, read_logs, summarize, table
from byol_fast.bench.speed_plan import RECIPES, SpeedPlan, speed_run_config
from byol_fast.cli.help import help_text
from byol_fast.cli.options import FREQUENT, RunOptions, find_recipe, is_given, parse
from byol_fast.cli.run_end import USELESS_ENCODER
from byol_fast.config import ConfigError
from byol_fast.config.fields import Range, check, expand_home
from byol_fast.utils.commands import short_path
from byol_fast.utils.files import atomic_write

COMMAND = "byol-fast bench cifar10"
CHART = "knn.svg"
_SET_HERE = {
    "--recipe": "RECIPE",
    "--out": "--output",
    "--name": "--output",
    "--steps": "--epochs",
    "--knn.enabled": "--knn.every-epochs",
}
"""Options of a run that this command sets, and what to use instead."""


_FREQUENT = ("seeds", "minutes", "output", *(name for name in FREQUENT if name not in {"folder", "name"}))


@dataclass(frozen=True, kw_only=True)
class SpeedRunOptions(RunOptions):
    """Train on CIFAR-10: time to a kNN accuracy, beside published times.

    Finished runs in the output folder stay as they are, others continue from their checkpoint. The command itself sets
    --recipe, --out, --name, --steps and --knn.enabled.
    """

    folder: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE ...")] = ()
    """Recipes, before all options. Default: cifar10_lightly and cifar10_fast."""

    seeds: int = 1
    """Runs of each recipe, with the seeds --seed, --seed + 1, ..."""
    minutes: float | None = None
    """Plan as many epochs as fit this time for each run, with its setup and evaluations; at most the recipe's."""
    output: Path = Path("bench/cifar10")
    """Folder of the logs, the summary, the chart and the run folders."""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(SpeedRunOptions, COMMAND, first=_FREQUENT, show_defaults=False), end="")
        return 0
    planned = plan(argv)
    planned.runs()  # raises errors before torch is imported

    from byol_fast.bench.speed_run import train_all

    trained = train_all(planned)
    logs = read_logs(planned.output)
    summary = summarize(logs)
    atomic_write(planned.output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    atomic_write(planned.output / CHART, chart(logs))
    print("\n".join(table(summary)))
    print(f"files in {short_path(planned.output)}: {', '.join([SUMMARY, CHART, *(log.path.name for log in logs)])}")
    return USELESS_ENCODER if any(log.header["problem"] for log in trained) else 0


def plan(argv: list[str]) -> SpeedPlan:
    """The plan that the words of the command ask for.

    Raises:
        ConfigError: a recipe or an option is unknown, out of range, or does not go with another one.
    """
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, words = argv[:first] or list(RECIPES), argv[first:]
    for option, instead in _SET_HERE.items():
        if is_given(option, words):
            raise ConfigError(f"{COMMAND}: {option} must not be given, this command sets it; use {instead}")
    if is_given("--minutes", words) and is_given("--epochs", words):
        raise ConfigError(f"{COMMAND}: --minutes must not be given beside --epochs, it plans them; drop one of them")
    parsed = []
    for name in names:
        recipe = speed_run_config(find_recipe(name, COMMAND, images="--data.root {}"))
        parsed.append(parse(SpeedRunOptions, words, COMMAND, SpeedRunOptions(config=recipe)))
    options = parsed[0]
    if options.folder:
        raise ConfigError(
            f"{COMMAND}: recipes must come before the options, and images are given by --data.root; got "
            f"{' '.join(options.folder[:3])} behind them"
        )
    minutes = options.minutes
    return SpeedPlan(
        configs=tuple(one.resolve(words, COMMAND) for one in parsed),
        output=expand_home(options.output),
        seeds=check(f"{COMMAND}: --seeds", Annotated[int, Range(1, 1000)], options.seeds),
        minutes=None if minutes is None else check(f"{COMMAND}: --minutes", Annotated[float, Range(0, 1e6)], minutes),
        knn_every=options.config.knn.every_epochs if is_given("--knn.every-epochs", words) else None,
        command=shlex.join([*COMMAND.split(), *argv]),
    )


def chart(logs: Sequence[SpeedLog]) -> str:
    """SVG of kNN accuracy against minutes of training: a line for each run, and the published points.

    Args:
        logs: of the runs.
    """
    from byol_fast.report.charts import Series, line_chart

    series = [
        Series(
            log.name,
            [line["seconds"] / 60 for line in log.evaluations],
            [100 * line["knn_top1"] for line in log.evaluations],
            markers=True,
            intervals=[(100 * line["knn_low"], 100 * line["knn_high"]) for line in log.evaluations],
        )
        for log in logs
    ]
    series += [Series(f"{p.name} ({p.device})", [p.minutes], [100 * p.top1], markers=True) for p in CIFAR10_KNN]
    return line_chart(
        series,
        title="CIFAR-10: kNN accuracy by time of training",
        x_label="minutes",
        y_label="kNN top-1, %",
        x_log=True,
        unit="%",
    )
