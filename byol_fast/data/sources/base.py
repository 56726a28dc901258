"""Image sources: the interface, and the helpers that all kinds share."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from byol_fast.data.decode import decode, decode_jpeg
from byol_fast.data.errors import CorruptImageError, SourceError
from byol_fast.data.integrity import bytes_need_check, check_bytes
from byol_fast.utils.files import printable_name

log = logging.getLogger(__name__)

_INTEGER = re.compile(r"0|[1-9][0-9]*")
_NEGATIVE = re.compile(r"-0*[1-9][0-9]*(\.0*)?")

MAX_STRAY_IMAGES = 10
"""Number of images beside class folders up to which they are left out, if they are one, or fewer than 1 in 20."""

NUM_SAMPLED_SIZES = 1000
"""Number of images whose sizes are compared on resuming, to detect that files were replaced under the same names."""


class ImageSource(ABC):
    """A map-style set of images. Implementations are frozen dataclasses with the fields of `ClassLabels`."""

    labels: NDArray[np.int64] | None
    """Class index of each image `[N]`, or None."""
    classes: tuple[str, ...]
    """Class names; empty without labels."""
    label_problem: str = ""
    """Reason why there are no labels, as a clause; empty if there are labels, or nothing to say."""

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
        """Name of image `i`: its file, `shard:member`, or the source and the index; see `printable_name`."""

    @abstractmethod
    def subset(self, index: NDArray[np.int64]) -> ImageSource:
        """The images at these indices, in this order."""

    @abstractmethod
    def describe(self) -> str:
        """One-line summary for the log."""

    def with_labels(
        self, labels: NDArray[np.int64] | None, classes: tuple[str, ...], label_problem: str = ""
    ) -> ImageSource:
        """The same images with other labels."""
        changes: dict[str, Any] = {"labels": labels, "classes": classes, "label_problem": label_problem}
        result: ImageSource = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        return result

    def with_classes(self, classes: tuple[str, ...]) -> ImageSource:
        """The same images, with labels that index into `classes` by class name; -1 for classes not among them.

        Raises:
            SourceError: two classes have the same name.
        """
        assert self.labels is not None
        for names in (self.classes, classes):
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise SourceError(
                    f"labels: class names must differ to find the classes of one set of images in another, got "
                    f"{repeated[0]!r} twice; rename one, or give both sets the same list of names"
                )
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

    def num_bytes(self, i: int) -> int:
        """Size of image `i` in bytes; raises the errors of `read`, or OSError."""
        return len(self.read(i))

    def needs_check(self, i: int) -> bool:
        """Return True if header and end of image `i` do not prove it complete: decode it to know."""
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


def log_hidden(names: Sequence[str], title: str) -> None:
    """Log the number of hidden and system folders and files that are left out, and some of their names."""
    if names:
        shown = ", ".join(map(printable_name, names[:5]))
        log.info("%s: %d hidden or system folders and files are left out, such as %s", title, len(names), shown)


class ClassLabels(NamedTuple):
    """Labels of a source, or the reason why there are none."""

    labels: NDArray[np.int64] | None
    """Class index of each image `[N]`, or None."""
    classes: tuple[str, ...] = ()
    """Class names; empty without labels."""
    label_problem: str = ""
    """Reason why there are no labels, as a clause."""


def labels_from_integers(
    labels: Any,
    num_images: int,
    arg_name: str,
    sample_name: Callable[[int], str],
    classes: Sequence[object] = (),
) -> ClassLabels:
    """Labels that index into class names; without names, the integers that occur are the classes, in ascending order.

    Args:
        labels: integers `[num_images]`: an array, a tensor or a list. A negative one means unlabeled.
        num_images: number of images.
        arg_name: name of the argument, for messages.
        sample_name: returns the printable name of the image at a position.
        classes: class names.

    Raises:
        SourceError: the labels are not `num_images` integers, or there are fewer names than classes.
    """
    y = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if y.dtype == np.float64 and isinstance(labels, list) and all(isinstance(v, int) and v >= 0 for v in labels):
        y = np.array(labels, np.uint64)  # NumPy makes floats of integers on both sides of 2**63
    if y.shape != (num_images,) or not np.issubdtype(y.dtype, np.integer):
        raise SourceError(
            f"{arg_name}: labels must be {num_images} integers, one per image, got {y.dtype} of shape {list(y.shape)}"
        )
    if (problem := _find_unlabeled(np.flatnonzero(y < 0), num_images, arg_name, sample_name)) is not None:
        return ClassLabels(None, (), problem)
    names = tuple(map(str, classes))
    if not names:
        numbers, index = np.unique(y, return_inverse=True)
        return ClassLabels(index.astype(np.int64), tuple(map(str, numbers.tolist())))
    if int(y.max(initial=0)) >= len(names):
        raise SourceError(
            f"{arg_name}: labels must be below the number of class names, {len(names)}, got {int(y.max())}"
        )
    return ClassLabels(y.astype(np.int64), names)


def labels_from_text(texts: Sequence[str], title: str, sample_name: Callable[[int], str]) -> ClassLabels:
    """Labels and class names from texts: those that occur are the classes; `1`, `01` and `1.0` are three of them.

    Classes are sorted like names of folders, or by value if all are integers without leading zeros. A text of nothing
    but spaces, or a negative number, means unlabeled.

    Args:
        texts: label of each image.
        title: name of the whole, for messages.
        sample_name: returns the printable name of the image at a position.
    """
    distinct = set(texts)
    missing = {text for text in distinct if not text.strip() or _NEGATIVE.fullmatch(text)}
    unlabeled = np.array([i for i, text in enumerate(texts) if text in missing] if missing else [], np.int64)
    if (problem := _find_unlabeled(unlabeled, len(texts), title, sample_name)) is not None:
        return ClassLabels(None, (), problem)
    is_numeric = all(_INTEGER.fullmatch(text) for text in distinct)
    # Of two integers written without leading zeros, the longer one is the larger one.
    return ClassLabels(*_encode_classes(texts, key=(lambda text: (len(text), text)) if is_numeric else None))


def _find_unlabeled(
    unlabeled: NDArray[np.int64], num_images: int, title: str, sample_name: Callable[[int], str]
) -> str | None:
    """Reason why no labels are used, because these images have none; None if all have one. Logged if some have one."""
    if num_images == 0 or len(unlabeled) == num_images:
        return "no image has a label (empty and negative ones do not count)"
    if not len(unlabeled):
        return None
    problem = (
        f"{len(unlabeled):,} of {num_images:,} images have no label, or a negative one, such as "
        f"{sample_name(int(unlabeled[0]))}"
    )
    log.warning("%s: %s: no labels are used; label all images, or leave those out", title, problem)
    return problem


def labels_from_folders(
    names: Sequence[str], title: str, sample_name: Callable[[int], str]
) -> tuple[Sequence[int], ClassLabels]:
    """Labels and class names from `class/**/image` paths: the first folder is the class, classes sorted by name.

    A folder that holds all images is not a class, but the folders in it are. A few images beside class folders are left
    out, with a warning. Labels are None if there is no folder, or only one, or more images than that beside them.

    Args:
        names: path of each image.
        title: name of the whole, for warnings.
        sample_name: returns the name of the image at a position.

    Returns:
        Positions of the images that are used, and their labels.
    """
    used: Sequence[int] = range(len(names))
    stray: list[int] = []
    start = 0  # behind the folders that hold all images
    while True:
        ends = [names[i].find("/", start) for i in used]
        folders = [names[i][start:end] for i, end in zip(used, ends, strict=True) if end >= 0]
        num_folders = len(set(folders))
        stray += [i for i, end in zip(used, ends, strict=True) if end < 0]
        few = len(stray) <= MAX_STRAY_IMAGES and 20 * len(stray) < len(names)
        if not folders or (len(stray) > 1 and not few):
            break
        used = [i for i, end in zip(used, ends, strict=True) if end >= 0]
        if num_folders > 1:
            if stray:
                log.warning(
                    "%s: %d of %d images lie beside the class folders and are left out (%s); to use them, move them "
                    "into a class folder, or list all images in a file (.txt)",
                    title,
                    len(stray),
                    len(names),
                    ", ".join(map(sample_name, stray)),
                )
            return used, ClassLabels(*_encode_classes(folders))
        start += len(folders[0]) + 1
    problem = ""
    if num_folders > 1:
        problem = (
            f"{len(stray):,} of {len(names):,} images have no label, such as {sample_name(stray[0])}: they lie beside "
            f"{num_folders} subfolders, which therefore are not used as classes"
        )
        log.warning("%s: %s: no labels are used", title, problem)
    return range(len(names)), ClassLabels(None, (), problem)


def _encode_classes(
    values: Sequence[str], key: Callable[[str], Any] | None = None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    classes = sorted(set(values), key=key)
    class_index = {value: i for i, value in enumerate(classes)}
    return np.array([class_index[value] for value in values], np.int64), tuple(classes)
