"""Tar files of images, read by byte offset: webdataset shards, or archives of image folders."""

from __future__ import annotations

import io
import logging
import os
import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from byol_fast.config.fields import expand_home
from byol_fast.data.errors import CorruptImageError, SourceError
from byol_fast.data.integrity import MAX_BYTES, TOO_MANY_BYTES
from byol_fast.data.sources.base import (
    NUM_SAMPLED_SIZES,
    ClassLabels,
    EncodedSource,
    digest,
    evenly_spaced,
    labels_from_folders,
    labels_from_text,
    log_hidden,
)
from byol_fast.data.sources.listing import EXTENSIONS, is_hidden
from byol_fast.data.sources.shards import LFS_POINTER, cache_path, file_stamp, is_lfs_pointer
from byol_fast.data.sources.tar_index import INDEX_FORMAT, Index, unpack_texts
from byol_fast.data.sources.tar_workers import IndexBuilder
from byol_fast.utils.env import num_cpus
from byol_fast.utils.files import atomic_path, open_regular, printable_name
from byol_fast.utils.progress import current

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 128
MIN_INDEX_THREADS = 4
"""Threads that load or build indexes, at least: they wait for disks, and for processes."""


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
    label_problem: str = ""
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
        if size > MAX_BYTES:
            raise CorruptImageError(self.sample_name(i), TOO_MANY_BYTES.format(size))
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

    def num_bytes(self, i: int) -> int:  # noqa: D102 (inherited)
        return int(self.size[i])

    @cached_property
    def _open_file(self) -> Callable[[Path], _OpenFile]:
        # A file evicted from the cache is closed when the last thread reading from it drops its reference.
        return lru_cache(MAX_OPEN_FILES)(_OpenFile)

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return printable_name(f"{self.shards[self.shard[i]]}:{self.names[i]}")

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
        return f"{self._counts()} in {printable_name(self.title)}"


class _OpenFile:
    """File descriptor that is closed when the last reference to it is dropped."""

    def __init__(self, path: Path) -> None:
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_tars(
    shards: Sequence[Path], title: str, arg_name: str, cache: Path, *, on_corrupt: Literal["raise", "skip"]
) -> TarSource:
    """The images of tar files, in stored order; only headers and labels are read.

    Members whose names agree up to the first dot are one sample, as in webdataset: its image, and its label in a
    member `.cls` (a number, or a name). If no sample has a label, folders inside the archives are classes, as in a
    folder of images. Links are followed inside their archive. The index of each file is cached.

    Args:
        shards: the tar files.
        title: name of the whole, for messages.
        arg_name: name of the argument, for error messages.
        cache: folder for the indexes.
        on_corrupt: use the images in front of a shard's damage, with a warning (`skip`), or raise an error.

    Raises:
        SourceError: an archive is compressed, damaged, cut off or not an archive, or there are no images.
    """
    pairs = _load_or_build_indexes(shards, title, arg_name, expand_home(cache) / "tar")
    indexes = [index for index, _ in pairs]
    counts = [len(index["offset"]) for index in indexes]
    _report_damage(shards, indexes, arg_name, on_corrupt)
    _log_notes(shards, indexes, title)
    ignored = _ignored_members(indexes)
    if not sum(counts):
        expected = f"expected members that end in {', '.join(EXTENSIONS)}" + (f", got {ignored}" if ignored else "")
        raise SourceError(f"{arg_name}: no images in {title}; {expected}")
    if num_built := sum(built for _, built in pairs):
        log.info("%s: %d tar files indexed, %d images", title, num_built, sum(counts))
    if ignored:
        log.info("%s: ignoring members that are neither images nor labels (%s)", title, ignored)

    shard = np.repeat(np.arange(len(indexes), dtype=np.int32), counts)
    start = np.concatenate([index["start"] for index in indexes])
    names = [name for index in indexes for name in unpack_texts(index["names"], len(index["offset"]))]
    texts = [text for index in indexes for text in unpack_texts(index["labels"], len(index["offset"]))]
    used: Sequence[int] = _visible_members(names, title, arg_name)

    def sample_name(i: int) -> str:
        row = used[i]
        return f"{printable_name(shards[shard[row]])}:{printable_name(names[row])} (header at byte {start[row]})"

    if any(texts[i] for i in used):
        class_labels = labels_from_text([texts[i] for i in used], title, sample_name)
    else:
        paths = [posixpath.normpath(names[i]) for i in used]
        positions, class_labels = labels_from_folders(paths, title, sample_name)
        used = [used[i] for i in positions]
        _warn_stray_image(class_labels.labels, class_labels.classes, title, sample_name)
        if class_labels.labels is None and not class_labels.label_problem:
            problem = f"{printable_name(title)} has no labels (.cls) of its images, and no class folders"
            class_labels = ClassLabels(None, (), problem + (f" (other members: {ignored})" if ignored else ""))
    return TarSource(
        shards=tuple(shards),
        shard=shard[used],
        offset=np.concatenate([index["offset"] for index in indexes])[used],
        size=np.concatenate([index["size"] for index in indexes])[used],
        names=tuple(names[i] for i in used),
        title=title,
        **class_labels._asdict(),
    )


