"""Indexes of several tar files at once: reading their headers is work of Python, which threads do in turn."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from byol_fast.data.sources.tar_index import Index, build_index

THREAD_SECONDS = 1.0
"""Seconds of all shards together up to which no process is started: that takes a fraction of a second of a core."""


_PROGRAM = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
sys.path[:] = {path!a}
from {module} import serve
serve()
"""


class _TakesLongError(Exception):
    pass


class _NoProcessError(Exception):
    pass


class _ClosedError(Exception):
    pass


class IndexBuilder:
    """Builds indexes as `build_index`, called by several threads; a context manager.

    What takes longer than a second is done by processes. They import no torch, and not the program's main module, so
    that a script needs no `if __name__ == "__main__"`.

    At the end, indexes that are under way are given up.

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
        self._is_closed = False

    def __enter__(self) -> IndexBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # the process ended before it had read all
                    pipe.close()

    def __call__(self, path: Path) -> Index:
        """Index of the images in one tar file; raises the errors of `build_index`."""
        with suppress(_TakesLongError), self._counted() as on_read:

            def on_read_at_first(num_bytes: int) -> None:
                if self._use_processes and time.monotonic() - self._begin > THREAD_SECONDS:
                    raise _TakesLongError
                on_read(num_bytes)

            return build_index(path, on_read_at_first)
        with suppress(_NoProcessError), self._counted() as on_read:
            return self._in_process(path, on_read)
        self._use_processes = False  # the next one would fare no better
        with self._counted() as on_read:
            return build_index(path, on_read)

    @contextmanager
    def _counted(self) -> Iterator[Callable[[int], None]]:
        """`on_read`, whose bytes are taken back if the index has to be begun again."""
        num_read = 0

        def on_read(num_bytes: int) -> None:
            nonlocal num_read
            if self._is_closed:  # an error of another file, or an interruption
                raise _ClosedError
            num_read += num_bytes
            self._on_read(num_bytes)

        try:
            yield on_read
        except (_TakesLongError, _NoProcessError):
            self._on_read(-num_read)
            raise

    def _in_process(self, path: Path, on_read: Callable[[int], None]) -> Index:
        process = self._take_process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(os.fsencode(path.absolute()) + b"\0")
            process.stdin.flush()
        except OSError as error:
            raise _NoProcessError from error
        while True:
            try:
                kind, value = pickle.load(process.stdout)  # of our own process
            except Exception as error:  # it was killed, does not start, or its start prints something
                raise _NoProcessError from error
            if kind == "read":
                on_read(value)
                continue
            self._idle.put(process)
            if kind == "failed":
                raise value
            index: Index = value
            return index

    def _take_process(self) -> subprocess.Popen[bytes]:
        """An idle process, or a new one."""
        with suppress(queue.Empty):
            return self._idle.get_nowait()
        path = [entry for entry in sys.path if isinstance(entry, str)]  # imports pass over the others, too
        program = _PROGRAM.format(path=path, module=__name__)
        with self._lock:
            if self._is_closed:
                raise _ClosedError
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            except OSError as error:
                raise _NoProcessError from error
            self._processes.append(process)
        return process


def serve() -> None:
    """Body of a process: read paths that end in NUL from standard input, write indexes to standard output."""
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
