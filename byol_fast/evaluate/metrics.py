"""What a ranking of classes is worth: accuracies with intervals, per class, and who is taken for whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""

Interval = tuple[float, float]


def wilson(hits: int, count: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion, 95 % by default (Wilson, JASA 22, 1927).

    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`: within 0..1, and sound for few samples and
    for proportions near 0 and 1. It speaks of the test images' sampling, not of training with another seed.

    Args:
        hits: successes, 0..count.
        count: trials; with none, the interval is 0..1.
        z: quantile of the normal distribution.
    """
    if count == 0:
        return 0.0, 1.0
    p, inverse = hits / count, z * z / count
    middle, half = p + inverse / 2, z * math.sqrt(p * (1 - p) / count + inverse / (4 * count))
    low, high = (middle - half) / (1 + inverse), (middle + half) / (1 + inverse)
    # At 0 and 1 the ends are exact; rounding would leave 1e-17 there.
    return (0.0 if hits == 0 else low, 1.0 if hits == count else high)


@dataclass(frozen=True, slots=True)
class ClassScore:
    """Accuracy on the test images of one class."""

    name: str
    count: int
    """Its test images."""
    accuracy: float | None
    """Share of them that is recognised; None where there are none."""
    ci95: Interval

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a result file."""
        return {"class": self.name, "count": self.count, "accuracy": self.accuracy, "ci95": list(self.ci95)}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Outcome on the test images."""

    top1: float
    """Share whose first-ranked class is right, 0..1."""
    top1_ci95: Interval
    """Wilson's interval."""
    top5: float
    """Share whose class is among the first five."""
    per_class: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    """Images of class i (row) that were taken for class j (column) `[C, C]`."""


def score(ranking: Tensor, labels: Tensor, classes: Sequence[str]) -> Scores:
    """Compare rankings with the truth.

    Args:
        ranking: class numbers, best first, int64 `[N, R]`, N of 1 or more; R is 5, or all where there are fewer.
        labels: true class numbers, int64 `[N]`.
        classes: their names.
    """
    guesses, truth = ranking[:, :5].cpu(), labels.cpu()
    first = guesses[:, 0]
    number = len(classes)
    confusion = torch.bincount(truth * number + first, minlength=number * number).view(number, number).numpy()
    counts, hits = confusion.sum(axis=1).tolist(), confusion.diagonal().tolist()
    right = sum(hits)
    return Scores(
        top1=right / len(truth),
        top1_ci95=wilson(right, len(truth)),
        top5=int((guesses == truth[:, None]).sum()) / len(truth),
        per_class=tuple(
            ClassScore(name, count, hit / count if count else None, wilson(hit, count))
            for name, count, hit in zip(classes, counts, hits, strict=True)
        ),
        confusion=confusion,
    )


def ranked(logits: Tensor) -> Tensor:
    """The five best classes of each row, or all where there are fewer: int64 `[N, min(5, C)]`."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest entry is the label's."""
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())
