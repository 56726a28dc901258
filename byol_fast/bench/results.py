"""Benchmark results: printed, and saved in files that other programs can read.

A folder of results holds, for each benchmark NAME: `NAME.json` (all rounds), `NAME.csv` (a row per candidate),
`NAME.png`, and one `environment.json`. `benchmarks/results/README.md` describes the fields.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from byol_fast.bench.timing import Timing, ratio
from byol_fast.config import ConfigError
from byol_fast.utils import env
from byol_fast.utils.errors import reason
from byol_fast.utils.files import atomic_path, atomic_write
from byol_fast.utils.records import list_of, number, read_json, record_of, text

FORMAT = 2
_CANDIDATE = record_of({"name": text, "seconds": list_of(number), "extras": record_of({})}, required=True)
_SUITE = record_of({"name": text, "candidates": list_of(_CANDIDATE), "unit": text, "baseline": text}, required=True)
_CONTENT = record_of({"suites": list_of(_SUITE), "environment": record_of({})}, required=True)
_TEXT_EXTRAS = {"note", "version", "flags"}
"""Extras that `lines` prints below the numbers."""
COLUMNS = ("suite", "provider", "unit", "p50", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "rounds")


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """Times of one candidate."""

    name: str
    seconds: tuple[float, ...]
    """Of one call, for each round."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Further values: `ops`, `gb_per_s`, `peak_gib`, `version`, `note`, `flags` ..."""

    @property
    def timing(self) -> Timing:
        """Timing of all rounds."""
        return Timing(self.seconds)

    @property
    def is_byol_fast(self) -> bool:
        """True if the candidate is part of this package."""
        return self.name.startswith("byol_fast")


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Candidates that did the same work in interleaved rounds."""

    name: str
    candidates: tuple[CandidateResult, ...]
    """Ratios are relative to the first."""
    unit: str
    """`"ms"` and the like, or items per second if `num_items` is given."""
    num_items: float | None = None
    """Items that one call processes; quantiles are then items per second."""
    baseline: str = ""
    """Candidate whose code does not change: `bench compare` divides the others by it."""

    def quantiles(self, timing: Timing) -> tuple[float, float, float]:
        """20 %, 50 % and 80 % quantile in the unit of the suite."""
        seconds = [timing.quantile(q) for q in (0.2, 0.5, 0.8)]
        if self.num_items is None:
            low, middle, high = (1e3 * s for s in seconds)
        else:
            low, middle, high = (self.num_items / s for s in reversed(seconds))
        return low, middle, high

    def relative_to_first(self, candidate: CandidateResult) -> tuple[float, float, float]:
        """Time over that of the first candidate, round by round: median, 20 % and 80 % quantile."""
        return ratio(candidate.timing, self.candidates[0].timing)

    def times_faster(self, candidate: CandidateResult) -> tuple[float, float, float]:
        """Time of the first candidate over that of this one: 1 over `relative_to_first`, with its quantiles."""
        middle, low, high = self.relative_to_first(candidate)
        return 1 / middle, 1 / high, 1 / low


class Results:
    """Suites of one benchmark.

    Args:
        name: of the files.
        device: that was measured.
        settings: options of the benchmark, for the record.
    """

    def __init__(self, name: str, device: torch.device | str, settings: Mapping[str, Any] | None = None) -> None:
        self.name, self.device, self.settings = name, torch.device(device), dict(settings or {})
        self.suites: list[SuiteResult] = []

    def add(
        self,
        suite: str,
        times: Mapping[str, Timing],
        *,
        unit: str = "ms",
        num_items: float | None = None,
        baseline: str = "",
        extras: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> SuiteResult:
        """Print the timings of a suite and append it; fields as in `SuiteResult`."""
        result = SuiteResult(
            name=suite,
            candidates=tuple(
                CandidateResult(name=name, seconds=t.seconds, extras=dict((extras or {}).get(name, {})))
                for name, t in times.items()
            ),
            unit=unit,
            num_items=num_items,
            baseline=baseline,
        )
        self.suites.append(result)
        print("\n".join(lines(result)), flush=True)
        return result

    def rows(self) -> list[dict[str, Any]]:
        """A row per candidate, with the columns of the CSV file."""
        rows = []
        for suite in self.suites:
            for candidate in suite.candidates:
                p20, p50, p80 = suite.quantiles(candidate.timing)
                middle, low, high = suite.relative_to_first(candidate)
                values = (suite.name, candidate.name, suite.unit, p50, p20, p80, middle, low, high)
                rows.append(dict(zip(COLUMNS, (*values, len(candidate.seconds)), strict=True)) | candidate.extras)
        return rows

    def save(self, folder: Path) -> list[Path]:
        """Write the files of this benchmark, each atomically.

        Returns:
            The paths of the files.
        """
        from byol_fast.bench.plot import bars

        folder.mkdir(parents=True, exist_ok=True)
        record = env.describe_measurement(self.device)
        content = {
            "format": FORMAT,
            "name": self.name,
            "settings": self.settings,
            "environment": record,
            "suites": [asdict(suite) for suite in self.suites],
        }
        atomic_write(folder / f"{self.name}.json", json.dumps(content, indent=1) + "\n")
        rows = self.rows()
        columns = list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)]))
        with atomic_path(folder / f"{self.name}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        atomic_write(folder / "environment.json", json.dumps(record, indent=2) + "\n")
        with atomic_path(folder / f"{self.name}.png") as path, path.open("wb") as file:
            bars(self.suites, f"{self.name}: {record.get('gpu') or record['cpu']}").save(file, format="PNG")
        return [folder / f"{self.name}.{kind}" for kind in ("json", "csv", "png")] + [folder / "environment.json"]


def load(path: Path) -> tuple[dict[str, Any], list[SuiteResult]]:
    """Read the JSON file of a benchmark.

    Returns:
        The whole content, and the suites.

    Raises:
        ConfigError: not such a file, or another format.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise _not_results(path, reason(error)) from None
    if content.get("format") != FORMAT:
        raise ConfigError(f"bench: {path} must be of format {FORMAT}, got {content.get('format')!r:.40}; measure again")
    if (problem := _CONTENT(content, "")) is not None:
        raise _not_results(path, problem)
    try:
        suites = [SuiteResult(**suite | {"candidates": _candidates(suite)}) for suite in content["suites"]]
    except (TypeError, ValueError) as error:  # an unknown field, or times that do not fit together
        raise _not_results(path, reason(error)) from None
    return content, suites


