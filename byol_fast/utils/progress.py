"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Lines and progress bars on one console.

    Args:
        console: where to print; None: nowhere.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, soft_wrap=True, markup=False)

    def bar(self, total: int, description: str) -> ProgressBar:
        """A bar that is removed at its end; a context manager."""
        return ProgressBar(self, total, description)

    def over(self, batches: Iterable[tuple[Tensor, Tensor]], total: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Hand batches through and count their images."""
        done = 0
        with self.bar(total, what) as bar:
            for batch, index in batches:
                yield batch, index
                done += len(index)
                bar.update(done)


class ProgressBar:
    """Progress of one thing.

    Args:
        progress: where to print.
        total: number of items.
        description: text before the bar.
        done: items finished before.
        line: format of a line where there is no terminal.
        keep: leave the bar where it is at the end; without a terminal, print the first and the last state as well.
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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
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
        """Move the bar; never prints a line."""
        self._bars.update(self._task, completed=done)

    def update(self, done: int, note: str = "", *, description: str | None = None) -> None:
        """Move the bar and show a note beside it; without a terminal, as a line now and then."""
        self.description = description or self.description
        self._bars.update(self._task, completed=done, note=note, description=self.description)
        now = time.monotonic()
        due = now - self._last_line >= SECONDS_BETWEEN_LINES or (self._keep and done == self.total)
        if due and not self.progress.console.is_terminal:
            self._last_line = now
            line = self._line.format(description=self.description, done=done, total=self.total, note=note)
            self.progress.say(line.rstrip())
