"""Two measurements of the same thing: what changed beyond the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from byol_fast.bench.results import SuiteResult, load

SMALLEST = 0.08
"""Changes below this share are never called so: machines and clocks drift that much between two runs."""
SMALLEST_OF_SHORT = 0.25
"""The same for calls of less than `SHORT` seconds: where the tensors of a process happen to lie is worth that much."""
SHORT = 0.01
ERRORS = 4.0
"""Standard errors of the two medians together that a change must exceed."""


@dataclass(frozen=True, slots=True)
class Change:
    """A contender's cost in two measurements."""

    suite: str
    contender: str
    baseline: str
    """What it was measured by in each: a contender that stays the same, or "" for plain time."""
    before: float
    """Median time, over the baseline's where there is one."""
    after: float
    noise: float
    """Share by which it would have to change to be noticed."""

    @property
    def share(self) -> float:
        """Of the time before, by which it has become slower; negative where it has become faster."""
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        """One of "slower", "faster" and "same"."""
        # As ratios, so that twice as fast and twice as slow are equally far away.
        if abs(math.log1p(self.share)) <= math.log1p(self.noise):
            return "same"
        return "slower" if self.share > 0 else "faster"

    @property
    def is_ours(self) -> bool:
        """Whether the contender is this package's: others' changes are told, but are no regression."""
        return self.contender.startswith("ours")


def compare(before: Path, after: Path) -> list[Change]:
    """Changes between two folders of results, or two files.

    Where a suite names a baseline, the rounds of every contender are divided by the baseline's of the same round: what
    slowed the whole machine down is not mistaken for a change. The noise is estimated from the rounds.

    Raises:
        ValueError: no results there, or nothing that both have.
    """
    changes = []
    for old, new in _pairs(before, after):
        contenders = {c.name: c for c in new.contenders}
        both = old.baseline if old.baseline == new.baseline and old.baseline in contenders else ""
        for contender in old.contenders:
            if contender.name in contenders and (contender.name != both):
                first, second = (_samples(suite, contender.name, both) for suite in (old, new))
                error = math.hypot(_error(first), _error(second))
                medians = float(np.median(first)), float(np.median(second))
                smallest = SMALLEST_OF_SHORT if contender.timing.median < SHORT else SMALLEST
                changes.append(Change(old.name, contender.name, both, *medians, max(smallest, ERRORS * error)))
    if not changes:
        raise ValueError(f"bench compare: {before} and {after} must have a suite in common, but have none")
    return changes


def _samples(suite: SuiteResult, name: str, baseline: str) -> np.ndarray:
    seconds = {c.name: np.array(c.seconds) for c in suite.contenders}
    return seconds[name] / seconds[baseline] if baseline else seconds[name]


def _error(samples: np.ndarray) -> float:
    """Relative standard error of the median, 1.2533 sigma / sqrt(n); sigma from the quartiles, which outliers spare."""
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float(1.2533 * (high - low) / 1.349 / math.sqrt(len(samples)) / middle)


def _pairs(before: Path, after: Path) -> Iterator[tuple[SuiteResult, SuiteResult]]:
    files = [_files(path) for path in (before, after)]
    for name in files[0].keys() & files[1].keys() if before.is_dir() or after.is_dir() else [""]:
        old, new = (load(found.get(name) or next(iter(found.values())))[1] for found in files)
        later = {suite.name: suite for suite in new}
        for suite in old:
            if suite.name in later:
                yield suite, later[suite.name]


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    found = {file.name: file for file in sorted(path.glob("*.json")) if file.name != "environment.json"}
    if not found:
        raise ValueError(
            f"bench compare: {path} must be a folder that `byol-fast bench --save` wrote; it holds no results"
        )
    return found


def table(changes: list[Change]) -> list[str]:
    """Changes as text, the largest first."""
    text = []
    for c in sorted(changes, key=lambda c: (c.verdict == "same", -abs(math.log1p(c.share)))):
        over = f" (time over {c.baseline})" if c.baseline else ""
        text.append(
            f"{c.verdict:7s}{c.share:+7.1%}  (noise {c.noise:.1%})  {c.suite}: {c.contender}  "
            f"{c.before:.4g} -> {c.after:.4g}{over}"
        )
    return text
