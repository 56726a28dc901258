"""Operators that do the same work, side by side: times, and beside them operators, host syncs and bandwidths."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.bench.results import Results
from byol_fast.bench.timing import Timing, interleaved
from byol_fast.utils.env import version

Case = Callable[[], object]
COPIED = 128 << 20  # bytes: beyond every cache
COPY = "copy"


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
    baseline: str = ""
    """The case that stays the same from version to version of ours."""
    uncounted: tuple[str, ...] = ()
    """Cases whose operators cannot be counted: compiled code, or code that is not torch's."""
    capturable: tuple[str, ...] = ()
    """Cases besides ours that a CUDA graph can hold: on a GPU they are measured that way, too."""


@functools.cache
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


def measure(results: Results, name: str, suite: Suite, *, rounds: int, amount: float | None = None) -> None:
    """Time a suite beside a copy in memory.

    With one thread on a CPU it is the process's CPU time, which other processes disturb least; otherwise time by the
    clock, until the device is done. On a GPU short work is done often enough to outlast the wait for it, and a second
    time as a CUDA graph ("..., captured"), as a captured step has it: then the host's part does not count.

    Args:
        results: where to put it.
        name: of the suite.
        suite: its cases.
        rounds: interleaved rounds that count.
        amount: images that one call processes; the result is then images a second. None: milliseconds a call.
    """
    device = results.device
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    counts = {}
    for provider, case in suite.cases.items():
        with Count() as count:
            case()
        counts[provider] = count
    work: dict[str, Case] = {**suite.cases, COPY: lambda: target.copy_(source)}
    if device.type == "cuda":
        work |= captured(suite, {provider for provider, count in counts.items() if count.syncs})
    calls = {provider: calls_of(case, device) for provider, case in work.items()}
    cases = {provider: finished(case, device, calls[provider]) for provider, case in work.items()}
    measured = interleaved(cases, rounds=rounds, clock=time.process_time if alone else time.perf_counter)
    copied = 2 * COPIED / (measured.pop(COPY).median / calls[COPY])
    times = {p: Timing(tuple(s / suite.repeats / calls[p] for s in t.seconds)) for p, t in measured.items()}
    extras: dict[str, dict[str, Any]] = {}
    for provider, timing in times.items():
        speed = suite.moved / timing.median
        extras[provider] = {"gb_per_s": speed / 1e9, "share_of_copy": speed / copied}
        if provider in counts and provider not in suite.uncounted:
            count = counts[provider]
            extras[provider] |= {"ops": count.ops // suite.repeats, "host_syncs": count.syncs // suite.repeats}
    unit = ("CPU-ms" if alone else "ms") if amount is None else ("images/CPU-s" if alone else "images/s")
    results.add(name, times, unit=unit, amount=amount, baseline=suite.baseline, extras=extras)


def captured(suite: Suite, waiting: Collection[str]) -> dict[str, Case]:
    """Ours, and others that can be, as CUDA graphs.

    Args:
        suite: of cases on a GPU.
        waiting: those that make the host wait, which no graph can hold.
    """
    graphs: dict[str, Case] = {}
    for provider, case in suite.cases.items():
        if provider not in waiting and (provider.startswith("ours") or provider in suite.capturable):
            try:
                graphs[f"{provider}, captured"] = as_graph(case)
            except RuntimeError as error:
                print(f"  {provider} cannot be captured: {str(error).splitlines()[0]}")
    return graphs


def as_graph(case: Case) -> Case:
    """A case as a CUDA graph; the call replays it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # What other threads allocate or query meanwhile would end a capture in the default mode.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        case()
    return graph.replay


def calls_of(case: Case, device: torch.device) -> int:
    """How often to call a case before waiting for it: on a GPU for 3 ms, beside which the wait is short."""
    if device.type != "cuda":
        return 1
    once = finished(case, device)
    once()
    begin = time.perf_counter()
    once()
    return max(1, min(200, round(3e-3 / (time.perf_counter() - begin))))


def finished(case: Case, device: torch.device, calls: int = 1) -> Case:
    """The case, some calls of it, done when it returns."""
    if device.type != "cuda":
        return case

    def run() -> None:
        for _ in range(calls):
            case()
        torch.cuda.synchronize()

    return run


def peer_versions() -> dict[str, str]:
    """Versions of the other packages, those that are installed."""
    names = ("lightly", "timm", "kornia", "byol-pytorch", "stable-pretraining")
    return {name: found for name in names if (found := version(name)) is not None}
