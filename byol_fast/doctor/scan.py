"""A look at every image of a source before training: which cannot be read, how large they are, how many a class has."""

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

_AT_A_TIME = 32

Found = tuple[int, str | None, tuple[int, int] | None]
"""Position, what is wrong, width and height where they were looked at."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found."""

    description: str
    """The source in a line."""
    images: int
    """How many there are."""
    decoded: int
    """How many of them were decoded."""
    bad: tuple[tuple[str, str], ...]
    """Names of images that cannot be read, and why."""
    widths: NDArray[np.int64]
    """In pixels, of the images that were measured."""
    heights: NDArray[np.int64]
    """The same."""
    per_class: dict[str, int]
    """Images of each class; empty without labels."""
    seconds: float
    """How long it took."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
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
        """Smallest, 5 %, median, 95 % and largest of width, height and the shorter side."""
        if not len(self.widths):
            return {}
        sides = {"width": self.widths, "height": self.heights, "shorter side": np.minimum(self.widths, self.heights)}
        names, shares = ("smallest", "5 %", "median", "95 %", "largest"), (0, 5, 50, 95, 100)
        return {
            side: {name: int(v) for name, v in zip(names, np.percentile(x, shares), strict=True)}
            for side, x in sides.items()
        }


def scan(
    source: ImageSource, *, threads: int, fast: bool = False, progress: Callable[[int], None] = lambda done: None
) -> Scan:
    """Look at every image of a source.

    Args:
        source: the images.
        threads: that decode.
        fast: look at the first and last bytes of each image only, decode those that look wrong, and measure up to
            1,000: what this misses is damage in the middle of a file.
        progress: called with the number of images that are done.
    """
    began = time.monotonic()
    found = _scan_all(source, threads, fast, progress)
    measured = np.array([size for _, _, size in found if size is not None], np.int64).reshape(-1, 2)
    counts = Counter(() if source.labels is None else source.labels.tolist())
    return Scan(
        description=source.describe(),
        images=len(source),
        decoded=len(source) if not fast else sum(size is not None or reason is not None for _, reason, size in found),
        bad=tuple((source.sample_name(i), reason) for i, reason, _ in found if reason is not None),
        widths=measured[:, 0],
        heights=measured[:, 1],
        per_class={name: counts[k] for k, name in enumerate(source.classes)},
        seconds=time.monotonic() - began,
    )


def _scan_all(source: ImageSource, threads: int, fast: bool, progress: Callable[[int], None]) -> list[Found]:
    if isinstance(source, ArraySource):
        progress(len(source))
        height, width = source.images.shape[1:3]
        return [(i, None, (width, height)) for i in range(len(source))]
    to_measure = set(evenly_spaced(len(source), NUM_SAMPLED_SIZES).tolist())

    def look(i: int) -> Found:
        try:
            if not isinstance(source, EncodedSource):
                return (i, None, source.load(i).size) if not fast or i in to_measure else (i, None, None)
            if not fast:
                return i, None, source.load(i).size
            wrong = check_bytes(source.read(i)) if source.needs_check(i) else None
            measure = wrong is None and i in to_measure
            return i, wrong, _size(source.read(i)) if measure else None
        except CorruptImageError as error:
            return i, error.reason, None

    def several(start: int) -> list[Found]:
        return [look(i) for i in range(start, min(start + _AT_A_TIME, len(source)))]

    found: list[Found] = []
    with ThreadPoolExecutor(threads, "byol-fast-scan") as pool:
        for part in pool.map(several, range(0, len(source), _AT_A_TIME)):
            found.extend(part)
            progress(len(found))
    return found


def _size(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # its ends looked right and its header is not: only decoding could have told
        return None
