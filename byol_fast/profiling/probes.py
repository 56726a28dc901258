"""Experiments on the step of a run: speed with another batch size, precision or threads, and host synchronizations."""

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
from byol_fast.training.train_step import TrainStep
from byol_fast.utils import env
from byol_fast.utils.precision import Precision
from byol_fast.utils.telemetry import Telemetry, other_cores

ROUNDS = 5
"""Minimum number of interleaved rounds; the fastest of each case counts, because interference only slows it down."""
CALM_ROUNDS, IMPROVEMENT = 3, 0.02
"""More rounds follow until this many in a row have not improved any case by this share."""
MAX_ROUNDS = 20
BUDGET = 20.0
"""Seconds after which an experiment starts no further round."""
CPU_BATCH = 128
"""Batches of at least this many images are not tested as tiny on a CPU."""
_TORCH = str(Path(torch.__file__).parent)
_PACKAGES = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "kernels"))


class _SyncRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the places in the code that read a value from the device and so wait for it."""

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
    """Innermost line of code outside torch."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith((_TORCH, "<")):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return "unknown"


def host_syncs(step: TrainStep, one_step: Callable[[], None]) -> list[dict[str, Any]]:
    """Places where a step waits for a value of the device.

    On a CPU those of this package are left out: it reads values there because that is free, and does not on a GPU.

    Args:
        step: runs eagerly in the meantime, so that all operators are visible.
        one_step: a whole step with its callbacks.

    Returns:
        `place` (file, line, function) and `per_step`, the number of times.
    """
    recorder = _SyncRecorder()
    with _eager(step), recorder:
        one_step()
    on_cpu = step.device.type == "cpu"
    places = {place: n for place, n in recorder.places.items() if not (on_cpu and place.startswith(_PACKAGES))}
    return [{"place": place, "per_step": n} for place, n in sorted(places.items(), key=lambda item: -item[1])]


def double_batch(step: TrainStep, views: Sequence[Tensor]) -> float | None:
    """Time per image over that in a batch twice as large; None if that does not fit in memory or was not tested.

    Args:
        step: timed as a whole: forward, backward, update.
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
            single, double = _interleaved([with_batch(1), with_batch(2)], step.device)
    except torch.OutOfMemoryError:
        return None
    return 2 * single / double


def in_bf16(step: TrainStep, views: Sequence[Tensor], *, images: int) -> float | None:
    """Time of a forward and backward pass over its time in bf16; None if bf16 is used already, or not in hardware.

    Args:
        step: its networks are timed.
        views: of a batch, each `[B, 3, H, W]`.
        images: number of images of the batch to use.
    """
    on_gpu = step.device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else env.cpu_has_bf16()
    if not has_bf16 or step.precision.name in {"bf16", "fp16"}:
        return None
    precision, part = step.precision, step.to_device([view[:images] for view in views])

    def passes(precision: Precision) -> Callable[[], object]:
        def work() -> None:
            step.precision = precision
            step.forward_backward(part)
            step.optimizer.zero_grad(set_to_none=True)

        return work

    try:
        with _eager(step):
            current, bf16 = _interleaved([passes(precision), passes(Precision("bf16", torch.bfloat16))], step.device)
    finally:
        step.precision = precision
    return current / bf16


def on_all_cores(step: TrainStep, views: Sequence[Tensor], *, images: int) -> dict[str, float] | None:
    """Speed-up by more threads of torch on a CPU; None if there are no more cores, and on a GPU.

    Hyperthreads of one core gain little: half as many threads as cores, torch's default, are enough.

    Args:
        step: its networks are timed, forward and backward.
        views: of a batch, each `[B, 3, H, W]`.
        images: number of images of the batch to use.

    Returns:
        `gain`, least time with the current threads over that on all cores, and `others`, cores kept busy by other
        processes in the meantime, which make the gain unreliable.
    """
    threads, cores = torch.get_num_threads(), env.num_cpus()
    if step.device.type != "cpu" or not (threads == 1 < cores or 2 * threads < cores):
        return None
    part = step.to_device([view[:images] for view in views])
    best, first_start = {threads: math.inf, cores: math.inf}, time.perf_counter()
    with Telemetry(step.device) as telemetry, _eager(step):
        try:
            for completed in range(ROUNDS):
                if completed > 1 and time.perf_counter() - first_start > BUDGET:
                    break
                for num_threads in (threads, cores):
                    torch.set_num_threads(num_threads)
                    start = time.perf_counter()
                    step.forward_backward(part)
                    best[num_threads] = min(best[num_threads], time.perf_counter() - start)
                    step.optimizer.zero_grad(set_to_none=True)
        finally:
            torch.set_num_threads(threads)
    return {"gain": best[threads] / best[cores], "others": other_cores(telemetry.record(1))}


def _eager(step: TrainStep) -> AbstractContextManager[None]:
    """Context in which the step runs uncompiled, because compiling it for an experiment would take minutes."""
    return step.without_cuda_graph(forward=step.model.forward_train)


def _interleaved(cases: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Least seconds of each case.

    On a CPU, CPU time of the process on one thread, which excludes other processes and threads that wait for each
    other.
    """
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    best = [math.inf for _ in cases]
    threads, first_start = torch.get_num_threads(), time.perf_counter()
    if not cuda:
        torch.set_num_threads(1)
    try:
        num_calm = 0
        for number in range(MAX_ROUNDS):
            previous = list(best)
            for i, case in enumerate(cases):
                start = clock()
                case()
                if cuda:
                    torch.cuda.synchronize(device)
                best[i] = min(best[i], clock() - start)
            improved = any(new < (1 - IMPROVEMENT) * old for new, old in zip(best, previous, strict=True))
            num_calm = 0 if improved else num_calm + 1
            if (number + 1 >= ROUNDS and num_calm >= CALM_ROUNDS) or (
                number and time.perf_counter() - first_start > BUDGET
            ):
                break
    finally:
        torch.set_num_threads(threads)
    return best
