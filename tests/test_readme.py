"""The performance tables of README and docs are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import BLOCK, DOCUMENTS, QUEUE_BLOCK, ROOT, render
from byol_fast.bench.results import Results
from byol_fast.bench.timing import Timing

README = ROOT / "README.md"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_equal_the_results(path: Path) -> None:
    text = path.read_text()
    assert render(text, ROOT / "benchmarks" / "results") == text


def test_readme_is_short_and_has_one_table_of_speed() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(BLOCK.findall(text)) + len(QUEUE_BLOCK.findall(text)) == 1


def test_table_says_how_many_times_faster_than_the_first_row(tmp_path: Path) -> None:
    results = Results("step", "cpu", {"threads": 1})
    times = {"baseline, fp32": Timing((2.0,) * 5), "lightly": Timing((4.0,) * 5), "byol_fast": Timing((0.5,) * 5)}
    times["byol_fast: threaded + PIL's operators"] = Timing((9.0,) * 5)  # removed since
    results.add("a step", times, unit="images/s", num_items=64, extras={"byol_fast": {"peak_gib": 1.25}})
    results.save(tmp_path / "machine")

    text = "before\n<!-- results machine/step.json extras=peak_gib -->\nold\n<!-- end results -->\nafter\n"
    rendered = render(text, tmp_path)
    assert "| baseline, fp32 | 32 [32 - 32] | 1 |  |" in rendered
    assert "| **byol_fast** | **128 [128 - 128]** | **4.00 [4.00 - 4.00]** | 1.25 |" in rendered
    assert "PIL" not in rendered
    assert rendered.startswith("before\n")
    assert rendered.endswith("<!-- end results -->\nafter\n")
    assert "old" not in rendered
    assert render(rendered, tmp_path) == rendered


def test_table_of_selected_rows_is_relative_to_the_first_of_them(tmp_path: Path) -> None:
    results = Results("step", "cpu")
    times = {"baseline, fp32": Timing((2.0,) * 5), "lightly": Timing((4.0,) * 5), "byol_fast": Timing((0.5,) * 5)}
    results.add("a step", times, unit="images/s", num_items=64)
    results.save(tmp_path / "machine")

    text = '<!-- results machine/step.json rows="lightly;baseline, fp32" title="One step" -->\n<!-- end results -->'
    lines = render(text, tmp_path).splitlines()
    assert lines[1].startswith("| One step | images/s | times faster |")
    assert lines[3:5] == ["| lightly | 16 [16 - 16] | 1 |", "| baseline, fp32 | 32 [32 - 32] | 2.00 [2.00 - 2.00] |"]
    with pytest.raises(ValueError, match="must have rows nobody"):
        render(text.replace("lightly;", "nobody;"), tmp_path)
    with pytest.raises(ValueError, match="must have suites whose name contains 'nothing'"):
        render(text.replace('title="One step"', "suites=nothing"), tmp_path)


def test_table_of_the_queue_has_a_row_for_each_figure(tmp_path: Path) -> None:
    environment = {"gpu": "a GPU", "nvidia_smi": {"driver_version": "5"}, "packages": {"torch": "2"}, "date": "today"}
    times = {"loop": (4.0, 3.0, 5.0), "byol_fast, eager": (2.0, 1.0, 2.5)}
    lines: list[dict[str, Any]] = [{"item": "steps", "commit": "0123456789ab", "environment": environment}]
    for figure, (middle, low, high) in times.items():
        lines.append({"figure": figure, "ms": middle, "ms_p20": low, "ms_p80": high, "images_per_second": 256 / middle})
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "steps.jsonl").write_text("\n".join(map(json.dumps, lines)))

    rows = "steps/loop/a loop;steps/byol_fast, eager/byol_fast"
    text = f'<!-- queue card title=Steps extras=images_per_second rows="{rows}" -->\n<!-- end queue -->'
    source = "(`benchmarks/results/card/`, steps.jsonl: median [20 % - 80 % quantile] over rounds; "
    assert render(text, tmp_path).splitlines()[1:-1] == [
        "| Steps | ms | times faster | images/s |",
        "|---|---:|---:|---:|",
        "| a loop | 4 [3 - 5] | 1 | 64 |",
        "| **byol_fast** | **2 [1 - 2.5]** | **2.00 [1.20 - 5.00]** | **128** |",
        "",
        source + "a GPU, driver 5, torch 2, commit 012345678, today)",
    ]
    with pytest.raises(ValueError, match="steps.jsonl must have the figure 'nobody'"):
        render(text.replace("/loop/", "/nobody/"), tmp_path)
