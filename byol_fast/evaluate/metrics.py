"""Metrics of a classifier: accuracies with confidence intervals, overall and per class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byol_fast.utils.intervals import Interval, wilson_interval
from byol_fast.utils.precision import fp32_matmul

MAX_LOGITS = 1 << 26
"""Number of logits that are in memory at a time: 256 MiB in fp32."""


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
    """Cells of the confusion matrix that are not 0, `[K, 3]`: true class, predicted class, number of images; sorted."""


def score(ranking: Tensor, labels: Tensor, classes: Sequence[str]) -> Scores:
    """Metrics of ranked predictions.

    Args:
        ranking: class numbers, best first, int64 `[N, R]` with N >= 1 and R >= min(5, C).
        labels: true class numbers, int64 `[N]`.
        classes: names of the classes.
    """
    predictions, labels = ranking[:, :5].cpu(), labels.cpu()
    num_classes, num_images = len(classes), len(labels)
    cells, sizes = np.unique((labels * num_classes + predictions[:, 0]).numpy(), return_counts=True)
    is_hit = predictions[:, 0] == labels
    counts, hits = (torch.bincount(part, minlength=num_classes).tolist() for part in (labels, labels[is_hit]))
    return Scores(
        top1=sum(hits) / num_images,
        top1_ci95=wilson_interval(sum(hits), num_images),
        top5=int((predictions == labels[:, None]).sum()) / num_images,
        per_class=tuple(
            ClassScore(name, count, hit / count if count else None, wilson_interval(hit, count))
            for name, count, hit in zip(classes, counts, hits, strict=True)
        ),
        confusion=np.stack([*divmod(cells, num_classes), sizes], axis=1),
    )


def top_classes(logits: Tensor) -> Tensor:
    """The five classes with the largest logits, best first, or all if there are fewer: int64 `[N, min(5, C)]`."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def predict(logits: Tensor) -> Tensor:
    """Class with the largest logit of each row of `[N, C]`, int64 `[N]`."""
    return logits.argmax(dim=1)


@fp32_matmul()
def classify(
    classifier: Callable[[Tensor], Tensor], x: Tensor, num_classes: int, of_logits: Callable[[Tensor], Tensor] = predict
) -> Tensor:
    """Predictions for features; the logits are fp32, and at most `MAX_LOGITS` are in memory at a time.

    Args:
        classifier: returns the logits of some features.
        x: features `[N, D]`.
        num_classes: of the classifier.
        of_logits: `predict` or `top_classes`.
    """
    return torch.cat([of_logits(classifier(rows)) for rows in torch.split(x, max(MAX_LOGITS // num_classes, 1))])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of predictions that equal their labels, 0..1."""
    return float((predictions == labels.to(predictions.device)).double().mean())
