"""Files that hold many images: finding them by file, pattern or folder, and cached data derived from them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from byol_fast.data.sources.base import EXTENSIONS, SourceError
from byol_fast.data.sources.files import walk

SHARDS = (".tar", ".parquet")
"""Extensions of files that hold many images."""

CACHE_FORMAT = 1


def find_shards(root: Path, suffix: str, arg_name: str) -> list[Path] | None:
    """Shards that a file name, a pattern or a folder refers to, sorted by name; None if it refers to none.

    Patterns: `train-{000..127}.tar` (all must exist), `{a,b}`, `*`, `?`, `[...]`.

    Raises:
        SourceError: the pattern refers to shards that do not exist.
    """
    if root.is_file():
        return [root] if root.suffix.lower() == suffix else None
    if root.is_dir():
        shards = sorted(p for p in root.rglob("*") if p.suffix.lower() == suffix and p.is_file())
        return [p for p in shards if not any(part.startswith(".") for part in p.relative_to(root).parts)] or None
    if not root.name.lower().endswith(suffix):
        return None
    names = expand_braces(str(root))
    if len(names) == 1 and not glob.has_magic(names[0]):
        return None
    shards = []
    missing: list[str] = []
    for name in names:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).is_file()  # noqa: PTH207
        shards.extend(map(Path, matches))
        missing.extend([] if matches else [name])
    if missing:
        raise SourceError(
            f"{arg_name}: {len(missing)} of {len(names)} shards of {root} do not exist, such as {missing[0]}; "
            "correct the pattern, or fetch them"
        )
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expand `a{1..3}b` and `a{x,y}b`; leading zeros are preserved."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, alternatives = match.groups()
    if alternatives is not None:
        parts = alternatives.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts = [f"{k:0{width}d}" for k in range(int(first), int(last) + 1)]
    tails = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + part + tail for part, tail in itertools.product(parts, tails)]


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


def cache_path(path: Path, folder: Path, ending: str) -> Path:
    """Path in a cache folder for data derived from a file."""
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
    return folder / f"{path.stem}-{name}{ending}"


def file_stamp(path: Path, settings: Sequence[str] = ()) -> str:
    """Size, modification time and settings: cached data of another stamp is out of date."""
    status = path.stat()
    return repr((CACHE_FORMAT, status.st_size, status.st_mtime_ns, *settings))
