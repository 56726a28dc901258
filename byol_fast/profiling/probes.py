"""Small experiments on a run's own step: what another batch or precision would bring, and where the host waits."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.data.batch import Batch
from byol_fast.profiling.telemetry import Telemetry, others
from byol_fast.training.train_step import TrainStep
from byol_fast.utils import env
from byol_fast.utils.precision import Precision

ROUNDS = 5
"""Interleaved rounds of an experiment, of which the fastest of each side counts: everything else only slows it down."""
SETTLED = 3, 0.02
"""More follow until so many in a row were not this much faster than those before, on either side."""
MOST_ROUNDS = 20
BUDGET = 20.0
"""Seconds after which an experiment begins no further round."""
CPU_BATCH = 128
"""Batches of so many images are not tiny on a CPU."""
_TORCH = str(Path(torch.__file__).parent)
_OURS = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "kernels"))


class _Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes from where a value is fetched from the device, and so waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        to_host = name.startswith(("aten::_to_copy", "aten::copy_")) and _leaves_gpu(args, result)
        if name == "aten::_local_scalar_dense" or to_host:
            self.places[_caller()] += 1
        return result


def _leaves_gpu(args: Any, result: Any) -> bool:
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    return bool(isinstance(result, Tensor) and source.is_cuda and not result.is_cuda)


def _caller() -> str:
    """The innermost line of code that is not torch's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith((_TORCH, "<")):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return "unknown"


def host_syncs(step: TrainStep, one_step: Callable[[], None]) -> list[dict[str, Any]]:
    """Places where a step waits for a value of the device.

    On a CPU those of this package are left out: it asks there because asking is free, and not on a GPU.

    Args:
        step: run eagerly meanwhile, so that everything is seen.
        one_step: a whole step with its callbacks.

    Returns:
        `place` (file, line, function) and how often `a_step`.
    """
    seen = _Syncs()
    with _eager(step), seen:
        one_step()
    on_cpu = step.device.type == "cpu"
    kept = {place: n for place, n in seen.places.items() if not (on_cpu and place.startswith(_OURS))}
    return [{"place": place, "a_step": n} for place, n in sorted(kept.items(), key=lambda item: -item[1])]


def twice_the_batch(step: TrainStep, views: Sequence[Tensor]) -> float | None:
    """Time an image takes in a batch over its time in one twice as large; None where that does not fit or is not known.

    Args:
        step: whose whole body is timed: forward, backward, update.
        views: of a batch, each `[B, 3, H, W]`.
    """

    def with_batch(times: int) -> Callable[[], object]:
        repeated = step.to_device([view.repeat(times, 1, 1, 1) for view in views])
        batch = Batch(repeated, None, torch.arange(len(repeated[0])))
        return lambda: step([batch] * step.grad_accum_steps, 0)

    if step.device.type == "cpu" and len(views[0]) >= CPU_BATCH:
        return None
    try:
        with _eager(step):
            once, twice = _interleaved([with_batch(1), with_batch(2)], step.device)
    except torch.OutOfMemoryError:
        return None
    return 2 * once / twice


def in_bf16(step: TrainStep, views: Sequence[Tensor], *, images: int) -> float | None:
    """Time of a forward and backward pass over its time in bf16; None where bf16 is used already, or is not fast here.

    Args:
        step: whose networks are timed.
        views: of a batch, each `[B, 3, H, W]`.
        images: how many of the batch to take.
    """
    on_gpu = step.device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else env.cpu_has_bf16()
    if not fast or step.precision.name in {"bf16", "fp16"}:
        return None
    before, part = step.precision, step.to_device([view[:images] for view in views])

    def passes(precision: Precision) -> Callable[[], object]:
        def work() -> None:
            step.precision = precision
            step.forward_backward(part)
            step.optimizer.zero_grad(set_to_none=True)

        return work

    try:
        with _eager(step):
            now, then = _interleaved([passes(before), passes(Precision("bf16", torch.bfloat16))], step.device)
    finally:
        step.precision = before
    return now / then


def on_all_cores(step: TrainStep, views: Sequence[Tensor], *, images: int) -> dict[str, float] | None:
    """What more threads of torch would bring on a CPU; None where there is none to spare, and on a GPU.

    Hyperthreads of one core gain little: half as many threads as cores, as torch takes by itself, are enough.

    Args:
        step: whose networks are timed, forward and backward.
        views: of a batch, each `[B, 3, H, W]`.
        images: how many of the batch to take.

    Returns:
        `gain`, least time now over that on all cores, and `others`, cores that other processes kept busy meanwhile:
        with these the gain says little.
    """
    threads, cores = torch.get_num_threads(), env.num_cpus()
    if step.device.type != "cpu" or not (threads == 1 < cores or 2 * threads < cores):
        return None
    part = step.to_device([view[:images] for view in views])
    best = {threads: math.inf, cores: math.inf}
    with Telemetry(step.device) as telemetry, _eager(step):
        try:
            for _ in range(ROUNDS):
                for number in (threads, cores):
                    torch.set_num_threads(number)
                    begin = time.perf_counter()
                    step.forward_backward(part)
                    best[number] = min(best[number], time.perf_counter() - begin)
                    step.optimizer.zero_grad(set_to_none=True)
        finally:
            torch.set_num_threads(threads)
    return {"gain": best[threads] / best[cores], "others": others(telemetry.record(1))}


def _eager(step: TrainStep) -> AbstractContextManager[None]:
    """Within this, the step runs uncompiled: compiling it for an experiment would take minutes."""
    return step.without_cuda_graph(forward=step.model.forward_train)


def _interleaved(cases: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Least seconds of each case.

    On a CPU of the process's own time, on one thread: other processes do not count in it, nor threads that wait for
    each other.
    """
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    best = [math.inf for _ in cases]
    threads, began = torch.get_num_threads(), time.perf_counter()
    if not cuda:
        torch.set_num_threads(1)
    try:
        calm, (enough, faster) = 0, SETTLED
        for number in range(MOST_ROUNDS):
            before = list(best)
            for place, case in enumerate(cases):
                begin = clock()
                case()
                if cuda:
                    torch.cuda.synchronize(device)
                best[place] = min(best[place], clock() - begin)
            improved = any(now < (1 - faster) * then for now, then in zip(best, before, strict=True))
            calm = 0 if improved else calm + 1
            if (number + 1 >= ROUNDS and calm >= enough) or (number and time.perf_counter() - began > BUDGET):
                break
    finally:
        torch.set_num_threads(threads)
    return best
