"""A sheet of images, each beside its nearest neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from byol_fast.config import ConfigError
from byol_fast.data import ImageSource
from byol_fast.evaluate.neighbors import Matrix, _matrix, choose_queries, nearest
from byol_fast.report.preview import FAINT, INK, PAPER, TRAY, VIEW_COLOURS
from byol_fast.utils.files import atomic_path

TILE, GAP, MARGIN, LINE = 102, 12, 24, 15  # a tile holds three times 32 pixels and the frame


TEXT, TITLE, FRAME = 11, 18, 3


SAME, OTHER = VIEW_COLOURS
"""Frames of neighbours of the query's class, and of others."""


def neighbour_sheet(
    source: ImageSource,
    features: Matrix,
    *,
    queries: int | Sequence[int] = 8,
    k: int = 8,
    labels: NDArray[np.int64] | None = None,
    own: tuple[ImageSource, Matrix] | None = None,
    title: str = "Nearest neighbours",
) -> Image.Image:
    """A picture: a query in each row, and the images whose features are most similar to its own.

    Args:
        source: the images.
        features: of each of them `[N, D]`.
        queries: how many to choose (`choose_queries`), or their positions in the source.
        k: neighbours of each; all where there are fewer.
        labels: classes `[N]`, -1 where unknown; the source's own when None. Frames show whether they agree.
        own: images that are not in the source, and their features, to ask about instead.
        title: of the sheet.

    Returns:
        An RGB image. Small images are enlarged a whole number of times.

    Raises:
        ValueError: features that do not belong to the images, or there are fewer than two of them.
        BadImageError: an image cannot be read.
    """
    if len(features) != len(source) or len(source) < 2:
        raise ValueError(
            f"neighbours: features must be one for each of 2 or more images, got {len(features)} for {len(source)}"
        )
    labels = source.labels if labels is None else labels
    k = min(k, len(source) - 1)
    if own is None:
        chosen = choose_queries(len(source), queries, labels) if isinstance(queries, int) else list(queries)
        asked, asked_labels = source, None if labels is None else labels[chosen]
        similarity, rows = nearest(features, _matrix("features", features)[chosen], k=k, exclude=chosen)
    else:
        asked, asked_labels = own[0], None
        chosen = list(range(len(asked)))
        similarity, rows = nearest(features, own[1], k=k)
    step = TILE + GAP
    top = 2 * MARGIN + TITLE + LINE + 8
    left = MARGIN + step + GAP
    canvas = Image.new("RGB", (left + k * step + MARGIN - GAP, top + len(chosen) * (step + 2 * LINE) + GAP), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default
    pen.text((MARGIN, MARGIN - 6), title, INK, font(TITLE))
    _legend(pen, source, k, rows, labels, asked_labels)
    for row, query in enumerate(chosen):
        y = top + row * (step + 2 * LINE)
        label = -1 if asked_labels is None else int(asked_labels[row])
        _draw(canvas, asked.load(query), (MARGIN, y), INK)
        _caption(pen, (MARGIN, y + TILE + 4), _name(asked, query), _class(source, label))
        pen.line((left - GAP - 1, y, left - GAP - 1, y + TILE), FAINT)
        for column, (i, s) in enumerate(zip(rows[row].tolist(), similarity[row].tolist(), strict=True)):
            x = left + column * step
            found = -1 if labels is None else int(labels[i])
            known = label >= 0 and found >= 0
            _draw(canvas, source.load(i), (x, y), (SAME if found == label else OTHER) if known else None)
            _caption(pen, (x, y + TILE + 4), f"{s:.3f}", _class(source, found))
    return canvas


def _legend(
    pen: ImageDraw.ImageDraw,
    source: ImageSource,
    k: int,
    rows: Tensor,
    labels: NDArray[np.int64] | None,
    asked: NDArray[np.int64] | None,
) -> None:
    """What is seen: the small print below the title."""
    font = ImageFont.load_default(TEXT)
    at, y = MARGIN, MARGIN + TITLE
    text = f"{k} nearest of {len(source):,} images by the cosine of their features"
    if labels is not None and asked is not None and (asked >= 0).any():
        same = (labels[rows.numpy()] == asked[:, None])[asked >= 0]
        text += f"; {same.mean():.0%} of those shown are of the query's class:"
    pen.text((at, y), text, FAINT, font)
    if labels is None or asked is None:
        return
    at += int(pen.textlength(text, font)) + GAP
    for colour, meaning in ((SAME, "same class"), (OTHER, "another class")):
        pen.rectangle((at, y + 1, at + 10, y + 11), outline=colour, width=FRAME)
        pen.text((at + 15, y), meaning, FAINT, font)
        at += 15 + int(pen.textlength(meaning, font)) + GAP


def _draw(canvas: Image.Image, image: Image.Image, at: tuple[int, int], frame: str | None) -> None:
    """The whole image in a square, framed."""
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
        pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=frame, width=FRAME)


def _caption(pen: ImageDraw.ImageDraw, at: tuple[int, int], *lines: str) -> None:
    font = ImageFont.load_default(TEXT)
    for number, line in enumerate(lines):
        text = line
        while len(text) > 3 and pen.textlength(text, font) > TILE:
            text = ".." + text[3:]
        pen.text((at[0], at[1] + number * LINE), text, FAINT if number else INK, font)


def _name(source: ImageSource, i: int) -> str:
    return Path(source.where(i)).name


def _class(source: ImageSource, label: int) -> str:
    return source.classes[label] if 0 <= label < len(source.classes) else ""


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="png", optimize=True)
    except OSError as error:
        raise ConfigError(f"neighbours: {path} cannot be written ({error}); choose another file") from error
