"""Open image sources of any kind, and split them into training and validation images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_fast.config import Config, DataConfig
from byol_fast.config.fields import expand_home
from byol_fast.data.errors import SourceError
from byol_fast.data.sources.arrays import array_source, open_demo, open_npz, open_npz_part
from byol_fast.data.sources.base import ImageSource
from byol_fast.data.sources.datasets import (
    is_hugging_face,
    is_read_directly,
    labels_of,
    open_cifar10,
    open_dataset,
    open_hugging_face,
    open_samples,
)
from byol_fast.data.sources.files import FileSource, open_folder
from byol_fast.data.sources.lists import open_list
from byol_fast.data.sources.overlap import warn_shared_images
from byol_fast.data.sources.parquet import open_parquet
from byol_fast.data.sources.paths import check_images, check_path
from byol_fast.data.sources.shards import SHARDS, find_shards, has_only_shards
from byol_fast.data.sources.splits import check_parts, split_folder, split_shards
from byol_fast.data.sources.tar import TarSource, open_tars
from byol_fast.utils.files import printable_name
from byol_fast.utils.progress import current

log = logging.getLogger(__name__)


def open_source(root: object, *, arg_name: str = "images", options: DataConfig | None = None) -> ImageSource:
    """Open an image source.

    Args:
        root: one of

            - a folder: `class/**/image.jpg` gives labels (the class is the first folder, below those that hold all
              images; classes are sorted by name); images that are in no such folder give none, except for a few,
              which are left out with a warning. Hidden and system folders are passed over;
            - a list of files: `.txt` (a path a line, or path, tab, label), `.csv` or `.tsv` (with a header);
            - tar shards (webdataset, or archives of image folders): a file, a pattern such as
              `train-{000..127}.tar` or `train-*.tar`, or a folder of them;
            - Parquet files with encoded images (as on the Hugging Face hub): the same;
            - a `.npz` file with `images` and optionally `labels` `[N]` (integers or names) and `classes` (names);
            - a uint8 numpy array or tensor, `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with 1 or 3 channels;
            - a torchvision dataset that holds its images in memory (`.data`, `.targets`: CIFAR-10, MNIST, ...)
              or in files (`.samples`: ImageFolder, ImageNet, ...), without a loader or transforms of its own;
            - a `datasets.Dataset` of Hugging Face;
            - any other map-style dataset of PIL images or uint8 arrays, alone or first in a tuple, read by its
              `__getitem__`; `torch.utils.data.Subset` of any of these;
            - an `ImageSource`, returned unchanged.
        arg_name: name of the argument, for error messages.
        options: provides `cache`, `image_column`, `label_column` and `on_corrupt`; defaults if None.

    Raises:
        SourceError: there are no images, or none that can be used.
    """
    options = options or DataConfig()
    if isinstance(root, ImageSource):
        return root
    if isinstance(root, str | Path):
        return _open_path(expand_home(root), arg_name, options)
    if isinstance(root, np.ndarray | torch.Tensor):
        return array_source(root, arg_name=arg_name)
    if type(root) is torch.utils.data.Subset:
        return _open_subset(root, arg_name, options)
    if is_hugging_face(root):
        rows = open_hugging_face(root, arg_name, **_columns(options))
        if is_read_directly(root):
            return rows
        return open_dataset(root, arg_name).with_labels(rows.labels, rows.classes, rows.label_problem)
    direct = is_read_directly(root)
    if direct and isinstance(samples := getattr(root, "samples", None), Sequence) and samples:
        return open_samples(root, samples, arg_name)
    if direct and isinstance(data := getattr(root, "data", None), np.ndarray | torch.Tensor):
        classes = getattr(root, "classes", ())
        return array_source(data, labels_of(root), classes, arg_name=arg_name, name=type(root).__name__)
    if hasattr(root, "__len__") and hasattr(root, "__getitem__") and not isinstance(root, list | tuple | dict | bytes):
        return open_dataset(root, arg_name)
    raise SourceError(
        f"{arg_name}: expected a folder, a list of files, .tar or .parquet shards, a .npz file, a uint8 array or "
        f"tensor, or a map-style dataset, got {type(root).__name__}"
    )


def _open_subset(subset: torch.utils.data.Subset[Any], arg_name: str, options: DataConfig) -> ImageSource:
    source = open_source(subset.dataset, arg_name=arg_name, options=options)
    index = np.asarray(subset.indices, np.int64)
    if not len(index) or index.min() < -len(source) or index.max() >= len(source):
        got = f"{index.min()} to {index.max()}" if len(index) else "none"
        raise SourceError(
            f"{arg_name}: the indices of Subset must select from the {len(source):,} images of its dataset, got {got}"
        )
    return source.subset(index)


def _open_path(path: Path, arg_name: str, options: DataConfig) -> ImageSource:
    check_path(path, arg_name)
    with current().bar(None, f"opening {printable_name(path)}"):
        return _open_existing(path, arg_name, options)


def _open_existing(path: Path, arg_name: str, options: DataConfig) -> ImageSource:
    if os.path.isdir(path) and not has_only_shards(path, arg_name):  # noqa: PTH112
        return _name_metadata(open_folder(path, arg_name), path)
    shards = {suffix: files for suffix in SHARDS if (files := find_shards(path, suffix, arg_name))}
    if shards:
        (suffix, files), *others = shards.items()
        for other, unused in others:
            log.warning("%s: %d %s files are not used, because there are %s files", path, len(unused), other, suffix)
        return _open_shards(files, str(path), arg_name, options)
    if path.suffix.lower() == ".npz":
        return open_npz(path, arg_name)
    return open_list(path, arg_name, **_columns(options))


def _name_metadata(source: ImageSource, folder: Path) -> ImageSource:
    """The images of a folder; if there are no classes, but a table of `datasets`, that is the reason."""
    table = folder / "metadata.csv"
    if source.labels is not None or not table.is_file():
        return source
    return source.with_labels(None, (), f"{table} is not read with the folder; give the table itself to use its labels")


def _open_shards(shards: list[Path], title: str, arg_name: str, options: DataConfig) -> ImageSource:
    if shards[0].suffix.lower() == ".tar":
        return open_tars(shards, title, arg_name, options.cache, on_corrupt=options.on_corrupt)
    return open_parquet(shards, title, arg_name, options.cache, **_columns(options))


def _columns(options: DataConfig) -> dict[str, str]:
    return {"image_column": options.image_column, "label_column": options.label_column}


# ---- training and validation images --------------------------------------------------------------------------------


def open_train_val(config: Config, data: object = None) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images of a run, from `DataConfig.root`, `.builtin` and `KNNConfig.val_root`.

    A folder is split if it contains folders or shards named `train` (or `training`) and `val`, `validation`, `valid`,
    `dev`, `eval`, `evaluation`, `test` or `testing`, in any case (`Train`, `val2017`, `training_set`, `train_images`;
    `train-000.tar`, `val.parquet`), also below a folder that holds all images; with `train` alone, only that is used.
    (A folder `train` of images beside other folders of images is a class.) A `.npz` is split if it has `val_images`
    (and `val_labels`). Validation labels use the class indices of the training images.

    Args:
        config: provides `data` and `knn`.
        data: training images that replace those of the configuration; any argument of `open_source`. A path is split as
            `data.root` is.

    Returns:
        The training images, and the validation images or None (there are none, or kNN is off).

    Raises:
        SourceError: there are no images, the validation classes are not among the training classes, or folders or
            shards seem to be parts of a data set and do not say which is for training (`train_a`, `val_a`).
    """
    check_images(config, data)
    root, arg_name, options = config.data.root, "data.root", config.data
    wants_val = config.knn.enabled != "off"
    val: ImageSource | None = None
    if isinstance(data, str | Path):
        root, arg_name, data = Path(data), "data", None
    if data is not None:
        train = open_source(data, arg_name="data", options=options)
    elif root is None:
        if config.data.builtin == "demo":
            train, val = open_demo()
        else:
            train, val = (open_source(part, arg_name="cifar10") for part in open_cifar10(config.data.cache))
        val = val if wants_val else None
    else:
        train, val = _open_root(expand_home(root), arg_name, options, wants_val and config.knn.val_root is None)
    if wants_val and config.knn.val_root is not None:
        val = open_source(config.knn.val_root, arg_name="knn.val_root", options=options)
    log.info("training images: %s", train.describe())
    if val is None:
        return train, None
    val = _align_labels(train, val, strict=config.knn.enabled == "on" or config.knn.val_root is not None)
    log.info("validation images: %s", val.describe())
    warn_shared_images(train, val, "knn.val_root" if config.knn.val_root is not None else "data")
    return train, val


def _open_root(
    root: Path, arg_name: str, options: DataConfig, wants_val: bool
) -> tuple[ImageSource, ImageSource | None]:
    is_folder = os.path.isdir(root)  # noqa: PTH112
    train_root, val_root = split_folder(root, arg_name) if is_folder else (root, None)
    has_shards = is_folder and train_root == root and has_only_shards(root, arg_name)
    if has_shards and (shards := split_shards(root, arg_name)):
        train_shards, val_shards = shards
        train = _open_shards(train_shards, str(root), arg_name, options)
        return train, _open_shards(val_shards, str(root), arg_name, options) if val_shards and wants_val else None
    train = open_source(train_root, arg_name=arg_name, options=options)
    if isinstance(train, TarSource):
        check_parts(train.names, train_root, arg_name, packed=True)
    elif isinstance(train, FileSource) and is_folder:  # a list names its files one by one
        check_parts(train.paths, train_root, arg_name)
    if not wants_val:
        return train, None
    if val_root is not None:
        return train, open_source(val_root, arg_name=arg_name, options=options)
    return train, open_npz_part(root, arg_name, "val_") if root.suffix.lower() == ".npz" else None


def _align_labels(train: ImageSource, val: ImageSource, *, strict: bool) -> ImageSource:
    """Map validation labels to the class indices of the training images."""
    if train.labels is None or val.labels is None or train.classes == val.classes:
        return val
    try:
        names = [val.classes[i] for i in np.unique(val.labels).tolist()]
        known = set(train.classes)
        if unknown := [name for name in names if name not in known]:
            examples, others = (", ".join(map(printable_name, some[:3])) for some in (unknown, train.classes))
            raise SourceError(
                f"knn: {len(unknown)} of {len(names)} validation classes are not among the training classes (such as "
                f"{examples}; the training classes are {others}, ...); use the same names in both, or --knn.enabled off"
            )
        return val.with_classes(train.classes)
    except SourceError as error:
        if strict:
            raise
        log.warning("%s", error)
        return val.with_labels(None, (), str(error).removeprefix("knn: "))
