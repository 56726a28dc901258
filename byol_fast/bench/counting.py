"""Suites of operators: times, and with them numbers of operators, host syncs and bandwidths."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.bench.numerics import relative_error
from byol_fast.bench.results import Results
from byol_fast.bench.timing import Timing, interleaved
from byol_fast.utils.env import version
from byol_fast.utils.errors import first_line
from byol_fast.utils.progress import current

Case = Callable[[], object]
COPY_BYTES = 128 << 20  # larger than any cache
COPY = "copy"


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that reach the device, and those that make the host wait for a value.

    A registered operator counts as one, regardless of its implementation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += func.namespace != "profiler"
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Suite(NamedTuple):
    """Candidates that do the same work and were checked to agree."""

    cases: Mapping[str, Case]
    """Name and callable; the first is byol_fast's."""
    min_bytes: int
    """Least number of bytes that the work has to read and write."""
    repeats: int = 1
    """Times that one call does the work."""
    baseline: str = ""
    """The case whose code does not change between versions of byol_fast."""
    uncounted: tuple[str, ...] = ()
    """Cases whose operators cannot be counted: compiled code, or other libraries' own code."""
    capturable: tuple[str, ...] = ()
    """Cases besides byol_fast's that a CUDA graph can capture; on a GPU they are measured that way, too."""


@functools.cache
def is_installed(name: str) -> bool:
    """True if a library can be imported; prints a line otherwise."""
    try:
        installed = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        print(f"  {name} is not installed, skipped; pip install '.[peers]' in the clone")
    return installed


def check_agreement(name: str, values: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare each tensor with the expected one.

    Args:
        name: of the candidate, for the message.
        values: its results.
        expected: results to compare with.
        tolerance: largest relative L2 error.

    Raises:
        AssertionError: an error is larger.
    """
    for x, y in zip(values, expected, strict=True):
        error = relative_error([x], [y])
        if not error <= tolerance:
            raise AssertionError(f"{name}: candidates disagree, relative error {error:.2e}, allowed {tolerance:.0e}")


def measure(results: Results, name: str, suite: Suite, *, rounds: int, num_items: float | None = None) -> None:
    """Time a suite together with a copy in memory.

    With one thread on a CPU, CPU time of the process is measured, which other processes disturb least; otherwise
    wall-clock time until the device is finished. On a GPU, short work is repeated so that the synchronization does not
    count, and also measured as a CUDA graph ("..., captured"), as in a captured step: without the host's part.

    Args:
        results: that the suite is added to.
        name: of the suite.
        suite: its cases.
        rounds: interleaved rounds that are counted.
        num_items: images that one call processes, for a result in images per second; None for milliseconds per call.
    """
    device = results.device
    is_cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    counts: dict[str, OperatorCounter] = {}
    with current().bar(len(suite.cases), f"{name}: first calls") as bar:
        for provider, case in suite.cases.items():
            bar.update(len(counts), provider)
            with OperatorCounter() as count:
                case()
            counts[provider] = count
    all_cases: dict[str, Case] = {**suite.cases, COPY: lambda: target.copy_(source)}
    if device.type == "cuda":
        all_cases |= capture_cases(suite, {provider for provider, count in counts.items() if count.syncs})
    calls = {provider: num_calls(case, device) for provider, case in all_cases.items()}
    cases = {provider: synchronized(case, device, calls[provider]) for provider, case in all_cases.items()}
    clock = time.process_time if is_cpu_time else time.perf_counter
    measured = interleaved(cases, rounds=rounds, clock=clock, description=name)
    copy_speed = 2 * COPY_BYTES / (measured.pop(COPY).median / calls[COPY])
    times = {p: Timing(tuple(s / suite.repeats / calls[p] for s in t.seconds)) for p, t in measured.items()}
    extras: dict[str, dict[str, Any]] = {}
    for provider, timing in times.items():
        speed = suite.min_bytes / timing.median
        extras[provider] = {"gb_per_s": speed / 1e9, "share_of_copy": speed / copy_speed}
        if provider in counts and provider not in suite.uncounted:
            count = counts[provider]
            extras[provider] |= {"ops": count.ops // suite.repeats, "host_syncs": count.syncs // suite.repeats}
    unit = ("CPU-ms" if is_cpu_time else "ms") if num_items is None else ("images/CPU-s" if is_cpu_time else "images/s")
    results.add(name, times, unit=unit, num_items=num_items, baseline=suite.baseline, extras=extras)


def capture_cases(suite: Suite, syncing: Collection[str]) -> dict[str, Case]:
    """The cases that can be captured, as CUDA graphs.

    Args:
        suite: with cases on a GPU.
        syncing: cases that make the host wait, which cannot be captured.
    """
    graphs: dict[str, Case] = {}
    for provider, case in suite.cases.items():
        if provider not in syncing and (provider.startswith("byol_fast") or provider in suite.capturable):
            try:
                graphs[f"{provider}, captured"] = as_graph(case)
            except RuntimeError as error:
                print(f"  {provider} cannot be captured: {first_line(error)}")
    return graphs


def as_graph(case: Case) -> Case:
    """Capture a case as a CUDA graph; the returned callable replays it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            case()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # In the default mode, allocations and queries of other threads would invalidate the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        case()
    return graph.replay


def num_calls(case: Case, device: torch.device) -> int:
    """Number of calls per synchronization: 3 ms of work on a GPU, much more than the synchronization takes."""
    if device.type != "cuda":
        return 1
    single = synchronized(case, device)
    single()
    begin = time.perf_counter()
    single()
    return max(1, min(200, round(3e-3 / (time.perf_counter() - begin))))


def synchronized(case: Case, device: torch.device, calls: int = 1) -> Case:
    """Callable that runs a case some times and returns when the device is finished."""
    if device.type != "cuda":
        return case

    def run() -> None:
        for _ in range(calls):
            case()
        torch.cuda.synchronize()

    return run


def library_versions() -> dict[str, str]:
    """Versions of the other libraries that are installed."""
    names = ("lightly", "timm", "kornia", "byol-pytorch", "stable-pretraining")
    return {name: number for name in names if (number := version(name)) is not None}
