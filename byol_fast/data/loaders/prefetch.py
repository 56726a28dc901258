"""Work ahead of the training step: threads, and a CUDA stream of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from byol_fast.data.augment import Views


def single_core_threads(number: int, name: str) -> ThreadPoolExecutor:
    """Threads in each of which torch's operators run on one core.

    Otherwise each of them would wake a team of as many threads as there are cores.
    """
    started = threading.Barrier(number + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that begin from now on
        torch.get_num_threads()  # holds on to it
        started.wait()

    pool = ThreadPoolExecutor(number, name, initializer=begin)
    before = torch.get_num_threads()
    try:
        for _ in range(number):
            pool.submit(int)  # starts a thread: all before it are waiting
        started.wait()
    finally:
        torch.set_num_threads(before)
    return pool


class SideStream:
    """Makes views beside the step: on a GPU in a stream of its own, on a CPU as it comes.

    What it hands out is ready for whoever works on the current stream. The host waits for nothing but that the step
    before the last few has ended: running further ahead would fill the memory with batches.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        self.device, self._ahead = device, ahead
        self._stream: torch.cuda.Stream | None = None
        self._steps: deque[torch.cuda.Event] = deque()

    def __call__(self, make: Callable[[], Views]) -> Views:
        """Call `make`, which starts the work for two views on the current stream."""
        if self.device.type != "cuda":
            return make()
        current = torch.cuda.current_stream(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._wait_for_old_steps(current)
        with torch.cuda.stream(self._stream):
            views = make()
        current.wait_stream(self._stream)
        for view in views:
            view.record_stream(current)  # its memory is not given to the next batch while a step reads it
        return views

    def _wait_for_old_steps(self, current: torch.cuda.Stream) -> None:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(current)
        self._steps.append(done)
        if len(self._steps) > self._ahead:
            self._steps.popleft().synchronize()
