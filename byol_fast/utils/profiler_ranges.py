"""Named ranges of a training step, for the profiler; without one they cost a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Phase = Literal[
    "data wait",
    "views",
    "online forward",
    "target forward",
    "loss",
    "backward",
    "optimizer + EMA",
    "metrics",
    "callbacks",
]
Mark = Callable[[str], AbstractContextManager[object]]
_mark: Mark | None = None


def record_range(name: Phase) -> AbstractContextManager[object]:
    """Range of a step under this name, recorded if a profiler is active."""
    # In this order: starting a profiler must not trigger a recompilation.
    if torch.compiler.is_compiling() or _mark is None:
        return nullcontext()
    return _mark(name)


@contextmanager
def marked(mark: Mark) -> Iterator[None]:
    """Enter the context manager `mark(name)` around every range inside the block."""
    global _mark  # noqa: PLW0603  (otherwise a profiler would be passed through all calls of the step)
    before, _mark = _mark, mark
    try:
        yield
    finally:
        _mark = before
