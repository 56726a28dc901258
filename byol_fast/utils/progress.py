"""What a person sees while a run goes on: a progress bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Progress of a run.

    Args:
        total: steps of the whole run.
        done: steps finished before.
        console: where to print; standard output by default.
        silent: print nothing: another process does.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None, *, silent: bool = False) -> None:
        self.console = console or Console(highlight=False, quiet=silent)
        self.total = total
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=silent or not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=total, completed=done, epoch=0.0, status="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, soft_wrap=True, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar; prints nothing."""
        self._progress.update(self._bar, completed=step)

    def status(self, step: int, epoch: float, text: str) -> None:
        """Show numbers beside the bar; without a terminal, as a line every ten seconds and at the end."""
        self._progress.update(self._bar, completed=step, epoch=epoch, status=text)
        now = time.monotonic()
        due = now - self._last_line >= SECONDS_BETWEEN_LINES or step == self.total
        if not self.console.is_terminal and due:
            self._last_line = now
            self.say(f"step {step}/{self.total}  epoch {epoch:.2f}  {text}")
