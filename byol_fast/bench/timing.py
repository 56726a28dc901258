"""Timing of alternatives side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Case = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, round by round."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Seconds that a share q of the rounds took at most."""
        return float(np.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return self.quantile(0.5)


def interleaved(
    cases: Mapping[str, Case], *, rounds: int, warmup: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time every case once a round, so that whatever slows the machine down slows all of them.

    The order is drawn anew each round: no case always pays for what the same other one left in caches and heap.

    Args:
        cases: name and what to call. A call must be done when it returns (synchronize a GPU inside).
        rounds: rounds that count.
        warmup: rounds before, thrown away.
        clock: `time.perf_counter`, or `time.process_time` for CPU time of all threads.
    """
    if not cases or rounds < 1:
        raise ValueError(f"interleaved: cases and rounds must be at least one, got {len(cases)} and {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, draw = list(cases.items()), random.Random(0)
    for number in range(warmup + rounds):
        draw.shuffle(order)
        for name, call in order:
            begin = clock()
            call()
            elapsed = clock() - begin
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """How many times faster `fast` is: median, p20 and p80 of the ratio round by round."""
    pairs = np.array(slow.seconds) / np.array(fast.seconds)
    low, middle, high = np.quantile(pairs, [0.2, 0.5, 0.8])
    return float(middle), float(low), float(high)
