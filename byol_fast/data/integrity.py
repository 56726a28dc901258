"""Bad images: which one stopped a loader and why, and how a run goes on without it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from byol_fast.utils.files import atomic_write

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""What PIL may decode: the formats that DALI decodes too, so that both loaders take the same files."""

ALWAYS_ALLOWED = 100
"""So many bad images never stop a run that passes them over, unless they are half of all."""

SHOWN = 20
"""So many bad images are named in the log."""

_JPEG_HEAD, _JPEG_TAIL = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_HEAD, _PNG_TAIL = b"\x89PNG", b"IEND\xaeB`\x82"
_SNIFF = {
    b"<!": "HTML",
    b"<h": "HTML",
    b"<?xml": "XML",
    b"GIF8": "GIF",
    b"%PDF": "PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"8BPS": "Photoshop",
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not fetched",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


class CorruptImageError(ValueError):
    """An image cannot be read.

    Attributes:
        path: the file; in a shard `shard:member`.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(
            f"image: {path} {reason}; replace it (then resume), or let the run pass bad images over: "
            "--data.on-bad skip (also when resuming)"
        )

    def __reduce__(self) -> tuple[type[CorruptImageError], tuple[Path, str]]:
        return CorruptImageError, (self.path, self.reason)


class TooManyCorruptImagesError(CorruptImageError):
    """More images cannot be read than a run may pass over."""

    def __init__(self, last: CorruptImage, *, count: int, total: int, limit: int, report: Path | None) -> None:
        super().__init__(last.image, last.reason)
        listed = f" (listed in {report})" if report else ""
        message = (
            f"data: {count} of {total} images cannot be read{listed}, more than the {limit} that a run passes over; "
            f"the last one, {last.image}, {last.reason}; look at all with `byol-fast doctor --data.root ...`, or "
            "raise --data.max-bad"
        )
        self.args = (message,)


def check_file(path: Path) -> str | None:
    """Decode one image file.

    Returns:
        What is wrong with it, as the end of a sentence that begins with its name; None when it is fine.
    """
    try:
        data = read_file(path)
    except CorruptImageError as error:
        return error.reason
    return check_bytes(data)


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        CorruptImageError: there is no such file, or it may not be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptImageError(path, "is a broken link" if path.is_symlink() else "does not exist any more") from None
    except IsADirectoryError:
        raise CorruptImageError(path, "is a folder") from None
    except OSError as error:
        raise CorruptImageError(path, f"cannot be read ({error.strerror})") from None


def decode(data: bytes) -> Image.Image:
    """An encoded image in RGB, as stored: EXIF rotation is not applied, as in torchvision's ImageFolder.

    Raises:
        Exception: of any kind, as decoders do on damaged data; `check_bytes` says in words what is wrong.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB; 16 bits become 8 by their upper half, where PIL would clip them."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def check_bytes(data: bytes) -> str | None:
    """Decode one image; what is wrong with it, or None, as `check_file`."""
    if not data:
        return "is empty (0 bytes)"
    try:
        decode(data)
    except UnidentifiedImageError:
        return "is not an image" + (f" (it looks like {looks})" if (looks := _looks_like(data)) else "")
    except Image.DecompressionBombError:
        return f"is too large to decode safely (more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels)"
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        if data.startswith(_JPEG_HEAD) and not data.rstrip(b"\0").endswith(_JPEG_TAIL):
            return f"is a truncated JPEG ({len(data)} bytes)"
        if data.startswith(_PNG_HEAD) and not data.endswith(_PNG_TAIL):
            return f"is a truncated PNG ({len(data)} bytes)"
        return f"cannot be decoded ({error})"
    return None


def _looks_like(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video")
    return next((kind for head, kind in _SNIFF.items() if data.startswith(head)), None)


def file_needs_check(path: Path) -> bool:
    """Whether a file needs a closer look: not a JPEG, PNG or WebP from its first bytes to its last (16 us)."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
            size = file.seek(0, 2)
            file.seek(max(size - 8, 0))
            return _ends_need_check(head, file.read(8), size)
    except OSError:
        return True


def bytes_need_check(data: bytes) -> bool:
    """The same of an encoded image in memory."""
    return _ends_need_check(data[:12], data[-8:], len(data))


def _ends_need_check(head: bytes, tail: bytes, size: int) -> bool:
    """The same of the first 12 and the last 8 bytes of an image of so many bytes."""
    if head.startswith(_JPEG_HEAD):
        return not tail.endswith(_JPEG_TAIL)
    if head.startswith(_PNG_HEAD):
        return tail != _PNG_TAIL
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 > size
    return True


@dataclass(frozen=True, slots=True)
class CorruptImage:
    """An image that a run goes without."""

    image: str
    """Its name: of a file, or `shard:member`."""
    reason: str
    """What is wrong with it."""
    step: int
    """The batch in which it was first met."""


class CorruptImages:
    """The images that a run goes without, by their positions in the source.

    A batch is a function of its number and of which images can be read: whoever stands in for a bad image is drawn
    from the seed, the epoch and the place in the epoch, never from when the image was found to be bad. So neither
    prefetching nor a restart changes it.

    Args:
        sample_name: name of the image at a position.
        total: number of images.
        on_corrupt: what to do about one: `raise`, or `skip`.
        max_fraction: more than this share of all images, and more than 100 (but at most half), stop the run.
        report: file that lists them, a JSON object a line.
        action: goes on without them, for the log.
    """

    def __init__(
        self,
        sample_name: Callable[[int], str],
        total: int,
        *,
        on_corrupt: Literal["raise", "skip"] = "raise",
        max_fraction: float = 0.01,
        report: Path | None = None,
        action: str = "the run goes on",
    ) -> None:
        self._action = action
        self.by_index: dict[int, CorruptImage] = {}
        self._sample_name, self._total, self._on_corrupt, self._report = sample_name, total, on_corrupt, report
        self.limit = min(max(ALWAYS_ALLOWED, int(max_fraction * total)), total // 2)

    @property
    def skip(self) -> bool:
        """Whether bad images are passed over."""
        return self._on_corrupt == "skip"

    def add(self, found: Iterable[tuple[int, str]], step: int) -> None:
        """Note images that cannot be read, and why.

        Raises:
            CorruptImageError: bad images are to stop the run, or these are too many.
        """
        new = {i: CorruptImage(self._sample_name(i), reason, step) for i, reason in found if i not in self.by_index}
        if not new:
            return
        last = list(new.values())[-1]
        if not self.skip:
            raise CorruptImageError(last.image, last.reason)
        self.by_index.update(new)
        self._write()
        for number, bad in enumerate(new.values(), len(self.by_index) - len(new) + 1):
            if number <= SHOWN:
                log.warning("%s %s: %s without it", bad.image, bad.reason, self._action)
            if number == SHOWN:
                listed = f"listed in {self._report}" if self._report else "not named"
                log.warning("further images that cannot be read are %s", listed)
        if len(self.by_index) > self.limit:
            raise TooManyCorruptImagesError(
                last, count=len(self.by_index), total=self._total, limit=self.limit, report=self._report
            )

    def state_dict(self) -> list[list[Any]]:
        """Positions, reasons and steps, as plain values."""
        return [[i, bad.reason, bad.step] for i, bad in self.by_index.items()]

    def load_state_dict(self, state: Iterable[Iterable[Any]]) -> None:
        """Take over what `state_dict` of the same source returned."""
        self.by_index.clear()
        for i, reason, step in state:
            self.by_index[int(i)] = CorruptImage(self._sample_name(int(i)), str(reason), int(step))
        if self.by_index:
            self._write()

    def _write(self) -> None:
        if self._report is not None:
            lines = (
                json.dumps({"image": bad.image, "reason": bad.reason, "step": bad.step, "index": i})
                for i, bad in self.by_index.items()
            )
            self._report.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._report, "".join(f"{line}\n" for line in lines))
