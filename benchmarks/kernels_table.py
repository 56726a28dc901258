"""What the benchmarks of kernels measure and save: times, and beside them operators, host syncs and bandwidths."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast import environment
from byol_fast.bench import Timing, interleaved, ratio
from byol_fast.files import atomic_path, atomic_write

Case = Callable[[], object]
COLUMNS = (
    "suite", "provider", "unit", "p50", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "rounds",
    "gb_per_s", "share_of_copy", "ops", "host_syncs",
)  # fmt: skip
COPIED = 128 << 20  # bytes: beyond every cache


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators that reach the device while it is on, and how many of them make the host wait for a number.

    A registered operator counts as one, whatever it does inside: what a GPU's queue would see.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += func.namespace != "profiler"
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Suite(NamedTuple):
    """Contenders that do the same work, checked to agree."""

    cases: Mapping[str, Case]
    """Name and what to call; the first is ours."""
    moved: int
    """Bytes that one call has to move at the least."""
    repeats: int = 1
    """How often a case does its work in one call."""
    uncounted: tuple[str, ...] = ()
    """Cases whose operators cannot be counted: compiled code, or code that is not torch's."""


def is_installed(name: str) -> bool:
    """Whether a peer is there; says so if not."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        print(f"  {name} is not installed and left out; pip install byol_fast[peers]")
    return found


def agree(what: str, a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    """Raises unless each tensor of `a` is within a relative L2 error of its partner."""
    for x, y in zip(a, b, strict=True):
        wide, other = x.detach().double(), y.detach().double()
        error = float((wide - other).norm() / other.norm().clamp_min(1e-12))
        if not error <= tolerance:
            raise AssertionError(f"{what}: contenders disagree, relative error {error:.2e}, allowed {tolerance:.0e}")


class KernelTable:
    """Measures suites, prints them, and keeps the rows.

    With one thread it measures the process's CPU time, which other processes disturb least; otherwise time on the wall.

    Args:
        rounds: interleaved rounds that count.
        device: where the cases run.
        amount: what one call processes; the table then shows that a second. None: milliseconds a call.
        what: the name of it.
    """

    def __init__(
        self, rounds: int, device: torch.device | str = "cpu", *, amount: float | None = None, what: str = ""
    ) -> None:
        self.rounds, self.device = rounds, torch.device(device)
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock, self.unit = (time.process_time, "CPU-ms") if alone else (time.perf_counter, "ms")
        self.amount = amount
        if amount is not None:
            self.unit = f"{what}/{'CPU-' if alone else ''}s"
        self.rows: list[list[object]] = []
        print(f"{self.device}, {torch.get_num_threads()} threads, {rounds} interleaved rounds")

    def run(self, name: str, suite: Suite) -> None:
        """Measures a suite beside a copy in memory, and prints it. The ratio is time over ours: above 1, we win."""
        source = torch.ones(COPIED, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        counts = {}
        for provider, case in suite.cases.items():
            with Count() as count:
                case()
            counts[provider] = count
        cases = {provider: self._finished(case) for provider, case in suite.cases.items()}
        cases["copy"] = self._finished(lambda: target.copy_(source))
        measured = interleaved(cases, rounds=self.rounds, clock=self.clock)
        times = {p: Timing(tuple(s / suite.repeats for s in t.seconds)) for p, t in measured.items()}
        copied = 2 * COPIED / measured["copy"].median
        print(f"{name} ({self.unit}: median [p20 - p80]; time over ours; a copy moves {copied / 1e9:.1f} GB/s)")
        ours = next(iter(times.values()))
        for provider in suite.cases:
            self._row(name, provider, times[provider], ours, suite, copied, counts[provider])

    def _row(
        self, name: str, provider: str, t: Timing, ours: Timing, suite: Suite, copied: float, count: Count
    ) -> None:
        quantiles = [t.quantile(q) for q in (0.2, 0.5, 0.8)]
        p20, p50, p80 = (
            (1e3 * s for s in quantiles) if self.amount is None else (self.amount / s for s in reversed(quantiles))
        )
        middle, low, high = ratio(t, ours)
        speed = suite.moved / t.median
        ops, syncs = count.ops // suite.repeats, count.syncs // suite.repeats
        counted = ("", "") if provider in suite.uncounted else (ops, syncs)
        shown = "" if provider in suite.uncounted else f"{ops} ops, {syncs} syncs"
        print(
            f"  {provider:52s}{p50:9.4g} [{p20:.4g} - {p80:.4g}]  {middle:.2f}x [{low:.2f} - {high:.2f}]  "
            f"{speed / 1e9:.2f} GB/s, {speed / copied:.0%} of a copy  {shown}",
            flush=True,
        )
        timing = [p50, p20, p80, middle, low, high, len(t.seconds)]
        self.rows.append([name, provider, self.unit, *timing, speed / 1e9, speed / copied, *counted])

    def _finished(self, case: Case) -> Case:
        """The case, done when it returns."""
        if self.device.type != "cuda":
            return case

        def run() -> None:
            case()
            torch.cuda.synchronize()

        return run

    def save(self, folder: Path, name: str) -> None:
        """Write `NAME.csv` and, beside it, `environment.json` with the versions of the peers."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{name}.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(self.rows)
        record = environment.describe(self.device) | {"date": time.strftime("%Y-%m-%d")}
        peers = ("kornia", "lightly", "timm")
        record["peers"] = {peer: importlib.metadata.version(peer) for peer in peers if importlib.util.find_spec(peer)}
        atomic_write(folder / "environment.json", json.dumps(record, indent=2) + "\n")
