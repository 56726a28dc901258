"""Threads of the loaders."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from byol_fast.config import ConfigError
from byol_fast.utils.env import num_cpus


def resolve_num_threads(num_threads: int) -> int:
    """`DataConfig.threads`, or the number of CPU cores that this process may use if that is 0."""
    return num_threads or num_cpus()


def single_core_threads(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Thread pool in which torch's operators run on one core each.

    Otherwise each of its threads would start a team of as many threads as there are cores.

    Raises:
        ConfigError: the system starts no more threads.
    """
    started = threading.Barrier(num_threads + 1)

    def initialize() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that start from now on
        torch.get_num_threads()  # fixes the number for this thread
        with contextlib.suppress(threading.BrokenBarrierError):
            started.wait()

    pool = ThreadPoolExecutor(num_threads, name, initializer=initialize)
    before = torch.get_num_threads()
    try:
        for _ in range(num_threads):
            pool.submit(int)  # starts a thread: all earlier ones are waiting
        started.wait()
    except RuntimeError as error:
        started.abort()  # those that wait for the others
        pool.shutdown()
        raise ConfigError(
            f"config: data.threads must be as many as the system can start, got {num_threads} ({error}); use fewer"
        ) from error
    finally:
        torch.set_num_threads(before)
    return pool
