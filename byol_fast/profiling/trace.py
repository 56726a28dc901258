"""Where the time of a step goes: by phase, by family of kernels, and between the kernels."""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from byol_fast.profiling.kernels import family_of
from byol_fast.profiling.telemetry import memory_now
from byol_fast.utils.files import atomic_path
from byol_fast.utils.profiler_ranges import Phase, marked

MARK = "phase: "
"""Begins the names of our ranges in a trace."""
GAP_US = 10.0
"""Microseconds: a shorter pause between two kernels is the launch itself."""


@dataclass(slots=True)
class PhaseTimes:
    """One phase of one step."""

    begin: float
    """Milliseconds since the step began."""
    milliseconds: float
    peak_bytes: int


@dataclass(slots=True)
class StepTimes:
    """One step."""

    milliseconds: float
    phases: dict[str, list[PhaseTimes]] = field(default_factory=dict)


class PhaseClock:
    """Times the phases of steps where they run: by events on a GPU, by the clock on a CPU.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._open: list[tuple[str, Any, Any, int]] = []
        self._host = {"data wait", "metrics", "callbacks"}

    def steps(self, count: int, step: Callable[[], None]) -> list[StepTimes]:
        """Run steps and time them.

        Args:
            count: of steps.
            step: runs one.
        """
        found = []
        with marked(self._mark):
            for _ in range(count):
                self._open.clear()
                begin = self._now(host=False)
                host_begin = time.perf_counter()
                step()
                end = self._now(host=False)
                if self._on_gpu:
                    torch.cuda.synchronize(self.device)
                times = StepTimes(self._between(begin, end))
                for name, first, last, peak in self._open:
                    offset = self._since(begin, host_begin, first)
                    times.phases.setdefault(name, []).append(PhaseTimes(offset, self._between(first, last), peak))
                found.append(times)
        return found

    @contextmanager
    def _mark(self, name: str) -> Iterator[None]:
        host = name in self._host
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = self._now(host=host)
        yield
        peak = torch.cuda.max_memory_allocated(self.device) if self._on_gpu else memory_now(self.device)
        self._open.append((name, begin, self._now(host=host), peak))

    def _now(self, *, host: bool) -> Any:
        """The time: of the host for what the host does, else of the GPU's work so far."""
        if host or not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def _between(begin: Any, end: Any) -> float:
        return 1e3 * (end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end))

    def _since(self, begin: Any, host_begin: float, moment: Any) -> float:
        return self._between(host_begin if isinstance(moment, float) else begin, moment)


@dataclass(frozen=True, slots=True)
class Trace:
    """What torch's profiler saw of some steps; all figures are of one step."""

    seconds: float
    """Wall time, with the profiler's own cost."""
    families: list[dict[str, Any]]
    """Family, seconds and calls, the longest first."""
    kernels: list[dict[str, Any]]
    """Name, family, seconds and calls of the twenty longest."""
    launches: float | None
    """Kernels, copies and fills on the GPU; None without one."""
    idle: float | None
    """Share of the time that the GPU did nothing; None without one."""
    gaps: list[dict[str, Any]]
    """The longest pauses of the GPU: milliseconds, and the kernel after it."""
    spans: list[tuple[str, float, float]]
    """Kernels of one step on the GPU: family, begin and end in milliseconds."""


