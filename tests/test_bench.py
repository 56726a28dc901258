from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from byol_fast.bench import Table, Timing, interleaved, ratio


def test_rounds_are_interleaved_and_the_warm_up_is_thrown_away() -> None:
    calls: list[str] = []
    now = [0.0]

    def case(name: str, first: float, later: float) -> None:
        now[0] += later if name in calls else first
        calls.append(name)

    times = interleaved(
        {"a": lambda: case("a", 100.0, 2.0), "b": lambda: case("b", 100.0, 3.0)},
        rounds=3,
        warmup=1,
        clock=lambda: now[0],
    )
    assert calls == ["a", "b"] * 4
    assert times["a"].seconds == (2.0, 2.0, 2.0)
    assert times["b"].seconds == (3.0, 3.0, 3.0)


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that slows down in one round slows both: the ratio does not see it."""
    slow, fast = Timing((2.0, 20.0, 4.0)), Timing((1.0, 10.0, 2.0))
    assert ratio(slow, fast) == (2.0, 2.0, 2.0)
    assert fast.median == 2.0


def test_no_cases_is_refused() -> None:
    with pytest.raises(ValueError, match="cases and rounds must be at least one"):
        interleaved({}, rounds=3)


def test_table_keeps_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(amount=32, unit="images/s")
    table.add("suite", {"ours": Timing((1.0, 2.0, 4.0)), "theirs": Timing((2.0, 4.0, 8.0))})
    assert "2.00x" in capsys.readouterr().out
    table.save(tmp_path / "results", "name", torch.device("cpu"))
    with (tmp_path / "results" / "name.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert (float(ours["p50"]), float(theirs["p50"]), float(theirs["ratio"])) == (16.0, 8.0, 2.0)
    assert float(ours["p20"]) < float(ours["p50"]) < float(ours["p80"])
    assert json.loads((tmp_path / "results" / "environment.json").read_text())["device"] == "cpu"
