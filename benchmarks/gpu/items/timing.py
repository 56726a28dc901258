"""Timing on a device: CUDA events after a warm-up, candidates in shuffled order, small launches as one CUDA graph."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import is_small
from byol_fast.bench.counting import as_graph
from byol_fast.bench.timing import Timing

Case = Callable[[], object]

KERNELS, STEPS = 5e-3, 0.3
"""Seconds of a sample of kernels (events resolve half a microsecond) and of training steps (only the first one waits
for the host)."""
MAX_CALLS = 200
RESERVE = 5.0
"""Seconds before the deadline after which no further round starts."""


def seconds_of(case: Case, device: str, calls: int = 1) -> float:
    """Seconds per call, until the device is finished.

    Args:
        case: callable.
        device: "cuda" or "cpu".
        calls: number of calls in a row.
    """
    if device != "cuda":
        start_time = time.perf_counter()
        for _ in range(calls):
            case()
        return (time.perf_counter() - start_time) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        case()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / calls


def interleaved(
    context: Context, cases: Mapping[str, Case], *, rounds: int = 11, warmup: int = 2, sample: float = KERNELS
) -> dict[str, Timing]:
    """Time all cases once per round, in an order that is shuffled in each round.

    Interference then slows down all cases alike. At least three rounds are run; more only while there is time.

    Args:
        context: of the item.
        cases: name and callable.
        rounds: rounds that are counted; 1 with tiny sizes.
        warmup: calls of each case before, not counted.
        sample: seconds of a sample; short calls are repeated to fill it.
    """
    small = is_small(context)
    calls = dict.fromkeys(cases, 1)
    for name, case in cases.items():
        for _ in range(0 if small else warmup):
            case()
        single = seconds_of(case, context.device)
        if single > 0 and not small:
            calls[name] = max(1, min(MAX_CALLS, round(sample / single)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, generator = list(cases.items()), random.Random(0)
    for number in range(1 if small else rounds):
        if number >= 3 and context.seconds_left() < RESERVE:
            break
        generator.shuffle(order)
        for name, case in order:
            seconds[name].append(seconds_of(case, context.device, calls[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def captured(case: Case, device: str) -> Case:
    """Capture work as one CUDA graph, so that kernels are timed without the host; on a CPU, the work itself.

    Args:
        case: callable to capture; it is called three times before, on a separate stream.
        device: "cuda" or "cpu".
    """
    return as_graph(case) if device == "cuda" else case


def figures(timing: Timing, *, images: float | None = None, repeats: int = 1) -> dict[str, float]:
    """Images per second; median, p20 and p80 in milliseconds; number of rounds.

    Args:
        timing: of a call.
        images: that one call processes.
        repeats: times that one call does the work; milliseconds are divided by it.
    """
    values = {}
    if images is not None:
        values["images_per_second"] = rounded(images / timing.median) if timing.median > 0 else float("nan")
    quantiles = {"ms": 0.5, "ms_p20": 0.2, "ms_p80": 0.8}
    values |= {name: rounded(1e3 * timing.quantile(q) / repeats) for name, q in quantiles.items()}
    return values | {"rounds": len(timing.seconds)}


def rounded(value: float) -> float:
    """A float rounded to five significant digits."""
    return float(f"{value:.5g}")
