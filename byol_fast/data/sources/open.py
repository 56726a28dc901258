"""Find the images of almost anything, and split them into training and validation images."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from byol_fast.config import Config, DataConfig
from byol_fast.data.sources.arrays import NPZ_HELP, array_source, open_demo, open_npz, open_npz_part
from byol_fast.data.sources.base import EXTENSIONS, ImageSource, SourceError
from byol_fast.data.sources.datasets import is_hugging_face, open_cifar10, open_dataset, open_hugging_face, open_samples
from byol_fast.data.sources.files import open_folder, walk
from byol_fast.data.sources.lists import LISTS, open_list
from byol_fast.data.sources.parquet import open_parquet
from byol_fast.data.sources.shards import find_shards
from byol_fast.data.sources.tar import open_tars

log = logging.getLogger(__name__)

SHARDS = (".tar", ".parquet")
"""Names of files that hold many images."""

VALIDATION = ("val", "validation", "valid", "test")
"""Names of validation images beside `train`, the first that is there counts."""

_PART = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?=[-_.\d]|$)")
_GIVE = "give a folder of images, a list of them (.txt, .csv), .tar or .parquet shards, or a .npz file"


def open_source(root: object, *, where: str = "images", options: DataConfig | None = None) -> ImageSource:
    """Find the images of almost anything.

    Args:
        root: one of
            - a folder: `class/**/image.jpg` gives labels (the class is the first folder; classes are sorted by
              name); images in the folder itself, or a single subfolder, give none;
            - a list of files: `.txt` (a path a line, or path, tab, label), `.csv` or `.tsv` (with a header);
            - tar shards (webdataset, or archives of image folders): a file, a pattern such as
              `train-{000..127}.tar` or `train-*.tar`, or a folder of them;
            - Parquet files with encoded images (as on the Hugging Face hub): the same;
            - a `.npz` file with `images` and optionally `labels` `[N]` and `classes` (names);
            - a uint8 numpy array or tensor, `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with 1 or 3 channels;
            - a torchvision data set that keeps its images in memory (`.data`, `.targets`: CIFAR-10, MNIST, ...)
              or in files (`.samples`: ImageFolder, ImageNet, ...); its transforms are not used;
            - a `datasets.Dataset` of Hugging Face;
            - any other object with `__len__` and `__getitem__` that hands out PIL images or uint8 arrays, alone or
              first of a tuple, and has no transform; `torch.utils.data.Subset` of any of these;
            - an `ImageSource`, returned as it is.
        where: name of the argument, for error messages.
        options: of it `cache`, `image_column` and `label_column` are used; the defaults when None.

    Raises:
        SourceError: nothing there, or nothing that can be used; says what was expected.
    """
    options = options or DataConfig()
    if isinstance(root, ImageSource):
        return root
    if isinstance(root, str | Path):
        return _open_path(Path(root).expanduser(), where, options)
    if isinstance(root, np.ndarray | torch.Tensor):
        return array_source(root, where=where)
    if isinstance(root, torch.utils.data.Subset):
        return open_source(root.dataset, where=where, options=options).subset(np.asarray(root.indices, np.int64))
    if is_hugging_face(root):
        columns = {"image_column": options.image_column, "label_column": options.label_column}
        return open_hugging_face(root, where, **columns)
    if isinstance(samples := getattr(root, "samples", None), Sequence) and samples:
        return open_samples(root, samples, where)
    if isinstance(data := getattr(root, "data", None), np.ndarray | torch.Tensor):
        labels = getattr(root, "targets", None)
        labels = getattr(root, "labels", None) if labels is None else labels
        return array_source(data, labels, getattr(root, "classes", ()), where=where, name=type(root).__name__)
    if hasattr(root, "__len__") and hasattr(root, "__getitem__") and not isinstance(root, list | tuple | dict | bytes):
        return open_dataset(root, where)
    raise SourceError(
        f"{where}: expected a folder, a list of files, .tar or .parquet shards, a .npz file, a uint8 array or tensor, "
        f"or a data set with a length that is read by number, got {type(root).__name__}"
    )


def _open_path(path: Path, where: str, options: DataConfig) -> ImageSource:
    if path.is_dir() and not _holds_shards(path, where):
        return open_folder(path, where)
    for suffix in SHARDS:
        if shards := find_shards(path, suffix, where):
            return _open_shards(shards, str(path), where, options)
    if path.is_file():
        if path.suffix == ".npz":
            return open_npz(path, where)
        if path.suffix.lower() in LISTS:
            return open_list(path, where)
        hint = "; unpack it first" if re.search(r"\.(tar\.\w+|tgz|zip|gz|xz|zst|7z)$", path.name.lower()) else ""
        raise SourceError(f"{where}: {path} is a file that is not understood{hint}; {_GIVE} ({NPZ_HELP})")
    raise SourceError(f"{where}: {path.absolute()} does not exist; {_GIVE}{_nearest_parent(path.absolute())}")


def _open_shards(shards: list[Path], title: str, where: str, options: DataConfig) -> ImageSource:
    if shards[0].suffix.lower() == ".tar":
        return open_tars(shards, title, where, options.cache)
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    return open_parquet(shards, title, where, options.cache, **columns)


def _holds_shards(folder: Path, where: str) -> bool:
    """Whether a folder holds shards and no images; looks no further than the first image."""
    shards = False
    for name in walk(folder, where):
        if name.lower().endswith(EXTENSIONS):
            return False
        shards = shards or name.lower().endswith(SHARDS)
    return shards


def _nearest_parent(path: Path) -> str:
    parent = next((p for p in path.parents if p.exists()), None)
    if parent is None or parent == parent.parent:
        return ""
    return f" (the part that does exist is {parent})"


# ---- training and validation images --------------------------------------------------------------------------------


def split(config: Config, data: object = None) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images of a run, as `DataConfig.root`, `.builtin` and `KNNConfig.val_root` say.

    A folder is split where it has `train` and `val`, `validation`, `valid` or `test` inside, or shards that are named
    so (`train-000.tar`, `val.parquet`); with `train` alone that is all there is. (A folder `train` of images beside
    other folders of images is a class.) A `.npz` is split where it has `val_images` (and `val_labels`). Labels of the
    validation images are numbered as the training images' are.

    Args:
        config: of it `data` and `knn` are used.
        data: training images that take the place of the configuration's: whatever `open_source` opens.

    Returns:
        The training images, and the validation images or None (there are none, or kNN is off).

    Raises:
        SourceError: there are no images, or the validation classes are not among the training classes.
    """
    root, where, options = config.data.root, "data.root", config.data
    wants_val = config.knn.enabled != "off"
    val: ImageSource | None = None
    if data is not None:
        train = open_source(data, where="data", options=options)
    elif root is None:
        if config.data.builtin == "none":
            raise SourceError("data.root: there are no images to train on; give --data.root FOLDER")
        if config.data.builtin == "demo":
            train, val = open_demo()
        else:
            train, val = (open_source(part, where="cifar10") for part in open_cifar10(config.data.cache))
        val = val if wants_val else None
    else:
        train, val = _open_root(root.expanduser(), where, options, wants_val and config.knn.val_root is None)
    if wants_val and config.knn.val_root is not None:
        val = open_source(config.knn.val_root, where="knn.val_root", options=options)
    log.info("training images: %s", train.describe())
    if val is None:
        return train, None
    val = _align(train, val, strict=config.knn.enabled == "on" or config.knn.val_root is not None)
    log.info("validation images: %s", val.describe())
    return train, val


def _open_root(root: Path, where: str, options: DataConfig, wants_val: bool) -> tuple[ImageSource, ImageSource | None]:
    if not root.is_dir():
        val: ImageSource | None = None
        if wants_val and root.suffix == ".npz":
            val = open_npz_part(root, where, "val_") if root.is_file() else None
        return open_source(root, where=where, options=options), val
    train_dir, val_dir = _split_folder(root, where)
    if train_dir == root and (parts := _split_shards(root, where)):
        train_shards, val_shards = parts
        train = _open_shards(train_shards, str(root), where, options)
        return train, _open_shards(val_shards, str(root), where, options) if val_shards and wants_val else None
    train = open_source(train_dir, where=where, options=options)
    return train, open_source(val_dir, where=where, options=options) if val_dir is not None and wants_val else None


def _split_folder(root: Path, where: str) -> tuple[Path, Path | None]:
    """The folders of training and validation images in a data set's folder."""
    if not (root / "train").is_dir():
        return root, None
    val = next((root / name for name in VALIDATION if (root / name).is_dir()), None)
    used = {"train"} | ({val.name} if val is not None else set())
    others = sorted(entry.name for entry in root.iterdir() if entry.name not in used and not entry.name.startswith("."))
    if val is None:
        with_images = [name for name in others if (root / name).is_dir() and _has_images(root / name, where)]
        if with_images and any(entry.suffix.lower() in EXTENSIONS for entry in (root / "train").iterdir()):
            return root, None  # a class named train
    if others:
        log.info("%s: only train%s used, not %s", root, f" and {val.name} are" if val else " is", ", ".join(others[:5]))
    return root / "train", val


def _has_images(folder: Path, where: str) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for name in walk(folder, where))


def _split_shards(root: Path, where: str) -> tuple[list[Path], list[Path]] | None:
    """Training and validation shards of a folder, by their names; None where their names say nothing."""
    if not _holds_shards(root, where):
        return None
    for suffix in SHARDS:
        named: dict[str, list[Path]] = {}
        for shard in find_shards(root, suffix, where) or ():
            match = _PART.search(shard.stem.lower())
            named.setdefault(match[1] if match else "", []).append(shard)
        train = named.pop("train", []) + named.pop("training", [])
        if not train:
            continue
        val = next((named.pop(name) for name in VALIDATION if name in named), [])
        if named:
            left = ", ".join(str(shards[0].relative_to(root)) for shards in named.values())
            log.info("%s: shards that are neither training nor validation images are not used (%s)", root, left)
        return sorted(train), val
    return None


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
        return val.with_labels(None, ())
    table = np.array([number[name] for name in val.classes], np.int64)
    return val.with_labels(table[val.labels], train.classes)
