"""Images that are pieces of larger files, read by offset."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import itertools
import logging
import os
import re
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.integrity import CorruptImageError
from byol_fast.data.sources.base import NUM_SAMPLED_SIZES, EncodedSource, SourceError, evenly_spaced
from byol_fast.utils.files import atomic_path

log = logging.getLogger(__name__)

Index = dict[str, NDArray[Any]]
"""What is known of one shard: arrays by name, of them `offset` and `size` `[N]`."""

OPEN_FILES = 128
INDEX_THREADS = 8
INDEX_FORMAT = 1


class _Descriptor:
    """A file that stays open as long as someone holds this."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardSource(EncodedSource):
    """Encoded images at known places of larger files: one read for an image, in any order."""

    shards: tuple[Path, ...]
    """The files."""
    shard: NDArray[np.int32]
    """Which of them each image is in `[N]`."""
    offset: NDArray[np.int64]
    """Where it begins there, in bytes `[N]`."""
    size: NDArray[np.int64]
    """How many bytes it has `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    title: str = ""
    """What people call the whole."""

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def sizes(self) -> tuple[int, ...]:  # noqa: D102 (inherited)
        return tuple(self.size[evenly_spaced(len(self), NUM_SAMPLED_SIZES)].tolist())

    @cached_property
    def _descriptor(self) -> Callable[[Path], _Descriptor]:
        # A file that drops out of the cache is closed when the last thread that reads it lets go of it.
        return lru_cache(OPEN_FILES)(_Descriptor)

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        size = int(self.size[i])
        try:
            file = self._descriptor(self.shards[self.shard[i]])
            data = os.pread(file.number, size, int(self.offset[i]))
        except FileNotFoundError:
            raise CorruptImageError(self.sample_name(i), "is in a shard that does not exist any more") from None
        except OSError as error:
            raise CorruptImageError(self.sample_name(i), f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise CorruptImageError(self.sample_name(i), "lies beyond the end of its shard, which has been cut off")
        return data

    def subset(self, index: NDArray[np.int64]) -> ShardSource:  # noqa: D102 (inherited)
        return dataclasses.replace(
            self,
            shard=self.shard[index],
            offset=self.offset[index],
            size=self.size[index],
            labels=self._labels_of(index),
            **self._own_subset(index),
        )

    @abstractmethod
    def _own_subset(self, index: NDArray[np.int64]) -> dict[str, Any]:
        """The fields that a kind of shards adds, at these positions."""

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._contents()} in {self.title}"


def joined(indexes: Sequence[Index]) -> dict[str, Any]:
    """The fields `shard`, `offset` and `size` of a source, from the indexes of its shards."""
    return {
        "shard": np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index["offset"]) for index in indexes]),
        "offset": np.concatenate([index["offset"] for index in indexes]),
        "size": np.concatenate([index["size"] for index in indexes]),
    }


def find_shards(root: Path, suffix: str, where: str) -> list[Path] | None:
    """The shards that a file name, a pattern or a folder means, in order of their names; None where it means none.

    Patterns: `train-{000..127}.tar` (every one must exist), `{a,b}`, `*`, `?`, `[...]`.

    Raises:
        SourceError: the pattern means shards that do not exist.
    """
    if root.is_file():
        return [root] if root.suffix.lower() == suffix else None
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.suffix.lower() == suffix and p.is_file())
        return [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)] or None
    if not root.name.lower().endswith(suffix):
        return None
    names = expand_braces(str(root))
    if len(names) == 1 and not glob.has_magic(names[0]):
        return None
    shards: list[Path] = []
    missing: list[str] = []
    for name in names:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).is_file()  # noqa: PTH207
        shards.extend(map(Path, matches))
        missing.extend([] if matches else [name])
    if missing:
        raise SourceError(
            f"{where}: {len(missing)} of {len(names)} shards of {root} do not exist, such as {missing[0]}; "
            "correct the pattern, or fetch them"
        )
    return shards


def expand_braces(pattern: str) -> list[str]:
    """`a{1..3}b` and `a{x,y}b` written out, leading zeros kept."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        parts = listed.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts = [f"{k:0{width}d}" for k in range(int(first), int(last) + 1)]
    tails = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + part + tail for part, tail in itertools.product(parts, tails)]


def cache_name(path: Path, folder: Path, ending: str) -> Path:
    """Where something that was found out about a file is kept."""
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
    return folder / f"{path.stem}-{name}{ending}"


def stamp_of(path: Path, settings: Sequence[str] = ()) -> str:
    """What a stored index must have been made of to be used again."""
    status = path.stat()
    return repr((INDEX_FORMAT, status.st_size, status.st_mtime_ns, *settings))


def load_index(path: Path, stamp: str) -> Index | None:
    """A stored index, if it is there, whole, and of the file as it is now."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file) if str(file["stamp"]) == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def save_index(path: Path, stamp: str, index: Mapping[str, NDArray[Any]]) -> None:
    """Store an index for the next time.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(index) | {"stamp": np.array(stamp)}
    np.savez(buffer, **arrays)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def index_all(shards: Sequence[Path], index: Callable[[Path], Index]) -> list[Index]:
    """Index several shards at a time: it is mostly waiting for the disk."""
    with ThreadPoolExecutor(INDEX_THREADS, "byol-fast-index") as pool:
        return list(pool.map(index, shards))


def pack_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Texts without NUL as one array of bytes."""
    return np.frombuffer(os.fsencode("\0".join(texts)), np.uint8)


def unpack_texts(packed: NDArray[np.uint8], count: int) -> list[str]:
    """The inverse of `pack_texts`."""
    return os.fsdecode(packed.tobytes()).split("\0") if count else []
