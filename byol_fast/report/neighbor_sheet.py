"""A sheet of images, each beside its nearest neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from byol_fast.config.fields import SheetNeighbors, SheetQueries, check, require
from byol_fast.data import ImageSource
from byol_fast.data.decode import MAX_PIXELS
from byol_fast.evaluate.neighbors import Matrix, nearest, select_queries
from byol_fast.report.preview import FAINT, INK, PAPER, TRAY, VIEW_COLORS
from byol_fast.utils.files import output_file, printable_name

TILE, GAP, MARGIN, LINE = 102, 12, 24, 15  # a tile has room for 32 pixels three times enlarged, and the frame
TEXT, TITLE, FRAME = 11, 18, 3
TOP, LEFT, STEP = 2 * MARGIN + TITLE + 3 * LINE + 8, MARGIN + TILE + 2 * GAP, TILE + GAP
"""Position of the first neighbor, and the distance to the next one."""
MIN_WIDTH = 440
"""Room for the lines of the header."""
SAME, OTHER = VIEW_COLORS[:2]
"""Frames of neighbors of the query's class, and of other classes, which are dashed, too."""
DASH = 9
"""Length of the dashes, and of the gaps between them."""
MIN_QUERIES, MAX_QUERIES = 8, 20
"""Queries of a sheet by default: one of each class, within these limits."""


def neighbor_sheet(
    source: ImageSource,
    features: Matrix,
    *,
    queries: int | Sequence[int] | None = None,
    k: int = 8,
    labels: NDArray[np.int64] | None = None,
    own: tuple[ImageSource, Matrix] | None = None,
    title: str = "Nearest neighbors",
) -> Image.Image:
    """A picture with a query in each row, beside it the images with the most similar features.

    Args:
        source: the images.
        features: their features `[N, D]`.
        queries: number of queries to choose (`select_queries`), or their positions in the source; default:
            `default_queries`.
        k: neighbors of each query; fewer if there are not as many other images.
        labels: classes `[N]`, -1 where unknown; default: the source's own.
        own: images that are not in the source, and their features, as queries instead.
        title: of the sheet.

    Returns:
        An RGB image. Small images are enlarged by a whole factor.

    Raises:
        ValueError: the number of features is not the number of images, or an image has no other one beside it.
        CorruptImageError: an image cannot be read.
    """
    if len(features) != len(source):
        raise ValueError(f"neighbors: features must be one for each image, got {len(features)} for {len(source)}")
    num_others = len(source) - (own is None)
    require(num_others > 0, "neighbors: images", "be 2 or more, so that each has a neighbor", len(source))
    check("neighbors: k", SheetNeighbors, k)
    labels = source.labels if labels is None else labels
    queries = default_queries(labels) if queries is None else queries
    check("neighbors: queries", SheetQueries, queries if isinstance(queries, int) else len(queries))
    k = min(k, num_others)
    if own is None:
        rows = select_queries(len(source), queries, labels) if isinstance(queries, int) else list(queries)
        query_source, query_labels = source, None if labels is None else labels[rows]
        similarity, neighbors = nearest(features, features[rows], k=k, exclude=rows)
    else:
        query_source, query_labels = own[0], None
        rows = list(range(len(query_source)))
        similarity, neighbors = nearest(features, own[1], k=k)
    has_pairs = labels is not None and _has_pairs(labels)
    canvas = Image.new("RGB", sheet_size(len(rows), k), PAPER)
    pen = ImageDraw.Draw(canvas)
    _header(pen, title, len(source), neighbors, labels, query_labels)
    for i, row in enumerate(rows):
        y = TOP + i * (STEP + 2 * LINE)
        query_label = -1 if query_labels is None else int(query_labels[i])
        _draw(canvas, query_source.load(row), (MARGIN, y), INK)
        _caption(
            pen, (MARGIN, y + TILE + 4), Path(query_source.sample_name(row)).name, _class_name(source, query_label)
        )
        pen.line((LEFT - GAP - 1, y, LEFT - GAP - 1, y + TILE), FAINT)
        for column, (j, score) in enumerate(zip(neighbors[i].tolist(), similarity[i].tolist(), strict=True)):
            at = LEFT + column * STEP, y
            label = -1 if labels is None else int(labels[j])
            _draw(canvas, source.load(j), at, _frame(query_label, label) if has_pairs else None)
            _caption(pen, (at[0], y + TILE + 4), f"{score:.3f}", _class_name(source, label))
    return canvas


def sheet_size(num_queries: int, k: int) -> tuple[int, int]:
    """Width and height of a sheet in pixels.

    Raises:
        ValueError: it has more pixels than an image may have.
    """
    width, height = max(LEFT + k * STEP + MARGIN - GAP, MIN_WIDTH), TOP + num_queries * (STEP + 2 * LINE) + GAP
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"neighbors: queries and k must give a sheet of at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,} "
            f"for {num_queries} and {k}; set smaller ones"
        )
    return width, height


