"""An item of the GPU queue: a question, the predicted time of its answer, and the function that finds it."""

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
    """The question that it answers, in one line."""
    run: str
    """`"module:function"`; the function takes a `Context` and records figures.

    It returns None, or in a text what is missing: the result is then partial, and the item runs again the next time.
    """
    seconds: float
    """Predicted time on an H100, with the start of a process."""
    first_figure: float | None = None
    """Predicted time until the first record, for an item that records as it goes: it begins if that much time is left.

    Includes the start of a process, like `seconds`.
    """
    depends_on: tuple[str, ...]
    """Files and folders of the repository that decide its figures; their digest is stored with the result.

    Caches, hidden files inside folders, and benchmarks/results do not count.
    """
    modules: tuple[str, ...] = ()
    """Packages that must be importable, such as `nvidia.dali`."""
    files: tuple[str, ...] = ()
    """Files of the repository root that must be there, such as `.gpu/cifar10_jpeg.tar.xz`."""
    programs: tuple[str, ...] = ()
    """Programs that must be on PATH, such as `ncu`."""
    memory_gib: float = 0.0
    """Free GPU memory that it needs."""
    own_process: bool = False
    """Run in a process of its own, because it changes process-wide state or starts processes."""
    not_rehearsed: str = ""
    """Why it cannot run on a CPU; empty where it can."""


class Context:
    """The argument of an item's function: where figures go, and how much time is left.

    Args:
        item: the item that is running.
        records: JSON-lines file that figures are appended to.
        folder: for files that belong to the result (logs, generated code); small ones, they are packed.
        device: "cuda", or "cpu" in a rehearsal.
        rehearsal: run with tiny sizes; no figure means anything.
        deadline: `time.monotonic()` at which the item is ended.
    """

    def __init__(
        self, item: Item, records: Path, folder: Path, *, device: str, rehearsal: bool, deadline: float
    ) -> None:
        self.item, self.records, self.folder = item, records, folder
        self.device, self.rehearsal, self.deadline = device, rehearsal, deadline

    def record(self, figure: str, **values: Any) -> None:
        """Append a figure to the result at once, so that nothing measured is lost.

        Args:
            figure: its name.
            values: numbers and texts that JSON can hold.
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