def traced(device: torch.device, count: int, step: Callable[[], None], to: Path) -> Trace:
    """Run steps under torch's profiler.

    Args:
        device: that the steps run on.
        count: of steps.
        step: runs one.
        to: the trace for Perfetto or Chrome, `.json.gz`.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler, marked(_range):
        begin = time.perf_counter()
        for _ in range(count):
            with record_function(f"{MARK}step"):
                step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - begin) / count
    _export(profiler, to)
    events = [e for e in profiler.events() or [] if not e.name.startswith((MARK, "ProfilerStep"))]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    if on_gpu:
        work = [(e.name, e.time_range.start, e.time_range.end) for e in kernels if not e.name.startswith("phase")]
        families, names = _summed([(n, (end - start) / 1e6) for n, start, end in work], count, on_gpu=True)
        idle, gaps = pauses(work)
        spans = _one_step(work, count)
        return Trace(seconds, families, names, len(work) / count, idle, gaps, spans)
    own = [(e.name, e.self_cpu_time_total / 1e6) for e in events]
    families, names = _summed(own, count, on_gpu=False)
    return Trace(seconds, families, names, None, None, [], [])


def _range(name: str) -> AbstractContextManager[object]:
    return record_function(f"{MARK}{name}")


def _export(profiler: profile, to: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with atomic_path(to) as path, gzip.open(path, "wb", compresslevel=5) as packed:
            packed.write(plain.read_bytes())


def _summed(
    work: Sequence[tuple[str, float]], count: int, *, on_gpu: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds and calls a step, by family and by name."""
    families: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for name, seconds in work:
        families.setdefault(family_of(name, on_gpu=on_gpu), []).append(seconds)
        names.setdefault(name, []).append(seconds)

    def rows(groups: dict[str, list[float]], key: str) -> list[dict[str, Any]]:
        made = [{key: name, "seconds": sum(s) / count, "calls": len(s) / count} for name, s in groups.items()]
        return sorted(made, key=lambda row: -float(row["seconds"]))

    longest = rows(names, "name")[:20]
    for row in longest:
        row["family"] = family_of(row["name"], on_gpu=on_gpu)
    return rows(families, "family"), longest


def pauses(work: Sequence[tuple[str, float, float]]) -> tuple[float, list[dict[str, Any]]]:
    """Share of the time from the first kernel to the last in which none ran, and the ten longest pauses.

    Args:
        work: kernels as (name, begin, end) in microseconds, in any order; they may overlap.

    Returns:
        The share, 0..1, and for each pause its milliseconds and the kernel that ended it.
    """
    if not work:
        return 0.0, []
    ordered = sorted(work, key=lambda kernel: kernel[1])
    until, idle, found = ordered[0][1], 0.0, []
    for name, begin, end in ordered:
        if begin > until:
            idle += begin - until
            if begin - until > GAP_US:
                found.append({"milliseconds": (begin - until) / 1e3, "before": name})
        until = max(until, end)
    whole = until - ordered[0][1]
    longest = sorted(found, key=lambda gap: -float(gap["milliseconds"]))[:10]  # type: ignore[arg-type]
    return (idle / whole if whole > 0 else 0.0), longest


def _one_step(work: Sequence[tuple[str, float, float]], count: int) -> list[tuple[str, float, float]]:
    """The last of the steps: kernels launched alike, so the last 1 / count of them."""
    ordered = sorted(work, key=lambda kernel: kernel[1])
    last = ordered[len(ordered) - len(ordered) // count :]
    begin = last[0][1] if last else 0.0
    return [(family_of(name, on_gpu=True), (a - begin) / 1e3, (b - begin) / 1e3) for name, a, b in last]


def median_step(steps: Sequence[StepTimes]) -> StepTimes:
    """The step whose time is in the middle."""
    return sorted(steps, key=lambda s: s.milliseconds)[len(steps) // 2]


def phase_rows(steps: Sequence[StepTimes]) -> list[dict[str, Any]]:
    """Name, seconds a step, share and peak memory of each phase, and what is in no phase as `rest`."""
    whole = statistics.fmean(s.milliseconds for s in steps)
    seen = {name for s in steps for name in s.phases}
    names = [name for name in get_args(Phase) if name in seen]
    rows: list[dict[str, Any]] = []
    for name in names:
        # Means: what happens in some steps only, like reading the metrics, costs what it costs over all.
        spent = statistics.fmean(sum(p.milliseconds for p in s.phases.get(name, [])) for s in steps)
        peak = max(p.peak_bytes for s in steps for p in s.phases.get(name, []))
        rows.append({"phase": name, "seconds": spent / 1e3, "share": spent / whole, "peak_bytes": peak})
    rest = max(whole - sum(1e3 * row["seconds"] for row in rows), 0.0)
    return [*rows, {"phase": "rest", "seconds": rest / 1e3, "share": rest / whole, "peak_bytes": None}]
