"""Scan of a data set: corrupt images, image sizes and class counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.decode import open_image
from byol_fast.data.errors import CorruptImageError
from byol_fast.data.integrity import check_bytes
from byol_fast.data.sources import ArraySource, EncodedSource, ImageSource
from byol_fast.data.sources.base import NUM_SAMPLED_SIZES, evenly_spaced
from byol_fast.utils.files import printable_name

_CHUNK = 32


class Result(NamedTuple):
    """Result for one image."""

    position: int
    problem: str | None = None
    size: tuple[int, int] | None = None
    """Width and height if they were measured."""
    is_checked: bool = True
    """False if it was passed over."""
    is_decoded: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of a scan."""

    description: str
    """One line about the source."""
    images: int
    """Number of images."""
    checked: int
    """Number of images that were looked at; without `fast` all."""
    decoded: int
    """Number of images that were decoded without a problem; with `fast` only those that looked suspicious."""
    corrupt: tuple[tuple[str, str], ...]
    """Names of images that cannot be read, and why."""
    widths: NDArray[np.int64]
    """Widths in pixels of the measured images."""
    heights: NDArray[np.int64]
    """Heights of the same images."""
    per_class: dict[str, int]
    """Number of images per class; empty without labels."""
    label_problem: str
    """Reason why labels are not used; empty if they are, or if there are none."""
    seconds: float
    """Duration."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.description,
            "images": self.images,
            "checked": self.checked,
            "decoded": self.decoded,
            "corrupt": [{"image": image, "reason": reason} for image, reason in self.corrupt],
            "pixels": self.pixels(),
            "classes": self.per_class,
            "label_problem": self.label_problem,
            "seconds": round(self.seconds, 2),
        }

    def pixels(self) -> dict[str, dict[str, int]]:
        """Smallest, 5 %, median, 95 % and largest value of width, height and the shorter side."""
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
    """Scan every image of a source.

    Args:
        source: the images.
        threads: number of decoding threads.
        fast: check only the header and the end of each image, decode suspicious ones, and measure up to 1,000; misses
            damage in the middle of a file.
        progress: called with the number of finished images.
    """
    start = time.monotonic()
    source.check_thread_safety(threads)
    results = _scan_all(source, threads, fast, progress)
    measured = np.array([result.size for result in results if result.size is not None], np.int64).reshape(-1, 2)
    counts = Counter(() if source.labels is None else source.labels.tolist())
    return Scan(
        description=source.describe(),
        images=len(source),
        checked=sum(result.is_checked for result in results),
        decoded=sum(result.is_decoded for result in results),
        corrupt=tuple((source.sample_name(r.position), r.problem) for r in results if r.problem is not None),
        widths=measured[:, 0],
        heights=measured[:, 1],
        per_class={printable_name(name): counts[k] for k, name in enumerate(source.classes)},
        label_problem=source.label_problem if source.labels is None else "",
        seconds=time.monotonic() - start,
    )


def _scan_all(source: ImageSource, threads: int, fast: bool, progress: Callable[[int], None]) -> list[Result]:
    if isinstance(source, ArraySource):
        progress(len(source))
        height, width = source.images.shape[1:3]
        return [Result(i, None, (width, height), is_decoded=True) for i in range(len(source))]
    to_measure = set(evenly_spaced(len(source), NUM_SAMPLED_SIZES).tolist())

    def scan_one(i: int) -> Result:
        try:
            if not fast or (i in to_measure and not isinstance(source, EncodedSource)):
                return Result(i, None, source.load(i).size, is_decoded=True)
            if not isinstance(source, EncodedSource):
                return Result(i, is_checked=False)
            is_suspicious = source.needs_check(i)
            problem = check_bytes(source.read(i)) if is_suspicious else None
            size = _size(source.read(i)) if problem is None and i in to_measure else None
            return Result(i, problem, size, is_decoded=is_suspicious and problem is None)
        except CorruptImageError as error:
            return Result(i, error.reason)

    def scan_chunk(start: int) -> list[Result]:
        return [scan_one(i) for i in range(start, min(start + _CHUNK, len(source)))]

    results: list[Result] = []
    with ThreadPoolExecutor(threads, "byol-fast-scan") as pool:
        for chunk in pool.map(scan_chunk, range(0, len(source), _CHUNK)):
            results.extend(chunk)
            progress(len(results))
    return results


def _size(data: bytes) -> tuple[int, int] | None:
    try:
        return open_image(data).size
    except Exception:  # the ends are valid, but the header is not: only decoding finds that
        return None
