"""Health of a run by its records: collapse, and runs of which no step trained. Needs no torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from byol_fast.training.metrics_file import Record

HEALTHY, COLLAPSED = 0.5, 0.2
"""Embedding standard deviations in large batches: healthy at the first or above, collapsed below the second."""
_LARGE_BATCH = 0.95
"""Largest standard deviation of a batch (of 16 images or more) from which on its size does not matter."""
_WINDOW = (10, 1000)
"""Fewest and most steps whose mean shows a collapse during training: a single batch may have any value."""


def largest_std(batch_size: object) -> float:
    """Standard deviation of evenly spread embeddings, the scale of the bounds: below 1 in batches of less than 16.

    The mean standard deviation of `batch_size` normal numbers of variance 1; 1 if that is nearly 1, or not known.
    """
    if not isinstance(batch_size, int) or batch_size < 2:
        return 1.0
    n = min(batch_size, 1000)
    std = math.sqrt(2 / n) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    return std if std < _LARGE_BATCH else 1.0


def scale(batch_size: object) -> str:
    """The scale of the embedding standard deviation in words."""
    largest = largest_std(batch_size)
    ends = f"{largest:.2f} is healthy, 0 is collapsed"
    return "1 is healthy, 0 is collapsed" if largest == 1 else f"in batches of {batch_size}, {ends}"


def advice(method: object) -> str:
    """Options to try after a collapse."""
    options = "a smaller optim.lr or a longer warm-up"
    return options if method == "simsiam" else "a smaller optim.lr, a longer warm-up or a larger tau.base"


@dataclass(frozen=True, slots=True)
class Health:
    """Health of a finished run."""

    embedding_std: float
    """Mean over the last tenth of the steps, without skipped ones; NaN if there is none."""
    skipped_steps: int
    """Number of skipped steps."""
    problem: str | None
    """Reason why the encoder is of no use: it collapsed, or no step trained it. None: there is no such reason."""


def assess(records: Sequence[Record], *, batch_size: object, method: object) -> Health:
    """Health of a finished run by the records of its steps and evaluations.

    Args:
        records: of the whole run.
        batch_size: images per batch and process, an int; anything else counts as not known.
        method: "byol" or "simsiam", for the advice.
    """
    stds = [r.get("embedding_std") for r in records if "loss" in r]
    last = [std for std in stds[-math.ceil(len(stds) / 10) :] if std is not None]
    mean = sum(last) / len(last) if last else math.nan
    skipped = sum(std is None for std in stds)
    problem = None
    if stds and skipped == len(stds):
        problem = "every step was skipped: no loss was finite; try a smaller optim.lr or precision fp32"
    elif mean < COLLAPSED * largest_std(batch_size):
        problem = (
            f"collapsed: the embedding std is {mean:.2f} ({scale(batch_size)}): all images have nearly the same "
            f"embedding, and a small loss means nothing; look at the views (byol-fast preview), try {advice(method)}"
        )
    return Health(mean, skipped, problem)


class CollapseDetector:
    """Reports a collapse when it begins, and again only if the run has recovered from it in between.

    Args:
        total_steps: of the run; the mean over a hundredth of them decides, over 10 at least and 1,000 at most.
        batch_size: images per batch and process.
        method: "byol" or "simsiam", for the advice.
    """

    def __init__(self, *, total_steps: int, batch_size: int, method: str) -> None:
        low, high = _WINDOW
        self._num_steps = min(max(total_steps // 100, low), high)
        self._stds: deque[float] = deque(maxlen=self._num_steps)
        self._batch_size, self._method = batch_size, method
        self._is_collapsed = False

    def update(self, records: Sequence[Record]) -> str | None:
        """Take the records of further steps; returns a warning if a collapse has begun."""
        self._stds += [r["embedding_std"] for r in records if r.get("embedding_std") is not None]
        if len(self._stds) < self._num_steps:
            return None
        mean, was_collapsed = sum(self._stds) / self._num_steps, self._is_collapsed
        # Between the two bounds nothing changes, so that values around one of them are reported once.
        self._is_collapsed = mean < (HEALTHY if was_collapsed else COLLAPSED) * largest_std(self._batch_size)
        if was_collapsed or not self._is_collapsed:
            return None
        return (
            f"collapse: the embedding std is {mean:.2f} in the last {self._num_steps} steps, to step "
            f"{records[-1]['step']} ({scale(self._batch_size)}): all images have nearly the same embedding; "
            f"look at the views (byol-fast preview), try {advice(self._method)}"
        )
