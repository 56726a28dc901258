"""Datasets of other libraries: torchvision, any map-style dataset of PIL images or arrays, Hugging Face."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from byol_fast.config.fields import expand_home
from byol_fast.data.decode import UnusableImageError, check_size, to_rgb
from byol_fast.data.errors import CorruptImageError, SourceError
from byol_fast.data.integrity import read_file
from byol_fast.data.sources.base import (
    ClassLabels,
    EncodedSource,
    ImageSource,
    digest,
    evenly_spaced,
    labels_from_integers,
)
from byol_fast.data.sources.columns import LabelColumn, find_columns, find_parts, read_labels, warn_parts
from byol_fast.data.sources.files import FileSource
from byol_fast.data.sources.lists import NUM_CHECKED, check_some_exist, open_files
from byol_fast.data.sources.thread_safety import NUM_COMPARED, compare_threads
from byol_fast.utils.files import printable_name

log = logging.getLogger(__name__)

_IMAGE_KEYS = ("image", "img", "jpg", "png", "pixel_values")
_NUM_FINGERPRINTED = 16

_ONE_READ = threading.RLock()  # of the whole process: train and validation sets may share an open file
# Classes whose items are their files, and their arrays; others of torchvision inherit the reading (ImageNet, CIFAR100).
_FOLDERS = (torchvision.datasets.DatasetFolder,)
_ARRAYS = tuple(
    getattr(torchvision.datasets, name) for name in ("CIFAR10", "MNIST", "QMNIST", "SEMEION", "STL10", "SVHN", "USPS")
)


@dataclass(frozen=True, eq=False)
class DatasetSource(ImageSource):
    """Map-style dataset that decodes its images itself. Several threads call its `__getitem__`."""

    dataset: Any
    """The dataset."""
    index: NDArray[np.int64]
    """Item of each image `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    label_problem: str = ""
    thread_safe: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set once `check_thread_safety` has passed; until then one thread at a time reads. Common to subsets."""

    def __len__(self) -> int:
        return len(self.index)

    def check_thread_safety(self, num_threads: int) -> None:  # noqa: D102 (inherited)
        if num_threads > 1 and not self.thread_safe.is_set():
            sampled = evenly_spaced(len(self), NUM_COMPARED).tolist()
            compare_threads(lambda i: self._load(i).tobytes(), sampled, self.sample_name)
            self.thread_safe.set()

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        name = f"{type(self.dataset).__name__} {len(self)}"
        sampled = evenly_spaced(len(self), _NUM_FINGERPRINTED).tolist()
        return digest([name.encode(), self.index.tobytes(), *(self.load(i).tobytes() for i in sampled)])

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        with contextlib.nullcontext() if self.thread_safe.is_set() else _ONE_READ:
            return self._load(i)

    def _load(self, i: int) -> Image.Image:
        try:
            item = self.dataset[int(self.index[i])]
            image = as_image(item)  # PIL decodes here
        except UnusableImageError as error:
            raise CorruptImageError(self.sample_name(i), str(error)) from error
        except Exception as error:  # of any type: the dataset is the user's code
            raise CorruptImageError(self.sample_name(i), f"cannot be read ({type(error).__name__}: {error})") from error
        if image is None:
            raise CorruptImageError(self.sample_name(i), f"is not an image ({_describe(item)})")
        return image

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{type(self.dataset).__name__}[{self.index[i]}]"

    def subset(self, index: NDArray[np.int64]) -> DatasetSource:  # noqa: D102 (inherited)
        return replace(self, index=self.index[index], labels=self._select_labels(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in {type(self.dataset).__name__}"


@dataclass(frozen=True, eq=False)
class HuggingFaceSource(EncodedSource):
    """Encoded images of a `datasets.Dataset`."""

    dataset: Any
    """The dataset, with its image column encoded."""
    column: str
    """Name of the image column."""
    index: NDArray[np.int64]
    """Row of each image `[N]`."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    label_problem: str = ""

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        sampled = evenly_spaced(len(self), _NUM_FINGERPRINTED).tolist()
        return digest([self.column.encode(), self.index.tobytes(), *(self.read(i) for i in sampled)])

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        value = self.dataset[int(self.index[i])][self.column]
        data = value if isinstance(value, bytes) else (value or {}).get("bytes")
        if data is None and isinstance(value, Mapping) and value.get("path"):
            return read_file(self.folder(i) / value["path"])
        return data or b""

    def num_bytes(self, i: int) -> int:  # noqa: D102 (inherited)
        size = int(self._row_sizes[self.index[i]])
        return len(self.read(i)) if size < 0 else size

    @cached_property
    def _row_sizes(self) -> NDArray[np.int64]:
        """Sizes of the images in all rows, read without the images; -1 where a row has no bytes."""
        from pyarrow import compute, types

        values = self.dataset.data.column(self.column)
        values = compute.struct_field(values, "bytes") if types.is_struct(values.type) else values
        if types.is_null(values.type):
            return np.full(len(self.dataset), -1)
        sizes: NDArray[np.int64] = compute.binary_length(values).cast("int64").fill_null(-1).to_numpy()
        rows = self.dataset._indices  # of selected or shuffled rows
        return sizes if rows is None else sizes[rows.column(0).to_numpy()]

    def folder(self, i: int) -> Path:
        """Folder that the path of image `i` is relative to, if its file is stored and not its bytes."""
        return Path()

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"Dataset[{self.index[i]}]"

    def subset(self, index: NDArray[np.int64]) -> HuggingFaceSource:  # noqa: D102 (inherited)
        return replace(self, index=self.index[index], labels=self._select_labels(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in a Hugging Face dataset"


def is_read_directly(dataset: Any) -> bool:
    """Return True if the items of a dataset are its stored images: the rows of Hugging Face, `.samples` or `.data`.

    They are for the classes of `datasets` and torchvision, and classes that inherit their `__getitem__` and `__len__`,
    unless they have a loader or transform of the user's; and for objects without `__getitem__`. Every other dataset may
    read, choose or change its images in its own way.
    """
    if is_hugging_face(dataset):
        return bool(dataset.format["type"] != "custom")
    if not hasattr(dataset, "__getitem__"):
        return True
    if getattr(dataset, "transforms", None) is not None or getattr(dataset, "transform", None) is not None:
        return False
    if _inherits_reading(dataset, _FOLDERS):
        return getattr(dataset, "loader", None) is torchvision.datasets.folder.default_loader
    return _inherits_reading(dataset, _ARRAYS)


def _inherits_reading(dataset: Any, classes: Sequence[Any]) -> bool:
    methods = ("__getitem__", "__len__")
    return any(all(getattr(type(dataset), m, None) is getattr(kind, m) for m in methods) for kind in classes)


def open_samples(dataset: object, samples: Sequence[Any], arg_name: str) -> FileSource:
    """The files of a torchvision dataset with `.samples`, a list of (path, label).

    Raises:
        SourceError: `.samples` is something else.
    """
    root = Path(getattr(dataset, "root", None) or ".")
    try:
        files = [os.fspath(sample[0]) for sample in samples]
        labels = [sample[1] for sample in samples]
    except (TypeError, IndexError):
        raise SourceError(f"{arg_name}: .samples of {type(dataset).__name__} must be a list of (path, label)") from None
    prefix = f"{root}{os.sep}"
    classes = getattr(dataset, "classes", ())
    class_labels = labels_from_integers(labels, len(files), arg_name, lambda i: printable_name(files[i]), classes)
    paths = tuple(file.removeprefix(prefix) for file in files)
    return FileSource(root=root, paths=paths, **class_labels._asdict())


def open_dataset(dataset: Any, arg_name: str) -> DatasetSource:
    """A map-style dataset of images.

    An item is an image, a tuple that starts with one (`(image, label)`), or a mapping with the key `image`; the image
    is a PIL image, or a uint8 array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`.

    Raises:
        SourceError: the dataset is empty, or has other items.
    """
    name = type(dataset).__name__
    if not len(dataset):
        raise SourceError(f"{arg_name}: {name} is empty")
    try:
        first = dataset[0]
        image = as_image(first)
    except UnusableImageError as error:
        raise SourceError(f"{arg_name}: {name}[0] {error}") from error
    except Exception as error:
        raise SourceError(f"{arg_name}: {name}[0] raises {type(error).__name__}: {error}") from error
    if image is None:
        raise SourceError(
            f"{arg_name}: {name}[0] must be a PIL image or a uint8 array [H, W, C] or [C, H, W], alone, first "
            f"in a tuple or under the key `image`, got {_describe(first)}; remove the conversion to tensors (a "
            "transform of the dataset, too): byol_fast makes the views"
        )
    labels, classes = labels_of(dataset), getattr(dataset, "classes", None) or ()
    class_labels = ClassLabels(
        None, (), f"{name} has no attribute `targets` or `labels` (integers, one for each image)"
    )
    try:
        if labels is not None and (target_transform := getattr(dataset, "target_transform", None)) is not None:
            labels, classes = [target_transform(label) for label in np.asarray(labels).tolist()], ()
        if labels is not None:
            class_labels = labels_from_integers(labels, len(dataset), arg_name, lambda i: f"{name}[{i}]", classes)
    except (ValueError, TypeError) as error:
        log.warning("%s: the labels of %s are not used (%s)", arg_name, name, error)
        class_labels = ClassLabels(None, (), f"the labels of {name} are not used ({error})")
    return DatasetSource(dataset, np.arange(len(dataset)), *class_labels)


def labels_of(dataset: object) -> Any:
    """The attribute `targets` or `labels` of a torchvision dataset; None if it has neither."""
    labels = getattr(dataset, "targets", None)
    return getattr(dataset, "labels", None) if labels is None else labels


def is_hugging_face(root: object) -> bool:
    """Return True for a dataset of the library `datasets`, without importing the library."""
    kind = type(root)
    return kind.__module__.partition(".")[0] == "datasets" and "Dataset" in kind.__name__


def open_hugging_face(
    dataset: Any, arg_name: str, *, image_column: str = "", label_column: str = ""
) -> HuggingFaceSource | FileSource:
    """A `datasets.Dataset`, whose images are read encoded, like files.

    Args:
        dataset: the dataset of one split.
        arg_name: name of the argument, for error messages.
        image_column: encoded images: a column of images, binary, or `{bytes, path}`; or their paths, as texts. Empty:
            selected by type and name.
        label_column: class indices or names. Empty: selected by type and name; if there is none, no labels.

    Raises:
        SourceError: the dataset is a stream, is empty, or has no such column.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise SourceError(
            f"{arg_name}: must be a datasets.Dataset, got {type(dataset).__name__}; pick a split, and do not stream: "
            "load_dataset(name, split='train')"
        )
    if not len(dataset):
        raise SourceError(f"{arg_name}: the dataset is empty")
    title, features = "the dataset", dataset.features
    image, has_paths, label, problem = find_columns(
        features.arrow_schema, features, title, arg_name, image_column, label_column
    )
    for column in find_parts(features.arrow_schema):
        names = getattr(features[column], "names", ())
        values = dataset.select_columns([column]).with_format("arrow")[:][column].unique().to_pylist()
        warn_parts(column, [names[value] if names and value is not None else value for value in values], title)
    class_labels = ClassLabels(None, (), problem)
    if label:
        names = getattr(features[label], "names", ())
        values = dataset.select_columns([label]).with_format("arrow")[:][label]
        part = LabelColumn(values, names, title)
        class_labels = read_labels([part], label, arg_name, lambda i: f"row {i}", strict=bool(label_column))
    plain = dataset.with_format(None)
    encoded = plain.select_columns([image])
    if has_paths:
        return open_files(Path(), encoded[image][:], class_labels, title, arg_name)
    if isinstance(features[image], datasets.Image):
        encoded = encoded.cast_column(image, datasets.Image(decode=False))
    source = HuggingFaceSource(encoded, image, np.arange(len(dataset)), *class_labels)
    check_stored_files(source, title, arg_name)
    return source


