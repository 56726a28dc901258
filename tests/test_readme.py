"""The README's tables come from the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme import BLOCK, ROOT, update_tables
from byol_fast.bench.results import Results
from byol_fast.bench.timing import Timing


def test_readme_tables_match_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert BLOCK.search(text)
    assert update_tables(text, ROOT / "benchmarks" / "results") == text


def test_tables_show_relative_speed_and_extras(tmp_path: Path) -> None:
    results = Results("step", "cpu", {"threads": 1})
    times = {"baseline": Timing((2.0,) * 5), "byol_fast": Timing((0.5,) * 5)}
    results.add("a step", times, unit="images/s", num_items=64, extras={"byol_fast": {"peak_gib": 1.25}})
    results.save(tmp_path / "machine")
    text = "before\n<!-- results machine/step.json extras=peak_gib -->\nold\n<!-- end results -->\nafter\n"
    updated = update_tables(text, tmp_path)
    assert "| baseline | 32 [32 - 32] | 1 |  |" in updated
    assert "| **byol_fast** | **128 [128 - 128]** | **4.00 [4.00 - 4.00]** | 1.25 |" in updated
    assert updated.startswith("before\n")
    assert updated.endswith("<!-- end results -->\nafter\n")
    assert "old" not in updated
    assert update_tables(updated, tmp_path) == updated
    with pytest.raises(ValueError, match="must have suites whose name contains 'nothing'"):
        update_tables(text.replace("extras=peak_gib", "suites=nothing"), tmp_path)
