"""SVG as it stands within a page: colors as CSS variables, titles for screen readers and pointers, no ids."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from byol_fast.utils.files import printable_text

# Okabe and Ito's colors, darkened where they would be faint on white, and lighter ones for a dark background.
COLORS = ("#0072b2", "#d55e00", "#00845f", "#b3588a", "#a87400", "#3a98d0", "#7a4fbf", "#6b7280", "#8b5a2b", "#111111")
DARK_COLORS = (
    *("#4aa3df", "#ff8c42", "#2ec4a0", "#e59ac2", "#f0c04a", "#a6dcff", "#b79cf0", "#9ca3af", "#c69a6b", "#eeeeee"),
)

# Placeholders to draw with: matplotlib knows no CSS variables, so `inline` replaces these colors in its output.
INK, SHADE = "#fe0100", "#fe0101"
PEN = tuple(f"#fe02{i:02x}" for i in range(len(COLORS)))
_CSS = {
    INK: "currentColor",
    SHADE: "var(--chart-shade,#4aa3df)",
    **{pen: f"var(--chart-{i},{color})" for i, (pen, color) in enumerate(zip(PEN, COLORS, strict=True))},
}
_TOOLTIP = "tooltip:"


def palette(colors: Sequence[str] = COLORS) -> str:
    """CSS that sets the colors of all charts below an element."""
    return "".join(f"--chart-{i}:{color};" for i, color in enumerate(colors))


def clean(text: str) -> str:
    """Text in one line without the characters that XML forbids: names of files may contain anything."""
    line = " ".join(printable_text(text).split())
    return re.sub(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", line)


def escape(text: str) -> str:
    """Any text, escaped for HTML and XML."""
    return html.escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", printable_text(text)))


def tooltip_id(text: str) -> str:
    """Id (`gid`) of an artist that `inline` turns into a tooltip with this text."""
    return _TOOLTIP + clean(text)


def inline(drawing: str, *, title: str, description: str) -> str:
    """The `<svg>` element for a page, from a drawing by matplotlib with `svg.fonttype` none.

    Ids would clash between the charts of a page, so none are left: groups do not need theirs, clipping is dropped
    (charts draw nothing outside of their axes), and markers must be drawn as paths.

    Args:
        drawing: the file as matplotlib writes it, drawn in the colors `INK`, `SHADE` and `PEN`.
        title: of the chart, read out by screen readers.
        description: one more sentence for them.

    Returns:
        An element as wide as its container; it is a valid SVG file, too.
    """
    assert "<use" not in drawing, "a marker or collection was drawn by reference"
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert size is not None
    body = drawing[drawing.index('<g id="figure_1">') : drawing.rindex("</svg>")]
    for pattern, replacement in (
        (r"<defs>.*?</defs>", ""),
        (r' clip-path="[^"]*"', ""),
        (rf'<g id="{_TOOLTIP}([^"]*)">', r"<g><title>\1</title>"),
        (r'<g id="[^"]*"/>', ""),
        (r'<g id="[^"]*">', "<g>"),
        (r"font-family: [^;\"]*; ", ""),  # the page's
        (r' transform="rotate\(-0 [^"]*"', ""),
        (r">\s+<", "><"),
        (r"<g>(<path [^<]*/>|<text [^<]*</text>)</g>", r"\1"),
    ):
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    body = re.sub(r' d="([^"]*)"', lambda match: f' d="{_short_path(match[1])}"', body)
    body = re.sub(r"#fe0[0-2][0-9a-f]{2}", lambda match: _CSS[match[0]], body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {float(size[1]):g} {float(size[2]):g}" '
        f'width="100%" role="img" fill="currentColor" font-family="system-ui, sans-serif" stroke-linejoin="round" '
        f'aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body.strip()}</svg>"
    )


def _short_path(path: str) -> str:
    """A path with two decimals: a hundredth of a pixel."""
    path = re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", lambda match: f"{float(match[0]):.2f}", path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", " ".join(path.split()))
