"""Image sources: the interface, and the helpers that all kinds share."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from byol_fast.data.decode import decode, decode_jpeg
from byol_fast.data.integrity import CorruptImageError, bytes_need_check, check_bytes

log = logging.getLogger(__name__)

_Value = TypeVar("_Value", int, str)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""Extensions of image files, in any case; other files are ignored and listed in the log."""

NUM_SAMPLED_SIZES = 1000
"""Number of images whose sizes are compared on resuming, to detect that files were replaced under the same names."""


class SourceError(ValueError):
    """The data argument has no usable images."""


class ImageSource(ABC):
    """A map-style set of images. Implementations are frozen dataclasses with the fields `labels` and `classes`."""

    labels: NDArray[np.int64] | None
    """Class index of each image `[N]`, or None."""
    classes: tuple[str, ...]
    """Class names; empty without labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest that changes if images are added, removed, renamed or reordered; for arrays, if a value changes."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in bytes of up to 1,000 evenly spaced images; empty where the fingerprint covers the contents."""
        return ()

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image `i` in RGB, as stored: EXIF rotation is not applied, as in torchvision's ImageFolder.

        Raises:
            CorruptImageError: the image cannot be read or decoded.
        """

    def load_tensor(self, i: int) -> Tensor:
        """Pixels of `load` as a tensor, uint8 `[1, 3, H, W]`, channels_last; raises the same errors."""
        return _as_tensor(self.load(i))

    def check_thread_safety(self, num_threads: int) -> None:  # noqa: B027 (most kinds have nothing to compare)
        """Compare some images read by several threads at once with the same ones read alone, if they may differ.

        Args:
            num_threads: number of threads that will read images; nothing is compared for one.

        Raises:
            SourceError: the images are those of a dataset that only one thread at a time may read.
        """

    @abstractmethod
    def sample_name(self, i: int) -> str:
        """Name of image `i` for messages: its file, `shard:member`, or the source and the index."""

    @abstractmethod
    def subset(self, index: NDArray[np.int64]) -> ImageSource:
        """The images at these indices, in this order."""

    @abstractmethod
    def describe(self) -> str:
        """One-line summary for the log."""

    def with_labels(self, labels: NDArray[np.int64] | None, classes: tuple[str, ...]) -> ImageSource:
        """The same images with other labels."""
        changes: dict[str, Any] = {"labels": labels, "classes": classes}
        result: ImageSource = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        return result

    def with_classes(self, classes: tuple[str, ...]) -> ImageSource:
        """The same images, with labels that index into `classes` by class name; -1 for classes not among them."""
        assert self.labels is not None
        class_index = {name: i for i, name in enumerate(classes)}
        table = np.array([class_index.get(name, -1) for name in self.classes], np.int64)
        return self.with_labels(table[self.labels], classes)

    def _counts(self) -> str:
        return f"{len(self):,} images" + (f" of {len(self.classes):,} classes" if self.labels is not None else "")

    def _select_labels(self, index: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.labels is None else self.labels[index]


class EncodedSource(ImageSource):
    """Images stored as encoded bytes: whole files, or parts of larger files."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Encoded bytes of image `i` (JPEG, PNG, ...). Thread-safe.

        Raises:
            CorruptImageError: the image cannot be read.
        """

    def needs_check(self, i: int) -> bool:
        """Return True if the first and last bytes of image `i` do not prove it complete: decode it to know."""
        return bytes_need_check(self.read(i))

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        return self._decode(i, self.read(i))

    def load_tensor(self, i: int) -> Tensor:  # noqa: D102 (inherited)
        data = self.read(i)
        image = decode_jpeg(data)
        return _as_tensor(self._decode(i, data)) if image is None else image

    def _decode(self, i: int, data: bytes) -> Image.Image:
        try:
            return decode(data)
        except Exception as error:  # decoders raise many types of errors on damaged files
            raise CorruptImageError(self.sample_name(i), check_bytes(data) or f"cannot be decoded ({error})") from error


def _as_tensor(image: Image.Image) -> Tensor:
    """RGB pixels, uint8 `[1, 3, H, W]`, channels_last."""
    return torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)


def evenly_spaced(num_items: int, count: int, *, centered: bool = False) -> NDArray[np.int64]:
    """Indices of `count` of `num_items` items, evenly spaced; all indices if there are fewer items.

    Args:
        num_items: number of items.
        count: largest number of indices.
        centered: take the middle of each of `count` equal parts instead of its first item.
    """
    count = min(num_items, count)
    return (2 * np.arange(count, dtype=np.int64) + centered) * num_items // max(2 * count, 1)


def digest(parts: Iterable[bytes]) -> str:
    """Hex digest of a sequence of byte strings."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        result.update(len(part).to_bytes(8, "little") + part)
    return result.hexdigest()


