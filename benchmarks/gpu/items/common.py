"""Helpers of the items: sizes, checks of values, equal backend flags, and byol_fast's step in its modes."""

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

from benchmarks.gpu.item import Context
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.flags import BackendFlags
from byol_fast.bench.problem import Problem
from byol_fast.data import Batch
from byol_fast.models.base import IMAGENET_MEAN, IMAGENET_STD, SSLModel
from byol_fast.models.layers import Normalize
from byol_fast.training.mode import Mode, compile_forward
from byol_fast.training.train_step import Forward
from tests.networks import SmallResidualNetwork

P = ParamSpec("P")
T = TypeVar("T")
StepMode = Literal["eager", "compile", "graph"]

ROOT = Path(__file__).parents[3]

DRY = os.environ.get("BYOL_FAST_DRY") == "1"
"""A dry run: the CUDA runtime is a stub, so values mean nothing and device memory is host memory."""


def is_small(context: Context) -> bool:
    """True in a rehearsal and in a dry run: tiny sizes."""
    return context.rehearsal or DRY


class Checks(list[str]):
    """Records comparisons of values; the list holds those that failed.

    Args:
        context: of the item.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context

    def __call__(self, name: str, error: float, bound: float, **values: Any) -> bool:
        """Record an error and its bound.

        Args:
            name: of the comparison.
            error: of the values; NaN fails the check.
            bound: largest error that passes.
            **values: further values to record.

        Returns:
            True if the error is within the bound, and always in a dry run.
        """
        ok = bool(error <= bound)
        figure = {"ok": ok, "error": float(f"{error:.3g}"), "bound": float(f"{bound:.3g}"), **values}
        self._context.record(f"check: {name}", **figure)
        if not (ok or DRY):
            self.append(f"{name}: error {error:.3g}, allowed {bound:.3g}")
        return ok or DRY

    def problem(self) -> str | None:
        """The failed checks as text; None if all passed."""
        return f"failed checks: {'; '.join(self)}" if self else None


@contextmanager
def skip_value_errors(context: Context, name: str) -> Iterator[None]:
    """In a dry run, where values mean nothing, record an error that may be due to values and go on.

    Args:
        context: of the item.
        name: of the work.
    """
    try:
        yield
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if not DRY:
            raise
        context.record(f"check: {name}", ok=False, error=f"{type(error).__name__}: {error}"[:200])


def set_flags(*, cudnn_benchmark: bool = False, deterministic: bool = False) -> dict[str, str]:
    """Set the backend flags for all candidates and return them as a value to record.

    Args:
        cudnn_benchmark: let cuDNN time its algorithms.
        deterministic: restrict cuDNN to deterministic algorithms.
    """
    BackendFlags.of("bf16", cudnn_benchmark=cudnn_benchmark).apply()
    torch.backends.cudnn.deterministic = deterministic
    return {"flags": str(BackendFlags.current())}


# ------------------------------------------------------------------------------------------------ problems


@dataclass(frozen=True, kw_only=True)
class SmallProblem(Problem):
    """A problem with a small residual network as encoder."""

    image_size: int = 32
    batch_size: int = 4
    hidden_dim: int = 32
    projection_dim: int = 16

    def build_encoder(self) -> nn.Module:
        """The small network, without its classifier."""
        network = SmallResidualNetwork()
        network.add_module("fc", nn.Identity())
        # Its gradient is summed in no fixed order on a GPU, and steps are compared bit for bit.
        network.add_module("maxpool", nn.Identity())
        return network


def resnet50(context: Context, batch_size: int) -> Problem:
    """ResNet-50 at 224 px with the paper's heads; the small network in rehearsals and dry runs."""
    if is_small(context):
        return SmallProblem(device=context.device)
    return Problem(encoder="resnet50", image_size=224, batch_size=batch_size, device=context.device)


def resnet18(context: Context, batch_size: int) -> Problem:
    """ResNet-18 at 32 px with CIFAR's stem and the recipe's heads; the small network in rehearsals and dry runs."""
    if is_small(context):
        return SmallProblem(device=context.device)
    return Problem(encoder="resnet18", cifar_stem=True, image_size=32, batch_size=batch_size, device=context.device)


def raw_views(problem: Problem) -> tuple[Tensor, Tensor]:
    """Two views `[B, 3, S, S]` as loaders return them: uint8, NHWC memory, on the device.

    Args:
        problem: batch size, image size and device.
    """
    shape = (2, problem.batch_size, problem.image_size, problem.image_size, 3)
    views = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    view1, view2 = views.to(problem.device).permute(0, 1, 4, 2, 3)
    return view1, view2


def normalized_views(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same views in fp32, normalized: the input of the baseline and of other libraries."""
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD).to(problem.device)
    view1, view2 = (normalize(view) for view in raw_views(problem))
    return view1, view2


def link_copies(context: Context, images: Path) -> None:
    """Link each file of a folder under fifteen more names, so that there are enough for a batch.

    Args:
        context: of the item; nothing is done for tiny sizes.
        images: folder of JPEG files.
    """
    for path in [] if is_small(context) else sorted(images.glob("*.jpg")):
        for number in range(15):
            os.link(path, images / f"{path.stem}-{number}.jpg")


# ------------------------------------------------------------------------------------------------ byol_fast's step


def byol_fast_step(context: Context, problem: Problem, mode: StepMode = "eager") -> ByolFastStep:
    """Step of byol_fast in bf16 on uint8 views, which it normalizes; compilation happens in the first call.

    Args:
        context: of the item.
        problem: networks, batch and device.
        mode: of the step.
    """
    step = ByolFastStep(problem, precision="bf16", memory=False, small_maps=False)
    step.batch = Batch(raw_views(problem), None, torch.arange(problem.batch_size))
    if mode != "eager":
        step.step.forward = compiled_forward(context, step.model)
    if mode == "graph":
        capture(context, step)
    return step


def compiled_forward(context: Context, model: SSLModel) -> Forward:
    """The forward pass compiled by inductor with default options; on a CPU it is traced only."""
    if context.device == "cpu":
        return compiled_function(context, model.forward_train)
    return compile_forward(model, Mode("compile", "plain inductor"))


def compiled_function(context: Context, function: Callable[P, T]) -> Callable[P, T]:
    """A function under `torch.compile`; on a CPU it is traced only, because code generation takes minutes."""
    backend = "aot_eager" if context.device == "cpu" else "inductor"
    return torch.compile(function, dynamic=False, backend=backend)


def capture(context: Context, step: ByolFastStep) -> None:
    """Capture the next call of a step as one CUDA graph; no effect on a CPU."""
    if context.device == "cuda":
        step.step.use_cuda_graph()


# ------------------------------------------------------------------------------------------------ memory


def free(context: Context) -> None:
    """Release cached memory, so that the peak of the next candidate is its own."""
    gc.collect()
    if context.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def allocated(context: Context) -> int:
    """Bytes of GPU memory in use by tensors; 0 on a CPU."""
    return torch.cuda.memory_allocated() if context.device == "cuda" else 0


def peak_gib(context: Context, work: Callable[[], object], before: int = 0) -> float | None:
    """Peak GPU memory of tensors during some work, in GiB; None on a CPU.

    Args:
        context: of the item.
        work: callable to run.
        before: bytes allocated before, which are subtracted.
    """
    if context.device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
