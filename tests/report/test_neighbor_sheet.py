"""Sheets of nearest neighbors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from byol_fast.data.sources import ArraySource
from byol_fast.evaluate import nearest
from byol_fast.report.neighbor_sheet import FRAME, GAP, LINE, MARGIN, OTHER, SAME, TILE, TITLE, neighbor_sheet
from byol_fast.report.preview import INK


def test_sheet_shows_neighbors_and_frames_of_classes() -> None:
    """Images of one color for each of four groups; features tell the groups apart, labels only pairs of them."""
    group = np.arange(20) % 4
    colors = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)
    images = np.broadcast_to(colors[group][:, None, None], (20, 30, 30, 3)).copy()
    source = ArraySource(images)
    features = np.eye(4, dtype=np.float32)[group] + np.float32(0.01)
    labels = np.where(np.arange(20) < 12, group, (group + 1) % 4)  # the last two of each group are labeled otherwise
    sheet = neighbor_sheet(source, features, queries=[0, 1, 14], k=4, labels=labels)

    def tile(row: int, column: int) -> tuple[Any, Any]:
        x = MARGIN + column * (TILE + GAP) + (GAP if column else 0)
        y = 2 * MARGIN + TITLE + LINE + 8 + row * (TILE + GAP + 2 * LINE)
        return sheet.getpixel((x + FRAME // 2, y + TILE // 2)), sheet.getpixel((x + TILE // 2, y + TILE // 2))

    def rgb(text: str) -> tuple[int, ...]:
        return tuple(bytes.fromhex(text[1:]))

    for row, query in enumerate([0, 1, 14]):
        assert tile(row, 0) == (rgb(INK), tuple(colors[group[query]]))
        for column, i in enumerate((j for j in range(20) if group[j] == group[query] and j != query), start=1):
            frame = SAME if labels[i] == labels[query] else OTHER
            assert tile(row, column) == (rgb(frame), tuple(colors[group[query]]))
    own = ArraySource(images[3:4])
    sheet = neighbor_sheet(source, features, own=(own, features[3:4]), k=2)
    assert [tile(0, column)[1] for column in (0, 1, 2)] == [tuple(colors[3])] * 3


def test_invalid_arguments_are_refused(photos: np.ndarray) -> None:
    source = ArraySource(photos)
    with pytest.raises(ValueError, match="one for each of 2 or more images, got 59 for 60"):
        neighbor_sheet(source, np.ones((59, 4), np.float32))
    with pytest.raises(ValueError, match="features must be finite"):
        neighbor_sheet(source, np.full((60, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"k must be 1..59"):
        nearest(np.ones((60, 4), np.float32), np.ones((1, 4), np.float32), k=60, exclude=[3])
