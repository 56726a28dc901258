"""Items: a training step of ResNet-50 at 224 px, eager, compiled and captured, with the baseline and lightly."""

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
    resnet50,
    set_flags,
)
from benchmarks.gpu.items.timing import STEPS, figures, interleaved, rounded
from byol_fast.bench.baseline import BaselineStep
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.library_steps import LightlyStep
from byol_fast.bench.numerics import relative_error
from byol_fast.bench.problem import Problem
from byol_fast.profiling import inductor
from byol_fast.profiling.kernels import family_of
from byol_fast.utils.env import version
from byol_fast.utils.files import atomic_write

BATCH = 256
"""Batch size of the compiled step, as in the rooflines."""
ROUNDS = 5
BF16_LOSS = 2e-2
"""Relative difference of two losses whose products were rounded to bf16 in another order: 2^-8, amplified by batch norm
over few values."""
NUM_LISTED = 40
"""Number of listed kernels."""


def eager(context: Context) -> str | None:
    """The baseline, lightly's loop and byol_fast, eager, with cuDNN's benchmark off and on, at two batch sizes."""
    checks = Checks(context)
    builders: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
        "baseline": _baseline,
        "byol_fast": lambda problem: byol_fast_step(context, problem),
    }
    if version("lightly") is None:
        context.record("lightly", skipped="not installed")
    else:
        context.record("lightly", version=version("lightly"))
        builders["lightly"] = _lightly
    for batch in (4,) if is_small(context) else (128, 256):
        problem = resnet50(context, batch)
        candidates: dict[str, Callable[[], Tensor]] = {}
        losses: dict[str, Tensor] = {}
        peaks: dict[str, float | None] = {}
        for name, build in builders.items():
            free(context)
            before = allocated(context)
            candidates[name] = build(problem)
            set_flags()
            losses[name] = candidates[name]()
            peaks[name] = peak_gib(context, candidates[name], before)
        if "lightly" in losses:
            losses["lightly"] = 4 + 4 * losses["lightly"]  # it is half the sum of two `-cos`
        for name in [name for name in losses if name != "baseline"]:
            error = relative_error([losses[name]], [losses["baseline"]])
            checks(f"loss of the first step, {name} and baseline, batch {batch}", error, BF16_LOSS)
        for benchmark in (False, True):
            flags = set_flags(cudnn_benchmark=benchmark)
            for name, timing in interleaved(context, candidates, rounds=ROUNDS, warmup=3, sample=STEPS).items():
                context.record(
                    f"{name}, eager, batch {batch}, cudnn.benchmark {'on' if benchmark else 'off'}",
                    **figures(timing, images=problem.batch_size),
                    peak_gib=peaks[name],
                    **flags,
                )
        candidates.clear()
    return checks.problem()


def _baseline(problem: Problem) -> BaselineStep:
    """The baseline with NHWC memory and bf16 autocast, on normalized views."""
    baseline = BaselineStep(problem, channels_last=True, precision="bf16")
    baseline.views = normalized_views(problem)
    return baseline


def _lightly(problem: Problem) -> LightlyStep:
    """lightly's loop with bf16 autocast, on the baseline's views."""
    lightly = LightlyStep(problem, precision="bf16")
    lightly.views = normalized_views(problem)
    return lightly


def compiled(context: Context) -> str | None:
    """byol_fast under inductor, then the same compiled forward pass captured, and its kernels by time."""
    checks, problem = Checks(context), resnet50(context, BATCH)
    expected = byol_fast_step(context, problem)()
    free(context)
    step = byol_fast_step(context, problem)
    step.step.forward = compiled_forward(context, step.model)
    flags = set_flags()
    loss = _compile(context, "byol_fast", step, problem)
    checks("loss of the first step, compiled and eager", relative_error([loss], [expected]), BF16_LOSS)
    _steps(context, "byol_fast, compiled", step, problem, flags)

    free(context)
    compilations = counters["stats"]["unique_graphs"]
    capture(context, step)
    start = time.perf_counter()
    peak = peak_gib(context, step)  # a replay allocates nothing
    context.record(
        "byol_fast, capture",
        seconds=rounded(time.perf_counter() - start),
        compiled_again=counters["stats"]["unique_graphs"] > compilations,
    )
    _steps(context, "byol_fast, captured", step, problem, flags, peak)
    _kernels(context, step)
    return checks.problem()


def _compile(context: Context, name: str, step: Callable[[], Tensor], problem: Problem) -> Tensor:
    """Run the first call of a compiled step, record its time and the generated code, and return the loss."""
    from torch._inductor.utils import run_and_get_code

    start = time.perf_counter()
    loss: Tensor
    loss, sources = run_and_get_code(step)
    if context.device == "cuda":
        torch.cuda.synchronize()
    context.record(
        f"{name}, compilation",
        seconds=rounded(time.perf_counter() - start),
        batch=problem.batch_size,
        cache_misses=counters["inductor"]["fxgraph_cache_miss"],
        cache_hits=counters["inductor"]["fxgraph_cache_hit"],
    )
    if sources:
        text = "\n\n# ---- another graph ----\n\n".join(sources)
        atomic_write(context.folder / "inductor_code.py.txt", text)
        context.record(f"{name}, generated code", answers=inductor.analyze(sources)["answers"])
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


def _kernels(context: Context, step: ByolFastStep) -> None:
    """Record the kernels of a step by name and by family, the longest first."""
    kernels = kernel_times(context, step)
    atomic_write(context.folder / "kernels.json", json.dumps(kernels, indent=1) + "\n")
    families: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        family = families.setdefault(kernel["family"], {"launches": 0, "ms": 0.0})
        family["launches"] += kernel["launches"]
        family["ms"] += kernel["ms"]
    total = {"launches": sum(k["launches"] for k in kernels), "ms": sum(k["ms"] for k in kernels)}
    for name, family in [("all", total), *sorted(families.items(), key=lambda item: -item[1]["ms"])]:
        context.record(f"kernels: {name}", launches=family["launches"], ms=rounded(family["ms"]))
    for number, kernel in enumerate(kernels[:NUM_LISTED], 1):
        context.record(
            f"kernel {number}", name=kernel["kernel"][:120], launches=kernel["launches"], ms=rounded(kernel["ms"])
        )


def kernel_times(context: Context, step: Callable[[], object]) -> list[dict[str, Any]]:
    """Kernels of a step by name, on a CPU operators: launches, milliseconds and family.

    Args:
        context: of the item.
        step: callable that has run before.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels: dict[str, dict[str, Any]] = {}
    for event in trace.events() or []:
        if str(event.device_type).endswith("CUDA") == on_gpu:
            family = family_of(event.name, on_gpu=on_gpu)
            entry = kernels.setdefault(event.name, {"kernel": event.name, "family": family, "launches": 0, "ms": 0.0})
            entry["launches"] += 1
            entry["ms"] += event.time_range.elapsed_us() / 1e3
    return sorted(kernels.values(), key=lambda entry: -entry["ms"])


def baseline_compiled(context: Context) -> str | None:
    """Time the baseline under torch.compile."""
    checks, problem = Checks(context), resnet50(context, BATCH)
    expected = _baseline(problem)()
    free(context)
    baseline = _baseline(problem)
    baseline.forward = compiled_function(context, baseline.loss)
    flags = set_flags()
    loss = _compile(context, "baseline", baseline, problem)
    checks("loss of the first step, compiled and eager", relative_error([loss], [expected]), BF16_LOSS)
    _steps(context, "baseline, torch.compile", baseline, problem, flags)
    return checks.problem()
