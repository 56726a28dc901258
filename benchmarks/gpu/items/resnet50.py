"""Items: a training step of ResNet-50 at 224 px, eager, compiled and captured, beside the loops that people write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import (
    Checks,
    allocated,
    byol_fast_step,
    capture,
    compiled_forward,
    compiled_function,
    free,
    is_small,
    normalized_views,
    peak_gib,
    relative_error,
    resnet50,
    same_flags,
)
from benchmarks.gpu.items.timing import STEPS, figures, interleaved, rounded
from byol_fast.bench.networks import Lightly, Ours, Problem, Textbook
from byol_fast.profiling import inductor
from byol_fast.profiling.kernels import family_of
from byol_fast.utils.env import version
from byol_fast.utils.files import atomic_write

BATCH = 256
"""Images of the compiled step: what the rooflines are computed for."""
ROUNDS = 5
BF16_LOSS = 2e-2
"""Relative difference of two losses whose products were rounded to bf16 in another order: 2^-8 and what a normalization
over few values makes of it."""
TOP = 40
"""Kernels that are listed."""


def eager(context: Context) -> str | None:
    """The baseline and byol_fast, eager, with cuDNN's benchmark off and on, at two batch sizes."""
    checks = Checks(context)
    for batch in (4,) if is_small(context) else (128, 256):
        problem = resnet50(context, batch)
        candidates: dict[str, Callable[[], Tensor]] = {}
        losses: dict[str, Tensor] = {}
        peaks: dict[str, float | None] = {}
        for name, make in (("baseline", _baseline), ("byol_fast", lambda p: byol_fast_step(context, p))):
            free(context)
            before = allocated(context)
            candidates[name] = make(problem)
            same_flags()
            losses[name] = candidates[name]()
            peaks[name] = peak_gib(context, candidates[name], before)
        error = relative_error([losses["byol_fast"]], [losses["baseline"]])
        checks(f"loss of the first step, byol_fast and baseline, batch {batch}", error, BF16_LOSS)
        for benchmark in (False, True):
            flags = same_flags(cudnn_benchmark=benchmark)
            for name, timing in interleaved(context, candidates, rounds=ROUNDS, warmup=3, sample=STEPS).items():
                context.record(
                    f"{name}, eager, batch {batch}, cudnn.benchmark {'on' if benchmark else 'off'}",
                    **figures(timing, images=problem.batch_size),
                    peak_gib=peaks[name],
                    **flags,
                )
        candidates.clear()
    return checks.problem()


def _baseline(problem: Problem) -> Textbook:
    """The loop that guides print, with NHWC memory and bf16 autocast, on normalized views."""
    baseline = Textbook(problem, channels_last=True, precision="bf16")
    baseline.views = normalized_views(problem)
    return baseline


def compiled(context: Context) -> str | None:
    """byol_fast under plain inductor, then the same compiled forward pass captured, and its kernels by time."""
    checks, problem = Checks(context), resnet50(context, BATCH)
    expected = byol_fast_step(context, problem)()
    free(context)
    step = byol_fast_step(context, problem)
    step.step.forward = compiled_forward(context, step.model)
    flags = same_flags()
    loss = _compile(context, "byol_fast", step, problem)
    checks("loss of the first step, compiled and eager", relative_error([loss], [expected]), BF16_LOSS)
    _steps(context, "byol_fast, compiled", step, problem, flags)

    free(context)
    compilations = counters["stats"]["unique_graphs"]
    capture(context, step)
    began = time.perf_counter()
    peak = peak_gib(context, step)  # a replay allocates nothing
    context.record(
        "byol_fast, capture",
        seconds=rounded(time.perf_counter() - began),
        compiled_again=counters["stats"]["unique_graphs"] > compilations,
    )
    _steps(context, "byol_fast, captured", step, problem, flags, peak)
    _kernels(context, step)
    return checks.problem()


