"""Shared by the items: sizes, checks of values, equal backend flags, and byol_fast's step in its modes."""

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
from byol_fast.bench.flags import BackendFlags
from byol_fast.bench.networks import Ours, Problem
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
"""A dry run: the CUDA runtime does nothing, so values mean nothing and device memory is the host's."""


def is_small(context: Context) -> bool:
    """True in a rehearsal and in a dry run: tiny sizes."""
    return context.rehearsal or DRY


class Checks(list[str]):
    """Comparisons of values, recorded as they are made; a list of those that failed.

    Args:
        context: of the item.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context

    def __call__(self, what: str, error: float, bound: float, **values: Any) -> bool:
        """Record an error beside its bound.

        Args:
            what: was compared with what.
            error: that was found; NaN is too large.
            bound: that it must not exceed.
            **values: to be recorded besides.

        Returns:
            Whether the error is within the bound; in a dry run, True.
        """
        ok = bool(error <= bound)
        figure = {"ok": ok, "error": float(f"{error:.3g}"), "bound": float(f"{bound:.3g}"), **values}
        self._context.record(f"check: {what}", **figure)
        if not (ok or DRY):
            self.append(f"{what}: error {error:.3g}, allowed {bound:.3g}")
        return ok or DRY

    def problem(self) -> str | None:
        """The checks that failed, in words; None where none did."""
        return f"failed checks: {'; '.join(self)}" if self else None


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


def same_flags(*, cudnn_benchmark: bool = False, deterministic: bool = False) -> dict[str, str]:
    """Set the backends' flags for all candidates, and say what they are: a value to be recorded.

    Args:
        cudnn_benchmark: let cuDNN try its algorithms.
        deterministic: let cuDNN take only algorithms that repeat bit for bit.
    """
    BackendFlags.of("bf16", cudnn_benchmark=cudnn_benchmark).apply()
    torch.backends.cudnn.deterministic = deterministic
    return {"flags": str(BackendFlags.in_force())}


# ------------------------------------------------------------------------------------------------ problems


@dataclass(frozen=True, kw_only=True)
class SmallProblem(Problem):
    """A problem with the small network as encoder."""

    image_size: int = 32
    batch_size: int = 4
    hidden_dim: int = 32
    projection_dim: int = 16

    def new_encoder(self) -> nn.Module:
        """The small network, without its classifier."""
        network = SmallResidualNetwork()
        network.add_module("fc", nn.Identity())
        # Its gradient is added up in no fixed order on a GPU, and steps are compared bit for bit.
        network.add_module("maxpool", nn.Identity())
        return network


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


def raw_views(problem: Problem) -> tuple[Tensor, Tensor]:
    """Two views `[B, 3, S, S]` as loaders hand them over: uint8, NHWC memory, on the device.

    Args:
        problem: of it batch and image size are used.
    """
    shape = (2, problem.batch_size, problem.image_size, problem.image_size, 3)
    views = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    view1, view2 = views.to(problem.device).permute(0, 1, 4, 2, 3)
    return view1, view2


def normalized_views(problem: Problem) -> tuple[Tensor, ...]:
    """The same as fp32, normalized: what the loops of guides and of other libraries get."""
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD).to(problem.device)
    return tuple(normalize(view) for view in raw_views(problem))


def link_copies(context: Context, photographs: Path) -> None:
    """Give each image of a folder fifteen more names: a batch needs as many. With tiny sizes a few images do.

    Args:
        context: of the item.
        photographs: folder of JPEG files.
    """
    for path in [] if is_small(context) else sorted(photographs.glob("*.jpg")):
        for number in range(15):
            os.link(path, photographs / f"{path.stem}-{number}.jpg")


# ------------------------------------------------------------------------------------------------ byol_fast's step


def byol_fast_step(context: Context, problem: Problem, mode: StepMode = "eager") -> Ours:
    """byol_fast's step in bf16, on uint8 views, which it normalizes; what is compiled compiles at the first call.

    Args:
        context: of the item.
        problem: what to do.
        mode: of the step.
    """
    step = Ours(problem, precision="bf16", memory=False, small_maps=False)
    step.batch = Batch(raw_views(problem), None, torch.arange(problem.batch_size))
    if mode != "eager":
        step.step.forward = compiled_forward(context, step.model)
    if mode == "graph":
        capture(context, step)
    return step


def compiled_forward(context: Context, model: SSLModel) -> Forward:
    """The forward pass as plain inductor compiles it, or on a CPU traced."""
    if context.device == "cpu":
        return compiled_function(context, model.forward_train)
    return compile_forward(model, Mode("compile", "plain inductor"))


def compiled_function(context: Context, function: Callable[P, T]) -> Callable[P, T]:
    """A function under `torch.compile`; on a CPU it is traced and not generated, which takes minutes."""
    backend = "aot_eager" if context.device == "cpu" else "inductor"
    return torch.compile(function, dynamic=False, backend=backend)


def capture(context: Context, step: Ours) -> None:
    """Let a step's next call capture all of it as one CUDA graph; on a CPU nothing changes."""
    if context.device == "cuda":
        step.step.use_cuda_graph()


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
