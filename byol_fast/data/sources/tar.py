"""Tar files of images, read by offset: webdataset shards, or plain archives of image folders."""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.sources.base import EXTENSIONS, SourceError, digest, labels_from_folders, labels_from_text
from byol_fast.data.sources.shards import (
    Index,
    ShardSource,
    cache_name,
    index_all,
    joined,
    load_index,
    pack_texts,
    save_index,
    stamp_of,
    unpack_texts,
)

log = logging.getLogger(__name__)

_LABELS = ("cls", "cls.txt")
_LABEL_BYTES = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class TarSource(ShardSource):
    """Image members of tar files."""

    names: tuple[str, ...]
    """Names of the members `[N]`."""

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        shards = [shard.name for shard in self.shards]
        parts = (f"{shards[s]}\0{name}" for s, name in zip(self.shard.tolist(), self.names, strict=True))
        return digest(map(os.fsencode, parts))

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{self.shards[self.shard[i]]}:{self.names[i]}"

    def _own_subset(self, index: NDArray[np.int64]) -> dict[str, Any]:
        return {"names": tuple(self.names[i] for i in index)}


def open_tars(shards: Sequence[Path], title: str, where: str, cache: Path) -> TarSource:
    """The images of tar files, in the order they lie in; only headers and labels are read.

    Members whose names agree up to the first dot are one sample, as in webdataset: its image, and its label in a
    member `.cls` (a number, or a name). Where no sample has a label, folders inside of the archives are classes, as
    in a folder of images. What was found is stored in the cache, for the next time.

    Raises:
        SourceError: an archive is compressed, cut off or not an archive, or there are no images in them.
    """
    fresh = 0

    def index(path: Path) -> Index:
        nonlocal fresh
        stored = cache_name(path, cache.expanduser() / "tar", ".npz")
        stamp = stamp_of(path)
        if (known := load_index(stored, stamp)) is not None:
            return known
        fresh += 1
        made = _index(path, where)
        try:
            save_index(stored, stamp, made)
        except OSError as error:
            log.warning("the index of %s could not be stored in %s (%s)", path, stored.parent, error)
        return made

    indexes = index_all(shards, index)
    counts = [len(found["offset"]) for found in indexes]
    if not sum(counts):
        raise SourceError(f"{where}: no images in {title}; expected members that end in {', '.join(EXTENSIONS)}")
    if fresh:
        log.info("%s: %d tar files indexed, %d images", title, fresh, sum(counts))
    _report_left_out(indexes, title)
    pairs = list(zip(indexes, counts, strict=True))
    names = [name for found, count in pairs for name in unpack_texts(found["names"], count)]
    texts = [text for found, count in pairs for text in unpack_texts(found["labels"], count)]
    labels, classes = labels_from_text(texts)
    if not any(texts):
        labels, classes = labels_from_folders(_without_common_folder(names))
    elif labels is None:
        log.warning("%s: %d of %d images have no label: taken as unlabelled", title, texts.count(""), len(texts))
    return TarSource(
        shards=tuple(shards), names=tuple(names), labels=labels, classes=classes, title=title, **joined(indexes)
    )


def _index(path: Path, where: str) -> Index:
    """Places, names and labels of the images of one archive."""
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    texts: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    with path.open("rb") as file:
        for member in _members(path, where):
            name = member.name.removeprefix("./").lstrip("/")
            folder, _, base = name.rpartition("/")
            if base.startswith("."):
                continue  # .DS_Store, ._photo.jpg and the like
            stem, _, extension = base.partition(".")
            key, extension = f"{folder}/{stem}", extension.lower()
            if base.lower().endswith(EXTENSIONS):
                samples.setdefault(key, {})[extension] = (name, member.offset_data, member.size)
            elif extension in _LABELS and member.size <= _LABEL_BYTES:
                file.seek(member.offset_data)
                texts[key] = file.read(member.size).decode(errors="replace").replace("\0", "").strip()
            else:
                left_out[f".{extension}" if extension else "no extension"] += 1
    images: list[tuple[str, int, int]] = []
    labels: list[str] = []
    further = 0
    for key, sample in samples.items():
        chosen = _images_of(sample)
        further += len(sample) - len(chosen)
        images.extend(chosen)
        labels.extend([texts.get(key, "")] * len(chosen))
    return {
        "offset": np.array([offset for _, offset, _ in images], np.int64),
        "size": np.array([size for _, _, size in images], np.int64),
        "names": pack_texts([name for name, _, _ in images]),
        "labels": pack_texts(labels),
        "further": np.array(further),
        "left_out": np.array([f"{n} x {kind}" for kind, n in left_out.most_common(5)], np.str_),
    }


def _images_of(sample: dict[str, tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The images of a sample: the one that is named after it (its masks and thumbnails have longer names), or all."""
    for extension in EXTENSIONS:
        if extension[1:] in sample:
            return [sample[extension[1:]]]
    return list(sample.values())


def _members(path: Path, where: str) -> Iterator[tarfile.TarInfo]:
    count = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # they would pile up
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
        raise SourceError(f"{where}: {path} {problem}") from error


def _report_left_out(indexes: Sequence[Index], title: str) -> None:
    kinds = [str(kind) for index in indexes for kind in index["left_out"]]
    total: Counter[str] = Counter()
    for kind in kinds:
        n, _, name = kind.partition(" x ")
        total[name] += int(n)
    if total:
        listed = ", ".join(f"{n} x {name}" for name, n in total.most_common(5))
        log.info("%s: members that are neither images nor labels are left out (%s)", title, listed)
    if further := sum(int(index["further"]) for index in indexes):
        log.warning("%s: %d further images of samples that have several are left out", title, further)


def _without_common_folder(names: Sequence[str]) -> list[str]:
    """Names without the folder that all are in: an archive of a folder has that folder's name before each."""
    common = os.path.commonpath([name.rpartition("/")[0] or "." for name in names])
    return [name[len(common) + 1 :] for name in names] if common not in {"", "."} else list(names)
