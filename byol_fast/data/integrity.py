"""Corrupt images: detecting and explaining them, and training without them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import UnidentifiedImageError

from byol_fast.data.decode import (
    JPEG_HEAD,
    JPEG_TAIL,
    PNG_HEAD,
    PNG_TAIL,
    ReadAt,
    UnusableImageError,
    decode,
    has_common_kind,
    header_size,
    reader_of,
    size_problem,
)
from byol_fast.data.errors import CorruptImageError
from byol_fast.utils.files import atomic_write, open_regular

log = logging.getLogger(__name__)

MIN_LIMIT = 100
"""Number of corrupt images that never stops a run that skips them, unless they are half of all images."""

MAX_BYTES = 2**31 - 2**12
"""Size of the largest file of an image in bytes, the most that Linux reads in one call."""

TOO_MANY_BYTES = f"must have at most {MAX_BYTES:,} bytes, got {{:,}}; save it as a single picture, compressed"
"""The defect of a larger file."""

MAX_LOGGED = 20
"""Number of corrupt images that are named in the log."""

_MAGIC_BYTES = {
    b"<!": "HTML",
    b"<h": "HTML",
    b"<?xml": "XML",
    b"GIF8": "GIF",
    b"%PDF": "PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"8BPS": "Photoshop",
    b"II*\0": "a TIFF whose pixel format is not supported: save it with 8 bits per channel",
    b"MM\0*": "a TIFF whose pixel format is not supported: save it with 8 bits per channel",
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not fetched",
}
_HEAD_BYTES = 26  # of a PNG up to its color type
_FTYP_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


class TooManyCorruptImagesError(CorruptImageError):
    """More images are corrupt than a run may skip."""

    def __init__(self, last: CorruptImage, *, count: int, total: int, limit: int, corrupt_list: Path | None) -> None:
        super().__init__(last.image, last.reason)
        listed = f" (listed in {corrupt_list})" if corrupt_list else ""
        message = (
            f"data: {count} of {total} images cannot be read{listed}, more than the {limit} that a run skips; "
            f"the last one, {last.image}, {last.reason}; check all with `byol-fast doctor --data.root ...`, or "
            "raise --data.max-corrupt-fraction"
        )
        self.args = (message,)


def check_file(path: Path) -> str | None:
    """Decode one image file.

    Returns:
        The defect, as the predicate of a sentence about the file; None if it is intact.
    """
    try:
        data = read_file(path)
    except CorruptImageError as error:
        return error.reason
    return check_bytes(data)


def read_file(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        CorruptImageError: the file does not exist or cannot be read.
    """
    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            if (num_bytes := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise CorruptImageError(path, TOO_MANY_BYTES.format(num_bytes))
            return file.readall()
    except FileNotFoundError:
        raise CorruptImageError(path, "is a broken link" if path.is_symlink() else "does not exist any more") from None
    except IsADirectoryError:
        raise CorruptImageError(path, "is a folder") from None
    except OSError as error:
        raise CorruptImageError(path, f"cannot be read ({error.strerror})") from None


def check_bytes(data: bytes) -> str | None:
    """Decode one encoded image; the same result as `check_file`."""
    if not data:
        return "is empty (0 bytes)"
    try:
        decode(data)
    except UnidentifiedImageError:
        return "is not an image" + (f" (it looks like {kind})" if (kind := _guess_format(data)) else "")
    except UnusableImageError as error:
        return str(error)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        if data.startswith(JPEG_HEAD) and not data.rstrip(b"\0").endswith(JPEG_TAIL):
            return f"is a truncated JPEG ({len(data)} bytes)"
        if data.startswith(PNG_HEAD) and not data.endswith(PNG_TAIL):
            return f"is a truncated PNG ({len(data)} bytes)"
        return f"cannot be decoded ({error})"
    return None


def _guess_format(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return _FTYP_BRANDS.get(data[8:12], "a video")
    return next((kind for head, kind in _MAGIC_BYTES.items() if data.startswith(head)), None)


def file_needs_check(path: Path) -> bool:
    """Return True unless header and end are those of a complete, supported file (16 us).

    That is a JPEG, 8-bit PNG or WebP of a common kind, within the limits of size.
    """
    try:
        descriptor = open_regular(path)
    except OSError:
        return True
    try:
        size = os.fstat(descriptor).st_size
        return _needs_check(lambda at, count: os.pread(descriptor, count, at), size)
    except OSError:
        return True
    finally:
        os.close(descriptor)


def bytes_need_check(data: bytes) -> bool:
    """`file_needs_check` for an encoded image in memory."""
    return _needs_check(reader_of(data), len(data))


def _needs_check(read: ReadAt, num_bytes: int) -> bool:
    size = header_size(read)
    if num_bytes > MAX_BYTES or size is None or size_problem(*size) is not None or not has_common_kind(read):
        return True
    head, tail = read(0, _HEAD_BYTES), read(num_bytes - 8, 8)
    if head.startswith(JPEG_HEAD):
        return not tail.endswith(JPEG_TAIL)
    if head.startswith(PNG_HEAD):
        bits = head[24:25]
        return tail != PNG_TAIL or bits == b"\x10"  # 16 bits may hold values of fewer
    return int.from_bytes(head[4:8], "little") + 8 > num_bytes


@dataclass(frozen=True, slots=True)
class CorruptImage:
    """An image that a run skips."""

    image: str
    """Name: a file, or `shard:member`."""
    reason: str
    """The defect."""
    batch_number: int
    """Number of the batch in which it was found, from 0."""


class CorruptImages:
    """Registry of the corrupt images of a source.

    A batch is a function of its number and of which images are corrupt: the replacement of a corrupt image depends on
    the seed, the epoch and the position in the epoch, not on when the image was found. Prefetching and restarts
    therefore do not change it.

    Args:
        sample_name: returns the name of the image at an index.
        total: number of images.
        on_corrupt: `raise`, or `skip`.
        max_fraction: largest fraction of corrupt images that a run skips; 100 are always skipped, at most half.
        corrupt_list: JSON Lines file that lists the corrupt images.
        action: verb phrase for the log: "training continues" (without the image).
    """

    def __init__(
        self,
        sample_name: Callable[[int], str],
        total: int,
        *,
        on_corrupt: Literal["raise", "skip"] = "raise",
        max_fraction: float = 0.01,
        corrupt_list: Path | None = None,
        action: str = "training continues",
    ) -> None:
        self.by_index: dict[int, CorruptImage] = {}
        """Corrupt images found so far, by index in the source."""
        self._sample_name, self._total, self._on_corrupt = sample_name, total, on_corrupt
        self._corrupt_list, self._action = corrupt_list, action
        self.limit = min(max(MIN_LIMIT, int(max_fraction * total)), total // 2)

    @property
    def skip(self) -> bool:
        """True if corrupt images are skipped."""
        return self._on_corrupt == "skip"

    def add(self, defects: Iterable[tuple[int, str]], batch_number: int) -> None:
        """Register corrupt images.

        Args:
            defects: index and defect of each image.
            batch_number: of the batch in which they were found, from 0.

        Raises:
            CorruptImageError: corrupt images stop the run, or there are too many of them.
        """
        new = {
            i: CorruptImage(self._sample_name(i), reason, batch_number)
            for i, reason in defects
            if i not in self.by_index
        }
        if not new:
            return
        last = list(new.values())[-1]
        if not self.skip:
            raise CorruptImageError(last.image, last.reason)
        self.by_index.update(new)
        self._write()
        for number, bad in enumerate(new.values(), len(self.by_index) - len(new) + 1):
            if number <= MAX_LOGGED:
                log.warning("%s %s: %s without it", bad.image, bad.reason, self._action)
            if number == MAX_LOGGED:
                listed = f"listed in {self._corrupt_list}" if self._corrupt_list else "not named"
                log.warning("further images that cannot be read are %s", listed)
        if len(self.by_index) > self.limit:
            raise TooManyCorruptImagesError(
                last, count=len(self.by_index), total=self._total, limit=self.limit, corrupt_list=self._corrupt_list
            )

    def state_dict(self) -> list[list[Any]]:
        """Index, reason and batch number of each corrupt image."""
        return [[i, bad.reason, bad.batch_number] for i, bad in self.by_index.items()]

    def load_state_dict(self, state: Iterable[Iterable[Any]]) -> None:
        """Restore the state of a registry of the same source."""
        self.by_index.clear()
        for i, reason, batch_number in state:
            self.by_index[int(i)] = CorruptImage(self._sample_name(int(i)), str(reason), int(batch_number))
        if self.by_index:
            self._write()

    def _write(self) -> None:
        if self._corrupt_list is not None:
            lines = (
                json.dumps({"image": bad.image, "reason": bad.reason, "batch_number": bad.batch_number, "index": i})
                for i, bad in self.by_index.items()
            )
            try:
                self._corrupt_list.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._corrupt_list, "".join(f"{line}\n" for line in lines))
            except OSError as error:  # the checkpoints hold them, too
                log.warning("the list of corrupt images, %s, could not be written (%s)", self._corrupt_list, error)
