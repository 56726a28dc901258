"""An item of the GPU queue: a question, the function that answers it, and its predicted time."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 8.0
"""Predicted start of a process: imports and the CUDA context."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A measurement or check of the queue. Importing items imports neither torch nor byol_fast."""

    name: str
    """Letters, digits and underscores; the name of its result file."""
    question: str
    """One line."""
    run: str
    """`"module:function"`; the function takes a `Context` and records figures.

    It returns None, or a text if the result is incomplete: the status is then partial, and the item runs again.
    """
    seconds: float
    """Predicted time on an H100 or H200, including the start of a process."""
    first_figure: float | None = None
    """Predicted time until the first record: an item that records continuously starts if that much time is left.

    Includes the start of a process, like `seconds`.
    """
    depends_on: tuple[str, ...]
    """Files and folders of the repository that its figures depend on; their digest is stored with the result.

    Caches, hidden files and benchmarks/results are ignored.
    """
    modules: tuple[str, ...] = ()
    """Packages that must be importable, such as `nvidia.dali`."""
    files: tuple[str, ...] = ()
    """Files, relative to the repository root, that must exist, such as `.gpu/cifar10_jpeg.tar.xz`."""
    programs: tuple[str, ...] = ()
    """Programs that must be on PATH, such as `ncu`."""
    memory_gib: float = 0.0
    """Required free GPU memory."""
    own_process: bool = False
    """Run in a separate process, because it changes process-wide state or starts processes."""
    not_rehearsed: str = ""
    """Reason why it cannot run on a CPU; empty if it can."""


class Context:
    """Argument of an item's function: records figures and knows the time left.

    Args:
        item: the item that is running.
        records: JSON-lines file that figures are appended to.
        folder: for small files that belong to the result (logs, generated code); they are packed.
        device: "cuda", or "cpu" in a rehearsal.
        rehearsal: run with tiny sizes; figures mean nothing.
        deadline: `time.monotonic()` at which the item is ended.
    """

    def __init__(
        self, item: Item, records: Path, folder: Path, *, device: str, rehearsal: bool, deadline: float
    ) -> None:
        self.item, self.records, self.folder = item, records, folder
        self.device, self.rehearsal, self.deadline = device, rehearsal, deadline

    def record(self, figure: str, **values: Any) -> None:
        """Append a figure to the result file at once, so that it is not lost.

        Args:
            figure: name.
            values: numbers and strings.
        """
        line = json.dumps({"item": self.item.name, "figure": figure, **values})
        with self.records.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"  {figure}: " + ", ".join(f"{k} {v}" for k, v in values.items()), flush=True)

    def seconds_left(self) -> float:
        """Seconds until the item is ended."""
        return self.deadline - time.monotonic()
