"""Images of speed runs (`byol-fast bench cifar10`): decoded once, before the clock runs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_fast import config as configs
from byol_fast.bench.speed_log import SpeedLog
from byol_fast.config import Config, ConfigError
from byol_fast.data.errors import CorruptImageError, SourceError
from byol_fast.data.loaders.threads import resolve_num_threads
from byol_fast.data.sources import ArraySource, ImageSource, open_train_val
from byol_fast.data.sources.base import digest
from byol_fast.training.knn_monitor import check_labels
from byol_fast.utils import progress
from byol_fast.utils.files import output_file


@dataclass(frozen=True, slots=True)
class Images:
    """Images of a recipe, decoded."""

    file: Path | None
    """Arrays of the decoded images; None where the recipe's images are arrays already."""
    record: dict[str, Any]
    """Numbers of training and validation images, and a digest of what they are, for the log."""
    seconds: float
    """Time to open and decode them."""

    @classmethod
    def prepare(cls, config: Config) -> Images:
        """Open the images of a configuration; those that are no arrays are decoded once, into a file in its `out`.

        Raises:
            SourceError: there are no images, or one is corrupt, or those of a set differ in size.
            ConfigError: there are no labels or no validation images, or the file cannot be written.
        """
        start = time.perf_counter()
        train, val = open_train_val(config)
        check_labels(config, train, val)
        assert val is not None  # knn.enabled is "on"
        fingerprint = digest(
            part
            for source in (train, val)
            for part in (source.fingerprint.encode(), repr(source.sizes).encode(), np.asarray(source.labels).tobytes())
        )
        file = None
        if not (isinstance(train, ArraySource) and isinstance(val, ArraySource)):
            file = config.out / f"images-{fingerprint[:12]}.npz"
            if not file.exists():
                _decode_into(file, train, val, config.data.threads)
        record = {"train": len(train), "val": len(val), "fingerprint": fingerprint}
        return cls(file, record, time.perf_counter() - start)

    def configure(self, config: Config) -> Config:
        """A configuration that reads the decoded images."""
        return config if self.file is None else configs.replace(config, {"data.root": self.file, "knn.val_root": None})

    def check_same(self, log: SpeedLog) -> None:
        """Check that a run was started with these images.

        Raises:
            ConfigError: it was started with others.
        """
        if log.header["images"] != self.record:
            was, now = ("{train:,} + {val:,} ({fingerprint})".format(**r) for r in (log.header["images"], self.record))
            raise ConfigError(
                f"bench cifar10: {log.path} must be continued with its images, but they were {was} and are {now}; give "
                "the same --data.root, or choose another --output"
            )


def _decode_into(file: Path, train: ImageSource, val: ImageSource, threads: int) -> None:
    arrays: dict[str, Any] = {
        "images": _decode(train, threads, "training"),
        "labels": train.labels,
        "val_images": _decode(val, threads, "validation"),
        "val_labels": val.labels,
        "classes": np.array(train.classes),
    }
    with output_file(file, "bench cifar10") as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def _decode(source: ImageSource, threads: int, which: str) -> NDArray[np.uint8]:
    """All images of a source, uint8 `[N, H, W, 3]`.

    Raises:
        SourceError: they differ in size, or one is corrupt.
    """
    if isinstance(source, ArraySource):
        return source.images
    num_threads = resolve_num_threads(threads)
    source.check_thread_safety(num_threads)
    first = np.asarray(source.load(0))
    images = np.empty((len(source), *first.shape), np.uint8)

    def load(i: int) -> None:
        try:
            image = np.asarray(source.load(i))
        except CorruptImageError as error:
            raise SourceError(
                f"bench cifar10: all {which} images must be intact, but {error.name} {error.reason}; replace it or "
                "remove it"
            ) from None
        if image.shape != first.shape:
            (h, w), (first_h, first_w) = image.shape[:2], first.shape[:2]
            raise SourceError(
                f"bench cifar10: all {which} images must have one size, got {first_h} x {first_w} pixels in "
                f"{source.sample_name(0)} and {h} x {w} in {source.sample_name(i)}; resize them, or train with "
                "`byol-fast train`"
            )
        images[i] = image

    bar = progress.current().bar(len(source), f"decoding {which} images")
    with bar, ThreadPoolExecutor(num_threads, "byol-fast-decode") as pool:
        for done, _ in enumerate(pool.map(load, range(len(source))), 1):
            bar.update(done)
    return images
