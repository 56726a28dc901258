"""What items share: sizes, checks of values, equal backend flags, and byol_fast's step in its modes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.item import Context
from byol_fast.bench.networks import Ours, Problem
from byol_fast.capture import CapturedStep, Mode, compiled
from byol_fast.methods import SelfSupervisedTask
from byol_fast.step import Forward

P = ParamSpec("P")
T = TypeVar("T")
StepMode = Literal["eager", "compile", "graph"]

ROOT = Path(__file__).parents[3]

DRY = os.environ.get("BYOL_FAST_DRY") == "1"
"""A dry run: the CUDA runtime does nothing, so values mean nothing and device memory is the host's."""


def is_small(context: Context) -> bool:
    """Whether tiny sizes are wanted."""
    return context.rehearsal or DRY


def check(context: Context, what: str, error: float, bound: float, **values: Any) -> bool:
    """Record an error beside its bound.

    Args:
        context: of the item.
        what: was compared with what.
        error: that was found; NaN is too large.
        bound: that it must not exceed.
        **values: to be recorded besides.

    Returns:
        Whether the error is within the bound; in a dry run, True.
    """
    ok = bool(error <= bound)
    context.record(f"check: {what}", ok=ok, error=float(f"{error:.3g}"), bound=float(f"{bound:.3g}"), **values)
    return ok or DRY


@contextmanager
def values_matter(context: Context, what: str) -> Iterator[None]:
    """Within this an error may be due to values: in a dry run, where they mean nothing, it is recorded and passed over.

    Args:
        context: of the item.
        what: is done.
    """
    try:
        yield
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if not DRY:
            raise
        context.record(f"check: {what}", ok=False, error=f"{type(error).__name__}: {error}"[:200])


def backend_flags(*, cudnn_benchmark: bool = False, deterministic: bool = False) -> dict[str, bool]:
    """Set torch's backend flags, the same for every candidate, and say what they are now.

    TF32 is allowed for matrix products and convolutions. To be called after candidates were made: some set flags.

    Args:
        cudnn_benchmark: let cuDNN try its algorithms.
        deterministic: let cuDNN take only algorithms that repeat bit for bit.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.deterministic = deterministic
    return {
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


# ------------------------------------------------------------------------------------------------ problems


class SmallResidualNetwork(nn.Module):
    """Three convolutions with batch norm, the last two around a residual: `[B, 3, S, S]` to `[B, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        return F.relu(x + y).mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class SmallProblem(Problem):
    """A problem with the small network as encoder."""

    image_size: int = 32
    batch_size: int = 4
    hidden_dim: int = 32
    projection_dim: int = 16

    def new_encoder(self) -> nn.Module:
        """The small network."""
        return SmallResidualNetwork()


def resnet50(context: Context, batch_size: int) -> Problem:
    """ResNet-50 at 224 px with the paper's heads; with tiny sizes the small network."""
    if is_small(context):
        return SmallProblem(device=context.device)
    return Problem(encoder="resnet50", image_size=224, batch_size=batch_size, device=context.device)


def resnet18(context: Context, batch_size: int) -> Problem:
    """ResNet-18 at 32 px with CIFAR's stem and the recipe's heads; with tiny sizes the small network."""
    if is_small(context):
        return SmallProblem(device=context.device)
    return Problem(encoder="resnet18", cifar_stem=True, image_size=32, batch_size=batch_size, device=context.device)


# ------------------------------------------------------------------------------------------------ byol_fast's step


def byol_fast_step(context: Context, problem: Problem, mode: StepMode = "eager", **options: Any) -> Ours:
    """byol_fast's step in bf16; what is compiled compiles at the first call.

    Args:
        context: of the item.
        problem: what to do.
        mode: of the step.
        **options: of `Ours`.
    """
    step = Ours(problem, **{"precision": "bf16", "memory": False, "small_maps": False, **options})
    if mode != "eager":
        step.step.forward = compiled_forward(context, step.task)
    if mode == "graph":
        capture(context, step)
    return step


def compiled_forward(context: Context, task: SelfSupervisedTask) -> Forward:
    """The forward pass as plain inductor compiles it, or on a CPU traced."""
    if context.device == "cpu":
        return compiled_function(context, task.training_output)
    return compiled(task, Mode("compile", "plain inductor"))


def compiled_function(context: Context, function: Callable[P, T]) -> Callable[P, T]:
    """A function under `torch.compile`; on a CPU it is traced and not generated, which takes minutes."""
    backend = "aot_eager" if context.device == "cpu" else "inductor"
    return torch.compile(function, dynamic=False, backend=backend)


def capture(context: Context, step: Ours) -> None:
    """Let a step's next call capture all of it as one CUDA graph; on a CPU nothing changes."""
    if context.device == "cuda":
        step.step.run = CapturedStep(step.step)


# ------------------------------------------------------------------------------------------------ memory


def free(context: Context) -> None:
    """Give unused memory back to the device, so that the next candidate's peak is its own."""
    gc.collect()
    if context.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def allocated(context: Context) -> int:
    """Bytes of GPU memory that tensors take now."""
    return torch.cuda.memory_allocated() if context.device == "cuda" else 0


def peak_gib(context: Context, work: Callable[[], object], before: int = 0) -> float | None:
    """Most GPU memory that tensors took at once during some work, in GiB; None on a CPU.

    Args:
        context: of the item.
        work: to be done.
        before: bytes that others had allocated, which do not count.
    """
    if context.device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 distance of two lists of tensors, each taken as one long vector; NaN where either has one."""
    a, b = (torch.cat([t.detach().double().cpu().flatten() for t in tensors]) for tensors in (found, expected))
    distance = float((a - b).norm())
    return distance if distance == 0.0 else distance / max(float(b.norm()), 1e-30)
