"""Time of a step by phase, by family of kernels, and between kernels."""

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
from byol_fast.utils.files import atomic_path
from byol_fast.utils.profiler_ranges import Phase, marked
from byol_fast.utils.telemetry import memory_now

MARK = "phase: "
"""Prefix of the names of our ranges in a trace."""
GAP_US = 10.0
"""Microseconds: shorter gaps between two kernels are launch latency."""


@dataclass(slots=True)
class PhaseTimes:
    """Time of one phase of one step."""

    start: float
    """Milliseconds since the start of the step."""
    milliseconds: float
    peak_bytes: int


@dataclass(slots=True)
class StepTimes:
    """Time of one step, and of its phases."""

    milliseconds: float
    phases: dict[str, list[PhaseTimes]] = field(default_factory=dict)


class PhaseClock:
    """Times the phases of steps: by CUDA events on a GPU, by the clock on a CPU.

    Args:
        device: of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._ranges: list[tuple[str, Any, Any, int]] = []
        self._host_phases = {"data wait", "metrics", "callbacks"}

    def steps(self, count: int, step: Callable[[], None]) -> list[StepTimes]:
        """Run and time steps.

        Args:
            count: number of steps.
            step: runs one step.
        """
        steps = []
        with marked(self._mark):
            for _ in range(count):
                self._ranges.clear()
                start = self._now(host=False)
                host_start = time.perf_counter()
                step()
                end = self._now(host=False)
                if self._on_gpu:
                    torch.cuda.synchronize(self.device)
                times = StepTimes(self._between(start, end))
                for name, first, last, peak in self._ranges:
                    offset = self._since(start, host_start, first)
                    times.phases.setdefault(name, []).append(PhaseTimes(offset, self._between(first, last), peak))
                steps.append(times)
        return steps

    @contextmanager
    def _mark(self, name: str) -> Iterator[None]:
        host = name in self._host_phases
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = self._now(host=host)
        yield
        peak = torch.cuda.max_memory_allocated(self.device) if self._on_gpu else memory_now(self.device)
        self._ranges.append((name, start, self._now(host=host), peak))

    def _now(self, *, host: bool) -> Any:
        """Time stamp: of the host for phases of the host, else a CUDA event."""
        if host or not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def _between(start: Any, end: Any) -> float:
        return 1e3 * (end - start) if isinstance(start, float) else float(start.elapsed_time(end))

    def _since(self, start: Any, host_start: float, moment: Any) -> float:
        return self._between(host_start if isinstance(moment, float) else start, moment)


@dataclass(frozen=True, slots=True)
class Trace:
    """Result of torch's profiler for some steps; all values are per step."""

    seconds: float
    """Wall time, including the overhead of the profiler."""
    families: list[dict[str, Any]]
    """Family, seconds and calls, the longest first."""
    kernels: list[dict[str, Any]]
    """Name, family, seconds and calls of the twenty longest."""
    launches: float | None
    """Kernels, copies and fills on the GPU; None without a GPU."""
    idle: float | None
    """Share of the time in which the GPU was idle; None without a GPU."""
    gaps: list[dict[str, Any]]
    """Longest gaps between kernels: milliseconds, and the kernel behind each."""
    spans: list[tuple[str, float, float]]
    """Kernels of one step on the GPU: family, start and end in milliseconds."""


