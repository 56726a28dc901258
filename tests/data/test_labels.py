"""Class numbers: only the labels that occur are classes, whatever their values are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_fast.config import Config, DataConfig, KNNConfig
from byol_fast.data import ImageSource, SourceError, open_source, open_train_val
from byol_fast.data.sources.base import labels_from_text
from tests.data.conftest import photo_like
from tests.data.kinds import encoded, installed, options, write_parquet, write_tar
from tests.data.test_datasets import InMemory

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


def test_text_labels_have_no_largest_integer() -> None:
    labels, classes = labels_from_text([str(2**70), "3", "03", str(2**70)], "x", str)
    assert labels is not None and labels.tolist() == [1, 0, 0, 1] and classes == ("3", str(2**70))


def test_validation_labels_mean_the_training_classes(tmp_path: Path) -> None:
    """Also where the validation images have fewer classes, whose positions differ."""
    path = tmp_path / "x.npz"
    config = Config(data=DataConfig(root=path), knn=KNNConfig(enabled="on"))
    np.savez(path, images=PIXELS, labels=[7, 10**12, 3, 7], val_images=PIXELS, val_labels=[10**12, 7, 7, 10**12])
    train, val = open_train_val(config)
    assert train.classes == ("3", "7", "1000000000000")
    assert val is not None and val.labels is not None and val.labels.tolist() == [2, 1, 1, 2]
    np.savez(path, images=PIXELS, labels=[7, 10**12, 3, 7], val_images=PIXELS, val_labels=[4, 7, 7, 7])
    with pytest.raises(
        SourceError, match=r"1 of 2 validation classes are not among the training classes \(such as 4\)"
    ):
        open_train_val(config)


@pytest.mark.parametrize("kind", WRITERS)
def test_partly_negative_labels_are_reported(kind: str, tmp_path: Path, caplog: Any) -> None:
    assert labeled(kind, tmp_path / "some", [0, 1, -1, 1]).labels is None
    assert "1 of 4" in caplog.text
    caplog.clear()
    assert labeled(kind, tmp_path / "none", [-1, -1, -1, -1]).labels is None
    assert not caplog.records


def test_negative_and_missing_texts_are_counted(tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("datasets")
    path = write_parquet(tmp_path / "x.parquet", [PICTURE] * 4, ["0", "-1", None, "1"])
    assert open_source(path, options=options(tmp_path / "cache")).labels is None
    assert "2 of 4 images have no label, or a negative one, such as row 1" in caplog.text
