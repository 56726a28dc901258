"""Indexes of several tar files at once: reading their headers is work of Python, which threads do in turn."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_fast.data.sources.tar_index import Index, build_index

THREAD_SECONDS = 1.0
"""Seconds of all shards together up to which no process is started: that takes a fraction of a second of a core."""


class _TakesLongError(Exception):
    pass


class IndexBuilder:
    """Builds indexes as `build_index`, called by several threads; a context manager.

    What takes longer than a second is done by processes. They import no torch, and not the program's main module, so
    that a script needs no `if __name__ == "__main__"`.

    Args:
        on_read: called by any thread with the number of bytes that were passed since its last call for this file.
        use_processes: False for one shard or one core.
    """

    def __init__(self, on_read: Callable[[int], None], *, use_processes: bool) -> None:
        self._on_read, self._use_processes = on_read, use_processes and bool(sys.executable)
        self._begin = time.monotonic()
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> IndexBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def __call__(self, path: Path) -> Index:
        """Index of the images in one tar file; raises the errors of `build_index`."""
        num_read = 0

        def on_read(num_bytes: int) -> None:
            nonlocal num_read
            if self._use_processes and time.monotonic() - self._begin > THREAD_SECONDS:
                raise _TakesLongError
            num_read += num_bytes
            self._on_read(num_bytes)

        try:
            return build_index(path, on_read)
        except _TakesLongError:
            self._on_read(-num_read)
        try:
            return self._in_process(path)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # killed, or the system starts no process
            return build_index(path, self._on_read)

    def _in_process(self, path: Path) -> Index:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(os.fsencode(path.absolute()) + b"\0")
        process.stdin.flush()
        num_read = 0
        while True:
            try:
                kind, value = pickle.load(process.stdout)  # of our own process
            except EOFError:
                self._on_read(-num_read)
                raise
            if kind == "read":
                num_read += value
                self._on_read(value)
                continue
            self._idle.put(process)
            if kind == "failed":
                raise value
            index: Index = value
            return index

    def _start(self) -> subprocess.Popen[bytes]:
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        try:
            process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise EOFError from error
        with self._lock:
            self._processes.append(process)
        return process


def serve() -> None:
    """Body of a process: read paths that end in NUL from standard input, write indexes to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), output)
        output.flush()

    name = b""
    while byte := sys.stdin.buffer.read(1):
        if byte != b"\0":
            name += byte
            continue
        path, name = Path(os.fsdecode(name)), b""
        try:
            send("done", build_index(path, lambda num_bytes: send("read", num_bytes)))
        except BrokenPipeError:
            return
        except OSError as error:
            send("failed", error)