def check_stored_files(source: HuggingFaceSource, title: str, arg_name: str) -> None:
    """Raise SourceError if the files that rows name instead of holding their bytes do not exist."""
    from pyarrow import compute, types

    values = source.dataset.data.column(source.column)
    if not types.is_struct(values.type) or not compute.struct_field(values, "bytes").null_count:
        return
    names = []
    for i in evenly_spaced(len(source), NUM_CHECKED).tolist():
        value = source.dataset[i][source.column] or {}
        if value.get("bytes") is None and value.get("path"):
            names.append(str(source.folder(i) / value["path"]))
    if names:
        check_some_exist(names, Path(), title, arg_name)


def open_cifar10(cache: Path) -> tuple[Any, Any]:
    """Training and test set of torchvision's CIFAR-10, downloaded into the cache if missing.

    Raises:
        SourceError: the dataset is not in the cache and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    cache = expand_home(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        train, test = (CIFAR10(cache, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"data.builtin: CIFAR-10 is not in {cache} and could not be downloaded ({error}); "
            f"give --data.root FOLDER, or put cifar-10-python.tar.gz into {cache}"
        ) from error
    return train, test


def as_image(item: Any) -> Image.Image | None:
    """The image of a dataset item in RGB; None if it has none."""
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
    check_size(item.shape[1], item.shape[0])
    return Image.fromarray(np.ascontiguousarray(item)).convert("RGB")


def _describe(item: Any) -> str:
    if isinstance(item, tuple | list) and item:
        return f"({', '.join(_describe(part) for part in item)})"
    if isinstance(item, torch.Tensor | np.ndarray):
        return f"{type(item).__name__} {item.dtype} {list(item.shape)}"
    if isinstance(item, Mapping):
        return f"a mapping with {', '.join(map(str, item))}"
    return type(item).__name__
