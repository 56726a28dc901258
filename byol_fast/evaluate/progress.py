"""How far an evaluation is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import Tensor

from byol_fast.utils.progress import SECONDS_BETWEEN_LINES

T = TypeVar("T")


class Progress:
    """Shows how far things are.

    Args:
        console: where to print; None: nowhere.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.console is not None:
            self.console.print(text, soft_wrap=True, markup=False)

    def over(self, batches: Iterable[tuple[Tensor, Tensor]], total: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Hand batches through and count their images."""
        done = 0
        with Counter(self.console, total, what) as counter:
            for batch, index in batches:
                yield batch, index
                done += len(index)
                counter.reach(done)

    def counter(self, total: int, what: str) -> Counter:
        """Count something else; a context manager."""
        return Counter(self.console, total, what)


class Counter:
    """One thing that goes on."""

    def __init__(self, console: Console | None, total: int, what: str) -> None:
        self.console, self.total, self.what = console, total, what
        self._last_line = time.monotonic()
        self._bars: Bars | None = None

    def __enter__(self) -> Counter:
        if self.console is not None and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bars = Bars(TextColumn("{task.description}"), *columns, *times, console=self.console, transient=True)
            self._task = self._bars.add_task(self.what, total=self.total, note="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def reach(self, done: int, note: str = "") -> None:
        """It is so far."""
        if self._bars is not None:
            self._bars.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self.console is not None and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(f"{self.what}: {done}/{self.total}  {note}".rstrip(), soft_wrap=True, markup=False)
