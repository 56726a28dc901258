"""Charts: where things lie, what is written on them, and that anything may be given to them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byol_fast.report import charts
from byol_fast.report.charts import Series, bar_chart, heat_map, line_chart, scatter, timeline
from tests.report.parsing import HOSTILE, SVG, lines, numbers, svg, texts

NAN, INF = math.nan, math.inf


def line(y: list[float | None], **options: object) -> str:
    return line_chart([Series("y", list(range(len(y))), y)], title="t", x_label="x", y_label="y", **options)  # type: ignore[arg-type]


def label_positions(chart: str, axis: str) -> dict[str, float]:
    """Where along an axis each of its labels lies."""
    elements = [e for e in svg(chart).iter(f"{SVG}text") if (e.get("text-anchor") == "end") == (axis == "y")]
    return {e.text or "": float(e.get(axis, "nan")) for e in elements}


def test_points_lie_where_the_axes_say() -> None:
    chart = line_chart(
        [Series("y", [1, 2, 3, 5], [10.0, 20.0, 0.0, 40.0])],
        title="t",
        x_label="x",
        y_label="y",
        x_range=(0, 5),
        y_range=(0, 40),
    )
    (points,) = lines(svg(chart))
    across, up = label_positions(chart, "x"), label_positions(chart, "y")
    for (x, y), (x_label, y_label) in zip(points, [("1", "10"), ("2", "20"), ("3", "0"), ("5", "40")], strict=True):
        assert x == pytest.approx(across[x_label], abs=0.06)
        assert y == pytest.approx(up[y_label], abs=0.06)


def test_logarithmic_axes() -> None:
    chart = line_chart(
        [Series("y", [1, 10, 100, 0, 1000], [1e-3, 1e-1, 10, 5, 1e3])],
        title="t",
        x_label="x",
        y_label="y",
        x_log=True,
        y_log=True,
    )
    first, second = lines(svg(chart))[0], svg(chart).findall(f".//{SVG}circle")
    assert len(first) == 3  # what has no logarithm is a gap
    assert len(second) == 1
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(first)]
    assert steps[0] == pytest.approx(steps[1], abs=0.11)
    assert first[2][1] == pytest.approx(label_positions(chart, "y")["10"], abs=0.06)


def test_gaps_break_a_line_and_single_points_are_seen() -> None:
    chart = svg(line([1, 2, None, 3, 4, NAN, 5, INF, 6, 7]))
    assert [len(piece) for piece in lines(chart)] == [2, 2, 2]
    assert len(chart.findall(f".//{SVG}circle")) == 1


def test_long_runs_stay_small_and_show_their_extremes() -> None:
    y: list[float | None] = [math.sin(i / 1e4) for i in range(100_000)]
    y[31_415], y[60_000] = 3.0, -3.0
    y[500:40_000:500] = [None] * 79  # gaps that nobody could see
    text = line(y, y_range=(-3, 3))
    assert len(text) < 40_000
    chart = svg(text)
    (drawn,) = lines(chart)
    up = label_positions(text, "y")
    band = next(p for p in chart.iter(f"{SVG}path") if p.get("fill-opacity"))
    heights = [h for command, n in numbers(band.get("d", "")) if command in "ML" for h in n[1::2]]
    assert min(heights) < up["2"] < up["-2"] < max(heights)
    unit = up["0"] - up["2"]
    for x, height in drawn:  # the mean follows the sine; a column holds about 220 of the points
        k = (x - drawn[0][0]) / (drawn[-1][0] - drawn[0][0]) * 1e5
        assert (up["0"] - height) / unit * 2 == pytest.approx(math.sin(k / 1e4), abs=0.06)


@given(
    st.floats(-1e9, 1e9, allow_nan=False),
    st.floats(1e-7, 1e9),
    st.integers(2, 8),
)
def test_ticks_are_round_and_their_labels_are_true(low: float, span: float, count: int) -> None:
    high = low + span
    if (high - low) < 1e-6 * max(abs(low), abs(high)):
        return  # beyond what labels of nine decimals can tell apart
    axis = charts._Axis(low, high, log=False)
    assert axis.low <= low + 1e-9 * span
    assert axis.high >= high - 1e-9 * span
    ticks = axis.ticks(count)
    assert len(ticks) <= count + 1
    step = charts._step(axis.high - axis.low, count)
    assert re.fullmatch(r"[125]e[+-]\d+", f"{step:.0e}")
    labels = [axis.label(tick, count) for tick in ticks]
    assert len(set(labels)) == len(labels)
    for tick, label in zip(ticks, labels, strict=True):
        letter = label[-1] if label[-1] in "kMGTP" else ""
        value = float(label.removesuffix(letter)) * 1000.0 ** (" kMGTP".index(letter) if letter else 0)
        assert value == pytest.approx(tick, abs=step * 1e-3 + 1e-9 * abs(tick))


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((0, 100_000), ["0", "20k", "40k", "60k", "80k", "100k"]),
        ((0, 2000), ["0", "500", "1k", "1.5k", "2k"]),
        ((0.996, 1), ["0.996", "0.997", "0.998", "0.999", "1.000"]),
        ((0, 4e-4), ["0", "1e-4", "2e-4", "3e-4", "4e-4"]),
        ((-1, 1), ["-1.0", "-0.5", "0", "0.5", "1.0"]),
    ],
)
def test_labels_as_people_write_them(span: tuple[float, float], expected: list[str]) -> None:
    axis = charts._Axis(*span, log=False)
    assert [axis.label(tick, 5) for tick in axis.ticks(5)] == expected


def bars_of(chart: str) -> list[tuple[float, float, float, float]]:
    names = ("x", "y", "width", "height")
    return [
        tuple(float(e.get(n, "nan")) for n in names)  # type: ignore[misc]
        for e in svg(chart).iter(f"{SVG}rect")
        if e.find(f"{SVG}title") is not None
    ]


def test_bars_grow_from_zero_in_proportion() -> None:
    upright = bars_of(bar_chart(["a", "b", "c"], [1.0, 2.0, -1.0], title="t", y_label="y"))
    assert upright[1][3] == pytest.approx(2 * upright[0][3], abs=0.2)
    assert upright[2][1] == pytest.approx(upright[0][1] + upright[0][3], abs=0.1)  # hangs where the others stand
    lying = bars_of(bar_chart(["a", "b", "gone"], [1.0, 2.0, None], title="t", y_label="y", horizontal=True))
    assert [bar[2] for bar in lying] == pytest.approx([lying[0][2], 2 * lying[0][2]], abs=0.2)


@pytest.mark.parametrize("horizontal", [False, True])
def test_error_bars_end_where_they_should(horizontal: bool) -> None:
    text = bar_chart(["a", "b"], [5.0, 10.0], title="t", y_label="y", errors=[(0, 10), (10, 10)], horizontal=horizontal)
    error = next(p for p in svg(text).iter(f"{SVG}path") if p.get("stroke-width") == "1.4")
    spread = [n for command, n in numbers(error.get("d", "")) if command in "MHV"]
    (_, _, long, tall) = bars_of(text)[1]
    ends = [spread[0][0], spread[1][0]] if horizontal else [spread[0][1], spread[1][0]]
    assert abs(ends[1] - ends[0]) == pytest.approx(long if horizontal else tall, abs=0.2)


def test_shades_follow_values_and_small_matrices_have_numbers() -> None:
    text = heat_map([[0, 5], [10, None]], ["r0", "r1"], ["c0", "c1"], title="t", x_label="x", y_label="y")
    cells = [e for e in svg(text).iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    assert [float(e.get("fill-opacity", "nan")) for e in cells] == [0, 0.5, 1]
    assert [e.findtext(f"{SVG}title") for e in cells] == ["r0, c0: 0", "r0, c1: 5", "r1, c0: 10"]
    assert {"5", "10"} <= set(texts(svg(text)))
    names = [f"class {i}" for i in range(100)]
    large = heat_map([[float(i == j) for j in range(100)] for i in range(100)], names, names, title="t")
    assert len(large) < 30_000
    drawn = [p for p in svg(large).iter(f"{SVG}path") if p.get("fill-opacity") == "1"]
    assert len(numbers(drawn[0].get("d", ""))) == 5 * 100  # the diagonal


def test_scatter_shows_every_point_and_one_a_pixel_of_very_many() -> None:
    few = svg(scatter([Series("a", [1, 2, None], [1, 2, 3]), Series("b", [1.5], [1.5])], title="t"))
    assert [e.text for e in few.iter(f"{SVG}title")] == ["t", "a: 1, 1", "a: 2, 2", "b: 1.5, 1.5"]
    assert {"a", "b"} <= set(texts(few))
    i = range(100_000)
    many = scatter([Series("a", [k % 317 for k in i], [k % 211 for k in i])], title="t", x_label="x", y_label="y")
    assert len(many) < 1_500_000


def test_timeline_spans() -> None:
    spans = [(0.0, 10.0, "conv"), (10.0, 15.0, "norm")]
    crowd = [(20 + i * 1e-3, 20 + i * 1e-3 + 5e-4, "norm") for i in range(5000)]
    text = timeline([("gpu", spans), ("host", crowd)], title="t")
    drawn = bars_of(text)
    assert drawn[0][2] == pytest.approx(2 * drawn[1][2], abs=0.02)
    assert drawn[0][0] + drawn[0][2] == pytest.approx(drawn[1][0], abs=0.02)
    assert len(drawn) < 20
    assert {"gpu", "host", "conv", "norm", "ms"} <= set(texts(svg(text)))


MAKERS: dict[str, Callable[[list[str], list[float | None]], str]] = {
    "line": lambda names, y: line_chart(
        [Series(n, range(len(y)), y, markers=True) for n in names], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE
    ),
    "bar": lambda names, y: bar_chart(names[: len(y)], y[: len(names)], title=HOSTILE, y_label=HOSTILE),
    "lying bar": lambda names, y: bar_chart(
        names[: len(y)], y[: len(names)], title=HOSTILE, y_label=HOSTILE, horizontal=True
    ),
    "heat": lambda names, y: heat_map(
        [y for _ in names], names, names[:1] * len(y), title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE
    ),
    "scatter": lambda names, y: scatter([Series(n, y, y) for n in names], title=HOSTILE, x_label=HOSTILE),
    "log": lambda names, y: scatter([Series(n, y, y) for n in names], title=HOSTILE, x_log=True, y_log=True),
    "timeline": lambda names, y: timeline([(n, [(0.0, v or NAN, n) for v in y]) for n in names], title=HOSTILE),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_anything_may_be_drawn(make: Callable[[list[str], list[float | None]], str]) -> None:
    whole = svg(make([HOSTILE, "b", "c"], [3.0, NAN, 1e-300]))
    assert whole.find(f"{SVG}title") is not None
    assert "alert('x')" in (whole.findtext(f"{SVG}title") or "")
    assert not list(whole.iter(f"{SVG}script"))
    assert whole.get("role") == "img"
    edges: list[list[float | None]] = [[5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [-1e30, 2.0, 1e30], [NAN, 1.0, INF]]
    for y in edges:
        assert not re.search(r"\b(nan|inf)\b", make(["a", "b", "c"], y))
    for nothing in (make([], []), make(["a"], []) if make is not MAKERS["heat"] else "", make(["a"], [None])):
        assert not nothing or "no data" in texts(svg(nothing))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="y of 'a' must be as long as x"):
        Series("a", [1, 2], [1])
    with pytest.raises(ValueError, match="every one of 2 labels must have a value"):
        bar_chart(["a", "b"], [1], title="t", y_label="y")
    with pytest.raises(ValueError, match="must be 1 rows of 2"):
        heat_map([[1, 2, 3]], ["a"], ["b", "c"], title="t")