def _load_or_build_indexes(shards: Sequence[Path], title: str, arg_name: str, folder: Path) -> list[tuple[Index, bool]]:
    """Index of each tar file, and True if it was built, not loaded from the cache."""
    bar = current().bar(sum(map(_num_bytes, shards)) >> 20, f"indexing {printable_name(title)}", unit="MiB")
    num_read = 0

    def on_read(num_bytes: int) -> None:
        nonlocal num_read
        with bar.progress.lock:
            num_read += num_bytes
            bar.advance(num_read >> 20)

    several = len(shards) > 1 and num_cpus() > 1
    threads = ThreadPoolExecutor(max(MIN_INDEX_THREADS, num_cpus()), "byol-fast-index")
    with bar, threads as pool, IndexBuilder(on_read, use_processes=several) as build:
        return list(pool.map(lambda path: _load_or_build_index(path, arg_name, folder, build), shards))


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # named when it is read
        return 0


def _load_or_build_index(path: Path, arg_name: str, folder: Path, build: Callable[[Path], Index]) -> tuple[Index, bool]:
    """Index of one tar file, and True if it was built, not loaded from the cache."""
    cached = cache_path(path, folder, ".npz")
    try:
        stamp = file_stamp(path, [INDEX_FORMAT])
        if (stored := _load_index(cached, stamp)) is not None:
            return stored, False
        index = build(path)
        if int(index["damage_offset"]) == 0 and (problem := _wrong_format(path)):
            raise SourceError(f"{arg_name}: {path} {problem}")
    except OSError as error:
        raise SourceError(f"{arg_name}: {path} cannot be read ({error.strerror})") from error
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


def _save_index(path: Path, stamp: str, index: Mapping[str, NDArray[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(index) | {"stamp": np.array(stamp)}
    np.savez(buffer, **arrays)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _wrong_format(path: Path) -> str | None:
    """Problem of a file that is not a tar file; None if it may be one."""
    with open(path, "rb", opener=open_regular) as file:
        head = file.read(8)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is compressed, so single images cannot be read from it; unpack it (gunzip, unxz, ...)"
    return LFS_POINTER if is_lfs_pointer(path) else None


def _report_damage(
    shards: Sequence[Path], indexes: Sequence[Index], arg_name: str, on_corrupt: Literal["raise", "skip"]
) -> None:
    """Raise an error for the first damaged shard, or log a warning for each one."""
    damages = []
    for shard, index in zip(shards, indexes, strict=True):
        if (offset := int(index["damage_offset"])) >= 0:
            kind = "is not a tar file, or damaged" if offset == 0 else "is damaged"
            damages.append(
                f"{shard} {kind} at byte {offset} (images before it: {len(index['offset'])}): {index['damage']}"
            )
    if damages and on_corrupt == "raise":
        others = f" ({len(damages)} of {len(shards)} shards are damaged)" if len(damages) > 1 else ""
        raise SourceError(
            f"{arg_name}: {damages[0]}{others}; fetch it again, or use the images before it: set on_corrupt to skip"
        )
    for problem in damages:
        log.warning("%s; only the images before it are used, what is behind it is lost", problem)


def _log_notes(shards: Sequence[Path], indexes: Sequence[Index], title: str) -> None:
    """Log a warning for each kind of members that are not used as one would expect."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for shard, index in zip(shards, indexes, strict=True):
        for note, count, example in index["notes"].tolist():
            counts[note] += int(count)
            examples.setdefault(note, f"{shard}:{example}")
    for note, count in counts.items():
        log.warning("%s: %d %s, such as %s", title, count, note, examples[note])


def _ignored_members(indexes: Sequence[Index]) -> str:
    """Counts of the members that are neither images nor labels: `3 x .json, 1 x no extension`."""
    totals: Counter[str] = Counter()
    for entry in (str(entry) for index in indexes for entry in index["left_out"]):
        count, _, kind = entry.partition(" x ")
        totals[kind] += int(count)
    return ", ".join(f"{n} x {printable_name(kind)}" for kind, n in totals.most_common(5))


def _visible_members(names: Sequence[str], title: str, arg_name: str) -> list[int]:
    """Positions of the members that are not in hidden or system folders; folders that hold all may have any name.

    Raises:
        SourceError: there are none.
    """
    folders = [name.rpartition("/")[0] for name in names]
    paths = {folder: posixpath.normpath(f"/{folder}") for folder in set(folders)}
    common = posixpath.commonpath(paths.values())
    hidden = {folder for folder, path in paths.items() if any(map(is_hidden, path[len(common) :].split("/")))}
    log_hidden(sorted(hidden), title)
    visible = [i for i, folder in enumerate(folders) if folder not in hidden]
    if not visible:
        raise SourceError(f"{arg_name}: no images in {title} but in hidden folders, such as {printable_name(names[0])}")
    return visible


def _warn_stray_image(
    labels: NDArray[np.int64] | None, classes: Sequence[str], title: str, sample_name: Callable[[int], str]
) -> None:
    """Log a warning if one folder holds all images but one: it is then a class, and not the folder of all classes."""
    counts = [] if labels is None else np.bincount(labels).tolist()
    if labels is None or len(counts) != 2 or min(counts) != 1 or max(counts) == 1:
        return
    small = counts.index(1)
    log.warning(
        "%s: only %s is outside of the folder %s of all other images; the classes are %s and %s",
        title,
        sample_name(int((labels == small).argmax())),
        printable_name(classes[1 - small]),
        *map(printable_name, classes),
    )
