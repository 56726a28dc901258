"""Colors of pages and charts, by the formulas of others: contrast as WCAG defines it, and simulated color blindness."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from byol_fast.report import page, preview
from byol_fast.report.drawing import DASHES
from byol_fast.report.svg import COLORS, DARK_COLORS

Color = NDArray[np.float64]

# Machado, Oliveira, Fernandes, IEEE TVCG 15 (2009): severity 1, for linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
WHITE = XYZ.sum(1)
EASY = 10.0
"""CIE 1976 difference: four times what is just noticeable."""


def linear(color: str) -> Color:
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    dark, light = sorted(float(XYZ[1] @ linear(color)) for color in (a, b))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: Color) -> Color:
    t = XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("colors", [COLORS, DARK_COLORS], ids=["light", "dark"])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_series_differ_in_shape_or_for_color_blind_readers(colors: tuple[str, ...], deficiency: str) -> None:
    seen = [lab(np.array(DEFICIENCIES[deficiency]) @ linear(color)) for color in colors]
    for i, j in itertools.combinations(range(len(colors)), 2):
        is_other_shape = i % len(DASHES) != j % len(DASHES)  # of marks and dashes
        assert is_other_shape or np.linalg.norm(seen[i] - seen[j]) > EASY, (colors[i], colors[j])


def variables(dark: bool) -> dict[str, str]:
    """Colors of a page by name."""
    light, _, rest = page.style().partition("@media screen and (prefers-color-scheme: dark)")
    parts = [light, *rest.split("@media screen and (prefers-color-scheme: dark)")] if dark else [light]
    if not dark:
        parts.append(Path(page.__file__).with_name("style.css").read_text().partition("@media")[0])
    found = [pair for part in parts for pair in re.findall(r"--([\w-]+): ?(#[0-9a-f]+);", part)]
    return {name: color if len(color) == 7 else "#" + "".join(2 * c for c in color[1:]) for name, color in found}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_and_lines_have_contrast(dark: bool) -> None:
    """WCAG 2.1 AA: 4.5 for texts, 3 for graphics."""
    colors = variables(dark)
    for background in ("paper", "tray"):
        for text in ("ink", "faint", "link", "good", "warn"):
            assert contrast(colors[text], colors[background]) >= 4.5, (text, background)
    for i in range(len(COLORS)):
        assert contrast(colors[f"chart-{i}"], colors["paper"]) >= 3
    assert contrast(colors["ink"], colors["chart-shade"]) >= 4.5  # numbers in the darkest cells of a matrix


def test_texts_of_sheets_have_contrast() -> None:
    for color in (preview.INK, preview.FAINT, *preview.VIEW_COLORS):
        assert contrast(color, preview.PAPER) >= 4.5
