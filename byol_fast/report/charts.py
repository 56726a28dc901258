"""Charts as SVG text: no dependencies, no script; they follow the page's text colour, and stand alone as files too."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Number = float | None
Interval = tuple[float, float]

WIDTH = 480
"""Of every chart, in its own units. Narrow, so that the text is readable where a phone shows it at 350 pixels."""
HEIGHT = 230
"""Of the plot of a chart with two axes, without title, labels and legend."""
FONT, SMALL = 13, 11.5
LINE = 17
MARGIN = 8
GUTTER = 150
"""Widest room for the names of rows."""
SHADES = 20
"""Of a matrix that is too large for numbers."""
MANY_POINTS = 5000
"""A scatter of more points than these shows one point a pixel."""

# Okabe and Ito's colours, darkened where they would be faint on white; a page may set others for a dark background.
COLOURS = ("#0072b2", "#d55e00", "#00845f", "#b3588a", "#a87400", "#3a98d0", "#7a4fbf", "#6b7280", "#8b5a2b", "#111111")
DARK_COLOURS = (
    *("#4aa3df", "#ff8c42", "#2ec4a0", "#e59ac2", "#f0c04a", "#a6dcff", "#b79cf0", "#9ca3af", "#c69a6b", "#eeeeee"),
)
DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or a group of points."""

    name: str
    """What the legend says."""
    x: Sequence[Number]
    """Positions; where one, or its `y`, is None or not finite, there is a gap."""
    y: Sequence[Number]
    """Values, as many as positions."""
    error: Sequence[Interval] | None = field(default=None, kw_only=True)
    """Lowest and highest value at each position, drawn as bars."""
    markers: bool = field(default=False, kw_only=True)
    """Mark every point of a line, and name its values when the pointer rests on it."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"chart: y of {self.name!r} must be as long as x ({len(self.x)}), got {len(self.y)}")
        if self.error is not None and len(self.error) != len(self.x):
            raise ValueError(
                f"chart: error of {self.name!r} must be as long as x ({len(self.x)}), got {len(self.error)}"
            )


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
    x_range: Interval | None = None,
    y_range: Interval | None = None,
) -> str:
    """Lines over a common axis.

    Where a line has many more points than the chart has pixels, their mean is drawn over a band from the lowest to
    the highest.

    Args:
        series: the lines.
        title: of the chart.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        x_log: logarithmic horizontal axis; what is not positive is left out.
        y_log: the same of the vertical axis.
        x_range: ends of the horizontal axis, instead of the data's; no point may lie outside.
        y_range: ends of the vertical axis, instead of the data's; what lies outside is drawn at the border.

    Returns:
        An `<svg>` element.
    """
    return _plot(series, (), title, x_label, y_label, x_log, y_log, x_range, y_range)


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
    """Points in groups, each with a colour and a shape; without labels the axes have no numbers either.

    Args:
        groups: the points.
        title: of the chart.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        x_log: logarithmic horizontal axis; what is not positive is left out.
        y_log: the same of the vertical axis.
        lines: drawn behind the points: the roofs of a roofline.

    Returns:
        An `<svg>` element.
    """
    return _plot(lines, groups, title, x_label, y_label, x_log, y_log, None, None, points=True)


def bar_chart(
    labels: Sequence[str],
    values: Sequence[Number],
    *,
    title: str,
    y_label: str,
    errors: Sequence[Interval] | None = None,
    horizontal: bool = False,
) -> str:
    """A bar for each label, from 0, with its value written on it.

    Args:
        labels: names of the bars.
        values: their lengths; a bar without one is left out, its name stays.
        title: of the chart.
        y_label: of the axis of values.
        errors: lowest and highest value of each bar.
        horizontal: bars side by side lie, and have room for long names.

    Returns:
        An `<svg>` element.
    """
    if len(values) != len(labels) or (errors is not None and len(errors) != len(labels)):
        raise ValueError(f"chart: every one of {len(labels)} labels must have a value (and error), got {len(values)}")
    known = [_finite(v) for v in values]
    ends = [e for pair in errors or () for e in pair if math.isfinite(e)]
    reach = [v for v in known if v is not None] + ends
    if not reach:
        return _empty(title)
    axis = _Axis(min(0.0, *reach), max(0.0, *reach), log=False)
    bars = _horizontal_bars if horizontal else _vertical_bars
    return bars(labels, known, errors, axis, title, y_label)


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
        values: rows of equal length; the shade grows from 0 (or the lowest, where that is less) to the highest.
        row_labels: one for each row.
        column_labels: one for each column.
        title: of the chart.
        x_label: what the columns are.
        y_label: what the rows are.

    Returns:
        An `<svg>` element.
    """
    columns = len(column_labels)
    if len(values) != len(row_labels) or any(len(row) != columns for row in values):
        raise ValueError(f"chart: values must be {len(row_labels)} rows of {columns}, as the labels are; got others")
    known = [v for row in values for v in map(_finite, row) if v is not None]
    if not known:
        return _empty(title)
    low, high = min(0.0, *known), max(known)
    gutter = _gutter(row_labels) + (LINE if y_label else 0)
    numbers = columns <= 12
    cell = (WIDTH - gutter - MARGIN) / columns
    height = min(cell, 30.0) if columns <= 30 else cell
    turned = any(_width(label, SMALL) > cell - 4 for label in column_labels)
    head = 2 * LINE + (min(max(_width(t, SMALL) for t in column_labels), 90) if turned else LINE)
    head += LINE if x_label else 0
    every = max(1, math.ceil(LINE * 0.8 / cell)) if turned else 1
    parts = []
    for j in range(0, columns, every):
        x = gutter + (j + 0.5) * cell
        text = _shortened(column_labels[j], 90 if turned else cell, SMALL)
        turn = f' transform="rotate(-90 {x:.1f} {head - 5:.1f})" dominant-baseline="central"' if turned else ""
        parts.append(_text(x, head - 5, text, SMALL, "start" if turned else "middle", turn))
    if x_label:
        parts.append(_text(gutter + (WIDTH - MARGIN - gutter) / 2, 2 * LINE + 6, x_label, SMALL, "middle"))
    every = max(1, math.ceil(LINE * 0.8 / height))
    dense: dict[int, list[str]] = {level: [] for level in range(1, SHADES + 1)}
    for i, row in enumerate(values):
        y = head + i * height
        if i % every == 0:
            text = _shortened(row_labels[i], GUTTER - 12, SMALL)
            parts.append(_text(gutter - 5, y + height / 2, text, SMALL, "end", ' dominant-baseline="central"'))
        shades = [_shade(value, low, high) for value in map(_finite, row)]
        for j, shade in enumerate(shades):
            if shade is None or (shade == 0 and not numbers):
                continue
            x = gutter + j * cell
            if not numbers:
                level = max(1, round(shade * SHADES))
                dense[level].append(f"M{x:.1f} {y:.1f}h{cell:.1f}v{height:.1f}h-{cell:.1f}z")
                continue
            told = escape(f"{row_labels[i]}, {column_labels[j]}: {_short(row[j])}")
            shape = f'x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{height:.1f}"'
            parts.append(f'<rect {shape} style="{_colour(0)}" fill-opacity="{shade:.3f}"><title>{told}</title></rect>')
            if shade > 0:
                ink = ' style="fill:var(--chart-paper,#fff)"' if shade > 0.6 else ""
                size = min(SMALL, cell / 3)
                more = f'{ink} dominant-baseline="central"'
                parts.append(_text(x + cell / 2, y + height / 2, _short(row[j]), size, "middle", more))
    for level, cells in dense.items():
        if cells:
            parts.append(f'<path d="{"".join(cells)}" style="{_colour(0)}" fill-opacity="{level / SHADES:.3g}"/>')
    bottom = head + len(values) * height
    parts.append(
        f'<rect x="{gutter:.1f}" y="{head:.1f}" width="{columns * cell:.1f}" height="{bottom - head:.1f}" '
        'fill="none" stroke="currentColor" stroke-opacity=".35"/>'
    )
    if y_label:
        middle = (head + bottom) / 2
        turn = f' transform="rotate(-90 11 {middle:.1f})" dominant-baseline="central"'
        parts.append(_text(11, middle, y_label, SMALL, "middle", turn))
    return _svg(bottom + MARGIN, title, f"{len(values)} rows, {columns} columns", parts)


