"""Figures and axes of the charts: layout, ticks, lines, marks and labels, drawn by matplotlib.

Importing matplotlib takes a second, so it is imported with the first chart, not with this module. Lengths are pixels
of a chart that is `WIDTH` wide.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from byol_fast.report.svg import INK, PEN, clean, inline, tooltip_id
from byol_fast.utils.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

Array = NDArray[np.float64]

WIDTH = 420
"""Narrow, so that the text is readable where a phone shows a chart at 330 pixels."""
HEIGHT = 230
"""Height of axes with two scales."""
LOW = 96
"""The same where the shape of a curve is all that matters."""
FONT, SMALL = 14, 12
LINE = 17
MARGIN = 8
LEFT = 52
"""Room for the numbers of a vertical axis."""
GUTTER = 150
"""Largest room for the names of rows."""
ROW = 24
KEY = 24
"""Length of a line in the legend: all dashes can be told apart."""
DASHES: tuple[Any, ...] = ("-", (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (9, 3, 2, 3, 2, 3)))
"""Dashes of lines, one for each shape of marks: what color alone does not tell apart differs in them."""
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "path.simplify": False,
    "font.size": SMALL,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 72,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.8,
    "lines.scale_dashes": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend."""

    name: str
    line: dict[str, Any] | None = None
    """Style of a line."""
    mark: int | None = None
    """Number of a group of points, which have a mark."""


@contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib: its defaults and `STYLE`, not the user's own, so that equal data give an equal chart."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's font has it
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def save(figure: Figure, title: str, description: str) -> str:
    """The figure as an `<svg>` element."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return inline(file.getvalue(), title=title, description=description)


def empty(title: str) -> str:
    """A chart without data."""
    with style():
        figure, axes = new_axes(title, left=0, right=0, height=20, below=30)
        axes.set_axis_off()
        write(figure, WIDTH / 2, 2 * LINE + 20, "no data", ha="center", size=FONT, alpha=0.6)
        return save(figure, title, "no data")


# ---- layout --------------------------------------------------------------------------------------------------------


def new_axes(
    title: str, legend: Sequence[Key] = (), *, left: float, right: float, height: float, above: float = 0, below: float
) -> tuple[Figure, Axes]:
    """From the top: a title, the legend in as many rows as it takes, and axes with room above and below."""
    from matplotlib.figure import Figure

    places, x, y = [], float(MARGIN), 2.0 * LINE + 6
    for key in legend:
        text = shorten(key.name, WIDTH - 2 * MARGIN - KEY - 8)
        if x + width(text) + KEY + 20 > WIDTH and x > MARGIN:
            x, y = float(MARGIN), y + LINE
        places.append((key, text, x, y))
        x += width(text) + KEY + 20
    top = (y + 12 if legend else 2 * LINE) + above
    total = math.ceil(top + height + below)
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    write(figure, MARGIN, LINE, shorten(title, 0.92 * (WIDTH - 2 * MARGIN), FONT), size=FONT, weight="bold")
    for key, text, x, y in places:
        if key.line is not None:
            draw_line(figure, np.array([[x, total - y + 4], [x + KEY, total - y + 4]]), **key.line)
        if key.mark is not None:
            draw_marks(figure, np.array([[x + KEY / 2, total - y + 4]]), key.mark, radius=4)
        write(figure, x + KEY + 5, y, text)
    bottom = total - top - height
    axes = figure.add_axes((left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[:].set_alpha(0.5)
    return figure, axes


def two_axes(
    title: str, legend: Sequence[Key], *, x_label: str, y_label: str, bare: bool = False, height: float = HEIGHT
) -> tuple[Figure, Axes]:
    """Axes with two scales. The vertical one's label lies above it, which leaves more width. Bare: a square frame."""
    legend = legend if len(legend) > 1 else []
    if bare:
        side = WIDTH - 2 * MARGIN
        figure, axes = new_axes(title, legend, left=MARGIN, right=MARGIN, height=side, below=MARGIN)
        axes.spines[:].set(visible=True, alpha=0.2)
        return figure, axes
    above, below = LINE + 3 if y_label else 0, 2 * LINE + MARGIN
    figure, axes = new_axes(title, legend, left=LEFT, right=2 * MARGIN, height=height, above=above, below=below)
    axes.grid(True)
    total = figure.get_figheight() * 72
    write(figure, MARGIN, total - height - below - 11, y_label)
    write(figure, (LEFT + WIDTH) / 2, total - MARGIN, x_label, ha="center")
    return figure, axes