def validate_labels(labels: Any, num_images: int, arg_name: str) -> NDArray[np.integer[Any]] | None:
    """Convert labels to an array of integers `[num_images]`; None if some are negative, which means unlabeled.

    Raises:
        SourceError: the labels are not `num_images` integers.
    """
    y = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if y.dtype == np.float64 and isinstance(labels, list) and all(isinstance(v, int) and v >= 0 for v in labels):
        y = np.array(labels, np.uint64)  # NumPy makes floats of integers on both sides of 2**63
    if y.shape != (num_images,) or not np.issubdtype(y.dtype, np.integer):
        raise SourceError(
            f"{arg_name}: labels must be {num_images} integers, one per image, got {y.dtype} of shape {list(y.shape)}"
        )
    num_negative = int((y < 0).sum())
    if 0 < num_negative < num_images:
        log.warning("%s: %d of %d labels are negative: treated as unlabeled", arg_name, num_negative, num_images)
    return None if num_negative else y


def with_class_names(
    labels: NDArray[np.integer[Any]] | None, classes: Sequence[object], arg_name: str
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels that index into class names; without names, the integers that occur are the classes, in ascending order.

    Raises:
        SourceError: there are fewer names than classes.
    """
    if labels is None:
        return None, ()
    names = tuple(str(c) for c in classes)
    if not names:
        numbers, index = np.unique(labels, return_inverse=True)
        return index.astype(np.int64), tuple(map(str, numbers.tolist()))
    if int(labels.max()) >= len(names):
        raise SourceError(
            f"{arg_name}: labels must be below the number of class names, {len(names)}, got {int(labels.max())}"
        )
    return labels.astype(np.int64), names


def labels_from_text(
    texts: Sequence[str], title: str, sample_name: Callable[[int], str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and class names from text: the integers, or else the texts, that occur are the classes, in order.

    Labels are None if a text is empty or an integer is negative, because then not all images are labeled.

    Args:
        texts: label of each image.
        title: name of the whole, for a warning if only some images have a label.
        sample_name: returns the name of the image at a position.
    """
    numbers = _integers(texts)
    if numbers is None:
        unlabeled = [i for i, text in enumerate(texts) if not text]
    else:
        unlabeled = [i for i, number in enumerate(numbers) if number < 0]
    if 0 < len(unlabeled) < len(texts):
        log.warning(
            "%s: %d of %d images have no label, or a negative one, such as %s: treated as unlabeled",
            title,
            len(unlabeled),
            len(texts),
            sample_name(unlabeled[0]),
        )
    if unlabeled or not texts:
        return None, ()
    return _encode_classes(texts) if numbers is None else _encode_classes(numbers)


def labels_from_folders(
    names: Sequence[str], title: str, sample_name: Callable[[int], str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and class names from `class/**/image` paths: the first folder is the class, classes sorted by name.

    Labels are None if an image is in no folder, or all are in the same one.

    Args:
        names: path of each image.
        title: name of the whole, for a warning if only some images are in folders.
        sample_name: returns the name of the image at a position.
    """
    folders = [folder for folder, slash, _ in (name.partition("/") for name in names) if slash]
    if 0 < len(folders) < len(names):
        log.warning(
            "%s: %d images, such as %s, lie beside %d subfolders, so the subfolders are not used as classes: no labels",
            title,
            len(names) - len(folders),
            sample_name(next(i for i, name in enumerate(names) if "/" not in name)),
            len(set(folders)),
        )
    if len(folders) < len(names) or len(set(folders)) < 2:
        return None, ()
    return _encode_classes(folders)


def _integers(texts: Sequence[str]) -> list[int] | None:
    """Integers of the texts, -1 for an empty one; None if one is something else."""
    try:
        return [int(text) if text else -1 for text in texts]
    except ValueError:
        return None


def _encode_classes(values: Sequence[_Value]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    classes = sorted(set(values))
    class_index = {value: i for i, value in enumerate(classes)}
    return np.array([class_index[value] for value in values], np.int64), tuple(map(str, classes))
