"""The CUDA stream on which batches are augmented beside the training steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from byol_fast.data.batch import Views


class AugmentStream:
    """A CUDA stream of its own for the augmentation, which then overlaps with earlier training steps; a CPU has none.

    The host launches work and runs ahead of the GPU: while the GPU computes earlier steps, this stream computes the
    views of the next. The current stream waits for them. Of the steps before, at most `max_ahead` may be unfinished:
    the host waits for older ones, because running further ahead would fill the memory with batches.

    Args:
        device: where the views are computed.
        max_ahead: largest number of unfinished steps.
    """

    gpu_wait_seconds: float = 0.0
    """Time in which the host has waited for steps on the GPU."""

    def __init__(self, device: torch.device, max_ahead: int) -> None:
        self.device, self._max_ahead = device, max_ahead
        self._stream: torch.cuda.Stream | None = None
        self._finished: deque[torch.cuda.Event] = deque()

    def __call__(self, compute: Callable[[], Views]) -> Views:
        """Result of `compute`, which launches its work on the current stream."""
        if self.device.type != "cuda":
            return compute()
        current = torch.cuda.current_stream(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._wait_for_old_steps(current)
        with torch.cuda.stream(self._stream):
            views = compute()
        current.wait_stream(self._stream)
        for view in views:
            view.record_stream(current)  # its memory is not given to the next batch while a step reads it
        return views

    def _wait_for_old_steps(self, current: torch.cuda.Stream) -> None:
        finished = torch.cuda.Event()  # type: ignore[no-untyped-call]
        finished.record(current)  # behind the step that was launched last
        self._finished.append(finished)
        if len(self._finished) > self._max_ahead:
            begin = time.perf_counter()
            self._finished.popleft().synchronize()
            self.gpu_wait_seconds += time.perf_counter() - begin
