"""Synthetic JPEGs with ImageNet-like sizes, for measurements without a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 95


def write_synthetic_jpegs(folder: Path, count: int = 64) -> Path:
    """Write JPEG files of smooth shapes, edges and grain; their bytes are the same in every call.

    They have about 110 kB, like an average ImageNet file, and take as long to decode.

    Args:
        folder: to write to; created if missing.
        count: number of files.

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
        picture = picture + rng.normal(0, 9, (HEIGHT, WIDTH, 1))  # grain, equal in all channels
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:03d}.jpg", quality=QUALITY)
    return folder
