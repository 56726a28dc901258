"""Which images: folders of files, or arrays in memory, with labels where there are any.

Labels are never used for training; nearest neighbours and linear probes need them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byol_fast.config import Config
from byol_fast.data.integrity import BadImageError, check_bytes, decode, read_file

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""Names of image files, in lower or upper case; other files are left out and named in the log."""

_NPZ_HELP = "save it with numpy.savez(path, images=images, labels=labels)"


class SourceError(ValueError):
    """There are no usable images where the argument says."""


class ImageSource(ABC):
    """A numbered set of images."""

    labels: NDArray[np.int64] | None
    """Class number of each image `[N]`, or None."""
    classes: tuple[str, ...]
    """Name of each class; empty where there are no labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when images are added, removed, renamed or changed in size (files) or in value (arrays)."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image `i` in RGB, as stored: EXIF rotation is not applied, as in torchvision's ImageFolder.

        Raises:
            BadImageError: it cannot be read or decoded.
        """

    @abstractmethod
    def where(self, i: int) -> str:
        """Name of image `i` for people: its file, `shard:member`, or the source and the number."""

    @abstractmethod
    def subset(self, index: NDArray[np.int64]) -> ImageSource:
        """The images at these positions, in this order."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    def _contents(self) -> str:
        return f"{len(self):,} images" + (f" of {len(self.classes):,} classes" if self.labels is not None else "")


class EncodedSource(ImageSource):
    """Images as encoded bytes: whole files, or pieces of larger ones."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Image `i` as stored: JPEG, PNG, ... Called by several threads at a time.

        Raises:
            BadImageError: it cannot be read.
        """

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        data = self.read(i)
        try:
            return decode(data)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            raise BadImageError(self.where(i), check_bytes(data) or f"cannot be decoded ({error})") from error


@dataclass(frozen=True, eq=False)
class FileSource(EncodedSource):
    """Image files, decoded each time they are needed."""

    root: Path
    """Folder that `paths` are relative to."""
    paths: tuple[str, ...]
    """The files."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    ignored: int = 0
    """How many files of the folder are not images by their name."""
    ignored_examples: tuple[str, ...] = ()
    """Some of their names."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> Path:
        """The file of image `i`."""
        return self.root / self.paths[i]

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        digest = hashlib.blake2b(digest_size=16)
        for i, name in enumerate(self.paths):
            try:
                size = self.path(i).stat().st_size
            except OSError:
                size = -1
            digest.update(os.fsencode(name) + b"\0%d\n" % size)
        return digest.hexdigest()

    def read(self, i: int) -> bytes:  # noqa: D102 (inherited)
        return read_file(self.path(i))

    def where(self, i: int) -> str:  # noqa: D102 (inherited)
        return str(self.path(i))

    def subset(self, index: NDArray[np.int64]) -> FileSource:  # noqa: D102 (inherited)
        labels = None if self.labels is None else self.labels[index]
        return replace(self, paths=tuple(self.paths[i] for i in index), labels=labels)

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._contents()} in {self.root}"


@dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Images of one size, in memory."""

    images: NDArray[np.uint8]
    """`[N, H, W, 3]`, C-contiguous."""
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    name: str = "array"
    """Where the array came from."""

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        digest = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=16)
        digest.update(self.images.data)
        return digest.hexdigest()

    def load(self, i: int) -> Image.Image:  # noqa: D102 (inherited)
        return Image.fromarray(self.images[i])

    def where(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{self.name}[{i}]"

    def subset(self, index: NDArray[np.int64]) -> ArraySource:  # noqa: D102 (inherited)
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)

    def describe(self) -> str:  # noqa: D102 (inherited)
        h, w = self.images.shape[1:3]
        return f"{self._contents()} of {h} x {w} pixels from {self.name}"


