"""The comparison of a dataset's items read by one thread and by several: its cost, and what it leaves behind."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from byol_fast.data import open_source
from byol_fast.data.sources import thread_safety
from tests.data.test_datasets import PICTURES, Indexed


def test_slow_dataset_is_compared_by_few_items(monkeypatch: Any) -> None:
    """One that takes longer than allowed for its first item: two items, each twice alone and four times by threads."""
    monkeypatch.setattr(thread_safety, "MAX_SECONDS", 0.0)
    reads: list[int] = []

    def item(i: int) -> Any:
        reads.append(i)
        return PICTURES[i]

    open_source(Indexed(item, len(PICTURES))).check_thread_safety(2)
    assert len(set(reads[1:])) == 2 and len(reads) == 1 + 2 * 2 + 2 * 4  # the first one is that of open_source


def test_debugger_goes_on_behind_the_comparison() -> None:
    source = open_source(Indexed(lambda i: PICTURES[i], len(PICTURES)))
    before = sys.gettrace()
    traced: set[tuple[str, str]] = set()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        traced.add((threading.current_thread().name.partition("_")[0], frame.f_code.co_name))
        return None

    threading.settrace(trace)
    try:
        source.check_thread_safety(2)
    finally:
        threading.settrace(before)
    assert ("byol-fast-compare", "_load") in traced and sys.gettrace() is before


def test_interrupted_comparison_leaves_no_thread_waiting(monkeypatch: Any) -> None:
    """Ctrl-C while the threads are started: those that run wait for all others."""

    class Interrupted(ThreadPoolExecutor):
        num_submitted = 0

        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            self.num_submitted += 1
            if self.num_submitted == 3:
                raise KeyboardInterrupt
            return super().submit(*args, **kwargs)

    interval = sys.getswitchinterval()
    monkeypatch.setattr(thread_safety, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source(Indexed(lambda i: PICTURES[i], len(PICTURES))).check_thread_safety(2)
    assert sys.getswitchinterval() == interval
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("byol-fast-compare")]
