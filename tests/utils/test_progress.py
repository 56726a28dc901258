"""Progress bars: what is shown on a terminal, and which lines are printed without one."""

from __future__ import annotations

import io
import os
import re
import threading
from typing import Any

import pytest
import torch

from byol_fast.cli import main
from byol_fast.utils import progress as progress_module
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import Progress, ProgressBar, current, of_run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr("byol_fast.utils.progress.time.monotonic", lambda: now[0])
    return now


def plain() -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(PlainConsole(file=out, width=60)), out


@pytest.mark.parametrize(
    ("keep", "expected", "last"),
    [
        (False, [*range(3, 304, 5), *range(363, 601, 60)], "543/3,600  elapsed 0:09:03, remaining 0:50:57  [x] 543"),
        (True, [*range(1, 302, 10), *range(361, 601, 60)], "541/3,600  elapsed 0:09:01, remaining 0:50:59  [x] 541"),
    ],
    ids=["operation", "steps of a run"],
)
def test_lines_without_a_terminal_come_often_at_first_then_every_minute(
    keep: bool, expected: list[int], last: str, clock: list[float]
) -> None:
    shown, out = plain()
    times = []
    with ProgressBar(shown, 3600, "fits", keep=keep) as bar:
        for second in range(1, 601):
            clock[0] += 1
            before = out.tell()
            bar.update(second, f"[x] {second}")
            if out.tell() > before:
                times.append(second)
    assert times == expected
    assert out.getvalue().splitlines()[-1] == f"fits: {last}"


def test_remaining_time_leaves_the_first_item_out(clock: list[float]) -> None:
    """The first step compiles; an estimate from it would be far off."""
    bar = ProgressBar(plain()[0], 101, "steps")
    clock[0] += 500
    bar.update(1)
    assert bar.times == "elapsed 0:08:20"
    clock[0] += 2
    bar.update(2)
    assert bar.times == "elapsed 0:08:22, remaining 0:03:18"
    clock[0] += 8
    assert bar.times == "elapsed 0:08:30, remaining 0:03:10"
    resumed = ProgressBar(plain()[0], 101, "steps", done=51)
    for step in (52, 53):
        clock[0] += 2
        resumed.update(step)
    assert resumed.times == "elapsed 0:00:04, remaining 0:01:36"


def test_kept_bar_prints_first_and_last_line(clock: list[float]) -> None:
    shown, out = plain()
    with ProgressBar(shown, 3, "", line="step {done}/{total}  {description}  {note}", keep=True) as bar:
        for step in (1, 2, 3):
            bar.advance(step, description=f"epoch {step / 3:.2f}")
            bar.update(step, "loss 1")
    assert out.getvalue().splitlines() == ["step 1/3  epoch 0.33  loss 1", "step 3/3  epoch 1.00  loss 1"]


class Output(io.StringIO):
    """Output without a terminal; `wait_for` returns once a text has been written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Condition()

    def write(self, text: str) -> int:
        with self.written:
            count = super().write(text)
            self.written.notify_all()
        return count

    def wait_for(self, text: str) -> None:
        with self.written:
            assert self.written.wait_for(lambda: text in self.getvalue(), timeout=60)


def test_lines_come_while_an_item_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread prints them for the innermost bar, and says how old a note is."""
    for name in ("FIRST_LINE_SECONDS", "LINE_SECONDS", "GRACE_SECONDS", "MIN_SECONDS"):
        monkeypatch.setattr(progress_module, name, 0.01)
    out = Output()
    shown = Progress(PlainConsole(file=out, width=200))
    with shown.shown("train"):
        out.wait_for("train: elapsed 0:00:00\n")
        with shown.bar(10, "steps") as outer:
            outer.update(1, "loss 3")
            outer.advance(2)
            out.wait_for("steps: 2/10  elapsed 0:00:00, remaining 0:00:00  loss 3 (at 1)\n")
            with current().bar(None, "scanning", unit="files", note="slow disk") as inner:
                inner.add(2000)
                out.wait_for("scanning: 2,000 files  elapsed 0:00:00  slow disk\n")
            out.seek(0)
            out.truncate()
            out.wait_for("steps: 2/10")
    assert "scanning" not in out.getvalue() and "train" not in out.getvalue()
    assert "byol-fast-progress" not in {thread.name for thread in threading.enumerate()}


def test_bars_on_a_terminal_show_counts_notes_and_labeled_times(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Progress(PlainConsole(file=out, force_terminal=True, width=160))
    batches = [(torch.zeros(2), torch.arange(2))] * 3
    assert len(list(shown.track(batches, 6, "test images"))) == 3
    with ProgressBar(shown, 9, "epoch 0.00", done=4, keep=True) as bar:
        with shown.bar(None, "reading [files]"):
            pass
        bar.update(5, "loss [0.5]", description="epoch 0.55")
        bar.update(6, "loss [0.5]")
    text = out.getvalue()
    shown_parts = (
        "test images",
        "6/6",
        "epoch 0.55",
        "6/9",
        "loss [0.5]",
        "reading [files]",
        "elapsed 0:00:00, remaining",
    )
    assert all(part in text for part in shown_parts)
    left = "".join(text.splitlines()[-2:])
    assert "epoch 0.55" in left and "reading" not in left and "test images" not in left


@pytest.mark.parametrize(("width", "note"), [(60, ""), (80, "loss 3.7188"), (90, "loss 3.7188  std 0.82")])
def test_narrow_terminal_keeps_bar_count_and_times(width: int, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Progress(PlainConsole(file=out, force_terminal=True, width=width, color_system=None))
    with ProgressBar(shown, 90, "epoch 5.60", keep=True) as bar:
        bar.update(84)
        bar.update(85, "loss 3.7188  std 0.82  lr 0.000353", description="epoch 5.62")
    line = re.sub(r"\x1b\[[?\d]*[A-Za-z]", "", out.getvalue()).strip().splitlines()[-1]
    expected = re.fullmatch(r"epoch 5\.62 [━╸╺ ]{6,} 85/90 (.*)elapsed 0:00:00, remaining 0:00:00", line)
    assert expected is not None
    assert expected[1].strip() == note
    assert len(line) <= width


@pytest.mark.parametrize("command", ["doctor", "preview", "report"])
def test_command_says_that_it_works_before_anything_else(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_LINE_SECONDS", "LINE_SECONDS", "GRACE_SECONDS", "MIN_SECONDS"):
        monkeypatch.setattr(progress_module, name, 0.01)
    out = Output()
    monkeypatch.setattr(main, "_progress", lambda _: Progress(PlainConsole(file=out, width=200)))

    def wait(_: list[str]) -> int:
        out.wait_for(f"{command}: elapsed 0:00:00\n")
        return 0

    monkeypatch.setattr(f"byol_fast.cli.{command}.main", wait)
    with pytest.raises(SystemExit, match="0"):
        main.main([command])


def test_nothing_is_shown_without_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.print("x")
    with shown.shown("x"), ProgressBar(shown, 1, "x", keep=True) as bar:
        bar.update(1)
        assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "byol-fast-progress"])
    with current().bar(1, "x") as bar:  # of a function that nobody gave a console
        bar.update(1)
    of_run(is_main_process=False).print("x")
    assert capsys.readouterr() == ("", "")
    of_run(is_main_process=True).print("x")
    assert capsys.readouterr() == ("x\n", "")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_shows_nothing() -> None:
    """It has no thread that prints, and would wait for good for a lock that another thread held."""
    shown = plain()[0]
    with shown.shown("work"):
        child = os.fork()
        if child == 0:
            os._exit(0 if current().console.quiet else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert current() is shown
