"""Progress of long operations: bars on a terminal, otherwise lines."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar as RichBar
from rich.text import Text

from byol_fast.utils.output import PlainConsole

if TYPE_CHECKING:
    from torch import Tensor

FIRST_LINE_SECONDS = 3.0
"""Seconds without any line after which an operation prints its first one."""
MIN_SECONDS = 0.5
"""Seconds that an operation takes before its first line."""
LINE_SECONDS = 4.5
"""Seconds between its lines at the beginning; `GRACE_SECONDS` more if the operation does not report."""
STEP_LINE_SECONDS = 10.0
"""Seconds between those of a bar that is kept: of a run's steps, whose lines are long."""
MANY_LINES_SECONDS = 300.0
"""Seconds after which fewer lines are printed."""
LATER_LINE_SECONDS = 60.0
"""Seconds between lines from then on."""
MIN_BAR, MAX_BAR = 10, 40
"""Columns of a bar on a terminal."""
GRACE_SECONDS = 0.5
"""Seconds that a due line waits for a report of the operation itself, which has a new note."""


class Progress:
    """Lines and progress bars on one console.

    Bars may be nested. Without a terminal the innermost one prints lines: a thread does so while an item takes long.

    Args:
        console: None prints nothing.
    """

    def __init__(self, console: PlainConsole | None = None) -> None:
        self.console = console or PlainConsole(quiet=True)
        self.lock = threading.RLock()
        self.last_output = time.monotonic()
        """Time of the last line."""
        self._bars: list[ProgressBar] = []
        self._live: RichProgress | None = None
        self._changed = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None

    def print(self, text: str) -> None:
        """Print a line above the progress bars."""
        with self.lock:
            self.last_output = time.monotonic()
            self.console.print(text, soft_wrap=True)

    def bar(self, total: int | None, description: str, *, unit: str = "", note: str = "") -> ProgressBar:
        """Progress bar that is removed at the end; a context manager.

        Args:
            total: number of items; None: not known.
            description: text before the bar.
            unit: name of the items.
            note: text behind the bar, until the first `update`.
        """
        return ProgressBar(self, total, description, unit=unit, note=note)

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

    @contextmanager
    def shown(self, description: str = "") -> Iterator[Progress]:
        """Within this, in this thread, `current()` is this one: it shows the progress of operations deep inside.

        Args:
            description: text of lines where no operation shows its progress, without a terminal; empty: no such lines.
        """
        token = _current.set(self)
        try:
            with self.bar(None, description) if description and not self.console.is_terminal else nullcontext():
                yield self
        finally:
            _current.reset(token)

    def widths(self) -> _Widths:
        """Widths of the bars on the terminal."""
        assert self._live is not None  # it asks for them
        return _Widths.of([task.fields["bar"] for task in self._live.tasks], self.console.width)

    # --- bars

    def open_bar(self, bar: ProgressBar) -> None:
        """Show a bar below the others."""
        if self.console.quiet:
            return
        with self.lock:
            self._bars.append(bar)
            if self.console.is_terminal:
                self._add_to_live(bar)
            elif self._thread is None:
                self._thread = threading.Thread(target=self._print_lines, name="byol-fast-progress", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def close_bar(self, bar: ProgressBar) -> None:
        """Remove a bar, or leave its last state on the terminal if it is to be kept."""
        with self.lock:
            if bar not in self._bars:  # nothing is shown
                return
            self._bars.remove(bar)
            thread = self._thread
            self._thread = thread if self._bars else None
            self._changed.notify()
            if self._live is not None:
                self._remove_from_live(self._live, bar)
        if thread is not None and self._thread is None:
            thread.join()

    def _add_to_live(self, bar: ProgressBar) -> None:
        if self._live is None:
            self._live = RichProgress(
                _DescriptionColumn(),
                _BarColumn(),
                TextColumn("{task.fields[bar].counts}", markup=False),
                _NoteColumn(),
                TextColumn("{task.fields[bar].times}", markup=False),
                console=self.console,
                refresh_per_second=4,  # what is measured meanwhile is hardly disturbed
                # A file that gets the standard output must not lose lines to the terminal.
                redirect_stdout=not self.console.stderr or sys.stdout.isatty(),
            )
        bar.task = self._live.add_task("", total=None, bar=bar)
        self._live.start()

    def _remove_from_live(self, live: RichProgress, bar: ProgressBar) -> None:
        live.refresh()  # the end is seen, if only for a moment
        if not bar.keep and bar.task is not None:
            live.remove_task(bar.task)
        if not self._bars:
            live.live.transient = not live.tasks
            live.stop()
            self._live = None

    def _print_lines(self) -> None:
        """Body of the thread: print the line of the innermost bar when it is due."""
        thread = threading.current_thread()
        with self._changed:
            while self._thread is thread:
                seconds = self._bars[-1].due_time() + GRACE_SECONDS - time.monotonic()
                if seconds > 0:
                    self._changed.wait(seconds)
                else:
                    self._bars[-1].print_line()


_current: ContextVar[Progress | None] = ContextVar("byol_fast_progress", default=None)


# A forked process, as of a data loader, has neither the thread that prints nor, perhaps, ever the lock.
os.register_at_fork(after_in_child=lambda: _current.set(None))


def current() -> Progress:
    """The `Progress` of the command or run under way in this thread; if there is none, one that prints nothing."""
    return _current.get() or Progress()


def of_run(*, is_main_process: bool) -> Progress:
    """The `Progress` of the command under way or else one on standard output; on other processes nothing is printed."""
    return (_current.get() or Progress(PlainConsole())) if is_main_process else Progress()


class ProgressBar:
    """Progress of one operation.

    Args:
        progress: the console.
        total: number of items; None: not known.
        description: text before the bar.
        done: number of items that are finished at the start.
        unit: name of the items.
        note: text behind the bar.
        line: format of a line, if the console is not a terminal.
        keep: keep the bar at the end; if the console is not a terminal, print the first and the last state as well.
    """

    def __init__(
        self,
        progress: Progress,
        total: int | None,
        description: str,
        *,
        done: int = 0,
        unit: str = "",
        note: str = "",
        line: str = "{description}: {counts}  {times}  {note}",
        keep: bool = False,
    ) -> None:
        self.progress, self.total, self.description, self.note = progress, total, description, note
        self.done, self.keep = done, keep
        self.task: TaskID | None = None
        """Number of the bar on a terminal."""
        self._unit, self._line = unit, line
        self._begin = time.monotonic()
        # The first item may take much longer than the others.
        self._first_report: tuple[float, int] | None = None
        self._last_report = self._begin
        self._note_done: int | None = None  # count at which the note was reported, and the time
        self._note_time = self._begin
        self._last_line: float | None = None

    def __enter__(self) -> ProgressBar:
        self.progress.open_bar(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close_bar(self)

    def advance(self, done: int, *, description: str | None = None) -> None:
        """Move the bar; prints no line."""
        self._last_report = time.monotonic()
        if self._first_report is None:
            self._first_report = self._last_report, done
        self.done = done
        if description is not None:
            self.description = description

    def add(self, count: int) -> None:
        """Move the bar on, from any thread; prints no line."""
        with self.progress.lock:
            self.advance(self.done + count)

    def update(self, done: int, note: str = "", *, description: str | None = None) -> None:
        """Move the bar and show a note beside it; if the console is not a terminal, print a line if one is due."""
        with self.progress.lock:
            self.advance(done, description=description)
            self.note, self._note_done, self._note_time = note, done, time.monotonic()
            is_first_or_last = self.keep and (self._last_line is None or done == self.total)
            if is_first_or_last or time.monotonic() >= self.due_time():
                self.print_line()

    # --- texts

    @property
    def is_note_old(self) -> bool:
        """True if a note of an operation that takes as long as a run is no longer news."""
        return time.monotonic() - self._note_time >= STEP_LINE_SECONDS

    @property
    def counts(self) -> str:
        """Finished and all items."""
        if self.total is None and not self.done:
            return ""
        of_all = "" if self.total is None else f"/{self.total:,}"
        return f"{self.done:,}{of_all} {self._unit}".rstrip()

    @property
    def times(self) -> str:
        """Elapsed and remaining time."""
        now = time.monotonic()
        elapsed = f"elapsed {_clock(now - self._begin)}"
        first_time, first = self._first_report or (now, self.done)
        if self.total is None or self.done <= first:
            return elapsed
        seconds_per_item = (self._last_report - first_time) / (self.done - first)
        remaining = seconds_per_item * (self.total - self.done) - (now - self._last_report)
        return f"{elapsed}, remaining {_clock(max(remaining, 0))}"

    # --- lines

    def due_time(self) -> float:
        """Time of the next line: after some seconds without any, then at short intervals, later every minute."""
        after_silence = self.progress.last_output + FIRST_LINE_SECONDS
        if self._last_line is None:
            return max(after_silence, self._begin + MIN_SECONDS)
        # From the first report: a long evaluation before the first step leaves the steps their first minutes.
        begin = self._begin if self._first_report is None else self._first_report[0]
        is_young = self._last_line - begin < MANY_LINES_SECONDS or (self.total is not None and not self._first_report)
        interval = STEP_LINE_SECONDS if self.keep else LINE_SECONDS
        return max(after_silence, self._last_line + (interval if is_young else LATER_LINE_SECONDS))

    def print_line(self) -> None:
        """Print the state, if the console is not a terminal."""
        self._last_line = time.monotonic()
        if self.progress.console.is_terminal:
            return
        self.progress.last_output = self._last_line
        note = self.note
        if note and self._note_done is not None and self._note_done != self.done:
            note += f" (at {self._note_done:,})"
        line = self._line.format(
            description=self.description,
            done=self.done,
            total=self.total,
            counts=self.counts,
            times=self.times,
            note=note,
        )
        line = re.sub(" {3,}", "  ", line).replace(":  ", ": ")  # an empty part
        self.progress.console.print(line.rstrip(), soft_wrap=True)


class _Widths(NamedTuple):
    """Columns of the terminal that the parts of all bars have; counts and times have what they need."""

    description: int
    bar: int
    note: int

    @classmethod
    def of(cls, bars: Sequence[ProgressBar], columns: int) -> _Widths:
        """Notes give way first, then the bar, then descriptions.

        Args:
            bars: that are shown below each other.
            columns: of the terminal.
        """
        descriptions, counts, notes, times = (
            max(map(cell_len, texts))
            for texts in zip(*((b.description, b.counts, b.note, b.times) for b in bars), strict=True)
        )
        left = columns - counts - times - 4  # a space between two columns
        description = min(descriptions, max(left - MIN_BAR, MIN_BAR))
        left -= description
        note = min(notes, max(left - MIN_BAR, 0))
        return cls(description, min(max(left - note, 1), MAX_BAR), note)


class _DescriptionColumn(ProgressColumn):
    """Text before the bar."""

    def render(self, task: Task) -> Text:
        """The description, cut off if the terminal is narrow."""
        bar: ProgressBar = task.fields["bar"]
        text = Text(bar.description)
        text.truncate(bar.progress.widths().description, overflow="ellipsis")
        return text


class _BarColumn(ProgressColumn):
    """The bar itself."""

    def render(self, task: Task) -> RichBar:
        """Draw the bar; it pulses if the number of items is not known."""
        bar: ProgressBar = task.fields["bar"]
        width, is_endless = bar.progress.widths().bar, bar.total is None
        return RichBar(
            total=bar.total, completed=bar.done, width=width, pulse=is_endless, animation_time=task.get_time()
        )


class _NoteColumn(ProgressColumn):
    """Text behind the bar."""

    def render(self, task: Task) -> Text:
        """The first parts of the note, as many as the terminal has room for."""
        bar: ProgressBar = task.fields["bar"]
        width, note = bar.progress.widths().note, bar.note
        while note and cell_len(note) > width:
            note = note.rpartition("  ")[0]
        return Text(note)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: `0:01:23`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
