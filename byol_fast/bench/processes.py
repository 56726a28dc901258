"""Candidates in separate processes, so that they do not share memory, threads or settings."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byol_fast.bench.flags import BackendFlags
from byol_fast.bench.timing import Timing
from byol_fast.utils.errors import reason
from byol_fast.utils.progress import current


@dataclass(frozen=True, kw_only=True)
class Job:
    """A candidate as a picklable description."""

    factory: str
    """`"module:function"`: called with the arguments in the process, it returns the callable to time."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Measurement:
    """Cost of a candidate's calls."""

    cpu: list[float] = field(default_factory=list)
    """CPU seconds of each call, over all threads of the process."""
    wall: list[float] = field(default_factory=list)
    """Wall-clock seconds of each call."""
    extras: dict[str, Any] = field(default_factory=dict)
    """`peak_gib`, the `flags` after the last call, and the callable's attribute `extras` if it has one."""
    failure: str = ""
    """Reason why the candidate was dropped; empty otherwise."""

    def timing(self, *, wall: bool) -> Timing:
        """Timing of the counted rounds."""
        return Timing(tuple(self.wall if wall else self.cpu))


def measure(
    jobs: Mapping[str, Job],
    *,
    rounds: int,
    warmup: int,
    threads: int,
    device: torch.device,
    timeout_s: float | None = None,
    description: str = "timing",
) -> dict[str, Measurement]:
    """Call every candidate once per round, one after the other.

    A candidate that raises is dropped, with the reason.

    Args:
        jobs: candidates by name.
        rounds: rounds that are counted.
        warmup: rounds before them.
        threads: of each process; 0 for torch's default.
        device: of the candidates. On a GPU, cached memory is released after each call.
        timeout_s: longest time of a call in seconds, compilation included; None for no limit.
        description: text of the progress bar.
    """
    results = {name: Measurement() for name in jobs}
    bar = current().bar((warmup + rounds) * len(jobs), description, unit="calls")
    with bar, _processes(jobs, threads, device) as workers:
        for name in list(workers):
            bar.update(0, f"{name}: starting")
            _receive(workers, name, results[name], timeout_s)
        for number in range(warmup + rounds):
            for name, worker in list(workers.items()):
                bar.update(bar.done, name)
                worker.pipe.send(True)
                reply = _receive(workers, name, results[name], timeout_s)
                bar.add(1)
                if reply is not None and number >= warmup:
                    results[name].cpu.append(reply[0])
                    results[name].wall.append(reply[1])
        for name, worker in list(workers.items()):
            worker.pipe.send(False)
            results[name].extras |= _receive(workers, name, results[name], timeout_s) or {}
    for measurement in results.values():
        if measurement.failure:
            measurement.cpu.clear()
            measurement.wall.clear()
    return results


class _Worker(NamedTuple):
    pipe: Connection
    process: Any


def _receive(workers: dict[str, _Worker], name: str, measurement: Measurement, timeout_s: float | None) -> Any:
    pipe, process = workers[name]
    try:
        if pipe.poll(timeout_s):
            kind, value = pipe.recv()
        else:
            kind, value = "failed", f"no answer within {timeout_s:.0f} s"
            process.kill()  # or it would slow down the others
    except (EOFError, ConnectionError):
        kind, value = "failed", "its process ended"
    if kind == "failed":
        measurement.failure = value
        del workers[name]
        return None
    return value


def _context() -> Any:
    """Forkserver that has imported torch already, which takes seconds; spawn where there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "byol_fast.bench.candidates"])
    return context


@contextmanager
def _processes(jobs: Mapping[str, Job], threads: int, device: torch.device) -> Iterator[dict[str, _Worker]]:
    context = _context()
    before = os.environ.get("OMP_NUM_THREADS")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    processes, workers = [], {}
    try:
        for name, job in jobs.items():
            parent, child = context.Pipe()
            # Not daemonic: a loader may start processes of its own.
            processes.append(context.Process(target=_serve, args=(child, job, threads, str(device))))
            processes[-1].start()
            child.close()
            workers[name] = _Worker(parent, processes[-1])
        yield workers
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection, job: Job, threads: int, device_name: str) -> None:
    """Body of a process: send the cost of a call for each request; at the end, the extras."""
    device = torch.device(device_name)
    try:
        if threads:
            torch.set_num_threads(threads)
        module, _, function = job.factory.partition(":")
        factory: Callable[..., Callable[[], object]] = getattr(importlib.import_module(module), function)
        call = factory(**job.arguments)
        pipe.send(("ready", None))
        while pipe.recv():
            pipe.send(("done", _timed(call, device)))
        extras = {"peak_gib": _peak_gib(device), "flags": str(BackendFlags.current())}
        pipe.send(("finished", extras | getattr(call, "extras", {})))
    except (EOFError, ConnectionError):  # the parent has closed the pipe
        return
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(("failed", f"{reason(error)} ({Path(last.filename).name}:{last.lineno})"))


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    cost = time.process_time() - cpu, time.perf_counter() - wall
    if cuda:  # release cached memory for the next candidate
        gc.collect()
        torch.cuda.empty_cache()
    return cost


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        # getrusage would include the parent's memory before the fork.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        return float("nan")
