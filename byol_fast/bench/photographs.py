"""Photographs that nobody took: JPEG files as large and as rich in detail as real ones, where there is no folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 95


def write_photographs(folder: Path, count: int = 64) -> Path:
    """Write JPEG files of soft shapes, edges and grain, the same ones every time.

    At this size and quality they have some 110 kB, as the average ImageNet file has, and cost as much to decode.

    Args:
        folder: where to; made when missing.
        count: of files.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.uniform(0, 255, (6, 8, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        picture: NDArray[np.float64] = np.asarray(smooth, dtype=np.float64)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        for _ in range(12):  # discs with edges
            y, x, radius = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH), rng.uniform(10, 90)
            inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            picture = np.where(inside[..., None], 0.5 * picture + 0.5 * rng.uniform(0, 255, 3), picture)
        picture = picture + rng.normal(0, 9, (HEIGHT, WIDTH, 1))  # grain, alike in all channels
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:03d}.jpg", quality=QUALITY)
    return folder
