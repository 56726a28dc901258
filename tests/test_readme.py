"""The README's tables come from the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme import BLOCK, ROOT, written
from byol_fast.bench.results import Results
from byol_fast.bench.timing import Timing


def test_tables_of_the_readme_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert BLOCK.search(text)
    assert written(text, ROOT / "benchmarks" / "results") == text


def test_a_table_says_who_is_how_much_faster(tmp_path: Path) -> None:
    results = Results("step", "cpu", {"threads": 1})
    times = {"textbook": Timing((2.0,) * 5), "ours": Timing((0.5,) * 5)}
    results.add("a step", times, unit="images/s", amount=64, extras={"ours": {"peak_gib": 1.25}})
    results.save(tmp_path / "machine")
    text = "before\n<!-- results machine/step.json extras=peak_gib -->\nold\n<!-- end results -->\nafter\n"
    made = written(text, tmp_path)
    assert "| textbook | 32 [32 - 32] | 1 |  |" in made
    assert "| **ours** | **128 [128 - 128]** | **4.00 [4.00 - 4.00]** | 1.25 |" in made
    assert made.startswith("before\n")
    assert made.endswith("<!-- end results -->\nafter\n")
    assert "old" not in made
    assert written(made, tmp_path) == made
    with pytest.raises(ValueError, match="must have suites whose name contains 'nothing'"):
        written(text.replace("extras=peak_gib", "suites=nothing"), tmp_path)
