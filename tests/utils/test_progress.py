"""Progress bars: what is shown on a terminal, and which lines are printed without one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import Progress, ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr("byol_fast.utils.progress.time.monotonic", lambda: now[0])
    return now


def plain() -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(PlainConsole(file=out, width=60)), out


def test_lines_without_a_terminal_come_every_ten_seconds(clock: list[float]) -> None:
    shown, out = plain()
    with shown.bar(100, "fits") as bar:
        for done in range(100):
            clock[0] += 4
            bar.update(done + 1, f"[x] {done}")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["fits: 3/100  [x] 2", "fits: 6/100  [x] 5"] and len(lines) == 33


def test_kept_bar_prints_first_and_last_line(clock: list[float]) -> None:
    shown, out = plain()
    with ProgressBar(shown, 3, "", line="step {done}/{total}  {description}  {note}", keep=True) as bar:
        for step in (1, 2, 3):
            bar.advance(step)
            bar.update(step, "loss 1", description=f"epoch {step / 3:.2f}")
    assert out.getvalue().splitlines() == ["step 1/3  epoch 0.33  loss 1", "step 3/3  epoch 1.00  loss 1"]


def test_bar_on_a_terminal_shows_counts_and_note(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Progress(PlainConsole(file=out, force_terminal=True, width=100))
    batches = [(torch.zeros(2), torch.arange(2))] * 3
    assert len(list(shown.track(batches, 6, "test images"))) == 3
    with ProgressBar(shown, 9, "epoch 0.00", done=4, keep=True) as bar:
        bar.update(5, "loss 0.5", description="epoch 0.55")
    text = out.getvalue()
    assert all(part in text for part in ("test images", "6/6", "epoch 0.55", "5/9", "loss 0.5"))


def test_nothing_is_shown_without_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.print("x")
    with ProgressBar(shown, 1, "x", keep=True) as bar:
        bar.update(1)
    assert capsys.readouterr() == ("", "")
