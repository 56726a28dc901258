"""Results of ours that stand for an accuracy or a whole run, each with what it takes to repeat it.

They are read from the files of `benchmarks/results/`, whose README describes them.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import results as queue_results
from byol_fast import config as configs
from byol_fast.bench.published import THRESHOLDS
from byol_fast.bench.results import load
from byol_fast.bench.speed_log import read_log
from byol_fast.cli.demo import NAMES
from byol_fast.config import Config
from byol_fast.training.resume import config_digest
from byol_fast.utils.intervals import Interval, share_interval
from byol_fast.utils.records import Kind, count, number, read_json, read_json_lines, record_of, share, text

EARLIER = "measured with an earlier configuration"
KINDS = ("as they are", "cropped", "shifted", "flipped")
"""Test images of the demo."""
_ENVIRONMENT = record_of(
    {"cpu": text, "cpus": count, "date": text, "packages": record_of({"torch": text}, required=True)}, required=True
)
_BY_KIND = record_of(dict.fromkeys(KINDS, share), required=True)
_TOP1 = record_of(dict.fromkeys(NAMES, _BY_KIND), required=True)
_DEMO_RUN = record_of(
    {
        "seed": count,
        "top1": _TOP1,
        "num_val": count,
        "seconds": number,
        "epochs": count,
        "command": text,
        "config_digest": text,
        "environment": _ENVIRONMENT,
    },
    required=True,
)
_DEMO_TRIAL = record_of(
    {"trial": record_of({}), "top1": _BY_KIND, "score": share, "cpu_seconds": number, "process_cpu_seconds": number}
)
_LOCAL_VIEWS_RUN = record_of(
    {
        "setting": text,
        "epochs": number,
        "top1": _BY_KIND,
        "num_val": count,
        "process_cpu_seconds": number,
        "environment": _ENVIRONMENT,
    }
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A result of ours. A text is empty, and there is no file, where nothing was recorded."""

    run: str
    """Such as `demo`."""
    quantity: str
    """Such as `kNN-20 top-1`."""
    value: str
    """Figures, accuracies with their 95 % intervals."""
    command: str = ""
    """It repeats the measurement."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Machine, versions and commit."""
    environment_file: Path | None = None
    """File that holds it."""
    logs: tuple[Path, ...] = ()
    recipe: str = ""
    """Recipe that was run as it is; empty for other settings."""
    digest: str = ""
    """Of the configuration (`config_digest`)."""
    epochs: float | None = None
    """Planned epochs."""
    seconds: float | None = None
    """Of the run or of its training, the median over seeds."""
    note: str = ""
    """Restriction, part of the status."""

    def status(self, recipe: Config) -> str:
        """Relation of the result to its recipe as it is today."""
        if not self.digest:
            relation = "configuration not recorded"
        elif self.digest == config_digest(recipe):
            relation = "measured"
        elif self.epochs and self.digest == config_digest(configs.replace(recipe, {"epochs": int(self.epochs)})):
            relation = f"measured with {self.epochs:g} epochs instead of {recipe.epochs}"
        else:
            relation = EARLIER
        return ", ".join(filter(None, (relation, self.note)))


@dataclass(frozen=True)
class Runs:
    """Runs of one configuration on one machine, which differ in their seeds."""

    paths: tuple[Path, ...]
    """Their files."""
    runs: tuple[dict[str, Any], ...]

    def record(self, run: str, quantity: str, value: str, note: str = "") -> Record:
        """Record of these runs."""
        first = self.runs[0]
        return Record(
            run=run,
            quantity=quantity,
            value=value,
            command=first["command"],
            environment=first["environment"],
            environment_file=self.paths[0],
            logs=self.paths,
            recipe=first["recipe"],
            digest=first["config_digest"],
            epochs=first["epochs"],
            seconds=statistics.median(run["seconds"] for run in self.runs),
            note=note,
        )


def machine(environment: dict[str, Any]) -> str:
    """Name of the machine in an environment record."""
    return environment.get("gpu") or f"{environment['cpu']}, {environment['cpus']} cores"


def source(environment: dict[str, Any]) -> str:
    """Machine, version of torch, commit and date of an environment record."""
    commit = f"commit {environment['commit'][:9]}" if environment.get("commit") else "commit not recorded"
    changes = " with changes" if environment.get("dirty") else ""
    return f"{machine(environment)}, torch {environment['packages']['torch']}, {commit}{changes}, {environment['date']}"


