"""Comparison of the images that a dataset gives to one thread and to several at once."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

from byol_fast.data.errors import SourceError

NUM_COMPARED = 16
"""Largest number of items that are compared, and of threads that read them at once."""

MAX_SECONDS = 1.0
"""Seconds in which items are read alone. Of a slow dataset fewer are compared, but at least two."""

_NUM_READS = 2  # of each thread, as fast as it can, and again with interruptions
_SWITCH_INTERVAL = 1e-6  # seconds after which another thread gets its turn
_MAX_YIELDS = 1000  # of a thread; it reads on without interruptions
_DECODERS = {"PIL", "numpy", "torch", "torchvision"}  # packages that need no interruptions


def compare_threads(read: Callable[[int], bytes], items: Sequence[int], name_of: Callable[[int], str]) -> None:
    """Compare items of a dataset read by several threads at once with the same items read alone.

    Args:
        read: reads an item; an exception is a result like another.
        items: numbers of up to 16 items.
        name_of: returns the name of an item, for messages.

    Raises:
        SourceError: an item differs, if read by several threads at once, or from one time to the next.
    """
    items = list(itertools.islice(itertools.cycle(items), NUM_COMPARED))

    def result(item: int) -> bytes | None:
        try:
            return read(item)
        except Exception:  # of any type: the dataset is the user's code
            return None

    alone: list[bytes | None] = []
    start_time = time.monotonic()
    while len(alone) < 2 or (len(alone) < NUM_COMPARED and time.monotonic() - start_time < MAX_SECONDS):
        alone.append(result(items[len(alone)]))
    items = items[: len(alone)]
    for item, first in zip(items, alone, strict=True):
        if result(item) != first:
            raise SourceError(
                f"data: {name_of(item)} must be the same image each time it is read, got another one; leave random "
                "transforms out: byol_fast makes the views"
            )

    start = threading.Barrier(len(items))

    def find_different(k: int, interrupt: bool) -> list[int]:
        positions = [(k + j) % len(items) for j in range(_NUM_READS)]
        start.wait()
        trace = sys.gettrace()  # of this thread: that of a debugger or of coverage
        if interrupt:
            sys.settrace(_yield_to_others())
        try:
            return [items[j] for j in positions if result(items[j]) != alone[j]]
        finally:
            sys.settrace(trace)

    different: list[int] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        with ThreadPoolExecutor(len(items), "byol-fast-compare") as pool:
            try:
                for interrupt in (False, True):
                    for items_of_thread in pool.map(partial(find_different, interrupt=interrupt), range(len(items))):
                        different += items_of_thread
            finally:
                start.abort()  # after a KeyboardInterrupt, some threads may wait for others that were not started
    finally:
        sys.setswitchinterval(interval)
    if different:
        raise SourceError(
            f"data: {name_of(different[0])} must be the same image when several threads read the dataset at once, got "
            "another image or an error; open the dataset's file in every thread (threading.local) and not once for "
            "all, or set data.threads 1 (threads=1 in an evaluation)"
        )


def _yield_to_others() -> Callable[[FrameType, str, Any], Any]:
    """Trace function that lets other threads run before each instruction of Python.

    Reads that several calls make up (seek, then read) are then interrupted between them, not only once in a while.
    """
    remaining = _MAX_YIELDS

    def trace(frame: FrameType, event: str, arg: object) -> Callable[[FrameType, str, Any], Any] | None:
        nonlocal remaining
        if remaining == 0 or frame.f_globals.get("__name__", "").partition(".")[0] in _DECODERS:
            return None
        remaining -= 1
        frame.f_trace_opcodes = True
        time.sleep(_SWITCH_INTERVAL)
        return trace

    return trace
