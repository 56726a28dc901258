"""What a benchmark prints and saves."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from byol_fast import environment
from byol_fast.bench.timing import Timing, ratio
from byol_fast.files import atomic_path, atomic_write

COLUMNS = ("suite", "provider", "unit", "p50", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "rounds")


class Table:
    """Timings in long form: a row for each contender, its ratio to the first of its suite beside it.

    Args:
        amount: what one call processes; the table then shows amount a second. None: milliseconds a call.
        unit: name of that, `"images/s"` say.
        over: what the first of every suite is called.
    """

    def __init__(self, amount: float | None = None, unit: str = "ms", over: str = "ours") -> None:
        self.amount, self.unit, self.over = amount, unit, over
        self.rows: list[list[object]] = []

    def add(self, suite: str, times: Mapping[str, Timing]) -> None:
        """Print the timings of a suite and keep them. The ratio is time over the first's: above 1, that is faster."""
        print(f"{suite} ({self.unit}: median [p20 - p80]; time over {self.over})")
        first = next(iter(times.values()))
        for name, t in times.items():
            quantiles = [t.quantile(q) for q in (0.2, 0.5, 0.8)]
            shown = [1e3 * s for s in quantiles] if self.amount is None else [self.amount / s for s in quantiles[::-1]]
            p20, p50, p80 = shown
            middle, low, high = ratio(t, first)
            print(
                f"  {name:52s}{p50:9.4g} [{p20:.4g} - {p80:.4g}]   {middle:.2f}x [{low:.2f} - {high:.2f}]", flush=True
            )
            self.rows.append([suite, name, self.unit, p50, p20, p80, middle, low, high, len(t.seconds)])

    def save(self, folder: Path, name: str, device: torch.device) -> None:
        """Write `NAME.csv` and, beside it, `environment.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{name}.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(self.rows)
        record = environment.describe(device) | {"date": time.strftime("%Y-%m-%d")}
        atomic_write(folder / "environment.json", json.dumps(record, indent=2) + "\n")