def _compile(context: Context, name: str, step: Callable[[], Tensor], problem: Problem) -> Tensor:
    """The first call of a compiled step, its time, and what inductor wrote; returns the loss."""
    from torch._inductor.utils import run_and_get_code

    began = time.perf_counter()
    loss: Tensor
    loss, sources = run_and_get_code(step)
    if context.device == "cuda":
        torch.cuda.synchronize()
    context.record(
        f"{name}, compilation",
        seconds=rounded(time.perf_counter() - began),
        batch=problem.batch_size,
        cache_misses=counters["inductor"]["fxgraph_cache_miss"],
        cache_hits=counters["inductor"]["fxgraph_cache_hit"],
    )
    if sources:
        text = "\n\n# ---- another graph ----\n\n".join(sources)
        atomic_write(context.folder / "inductor_code.py.txt", text)
        context.record(f"{name}, generated code", answers=inductor.analyse(sources)["answers"])
    return loss


def _steps(
    context: Context,
    name: str,
    step: Callable[[], Tensor],
    problem: Problem,
    flags: dict[str, str],
    peak: float | None = None,
) -> None:
    peak = peak_gib(context, step) if peak is None else peak
    timing = interleaved(context, {name: step}, rounds=ROUNDS, sample=STEPS)[name]
    context.record(
        f"{name}, batch {problem.batch_size}", **figures(timing, images=problem.batch_size), peak_gib=peak, **flags
    )


def _kernels(context: Context, step: Ours) -> None:
    """Kernels of a step by name and by family; those that take longest first."""
    found = kernel_times(context, step)
    atomic_write(context.folder / "kernels.json", json.dumps(found, indent=1) + "\n")
    families: dict[str, dict[str, Any]] = {}
    for kernel in found:
        family = families.setdefault(kernel["family"], {"launches": 0, "ms": 0.0})
        family["launches"] += kernel["launches"]
        family["ms"] += kernel["ms"]
    total = {"launches": sum(k["launches"] for k in found), "ms": sum(k["ms"] for k in found)}
    for name, family in [("all", total), *sorted(families.items(), key=lambda item: -item[1]["ms"])]:
        context.record(f"kernels: {name}", launches=family["launches"], ms=rounded(family["ms"]))
    for number, kernel in enumerate(found[:TOP], 1):
        context.record(
            f"kernel {number}", name=kernel["kernel"][:120], launches=kernel["launches"], ms=rounded(kernel["ms"])
        )


def kernel_times(context: Context, step: Callable[[], object]) -> list[dict[str, Any]]:
    """Kernels of a step by name: launches, milliseconds and family; on a CPU operators.

    Args:
        context: of the item.
        step: that was run before.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, dict[str, Any]] = {}
    for event in trace.events() or []:
        if str(event.device_type).endswith("CUDA") == on_gpu:
            family = family_of(event.name, on_gpu=on_gpu)
            entry = found.setdefault(event.name, {"kernel": event.name, "family": family, "launches": 0, "ms": 0.0})
            entry["launches"] += 1
            entry["ms"] += event.time_range.elapsed_us() / 1e3
    return sorted(found.values(), key=lambda entry: -entry["ms"])


def baseline_compiled(context: Context) -> str | None:
    """lightly's loop as it is, then the baseline under torch.compile."""
    checks, problem = Checks(context), resnet50(context, BATCH)
    if version("lightly") is None:
        context.record("lightly", skipped="not installed")
    else:
        lightly = Lightly(problem)
        _steps(context, "lightly, eager", lightly, problem, same_flags())
        del lightly
    free(context)
    expected = _baseline(problem)()
    free(context)
    baseline = _baseline(problem)
    baseline.forward = compiled_function(context, baseline.loss)
    flags = same_flags()
    loss = _compile(context, "baseline", baseline, problem)
    checks("loss of the first step, compiled and eager", relative_error([loss], [expected]), BF16_LOSS)
    _steps(context, "baseline, torch.compile", baseline, problem, flags)
    return checks.problem()
