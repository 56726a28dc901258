"""Data sets of other libraries: torchvision, any indexable one of PIL images or arrays, and Hugging Face's."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byol_fast.data.integrity import CorruptImageError, read_file, to_rgb
from byol_fast.data.sources.base import (
    EncodedSource,
    ImageSource,
    SourceError,
    checked_labels,
    digest,
    evenly_spaced,
    labels_from_text,
    named_labels,
)
from byol_fast.data.sources.files import FileSource

log = logging.getLogger(__name__)

_IMAGE_KEYS = ("image", "img", "jpg", "png", "pixel_values")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
_FINGERPRINTED = 16


@dataclass(frozen=True, eq=False)
class DatasetSource(ImageSource):
    """Images that an object with `__len__` and `__getitem__` decodes itself, in several threads at a time."""

    dataset: Any
    """The object."""
    index: NDArray[np.int64]
    """Which of its items are the images `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        name = f"{type(self.dataset).__name__} {len(self)}"
        some = evenly_spaced(len(self), _FINGERPRINTED).tolist()
        return digest([name.encode(), self.index.tobytes(), *(self.load(i).tobytes() for i in some)])

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        try:
            item = self.dataset[int(self.index[i])]
            image = as_image(item)  # PIL decodes only now
        except Exception as error:  # whatever its author's code raises
            raise CorruptImageError(self.sample_name(i), f"cannot be read ({type(error).__name__}: {error})") from error
        if image is None:
            raise CorruptImageError(self.sample_name(i), f"is not an image ({_kind(item)})")
        return image

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{type(self.dataset).__name__}[{self.index[i]}]"

    def subset(self, index: NDArray[np.int64]) -> DatasetSource:  # noqa: D102 (inherited)
        return replace(self, index=self.index[index], labels=self._labels_of(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._contents()} in {type(self.dataset).__name__}"


@dataclass(frozen=True, eq=False)
class HuggingFaceSource(EncodedSource):
    """Encoded images of a `datasets.Dataset`."""

    dataset: Any
    """It, with its image column left encoded."""
    column: str
    """The image column."""
    index: NDArray[np.int64]
    """Its rows `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        some = evenly_spaced(len(self), _FINGERPRINTED).tolist()
        return digest([str(self.dataset.features).encode(), self.index.tobytes(), *(self.read(i) for i in some)])

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        value = self.dataset[int(self.index[i])][self.column]
        data = value if isinstance(value, bytes) else (value or {}).get("bytes")
        if data is None and isinstance(value, Mapping) and value.get("path"):
            return read_file(Path(value["path"]))
        return data or b""

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"Dataset[{self.index[i]}]"

    def subset(self, index: NDArray[np.int64]) -> HuggingFaceSource:  # noqa: D102 (inherited)
        return replace(self, index=self.index[index], labels=self._labels_of(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._contents()} in a Hugging Face data set"


def open_samples(dataset: object, samples: Sequence[Any], where: str) -> FileSource:
    """The files of a torchvision data set: `.samples` is a list of (path, label).

    Raises:
        SourceError: it is not.
    """
    root = Path(getattr(dataset, "root", None) or ".")
    try:
        files = [os.fspath(sample[0]) for sample in samples]
        labels = checked_labels([sample[1] for sample in samples], len(files), where)
    except (TypeError, IndexError):
        raise SourceError(f"{where}: .samples of {type(dataset).__name__} must be a list of (path, label)") from None
    prefix = f"{root}{os.sep}"
    y, names = named_labels(labels, getattr(dataset, "classes", ()), where)
    return FileSource(root=root, paths=tuple(file.removeprefix(prefix) for file in files), labels=y, classes=names)


def open_dataset(dataset: Any, where: str) -> DatasetSource:
    """A data set that hands out images by number.

    An item is an image, or begins with one (`(image, label)`), or has one under the key `image`; the image is a PIL
    image, or a uint8 array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`.

    Raises:
        SourceError: it is empty, has a transform, or hands out something else.
    """
    name = type(dataset).__name__
    for attribute in ("transform", "transforms"):
        if getattr(dataset, attribute, None) is not None:
            raise SourceError(
                f"{where}: {name} must have no {attribute}, got {type(getattr(dataset, attribute)).__name__}; make it "
                "without: the two views are drawn here, from the whole image"
            )
    if not len(dataset):
        raise SourceError(f"{where}: {name} is empty")
    try:
        first = dataset[0]
    except Exception as error:
        raise SourceError(f"{where}: {name}[0] raises {type(error).__name__}: {error}") from error
    if as_image(first) is None:
        raise SourceError(
            f"{where}: {name}[0] must be a PIL image or a uint8 array [H, W, C] or [C, H, W], alone, first of a tuple "
            f"or under the key `image`, got {_kind(first)}; leave out what turns images into tensors"
        )
    labels = getattr(dataset, "targets", None)
    labels = getattr(dataset, "labels", None) if labels is None else labels
    y: NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    try:
        checked = None if labels is None else checked_labels(labels, len(dataset), where)
        y, names = named_labels(checked, getattr(dataset, "classes", None) or (), where)
    except (SourceError, TypeError) as error:
        log.warning("%s: the labels of %s are not used (%s)", where, name, error)
    return DatasetSource(dataset, np.arange(len(dataset)), y, names)


def is_hugging_face(root: object) -> bool:
    """Whether this is an object of the library `datasets`; does not import it."""
    kind = type(root)
    return kind.__module__.partition(".")[0] == "datasets" and "Dataset" in kind.__name__


def open_hugging_face(dataset: Any, where: str, *, image_column: str = "", label_column: str = "") -> HuggingFaceSource:
    """A `datasets.Dataset`; its images are read encoded, and decoded like files.

    Args:
        dataset: the data set of one split.
        where: name of the argument, for error messages.
        image_column: encoded images: a column of images, binary, or `{bytes, path}`. Empty: found by type and name.
        label_column: class numbers or names. Empty: found by type and name; without one there are no labels.

    Raises:
        SourceError: it is a stream, is empty, or has no such column.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise SourceError(
            f"{where}: must be a datasets.Dataset, got {type(dataset).__name__}; pick a split, and do not stream: "
            "load_dataset(name, split='train')"
        )
    if not len(dataset):
        raise SourceError(f"{where}: the data set is empty")
    image, label = find_columns(dataset.features, "the data set", where, image_column, label_column)
    plain = dataset.with_format(None)
    labels = _labels(plain, label, where) if label else (None, ())
    encoded = plain.select_columns([image])
    if isinstance(dataset.features[image], datasets.Image):
        encoded = encoded.cast_column(image, datasets.Image(decode=False))
    return HuggingFaceSource(encoded, image, np.arange(len(dataset)), *labels)


def find_columns(features: Any, title: str, where: str, image_column: str, label_column: str) -> tuple[str, str]:
    """Names of the columns of images and of labels, the latter empty where there is none.

    Raises:
        SourceError: the columns that were asked for are of another type; or no image column was, and none stands out.
    """
    import datasets

    def kind(feature: Any) -> str:
        if isinstance(feature, Mapping):
            return f"{{{', '.join(feature)}}}"
        return str(getattr(feature, "dtype", None) or type(feature).__name__)

    def holds_images(feature: Any) -> bool:
        if isinstance(feature, Mapping):
            return holds_images(feature.get("bytes"))
        return isinstance(feature, datasets.Image) or kind(feature) in {"binary", "large_binary"}

    listed = ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items())
    fitting = [name for name, feature in features.items() if holds_images(feature)]
    if image_column and image_column not in fitting:
        raise SourceError(
            f"{where}: data.image_column must be a column of encoded images (binary, or {{bytes, path}}) of {title}, "
            f"got {image_column!r}; its columns are {listed}"
        )
    images = [name for name in fitting if isinstance(features[name], datasets.Image)]
    images += [name for name in _IMAGE_COLUMNS if name in fitting] or (fitting if len(fitting) == 1 else [])
    if not image_column and not images:
        problem = "several columns of binary data" if fitting else "no column of encoded images (binary, {bytes, path})"
        raise SourceError(
            f"{where}: {title} has {problem}; name one with --data.image-column; its columns are {listed}"
        )

    numbers_or_texts = re.compile(r"u?int\d+|(large_)?string")
    fitting = [name for name, feature in features.items() if numbers_or_texts.fullmatch(kind(feature))]
    if label_column and label_column not in fitting:
        raise SourceError(
            f"{where}: data.label_column must be a column of whole numbers or texts of {title}, got {label_column!r}; "
            f"its columns are {', '.join(features)}"
        )
    classes = [name for name in fitting if isinstance(features[name], datasets.ClassLabel)]
    known = [name for name in _LABEL_COLUMNS if name in fitting]
    labels = [*(name for name in known if name in classes), *classes, *known]
    return image_column or images[0], label_column or next(iter(labels), "")


def _labels(dataset: Any, column: str, where: str) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and class names of a column; None where rows have no label."""
    values = dataset[column][:]
    if all(isinstance(value, int) for value in values):
        names = getattr(dataset.features[column], "names", ())
        return named_labels(checked_labels(values, len(values), where), names, where)
    texts = ["" if value is None else str(value).strip() for value in values]
    labels, classes = labels_from_text(texts)
    if labels is None and any(texts):
        log.warning("%s: %d of %d rows have no label: taken as unlabelled", where, texts.count(""), len(texts))
    return labels, classes


def open_cifar10(cache: Path) -> tuple[Any, Any]:
    """Torchvision's CIFAR-10, training and test images; fetched into the cache where it is not there.

    Raises:
        SourceError: it is not there and cannot be fetched.
    """
    from torchvision.datasets import CIFAR10

    cache = cache.expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        train, test = (CIFAR10(cache, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"data.builtin: CIFAR-10 is not in {cache} and could not be fetched ({error}); "
            f"give --data.root FOLDER, or put cifar-10-python.tar.gz into {cache}"
        ) from error
    return train, test


def as_image(item: Any) -> Image.Image | None:
    """The image of a data set's item in RGB; None where it has none."""
    if isinstance(item, Mapping):
        item = next((item[key] for key in _IMAGE_KEYS if key in item), None)
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, Image.Image):
        return to_rgb(item)
    if isinstance(item, torch.Tensor):
        item = item.numpy(force=True)
    if not isinstance(item, np.ndarray) or item.dtype != np.uint8:
        return None
    if item.ndim == 3 and item.shape[2] not in {1, 3, 4} and item.shape[0] in {1, 3, 4}:
        item = item.transpose(1, 2, 0)
    if item.ndim == 3 and item.shape[2] == 1:
        item = item[..., 0]
    if item.ndim not in {2, 3} or (item.ndim == 3 and item.shape[2] not in {3, 4}) or 0 in item.shape:
        return None
    return Image.fromarray(np.ascontiguousarray(item)).convert("RGB")


def _kind(item: Any) -> str:
    if isinstance(item, tuple | list) and item:
        return f"({', '.join(_kind(part) for part in item)})"
    if isinstance(item, torch.Tensor | np.ndarray):
        return f"{type(item).__name__} {item.dtype} {list(item.shape)}"
    if isinstance(item, Mapping):
        return f"a mapping with {', '.join(map(str, item))}"
    return type(item).__name__
