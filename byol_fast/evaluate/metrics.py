"""Metrics of a classifier: accuracies with confidence intervals, overall and per class, and the confusion matrix."""

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


def wilson_interval(hits: int, count: int, z: float = Z95) -> Interval:
    """Wilson score interval of a proportion, 95 % by default (Wilson, JASA 22, 1927).

    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`: within 0..1, also accurate for few samples
    and proportions near 0 and 1. It covers the sampling of test images, not the variance over training seeds.

    Args:
        hits: successes, 0..count.
        count: trials; the interval of none is 0..1.
        z: quantile of the normal distribution.
    """
    if count == 0:
        return 0.0, 1.0
    p, inverse = hits / count, z * z / count
    center, half = p + inverse / 2, z * math.sqrt(p * (1 - p) / count + inverse / (4 * count))
    low, high = (center - half) / (1 + inverse), (center + half) / (1 + inverse)
    # Exact at 0 and 1, where rounding would leave 1e-17.
    return (0.0 if hits == 0 else low, 1.0 if hits == count else high)


@dataclass(frozen=True, slots=True)
class ClassScore:
    """Accuracy on the test images of one class."""

    name: str
    count: int
    """Number of test images."""
    accuracy: float | None
    """Share that is classified correctly; None without test images."""
    ci95: Interval

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON record."""
        return {"class": self.name, "count": self.count, "accuracy": self.accuracy, "ci95": list(self.ci95)}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Metrics on the test images."""

    top1: float
    """Share of images whose first-ranked class is correct, 0..1."""
    top1_ci95: Interval
    """95 % Wilson interval."""
    top5: float
    """Share of images whose class is among the first five."""
    per_class: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    """Number of images of class i (row) that were classified as class j (column) `[C, C]`."""


def score(ranking: Tensor, labels: Tensor, classes: Sequence[str]) -> Scores:
    """Metrics of ranked predictions.

    Args:
        ranking: class numbers, best first, int64 `[N, R]` with N >= 1 and R >= min(5, C).
        labels: true class numbers, int64 `[N]`.
        classes: names of the classes.
    """
    predictions, labels = ranking[:, :5].cpu(), labels.cpu()
    num_classes, num_images = len(classes), len(labels)
    cells = labels * num_classes + predictions[:, 0]
    confusion = torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes).numpy()
    counts, hits = confusion.sum(axis=1).tolist(), confusion.diagonal().tolist()
    return Scores(
        top1=sum(hits) / num_images,
        top1_ci95=wilson_interval(sum(hits), num_images),
        top5=int((predictions == labels[:, None]).sum()) / num_images,
        per_class=tuple(
            ClassScore(name, count, hit / count if count else None, wilson_interval(hit, count))
            for name, count, hit in zip(classes, counts, hits, strict=True)
        ),
        confusion=confusion,
    )


def top_classes(logits: Tensor) -> Tensor:
    """The five classes with the largest logits, best first, or all if there are fewer: int64 `[N, min(5, C)]`."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest entry is that of the label, 0..1."""
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())