def _shade(value: Number, low: float, high: float) -> Number:
    if value is None:
        return None
    return (value - low) / (high - low) if high > low else 0.0


def timeline(rows: Sequence[tuple[str, Sequence[tuple[float, float, str]]]], *, title: str, unit: str = "ms") -> str:
    """Spans of time in rows.

    Args:
        rows: a name, and spans of (begin, end, kind); a kind has a colour and stands in the legend.
        title: of the chart.
        unit: of the times.

    Returns:
        An `<svg>` element.
    """
    kinds = list(dict.fromkeys(kind for _, spans in rows for _, _, kind in spans))
    times = [t for _, spans in rows for begin, end, _ in spans if math.isfinite(begin + end) for t in (begin, end)]
    if not times:
        return _empty(title)
    axis = _Axis(min(times), max(times), log=False, nice=False)
    gutter, height = _gutter([name for name, _ in rows]), 24.0
    room = WIDTH - MARGIN - gutter - 6
    legend, head = _legend([(kind, _swatch(i)) for i, kind in enumerate(kinds)], 2 * LINE)
    parts = [legend]
    bottom = head + len(rows) * height
    for tick in axis.ticks(5):
        x = gutter + axis.place(tick) * room
        parts.append(f'<path d="M{x:.1f} {head:.1f}V{bottom + 3:.1f}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(_text(x, bottom + LINE, axis.label(tick, 5), SMALL, "middle"))
    parts.append(_text(gutter + room / 2, bottom + 2 * LINE, unit, SMALL, "middle"))
    for i, (name, spans) in enumerate(rows):
        y = head + i * height
        text = _shortened(name, GUTTER - 12, SMALL)
        parts.append(_text(gutter - 5, y + height / 2, text, SMALL, "end", ' dominant-baseline="central"'))
        for begin, end, kind, told in _joined(spans, (axis.high - axis.low) / room / 2):
            x, width = gutter + axis.place(begin) * room, (axis.place(end) - axis.place(begin)) * room
            shape = f'x="{x:.2f}" y="{y + 3:.1f}" width="{max(width, 0.3):.2f}" height="{height - 6:.0f}"'
            tip = escape(f"{kind}: {told} {unit}")
            parts.append(f'<rect {shape} style="{_colour(kinds.index(kind))}"><title>{tip}</title></rect>')
    count = sum(len(spans) for _, spans in rows)
    return _svg(bottom + 2 * LINE + MARGIN, title, f"{count} spans in {len(rows)} rows", parts)


def escape(text: str) -> str:
    """Text as it may stand in HTML and in XML, whatever it holds: names of files may hold anything."""
    whole = text.encode("utf-8", "replace").decode()
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", whole))


def palette(colours: Sequence[str] = COLOURS) -> str:
    """CSS that sets the colours of all charts below an element."""
    return "".join(f"--chart-{i}:{colour};" for i, colour in enumerate(colours))


# ---- axes ----------------------------------------------------------------------------------------------------------


class _Axis:
    """A range of numbers, where each of them lies (0..1), and the round ones among them."""

    def __init__(self, low: float, high: float, *, log: bool, nice: bool = True) -> None:
        self.log = log
        if low == high:
            pad = 1.0 if low == 0 else abs(low) * 0.1
            low, high = (low / 2, high * 2) if log else (low - pad, high + pad)
        if nice and log:
            low, high = _round_down(low), -1 / _round_down(-1 / high) if high < 0 else _round_up(high)
        elif nice:
            step = _step(high - low, 5)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        if self.log:  # an error bar may end at 0 or below
            return math.log(max(value / self.low, 1e-9)) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            step = _step(self.high - self.low, count)
            first = math.ceil(self.low / step - 1e-9)
            return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = last - first
        digits = (1, 2, 5) if decades * 3 <= count + 3 else (1,)
        every = max(1, math.ceil(decades / count))
        ticks = [d * 10.0**k for k in range(first, last + 1, every) for d in digits]
        return [t for t in ticks if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]

    def label(self, tick: float, count: int) -> str:
        if self.log:
            return _number(tick, tick, tick)
        return _number(tick, _step(self.high - self.low, count), max(abs(self.low), abs(self.high)))


def _step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts a span into at most so many parts."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * d for d in (1, 2, 5, 10) if power * d >= rough * (1 - 1e-9))


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return max(power * d for d in (1, 2, 5) if power * d <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return min(power * d for d in (1, 2, 5, 10) if power * d >= value * (1 - 1e-9))


def _number(value: float, step: float, largest: float) -> str:
    """A tick's label: with the decimals of the step, a letter for thousands, an exponent for what is tiny or huge."""
    if abs(value) < step * 1e-6:
        return "0"
    if largest < 1e-3 or largest >= 1e18:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        digits = max(0, exponent - math.floor(math.log10(step) + 1e-9))
        return f"{value / 10.0**exponent:.{digits}f}e{exponent}"
    scale, letter = 1.0, ""
    if abs(value) >= 1000:
        power = min(int(math.log10(abs(value)) + 1e-9) // 3, 5)
        scale, letter = 1000.0**power, " kMGTP"[power]
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    text = f"{value / scale:.{min(decimals, 9)}f}"
    if letter and "." in text:
        text = text.rstrip("0").rstrip(".")
    return text + letter


def _short(value: Number) -> str:
    """A number for a tip or a cell."""
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


# ---- plots with two axes -------------------------------------------------------------------------------------------


Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where numbers lie on the paper."""

    x: _Axis
    y: _Axis
    left: float
    top: float
    right: float
    bottom: float

    def across(self, x: float) -> float:
        return self.left + self.x.place(x) * (self.right - self.left)

    def up(self, y: float) -> float:
        return min(max(self.bottom - self.y.place(y) * (self.bottom - self.top), self.top), self.bottom)

    def place(self, x: float, y: float) -> Point:
        return self.across(x), self.up(y)


def _plot(
    lines: Sequence[Series],
    groups: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    x_log: bool,
    y_log: bool,
    x_range: Interval | None,
    y_range: Interval | None,
    *,
    points: bool = False,
) -> str:
    known = [_known(series, x_log, y_log) for series in (*lines, *groups)]
    xs = [p[0] for found in known for p in found if p is not None]
    ys = [p[1] for found in known for p in found if p is not None]
    if not xs:
        return _empty(title)
    for series in (*lines, *groups):
        ys += [e for pair in series.error or () for e in pair if math.isfinite(e) and (e > 0 or not y_log)]
    bare = points and not x_label and not y_label
    x_axis = _Axis(*(x_range or (min(xs), max(xs))), log=x_log, nice=points and x_log)
    y_axis = _Axis(*(y_range or (min(ys), max(ys))), log=y_log, nice=y_range is None and (y_log or not points))
    entries = [(s.name, _line_key(i, points)) for i, s in enumerate(lines)]
    entries += [(s.name, _point_key(i)) for i, s in enumerate(groups)]
    legend, top = _legend(entries if len(entries) > 1 else [], 2 * LINE)
    top += LINE + 3 if y_label else 0
    labels = [] if bare else [(t, y_axis.label(t, 5)) for t in y_axis.ticks(5)]
    left = MARGIN + max((_width(text, SMALL) for _, text in labels), default=0) + 6
    height = WIDTH - 2 * MARGIN if bare else HEIGHT
    pad = 6 if points else 0  # so that points at the edge are whole
    frame = _Frame(x_axis, y_axis, left + pad, top + pad, WIDTH - 2 * MARGIN - pad, top + height - pad)
    parts = [legend]
    if y_label:
        parts.append(_text(MARGIN, top - 11, y_label, SMALL, "start"))
    for value, text in labels:
        y = frame.place(x_axis.low, value)[1]
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{WIDTH - 2 * MARGIN}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(_text(left - 5, y, text, SMALL, "end", ' dominant-baseline="central"'))
    end = top + height
    for value in [] if bare else x_axis.ticks(6):
        x = frame.place(value, y_axis.low)[0]
        parts.append(f'<path d="M{x:.1f} {end:.1f}v4" stroke="currentColor" stroke-opacity=".5"/>')
        parts.append(_text(x, end + LINE, x_axis.label(value, 6), SMALL, "middle"))
    border = f"M{left:.1f} {top:.1f}V{end:.1f}H{WIDTH - 2 * MARGIN}" + (f"V{top:.1f}z" if bare else "")
    opacity = ".2" if bare else ".5"
    parts.append(f'<path d="{border}" fill="none" stroke="currentColor" stroke-opacity="{opacity}"/>')
    if x_label:
        parts.append(_text((left + WIDTH) / 2, end + 2 * LINE, x_label, SMALL, "middle"))
    for i, series in enumerate(lines):
        parts += _line(series, known[i], frame, i, neutral=points)
    parts += _points(groups, known[len(lines) :], frame)
    foot = MARGIN if bare else 2 * LINE + MARGIN
    count = sum(p is not None for found in known for p in found)
    about = f"{', '.join(s.name for s in (*lines, *groups)[:12])}; {count} points"
    return _svg(end + foot, title, about, parts)


def _known(series: Series, x_log: bool, y_log: bool) -> list[Point | None]:
    """Points, None where there is a gap."""
    found: list[Point | None] = []
    for x, y in zip(map(_finite, series.x), map(_finite, series.y), strict=True):
        gap = x is None or y is None or (x_log and x <= 0) or (y_log and y <= 0)
        found.append(None if gap or x is None or y is None else (x, y))
    return found


def _line(series: Series, known: Sequence[Point | None], frame: _Frame, number: int, *, neutral: bool) -> list[str]:
    pen = (
        f'style="stroke:currentColor" stroke-opacity=".7" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
        if neutral
        else f'style="{_colour(number, "stroke")}"'
    )
    if not neutral and number >= len(COLOURS):
        pen += f' stroke-dasharray="{DASHES[number // len(COLOURS) % len(DASHES)]}"'
    pen += ' fill="none" stroke-width="1.8" stroke-linejoin="round" stroke-linecap="round"'
    parts = []
    pieces = _pieces(None if p is None else (frame.across(p[0]), p[1]) for p in known)
    if sum(map(len, pieces)) > 2 * (frame.right - frame.left) and not series.markers:
        columns = [_columns(piece) for piece in pieces]
        outline = "".join(_band([(x, frame.up(low), frame.up(high)) for x, _, low, high in piece]) for piece in columns)
        parts.append(f'<path d="{outline}" style="{_colour(number)}" fill-opacity=".22"/>')
        pieces = [[(x, mean) for x, mean, _, _ in piece] for piece in columns]
    lines = [[(x, frame.up(y)) for x, y in piece] for piece in pieces]
    parts.append(f'<path d="{"".join(_path(line) for line in lines if len(line) > 1)}" {pen}/>')
    if not series.markers:
        alone = [line[0] for line in lines if len(line) == 1]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" style="{_colour(number)}"/>' for x, y in alone]
        if series.error is None:
            return parts
    for i, p in enumerate(known):
        if p is None:
            continue
        x, y = frame.place(*p)
        if series.error is not None and all(map(math.isfinite, series.error[i])):
            low, high = map(frame.up, series.error[i])
            bar = f"M{x:.1f} {low:.1f}V{high:.1f}m-3 0h6M{x - 3:.1f} {low:.1f}h6"
            parts.append(f'<path d="{bar}" fill="none" style="{_colour(number, "stroke")}"/>')
        if series.markers:
            tip = escape(f"{series.name}: {_short(p[0])}, {_short(p[1])}")
            at = f'cx="{x:.1f}" cy="{y:.1f}"'
            parts.append(f'<circle {at} r="3.2" style="{_colour(number)}"><title>{tip}</title></circle>')
    return parts


def _pieces(points: Iterable[Point | None]) -> list[list[Point]]:
    """Lines between gaps. A gap that nobody could see, less than two pixels wide, is none."""
    pieces: list[list[Point]] = []
    gap = True
    for p in points:
        if p is None:
            gap = True
            continue
        if not pieces or (gap and p[0] - pieces[-1][-1][0] > 2):
            pieces.append([])
        pieces[-1].append(p)
        gap = False
    return pieces


def _columns(piece: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """Position, mean, lowest and highest of the points of each column of pixels."""
    columns: dict[int, list[Point]] = {}
    for p in piece:
        columns.setdefault(round(p[0]), []).append(p)
    found = []
    for column in columns.values():
        values = [y for _, y in column]
        x = sum(x for x, _ in column) / len(column)
        found.append((x, sum(values) / len(values), min(values), max(values)))
    return found


def _band(columns: Sequence[tuple[float, float, float]]) -> str:
    """The outline of what lies between the lowest and the highest."""
    return _path([(x, low) for x, low, _ in columns] + [(x, high) for x, _, high in reversed(columns)]) + "Z"


def _path(points: Sequence[Point]) -> str:
    first, *rest = points
    return f"M{first[0]:.1f} {first[1]:.1f}L" + " ".join(f"{x:.1f} {y:.1f}" for x, y in rest)


def _points(groups: Sequence[Series], known: Sequence[Sequence[Point | None]], frame: _Frame) -> list[str]:
    total = sum(len(found) for found in known)
    parts = []
    for number, (series, found) in enumerate(zip(groups, known, strict=True)):
        whole = [p for p in found if p is not None]
        at = [frame.place(*p) for p in whole]
        if total > 200:
            digits = 0 if total > MANY_POINTS else 1
            at = list(dict.fromkeys((round(x, digits), round(y, digits)) for x, y in at))
            parts.append(f'<path d="{"".join(_mark(p, number, 2.0) for p in at)}" {_mark_pen(number, 2.0)}/>')
            continue
        for p, spot in zip(whole, at, strict=True):
            tip = escape(f"{series.name}: {_short(p[0])}, {_short(p[1])}")
            parts.append(f'<path d="{_mark(spot, number, 3.6)}" {_mark_pen(number, 3.6)}><title>{tip}</title></path>')
    return parts


def _mark(at: Point, number: int, radius: float) -> str:
    """A dot, a square, a triangle, a diamond."""
    (x, y), r, shape = at, radius, number % 4
    if shape == 2:
        return f"M{x:g} {y - r:.1f}l{r:g} {2 * r:g}h{-2 * r:g}z"
    if shape == 3:
        return f"M{x:g} {y - 1.3 * r:.1f}l{1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {-1.3 * r:g}z"
    return f"M{x:g} {y:g}h.01"


def _mark_pen(number: int, radius: float) -> str:
    if number % 4 >= 2:
        return f'style="{_colour(number)}" fill-opacity=".8"'
    cap, width = ("round", 2 * radius) if number % 4 == 0 else ("square", 1.7 * radius)
    return (
        f'style="{_colour(number, "stroke")}" stroke-width="{width:g}" stroke-linecap="{cap}" stroke-opacity=".8" '
        'fill="none"'
    )


# ---- bars ----------------------------------------------------------------------------------------------------------


def _vertical_bars(
    labels: Sequence[str],
    values: Sequence[Number],
    errors: Sequence[Interval] | None,
    axis: _Axis,
    title: str,
    y_label: str,
) -> str:
    top = 2 * LINE + (LINE if y_label else 0) + 8
    end = top + HEIGHT - 40
    ticks = [(t, axis.label(t, 5)) for t in axis.ticks(5)]
    left = MARGIN + max(_width(text, SMALL) for _, text in ticks) + 6
    slot = (WIDTH - 2 * MARGIN - left) / len(labels)
    height = end - top
    zero = end - axis.place(0.0) * height
    parts = [_text(MARGIN, 2 * LINE + 8, y_label, SMALL, "start")] if y_label else []
    for tick, text in ticks:
        y = end - axis.place(tick) * height
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{WIDTH - 2 * MARGIN}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(_text(left - 5, y, text, SMALL, "end", ' dominant-baseline="central"'))
    turned = any(_width(label, SMALL) > slot - 4 for label in labels)
    every = max(1, math.ceil(LINE * 0.8 / slot)) if turned else 1
    longest = min(max(_width(label, SMALL) for label in labels), 90.0) if turned else float(LINE)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = left + (i + 0.5) * slot
        if turned and i % every == 0:
            turn = f' transform="rotate(-90 {x:.1f} {end + 8:.1f})" dominant-baseline="central"'
            parts.append(_text(x, end + 8, _shortened(label, 90, SMALL), SMALL, "end", turn))
        elif not turned:
            parts.append(_text(x, end + LINE, label, SMALL, "middle"))
        if value is None:
            continue
        y, wide = end - axis.place(value) * height, min(slot * 0.7, 60.0)
        parts.append(
            f'<rect x="{x - wide / 2:.1f}" y="{min(y, zero):.1f}" width="{wide:.1f}" '
            f'height="{max(abs(zero - y), 0.5):.1f}" style="{_colour(0)}">'
            f"<title>{escape(f'{label}: {_short(value)}')}</title></rect>"
        )
        tip = y
        if errors is not None and all(map(math.isfinite, errors[i])):
            low, high = (end - axis.place(e) * height for e in errors[i])
            tip = min(y, high)
            parts.append(
                f'<path d="M{x:.1f} {low:.1f}V{high:.1f}m-4 0h8M{x - 4:.1f} {low:.1f}h8" fill="none" '
                'stroke="currentColor" stroke-width="1.4"/>'
            )
        if _width(_short(value), SMALL) < slot:
            parts.append(_text(x, tip - 4, _short(value), SMALL, "middle"))
    parts.append(f'<path d="M{left:.1f} {zero:.1f}H{WIDTH - 2 * MARGIN}" stroke="currentColor" stroke-opacity=".5"/>')
    return _svg(end + longest + 2 * MARGIN, title, f"{len(labels)} bars", parts)


def _horizontal_bars(
    labels: Sequence[str],
    values: Sequence[Number],
    errors: Sequence[Interval] | None,
    axis: _Axis,
    title: str,
    y_label: str,
) -> str:
    gutter, height = _gutter(labels), 24.0
    shown = ["" if v is None else _short(v) for v in values]
    room = WIDTH - gutter - MARGIN - max(_width(text, SMALL) for text in shown) - 8
    top = 2 * LINE
    end = top + height * len(labels)
    zero = gutter + axis.place(0.0) * room
    parts = []
    for tick in axis.ticks(4):
        x = gutter + axis.place(tick) * room
        parts.append(f'<path d="M{x:.1f} {top}V{end + 3:.1f}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(_text(x, end + LINE, axis.label(tick, 4), SMALL, "middle"))
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = top + i * height
        text = _shortened(label, GUTTER - 12, SMALL)
        parts.append(_text(gutter - 5, y + height / 2, text, SMALL, "end", ' dominant-baseline="central"'))
        if value is None:
            continue
        x = tip = gutter + axis.place(value) * room
        parts.append(
            f'<rect x="{min(x, zero):.1f}" y="{y + 4:.1f}" width="{max(abs(x - zero), 0.5):.1f}" '
            f'height="{height - 8:.1f}" style="{_colour(0)}"><title>{escape(f"{label}: {shown[i]}")}</title></rect>'
        )
        if errors is not None and all(map(math.isfinite, errors[i])):
            low, high = (gutter + axis.place(e) * room for e in errors[i])
            tip, middle = max(x, high), y + height / 2
            parts.append(
                f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}m0 -4v8M{low:.1f} {middle - 4:.1f}v8" fill="none" '
                'stroke="currentColor" stroke-width="1.4"/>'
            )
        parts.append(
            _text(max(tip, zero) + 5, y + height / 2, shown[i], SMALL, "start", ' dominant-baseline="central"')
        )
    parts.append(f'<path d="M{zero:.1f} {top}V{end:.1f}" stroke="currentColor" stroke-opacity=".5"/>')
    parts.append(_text(gutter + room / 2, end + 2 * LINE, y_label, SMALL, "middle"))
    return _svg(end + 2 * LINE + MARGIN, title, f"{len(labels)} bars", parts)


# ---- parts of all charts -------------------------------------------------------------------------------------------


def _svg(height: float, title: str, about: str, parts: Iterable[str]) -> str:
    heading = _text(
        MARGIN, LINE, _shortened(title, 0.92 * (WIDTH - 2 * MARGIN), FONT + 1), FONT + 1, "start", ' font-weight="600"'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height:.0f}" width="100%" '
        f'role="img" fill="currentColor" font-family="system-ui, sans-serif" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc>{heading}{''.join(parts)}</svg>"
    )


def _empty(title: str) -> str:
    return _svg(90, title, "no data", [_text(WIDTH / 2, 58, "no data", FONT, "middle", ' fill-opacity=".6"')])


def _text(x: float, y: float, text: str, size: float, anchor: str, more: str = "") -> str:
    align = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"{align}{more}>{escape(text)}</text>'


def _colour(number: int, what: str = "fill") -> str:
    number %= len(COLOURS)
    return f"{what}:var(--chart-{number},{COLOURS[number]})"


def _swatch(number: int) -> str:
    return f'<rect y="-9" width="11" height="11" style="{_colour(number)}"/>'


def _line_key(number: int, neutral: bool) -> str:
    if neutral:
        dash = f'stroke-dasharray="{DASHES[number % len(DASHES)]}" stroke="currentColor" stroke-opacity=".7"'
        return f'<path d="M0 -4h12" {dash} stroke-width="2"/>'
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'<path d="M0 -4h12" style="{_colour(number, "stroke")}" stroke-dasharray="{dashes}" stroke-width="2.4"/>'


def _point_key(number: int) -> str:
    return f'<path d="{_mark((6, -4), number, 4)}" {_mark_pen(number, 4)}/>'


def _legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[str, float]:
    """Names and keys in rows, and where the chart may go on below them."""
    if not entries:
        return "", top
    parts, x, y = [], float(MARGIN), top + 6
    for name, key in entries:
        text = _shortened(name, WIDTH - 2 * MARGIN - 20, SMALL)
        wide = _width(text, SMALL) + 32
        if x + wide > WIDTH and x > MARGIN:
            x, y = float(MARGIN), y + LINE
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})">{key}{_text(17, 0, text, SMALL, "start")}</g>')
        x += wide
    return "".join(parts), y + 12


def _gutter(labels: Sequence[str]) -> float:
    """Room for the names of rows."""
    return min(max((_width(label, SMALL) for label in labels), default=0) + 12, GUTTER)


def _width(text: str, size: float) -> float:
    """About how wide a text is: no browser has measured it yet."""
    return (
        sum(0.32 if c in " .,:;'|!ijlt()[]fI1r" and c != "1" else 0.85 if c in "mwMW@%" else 0.63 for c in text) * size
    )


def _shortened(text: str, room: float, size: float) -> str:
    if _width(text, size) <= room:
        return text
    while text and _width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"


def _finite(value: Number) -> Number:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _joined(spans: Sequence[tuple[float, float, str]], slack: float) -> Iterable[tuple[float, float, str, str]]:
    """Spans with what to say of them; those of a kind that lie closer than anyone could see become one."""
    whole = [s for s in spans if math.isfinite(s[0] + s[1])]
    joined: list[tuple[float, float, str, int]] = []
    for begin, end, kind in sorted(whole, key=lambda span: span[0]):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last[2] == kind
            and begin - last[1] < slack
            and min(end - begin, last[1] - last[0]) < slack
        ):
            joined[-1] = (last[0], max(last[1], end), kind, last[3] + 1)
        else:
            joined.append((begin, end, kind, 1))
    for begin, end, kind, count in joined:
        told = f"{_short(begin)} to {_short(end)}" + (f" ({count} spans)" if count > 1 else "")
        yield begin, end, kind, told
