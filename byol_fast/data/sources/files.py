"""Folders of image files, and files that a list or a dataset names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.integrity import file_needs_check, read_file
from byol_fast.data.sources.base import (
    NUM_SAMPLED_SIZES,
    EncodedSource,
    digest,
    evenly_spaced,
    labels_from_folders,
    log_hidden,
)
from byol_fast.data.sources.listing import count_extensions, list_folder, list_images
from byol_fast.utils.files import printable_name

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

    def num_bytes(self, i: int) -> int:  # noqa: D102 (inherited)
        return self.path(i).stat().st_size

    def needs_check(self, i: int) -> bool:  # noqa: D102 (inherited)
        return file_needs_check(self.path(i))  # reads the header and the end of the file only

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return printable_name(self.path(i))

    def subset(self, index: NDArray[np.int64]) -> FileSource:  # noqa: D102 (inherited)
        return replace(self, paths=tuple(self.paths[i] for i in index), labels=self._select_labels(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in {printable_name(self.root)}"


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def open_folder(root: Path, arg_name: str) -> FileSource:
    """All images in a folder and its subfolders, apart from hidden and system folders and files.

    Raises:
        SourceError: the folder has no images, or a folder cannot be listed.
    """
    paths, ignored, hidden, repeated = list_images(root, arg_name)
    if ignored:
        log.warning(
            "%s: ignoring %d files that are not images by their extension (%s), for example %s",
            root,
            len(ignored),
            count_extensions(ignored),
            ", ".join(map(printable_name, ignored[:3])),
        )
    log_hidden(hidden, str(root))
    if repeated:
        shown = ", ".join(map(printable_name, repeated[:3]))
        log.warning("%s: %d links to folders that are used already are left out (%s)", root, len(repeated), shown)
    paths.sort()
    used, class_labels = labels_from_folders(paths, str(root), lambda i: printable_name(paths[i]))
    paths = [paths[i] for i in used]
    if class_labels.classes:
        _warn_empty_classes(root, paths, {*class_labels.classes, *map(os.path.basename, repeated)}, arg_name)
    return FileSource(
        root=root,
        paths=tuple(paths),
        ignored=len(ignored),
        ignored_examples=tuple(ignored[:10]),
        **class_labels._asdict(),
    )


def _warn_empty_classes(root: Path, paths: Sequence[str], known: Set[str], arg_name: str) -> None:
    """Log a warning for folders without images beside class folders: torchvision takes an empty folder for an error."""
    folder = root / os.path.commonpath({path.rpartition("/")[0] for path in paths})
    others = [name for name in list_folder(folder, arg_name) if name not in known]
    empty = [name for name in others if os.path.isdir(folder / name) or not os.path.exists(folder / name)]  # noqa: PTH110, PTH112
    if empty:
        shown = ", ".join(map(printable_name, empty[:5]))
        log.warning("%s: %d folders without images are no classes (%s)", folder, len(empty), shown)
