"""Curves of a run: accuracies with their intervals, and numbers as text."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from byol_fast.report.build import report
from byol_fast.report.formatting import readable
from tests.report.parsing import SVG, boxes, read, svg, texts, ticks, vertices
from tests.report.test_report import Record, run_folder, steps


def test_accuracies_share_a_chart_with_intervals(tmp_path: Path) -> None:
    """Wilson's interval of half of n images is 1/2 -+ z / 2 sqrt(n + z^2)."""
    sizes: Record = {"knn_k": 20, "knn_num_train": 1000, "knn_num_val": 100}
    judged = [{"step": 0, "epoch": 0.0, "knn_top1": 0.25, **sizes}]
    judged += [{"step": 12, "epoch": 1.2, "knn_top1": 0.5, "probe_val_top1": 0.75, **sizes}]
    text = Path(report([run_folder(tmp_path / "run", [judged[0], *steps(12), judged[1]])], pictures=False)).read_text()
    page, charts = read(text), [svg(c) for c in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    chart = next(c for c in charts if "Accuracy on the validation images" in texts(c))
    assert {"kNN", "linear probe", "top-1, %"} <= set(texts(chart))
    assert {"kNN: 12, 50.0%", "linear probe: 12, 75.0%"} <= set(boxes(chart))
    half = 100 * 1.95996 / 2 / math.sqrt(100 + 1.95996**2)
    bars = [p for p in chart.iter(f"{SVG}path") if "stroke-width: 1.1" in p.get("style", "")]
    scale = ticks(chart, "y")
    (a, at_a), *_, (b, at_b) = ((float(label), place) for label, place in scale.items())
    stems = [piece for piece in vertices(bars[0]) if abs(piece[0][0] - piece[1][0]) < 0.01]
    ends = sorted(a + (y - at_a) / (at_b - at_a) * (b - a) for _, y in stems[1])
    assert ends == pytest.approx([50 - half, 50 + half], abs=0.05)
    assert "Error bars: 95 % intervals for 100 validation images." in page.text
    assert not {"knn_num_val", "knn_num_train"} & {title for c in charts for title in texts(c)}


def test_end_of_the_extended_run_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps(12), extend="/runs/first", extended_at=6)
    page = read(Path(report([folder], pictures=False)).read_text())
    assert "To step 6: the run first, which this one extends" in page.text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (2310.4, 3, "2,310"),
        (0.0123456, 3, "0.0123"),
        (999.96, 4, "1,000"),
        (0.5, 3, "0.5"),
        (11527, 3, "11,527"),
        (1.2e-5, 3, "1.2e-5"),
        (-12.345, 3, "-12.3"),
        (0.0, 3, "0"),
        (1e30, 3, "1e30"),
        (16672.3, 4, "16,672"),
    ],
)
def test_numbers_are_readable(value: float, digits: int, text: str) -> None:
    assert readable(value, digits) == text
