"""The result of an evaluation, its JSON record, and a table for the terminal."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from byol_fast.evaluate.metrics import Scores
from byol_fast.utils.files import atomic_path, atomic_write, write_errors
from byol_fast.utils.intervals import Interval

MAX_CLASSES_SHOWN = 20
"""Largest number of classes in the table for the terminal."""
_TABLES = {"per_class", "confusion", "baselines", "shots"}
"""Fields of a record with one line per row."""
_INPUTS = ("encoder", "step", "train", "test", "num_train", "num_test", "settings")
"""Fields of a record that are equal if an evaluation is repeated."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Accuracy of an untrained encoder or of raw pixels by the same protocol."""

    name: str
    top1: float
    top1_ci95: Interval
    top5: float

    @classmethod
    def of(cls, name: str, scores: Scores) -> Baseline:
        """The baseline with these scores."""
        return cls(name, scores.top1, scores.top1_ci95, scores.top5)


@dataclass(frozen=True, slots=True)
class ShotScores:
    """Accuracies of nearest neighbors among few training images, over random draws of as many of each class."""

    name: str
    """The encoder, or a baseline."""
    shots: int
    """Training images per class."""
    k: int
    """Number of neighbors that voted."""
    top1: float
    """Mean accuracy of the draws, 0..1."""
    top1_ci95: Interval
    """95 % interval of the mean: of the draw of the training images, not of the test images."""
    lowest: float
    """Smallest accuracy of a draw."""
    highest: float
    """Largest accuracy of a draw."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of queries that have an image of their class among the first k."""

    k: int
    recall: float
    """0..1."""
    ci95: Interval
    """95 % Wilson interval."""


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Retrieval of the images of a query's class by an encoder, or a baseline."""

    name: str
    mean_ap: float
    """Mean over the queries of the average precision, mAP, 0..1."""
    mean_ap_ci95: Interval
    """95 % interval of the mean over the queries."""
    recall: tuple[Recall, ...]
    num_queries: int
    num_left_out: int
    """Images that are no queries, as no other image has their class."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvalResult:
    """Result of evaluating an encoder by a protocol: its origin."""

    protocol: str
    """knn, linear, linear_reference, finetune_10pct, retrieval, ...; the name of its files."""
    encoder: str
    """Name of the encoder."""
    step: int | None
    """Number of its training steps."""
    test: str
    """Description of the test images."""
    num_test: int
    settings: dict[str, Any]
    """All options of the protocol."""
    seconds: float
    date: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Content of the JSON record."""
        return {
            "protocol": self.protocol,
            "encoder": self.encoder,
            "step": self.step,
            "test": self.test,
            "num_test": self.num_test,
            "settings": self.settings,
            "seconds": round(self.seconds, 2),
            "date": self.date,
            "environment": self.environment,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RetrievalEvaluation(EvalResult):
    """Result of evaluating an encoder by retrieval."""

    scores: RetrievalScores
    baselines: tuple[RetrievalScores, ...]

    def to_dict(self) -> dict[str, Any]:
        """Content of the JSON record."""
        own, *baselines = (dataclasses.asdict(scores) for scores in (self.scores, *self.baselines))
        del own["name"]
        return EvalResult.to_dict(self) | own | {"baselines": baselines}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation(EvalResult):
    """Result of evaluating an encoder by a classifier."""

    train: str
    """Description of the training images."""
    num_train: int
    """Number of images that the final classifier was trained on."""
    classes: tuple[str, ...]
    scores: Scores
    chosen: dict[str, Any]
    """Hyperparameters selected on held-out images, and other facts of this evaluation."""
    baselines: tuple[Baseline, ...]
    curve: tuple[tuple[float, float], ...]
    """Points (x, top-1)."""
    curve_label: str
    """Name of x, and the images of the accuracies."""
    shots: tuple[ShotScores, ...] = ()
    """Accuracies with few training images, of the encoder and its baselines."""

    @property
    def top1(self) -> float:
        """Accuracy on the test images, 0..1."""
        return self.scores.top1

    def to_dict(self) -> dict[str, Any]:
        """Content of the JSON record."""
        return EvalResult.to_dict(self) | {
            "train": self.train,
            "num_train": self.num_train,
            "classes": list(self.classes),
            "top1": self.scores.top1,
            "top1_ci95": list(self.scores.top1_ci95),
            "top5": self.scores.top5,
            "interval": "Wilson",
            "chosen": self.chosen,
            "baselines": [
                {"name": b.name, "top1": b.top1, "top1_ci95": list(b.top1_ci95), "top5": b.top5} for b in self.baselines
            ],
            "per_class": [c.to_dict() for c in self.scores.per_class],
            "confusion": self.scores.confusion.tolist(),
            "curve": [{"x": x, "top1": y} for x, y in self.curve],
            "curve_label": self.curve_label,
            "shots": [dataclasses.asdict(shots) for shots in self.shots],
        }


def write(result: EvalResult, folder: Path) -> list[Path]:
    """Write the record `PROTOCOL.json`, atomically.

    An earlier record is moved to the folder `earlier`, unless it is of the same encoder, images and settings.

    Returns:
        The path of the record, and that of the earlier one if it was moved.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path, text = folder / f"{result.protocol}.json", as_json(result.to_dict())
    with write_errors(folder, "eval", "choose another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _keep_earlier(path, text)
        atomic_write(path, text)
    return [path, *earlier]


def _keep_earlier(record: Path, text: str) -> list[Path]:
    """Copy the existing record to the folder `earlier` if it differs in more than the results of a repetition."""
    if not record.exists():
        return []
    content = record.read_bytes()
    try:
        old, new = json.loads(content), json.loads(text)
        is_repetition = all(old.get(field) == new.get(field) for field in _INPUTS)
    except (ValueError, AttributeError):  # not a record
        is_repetition = False
    if is_repetition:
        return []
    number = 1
    while (path := record.parent / "earlier" / f"{record.stem}_{number}.json").exists():
        number += 1
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return [path]


def as_json(record: dict[str, Any]) -> str:
    """JSON with one line per field and per row of a table."""
    lines = []
    for name, value in record.items():
        if name in _TABLES and value:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def summary(results: list[EvalResult]) -> RenderableType:
    """Tables for the terminal: of classifiers, accuracies of all, and classes and common mistakes of the last one."""
    evaluations = [result for result in results if isinstance(result, Evaluation)]
    tables = [_retrieval_table(result) for result in results if isinstance(result, RetrievalEvaluation)]
    if evaluations:
        tables.append(_accuracy_table(evaluations))
        tables += [_shots_table(evaluation) for evaluation in evaluations if evaluation.shots]
        tables.append(_class_table(evaluations[-1]))
    return Group(*tables)


def _table(result: EvalResult, *headings: str, texts: int) -> Table:
    """An empty table named after an encoder; the first `texts` columns are text, the others numbers."""
    table = Table(title=f"{result.encoder}" + ("" if result.step is None else f", step {result.step}"))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < texts else "right")
    return table


def _retrieval_table(result: RetrievalEvaluation) -> Table:
    recalls = [f"recall at {recall.k}" for recall in result.scores.recall]
    table = _table(result, "retrieval", "mAP", "95 % interval", *recalls, texts=1)
    for scores in (result.scores, *result.baselines):
        shares = [f"{recall.recall:.1%}" for recall in scores.recall]
        table.add_row(scores.name, f"{scores.mean_ap:.1%}", _interval_text(scores.mean_ap_ci95), *shares)
    if left_out := result.scores.num_left_out:
        table.caption = f"{left_out} of {result.num_test} images are no queries: no other one has their class"
    return table


def _shots_table(evaluation: Evaluation) -> Table:
    table = _table(
        evaluation, "images per class", "encoder", "mean top-1", "95 % interval", "lowest", "highest", texts=2
    )
    for row in evaluation.shots:
        shares = f"{row.top1:.1%}", _interval_text(row.top1_ci95), f"{row.lowest:.1%}", f"{row.highest:.1%}"
        table.add_row(f"{row.shots} (k {row.k})", row.name, *shares)
    return table


def _accuracy_table(evaluations: list[Evaluation]) -> Table:
    first = evaluations[0]
    show_top5 = len(first.classes) > 5
    headings = ("top-1", "95 % interval", *(("top-5",) if show_top5 else ()))
    table = _table(first, "protocol", "encoder", *headings, texts=2)
    for e in evaluations:
        hyperparameters = ", ".join(
            f"{k} {v:.3g}" for k, v in e.chosen.items() if k in {"k", "temperature", "l2", "lr", "epochs"}
        )
        rows = [Baseline.of("this", e.scores), *e.baselines]
        for number, row in enumerate(rows):
            label = (e.protocol + (f" ({hyperparameters})" if hyperparameters else "")) if number == 0 else ""
            cells = [label, row.name, f"{row.top1:.1%}", _interval_text(row.top1_ci95)]
            cells += [f"{row.top5:.1%}"] if show_top5 else []
            table.add_row(*cells, end_section=number == len(rows) - 1)
    return table


def _class_table(evaluation: Evaluation) -> Table:
    """Classes with the lowest accuracies, and the class that each is confused with most often."""
    tested = [c for c in evaluation.scores.per_class if c.accuracy is not None]
    shown = sorted(tested, key=lambda c: c.accuracy or 0.0)[:MAX_CLASSES_SHOWN]
    which = "classes" if len(shown) == len(tested) else f"the {MAX_CLASSES_SHOWN} hardest classes"
    table = Table(title=f"{evaluation.protocol}: {which}")
    for heading in ("class", "images", "top-1", "95 % interval", "most common mistake"):
        table.add_column(heading, justify="right" if heading in {"images", "top-1"} else "left")
    number_of = {name: i for i, name in enumerate(evaluation.classes)}
    confusion = evaluation.scores.confusion
    mistakes = confusion[confusion[:, 0] != confusion[:, 1]]
    for c in shown:
        of_class = mistakes[mistakes[:, 0] == number_of[c.name]]
        mistake = ""
        if len(of_class):
            _, predicted, count = of_class[of_class[:, 2].argmax()]
            mistake = f"{evaluation.classes[predicted]} ({count / c.count:.0%})"
        table.add_row(c.name, str(c.count), f"{c.accuracy:.1%}", _interval_text(c.ci95), mistake)
    return table


def _interval_text(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}"
