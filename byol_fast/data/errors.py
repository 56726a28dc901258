"""Errors about images and where they are."""

from __future__ import annotations

from pathlib import Path

from byol_fast.utils.files import original_name, printable_name


class SourceError(ValueError):
    """The data argument has no usable images."""


class CorruptImageError(ValueError):
    """An image cannot be read or decoded.

    Attributes:
        path: the file, or `shard:member`.
        name: the same as text, as of `ImageSource.sample_name`.
        reason: the defect, as the predicate of a sentence about the file.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.name = path if isinstance(path, str) else printable_name(path)
        self.path = Path(original_name(self.name))
        self.reason = reason
        super().__init__(
            f"image: {self.name} {reason}; replace it and resume, or skip corrupt images with "
            "--data.on-corrupt skip (also when resuming)"
        )

    def __reduce__(self) -> tuple[type[CorruptImageError], tuple[str, str]]:
        return CorruptImageError, (self.name, self.reason)
