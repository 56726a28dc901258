"""Shared by the tests marked `gpu`: the device, what each shows, and stand-ins for what a CPU has not.

`@pytest.mark.gpu("kernels")` names the capability that a test belongs to. With BYOL_FAST_REHEARSE=1 the same tests run
on the CPU: the same code, so that no minute on a GPU is spent on a typo. What has no counterpart there is replaced by
what comes nearest, or skipped with a reason that says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import pytest
import torch

T = TypeVar("T")

REHEARSING = os.environ.get("BYOL_FAST_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSING else "cuda"
NOT_HERE = None
"""Result of `launches` on a CPU."""


CAPABILITIES = {
    # kernels against float64, all dtypes
    "kernels": "kernels/byol_kernels/NAME/ of the test's file name; compute-sanitizer python3 -m pytest -m gpu TEST "
    "for a wrong address; a moving error is a race",
    # machine code of what really ran
    "sass": "registers, spills and widths in the message; python -m tests.kernels.sass prints what was expected; "
    "num_warps and maxnreg where the kernel is launched",
    # launches, host syncs, CUDA graphs of the kernels
    "launches": "the launcher of the kernel that is named; MultiTensorPlan.tables where a graph reads old addresses",
    # compiled and captured step equal to eager
    "step": "byol_fast/training/cuda_graph.py; with TORCH_LOGS=recompiles,graph_breaks; mode compile without graph "
    "tells whether inductor or the capture is to blame",
    # precisions, loaders, skipped steps, out of memory
    "training": "byol_fast/training/train_step.py and trainer.py; metrics.jsonl",
    "resume": "byol_fast/training/state.py; losses before and after the break in the message",
    # DALI's GPU pipeline and our kernels beside torchvision
    "parity": "the loader and the operator in the message; byol_fast/data/loaders/dali.py and report/view_check.py",
    # decoding under load
    "decode": "byol_fast/data/loaders/dali.py: a decoder that writes after its stream was said to be done; try "
    "hw_decoder_load 0, then fancy upsampling",
    # data that lies on the GPU
    "device_cache": "byol_fast/data/loaders/device_cache.py; byol_kernels/crop, augment_params",
    # one rank, NCCL
    "ddp": "byol_fast/training/distributed.py; NCCL_DEBUG=INFO; free space in /dev/shm",
    "knn": "byol_fast/evaluate/knn.py, where allow_tf32 changes similarities, and retrieval.py",
    # of what a GPU has trained
    "export": "byol_fast/export/",
}
"""Capabilities that tests marked gpu belong to, each with the place to begin when its tests fail."""


@contextmanager
def host_syncs_are_errors() -> Iterator[None]:
    """Anything that makes the host wait for the device raises. A CPU has nothing to wait for."""
    if REHEARSING:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronize() -> None:
    """Wait for the device."""
    if not REHEARSING:
        torch.cuda.synchronize()


def launches(call: Callable[[], Any]) -> list[str] | None:
    """Names of the kernels that a call starts on the GPU, copies of tables and fills included; on a CPU `NOT_HERE`."""
    call()
    if REHEARSING:
        return NOT_HERE
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() or [] if str(event.device_type).endswith("CUDA")]


def only_on_a_gpu(why: str) -> None:
    """Skip what a CPU cannot show."""
    if REHEARSING:
        pytest.skip(f"rehearsal: {why}")


@contextmanager
def aside() -> Iterator[None]:
    """A stream beside the current one, as a capture wants it for its warm-up."""
    if REHEARSING:
        yield
        return
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


class Captured(Generic[T]):
    """Work as a CUDA graph; on a CPU the same work, done anew at each replay.

    Args:
        work: must have run before, to warm up. Its result lies in memory that each replay overwrites.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: T | None = None
        if not REHEARSING:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = work()

    def replay(self) -> T:
        """Do the work once more; its result."""
        if REHEARSING:
            self._result = self._work()
        else:
            self._graph.replay()
        return self._result  # type: ignore[return-value]
