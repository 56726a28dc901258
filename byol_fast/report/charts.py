"""Charts as SVG that follow a page's colors, light and dark; each is a valid file, too. matplotlib draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from byol_fast.report import drawing
from byol_fast.report.drawing import DASHES, HEIGHT, LOW, MARGIN, SMALL, WIDTH, Array, Key, pen
from byol_fast.report.formatting import readable
from byol_fast.report.svg import INK, SHADE, tooltip_id
from byol_fast.utils.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Number = float | None
Span = tuple[float, float, str]

SHADES = 20
"""Shades of a matrix that is too large for numbers."""
NUMBERED_COLUMNS = 12
"""Columns of a matrix that has room for numbers."""
MAX_TOOLTIPS = 200
"""A scatter chart with more points has no tooltips."""
MANY_POINTS = 5000
"""A scatter chart with more points shows one point per pixel."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or a group of points."""

    name: str
    """Its name in the legend."""
    x: Sequence[Number]
    """Positions; where one, or its `y`, is None or not finite, there is a gap."""
    y: Sequence[Number]
    """Values, as many as positions."""
    markers: bool = field(default=False, kw_only=True)
    """Mark every point of a line, with a tooltip."""
    intervals: Sequence[Interval | None] = field(default=(), kw_only=True)
    """Lowest and highest value of each point, drawn as error bars; None where they are not known."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.intervals or self.x) != len(self.x):
            raise ValueError(f"chart: y of {self.name!r} must be as long as x ({len(self.x)}), got {len(self.y)}")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    x_range: Interval | None = None,
    y_range: Interval | None = None,
    unit: str = "",
    low: bool = False,
) -> str:
    """Lines over a common axis.

    Where a line has many more points than the chart has pixels, the mean of each column of pixels is drawn over a
    band from its lowest to its highest value.

    Args:
        series: the lines.
        title: of the chart.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        x_log: logarithmic horizontal axis; values that are not positive are gaps.
        x_range: ends of the horizontal axis, instead of the data's; no point may lie outside.
        y_range: ends of the vertical axis, instead of the data's; values outside are drawn at the border.
        unit: of the values, in tooltips.
        low: less high than others, for a curve whose shape is all that matters.

    Returns:
        An `<svg>` element.
    """
    points = [_points(s, x_log=x_log) for s in series]
    if not _num_known(points):
        return drawing.empty(title)
    with drawing.style():
        legend = [_line_key(s, p, i) for i, (s, p) in enumerate(zip(series, points, strict=True)) if _num_known([p])]
        height = LOW if low else HEIGHT
        figure, axes = drawing.two_axes(title, legend, x_label=x_label, y_label=y_label, height=height)
        drawing.set_axis(axes, "x", [p[:, 0] for p in points], limits=x_range, log=x_log, count=6)
        values = [*(p[:, 1] for p in points), *(_ends(s).ravel() for s in series)]
        drawing.set_axis(axes, "y", values, limits=y_range, pad=0.04, count=3 if low else 5)
        for number, (s, p) in enumerate(zip(series, points, strict=True)):
            p[:, 1] = p[:, 1].clip(*axes.get_ylim())
            _draw_intervals(figure, axes, p, _ends(s), number)
            _draw_line(figure, axes, s, p, number, unit)
        return drawing.save(figure, title, _describe(series, points))


def scatter(
    groups: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    x_log: bool = False,
    y_log: bool = False,
    lines: Sequence[Series] = (),
) -> str:
    """Points in groups, each with a color and a shape; without labels the axes have no numbers either.

    Args:
        groups: the points.
        title: of the chart.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        x_log: logarithmic horizontal axis; values that are not positive are left out.
        y_log: the same for the vertical axis.
        lines: drawn behind the points in the color of the text, for example the roof of a roofline.

    Returns:
        An `<svg>` element.
    """
    behind, points = ([_points(s, x_log=x_log, y_log=y_log) for s in part] for part in (lines, groups))
    if not _num_known([*behind, *points]):
        return drawing.empty(title)
    bare = not x_label and not y_label
    styles = [{"color": INK, "alpha": 0.7, "linestyle": style} for style in DASHES]
    legend = [Key(s.name, line=styles[i % len(styles)]) for i, s in enumerate(lines)]
    legend += [Key(s.name, mark=i) for i, s in enumerate(groups)]
    with drawing.style():
        figure, axes = drawing.two_axes(title, legend, x_label=x_label, y_label=y_label, bare=bare)
        drawing.set_axis(axes, "x", [p[:, 0] for p in behind + points], log=x_log, pad=0.03, count=0 if bare else 6)
        drawing.set_axis(axes, "y", [p[:, 1] for p in behind + points], log=y_log, pad=0.03, count=0 if bare else 5)
        for i, p in enumerate(behind):
            axes.plot(*p.T, **styles[i % len(styles)])
        points = [p[np.isfinite(p[:, 0])] for p in points]
        total = sum(map(len, points))
        for number, (s, p) in enumerate(zip(groups, points, strict=True)):
            at = axes.transData.transform(p)
            if total > MAX_TOOLTIPS:
                at = np.unique(at.round(0 if total > MANY_POINTS else 1), axis=0)
                drawing.draw_marks(figure, at, number, radius=2.0)
                continue
            for spot, (x, y) in zip(at, p, strict=True):
                tooltip = f"{s.name}: {readable(x)}, {readable(y)}"
                drawing.draw_marks(figure, spot[None], number, radius=3.6, tooltip=tooltip)
        return drawing.save(figure, title, _describe([*lines, *groups], [*behind, *points]))


def bar_chart(
    labels: Sequence[str],
    values: Sequence[Number],
    *,
    title: str,
    x_label: str,
    intervals: Sequence[Interval] | None = None,
    unit: str = "",
) -> str:
    """Horizontal bars from 0, one below the other, with their values written beside them.

    Args:
        labels: names of the bars.
        values: their lengths; a bar without one is left out, its name stays.
        title: of the chart.
        x_label: of the axis of values.
        intervals: lowest and highest value of each bar, drawn as error bars where both are finite.
        unit: of the values beside the bars; percents have one decimal.

    Returns:
        An `<svg>` element.
    """
    if len(values) != len(labels) or (intervals is not None and len(intervals) != len(labels)):
        raise ValueError(f"chart: each of {len(labels)} labels must have a value (and interval), got {len(values)}")
    lengths = _floats(values)
    if not np.isfinite(lengths).any():
        return drawing.empty(title)
    ends = np.full((len(labels), 2), math.nan) if intervals is None else np.array(intervals, float)
    ends[~np.isfinite(ends).all(axis=1)] = math.nan
    shown = [_with_unit(v, unit) if math.isfinite(v) else "" for v in lengths]
    with drawing.style():
        right = 2 * MARGIN + max(map(drawing.width, shown))
        figure, axes = drawing.row_axes(title, labels, right=right, x_label=x_label)
        drawing.set_axis(axes, "x", [lengths, ends.ravel(), np.zeros(1)])
        for i in np.flatnonzero(np.isfinite(lengths)).tolist():
            axes.barh(i, lengths[i], 0.66, color=pen(0), gid=tooltip_id(f"{labels[i]}: {shown[i]}"))
            low, high = ends[i]
            if math.isfinite(low):
                gap, cap = math.nan, 0.16
                x, y = [low, high, gap, low, low, gap, high, high], [0, 0, gap, -cap, cap, gap, -cap, cap]
                axes.plot(x, np.add(y, i), color=INK, linewidth=1.4, solid_capstyle="butt")
            end = np.nanmax([lengths[i], high, 0.0])
            axes.annotate(shown[i], (end, i), (5, 0), textcoords="offset points", va="center_baseline")
        axes.axvline(0, color=INK, alpha=0.5, linewidth=0.8)
        return drawing.save(figure, title, f"{len(labels)} bars")


def heat_map(
    values: Sequence[Sequence[Number]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
) -> str:
    """A matrix as shades, with numbers where there is room for them.

    Args:
        values: rows of equal length; the shade grows from 0 (or the lowest, if that is less) to the highest.
        row_labels: one for each row.
        column_labels: one for each column.
        title: of the chart.
        x_label: meaning of the columns.
        y_label: meaning of the rows.

    Returns:
        An `<svg>` element.
    """
    columns = len(column_labels)
    if len(values) != len(row_labels) or any(len(row) != columns for row in values):
        raise ValueError(f"chart: values must be {len(row_labels)} rows of {columns}, as the labels are; got others")
    matrix = np.array([_floats(row) for row in values]).reshape(len(values), columns)
    if not np.isfinite(matrix).any():
        return drawing.empty(title)
    low, high = min(0.0, np.nanmin(matrix)), np.nanmax(matrix)
    shades = (matrix - low) / ((high - low) or 1.0)
    with drawing.style():
        figure, axes = drawing.matrix_axes(title, row_labels, column_labels, x_label=x_label, y_label=y_label)
        if columns > NUMBERED_COLUMNS:
            _draw_shades(axes, shades)
            return drawing.save(figure, title, f"{len(values)} rows, {columns} columns")
        size = min(SMALL, drawing.axes_pixels(axes)[0] / 3)
        for i, j in np.argwhere(np.isfinite(matrix)).tolist():
            text = readable(matrix[i, j])
            gid = tooltip_id(f"{row_labels[i]}, {column_labels[j]}: {text}")
            axes.barh(i + 0.5, 1, 1, j, color=SHADE, alpha=shades[i, j], gid=gid)
            if shades[i, j] > 0:
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center_baseline", size=size)
        return drawing.save(figure, title, f"{len(values)} rows, {columns} columns")


def timeline(rows: Sequence[tuple[str, Sequence[Span]]], *, title: str, unit: str = "ms") -> str:
    """Spans of time in rows.

    Args:
        rows: a name, and spans of (begin, end, kind); a kind has a color, and an entry in the legend unless all rows
            have the names of their spans' kinds.
        title: of the chart.
        unit: of the times.

    Returns:
        An `<svg>` element.
    """
    kinds = list(dict.fromkeys(kind for _, spans in rows for _, _, kind in spans))
    times = np.array([(begin, end) for _, spans in rows for begin, end, _ in spans]).reshape(-1, 2)
    times = times[np.isfinite(times).all(axis=1)]
    if not len(times):
        return drawing.empty(title)
    with drawing.style():
        swatches = [{"color": pen(i), "linewidth": 9, "solid_capstyle": "butt"} for i in range(len(kinds))]
        legend = [Key(kind, line=swatch) for kind, swatch in zip(kinds, swatches, strict=True)]
        if all(kind == name for name, spans in rows for _, _, kind in spans):
            legend = []
        figure, axes = drawing.row_axes(title, [name for name, _ in rows], legend, right=2 * MARGIN, x_label=unit)
        drawing.set_axis(axes, "x", [times.ravel(), np.zeros(1)])
        pixel = 1 / drawing.axes_pixels(axes)[0]
        for i, (_, spans) in enumerate(rows):
            for begin, end, kind, count in _merge_spans(spans, pixel / 2):
                text = f"{kind}: {readable(begin)} to {readable(end)}"
                text += f" ({count:,} spans) {unit}" if count > 1 else f" {unit}"
                color = pen(kinds.index(kind))
                axes.barh(i, max(end - begin, 0.3 * pixel), 0.75, begin, color=color, gid=tooltip_id(text))
        return drawing.save(figure, title, f"{sum(len(spans) for _, spans in rows)} spans in {len(rows)} rows")


# ---- data ----------------------------------------------------------------------------------------------------------


def _floats(values: Iterable[Number]) -> Array:
    """Values as an array, NaN for what is None or not finite."""
    array = np.array([math.nan if v is None else v for v in values], float)
    return np.where(np.isfinite(array), array, math.nan)


def _points(series: Series, *, x_log: bool = False, y_log: bool = False) -> Array:
    """Positions and values `[N, 2]`; both NaN where there is a gap."""
    points = np.stack([_floats(series.x), _floats(series.y)], axis=1)
    with np.errstate(invalid="ignore"):
        gap = np.isnan(points).any(axis=1) | (x_log & (points[:, 0] <= 0)) | (y_log & (points[:, 1] <= 0))
    points[gap] = math.nan
    return points


def _num_known(points: Iterable[Array]) -> int:
    return sum(int(np.isfinite(p[:, 0]).sum()) for p in points)


def _describe(series: Sequence[Series], points: Sequence[Array]) -> str:
    return f"{', '.join(s.name for s in series[:12])}; {_num_known(points)} points"


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.1f}%" if unit == "%" else readable(value) + unit


def _ends(series: Series) -> Array:
    """Ends of the intervals `[N, 2]`, NaN where one is not known."""
    ends = np.array([(math.nan, math.nan) if ends is None else ends for ends in series.intervals], float).reshape(-1, 2)
    ends[~np.isfinite(ends).all(axis=1)] = math.nan
    return ends


def _line_key(series: Series, points: Array, number: int) -> Key:
    """Entry of a line in the legend: dashes, and the mark of its points; without dashes if gaps separate all points."""
    known = np.isfinite(points[:, 0])
    has_line = bool((known[1:] & known[:-1]).any()) or not series.markers
    style = drawing.line_style(number) if has_line else None
    return Key(series.name, line=style, mark=number if series.markers else None)


def _draw_intervals(figure: Figure, axes: Axes, points: Array, ends: Array, number: int) -> None:
    """Draw error bars, those of each series a little beside its points, so that they do not cover each other."""
    shown = np.flatnonzero(np.isfinite(points[: len(ends), 0]) & np.isfinite(ends[:, 0]))
    x, cap, gap = axes.transData.transform(points[shown])[:, 0] + 2.0 * (number % 5), 2.5, np.full(len(shown), math.nan)
    low, high = (axes.transData.transform(np.stack([points[shown, 0], end], axis=1))[:, 1] for end in ends[shown].T)
    pieces = [(x, low), (x, high), (gap, gap)]
    pieces += [piece for y in (low, high) for piece in ((x - cap, y), (x + cap, y), (gap, gap))]
    line = np.array(pieces).transpose(2, 0, 1).reshape(-1, 2)
    if len(shown):
        drawing.draw_line(figure, line, color=pen(number), linewidth=1.1, solid_capstyle="butt")


def _draw_line(figure: Figure, axes: Axes, series: Series, points: Array, number: int, unit: str) -> None:
    pieces = _pieces(points, axes.transData.transform(points)[:, 0])
    if sum(map(len, pieces)) > 2 * WIDTH and not series.markers:
        columns = [_column_statistics(piece, axes.transData.transform(piece)[:, 0]) for piece in pieces]
        for x, _, low, high in columns:
            axes.fill([*x, *x[::-1]], [*low, *high[::-1]], color=pen(number), alpha=0.22, linewidth=0)
        pieces = [np.stack([x, mean], axis=1) for x, mean, _, _ in columns]
    gap = np.full((1, 2), math.nan)
    line = [part for piece in pieces if len(piece) > 1 for part in (piece, gap)]
    if line:
        axes.plot(*np.concatenate(line).T, **drawing.line_style(number))
    if not series.markers:
        alone = [axes.transData.transform(piece) for piece in pieces if len(piece) == 1]
        if alone:
            drawing.draw_dots(figure, np.concatenate(alone), radius=2, color=pen(number))
        return
    known = points[np.isfinite(points[:, 0])]
    for spot, (x, y) in zip(axes.transData.transform(known), known, strict=True):
        tooltip = f"{series.name}: {readable(x)}, {_with_unit(y, unit)}"
        drawing.draw_marks(figure, spot[None], number, radius=3.4, tooltip=tooltip)


def _pieces(points: Array, x_pixels: Array) -> list[Array]:
    """Lines between gaps. Gaps of less than two pixels cannot be seen and are bridged."""
    known = np.flatnonzero(np.isfinite(points[:, 0]))
    breaks = (np.diff(known) > 1) & (np.diff(x_pixels[known]) > 2)
    return np.split(points[known], np.flatnonzero(breaks) + 1)


def _column_statistics(piece: Array, x_pixels: Array) -> tuple[Array, Array, Array, Array]:
    """Mean position and mean, lowest and highest value of the points of each column of pixels."""
    order = np.argsort(x_pixels, kind="stable")
    x, y = piece[order].T
    _, starts, counts = np.unique(x_pixels[order].round(), return_index=True, return_counts=True)
    mean_x, mean_y = (np.add.reduceat(values, starts) / counts for values in (x, y))
    return mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def _draw_shades(axes: Axes, shades: Array) -> None:
    """Draw the cells of a large matrix: one path for each shade."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    levels = np.where(shades > 0, np.maximum(np.rint(shades * SHADES), 1), 0)
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for level in range(1, SHADES + 1):
        corners = np.argwhere(levels == level)[:, ::-1]
        if len(corners):
            path = Path((corners[:, None] + square).reshape(-1, 2), codes * len(corners))
            axes.add_patch(PathPatch(path, color=SHADE, alpha=level / SHADES, linewidth=0))


def _merge_spans(spans: Iterable[Span], slack: float) -> list[tuple[float, float, str, int]]:
    """Spans by begin, with a count: those of a kind that lie closer together than can be seen become one."""
    merged: list[tuple[float, float, str, int]] = []
    for begin, end, kind in sorted((s for s in spans if math.isfinite(s[0] + s[1])), key=lambda span: span[0]):
        if merged:
            first, last, previous, count = merged[-1]
            if previous == kind and begin - last < slack and min(end - begin, last - first) < slack:
                merged[-1] = (first, max(last, end), kind, count + 1)
                continue
        merged.append((begin, end, kind, 1))
    return merged
