"""Tar files of images, read by byte offset: webdataset shards, or archives of image folders."""

from __future__ import annotations

import io
import logging
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.integrity import CorruptImageError
from byol_fast.data.sources.base import (
    EXTENSIONS,
    NUM_SAMPLED_SIZES,
    EncodedSource,
    SourceError,
    digest,
    evenly_spaced,
    labels_from_folders,
    labels_from_text,
)
from byol_fast.data.sources.shards import cache_path, file_stamp
from byol_fast.utils.files import atomic_path

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 128
INDEX_THREADS = 8

_LABEL_EXTENSIONS = ("cls", "cls.txt")
_MAX_LABEL_BYTES = 1024

Index = dict[str, NDArray[Any]]
"""Arrays of one tar file: `offset` and `size` `[N]`, packed `names` and `labels`, counts of ignored members."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TarSource(EncodedSource):
    """Image members of tar files: one read per image, in any order."""

    shards: tuple[Path, ...]
    """The tar files."""
    shard: NDArray[np.int32]
    """Position in `shards` of the file of each image `[N]`."""
    offset: NDArray[np.int64]
    """Offset of each image in its file, in bytes `[N]`."""
    size: NDArray[np.int64]
    """Size of each image in bytes `[N]`."""
    names: tuple[str, ...]
    """Member name of each image `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    title: str = ""
    """Name of the whole, for messages."""

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        shards = [shard.name for shard in self.shards]
        parts = (f"{shards[s]}\0{name}" for s, name in zip(self.shard.tolist(), self.names, strict=True))
        return digest(map(os.fsencode, parts))

    @cached_property
    def sizes(self) -> tuple[int, ...]:  # noqa: D102 (inherited)
        return tuple(self.size[evenly_spaced(len(self), NUM_SAMPLED_SIZES)].tolist())

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        size = int(self.size[i])
        try:
            file = self._open_file(self.shards[self.shard[i]])
            data = os.pread(file.descriptor, size, int(self.offset[i]))
        except FileNotFoundError:
            raise CorruptImageError(self.sample_name(i), "is in a shard that does not exist any more") from None
        except OSError as error:
            raise CorruptImageError(self.sample_name(i), f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise CorruptImageError(self.sample_name(i), "lies beyond the end of its shard, which has been cut off")
        return data

    @cached_property
    def _open_file(self) -> Callable[[Path], _OpenFile]:
        # A file evicted from the cache is closed when the last thread reading from it drops its reference.
        return lru_cache(MAX_OPEN_FILES)(_OpenFile)

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{self.shards[self.shard[i]]}:{self.names[i]}"

    def subset(self, index: NDArray[np.int64]) -> TarSource:  # noqa: D102 (inherited)
        return replace(
            self,
            shard=self.shard[index],
            offset=self.offset[index],
            size=self.size[index],
            names=tuple(self.names[i] for i in index),
            labels=self._select_labels(index),
        )

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in {self.title}"


class _OpenFile:
    """File descriptor that is closed when the last reference to it is dropped."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_tars(shards: Sequence[Path], title: str, arg_name: str, cache: Path) -> TarSource:
    """The images of tar files, in stored order; only headers and labels are read.

    Members whose names agree up to the first dot are one sample, as in webdataset: its image, and its label in a
    member `.cls` (a number, or a name). If no sample has a label, folders inside the archives are classes, as in a
    folder of images. The index of each file is cached.

    Raises:
        SourceError: an archive is compressed, truncated or not an archive, or has no images.
    """
    with ThreadPoolExecutor(INDEX_THREADS, "byol-fast-index") as pool:  # mostly waiting for the disk
        pairs = list(pool.map(lambda path: _load_or_build_index(path, arg_name, cache.expanduser() / "tar"), shards))
    indexes = [index for index, _ in pairs]
    counts = [len(index["offset"]) for index in indexes]
    if not sum(counts):
        raise SourceError(f"{arg_name}: no images in {title}; expected members that end in {', '.join(EXTENSIONS)}")
    if num_built := sum(built for _, built in pairs):
        log.info("%s: %d tar files indexed, %d images", title, num_built, sum(counts))
    _log_ignored_members(indexes, title)

    names = [name for index in indexes for name in _unpack_texts(index["names"], len(index["offset"]))]
    texts = [text for index in indexes for text in _unpack_texts(index["labels"], len(index["offset"]))]
    labels, classes = labels_from_text(texts)
    if not any(texts):
        labels, classes = labels_from_folders(_strip_common_folder(names))
    elif labels is None:
        log.warning("%s: %d of %d images have no label: treated as unlabeled", title, texts.count(""), len(texts))
    return TarSource(
        shards=tuple(shards),
        shard=np.repeat(np.arange(len(indexes), dtype=np.int32), counts),
        offset=np.concatenate([index["offset"] for index in indexes]),
        size=np.concatenate([index["size"] for index in indexes]),
        names=tuple(names),
        labels=labels,
        classes=classes,
        title=title,
    )


# ---- the index of one tar file -------------------------------------------------------------------------------------


def _load_or_build_index(path: Path, arg_name: str, folder: Path) -> tuple[Index, bool]:
    """Index of one tar file, and True if it was built, not loaded from the cache."""
    cached = cache_path(path, folder, ".npz")
    stamp = file_stamp(path)
    if (stored := _load_index(cached, stamp)) is not None:
        return stored, False
    index = _build_index(path, arg_name)
    try:
        _save_index(cached, stamp, index)
    except OSError as error:
        log.warning("the index of %s could not be stored in %s (%s)", path, folder, error)
    return index, True


def _load_index(path: Path, stamp: str) -> Index | None:
    """Cached index, or None if it is missing, damaged or out of date."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file) if str(file["stamp"]) == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _build_index(path: Path, arg_name: str) -> Index:
    """Offsets, sizes, names and labels of the images in one tar file."""
    # Group members into samples: the name up to the first dot is the key, the rest the extension.
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    labels: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    with path.open("rb") as file:
        for member in _members(path, arg_name):
            name = member.name.removeprefix("./").lstrip("/")
            folder, _, base = name.rpartition("/")
            if base.startswith("."):
                continue  # hidden files such as .DS_Store and ._photo.jpg
            stem, _, extension = base.partition(".")
            key, extension = f"{folder}/{stem}", extension.lower()
            if base.lower().endswith(EXTENSIONS):
                samples.setdefault(key, {})[extension] = (name, member.offset_data, member.size)
            elif extension in _LABEL_EXTENSIONS and member.size <= _MAX_LABEL_BYTES:
                file.seek(member.offset_data)
                labels[key] = file.read(member.size).decode(errors="replace").replace("\0", "").strip()
            else:
                ignored[f".{extension}" if extension else "no extension"] += 1

    images = {key: _select_images(sample) for key, sample in samples.items()}
    rows = [(row, labels.get(key, "")) for key, selected in images.items() for row in selected]
    return {
        "offset": np.array([offset for (_, offset, _), _ in rows], np.int64),
        "size": np.array([size for (_, _, size), _ in rows], np.int64),
        "names": _pack_texts([name for (name, _, _), _ in rows]),
        "labels": _pack_texts([label for _, label in rows]),
        "further": np.array(sum(map(len, samples.values())) - len(rows)),
        "left_out": np.array([f"{n} x {kind}" for kind, n in ignored.most_common(5)], np.str_),
    }


def _members(path: Path, arg_name: str) -> Iterator[tarfile.TarInfo]:
    count = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isfile():
                    count += 1
                    yield member
    except (tarfile.TarError, OSError, EOFError) as error:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            problem = "is compressed, so single images cannot be read from it; unpack it (gunzip, unxz, ...)"
        elif head.startswith(b"version https://git-lfs"):
            problem = "is a Git LFS pointer; fetch the file itself (git lfs pull)"
        elif count:
            problem = f"is cut off or damaged after {count} members ({error}); fetch it again"
        else:
            problem = f"is not a tar file ({error})"
        raise SourceError(f"{arg_name}: {path} {problem}") from error


def _select_images(sample: dict[str, tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The image named `key.extension` (masks and thumbnails have longer names), or else all images of the sample."""
    for extension in EXTENSIONS:
        if extension[1:] in sample:
            return [sample[extension[1:]]]
    return list(sample.values())


def _save_index(path: Path, stamp: str, index: Mapping[str, NDArray[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(index) | {"stamp": np.array(stamp)}
    np.savez(buffer, **arrays)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _pack_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Texts without NUL as one array of bytes."""
    return np.frombuffer(os.fsencode("\0".join(texts)), np.uint8)


def _unpack_texts(packed: NDArray[np.uint8], count: int) -> list[str]:
    """Inverse of `_pack_texts`."""
    return os.fsdecode(packed.tobytes()).split("\0") if count else []


def _log_ignored_members(indexes: Sequence[Index], title: str) -> None:
    totals: Counter[str] = Counter()
    for entry in (str(entry) for index in indexes for entry in index["left_out"]):
        count, _, kind = entry.partition(" x ")
        totals[kind] += int(count)
    if totals:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in totals.most_common(5))
        log.info("%s: ignoring members that are neither images nor labels (%s)", title, kinds)
    if further := sum(int(index["further"]) for index in indexes):
        log.warning("%s: ignoring %d further images of samples that have several", title, further)


def _strip_common_folder(names: Sequence[str]) -> list[str]:
    """Remove the folder that all names share: an archive of a folder has its name in front of each member."""
    common = os.path.commonpath([name.rpartition("/")[0] or "." for name in names])
    return [name[len(common) + 1 :] for name in names] if common not in {"", "."} else list(names)