def row_axes(
    title: str, labels: Sequence[str], legend: Sequence[Key] = (), *, right: float, x_label: str
) -> tuple[Figure, Axes]:
    """Axes with a named row for each label, the first at the top."""
    left, height, below = _gutter(labels), ROW * len(labels), 2 * LINE + MARGIN
    figure, axes = new_axes(title, legend, left=left, right=right, height=height, below=below)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [shorten(label, GUTTER - 12) for label in labels], va="center_baseline")
    axes.grid(axis="x")
    axes.spines[:].set_visible(False)
    write(figure, left + (WIDTH - left - right) / 2, figure.get_figheight() * 72 - MARGIN, x_label, ha="center")
    return figure, axes


def matrix_axes(
    title: str, row_labels: Sequence[str], column_labels: Sequence[str], *, x_label: str, y_label: str
) -> tuple[Figure, Axes]:
    """Axes with a cell of side 1 for each pair of labels, the first at the top left; labels are left out if crowded."""
    left = _gutter(row_labels) + (LINE if y_label else 0)
    rows, columns = len(row_labels), len(column_labels)
    cell = (WIDTH - left - MARGIN) / columns
    height = min(cell, 30.0) if columns <= 30 else cell
    vertical = any(width(label) > cell - 4 for label in column_labels)
    above = (min(max(map(width, column_labels)), 90) if vertical else LINE) + (LINE if x_label else 0)
    figure, axes = new_axes(title, left=left, right=MARGIN, height=height * rows, above=above, below=MARGIN)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.spines[:].set(visible=True, alpha=0.35)
    axes.xaxis.tick_top()
    every = max(1, math.ceil(LINE * 0.8 / cell)) if vertical else 1
    shown = range(0, columns, every)
    labels = [shorten(column_labels[j], 90 if vertical else cell) for j in shown]
    turned: dict[str, Any] = (
        {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"} if vertical else {}
    )
    axes.set_xticks([j + 0.5 for j in shown], labels, **turned)
    shown = range(0, rows, max(1, math.ceil(LINE * 0.8 / height)))
    axes.set_yticks([i + 0.5 for i in shown], [shorten(row_labels[i], GUTTER - 12) for i in shown])
    write(figure, left + (WIDTH - MARGIN - left) / 2, 2 * LINE + 6, x_label, ha="center")
    middle = figure.get_figheight() * 72 - MARGIN - height * rows / 2
    write(figure, 15, middle, y_label, ha="center", rotation=90, rotation_mode="anchor")
    return figure, axes


def write(figure: Figure, x: float, y: float, text: str, **options: Any) -> None:
    """Write a line of text at a distance from the left and the top edge."""
    if text:
        figure.text(x / WIDTH, 1 - y / (figure.get_figheight() * 72), clean(text), **options)


# ---- scales --------------------------------------------------------------------------------------------------------


def set_axis(
    axes: Axes,
    name: Literal["x", "y"],
    values: Sequence[Array],
    *,
    limits: Interval | None = None,
    log: bool = False,
    pad: float = 0.0,
    count: int = 5,
) -> None:
    """Limits and ticks of an axis.

    Args:
        axes: the axes.
        name: of the axis.
        values: that must fit; those that are not finite do not matter.
        limits: instead of the values' own.
        log: logarithmic.
        pad: share of the range added at both ends, unless limits are given.
        count: ticks at most, about; 0: none.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    known = np.concatenate([v[np.isfinite(v)] for v in values])
    low, high = limits or (float(known.min()), float(known.max()))
    if low == high:
        margin = 1.0 if low == 0 else abs(low) * 0.1
        low, high = (low / 2, high * 2) if log else (low - margin, high + margin)
    decades = math.log10(high) - math.log10(low) if log else 0.0
    if log:
        low, high = low / 10 ** (pad * decades), high * 10 ** (pad * decades)
    elif limits is None:
        low, high = low - pad * (high - low), high + pad * (high - low)
    axes.set(**{f"{name}scale": "log" if log else "linear", f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    powers = log and decades >= 1  # a smaller range may contain no round power
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    locator = LogLocator(subs=subs, numticks=count) if powers else MaxNLocator(max(count, 1), steps=[1, 2, 5, 10])
    slack = 1e-9 * (high - low)
    within = (low * (1 - 1e-9), high * (1 + 1e-9)) if log else (low - slack, high + slack)
    ticks = [float(t) for t in locator.tick_values(low, high) if within[0] <= t <= within[1]] if count else []
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    largest = max(abs(low), abs(high))
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(ticks, [format_tick(t, t, t) if powers else format_tick(t, step, largest) for t in ticks])


def format_tick(value: float, step: float, largest: float) -> str:
    """Label of a tick: with the decimals of the step, a letter for many thousands, an exponent if tiny or huge."""
    if abs(value) < step * 1e-6:
        return "0"
    if largest < 1e-3 or largest >= 1e18:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        digits = max(0, exponent - math.floor(math.log10(step) + 1e-9))
        return f"{value / 10.0**exponent:.{digits}f}e{exponent}"
    scale, letter = 1.0, ""
    if abs(value) >= 1000 and largest >= 100_000:
        power = min(int(math.log10(abs(value)) + 1e-9) // 3, 5)
        scale, letter = 1000.0**power, " kMGTP"[power]
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    text = f"{value / scale:,.{min(decimals, 9)}f}"
    if letter and "." in text:
        text = text.rstrip("0").rstrip(".")
    return text + letter


# ---- lines and marks -----------------------------------------------------------------------------------------------


def pen(number: int) -> str:
    """Color of a series."""
    return PEN[number % len(PEN)]


def line_style(number: int) -> dict[str, Any]:
    """Color and dashes of a line."""
    return {"color": pen(number), "linestyle": DASHES[number % len(DASHES)]}


def draw_marks(figure: Figure, at_N2: Array, number: int, *, radius: float, tooltip: str | None = None) -> None:
    """Draw the marks of a group of points: dots, squares, triangles, diamonds or triangles on their tip.

    matplotlib's own markers would be references by id, which clash on a page of many charts.

    Args:
        figure: the figure.
        at_N2: positions in pixels from the bottom left.
        number: of the group; sets color and shape.
        radius: size in pixels.
        tooltip: its text.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import IdentityTransform

    gid = None if tooltip is None else tooltip_id(tooltip)
    kind = number % len(DASHES)
    if kind < 2:
        draw_dots(figure, at_N2, color=pen(number), radius=radius, square=kind == 1, alpha=0.8, gid=gid)
        return
    triangle, diamond = [(0, 1), (1, -1), (-1, -1), (0, 1)], [(0, 1.3), (1.3, 0), (0, -1.3), (-1.3, 0), (0, 1.3)]
    shape = radius * np.array(diamond if kind == 3 else triangle) * (1 if kind < 4 else -1)
    codes = [Path.MOVETO, *[Path.LINETO] * (len(shape) - 2), Path.CLOSEPOLY]
    path = Path((at_N2[:, None] + shape).reshape(-1, 2), codes * len(at_N2))
    figure.add_artist(
        PathPatch(path, transform=IdentityTransform(), color=pen(number), lw=0, alpha=0.8, gid=gid, zorder=2)
    )


def draw_dots(figure: Figure, at_N2: Array, *, radius: float, square: bool = False, **options: Any) -> None:
    """Draw dots or squares at positions in pixels: lines (almost) without length, with round or square ends."""
    gaps = np.full((len(at_N2), 2), math.nan)
    points = np.stack([at_N2, at_N2 + np.array([0.01, 0]), gaps], axis=1).reshape(-1, 2)
    ends: dict[str, Any] = (
        {"linewidth": 1.7 * radius, "solid_capstyle": "projecting"} if square else {"linewidth": 2 * radius}
    )
    draw_line(figure, points, **ends, **options)


def draw_line(figure: Figure, points_N2: Array, **options: Any) -> None:
    """Draw a line in pixels from the bottom left."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    figure.add_artist(Line2D(*points_N2.T, transform=IdentityTransform(), **options))


def axes_pixels(axes: Axes) -> tuple[float, float]:
    """Pixels of one unit of each scale of axes, on average."""
    (x, y), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    return (right - x) / (x_high - x_low), (top - y) / abs(y_high - y_low)


# ---- texts ---------------------------------------------------------------------------------------------------------


def width(text: str, size: float = SMALL) -> float:
    """Approximate width of a text: only the browser knows its font."""
    return (
        sum(0.32 if c in " .,:;'|!ijlt()[]fI1r" and c != "1" else 0.85 if c in "mwMW@%" else 0.63 for c in text) * size
    )


def shorten(text: str, room: float, size: float = SMALL) -> str:
    """Text in one line, cut with an ellipsis where it is too wide."""
    text = clean(text)
    if width(text, size) <= room:
        return text
    while text and width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"


def _gutter(labels: Sequence[str]) -> float:
    """Room for the names of rows."""
    return min(max((width(label) for label in labels), default=0.0) + 12, GUTTER)
