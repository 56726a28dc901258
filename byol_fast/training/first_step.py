"""Progress of a run's first step, in which torch.compile and the CUDA graph do their work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType

from byol_fast.training.mode import Mode
from byol_fast.utils.progress import Progress, ProgressBar

COMPILE_SECONDS = "about 90 s for a ResNet-50 on a GPU, less from the cache"
AUTOTUNE_SECONDS = "25-60 minutes for a ResNet-50"

# Stage, end of a file's path, and part of a function's name. While torch compiles, it is tracing, too: in this order.
_STAGES = (
    ("compiling", os.path.join("_inductor", "compile_fx.py"), "compile"),  # noqa: PTH118
    ("tracing", os.path.join("_dynamo", "convert_frame.py"), ""),  # noqa: PTH118
    ("warming up for the capture", os.path.join("training", "cuda_graph.py"), "_warm_up"),  # noqa: PTH118
    ("capturing", os.path.join("training", "cuda_graph.py"), "_capture"),  # noqa: PTH118
)


def current_stage() -> str:
    """Stage of a first step under way, by the functions that the threads of this process are in.

    The backward pass may be compiled in a thread of autograd. Nothing is added to the step itself.
    """
    functions = {f for frame in sys._current_frames().values() for f in _functions(frame)}
    for stage, file, name in _STAGES:
        if any(path.endswith(file) and name in function for path, function in functions):
            return stage
    return "running"


def first_step_bar(progress: Progress, mode: Mode, *, max_autotune: bool) -> AbstractContextManager[object]:
    """Progress of a first step that is compiled or captured; nothing in mode eager.

    Args:
        progress: the console.
        mode: of the run.
        max_autotune: see `Config.max_autotune`.
    """
    if mode.name == "eager":
        return nullcontext()
    return _StageBar(progress, None, "first step", note=AUTOTUNE_SECONDS if max_autotune else COMPILE_SECONDS)


class _StageBar(ProgressBar):
    """Shows the stage in place of a count."""

    @property
    def counts(self) -> str:
        """The stage."""
        return current_stage()


def _functions(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back
