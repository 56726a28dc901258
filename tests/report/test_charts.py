"""Charts: positions, labels, tooltips, and any data."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byol_fast.report import svg as svg_module
from byol_fast.report.charts import Series, bar_chart, heat_map, line_chart, scatter, timeline
from byol_fast.report.drawing import WIDTH, format_tick
from tests.report.parsing import HOSTILE, SVG, boxes, dots, lines, svg, texts, ticks, tipped_paths, vertices

NAN, INF = math.nan, math.inf
LABELS: dict[str, Any] = {"title": "t", "x_label": "x", "y_label": "y"}


def value_at(position: float, scale: dict[str, float]) -> float:
    """The value at a position in pixels, by the two outermost ticks of a linear scale."""
    first, *_, last = scale
    low, start, high, end = float(first), scale[first], float(last), scale[last]
    return low + (position - start) / (end - start) * (high - low)


def test_line_points_lie_where_the_scales_say() -> None:
    x, y = [1, 2, 3, 5], [10.0, 20.0, 0.0, 40.0]
    chart = svg(line_chart([Series("y", x, y)], **LABELS, x_range=(0, 5), y_range=(0, 40)))
    (points,) = lines(chart)
    drawn = [(value_at(a, ticks(chart, "x")), value_at(b, ticks(chart, "y"))) for a, b in points]
    assert np.allclose(drawn, list(zip(x, y, strict=True)), atol=(0.001, 0.01))
    assert {"t", "x", "y"} <= set(texts(chart))


def test_values_outside_the_range_are_drawn_at_the_border() -> None:
    chart = svg(line_chart([Series("y", [0, 1, 2], [-5, 0.5, 7])], **LABELS, y_range=(0, 1)))
    assert [value_at(y, ticks(chart, "y")) for _, y in lines(chart)[0]] == pytest.approx([0, 0.5, 1], abs=0.001)


def test_logarithmic_axis_has_equal_decades_and_no_zero() -> None:
    chart = svg(line_chart([Series("y", [1, 10, 100, 0, 1000], [1, 2, 3, 4, 5])], **LABELS, x_log=True))
    (first,) = lines(chart)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(first)]
    assert len(first) == 3  # zero has no logarithm: a gap
    assert steps[0] == pytest.approx(steps[1], abs=0.02)
    assert [x for x, _ in first] == pytest.approx([ticks(chart, "x")[k] for k in ("1", "10", "100")], abs=0.02)
    assert [x for x, _ in dots(chart)] == pytest.approx([ticks(chart, "x")["1,000"]], abs=0.02)


def test_gaps_break_a_line_and_single_points_are_dots() -> None:
    y = [1, 2, None, 3, 4, NAN, 5, INF, 6, 7]
    chart = svg(line_chart([Series("y", range(10), y)], **LABELS))
    assert [len(piece) for piece in lines(chart)] == [2, 2, 2]
    (dot,) = dots(chart)
    assert value_at(dot[0], ticks(chart, "x")) == pytest.approx(6, abs=0.01)
    assert value_at(dot[1], ticks(chart, "y")) == pytest.approx(5, abs=0.01)


def test_marked_points_have_tooltips_at_their_place() -> None:
    chart = svg(line_chart([Series("a", [0, 1, 2], [3, None, 2.5], markers=True)], **LABELS))
    assert list(boxes(chart)) == ["a: 0, 3", "a: 2, 2.5"]
    assert value_at(boxes(chart)["a: 2, 2.5"][1], ticks(chart, "y")) == pytest.approx(2.5, abs=0.01)


def test_intervals_end_at_their_values_beside_their_points() -> None:
    x, y = [0.0, 1.0, 2.0], [50.0, 60.0, 70.0]
    shown: list[tuple[float, float] | None] = [(45.0, 55.5), None, (65.0, 74.0)]
    series = [Series(name, x, y, markers=True, intervals=shown) for name in "ab"]
    chart = svg(line_chart(series, **LABELS, unit="%"))
    bars = [p for p in chart.iter(f"{SVG}path") if "stroke-width: 1.1" in p.get("style", "")]
    assert len(bars) == 2
    for number, bar in enumerate(bars):
        stems = [piece for piece in vertices(bar) if abs(piece[0][0] - piece[1][0]) < 0.01]
        ends = [sorted(value_at(height, ticks(chart, "y")) for _, height in stem) for stem in stems]
        assert np.allclose(ends, [(45.0, 55.5), (65.0, 74.0)], atol=0.05)
        places = [value_at(stem[0][0] - 2 * number, ticks(chart, "x")) for stem in stems]
        assert np.allclose(places, [0, 2], atol=0.01)
    assert "a: 1, 60.0%" in tipped_paths(chart)
    with pytest.raises(ValueError, match="y of 'a' must be as long as x"):
        Series("a", x, y, intervals=shown[:2])


def test_series_without_values_is_not_in_the_legend() -> None:
    series = [Series("a", [1, 2], [1, 2]), Series("nothing", [], []), Series("b", [1, 2], [2, 1])]
    chart = line_chart(series, **LABELS)
    assert "nothing" not in texts(svg(chart))
    assert "--chart-2" in chart  # b keeps its color, the same in all charts of a page


def test_long_line_is_mean_over_band() -> None:
    y: list[float | None] = [math.sin(i / 1e4) for i in range(100_000)]
    y[31_415], y[60_000] = 3.0, -3.0
    y[500:40_000:500] = [None] * 79  # gaps of less than a pixel
    text = line_chart([Series("y", range(100_000), y)], **LABELS, y_range=(-3, 3))
    assert len(text) < 40_000
    chart = svg(text)
    (drawn,) = lines(chart)
    band = next(p for p in chart.iter(f"{SVG}path") if "opacity: 0.22" in p.get("style", ""))
    heights = [value_at(height, ticks(chart, "y")) for _, height in vertices(band)[0]]
    assert (min(heights), max(heights)) == pytest.approx((-3, 3), abs=0.01)
    for x, height in drawn:  # a column of pixels holds about 240 points
        mean = value_at(height, ticks(chart, "y"))
        k = (x - drawn[0][0]) / (drawn[-1][0] - drawn[0][0]) * 1e5
        assert mean == pytest.approx(math.sin(k / 1e4), abs=0.06)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 20_000, 40_000], ["0", "20,000", "40,000"]),
        ([0, 500, 1000, 1500], ["0", "500", "1,000", "1,500"]),
        ([0, 50_000, 100_000], ["0", "50k", "100k"]),
        ([0, 500_000, 1_000_000], ["0", "500k", "1M"]),
        ([0.998, 0.999, 1.0], ["0.998", "0.999", "1.000"]),
        ([0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([-1, -0.5, 0, 0.5], ["-1.0", "-0.5", "0", "0.5"]),
    ],
)
def test_tick_labels_are_short(values: list[float], expected: list[str]) -> None:
    step, largest = values[1] - values[0], max(map(abs, values))
    assert [format_tick(v, step, largest) for v in values] == expected


@given(st.integers(-500, 500), st.sampled_from([1, 2, 5]), st.integers(-7, 8))
def test_tick_labels_are_true(first: int, digit: int, exponent: int) -> None:
    step = digit * 10.0**exponent
    values = [(first + k) * step for k in range(5)]
    labels = [format_tick(v, step, max(map(abs, values))) for v in values]
    assert len(set(labels)) == len(labels)
    for value, label in zip(values, labels, strict=True):
        letter = label[-1] if label[-1] in "kMGTP" else ""
        shown = float(label.removesuffix(letter).replace(",", "")) * 1000.0 ** (" kMGTP".index(letter) if letter else 0)
        assert shown == pytest.approx(value, abs=step * 1e-3 + 1e-9 * abs(value))


def test_bars_and_intervals_end_at_their_values() -> None:
    names, values = ["a", "b", "gone", "c"], [1.0, 2.5, None, -1.0]
    intervals = [(0.5, 1.5), (NAN, 3.0), (NAN, NAN), (-1.5, -0.25)]
    chart = svg(bar_chart(names, values, title="t", x_label="x", intervals=intervals))
    scale = ticks(chart, "x")
    ends = [tuple(value_at(x, scale) for x in (box[0], box[2])) for box in boxes(chart).values()]
    assert np.allclose(ends, [(0, 1), (0, 2.5), (-1, 0)], atol=0.01)
    errors = [p for p in chart.iter(f"{SVG}path") if "stroke-width: 1.4" in p.get("style", "")]
    spans = [[value_at(x, scale) for x, _ in vertices(p)[0]] for p in errors]
    assert np.allclose(spans, [intervals[0], intervals[3]], atol=0.01)
    tops = [box[1] for box in boxes(chart).values()]
    assert tops == sorted(tops)
    assert {*names, "1", "2.5", "-1", "x"} <= set(texts(chart))


def test_matrix_shades_follow_values() -> None:
    chart = svg(heat_map([[0, 5], [10, None]], ["r0", "r1"], ["c0", "c1"], **LABELS))
    cells = tipped_paths(chart)
    opacity = {t: float((re.search(r"opacity: ([\d.]+)", p.get("style", "")) or "01")[1]) for t, p in cells.items()}
    assert opacity == {"r0, c0: 0": 0, "r0, c1: 5": 0.5, "r1, c0: 10": 1}
    assert boxes(chart)["r0, c1: 5"][0] == pytest.approx(boxes(chart)["r0, c0: 0"][2], abs=0.02)
    assert boxes(chart)["r1, c0: 10"][1] == pytest.approx(boxes(chart)["r0, c0: 0"][3], abs=0.02)
    assert {"5", "10", "r0", "r1", "c0", "c1", "x", "y"} <= set(texts(chart))


def test_large_matrix_is_one_path_per_shade() -> None:
    names = [f"class {i}" for i in range(100)]
    text = heat_map([[float(i == j) for j in range(100)] for i in range(100)], names, names, title="t")
    assert len(text) < 30_000
    diagonal = next(p for p in svg(text).iter(f"{SVG}path") if "fill: var" in p.get("style", ""))
    corners = np.array([piece[0] for piece in vertices(diagonal)])
    assert len(corners) == 100
    assert np.allclose(np.diff(corners, axis=0), np.diff(corners, axis=0)[0], atol=0.02)


def test_scatter_points_have_tooltips_at_their_place() -> None:
    groups = [Series("a", [1, 2, None], [1, 2, 3]), *(Series(name, [1.5], [1.25]) for name in "bcd")]
    chart = svg(scatter(groups, title="t", x_label="x", y_label="y"))
    assert list(boxes(chart)) == ["a: 1, 1", "a: 2, 2", "b: 1.5, 1.25", "c: 1.5, 1.25", "d: 1.5, 1.25"]
    for text, (left, top, right, bottom) in boxes(chart).items():  # dots, squares, triangles, diamonds
        x, y = map(float, text.split(": ")[1].split(", "))
        assert value_at((left + right) / 2, ticks(chart, "x")) == pytest.approx(x, abs=0.01)
        assert value_at((top + bottom) / 2, ticks(chart, "y")) == pytest.approx(y, abs=0.01)
    assert {"a", "b", "c", "d"} <= set(texts(chart))


def test_scatter_of_very_many_points_shows_one_per_pixel() -> None:
    i = np.arange(30_000)
    text = scatter([Series("a", (i % 97 / 16).tolist(), (i % 61).tolist())], title="t", x_label="x", y_label="y")
    points = dots(svg(text))
    assert len(set(points)) == len(points) == 97 * 61
    crowded = scatter([Series("a", (i / 3e4).tolist(), (i * 0.0).tolist())], title="t", x_label="x", y_label="y")
    assert 300 < len(dots(svg(crowded))) <= WIDTH
    assert len(text) < 200_000


def test_timeline_spans_lie_at_their_times() -> None:
    spans = [(0.0, 10.0, "conv"), (10.0, 15.0, "norm")]
    crowd = [(20 + i * 1e-3, 20 + i * 1e-3 + 5e-4, "norm") for i in range(5000)]
    chart = svg(timeline([("gpu", spans), ("host", crowd)], title="t"))
    scale = ticks(chart, "x")
    shapes = boxes(chart)
    assert [value_at(x, scale) for x in shapes["conv: 0 to 10 ms"][::2]] == pytest.approx([0, 10], abs=0.05)
    assert [value_at(x, scale) for x in shapes["norm: 10 to 15 ms"][::2]] == pytest.approx([10, 15], abs=0.05)
    assert shapes["conv: 0 to 10 ms"][3] < shapes["norm: 20 to 25 (5,000 spans) ms"][1]
    assert len(shapes) == 3
    assert {"gpu", "host", "conv", "norm", "ms"} <= set(texts(chart))
    by_kind = svg(timeline([("conv", spans[:1]), ("norm", spans[1:])], title="t"))
    assert texts(by_kind).count("conv") == 1  # the name of the row; no legend


def test_colors_are_variables_of_the_page() -> None:
    names = [str(i) for i in range(12)]
    charts = [
        line_chart([Series(n, [0, 1], [0, 1]) for n in names], **LABELS),
        heat_map([[1.0, 0.5]], ["r"], ["a", "b"], title="t"),
    ]
    for chart in charts:
        assert set(re.findall(r"#[0-9a-f]{6}", chart)) <= {*svg_module.COLORS, "#4aa3df"}
        assert not re.search(r"(?<!,)#", chart)  # none but a variable's default
    assert {f"var(--chart-{i},{c})" for i, c in enumerate(svg_module.COLORS)} <= set(
        re.findall(r"var\([^)]*\)", charts[0])
    )
    assert "var(--chart-shade,#4aa3df)" in charts[1]


def test_equal_data_give_an_equal_chart_without_ids() -> None:
    chart, again = (scatter([Series("a", [1, 2], [3, 4])], **LABELS) for _ in range(2))
    assert chart == again
    assert " id=" not in chart
    assert "http" not in chart.replace("http://www.w3.org/2000/svg", "")


def test_importing_charts_does_not_import_matplotlib() -> None:
    code = "import sys, byol_fast.report.build, byol_fast.profiling.page; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


MAKERS: dict[str, Callable[[list[str], list[float | None]], str]] = {
    "line": lambda names, y: line_chart(
        [Series(n, range(len(y)), y, markers=True) for n in names], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE
    ),
    "bar": lambda names, y: bar_chart(names[: len(y)], y[: len(names)], title=HOSTILE, x_label=HOSTILE),
    "heat": lambda names, y: heat_map(
        [y for _ in names], names, names[:1] * len(y), title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE
    ),
    "scatter": lambda names, y: scatter([Series(n, y, y) for n in names], title=HOSTILE, x_label=HOSTILE),
    "log": lambda names, y: scatter([Series(n, y, y) for n in names], title=HOSTILE, x_log=True, y_log=True),
    "timeline": lambda names, y: timeline([(n, [(0.0, v or NAN, n) for v in y]) for n in names], title=HOSTILE),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_any_text_and_any_number_may_be_drawn(make: Callable[[list[str], list[float | None]], str]) -> None:
    chart = svg(make([HOSTILE, "$b_2$", "c"], [3.0, NAN, 1e-300]))
    assert "alert('x')" in (chart.findtext(f"{SVG}title") or "")
    assert chart.findtext(f"{SVG}desc")
    assert not list(chart.iter(f"{SVG}script"))
    assert (chart.get("role"), chart.get("width")) == ("img", "100%")
    edges: list[list[float | None]] = [[5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [-1e30, 2.0, 1e30], [NAN, 1.0, INF]]
    for y in edges:
        assert not re.search(r"\b(nan|inf)\b", make(["a", "b", "c"], y))
    for nothing in (make([], []), make(["a"], []) if make is not MAKERS["heat"] else "", make(["a"], [None])):
        assert not nothing or "no data" in texts(svg(nothing))


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="y of 'a' must be as long as x"):
        Series("a", [1, 2], [1])
    with pytest.raises(ValueError, match="each of 2 labels must have a value"):
        bar_chart(["a", "b"], [1], title="t", x_label="y")
    with pytest.raises(ValueError, match="must be 1 rows of 2"):
        heat_map([[1, 2, 3]], ["a"], ["b", "c"], title="t")