def open_source(root: object, *, where: str = "images") -> ImageSource:
    """Find the images of almost anything.

    Args:
        root: one of
            - a folder: `class/**/image.jpg` gives labels (the class is the first folder; classes are sorted by
              name); images in the folder itself, or a single subfolder, give none;
            - a `.npz` file with `images` and optionally `labels` `[N]` and `classes` (names);
            - a uint8 numpy array or tensor, `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with 1 or 3 channels;
            - a torchvision data set that keeps its images in memory (`.data`, `.targets`: CIFAR-10, MNIST, ...)
              or in files (`.samples`: ImageFolder, ImageNet, ...); its transforms are not used;
            - an `ImageSource`, returned as it is.
        where: name of the argument, for error messages.

    Raises:
        SourceError: nothing there, or nothing that can be used; says what was expected.
    """
    if isinstance(root, ImageSource):
        return root
    if isinstance(root, str | Path):
        path = Path(root).expanduser()
        if path.is_dir():
            return _open_folder(path, where)
        if path.suffix == ".npz" and path.is_file():
            return _open_npz(path, where)
        if path.is_file():
            raise SourceError(
                f"{where}: {path} is a file that is not understood; give a folder of images, or a .npz file "
                f"with an array `images` ({_NPZ_HELP})"
            )
        raise SourceError(
            f"{where}: {path.absolute()} does not exist; give a folder of images or a .npz file"
            + _nearest_parent(path.absolute())
        )
    if isinstance(root, np.ndarray | torch.Tensor):
        return array_source(root, where=where)
    if isinstance(samples := getattr(root, "samples", None), Sequence) and samples:
        return _open_samples(root, samples, where)
    if isinstance(data := getattr(root, "data", None), np.ndarray | torch.Tensor):
        labels = getattr(root, "targets", None)
        labels = getattr(root, "labels", None) if labels is None else labels
        name = type(root).__name__
        return array_source(data, labels, getattr(root, "classes", ()), where=where, name=name)
    raise SourceError(
        f"{where}: expected a folder, a .npz file, a uint8 array or tensor, or a torchvision data set with "
        f".samples or .data, got {type(root).__name__}"
    )


def array_source(
    images: Any, labels: Any = None, classes: Sequence[object] = (), *, where: str = "images", name: str = "array"
) -> ArraySource:
    """Check and normalise images in memory.

    Args:
        images: uint8 `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, C = 1 or 3. One channel is repeated to three:
            DALI's colour operators end the process on one channel.
        labels: integers `[N]` in some form, or None. Negative ones mean "unlabelled": then there are none at all.
        classes: names; numbers where they are missing.
        where: name of the argument, for error messages.
        name: where the images came from.

    Raises:
        SourceError: wrong type, shape or number.
    """
    x = images.numpy(force=True) if isinstance(images, torch.Tensor) else np.asarray(images)
    given = list(x.shape)
    if x.dtype != np.uint8:
        raise SourceError(
            f"{where}: must be uint8 in 0..255, got {x.dtype}; convert it, for example "
            f"(images * 255).round().astype('uint8') for values in 0..1"
        )
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[3] not in {1, 3} and x.shape[1] in {1, 3}:
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.shape[3] not in {1, 3}:
        raise SourceError(
            f"{where}: must have the shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, got {given}"
        )
    if 0 in x.shape:
        raise SourceError(f"{where}: has no images (shape {list(x.shape)})")
    if x.shape[3] == 1:
        x = np.broadcast_to(x, (*x.shape[:3], 3))
    y = None if labels is None else _labels(labels, len(x), where)
    if y is None:
        return ArraySource(np.ascontiguousarray(x), name=name)
    names = tuple(str(c) for c in classes) or tuple(str(i) for i in range(int(y.max()) + 1))
    if int(y.max()) >= len(names):
        raise SourceError(f"{where}: labels go up to {int(y.max())}, but there are only {len(names)} class names")
    return ArraySource(np.ascontiguousarray(x), y, names, name)


