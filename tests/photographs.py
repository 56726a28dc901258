"""Files of photographs of many shapes: made, with smooth content, and real ones."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = (
    ("JPEG", "RGB", (640, 480)), ("JPEG", "RGB", (481, 640)), ("JPEG", "RGB", (500, 333)), ("JPEG", "L", (250, 401)),
    ("PNG", "RGB", (32, 50)), ("PNG", "RGB", (32, 32)), ("PNG", "RGBA", (20, 31)), ("PNG", "P", (37, 39)),
    ("WEBP", "RGB", (423, 40)), ("JPEG", "CMYK", (90, 121)), ("PNG", "RGB", (96, 150)), ("PNG", "RGB", (96, 96)),
)  # fmt: skip
"""Format, mode, width and height. 32 and 96 are sizes of inputs in tests."""


def made_photographs(folder: Path) -> list[Path]:
    """Write one file of each of `SHAPES`."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (kind, mode, size) in enumerate(SHAPES):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        paths.append(folder / f"{number:02d}.{kind.lower()}")
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(paths[-1], kind)
    return paths


def real_photographs(archive: Path, folder: Path, count: int = 8) -> list[Path]:
    """Extract some photographs of a tar archive."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))), key=lambda m: m.name)
        selected = members[:: len(members) // count][:count]
        paths = []
        for number, member in enumerate(selected):
            file = tar.extractfile(member)
            assert file is not None
            paths.append(folder / f"{number}.jpg")
            paths[-1].write_bytes(file.read())
    return paths
