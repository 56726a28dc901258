"""Files in folders; without torch, so that a path is checked before it is imported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from byol_fast.data.errors import SourceError
from byol_fast.utils.files import printable_name
from byol_fast.utils.progress import current

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""Extensions of image files, in any case; other files are ignored and listed in the log."""

_SYSTEM_NAMES = {
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "lost+found",
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "~snapshot",  # of storage servers
    "network trash folder", "temporary items",
    "_temporary", "_delta_log",  # of Spark
}  # fmt: skip
"""Folders and files that operating systems and archivers put beside data, in lower case."""


def is_hidden(name: str) -> bool:
    """True for names of hidden and system folders and files (`.git`, `._1.jpg`, `@eaDir`), which are not data."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


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
    with current().bar(None, f"scanning {printable_name(root)}", unit="files") as bar:
        for names in _walk(root, arg_name, hidden, repeated):
            bar.add(len(names))
            yield from names


def _walk(root: Path, arg_name: str, hidden: list[str] | None, repeated: list[str] | None) -> Iterator[list[str]]:
    """The paths of `walk`, folder by folder."""
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
            yield [prefix + name for name in files if not is_hidden(name)]


def list_folder(root: Path, arg_name: str) -> list[str]:
    """Sorted names in a folder, apart from hidden and system folders and files.

    Raises:
        SourceError: the folder cannot be listed.
    """
    try:
        return sorted(name for name in os.listdir(root) if not is_hidden(name))  # noqa: PTH208
    except OSError as error:
        raise _list_error(error, arg_name) from error


class ImageFiles(NamedTuple):
    """Relative paths of what is below a folder."""

    images: list[str]
    """Files with the extensions of images, not sorted."""
    ignored: list[str]
    """Other files."""
    hidden: list[str]
    """Hidden folders, and hidden files with the names of images, sorted."""
    repeated: list[str]
    """Links to folders that are listed already."""


def list_images(root: Path, arg_name: str) -> ImageFiles:
    """All image files in a folder and its subfolders, and what else there is.

    Raises:
        SourceError: there are no images, or a folder cannot be listed.
    """
    files = ImageFiles([], [], [], [])
    for name in walk(root, arg_name, hidden=files.hidden, repeated=files.repeated):
        (files.images if name.lower().endswith(EXTENSIONS) else files.ignored).append(name)
    files.hidden.sort()
    if not files.images:
        kinds = f"only {count_extensions(files.ignored)}" if files.ignored else "no files at all"
        if files.hidden:
            kinds += f"; hidden: {len(files.hidden)}, such as {printable_name(files.hidden[0])}"
        is_saved_dataset = any(name.endswith(".arrow") for name in files.ignored)
        raise SourceError(
            f"{arg_name}: no images in {root.absolute()} or below ({kinds}); "
            f"expected files that end in {', '.join(EXTENSIONS)}, or .tar or .parquet shards"
            + (" (from Python, give datasets.load_from_disk(...))" if is_saved_dataset else "")
        )
    return files


def count_extensions(names: Sequence[str]) -> str:
    """File counts by extension: `3 x .txt, 1 x no extension`."""
    kinds = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    return ", ".join(f"{n} x {printable_name(kind)}" for kind, n in kinds.most_common(5))


def _list_error(error: OSError, arg_name: str) -> SourceError:
    return SourceError(f"{arg_name}: cannot list {error.filename} ({error.strerror}); check its permissions")


def _contains_itself(link: str) -> bool:
    """True if a link leads to a folder that it lies in."""
    target, parent = os.path.realpath(link), os.path.realpath(os.path.dirname(link))  # noqa: PTH120
    return f"{parent}/".startswith(f"{target}/")
