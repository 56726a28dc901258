"""Files that hold many images: finding them by file, pattern or folder, and cached data derived from them."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from byol_fast.data.errors import SourceError
from byol_fast.data.sources.braces import expand_braces
from byol_fast.data.sources.listing import EXTENSIONS, walk
from byol_fast.utils.files import open_regular

SHARDS = (".tar", ".parquet")
"""Extensions of files that hold many images."""

LFS_POINTER = "is a Git LFS pointer; fetch the file itself (git lfs pull)"

CACHE_FORMAT = 1


def find_shards(root: Path, suffix: str, arg_name: str) -> list[Path] | None:
    """Shards that a file name, a pattern or a folder refers to, sorted by name; None if it refers to none.

    Patterns: `train-{000..127}.tar` (all must exist), `{a,b}`, `*`, `?`, `[...]`.

    Raises:
        SourceError: the pattern refers to shards that do not exist, or to too many.
    """
    if os.path.isfile(root):  # noqa: PTH113 (Path.is_file raises an error for a long pattern)
        return [root] if root.suffix.lower() == suffix else None
    if os.path.isdir(root):  # noqa: PTH112
        shards = sorted(root / name for name in walk(root, arg_name) if name.lower().endswith(suffix))
        return _check_files(shards, arg_name) or None
    if not root.name.lower().endswith(suffix):
        return None
    names = expand_braces(str(root), arg_name)
    if len(names) == 1 and not glob.has_magic(names[0]):
        return None
    shards = []
    missing: list[str] = []
    for name in names:
        matches = [name] if os.path.isfile(name) else _glob(name)  # noqa: PTH113
        shards.extend(map(Path, matches))
        missing.extend([] if matches else [name])
    if missing:
        raise SourceError(
            f"{arg_name}: {len(missing)} of {len(names)} shards of {root} do not exist, such as {missing[0]}; "
            "correct the pattern, or fetch them"
        )
    return _check_files(list(dict.fromkeys(shards)), arg_name)  # alternatives may overlap


def _check_files(shards: list[Path], arg_name: str) -> list[Path]:
    """The shards; a broken link would be missed, and reading a pipe might never end."""
    unusable = [path for path in shards if not os.path.isfile(path)]  # noqa: PTH113
    if unusable:
        problem = "a broken link" if unusable[0].is_symlink() and not unusable[0].exists() else "no regular file"
        raise SourceError(
            f"{arg_name}: shards must be files, got {unusable[0]}, which is {problem}; fetch or remove such shards "
            f"({len(unusable)} of {len(shards)})"
        )
    return shards


def _glob(pattern: str) -> list[str]:
    """Files that a pattern matches, sorted by name; brackets in the names of existing folders have no meaning."""
    if not glob.has_magic(pattern):
        return []
    folder = next((parent for parent in Path(pattern).parents if os.path.isdir(parent)), Path())  # noqa: PTH112
    names = glob.glob(os.path.relpath(pattern, folder), root_dir=folder)  # noqa: PTH207
    return sorted(str(folder / name) for name in names)


def has_only_shards(folder: Path, arg_name: str) -> bool:
    """Return True if a folder has shards and no images; stops at the first image.

    Raises:
        SourceError: a folder cannot be listed.
    """
    shards = False
    for name in walk(folder, arg_name):
        if name.lower().endswith(EXTENSIONS):
            return False
        shards = shards or name.lower().endswith(SHARDS)
    return shards


def is_lfs_pointer(path: Path) -> bool:
    """Return True for a text that Git LFS leaves in place of a file that was not fetched."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read(64).startswith(b"version https://git-lfs")


def cache_path(path: Path, folder: Path, ending: str) -> Path:
    """Path in a cache folder for data derived from a file."""
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
    return folder / f"{path.stem}-{name}{ending}"


def file_stamp(path: Path, settings: Sequence[str] = ()) -> str:
    """Size, modification time and settings: cached data of another stamp is out of date."""
    status = path.stat()
    return repr((CACHE_FORMAT, status.st_size, status.st_mtime_ns, *settings))
