"""What a source of images is, and what all kinds of sources share."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byol_fast.data.integrity import CorruptImageError, bytes_need_check, check_bytes, decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""Names of image files, in lower or upper case; other files are left out and named in the log."""

NUM_SAMPLED_SIZES = 1000
"""Images whose sizes tell whether a data set was replaced under its old names."""


class SourceError(ValueError):
    """There are no usable images where the argument says."""


class ImageSource(ABC):
    """A numbered set of images. The kinds of it are frozen dataclasses with the fields `labels` and `classes`."""

    labels: NDArray[np.int64] | None
    """Class number of each image `[N]`, or None."""
    classes: tuple[str, ...]
    """Name of each class; empty where there are no labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when images are added, removed, renamed or reordered; for arrays, when a value changes."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in bytes of up to 1,000 images, evenly spaced; none where the fingerprint covers the contents."""
        return ()

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image `i` in RGB, as stored: EXIF rotation is not applied, as in torchvision's ImageFolder.

        Raises:
            CorruptImageError: it cannot be read or decoded.
        """

    @abstractmethod
    def sample_name(self, i: int) -> str:
        """Name of image `i` for people: its file, `shard:member`, or the source and the number."""

    @abstractmethod
    def subset(self, index: NDArray[np.int64]) -> ImageSource:
        """The images at these positions, in this order."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    def with_labels(self, labels: NDArray[np.int64] | None, classes: tuple[str, ...]) -> ImageSource:
        """The same images with other labels."""
        changes: dict[str, Any] = {"labels": labels, "classes": classes}
        result: ImageSource = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        return result

    def _contents(self) -> str:
        return f"{len(self):,} images" + (f" of {len(self.classes):,} classes" if self.labels is not None else "")

    def _labels_of(self, index: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.labels is None else self.labels[index]


class EncodedSource(ImageSource):
    """Images as encoded bytes: whole files, or pieces of larger ones."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Image `i` as stored: JPEG, PNG, ... Called by several threads at a time.

        Raises:
            CorruptImageError: it cannot be read.
        """

    def needs_check(self, i: int) -> bool:
        """Whether image `i` does not begin and end as it should, and needs a closer look."""
        return bytes_need_check(self.read(i))

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        data = self.read(i)
        try:
            return decode(data)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            raise CorruptImageError(self.sample_name(i), check_bytes(data) or f"cannot be decoded ({error})") from error


def evenly_spaced(num_items: int, count: int, *, centered: bool = False) -> NDArray[np.int64]:
    """Positions of `count` of `num_items` items, evenly spaced; all where there are fewer.

    Args:
        num_items: number of items.
        count: largest number of positions.
        centered: take the middle of each of `count` equal parts, not its first item.
    """
    count = min(num_items, count)
    return (2 * np.arange(count, dtype=np.int64) + centered) * num_items // max(2 * count, 1)


def digest(parts: Iterable[bytes]) -> str:
    """A fingerprint of some byte strings in order."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        result.update(len(part).to_bytes(8, "little") + part)
    return result.hexdigest()


def checked_labels(labels: Any, n: int, where: str) -> NDArray[np.int64] | None:
    """Labels of n images as an array; None when some are negative, which means unlabelled.

    Raises:
        SourceError: these are not n integers.
    """
    y = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if y.shape != (n,) or not np.issubdtype(y.dtype, np.integer):
        raise SourceError(
            f"{where}: labels must be {n} integers, one for each image, got {y.dtype} of shape {list(y.shape)}"
        )
    return None if y.min() < 0 else y.astype(np.int64)


def named_labels(
    labels: NDArray[np.int64] | None, classes: Sequence[object], where: str
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels, and a name for each class: its number where there are no names.

    Raises:
        SourceError: there are fewer names than classes.
    """
    if labels is None:
        return None, ()
    names = tuple(str(c) for c in classes) or tuple(str(i) for i in range(int(labels.max()) + 1))
    if int(labels.max()) >= len(names):
        raise SourceError(f"{where}: labels go up to {int(labels.max())}, but there are only {len(names)} class names")
    return labels, names


def labels_from_text(texts: Sequence[str]) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels written as text: numbers count as they are, otherwise each text is a class, sorted by name.

    None when a text is empty or a number negative: then not all images are labelled.
    """
    if not texts or not all(texts):
        return None, ()
    try:
        numbers = np.array([int(text) for text in texts], np.int64)
    except ValueError:
        classes = sorted(set(texts))
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[text] for text in texts], np.int64), tuple(classes)
    if numbers.min() < 0:
        return None, ()
    return numbers, tuple(str(i) for i in range(int(numbers.max()) + 1))


def labels_from_folders(names: Sequence[str]) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels of `class/**/image` names: the first folder is the class, classes are sorted by name.

    None when an image is in no folder, or all are in one.
    """
    tops = [name.partition("/") for name in names]
    classes = sorted({top for top, nested, _ in tops if nested})
    if len(classes) < 2 or not all(nested for _, nested, _ in tops):
        return None, ()
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[top] for top, _, _ in tops], np.int64), tuple(classes)