def trace_steps(device: torch.device, count: int, step: Callable[[], None], output: Path) -> Trace:
    """Run steps under torch's profiler.

    Args:
        device: of the steps.
        count: number of steps.
        step: runs one step.
        output: file of the trace for Perfetto or Chrome, `.json.gz`.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler, marked(_range):
        start = time.perf_counter()
        for _ in range(count):
            with record_function(f"{MARK}step"):
                step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - start) / count
    _export(profiler, output)
    events = [e for e in profiler.events() or [] if not e.name.startswith((MARK, "ProfilerStep"))]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    if on_gpu:
        work = [(e.name, e.time_range.start, e.time_range.end) for e in kernels if not e.name.startswith("phase")]
        families, names = _summarize([(n, (end - start) / 1e6) for n, start, end in work], count, on_gpu=True)
        idle, gaps = find_gaps(work)
        spans = _last_step(work, count)
        return Trace(seconds, families, names, len(work) / count, idle, gaps, spans)
    operations = [(e.name, e.self_cpu_time_total / 1e6) for e in events]
    families, names = _summarize(operations, count, on_gpu=False)
    return Trace(seconds, families, names, None, None, [], [])


def _range(name: str) -> AbstractContextManager[object]:
    return record_function(f"{MARK}{name}")


def _export(profiler: profile, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with atomic_path(output) as path, gzip.open(path, "wb", compresslevel=5) as packed:
            packed.write(plain.read_bytes())


def _summarize(
    work: Sequence[tuple[str, float]], count: int, *, on_gpu: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds and calls per step, by family and by name."""
    families: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for name, seconds in work:
        families.setdefault(family_of(name, on_gpu=on_gpu), []).append(seconds)
        names.setdefault(name, []).append(seconds)

    def rows(groups: dict[str, list[float]], key: str) -> list[dict[str, Any]]:
        entries = [{key: name, "seconds": sum(s) / count, "calls": len(s) / count} for name, s in groups.items()]
        return sorted(entries, key=lambda row: -float(row["seconds"]))

    longest = rows(names, "name")[:20]
    for row in longest:
        row["family"] = family_of(row["name"], on_gpu=on_gpu)
    return rows(families, "family"), longest


def find_gaps(work: Sequence[tuple[str, float, float]]) -> tuple[float, list[dict[str, Any]]]:
    """Idle share of the time from the first kernel to the last, and the ten longest gaps.

    Args:
        work: kernels as (name, start, end) in microseconds, in any order; they may overlap.

    Returns:
        The share, 0..1, and for each gap its milliseconds and the kernel behind it.
    """
    if not work:
        return 0.0, []
    ordered = sorted(work, key=lambda kernel: kernel[1])
    last_end, idle, gaps = ordered[0][1], 0.0, []
    for name, start, end in ordered:
        if start > last_end:
            idle += start - last_end
            if start - last_end > GAP_US:
                gaps.append({"milliseconds": (start - last_end) / 1e3, "before": name})
        last_end = max(last_end, end)
    total = last_end - ordered[0][1]
    longest = sorted(gaps, key=lambda gap: -float(gap["milliseconds"]))[:10]  # type: ignore[arg-type]
    return (idle / total if total > 0 else 0.0), longest


def _last_step(work: Sequence[tuple[str, float, float]], count: int) -> list[tuple[str, float, float]]:
    """Kernels of the last step: all steps launch the same kernels, so the last 1 / count of them."""
    ordered = sorted(work, key=lambda kernel: kernel[1])
    last = ordered[len(ordered) - len(ordered) // count :]
    start = last[0][1] if last else 0.0
    return [(family_of(name, on_gpu=True), (a - start) / 1e3, (b - start) / 1e3) for name, a, b in last]


def median_step(steps: Sequence[StepTimes]) -> StepTimes:
    """The step with the median time."""
    return sorted(steps, key=lambda s: s.milliseconds)[len(steps) // 2]


def phase_rows(steps: Sequence[StepTimes]) -> list[dict[str, Any]]:
    """Name, seconds per step, share and peak memory of each phase; time outside all phases is `rest`."""
    total = statistics.fmean(s.milliseconds for s in steps)
    seen = {name for s in steps for name in s.phases}
    names = [name for name in get_args(Phase) if name in seen]
    rows: list[dict[str, Any]] = []
    for name in names:
        # Means over all steps, because some phases, such as reading the metrics, do not occur in every step.
        spent = statistics.fmean(sum(p.milliseconds for p in s.phases.get(name, [])) for s in steps)
        peak = max(p.peak_bytes for s in steps for p in s.phases.get(name, []))
        rows.append({"phase": name, "seconds": spent / 1e3, "share": spent / total, "peak_bytes": peak})
    rest = max(total - sum(1e3 * row["seconds"] for row in rows), 0.0)
    return [*rows, {"phase": "rest", "seconds": rest / 1e3, "share": rest / total, "peak_bytes": None}]