def percent(top1: float, interval: Interval) -> str:
    """An accuracy, 0..1, with its 95 % interval."""
    return f"{100 * top1:.1f} % [{100 * interval[0]:.1f} - {100 * interval[1]:.1f}]"


def mean_percent(top1: Sequence[float], num_val: int) -> str:
    """Mean accuracy over seeds with Wilson's 95 % interval, and the lowest and highest of several seeds.

    Args:
        top1: accuracies of the seeds, 0..1.
        num_val: test images, the same for all seeds.
    """
    mean = statistics.fmean(top1)
    value = percent(mean, share_interval(mean, num_val))
    return value if len(set(top1)) == 1 else f"{value}, seeds {100 * min(top1):.1f} - {100 * max(top1):.1f}"


def recipe_records(results: Path) -> list[Record]:
    """Accuracies of recipes that were run as they are, in whichever folders of the results they lie.

    Raises:
        ValueError: a file is damaged or lacks a field.
    """
    return [*_demo(results), *_speed(results), *_queue(results)]


def other_records(results: Path) -> list[Record]:
    """Accuracies with other settings, and the speed of whole runs.

    Raises:
        ValueError: a file lacks a value.
        OSError: a file is missing.
    """
    return [*_evaluation(results), *_guide(results), *_throughput(results)]


# ------------------------------------------------------------------------------------------------ JSON lines


def demo_runs(results: Path) -> list[Runs]:
    """Runs of the demo (`demo_*/final.jsonl`)."""
    files = ((path, _lines(path, _DEMO_RUN)) for path in sorted(results.glob("demo_*/final.jsonl")))
    return _grouped((path, {"recipe": "demo"} | run) for path, runs in files for run in runs)


def demo_trials(results: Path) -> dict[Path, list[dict[str, Any]]]:
    """Trials of the search for the demo's settings, by their file (`demo_*/search.jsonl`)."""
    files = {path: _lines(path, _DEMO_TRIAL) for path in sorted(results.glob("demo_*/search.jsonl"))}
    trials = {path: [line for line in lines if "trial" in line] for path, lines in files.items()}
    return {path: lines for path, lines in trials.items() if lines}


def local_view_runs(results: Path) -> dict[Path, list[dict[str, Any]]]:
    """Speeds and runs of the demo with and without local views, by their file (`demo_*/local_views.jsonl`)."""
    files = {path: _lines(path, _LOCAL_VIEWS_RUN) for path in sorted(results.glob("demo_*/local_views.jsonl"))}
    return {path: lines for path, lines in files.items() if len(lines) > 1}  # the first has the speeds


def speed_runs(results: Path) -> list[Runs]:
    """Speed runs with at least one evaluation (`RECIPE-seedN.jsonl`).

    Their fields are those of the log's first line, `evaluations` and `minutes_to`, the time to each of `THRESHOLDS`.
    """
    logs = [read_log(path) for path in sorted(results.rglob("*-seed*.jsonl"))]
    return _grouped(
        (
            log.path,
            log.header
            | {"evaluations": log.evaluations, "minutes_to": {top1: log.minutes_to(top1) for top1 in THRESHOLDS}},
        )
        for log in logs
        if log.evaluations
    )