def _candidates(suite: dict[str, Any]) -> tuple[CandidateResult, ...]:
    """Candidates of a suite; a TypeError for an unknown field, a ValueError for times that do not fit together."""
    candidates = tuple(CandidateResult(**c | {"seconds": tuple(c["seconds"])}) for c in suite["candidates"])
    rounds = {len(c.seconds) for c in candidates}
    if len(rounds) != 1 or 0 in rounds or any(s <= 0 for c in candidates for s in c.seconds):
        raise ValueError(f"candidates of {suite['name']} must have as many positive times as each other")
    return candidates


def _not_results(path: Path, problem: str) -> ConfigError:
    return ConfigError(f"bench: {path} must be results that `byol-fast bench --save` wrote, but {problem}")


def lines(suite: SuiteResult) -> Sequence[str]:
    """A suite as text, a line per candidate."""
    text = [f"{suite.name} ({suite.unit}: median [p20 - p80]; times faster than the first)"]
    for candidate in suite.candidates:
        (p20, p50, p80), (middle, low, high) = suite.quantiles(candidate.timing), suite.times_faster(candidate)
        extras = "  ".join(f"{_short(v)} {k}" for k, v in candidate.extras.items() if k not in _TEXT_EXTRAS)
        spread = f"[{p20:.4g} - {p80:.4g}]  {middle:.2f}x [{low:.2f} - {high:.2f}]"
        text.append(f"  {candidate.name:52s}{p50:9.4g} {spread}  {extras}")
    for c in suite.candidates:
        if "note" in c.extras:
            label = f"{c.name} {c.extras.get('version', '')}".strip()
            text.append(f"    {label}: {c.extras['note']}")
    flags = [c.extras["flags"] for c in suite.candidates if "flags" in c.extras]
    for value in dict.fromkeys(flags):
        names = [c.name for c in suite.candidates if c.extras.get("flags") == value]
        text.append(f"    {'all' if len(names) == len(suite.candidates) else ', '.join(names)}: {value}")
    return text


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
