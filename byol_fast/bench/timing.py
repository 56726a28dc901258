"""Interleaved timing of alternatives."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from byol_fast.utils.progress import current

Case = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, round by round."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Quantile q of the rounds, in seconds."""
        return float(np.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return self.quantile(0.5)


def interleaved(
    cases: Mapping[str, Case],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    description: str = "timing",
) -> dict[str, Timing]:
    """Time every case once per round, so that interference slows down all of them alike.

    The order is shuffled in each round, so that no case always follows the same other one and its caches and heap.

    Args:
        cases: name and callable. A call must be finished when it returns (synchronize a GPU inside).
        rounds: rounds that are counted.
        warmup: rounds before them, discarded.
        clock: `time.perf_counter`, or `time.process_time` for CPU time of all threads.
        description: text of the progress bar.
    """
    if not cases or rounds < 1:
        raise ValueError(f"interleaved: cases and rounds must be at least one, got {len(cases)} and {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, generator = list(cases.items()), random.Random(0)
    with current().bar((warmup + rounds) * len(cases), description, unit="calls") as bar:
        for number in range(warmup + rounds):
            generator.shuffle(order)
            for name, call in order:
                bar.update(bar.done, name)
                start = clock()
                call()
                elapsed = clock() - start
                bar.add(1)
                if number >= warmup:
                    seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Time of `slow` over that of `fast`, round by round: median, p20 and p80."""
    pairs = np.array(slow.seconds) / np.array(fast.seconds)
    low, middle, high = np.quantile(pairs, [0.2, 0.5, 0.8])
    return float(middle), float(low), float(high)