def split(config: Config, data: object = None) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images of a run, as `DataConfig.root`, `.builtin` and `KNNConfig.val_root` say.

    A folder is split where it has `train` and `val` or `test` inside; a `.npz` where it has `val_images` (and
    `val_labels`). Labels of the validation images are numbered as the training images' are.

    Args:
        config: of it `data` and `knn` are used.
        data: training images that take the place of the configuration's: whatever `open_source` opens.

    Returns:
        The training images, and the validation images or None (there are none, or kNN is off).

    Raises:
        SourceError: there are no images, or the validation classes are not among the training classes.
    """
    root, where = config.data.root, "data.root"
    wants_val = config.knn.enabled != "off"
    val: ImageSource | None = None
    if data is not None:
        train = open_source(data, where="data")
    elif root is None:
        if config.data.builtin == "none":
            raise SourceError("data.root: there are no images to train on; give --data.root FOLDER")
        train, val = _open_demo() if config.data.builtin == "demo" else _open_cifar10(config.data.cache)
        val = val if wants_val else None
    else:
        root = root.expanduser()
        train_dir, val_dir = _split_folder(root)
        train = open_source(train_dir, where=where)
        if wants_val and config.knn.val_root is None:
            if val_dir is not None:
                val = open_source(val_dir, where=where)
            elif root.suffix == ".npz":
                val = _open_npz_part(root, where, "val_")
    if wants_val and config.knn.val_root is not None:
        val = open_source(config.knn.val_root, where="knn.val_root")
    log.info("training images: %s", train.describe())
    if val is None:
        return train, None
    val = _align(train, val, strict=config.knn.enabled == "on" or config.knn.val_root is not None)
    log.info("validation images: %s", val.describe())
    return train, val


# ---- folders -------------------------------------------------------------------------------------------------------


def _open_folder(root: Path, where: str) -> FileSource:
    paths: list[str] = []
    ignored: list[str] = []
    for name in _walk(root, where):
        (paths if name.lower().endswith(EXTENSIONS) else ignored).append(name)
    kinds = Counter(Path(name).suffix.lower() or "no extension" for name in ignored)
    summary = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5))
    if not paths:
        found = f"only {summary}" if ignored else "no files at all"
        raise SourceError(
            f"{where}: no images in {root.absolute()} or below ({found}); "
            f"expected files that end in {', '.join(EXTENSIONS)}"
        )
    if ignored:
        log.warning(
            "%s: %d files that are not images by their name are left out (%s), for example %s",
            root,
            len(ignored),
            summary,
            ", ".join(ignored[:3]),
        )
    paths.sort()
    tops = [name.partition("/") for name in paths]
    classes = sorted({top for top, nested, _ in tops if nested})
    flat = sum(1 for _, nested, _ in tops if not nested)
    if flat and classes:
        log.warning(
            "%s: %d images lie beside the %d subfolders, so subfolders are not taken as classes: no labels",
            root,
            flat,
            len(classes),
        )
    labels = None
    if len(classes) > 1 and not flat:
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[top] for top, _, _ in tops], np.int64)
    return FileSource(
        root=root,
        paths=tuple(paths),
        labels=labels,
        classes=tuple(classes) if labels is not None else (),
        ignored=len(ignored),
        ignored_examples=tuple(ignored[:10]),
    )


def _walk(root: Path, where: str) -> Iterator[str]:
    """Names of all files below a folder that are not hidden, relative to it; links to folders are followed once."""
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise SourceError(f"{where}: cannot list {error.filename} ({error.strerror}); check its permissions") from error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        prefix = "" if prefix == "." else f"{prefix}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _split_folder(root: Path) -> tuple[Path, Path | None]:
    """The folders of training and validation images in a data set's folder."""
    if not (root / "train").is_dir():
        return root, None
    for name in ("val", "test"):
        if (root / name).is_dir():
            return root / "train", root / name
    others = [entry for entry in root.iterdir() if entry.name != "train" and not entry.name.startswith(".")]
    return (root, None) if others else (root / "train", None)


