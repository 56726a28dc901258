"""Contenders in processes of their own: nobody meets another's memory, threads or settings."""

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

Maker = str
"""`"module:function"`; called with keyword arguments in the process, it returns what is timed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A contender as its process needs it: nothing but values."""

    maker: Maker
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Measured:
    """What a contender's calls cost."""

    cpu: list[float] = field(default_factory=list)
    """Seconds of all its process's threads."""
    wall: list[float] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    """`peak_gib`, the `flags` in force after its last call, and what it says of itself in an attribute `extras`."""
    failure: str = ""
    """Why it was left out."""

    def timing(self, *, wall: bool) -> Timing:
        """Its rounds."""
        return Timing(tuple(self.wall if wall else self.cpu))


def measure(
    jobs: Mapping[str, Job],
    *,
    rounds: int,
    warmup: int,
    threads: int,
    device: torch.device,
    patience: float | None = None,
) -> dict[str, Measured]:
    """One call of every contender a round, one contender at a time.

    A contender that raises is left out from there on, with the reason.

    Args:
        jobs: name and how to make it.
        rounds: that count.
        warmup: rounds before.
        threads: of each process; 0 leaves torch's choice.
        device: where they work. On a GPU memory that a contender has freed is given back after each of its calls.
        patience: seconds that a call may take, the first with all that it compiles.
    """
    results = {name: Measured() for name in jobs}
    with _processes(jobs, threads, device) as contenders:
        for name in list(contenders):
            _answer(contenders, name, results[name], patience)
        for number in range(warmup + rounds):
            for name, contender in list(contenders.items()):
                contender.pipe.send(True)
                answer = _answer(contenders, name, results[name], patience)
                if answer is not None and number >= warmup:
                    results[name].cpu.append(answer[0])
                    results[name].wall.append(answer[1])
        for name, contender in list(contenders.items()):
            contender.pipe.send(False)
            results[name].extras |= _answer(contenders, name, results[name], patience) or {}
    for measured in results.values():
        if measured.failure:
            measured.cpu.clear()
            measured.wall.clear()
    return results


class _Contender(NamedTuple):
    pipe: Connection
    process: Any


def _answer(contenders: dict[str, _Contender], name: str, measured: Measured, patience: float | None) -> Any:
    pipe, process = contenders[name]
    try:
        if pipe.poll(patience):
            kind, value = pipe.recv()
        else:
            kind, value = "failed", f"no answer within {patience:.0f} s"
            process.kill()  # it must not go on working beside the others
    except (EOFError, ConnectionError):
        kind, value = "failed", "its process ended"
    if kind == "failed":
        measured.failure = value
        del contenders[name]
        return None
    return value


def _context() -> Any:
    """Processes forked from one that has imported torch and nothing else: importing it takes seconds each time."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "byol_fast.bench.networks"])
    return context


@contextmanager
def _processes(jobs: Mapping[str, Job], threads: int, device: torch.device) -> Iterator[dict[str, _Contender]]:
    context = _context()
    before = os.environ.get("OMP_NUM_THREADS")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    processes, contenders = [], {}
    try:
        for name, job in jobs.items():
            ours, theirs = context.Pipe()
            # Not daemonic: a loader may want processes of its own.
            processes.append(context.Process(target=_serve, args=(theirs, job, threads, str(device))))
            processes[-1].start()
            theirs.close()
            contenders[name] = _Contender(ours, processes[-1])
        yield contenders
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
    """A contender's process: make a call whenever told to, say what it cost; in the end what else is known."""
    device = torch.device(device_name)
    try:
        if threads:
            torch.set_num_threads(threads)
        module, _, function = job.maker.partition(":")
        make: Callable[..., Callable[[], object]] = getattr(importlib.import_module(module), function)
        call = make(**job.arguments)
        pipe.send(("ready", None))
        while pipe.recv():
            pipe.send(("done", _timed(call, device)))
        known = {"peak_gib": _peak_gib(device), "flags": str(BackendFlags.in_force())}
        pipe.send(("over", known | getattr(call, "extras", {})))
    except (EOFError, ConnectionError):  # nobody listens any more
        return
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        pipe.send(("failed", f"{message} ({Path(last.filename).name}:{last.lineno})"))


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    cost = time.process_time() - cpu, time.perf_counter() - wall
    if cuda:  # the others' turn
        gc.collect()
        torch.cuda.empty_cache()
    return cost


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        # getrusage would count what the parent had used before.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        return float("nan")
