"""Class numbers: only the labels that occur are classes, whatever their values are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from byol_fast.config import Config, ConfigError, DataConfig, KNNConfig, Preprocessing, ProbeConfig
from byol_fast.config.evaluation import ClassifierSettings
from byol_fast.data import ImageSource, SourceError, open_source, open_train_val
from byol_fast.data.sources.base import labels_from_text
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.images import open_images
from byol_fast.training.knn_monitor import check_labels, knn_problem
from tests.data.conftest import photo_like
from tests.data.kinds import encoded, installed, options, write_parquet, write_tar
from tests.data.test_datasets import Indexed, InMemory

PICTURE = encoded(photo_like(1, 12, 16)[0])
PIXELS = np.zeros((4, 8, 8, 3), np.uint8)


def _array(labels: list[int]) -> Any:
    return np.array(labels, np.uint64 if max(labels) >= 2**63 else np.int64)


def _csv(folder: Path, labels: list[int]) -> Any:
    (folder / "1.jpg").write_bytes(PICTURE)
    (folder / "x.csv").write_text("path,label\n" + "".join(f"1.jpg,{label}\n" for label in labels))
    return folder / "x.csv"


def _tar(folder: Path, labels: list[int]) -> Any:
    members = [m for i, y in enumerate(labels) for m in ((f"{i}.jpg", PICTURE), (f"{i}.cls", str(y).encode()))]
    return write_tar(folder / "x.tar", members)


def _npz(folder: Path, labels: list[int]) -> Any:
    np.savez(folder / "x.npz", images=PIXELS, labels=_array(labels))
    return folder / "x.npz"


def _parquet(folder: Path, labels: list[int]) -> Any:
    return write_parquet(folder / "x.parquet", [PICTURE] * len(labels), _array(labels))


def _in_memory(folder: Path, labels: list[int]) -> Any:
    dataset = InMemory(PIXELS, _array(labels))
    dataset.classes = []
    return dataset


WRITERS: dict[str, Callable[[Path, list[int]], Any]] = {
    "csv": _csv,
    "tar": _tar,
    "npz": _npz,
    "in memory": _in_memory,
}
if installed("datasets"):
    WRITERS["parquet"] = _parquet


def labeled(kind: str, folder: Path, labels: list[int]) -> ImageSource:
    folder.mkdir(parents=True)
    return open_source(WRITERS[kind](folder, labels), options=options(folder / "cache"))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("labels", "index", "classes"),
    [
        ([2, 0, 1, 2], [2, 0, 1, 2], ("0", "1", "2")),
        ([7, 10, 7, 3], [1, 2, 1, 0], ("3", "7", "10")),
        ([10**12, 5, 10**12, 2**63 - 1], [1, 0, 1, 2], ("5", "1000000000000", "9223372036854775807")),
        ([2**63 + 1, 5, 0, 2**63 + 1], [2, 1, 0, 2], ("0", "5", "9223372036854775809")),
    ],
    ids=["all classes", "gaps", "identifiers", "above int64"],
)
def test_integer_labels_that_occur_are_the_classes(
    kind: str, labels: list[int], index: list[int], classes: tuple[str, ...], tmp_path: Path
) -> None:
    source = labeled(kind, tmp_path / "x", labels)
    assert source.labels is not None and source.labels.dtype == np.int64 and source.labels.tolist() == index
    assert source.classes == classes


@pytest.mark.parametrize(
    ("texts", "index", "classes"),
    [
        ([str(2**70), "3", "9" * 5000, str(2**70)], [1, 0, 2, 1], ("3", str(2**70), "9" * 5000)),
        (["10", "9", "0", "10"], [2, 1, 0, 2], ("0", "9", "10")),
        (["10", "01", "1", "1.0", " 1", "9"], [4, 1, 2, 3, 0, 5], (" 1", "01", "1", "1.0", "10", "9")),
        (["1_0", "10", "+10", "\u0661\u0660"], [2, 1, 0, 3], ("+10", "10", "1_0", "\u0661\u0660")),
        (["b", "B", "a", "\xe4"], [2, 0, 1, 3], ("B", "a", "b", "\xe4")),
    ],
    ids=["large", "integers", "numbers of many forms", "integers of Python only", "names"],
)
def test_labels_that_differ_as_texts_are_different_classes(
    texts: list[str], index: list[int], classes: tuple[str, ...]
) -> None:
    labels = labels_from_text(texts, "x", str)
    assert labels.labels is not None and labels.labels.tolist() == index and labels.classes == classes


def test_validation_labels_mean_the_training_classes(tmp_path: Path) -> None:
    """Also where the validation images have fewer classes, whose positions differ."""
    path = tmp_path / "x.npz"
    config = Config(data=DataConfig(root=path), knn=KNNConfig(enabled="on"))
    np.savez(path, images=PIXELS, labels=[7, 10**12, 3, 7], val_images=PIXELS, val_labels=[10**12, 7, 7, 10**12])
    train, val = open_train_val(config)
    assert train.classes == ("3", "7", "1000000000000")
    assert val is not None and val.labels is not None and val.labels.tolist() == [2, 1, 1, 2]
    np.savez(path, images=PIXELS, labels=[7, 10**12, 3, 7], val_images=PIXELS, val_labels=[4, 7, 7, 7])
    message = r"1 of 2 validation classes are not among the training classes \(such as 4; the training classes are 3, "
    with pytest.raises(SourceError, match=message):
        open_train_val(config)


@pytest.mark.parametrize("kind", WRITERS)
def test_partly_negative_labels_are_the_reason_that_there_are_none(kind: str, tmp_path: Path, caplog: Any) -> None:
    source = labeled(kind, tmp_path / "some", [0, 1, -1, 1])
    names = {"csv": "1.jpg", "tar": "x.tar:2.jpg", "npz": "x.npz[2]", "in memory": "InMemory[2]", "parquet": "row 2"}
    assert source.labels is None and source.classes == ()
    problem = source.label_problem
    assert problem.startswith("1 of 4 images have no label, or a negative one, such as ") and names[kind] in problem
    assert f"{problem}: no labels are used; label all images, or leave those out" in caplog.text
    assert source.subset(np.array([0, 1])).label_problem == problem
    whole = labeled(kind, tmp_path / "whole", [0, 1, 0, 1])
    with pytest.raises(ConfigError, match=f"the labels of the training images cannot be used: {re.escape(problem)}"):
        knn_problem(Config(knn=KNNConfig(enabled="on")), source, whole)
    with pytest.raises(
        ConfigError, match=f"'on', but the labels .* training images cannot be used: {re.escape(problem)}"
    ):
        check_labels(Config(probe=ProbeConfig(enabled="on")), source, whole)
    encoder = PretrainedEncoder(name="x", encoder=nn.Identity(), preprocessing=Preprocessing(crop=8))
    for train, test, which in ((source, whole, "training"), (whole, source, "test")):
        with pytest.raises(SourceError, match=f"the {which} images must have labels.*: {re.escape(problem)}"):
            open_images(encoder, train, test, ClassifierSettings())
    caplog.clear()
    none = labeled(kind, tmp_path / "none", [-1, -1, -1, -1])  # as STL10's unlabeled images
    assert none.labels is None and none.label_problem.startswith("no image has a label")
    assert not caplog.records


@pytest.mark.parametrize("kind", ["csv", "tar"])
def test_a_negative_number_beside_names_means_no_label(kind: str, tmp_path: Path) -> None:
    problem = labeled(kind, tmp_path / "x", ["cat", "-1", "dog", "-1.0"]).label_problem  # type: ignore[list-item]
    assert problem.startswith("2 of 4 images have no label")


def test_negative_and_missing_texts_are_counted(tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("datasets")
    path = write_parquet(tmp_path / "x.parquet", [PICTURE] * 4, ["0", "-1", None, "1"])
    assert open_source(path, options=options(tmp_path / "cache")).labels is None
    assert f"2 of 4 images have no label, or a negative one, such as {path}:row 1" in caplog.text


def test_a_class_has_one_number_in_all_tar_shards(tmp_path: Path) -> None:
    """Whatever the order in which the shards name the classes; names that are no UTF-8 are not merged."""
    data = tmp_path / "data"
    data.mkdir()
    for split, orders in {"train": (["b", "a"], ["c", "b"]), "val": (["c", "a"],)}.items():
        for k, names in enumerate(orders):
            members = [m for n in names for m in ((f"{n}.jpg", PICTURE), (f"{n}.cls", f"{n}\n".encode()))]
            write_tar(data / f"{split}-{k}.tar", members)
    config = Config(data=DataConfig(root=data, cache=tmp_path / "cache"), knn=KNNConfig(enabled="on"))
    train, val = open_train_val(config)
    assert train.classes == ("a", "b", "c") and train.labels is not None and train.labels.tolist() == [1, 0, 2, 1]
    assert val is not None and val.labels is not None and val.labels.tolist() == [2, 0]
    latin = [m for i in range(2) for m in ((f"{i}.jpg", PICTURE), (f"{i}.cls", bytes([0xE4 + i])))]
    other = open_source(write_tar(tmp_path / "latin.tar", latin), options=options(tmp_path / "cache"))
    assert other.labels is not None and other.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("train", "val", "examples"),
    [
        (["01", "02", "10"], ["1", "2", "10"], "(such as 1, 2; the training classes are 01, 02, 10, ...)"),
        (["0", "1", "2"], ["cat", "dog", "cat"], "(such as cat, dog; the training classes are 0, 1, 2, ...)"),
        (["cat", "dog", "cat"], ["0", "1", "1"], "(such as 0, 1; the training classes are cat, dog, ...)"),
        (["0", "1", "2"], ["0.0", "1.0", "2.0"], "(such as 0.0, 1.0, 2.0; the training classes are 0, 1, 2, ...)"),
    ],
    ids=["zeros", "integers and names", "names and integers", "fractions"],
)
def test_classes_of_other_texts_are_refused(train: list[str], val: list[str], examples: str, tmp_path: Path) -> None:
    training, validation = (labeled("csv", tmp_path / name, y) for name, y in (("a", train), ("b", val)))  # type: ignore
    config = Config(knn=KNNConfig(enabled="on", val_root=tmp_path / "b" / "x.csv"))
    with pytest.raises(SourceError, match=re.escape(examples)):
        open_train_val(config, training)
    encoder = PretrainedEncoder(name="x", encoder=nn.Identity(), preprocessing=Preprocessing(crop=8))
    with pytest.raises(SourceError, match="all test classes must be among the training classes"):
        open_images(encoder, training, validation, ClassifierSettings())


def test_classes_of_the_same_name_cannot_be_matched(tmp_path: Path) -> None:
    """As the two cranes of ImageNet: lists of names that agree are used as they are, others would merge the two."""
    path = tmp_path / "x.npz"
    np.savez(path, images=PIXELS, labels=[0, 1, 2, 1], classes=["crane", "crane", "ant"])
    train = open_source(path)
    np.savez(path, images=PIXELS + 1, labels=[1, 0, 0, 1], classes=["ant", "crane"])
    config = Config(knn=KNNConfig(enabled="on", val_root=path))
    with pytest.raises(SourceError, match="class names must differ .* got 'crane' twice"):
        open_train_val(config, train)


def test_labels_that_a_dataset_has_not_are_named() -> None:
    joined: Any = torch.utils.data.ConcatDataset([Indexed(PIXELS[0], 3)] * 2)
    reason = "ConcatDataset has no attribute `targets` or `labels` (integers, one for each image)"
    assert open_source(joined).label_problem == reason
    joined.targets = [0, 1, 0, 1, 0, 1]
    labels = open_source(joined).labels
    assert labels is not None and labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("index", "shown"), [([], "none"), ([3], "3 to 3"), ([0, -4], "-4 to 0")])
def test_subset_of_missing_images_is_refused(index: list[int], shown: str) -> None:
    dataset = Indexed(PIXELS[0], 3)
    with pytest.raises(SourceError, match=f"must select from the 3 images of its dataset, got {shown}"):
        open_source(torch.utils.data.Subset(dataset, index))
