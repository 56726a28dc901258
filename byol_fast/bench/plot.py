"""Bar chart of benchmark results: the median of each candidate, with the 20th to 80th percentile of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from byol_fast.bench.results import SuiteResult

WIDTH, NAMES, ROW, MARGIN = 1200, 440, 26, 24
BYOL_FAST, OTHERS, INK, FAINT = "#0072b2", "#9aa5ad", "#1c2328", "#5b6670"


def bars(suites: Sequence[SuiteResult], title: str) -> Image.Image:
    """Horizontal bars in the unit of each suite, those of byol_fast in color.

    Args:
        suites: from top to bottom, a block of bars each.
        title: of the chart.
    """
    font, small, large = (ImageFont.load_default(size) for size in (15, 13, 20))
    heights = [ROW * (len(suite.candidates) + 2) for suite in suites]
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + 2 * ROW + sum(heights)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), _shorten(title, large, WIDTH - 2 * MARGIN), fill=INK, font=large)
    top = MARGIN + 2 * ROW
    for suite, height in zip(suites, heights, strict=True):
        draw.text((MARGIN, top), f"{suite.name}  ({suite.unit})", fill=INK, font=font)
        quantiles = [suite.quantiles(candidate.timing) for candidate in suite.candidates]
        maximum = max(high for _, _, high in quantiles) or 1.0
        room = WIDTH - NAMES - 3 * MARGIN - 200
        for number, (candidate, (low, middle, high)) in enumerate(zip(suite.candidates, quantiles, strict=True), 1):
            y = top + ROW * number
            name = _shorten(candidate.name, small, NAMES - MARGIN)
            draw.text((MARGIN + 8, y + 4), name, fill=INK, font=small)
            left, ends = NAMES + MARGIN, [NAMES + MARGIN + room * value / maximum for value in (low, middle, high)]
            draw.rectangle(
                (left, y + 4, max(ends[1], left + 1), y + ROW - 4),
                fill=BYOL_FAST if candidate.is_byol_fast else OTHERS,
            )
            draw.line((ends[0], y + ROW // 2, ends[2], y + ROW // 2), fill=INK, width=2)
            text = f"{middle:.4g}   ({suite.times_faster(candidate)[0]:.2f} times faster than the first)"
            draw.text((max(ends[1], ends[2]) + 10, y + 5), text, fill=FAINT, font=small)
        top += height
    return image


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Text cut to a width in pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
