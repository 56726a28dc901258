"""A worker process as seen by the queue: start it, send requests, end it with all its descendants."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import ROOT

MARK = "BYOL_FAST_GPU_WORKER"
"""Environment variable that identifies the descendants of a worker, in any process group or session."""

_numbers = itertools.count()


def kill_descendants(mark: str) -> None:
    """Kill all processes with a worker's mark, except this one.

    Args:
        mark: of the worker.
    """
    needle = f"{MARK}={mark}".encode()
    for _ in range(10):  # repeated for processes started meanwhile
        ended = False
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = needle in (folder / "environ").read_bytes().split(b"\0")
                if marked and int(folder.name) != os.getpid():
                    os.kill(int(folder.name), signal.SIGKILL)
                    ended = True
            except OSError:  # it has ended, or belongs to another user
                continue
        if not ended:
            return
        time.sleep(0.02)


class Worker:
    """A process that runs items one after the other.

    Args:
        items: module that holds ITEMS.
        log: file for its output until the first item runs.
        rehearsal: on the CPU.
    """

    def __init__(self, *, items: str, log: Path, rehearsal: bool) -> None:
        self.mark, self.log = f"{os.getpid()}-{next(_numbers)}", log
        self.free_gib: float | None = None
        self.environment: dict[str, Any] = {}
        self._received = b""
        self._replies, replies = os.pipe()
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), MARK: self.mark}
        if rehearsal:
            environment["BYOL_FAST_REHEARSE"] = "1"  # read by tests/gpu.py
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--items", items, "--replies", str(replies)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command + (["--rehearse"] if rehearsal else []),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(replies,),
                start_new_session=True,
            )
        os.close(replies)

    def send(self, **request: Any) -> None:
        """Send a request. If the process has ended, `receive` returns None."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, deadline: float, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Next reply; None if the process has ended, at the deadline, or when `should_stop` returns True.

        Args:
            deadline: by `time.monotonic()`.
            should_stop: called about ten times per second.
        """
        while b"\n" not in self._received:
            running = self.process.poll() is None
            ready = select.select([self._replies], [], [], 0.1 if running else 0)[0]
            data = os.read(self._replies, 1 << 16) if ready else b""
            self._received += data
            if ready and not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)
            if not data and (ready or not running or time.monotonic() >= deadline or should_stop()):
                return None
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        self.free_gib = reply.get("free_gib")
        return reply

    def exit_reason(self) -> str:
        """Description of how the process ended; empty while it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        return (
            f"its process was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended, exit code {code}"
        )

    def end(self) -> None:
        """Kill the process and its descendants."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        kill_descendants(self.mark)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(OSError):
            os.close(self._replies)


def last_lines(log: Path) -> str:
    """Last lines of a log; after a crash of the interpreter, the first lines of Python's error."""
    text = log.read_text(errors="replace") if log.exists() else ""
    _, fatal, after = text.rpartition("Fatal Python error")
    lines = [line for line in (fatal + after).splitlines() if line.strip()]
    return "\n".join(lines[:5] if fatal else lines[-12:])
