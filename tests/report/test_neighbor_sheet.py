"""Sheets of nearest neighbors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw

from byol_fast.data.sources import ArraySource
from byol_fast.evaluate import nearest
from byol_fast.report.neighbor_sheet import (
    FRAME,
    GAP,
    LINE,
    MARGIN,
    OTHER,
    SAME,
    TILE,
    TOP,
    default_queries,
    neighbor_sheet,
)
from byol_fast.report.preview import INK, PAPER


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
        y = TOP + row * (TILE + GAP + 2 * LINE)
        return sheet.getpixel((x + FRAME // 2, y + FRAME // 2)), sheet.getpixel((x + TILE // 2, y + TILE // 2))

    def rgb(text: str) -> tuple[int, ...]:
        return tuple(bytes.fromhex(text[1:]))

    for row, query in enumerate([0, 1, 14]):
        assert tile(row, 0) == (rgb(INK), tuple(colors[group[query]]))
        for column, i in enumerate((j for j in range(20) if group[j] == group[query] and j != query), start=1):
            frame = SAME if labels[i] == labels[query] else OTHER
            assert tile(row, column) == (rgb(frame), tuple(colors[group[query]]))
    x, y = MARGIN + TILE + 2 * GAP, TOP  # the first neighbor of the first query, of its class, and the last, of another
    assert {sheet.getpixel((x + i, y)) for i in range(TILE)} == {rgb(SAME)}
    x += 3 * (TILE + GAP)
    assert {sheet.getpixel((x + i, y)) for i in range(TILE)} == {rgb(OTHER), rgb(PAPER)}  # dashed
    sheet = neighbor_sheet(source, features, queries=[0], k=4, labels=np.arange(20))  # no two of a class
    assert tile(0, 0)[0] == rgb(INK) and tile(0, 1)[0] not in (rgb(SAME), rgb(OTHER))
    own = ArraySource(images[3:4])
    sheet = neighbor_sheet(source, features, own=(own, features[3:4]), k=2)
    assert [tile(0, column)[1] for column in (0, 1, 2)] == [tuple(colors[3])] * 3


def test_default_queries_show_all_classes_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [default_queries(labels) for labels in (None, np.array([-1, 0, 2]), np.arange(12), np.arange(40))] == [
        *(8, 8, 12, 20)
    ]
    written: list[str] = []

    def text(pen: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, *options: object) -> None:
        if xy[0] == MARGIN:  # the header, and the captions of the queries
            written.append(text)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    for num_classes, num_missing in ((12, 0), (30, 10)):
        written.clear()
        labels = np.arange(60) % num_classes
        classes = tuple(f"class {i}" for i in range(num_classes))
        source = ArraySource(np.zeros((60, 4, 4, 3), np.uint8), labels, classes)
        neighbor_sheet(source, np.eye(60, dtype=np.float32), k=1)
        assert len(set(written) & set(classes)) == num_classes - num_missing
        left_out = f"queries of {num_classes - num_missing} of {num_classes} classes; {num_missing} are left out"
        assert (left_out in written) == bool(num_missing)


def test_invalid_arguments_are_refused(photos: np.ndarray) -> None:
    source = ArraySource(photos)
    with pytest.raises(ValueError, match="features must be one for each image, got 59 for 60"):
        neighbor_sheet(source, np.ones((59, 4), np.float32))
    with pytest.raises(ValueError, match="images must be 2 or more, so that each has a neighbor, got 1"):
        neighbor_sheet(ArraySource(photos[:1]), np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match="features must be finite"):
        neighbor_sheet(source, np.full((60, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"k must be 1..59"):
        nearest(np.ones((60, 4), np.float32), np.ones((1, 4), np.float32), k=60, exclude=[3])
