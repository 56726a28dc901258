"""Counts the file operations of this process, and kills it at one of them."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

# What changes a folder; a kill comes before the call.
CALLS = ("fsync", "ftruncate", "link", "mkdir", "rename", "replace", "rmdir", "unlink")


class FileOperations:
    """Wraps the functions of this process that write files: it is killed by SIGKILL at the operation `kill_at`.

    Every one is really made, or begun: of a write that is killed, none, a third or two thirds of the bytes are written.
    """

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.count = 0
        for name in CALLS:
            setattr(os, name, self._wrap(getattr(os, name)))
        real_open, real_write = os.open, os.write

        def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                self.begin()
            return real_open(path, flags, *args, **kwargs)

        def write(descriptor: int, data: Any) -> int:
            if descriptor > 2:  # not what is printed
                self.begin(lambda thirds: real_write(descriptor, data[: len(data) * thirds // 3]))
            return real_write(descriptor, data)

        os.open, os.write = open_descriptor, write
        io.open = builtins.open = self._open(builtins.open)

    def begin(self, part: Callable[[int], object] = lambda thirds: None) -> None:
        """Count an operation, or make a part of it and die.

        Args:
            part: makes so many thirds of it.
        """
        self.count += 1
        if self.count == self.kill_at:
            part(self.count % 3)
            os.kill(os.getpid(), signal.SIGKILL)

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            return call(*args, **kwargs)

        return counted

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        operations = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                operations.begin(lambda thirds: super(File, self).write(memoryview(data)[: len(data) * thirds // 3]))
                return super().write(data)

        def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax"):
                return real(file, mode, buffering, *args, **kwargs)
            self.begin()  # creates or empties the file
            raw = File(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), *args, **kwargs)

        return open_file
