"""Bad image files: which one stopped a loader, and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_JPEG_HEAD, _JPEG_TAIL = b"\xff\xd8\xff", b"\xff\xd9"
_SNIFF = {b"<!": "HTML", b"<h": "HTML", b"GIF8": "GIF", b"%PDF": "PDF", b"PK\x03\x04": "zip archive"}


class BadImageError(ValueError):
    """An image file cannot be read.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"image file: {path} {reason}; replace it or remove it from the folder")

    def __reduce__(self) -> tuple[type[BadImageError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


def check(path: Path) -> str | None:
    """Decode one image file.

    Returns:
        What is wrong with it, as the end of a sentence that begins with its name; None when it is fine.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "is a broken link" if path.is_symlink() else "does not exist any more"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not data:
        return "is empty (0 bytes)"
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except UnidentifiedImageError:
        looks = next((kind for head, kind in _SNIFF.items() if data.startswith(head)), None)
        return "is not an image" + (f" (it looks like {looks})" if looks else "")
    except Image.DecompressionBombError:
        return "is too large to decode safely"
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        if data.startswith(_JPEG_HEAD) and not data.rstrip(b"\0").endswith(_JPEG_TAIL):
            return f"is a truncated JPEG ({len(data)} bytes)"
        return f"cannot be decoded ({error})"
    return None


def suspicious(path: Path) -> bool:
    """Whether a file needs a closer look: not a JPEG from its first bytes to its last (16 us)."""
    try:
        with path.open("rb") as file:
            head = file.read(3)
            file.seek(-2, 2)
            return head != _JPEG_HEAD or file.read(2) != _JPEG_TAIL
    except OSError:
        return True


def find_bad(paths: Iterable[Path], *, message: str = "") -> BadImageError | None:
    """Name the file that stopped a decoder.

    Looks at the files that do not begin and end as a JPEG does first, then decodes the others too.

    Args:
        paths: the files that were being decoded.
        message: what the decoder said; a path that it names is looked at first.
    """
    candidates = sorted(set(paths), key=lambda path: (str(path) not in message, not suspicious(path), path))
    for path in candidates:
        reason = check(path)
        if reason is not None:
            return BadImageError(path, reason)
    return None
