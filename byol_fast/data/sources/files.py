"""Folders of image files, and files that are named one by one."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.integrity import file_needs_check, read_file
from byol_fast.data.sources.base import (
    EXTENSIONS,
    NUM_SAMPLED_SIZES,
    EncodedSource,
    SourceError,
    digest,
    evenly_spaced,
    labels_from_folders,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FileSource(EncodedSource):
    """Image files, decoded each time they are needed."""

    root: Path
    """Folder that `paths` are relative to."""
    paths: tuple[str, ...]
    """The files."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    ignored: int = 0
    """How many files of the folder are not images by their name."""
    ignored_examples: tuple[str, ...] = ()
    """Some of their names."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> Path:
        """The file of image `i`."""
        return self.root / self.paths[i]

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        return digest(os.fsencode(name) for name in self.paths)

    @cached_property
    def sizes(self) -> tuple[int, ...]:  # noqa: D102 (inherited)
        return tuple(_size(self.path(i)) for i in evenly_spaced(len(self), NUM_SAMPLED_SIZES).tolist())

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        return read_file(self.path(i))

    def needs_check(self, i: int) -> bool:  # noqa: D102 (inherited)
        return file_needs_check(self.path(i))  # without reading all of it

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return str(self.path(i))

    def subset(self, index: NDArray[np.int64]) -> FileSource:  # noqa: D102 (inherited)
        return replace(self, paths=tuple(self.paths[i] for i in index), labels=self._labels_of(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._contents()} in {self.root}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def open_folder(root: Path, where: str) -> FileSource:
    """All images of a folder and its subfolders.

    Raises:
        SourceError: there are none, or a folder cannot be listed.
    """
    paths: list[str] = []
    ignored: list[str] = []
    for name in walk(root, where):
        (paths if name.lower().endswith(EXTENSIONS) else ignored).append(name)
    if not paths:
        raise SourceError(
            f"{where}: no images in {root.absolute()} or below ({summary(ignored, 'only ') or 'no files at all'}); "
            f"expected files that end in {', '.join(EXTENSIONS)}, or .tar or .parquet shards"
        )
    if ignored:
        log.warning(
            "%s: %d files that are not images by their name are left out (%s), for example %s",
            root,
            len(ignored),
            summary(ignored),
            ", ".join(ignored[:3]),
        )
    paths.sort()
    flat = sum(1 for name in paths if "/" not in name)
    if 0 < flat < len(paths):
        folders = len({name.partition("/")[0] for name in paths if "/" in name})
        log.warning(
            "%s: %d images lie beside the %d subfolders, so subfolders are not taken as classes: no labels",
            root,
            flat,
            folders,
        )
    labels, classes = labels_from_folders(paths)
    return FileSource(
        root=root,
        paths=tuple(paths),
        labels=labels,
        classes=classes,
        ignored=len(ignored),
        ignored_examples=tuple(ignored[:10]),
    )


def summary(names: Sequence[str], before: str = "") -> str:
    """How many files of which kinds: `3 x .txt, 1 x no extension`; empty without names."""
    kinds = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    return before + ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5)) if kinds else ""


def walk(root: Path, where: str) -> Iterator[str]:
    """Names of all files below a folder that are not hidden, relative to it; links to folders are followed once.

    Raises:
        SourceError: a folder cannot be listed.
    """
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise SourceError(f"{where}: cannot list {error.filename} ({error.strerror}); check its permissions") from error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        prefix = "" if prefix == "." else f"{prefix}/"
        yield from (prefix + name for name in files if not name.startswith("."))