def _header(
    pen: ImageDraw.ImageDraw,
    title: str,
    num_images: int,
    neighbors_QK: Tensor,
    labels: NDArray[np.int64] | None,
    query_labels: NDArray[np.int64] | None,
) -> None:
    """Write the title, and below it the kind of search, the meaning of the frames, and how many classes are missing."""
    pen.text((MARGIN, MARGIN - 6), title, INK, ImageFont.load_default(TITLE))
    font = ImageFont.load_default(TEXT)
    x, y = MARGIN, MARGIN + TITLE
    text = f"{neighbors_QK.shape[1]} nearest of {num_images:,} images by the cosine similarity of their features"
    pen.text((x, y), text, FAINT, font)
    if labels is None or query_labels is None or not (query_labels >= 0).any():
        return
    if not _has_pairs(labels):
        pen.text((x, y + LINE), "no class has two images: a neighbor of the same class is impossible", FAINT, font)
        return
    y += LINE
    for color, meaning in ((SAME, "same class"), (OTHER, "another class")):
        _draw_frame(pen, (x, y, x + 3 * DASH - 1, y + 11), color)
        pen.text((x + 3 * DASH + 6, y), meaning, FAINT, font)
        x += 3 * DASH + 6 + int(pen.textlength(meaning, font)) + GAP
    same = (labels[neighbors_QK.numpy()] == query_labels[:, None])[query_labels >= 0]
    pen.text((x, y), f"{same.mean():.0%} have the query's class", FAINT, font)
    num_classes, num_shown = (len(np.unique(values[values >= 0])) for values in (labels, query_labels))
    if num_shown < num_classes:
        text = f"queries of {num_shown} of {num_classes} classes; {num_classes - num_shown} are left out"
        pen.text((MARGIN, y + LINE), text, FAINT, font)


def _has_pairs(labels: NDArray[np.int64]) -> bool:
    """True if a class has two images, so that a neighbor can be of the same class."""
    known = labels[labels >= 0]
    return len(np.unique(known)) < len(known)


def _draw_frame(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: str) -> None:
    """Draw a frame; that of another class is dashed, for readers who see no difference in color."""
    pen.rectangle(box, outline=color, width=FRAME)
    if color != OTHER:
        return
    left, top, right, bottom = box
    for x in range(left + DASH, right - DASH // 2, 2 * DASH):
        for y in (top, bottom - FRAME + 1):
            pen.rectangle((x, y, min(x + DASH - 1, right - FRAME), y + FRAME - 1), PAPER)
    for y in range(top + DASH, bottom - DASH // 2, 2 * DASH):
        for x in (left, right - FRAME + 1):
            pen.rectangle((x, y, x + FRAME - 1, min(y + DASH - 1, bottom - FRAME)), PAPER)


def default_queries(labels: NDArray[np.int64] | None) -> int:
    """Number of queries that shows all classes, if they are not too many.

    Args:
        labels: class of each image, -1 where unknown; None: no classes are known.
    """
    num_classes = 0 if labels is None else len(np.unique(labels[labels >= 0]))
    return min(max(num_classes, MIN_QUERIES), MAX_QUERIES)


def _frame(query_label: int, label: int) -> str | None:
    """Color of the frame of a neighbor; None where a class is unknown."""
    if query_label < 0 or label < 0:
        return None
    return SAME if label == query_label else OTHER


def _draw(canvas: Image.Image, image: Image.Image, at: tuple[int, int], frame: str | None) -> None:
    """Draw the whole image into a framed square."""
    x, y = at
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), TRAY)
    room = TILE - 2 * FRAME
    scale = room / max(image.size)
    if scale >= 2:
        image = image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    else:
        size = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((next(size), next(size)), Image.Resampling.LANCZOS)
    canvas.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
    if frame is not None:
        _draw_frame(pen, (x, y, x + TILE - 1, y + TILE - 1), frame)


def _caption(pen: ImageDraw.ImageDraw, at: tuple[int, int], *lines: str) -> None:
    font = ImageFont.load_default(TEXT)
    for number, line in enumerate(lines):
        text = line
        while len(text) > 3 and pen.textlength(text, font) > TILE:
            text = ".." + text[3:]
        pen.text((at[0], at[1] + number * LINE), text, FAINT if number else INK, font)


def _class_name(source: ImageSource, label: int) -> str:
    return printable_name(source.classes[label]) if 0 <= label < len(source.classes) else ""


def save_sheet(sheet: Image.Image, path: Path, *, trial: bool = False) -> None:
    """Write a sheet as PNG, atomically; with `trial` beside the file, which is not changed.

    Raises:
        ConfigError: the file cannot be written.
    """
    with output_file(path, "neighbors", trial=trial) as temporary:
        sheet.save(temporary, format="png", optimize=True)
