"""What benchmarks find: printed, and saved in a long form that other programs can read.

A folder of results holds, for each benchmark NAME: `NAME.json` (everything, every round), `NAME.csv` (a row for each
contender), `NAME.png`, and one `environment.json`. `benchmarks/results/README.md` describes the fields.
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
from byol_fast.utils import env
from byol_fast.utils.files import atomic_path, atomic_write

FORMAT = 1
_IN_WORDS = {"note", "version", "flags"}
"""Extras that `lines` has below the figures."""
COLUMNS = ("suite", "provider", "unit", "p50", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "rounds")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a suite's work, and what it cost."""

    name: str
    seconds: tuple[float, ...]
    """Of one call, round by round."""
    extras: dict[str, Any] = field(default_factory=dict)
    """More that was measured or has to be known: `ops`, `gb_per_s`, `peak_gib`, `version`, `note`, `flags` ..."""

    @property
    def timing(self) -> Timing:
        """The rounds."""
        return Timing(self.seconds)


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Contenders that did the same work in interleaved rounds."""

    name: str
    contenders: tuple[Contender, ...]
    """The first is what the ratios are over."""
    unit: str
    """`"ms"` and the like, or what is done a second where there is an amount."""
    amount: float | None = None
    """What a call processes; the numbers shown are then amount a second."""
    baseline: str = ""
    """A contender that is not ours and stays the same: `bench compare` judges the others by it."""

    def shown(self, timing: Timing) -> tuple[float, float, float]:
        """20 %, 50 % and 80 % quantile in the suite's unit."""
        quantiles = [timing.quantile(q) for q in (0.2, 0.5, 0.8)]
        if self.amount is None:
            low, middle, high = (1e3 * s for s in quantiles)
        else:
            low, middle, high = (self.amount / s for s in reversed(quantiles))
        return low, middle, high

    def over_first(self, contender: Contender) -> tuple[float, float, float]:
        """Time over the first's, round by round: median, 20 % and 80 % quantile. Above 1, the first is faster."""
        return ratio(contender.timing, self.contenders[0].timing)


class Results:
    """Suites of one benchmark.

    Args:
        name: of the files.
        device: where it was measured.
        settings: what was asked for.
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
        amount: float | None = None,
        baseline: str = "",
        extras: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> SuiteResult:
        """Print a suite's timings and keep them; fields as in `SuiteResult`."""
        found = SuiteResult(
            name=suite,
            contenders=tuple(
                Contender(name=name, seconds=t.seconds, extras=dict((extras or {}).get(name, {})))
                for name, t in times.items()
            ),
            unit=unit,
            amount=amount,
            baseline=baseline,
        )
        self.suites.append(found)
        print("\n".join(lines(found)), flush=True)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each contender."""
        rows = []
        for suite in self.suites:
            for contender in suite.contenders:
                (p20, p50, p80), (middle, low, high) = suite.shown(contender.timing), suite.over_first(contender)
                values = (suite.name, contender.name, suite.unit, p50, p20, p80, middle, low, high)
                rows.append(dict(zip(COLUMNS, (*values, len(contender.seconds)), strict=True)) | contender.extras)
        return rows

    def save(self, folder: Path) -> list[Path]:
        """Write the files of this benchmark, each whole or not at all.

        Returns:
            Their paths.
        """
        from byol_fast.bench.plot import bars

        folder.mkdir(parents=True, exist_ok=True)
        record = env.measured_on(self.device)
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
        with atomic_path(folder / f"{self.name}.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        atomic_write(folder / "environment.json", json.dumps(record, indent=2) + "\n")
        with atomic_path(folder / f"{self.name}.png") as path, path.open("wb") as file:
            bars(self.suites, f"{self.name}: {record.get('gpu') or record['cpu']}").save(file, format="PNG")
        return [folder / f"{self.name}.{kind}" for kind in ("json", "csv", "png")] + [folder / "environment.json"]


def load(path: Path) -> tuple[dict[str, Any], list[SuiteResult]]:
    """Read a benchmark's JSON file.

    Returns:
        Its whole content, and the suites.

    Raises:
        ValueError: not such a file, or of another format.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"bench: {path} must be of format {FORMAT}, got {content['format']}; measure again")
        suites = [
            SuiteResult(
                **suite | {"contenders": tuple(Contender(**c | {"seconds": tuple(c["seconds"])}) for c in contenders)}
            )
            for suite in content["suites"]
            for contenders in [suite["contenders"]]
        ]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"bench: {path} must be results that `byol-fast bench --save` wrote, but {type(error).__name__}: {error}"
        ) from None
    return content, suites


def lines(suite: SuiteResult) -> Sequence[str]:
    """A suite as text."""
    text = [f"{suite.name} ({suite.unit}: median [p20 - p80]; time over the first's)"]
    for contender in suite.contenders:
        (p20, p50, p80), (middle, low, high) = suite.shown(contender.timing), suite.over_first(contender)
        extras = "  ".join(f"{_short(v)} {k}" for k, v in contender.extras.items() if k not in _IN_WORDS)
        spread = f"[{p20:.4g} - {p80:.4g}]  {middle:.2f}x [{low:.2f} - {high:.2f}]"
        text.append(f"  {contender.name:52s}{p50:9.4g} {spread}  {extras}")
    for c in suite.contenders:
        if "note" in c.extras:
            who = f"{c.name} {c.extras.get('version', '')}".strip()
            text.append(f"    {who}: {c.extras['note']}")
    flags = [c.extras["flags"] for c in suite.contenders if "flags" in c.extras]
    for each in dict.fromkeys(flags):
        names = [c.name for c in suite.contenders if c.extras.get("flags") == each]
        text.append(f"    {'all' if len(names) == len(suite.contenders) else ', '.join(names)}: {each}")
    return text


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
