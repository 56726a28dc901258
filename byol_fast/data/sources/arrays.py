"""Arrays of images of one size, in memory."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byol_fast.data.decode import size_problem
from byol_fast.data.errors import SourceError
from byol_fast.data.sources.base import ClassLabels, ImageSource, labels_from_integers, labels_from_text
from byol_fast.data.sources.paths import NPZ_HELP
from byol_fast.utils.files import open_regular, printable_name


@dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Images of one size, in memory."""

    images: NDArray[np.uint8]
    """`[N, H, W, 3]`, C-contiguous."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    name: str = "array"
    """Origin of the array, for messages."""
    label_problem: str = ""

    def __post_init__(self) -> None:
        _check_dtype(self.images.dtype, self.name)
        _check_size(self.images.shape, self.name)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        result = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=16)
        result.update(self.images.data)
        return result.hexdigest()

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        return Image.fromarray(self.images[i])

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{printable_name(self.name)}[{i}]"

    def subset(self, index: NDArray[np.int64]) -> ArraySource:  # noqa: D102 (inherited)
        return replace(self, images=self.images[index], labels=self._select_labels(index))

    def describe(self) -> str:  # noqa: D102 (inherited)
        h, w = self.images.shape[1:3]
        return f"{self._counts()} of {h} x {w} pixels from {printable_name(self.name)}"


def array_source(
    images: Any, labels: Any = None, classes: Sequence[object] = (), *, arg_name: str = "images", name: str = "array"
) -> ArraySource:
    """Source of images in memory, converted to C-contiguous RGB.

    Args:
        images: uint8 `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, C = 1 or 3. One channel is repeated to three,
            because DALI's color operators abort the process on one channel.
        labels: integers (also stored as floats), booleans or, without `classes`, names, `[N]` or `[N, 1]`; or None. A
            negative label means unlabeled: then no labels are used.
        classes: class names, which the labels index into; empty: the labels that occur are the classes.
        arg_name: name of the argument, for error messages.
        name: origin of the images, for messages.

    Raises:
        SourceError: wrong dtype, shape or number of labels.
    """
    x = images.numpy(force=True) if isinstance(images, torch.Tensor) else np.asarray(images)
    shape = list(x.shape)
    _check_dtype(x.dtype, arg_name)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[3] not in {1, 3} and x.shape[1] in {1, 3}:
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.shape[3] not in {1, 3}:
        raise SourceError(
            f"{arg_name}: must have the shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, got {shape}"
        )
    if 0 in x.shape:
        raise SourceError(f"{arg_name}: has no images (shape {list(x.shape)})")
    _check_size(x.shape, arg_name)
    if x.shape[3] == 1:
        x = np.broadcast_to(x, (*x.shape[:3], 3))
    class_labels = ClassLabels(None)
    if labels is not None:
        class_labels = _read_labels(labels, len(x), arg_name, lambda i: f"{name}[{i}]", classes)
    return ArraySource(np.ascontiguousarray(x), name=name, **class_labels._asdict())


def _read_labels(
    labels: Any, num_images: int, arg_name: str, sample_name: Callable[[int], str], classes: Sequence[object]
) -> ClassLabels:
    """Labels of an array, a tensor or a list; see `array_source`."""
    names = tuple(map(str, classes))
    y = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if y.shape == (num_images, 1):  # as in Keras and MedMNIST
        labels = y = y[:, 0]
    is_text = y.dtype.kind in "SU" or (y.dtype.kind == "O" and all(isinstance(value, str) for value in y.flat))
    if is_text and y.shape == (num_images,) and not names:
        texts = [value.decode(errors="surrogateescape") if isinstance(value, bytes) else value for value in y.tolist()]
        return labels_from_text(texts, arg_name, sample_name)
    if y.dtype == np.bool_:
        labels, names = y.astype(np.int64), names or ("False", "True")
    elif y.dtype.kind == "f" and bool(np.all((np.abs(y) < 2**53) & (y == np.floor(y)))):
        labels = y.astype(np.int64)
    return labels_from_integers(labels, num_images, arg_name, sample_name, names)


def _check_dtype(dtype: np.dtype[Any], arg_name: str) -> None:
    if dtype != np.uint8:
        raise SourceError(
            f"{arg_name}: must be uint8 in 0..255, got {dtype}; convert it, for example "
            "(images * 255).round().astype('uint8') for values in 0..1"
        )


def _check_size(shape: Sequence[int], arg_name: str) -> None:
    """Raise SourceError for images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` that are too large or too narrow."""
    channels_first = len(shape) == 4 and shape[3] not in {1, 3} and shape[1] in {1, 3}
    height, width = shape[2:4] if channels_first else shape[1:3]
    if (problem := size_problem(width, height)) is not None:
        raise SourceError(f"{arg_name}: images {problem}")


def open_npz(path: Path, arg_name: str) -> ArraySource:
    """The arrays `images`, `labels` and `classes` of a `.npz` file.

    Raises:
        SourceError: the file cannot be read, or has no array `images`.
    """
    source = open_npz_part(path, arg_name, "")
    if source is None:
        with open(path, "rb", opener=open_regular) as stream, np.load(stream, allow_pickle=False) as file:
            names = ", ".join(sorted(file)) or "nothing"
        raise SourceError(f"{arg_name}: {path} has no array `images` (it has {names}); {NPZ_HELP}")
    return source


def open_npz_part(path: Path, arg_name: str, prefix: str) -> ArraySource | None:
    """The arrays `{prefix}images`, `{prefix}labels` and `classes` of a file; None if it has no such images.

    Raises:
        SourceError: the file cannot be read.
    """
    title = f"{arg_name}: {path}: {prefix}images"
    try:
        with open(path, "rb", opener=open_regular) as stream:
            if not zipfile.is_zipfile(stream):
                raise zipfile.BadZipFile("it is not a zip archive")
        with open(path, "rb", opener=open_regular) as stream, np.load(stream, allow_pickle=False) as file:
            if f"{prefix}images" not in file:
                return None
            _check_header(file, f"{prefix}images", title)
            images = file[f"{prefix}images"]
            labels = file.get(f"{prefix}labels")
            classes = file["classes"].astype(np.str_).tolist() if "classes" in file else ()
            names = ", ".join(sorted(file))
    except SourceError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{arg_name}: {path} cannot be read as a .npz file ({error}); {NPZ_HELP}") from error
    except MemoryError as error:
        raise SourceError(
            f"{arg_name}: {path} must be a .npz file whose arrays fit the memory; store the images as files or shards"
        ) from error
    source = array_source(images, labels, classes, arg_name=title, name=path.name)
    if labels is not None:
        return source
    return replace(source, label_problem=f"{printable_name(path)} has no array `{prefix}labels` (it has {names})")


def _check_header(file: Any, name: str, title: str) -> None:
    """Check the type and the size of the images in a `.npz` file before they are read."""
    with file.zip.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            _check_dtype(dtype, title)
            if len(shape) in {3, 4}:
                _check_size(shape, title)


def open_demo() -> tuple[ArraySource, ArraySource]:
    """Fashion-MNIST, 10,000 + 2,000 images of 28 x 28 (MIT license, (c) 2017 Zalando SE)."""
    with resources.as_file(resources.files("byol_fast.data") / "demo" / "fashion_mnist.npz") as path:
        train, val = (open_npz_part(path, "demo data", prefix) for prefix in ("", "val_"))
    assert train is not None and val is not None
    return train, val
