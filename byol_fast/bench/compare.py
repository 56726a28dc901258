"""Comparison of two measurements: which changes exceed the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from byol_fast.bench.results import SuiteResult, load

MIN_CHANGE = 0.08
"""Smaller changes are never reported: machines and clocks drift that much between two runs."""
MIN_CHANGE_SHORT = 0.25
"""The same for calls shorter than `SHORT`: the placement of tensors in memory changes their time that much."""
SHORT = 0.01
"""Seconds."""
NUM_ERRORS = 4.0
"""Standard errors of the two medians together that a change must exceed."""


@dataclass(frozen=True, slots=True)
class Change:
    """Cost of one candidate in two measurements."""

    suite: str
    candidate: str
    is_byol_fast: bool
    """The candidate is part of this package: only then a slowdown is a regression."""
    baseline: str
    """Candidate whose time it is divided by in both measurements; "" for plain time."""
    before: float
    """Median time, relative to the baseline if there is one."""
    after: float
    noise: float
    """Relative change that is still taken for noise."""

    @property
    def relative(self) -> float:
        """Relative change of the time; negative if the candidate became faster."""
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        """One of "slower", "faster" and "same"."""
        # On a log scale, so that twice as fast and twice as slow are equally far away.
        if abs(math.log1p(self.relative)) <= math.log1p(self.noise):
            return "same"
        return "slower" if self.relative > 0 else "faster"


def compare(before: Path, after: Path) -> list[Change]:
    """Changes between two folders of results, or two files.

    If a suite names a baseline, the rounds of every candidate are divided by the baseline's of the same round, so that
    a slower machine is not mistaken for a change. The noise is estimated from the rounds.

    Raises:
        ValueError: no results there, or no suite in common.
    """
    changes = []
    for old, new in _common_suites(before, after):
        new_names = {c.name for c in new.candidates}
        baseline = old.baseline if old.baseline == new.baseline and old.baseline in new_names else ""
        for candidate in old.candidates:
            if candidate.name not in new_names or candidate.name == baseline:
                continue
            first, second = (_samples(suite, candidate.name, baseline) for suite in (old, new))
            error = math.hypot(_relative_error(first), _relative_error(second))
            min_change = MIN_CHANGE_SHORT if candidate.timing.median < SHORT else MIN_CHANGE
            changes.append(
                Change(
                    suite=old.name,
                    candidate=candidate.name,
                    is_byol_fast=candidate.is_byol_fast,
                    baseline=baseline,
                    before=float(np.median(first)),
                    after=float(np.median(second)),
                    noise=max(min_change, NUM_ERRORS * error),
                )
            )
    if not changes:
        raise ValueError(f"bench compare: {before} and {after} must have a suite in common, but have none")
    return changes


def _common_suites(before: Path, after: Path) -> Iterator[tuple[SuiteResult, SuiteResult]]:
    """Suites that both measurements have, in pairs."""
    old_files, new_files = _result_files(before), _result_files(after)
    if before.is_file() and after.is_file():  # whatever their names are
        pairs = [(before, after)]
    else:
        pairs = [(old_files[name], new_files[name]) for name in sorted(old_files.keys() & new_files.keys())]
    for old_file, new_file in pairs:
        new_suites = {suite.name: suite for suite in load(new_file)[1]}
        for suite in load(old_file)[1]:
            if suite.name in new_suites:
                yield suite, new_suites[suite.name]


def _result_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files = {file.name: file for file in sorted(path.glob("*.json")) if file.name != "environment.json"}
    if not files:
        raise ValueError(
            f"bench compare: {path} must be a folder that `byol-fast bench --save` wrote; it holds no results"
        )
    return files


def _samples(suite: SuiteResult, name: str, baseline: str) -> np.ndarray:
    """Times of a candidate, round by round, relative to the baseline if there is one."""
    seconds = {c.name: np.array(c.seconds) for c in suite.candidates}
    return seconds[name] / seconds[baseline] if baseline else seconds[name]


def _relative_error(samples: np.ndarray) -> float:
    """Relative standard error of the median, 1.2533 sigma / sqrt(n); sigma from the quartiles, robust to outliers."""
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float(1.2533 * (high - low) / 1.349 / math.sqrt(len(samples)) / middle)


def table(changes: list[Change]) -> list[str]:
    """Changes as text, the largest first."""
    lines = []
    for c in sorted(changes, key=lambda c: (c.verdict == "same", -abs(math.log1p(c.relative)))):
        relative_to = f" (relative to {c.baseline})" if c.baseline else ""
        lines.append(
            f"{c.verdict:7s}{c.relative:+7.1%}  (noise {c.noise:.1%})  {c.suite}: {c.candidate}  "
            f"{c.before:.4g} -> {c.after:.4g}{relative_to}"
        )
    return lines
