"""Folders of image files, and files that a list or a dataset names."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence, Set
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
    is_hidden,
    labels_from_folders,
    log_hidden,
)
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
    paths: list[str] = []
    ignored: list[str] = []
    hidden: list[str] = []
    repeated: list[str] = []
    for name in walk(root, arg_name, hidden=hidden, repeated=repeated):
        (paths if name.lower().endswith(EXTENSIONS) else ignored).append(name)
    hidden.sort()
    if not paths:
        kinds = f"only {_count_extensions(ignored)}" if ignored else "no files at all"
        kinds += f"; hidden: {len(hidden)}, such as {printable_name(hidden[0])}" if hidden else ""
        raise SourceError(
            f"{arg_name}: no images in {root.absolute()} or below ({kinds}); "
            f"expected files that end in {', '.join(EXTENSIONS)}, or .tar or .parquet shards"
            + (
                " (from Python, give datasets.load_from_disk(...))"
                if any(n.endswith(".arrow") for n in ignored)
                else ""
            )
        )
    if ignored:
        log.warning(
            "%s: ignoring %d files that are not images by their extension (%s), for example %s",
            root,
            len(ignored),
            _count_extensions(ignored),
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


def walk(
    root: Path, arg_name: str, *, hidden: list[str] | None = None, repeated: list[str] | None = None
) -> Iterator[str]:
    """Relative paths of all files below a folder, apart from hidden and system folders and files.

    Links to folders are followed. Each folder is listed once, by its own name if it lies below `root` itself.

    Args:
        root: the folder.
        arg_name: name of the argument, for error messages.
        hidden: list that receives the paths of hidden folders, and of hidden files with the names of images.
        repeated: list that receives the paths of links to folders that are listed already.

    Raises:
        SourceError: a folder cannot be listed.
    """
    visited: set[tuple[int, int]] = set()

    def on_error(error: OSError) -> None:
        raise _list_error(error, arg_name) from error

    starts = [str(root)]  # and the links, which come last
    for start in starts:
        for folder, subfolders, files in os.walk(start, onerror=on_error):
            # A link may lead back into the tree: each folder is listed once, by its inode.
            prefix = os.path.relpath(folder, root)
            prefix = "" if prefix == "." else f"{prefix}/"
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in visited:
                subfolders.clear()
                if repeated is not None and not _contains_itself(folder):
                    repeated.append(prefix[:-1])
                continue
            visited.add((status.st_dev, status.st_ino))
            if hidden is not None:
                images = (name for name in files if name.lower().endswith(EXTENSIONS))
                hidden += (prefix + name for name in (*subfolders, *images) if is_hidden(name))
            names = [name for name in subfolders if not is_hidden(name)]
            links = [name for name in sorted(names) if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
            starts += (os.path.join(folder, name) for name in links)  # noqa: PTH118
            subfolders[:] = sorted(set(names) - set(links))
            yield from (prefix + name for name in files if not is_hidden(name))


def list_folder(root: Path, arg_name: str) -> list[str]:
    """Sorted names in a folder, apart from hidden and system folders and files.

    Raises:
        SourceError: the folder cannot be listed.
    """
    try:
        return sorted(name for name in os.listdir(root) if not is_hidden(name))  # noqa: PTH208
    except OSError as error:
        raise _list_error(error, arg_name) from error


def _list_error(error: OSError, arg_name: str) -> SourceError:
    return SourceError(f"{arg_name}: cannot list {error.filename} ({error.strerror}); check its permissions")


def _contains_itself(link: str) -> bool:
    """True if a link leads to a folder that it lies in."""
    target, parent = os.path.realpath(link), os.path.realpath(os.path.dirname(link))  # noqa: PTH120
    return f"{parent}/".startswith(f"{target}/")


def _warn_empty_classes(root: Path, paths: Sequence[str], known: Set[str], arg_name: str) -> None:
    """Log a warning for folders without images beside class folders: torchvision takes an empty folder for an error."""
    folder = root / os.path.commonpath({path.rpartition("/")[0] for path in paths})
    others = [name for name in list_folder(folder, arg_name) if name not in known]
    empty = [name for name in others if os.path.isdir(folder / name) or not os.path.exists(folder / name)]  # noqa: PTH110, PTH112
    if empty:
        shown = ", ".join(map(printable_name, empty[:5]))
        log.warning("%s: %d folders without images are no classes (%s)", folder, len(empty), shown)


def _count_extensions(names: Sequence[str]) -> str:
    """File counts by extension: `3 x .txt, 1 x no extension`."""
    kinds = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    return ", ".join(f"{n} x {printable_name(kind)}" for kind, n in kinds.most_common(5))
