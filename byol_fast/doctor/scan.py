"""Scan of an image source: corrupt images, image sizes, images per class."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byol_fast.data.integrity import FORMATS, CorruptImageError, check_bytes
from byol_fast.data.sources import ArraySource, EncodedSource, ImageSource
from byol_fast.data.sources.base import NUM_SAMPLED_SIZES, evenly_spaced

_CHUNK_SIZE = 32

Finding = tuple[int, str | None, tuple[int, int] | None]
"""Index, defect or None, (width, height) or None if not measured."""


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of a scan."""

    description: str
    """Summary of the source."""
    images: int
    """Number of images."""
    decoded: int
    """Number of decoded images."""
    bad: tuple[tuple[str, str], ...]
    """Name and defect of each corrupt image."""
    widths: NDArray[np.int64]
    """Widths of the measured images, in pixels."""
    heights: NDArray[np.int64]
    """Heights of the measured images, in pixels."""
    per_class: dict[str, int]
    """Number of images by class name; empty without labels."""
    seconds: float
    """Duration of the scan."""

    def as_dict(self) -> dict[str, Any]:
        """JSON representation."""
        return {
            "source": self.description,
            "images": self.images,
            "decoded": self.decoded,
            "bad": [{"image": image, "reason": reason} for image, reason in self.bad],
            "pixels": self.pixels(),
            "classes": self.per_class,
            "seconds": round(self.seconds, 2),
        }

    def pixels(self) -> dict[str, dict[str, int]]:
        """Percentiles of width, height and shorter side: smallest, 5 %, median, 95 %, largest."""
        if not len(self.widths):
            return {}
        sides = {"width": self.widths, "height": self.heights, "shorter side": np.minimum(self.widths, self.heights)}
        names, percents = ("smallest", "5 %", "median", "95 %", "largest"), (0, 5, 50, 95, 100)
        return {
            side: {name: int(v) for name, v in zip(names, np.percentile(x, percents), strict=True)}
            for side, x in sides.items()
        }


def scan(
    source: ImageSource, *, threads: int, fast: bool = False, progress: Callable[[int], None] = lambda done: None
) -> Scan:
    """Scan every image of a source.

    Args:
        source: the images.
        threads: number of decoding threads.
        fast: read the first and last bytes of each image, decode only those that look incomplete, and measure up to
            1,000 images. Damage in the middle of a file is not detected.
        progress: called with the number of scanned images.
    """
    start = time.monotonic()
    findings = _scan_all(source, threads, fast, progress)
    measured = np.array([size for _, _, size in findings if size is not None], np.int64).reshape(-1, 2)
    counts = Counter(() if source.labels is None else source.labels.tolist())
    return Scan(
        description=source.describe(),
        images=len(source),
        decoded=len(source)
        if not fast
        else sum(size is not None or reason is not None for _, reason, size in findings),
        bad=tuple((source.sample_name(i), reason) for i, reason, _ in findings if reason is not None),
        widths=measured[:, 0],
        heights=measured[:, 1],
        per_class={name: counts[k] for k, name in enumerate(source.classes)},
        seconds=time.monotonic() - start,
    )


def _scan_all(source: ImageSource, threads: int, fast: bool, progress: Callable[[int], None]) -> list[Finding]:
    if isinstance(source, ArraySource):
        progress(len(source))
        height, width = source.images.shape[1:3]
        return [(i, None, (width, height)) for i in range(len(source))]
    to_measure = set(evenly_spaced(len(source), NUM_SAMPLED_SIZES).tolist())

    def scan_one(i: int) -> Finding:
        try:
            if not isinstance(source, EncodedSource):
                return (i, None, source.load(i).size) if not fast or i in to_measure else (i, None, None)
            if not fast:
                return i, None, source.load(i).size
            defect = check_bytes(source.read(i)) if source.needs_check(i) else None
            measure = defect is None and i in to_measure
            return i, defect, _size(source.read(i)) if measure else None
        except CorruptImageError as error:
            return i, error.reason, None

    def scan_chunk(start: int) -> list[Finding]:
        return [scan_one(i) for i in range(start, min(start + _CHUNK_SIZE, len(source)))]

    findings: list[Finding] = []
    with ThreadPoolExecutor(threads, "byol-fast-scan") as pool:
        for part in pool.map(scan_chunk, range(0, len(source), _CHUNK_SIZE)):
            findings.extend(part)
            progress(len(findings))
    return findings


def _size(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # both ends are valid, the header is not: damage that only decoding detects
        return None
