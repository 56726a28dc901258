"""`metrics.jsonl`: one record a step, and after a resume none twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byol_fast.utils.files import atomic_write

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All whole records of a metrics file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Appends records to a file; they wait in memory until the next `flush`.

    Args:
        path: the file; created when the first record is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[Record] = []
        self.latest: Record = {}
        """The record that was queued last."""

    def rewind(self, step: int, *, evaluated: bool) -> None:
        """Forget what was recorded after the checkpoint of `step`: it is about to be done again.

        Args:
            step: step of the checkpoint that training resumes from.
            evaluated: whether that checkpoint already counts the evaluation at its step; if not, that goes too.
        """

        def kept(record: Record) -> bool:
            return record["step"] < step or (record["step"] == step and (evaluated or "loss" in record))

        atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in read(self.path) if kept(r)))

    def add(self, record: Record) -> None:
        """Queue a record."""
        self._waiting.append(record)
        self.latest = record

    def flush(self) -> list[Record]:
        """Write what waits, and return it."""
        written = list(self._waiting)
        if written:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in written))
            self._waiting.clear()
        return written

    def forget(self) -> None:
        """Drop what waits: another process writes it."""
        self._waiting.clear()


class TensorBoard:
    """The same numbers for TensorBoard, where its package is installed.

    Args:
        folder: of its event files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def open(self, step: int) -> str | None:
        """Begin to write; what was written after `step` is about to be done again and disappears from view.

        Returns:
            Why nothing will be written, or None.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            return f"no TensorBoard files ({error}): pip install tensorboard, or set tensorboard to false"
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        return None

    def write(self, records: list[Record]) -> None:
        """Add the numbers of records."""
        if self._writer is None:
            return
        for record in records:
            for name, value in record.items():
                if name not in {"step", "undone", "knn_k"} and value is not None:
                    self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True, slots=True)
class Speed:
    """Throughput over a stretch of steps."""

    images_per_s: float
    data_wait: float
    """Share of the time that the host waited for data, 0..1."""


class Stopwatch:
    """Measures throughput by the host's clock, between `lap`s."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def count(self, images: int) -> None:
        """Add images that were trained on."""
        self._images += images

    def lap(self) -> Speed:
        """Throughput since the last lap."""
        now = time.perf_counter()
        elapsed = max(now - self._begin, 1e-9)
        speed = Speed(self._images / elapsed, min(self._waited / elapsed, 1.0))
        self._begin, self._waited, self._images = now, 0.0, 0
        return speed
