"""Folders of image files, and files that a list or a dataset names."""

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
    """Image files."""

    root: Path
    """Folder that `paths` are relative to."""
    paths: tuple[str, ...]
    """Path of each image `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    ignored: int = 0
    """Number of files in the folder whose extensions are not those of images."""
    ignored_examples: tuple[str, ...] = ()
    """Names of up to ten ignored files."""
    label_problem: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> Path:
        """File of image `i`."""
        return self.root / self.paths[i]

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        return digest(os.fsencode(name) for name in self.paths)

    @cached_property
    def sizes(self) -> tuple[int, ...]:  # noqa: D102 (inherited)
        return tuple(_file_size(self.path(i)) for i in evenly_spaced(len(self), NUM_SAMPLED_SIZES).tolist())

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        return read_file(self.path(i))

    def needs_check(self, i: int) -> bool:  # noqa: D102 (inherited)
        return file_needs_check(self.path(i))  # reads the two ends of the file only

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return str(self.path(i))

    def subset(self, index: NDArray[np.int64]) -> FileSource:  # noqa: D102 (inherited)
        return replace(self, paths=tuple(self.paths[i] for i in index), labels=self._select_labels(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in {self.root}"


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def open_folder(root: Path, arg_name: str) -> FileSource:
    """All images in a folder and its subfolders.

    Raises:
        SourceError: the folder has no images, or a folder cannot be listed.
    """
    paths: list[str] = []
    ignored: list[str] = []
    for name in walk(root, arg_name):
        (paths if name.lower().endswith(EXTENSIONS) else ignored).append(name)
    if not paths:
        kinds = f"only {_count_extensions(ignored)}" if ignored else "no files at all"
        raise SourceError(
            f"{arg_name}: no images in {root.absolute()} or below ({kinds}); "
            f"expected files that end in {', '.join(EXTENSIONS)}, or .tar or .parquet shards"
        )
    if ignored:
        log.warning(
            "%s: ignoring %d files that are not images by their extension (%s), for example %s",
            root,
            len(ignored),
            _count_extensions(ignored),
            ", ".join(ignored[:3]),
        )
    paths.sort()
    labels, classes = labels_from_folders(paths, str(root), paths.__getitem__)
    return FileSource(
        root=root,
        paths=tuple(paths),
        labels=labels,
        classes=classes,
        ignored=len(ignored),
        ignored_examples=tuple(ignored[:10]),
    )


def walk(root: Path, arg_name: str) -> Iterator[str]:
    """Relative paths of all files below a folder that are not hidden; links to folders are followed once.

    Raises:
        SourceError: a folder cannot be listed.
    """
    visited: set[tuple[int, int]] = set()

    def on_error(error: OSError) -> None:
        raise SourceError(
            f"{arg_name}: cannot list {error.filename} ({error.strerror}); check its permissions"
        ) from error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=on_error):
        # A link may lead back into the tree: each folder is listed once, by its inode.
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        prefix = "" if prefix == "." else f"{prefix}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _count_extensions(names: Sequence[str]) -> str:
    """File counts by extension: `3 x .txt, 1 x no extension`."""
    kinds = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    return ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5))
