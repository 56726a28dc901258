"""Progress of long operations: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from byol_fast.utils.output import PlainConsole

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Lines and progress bars on one console.

    Args:
        console: None prints nothing.
    """

    def __init__(self, console: PlainConsole | None = None) -> None:
        self.console = console or PlainConsole(quiet=True)

    def print(self, text: str) -> None:
        """Print a line above the progress bars."""
        self.console.print(text, soft_wrap=True)

    def bar(self, total: int, description: str) -> ProgressBar:
        """Progress bar that is removed at the end; a context manager."""
        return ProgressBar(self, total, description)

    def track(
        self, batches: Iterable[tuple[Tensor, Tensor]], total: int, description: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `(images, index)` batches and show the number of images."""
        done = 0
        with self.bar(total, description) as bar:
            for batch, index in batches:
                yield batch, index
                done += len(index)
                bar.update(done)


class ProgressBar:
    """Progress of one operation.

    Args:
        progress: the console.
        total: number of items.
        description: text before the bar.
        done: number of items that are finished at the start.
        line: format of a line, if the console is not a terminal.
        keep: keep the bar at the end; if the console is not a terminal, print the first and the last state as well.
    """

    def __init__(
        self,
        progress: Progress,
        total: int,
        description: str,
        *,
        done: int = 0,
        line: str = "{description}: {done}/{total}  {note}",
        keep: bool = False,
    ) -> None:
        self.progress, self.total, self.description = progress, total, description
        self._line, self._keep = line, keep
        self._last_line = 0.0 if keep else time.monotonic()
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=progress.console,
            transient=not keep,
            disable=progress.console.quiet or not progress.console.is_terminal,
        )
        self._task = self._bars.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, done: int) -> None:
        """Move the bar; prints no line."""
        self._bars.update(self._task, completed=done)

    def update(self, done: int, note: str = "", *, description: str | None = None) -> None:
        """Move the bar and show a note beside it; if the console is not a terminal, print a line every ten seconds."""
        self.description = description or self.description
        self._bars.update(self._task, completed=done, note=note, description=self.description)
        now = time.monotonic()
        due = now - self._last_line >= SECONDS_BETWEEN_LINES or (self._keep and done == self.total)
        if due and not self.progress.console.is_terminal:
            self._last_line = now
            line = self._line.format(description=self.description, done=done, total=self.total, note=note)
            self.progress.print(line.rstrip())