def _lines(path: Path, kind: Kind) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, all of one kind."""
    objects: list[dict[str, Any]] = []
    for line in read_json_lines(path):
        problem = "it must be a JSON object" if line.content is None else kind(line.content, "")
        if line.content is None or problem:
            raise ValueError(f"readme: {path.parent.name}/{path.name}, line {line.number}: {problem}")
        objects.append(line.content)
    return objects


def _grouped(runs: Iterable[tuple[Path, dict[str, Any]]]) -> list[Runs]:
    """Runs by folder, recipe and digest."""
    groups: dict[tuple[Path, str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for path, run in runs:
        groups.setdefault((path.parent, run["recipe"], run["config_digest"]), []).append((path, run))
    return [Runs(tuple(dict.fromkeys(p for p, _ in group)), tuple(r for _, r in group)) for group in groups.values()]


def _demo(results: Path) -> Iterable[Record]:
    for runs in demo_runs(results):
        top1 = [run["top1"]["trained"] for run in runs.runs]
        values = [f"{kind} {mean_percent([t[kind] for t in top1], runs.runs[0]['num_val'])}" for kind in KINDS]
        yield runs.record("`demo`", "kNN-20 top-1", "; ".join(values))


def _speed(results: Path) -> Iterable[Record]:
    for runs in speed_runs(results):
        last = [run["evaluations"][-1] for run in runs.runs]
        value = mean_percent([line["knn_top1"] for line in last], last[0]["num_val"])
        note = "" if all(run["finished"] for run in runs.runs) else "not finished"
        name = f"`{runs.runs[0]['recipe']}`, speed run"
        yield runs.record(name, f"kNN-{last[0]['knn_k']} top-1", value, note)


# ------------------------------------------------------------------------------------------------ other files


def _queue(results: Path) -> Iterable[Record]:
    """CIFAR-10's recipe as the GPU queue ran it before there was a speed run."""
    for path in sorted(results.glob("*/cifar10_recipe.jsonl")):
        header, figures = queue_figures(path)
        if "kNN top-1 on the test images" not in figures:
            continue
        knn, training = figures["kNN top-1 on the test images"], figures["training"]
        value = mean_percent([knn["knn_200_top1"]], figures["images"]["test"])
        yield Record(
            run="`cifar10_resnet18` on a GPU",
            quantity="kNN-200 top-1",
            value=value,
            command=f"make gpu ONLY=cifar10_recipe # at commit {header['commit'][:9]}",
            environment=header["environment"],
            environment_file=path,
            logs=(path, path.with_suffix("") / "log.txt"),
            recipe="cifar10_resnet18",
            seconds=training["seconds"],
            note=f"only {training['epochs']:.2f} epochs",
        )


def queue_figures(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Header of a result of the GPU queue, and its figures by name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    result = queue_results.read(path)
    if result is None:
        raise FileNotFoundError(f"readme: {path} does not exist")
    return result.header, {values["figure"]: values for values in result.figures}


def _evaluation(results: Path) -> Iterable[Record]:
    """Protocols of evaluation on one encoder."""
    folder = results / "evaluation_cpu"
    with (folder / "evaluation.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["candidate"] == "this encoder"]
    values = [
        f"{row['protocol'].replace('_', ' ')} "
        f"{percent(float(row['top1']), (float(row['low95']), float(row['high95'])))}"
        for row in rows
    ]
    yield Record(
        run="`byol-fast eval` of a CIFAR-10 encoder, ResNet-18 of half the width, 3.1 epochs at 48 px",
        quantity="top-1",
        value="; ".join(values),
        command="python -m benchmarks.evaluation RUN",
        environment=read_json(folder / "environment.json"),
        environment_file=folder / "environment.json",
        logs=(folder / "evaluation.csv",),
    )


def _guide(results: Path) -> Iterable[Record]:
    """CPU time of a practical guide's script."""
    path = results / "guide_cpu" / "guide.json"
    content, suites = load(path)
    settings = content["settings"]
    values = []
    for suite in suites:
        own = next(candidate for candidate in suite.candidates if candidate.is_byol_fast)
        middle = suite.quantiles(own.timing)[1]
        values.append(f"{suite.name.split(':')[0]} {middle:,.0f} {suite.unit}")
    yield Record(
        run=f"the guide's script, {settings['batch_size']} images of {settings['view']} px",
        quantity="time",
        value="; ".join(values),
        command=f"python -m benchmarks.guide --batch-size {settings['batch_size']} --threads {settings['threads']}",
        environment=content["environment"],
        environment_file=path.with_name("environment.json"),
        logs=(path,),
    )


def _throughput(results: Path) -> Iterable[Record]:
    """Whole runs of which only the speed was measured."""
    path = results / "h200" / "dali.jsonl"
    header, figures = queue_figures(path)
    speed = figures["from JPEG to trained weights: byol_fast"]["images_per_second"]
    yield Record(
        run="ResNet-50, from JPEG to trained weights",
        quantity="speed",
        value=f"{speed:,.0f} images/s",
        command="make gpu ONLY=dali",
        environment=header["environment"],
        environment_file=path,
        logs=(path, path.with_suffix("") / "log.txt"),
    )
    small = "--model.encoder resnet18 --image-size 96 --batch-size 64"
    yield Record(
        run="ResNet-18, images of 96 px, on two CPU cores",
        quantity="speed",
        value="25 images/s",
        command=f"byol-fast train imagenet_resnet50_100 path/to/images {small}",
    )
