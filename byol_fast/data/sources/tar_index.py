"""Index of the images in one tar file: names, labels and byte offsets."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.sources.listing import EXTENSIONS, is_hidden
from byol_fast.data.sources.tar_members import TarDamageError, TarMember, read_members, sparse_extent
from byol_fast.utils.files import open_regular, printable_name

INDEX_FORMAT = "5"
"""Changes with the content of an index, so that stored ones are built anew."""

NO_TARGET = "links to images are left out, because their targets are not in the archive"
HOLES = "images are left out, because they are stored with holes (pack them without --sparse)"
REPLACED = "members are replaced by later ones of the same name (extensions in any case)"
FURTHER = "further images of samples that have several are left out"
UNUSED_LABELS = "labels (.cls) are left out, because no image has their name"
UNNAMED = "members that seem to be images are left out, because their names are hidden or not those of images"

_LABEL_EXTENSIONS = (".cls", ".cls.txt")
_UNUSUAL_PATH = re.compile(r"^$|//|(?:^|/)\.")
"""In paths that are not normalized already, and some others."""
_MAX_LABEL_BYTES = 1024
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_MAX_LINKS = 40
"""Symbolic links that one path may lead through, as on Linux."""
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[1-6]\s[\d#]", re.DOTALL
)  # the formats of EXTENSIONS

_MEMBERS_PER_REPORT = 1000

Index = dict[str, NDArray[Any]]
"""Arrays of one tar file. Of its images: `start` (of the first header), `offset` and `size` `[N]`, packed `names` and
`labels`. Beside them: counts of other members, `notes` `[n, 3]` for warnings, `damage_offset` (-1: none), `damage`."""


class _Entry(NamedTuple):
    name: str
    path: str
    """Normalized name."""
    start: int


def build_index(path: Path, on_read: Callable[[int], None] = lambda num_bytes: None) -> Index:
    """Index of the images in one tar file, up to its end or its first damage.

    Members whose names agree up to the first dot are one sample.

    Args:
        path: the tar file.
        on_read: called now and then with the number of bytes that were passed since the last call.

    Raises:
        OSError: the file cannot be read.
    """
    damage_offset, damage = -1, ""
    with open(path, "rb", opener=open_regular) as file:
        builder = _IndexBuilder(file)
        begin = 0
        try:
            for number, member in enumerate(read_members(file)):
                builder.add(member)
                if number % _MEMBERS_PER_REPORT == 0:
                    on_read(member.start - begin)
                    begin = member.start
        except TarDamageError as error:
            damage_offset, damage = error.offset, error.problem
            builder.cut(damage_offset)
        return builder.finish() | {"damage_offset": np.array(damage_offset), "damage": np.array(damage)}


class _IndexBuilder:
    """Collects the members of a tar file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._samples: dict[str, dict[str, _Entry]] = {}
        """Images of each sample, by extension."""
        self._labels: dict[str, tuple[_Entry, str | None]] = {}
        """Label of each sample, or of an image by its whole name without the extension; None for a link."""
        self._extents: dict[str, tuple[int, int] | None] = {}
        """Offset and size of each file, by normalized name; None if it has holes."""
        self._links: dict[str, str] = {}
        """Target of each symbolic link, by normalized name."""
        self._unnamed: dict[int, _Entry] = {}
        """Members that are not used because of their names, and begin as images do, by offset of the content."""
        self._ignored: Counter[str] = Counter()
        self._notes: dict[str, tuple[int, str]] = {}
        """Count and example for each warning."""

    def add(self, member: TarMember) -> None:
        """Add the next member."""
        name = member.name.removeprefix("./").lstrip("/")
        path = posixpath.normpath(name) if _UNUSUAL_PATH.search(name) else name
        entry = _Entry(name, name if path == name else path, member.start)  # one copy of most names
        self._locate(member, entry.path)
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}/{stem}", extension.lower()
        lower = base.lower()
        label_ending = next((ending for ending in _LABEL_EXTENSIONS if lower.endswith(ending)), "")
        if is_hidden(base):  # such as .DS_Store and ._photo.jpg
            self._check_content(member, entry)
        elif lower.endswith(EXTENSIONS):
            sample = self._samples.setdefault(key, {})
            self._check_replaced(sample.get(extension), entry)
            sample[extension] = entry
        elif label_ending and member.size <= _MAX_LABEL_BYTES:
            key = f"{folder}/{base[: -len(label_ending)]}"
            self._check_replaced(self._labels[key][0] if key in self._labels else None, entry)
            self._labels[key] = entry, None if member.type in _LINKS else self._read_label(entry.path)
        else:
            self._check_content(member, entry)
            self._ignored[f".{extension}" if extension else "no extension"] += 1

    def cut(self, offset: int) -> None:
        """Remove the images from an offset on."""
        for key, sample in self._samples.items():
            self._samples[key] = {extension: entry for extension, entry in sample.items() if entry.start < offset}

    def finish(self) -> Index:
        """Arrays of the images of all members so far."""
        rows: list[tuple[_Entry, tuple[int, int], str]] = []
        used_labels: set[str] = set()
        for key, sample in self._samples.items():
            located = {extension: (entry, self._image_extent(entry)) for extension, entry in sample.items()}
            usable = {extension: (entry, extent) for extension, (entry, extent) in located.items() if extent}
            selected = _select_images(usable)
            for entry, extent in usable.values():
                if (entry, extent) not in selected:
                    self._note(FURTHER, entry)
            for entry, extent in selected:
                label_key = self._label_key(entry, key)
                used_labels.add(label_key)
                rows.append((entry, extent, self._label(label_key)))
        for key in self._labels:
            if key not in used_labels:
                self._note(UNUSED_LABELS, self._labels[key][0])
        linked = {offset for _, (offset, _), _ in rows}
        for offset in sorted(self._unnamed.keys() - linked):
            self._note(UNNAMED, self._unnamed[offset])
        return {
            "start": np.array([entry.start for entry, _, _ in rows], np.int64),
            "offset": np.array([offset for _, (offset, _), _ in rows], np.int64),
            "size": np.array([size for _, (_, size), _ in rows], np.int64),
            "names": pack_texts([entry.name for entry, _, _ in rows]),
            "labels": pack_texts([label for _, _, label in rows]),
            "left_out": np.array([f"{n} x {kind}" for kind, n in self._ignored.most_common(5)], np.str_),
            "notes": np.array([(note, str(n), example) for note, (n, example) in self._notes.items()], np.str_),
        }

    # ---- contents and links ----------------------------------------------------------------------------------------

    def _locate(self, member: TarMember, path: str) -> None:
        """Register where a member's content is; a later member of the same name replaces an earlier one."""
        link: str | None = None
        extent: tuple[int, int] | None = None
        is_file = False
        if member.type == tarfile.SYMTYPE:
            link = member.target
        elif member.type == tarfile.LNKTYPE:  # keeps the content that the earlier member has now
            target = posixpath.normpath(member.target).lstrip("/")
            link, extent, is_file = self._links.get(target), self._extents.get(target), target in self._extents
        else:
            extent = sparse_extent(self._file, member) if member.is_sparse else (member.offset, member.size)
            is_file = True
        self._links.pop(path, None)
        self._extents.pop(path, None)
        if link is not None:
            self._links[path] = link
        elif is_file:
            self._extents[path] = extent

    def _resolve(self, path: str) -> str:
        """Path of the file that a path leads to by symbolic links, also of folders; another one if there is none."""
        for _ in range(_MAX_LINKS):
            if path in self._extents:
                break
            parents = accumulate(path.split("/"), posixpath.join)
            link = next((parent for parent in parents if parent in self._links), None)
            if link is None:
                break
            target = posixpath.join(posixpath.dirname(link), self._links[link]) + path[len(link) :]
            path = posixpath.normpath(target)
        return path

    def _image_extent(self, entry: _Entry) -> tuple[int, int] | None:
        path = self._resolve(entry.path)
        extent = self._extents.get(path)
        if extent is None:
            self._note(HOLES if path in self._extents else NO_TARGET, entry)
        return extent

    def _label_key(self, entry: _Entry, sample: str) -> str:
        """Key of an image's label: its own name without the extension (`img_0.5`), or else its sample (`img_0`)."""
        folder, _, base = entry.name.rpartition("/")
        own = f"{folder}/{posixpath.splitext(base)[0]}"
        return own if own in self._labels else sample

    def _label(self, key: str) -> str:
        if key not in self._labels:
            return ""
        entry, text = self._labels[key]
        return self._read_label(self._resolve(entry.path)) if text is None else text

    def _read_label(self, path: str) -> str:
        offset, size = self._extents.get(path) or (0, 0)
        self._file.seek(offset)
        return self._file.read(min(size, _MAX_LABEL_BYTES)).decode(errors="surrogateescape").replace("\0", "").strip()

    # ---- warnings --------------------------------------------------------------------------------------------------

    def _note(self, note: str, entry: _Entry) -> None:
        count, example = self._notes.get(note, (0, f"{printable_name(entry.name)} (header at byte {entry.start})"))
        self._notes[note] = count + 1, example

    def _check_replaced(self, earlier: _Entry | None, entry: _Entry) -> None:
        if earlier is not None and earlier.path.lower() == entry.path.lower():
            self._note(REPLACED, entry)

    def _check_content(self, member: TarMember, entry: _Entry) -> None:
        """Register a member that is not used because of its name, but seems to be an image: the name may be damaged."""
        if member.type in _LINKS:
            if member.target.lower().endswith(EXTENSIONS):
                self._note(UNNAMED, entry)
            return
        self._file.seek(member.offset)
        if _MAGIC.match(self._file.read(min(member.size, 16))):
            self._unnamed[member.offset] = entry


def _select_images(sample: dict[str, tuple[_Entry, tuple[int, int]]]) -> list[tuple[_Entry, tuple[int, int]]]:
    """The image named `key.extension` (masks and thumbnails have longer names), or else all images of the sample."""
    for extension in EXTENSIONS:
        if extension[1:] in sample:
            return [sample[extension[1:]]]
    return list(sample.values())


def pack_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Texts without NUL as one array of bytes."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def unpack_texts(packed: NDArray[np.uint8], count: int) -> list[str]:
    """Inverse of `pack_texts`."""
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0") if count else []