def _open_samples(dataset: object, samples: Sequence[Any], where: str) -> FileSource:
    root = Path(getattr(dataset, "root", None) or ".")
    try:
        files = [os.fspath(sample[0]) for sample in samples]
        labels = _labels([sample[1] for sample in samples], len(files), where)
    except (TypeError, IndexError):
        raise SourceError(f"{where}: .samples of {type(dataset).__name__} must be a list of (path, label)") from None
    prefix = f"{root}{os.sep}"
    classes = tuple(str(name) for name in getattr(dataset, "classes", ()))
    if labels is not None and not classes:
        classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return FileSource(
        root=root,
        paths=tuple(file.removeprefix(prefix) for file in files),
        labels=labels,
        classes=classes if labels is not None else (),
    )


def _nearest_parent(path: Path) -> str:
    parent = next((p for p in path.parents if p.exists()), None)
    if parent is None or parent == parent.parent:
        return ""
    return f" (the part that does exist is {parent})"


# ---- arrays --------------------------------------------------------------------------------------------------------


def _open_npz(path: Path, where: str) -> ArraySource:
    source = _open_npz_part(path, where, "")
    if source is None:
        with np.load(path, allow_pickle=False) as file:
            held = ", ".join(sorted(file)) or "nothing"
        raise SourceError(f"{where}: {path} has no array `images` (it holds {held}); {_NPZ_HELP}")
    return source


def _open_npz_part(path: Path, where: str, prefix: str) -> ArraySource | None:
    """The arrays `{prefix}images`, `{prefix}labels` and `classes` of a file; None when it has no such images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if f"{prefix}images" not in file:
                return None
            images = file[f"{prefix}images"]
            labels = file.get(f"{prefix}labels")
            classes = file["classes"].tolist() if "classes" in file else ()
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{where}: {path} cannot be read as a .npz file ({error}); {_NPZ_HELP}") from error
    return array_source(images, labels, classes, where=f"{where}: {path}: {prefix}images", name=path.name)


def _labels(labels: Any, n: int, where: str) -> NDArray[np.int64] | None:
    y = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if y.shape != (n,) or not np.issubdtype(y.dtype, np.integer):
        raise SourceError(
            f"{where}: labels must be {n} integers, one for each image, got {y.dtype} of shape {list(y.shape)}"
        )
    return None if y.min() < 0 else y.astype(np.int64)


# ---- data sets that come with the package or are fetched -----------------------------------------------------------


def _open_demo() -> tuple[ImageSource, ImageSource]:
    """Fashion-MNIST, 10,000 + 2,000 images of 28 x 28 (MIT licence, (c) 2017 Zalando SE)."""
    with resources.as_file(resources.files("byol_fast.data") / "demo" / "fashion_mnist.npz") as path:
        train, val = (_open_npz_part(path, "demo data", prefix) for prefix in ("", "val_"))
    assert train is not None and val is not None
    return train, val


def _open_cifar10(cache: Path) -> tuple[ImageSource, ImageSource]:
    from torchvision.datasets import CIFAR10

    cache = cache.expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        parts = [CIFAR10(cache, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"data.builtin: CIFAR-10 is not in {cache} and could not be fetched ({error}); "
            f"give --data.root FOLDER, or put cifar-10-python.tar.gz into {cache}"
        ) from error
    return open_source(parts[0], where="cifar10"), open_source(parts[1], where="cifar10")


def _align(train: ImageSource, val: ImageSource, *, strict: bool) -> ImageSource:
    """Number the validation labels as the training labels are."""
    if train.labels is None or val.labels is None or train.classes == val.classes:
        return val
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in number]
    if unknown:
        message = (
            f"knn: {len(unknown)} of {len(val.classes)} validation classes are not among the training classes "
            f"(such as {', '.join(unknown[:3])}); use the same folder names, or --knn.enabled off"
        )
        if strict:
            raise SourceError(message)
        log.warning(message)
        return _relabelled(val, None, ())
    table = np.array([number[name] for name in val.classes], np.int64)
    return _relabelled(val, table[val.labels], train.classes)


def _relabelled(source: ImageSource, labels: NDArray[np.int64] | None, classes: tuple[str, ...]) -> ImageSource:
    assert isinstance(source, FileSource | ArraySource)
    return replace(source, labels=labels, classes=classes)
