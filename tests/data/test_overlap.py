"""Validation images that are training images, too."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from byol_fast.config import Config, DataConfig, KNNConfig, Preprocessing
from byol_fast.config.evaluation import KNNSettings
from byol_fast.data import open_source, open_train_val
from byol_fast.data.sources import ArraySource, EncodedSource, overlap
from byol_fast.data.sources.overlap import SharedImages, find_shared_images
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.images import open_images
from tests.data.kinds import available, encoded, make, write_tar

NUM = 24


@pytest.fixture
def images() -> list[bytes]:
    """PNGs of the size that arrays have: encoded and decoded, they are the same images in all kinds."""
    pixels = np.random.default_rng(0).integers(0, 256, (NUM, 40, 48, 3), np.uint8)
    pixels[:, 5:] = 9  # most of them is equal, in all images
    return [encoded(image, "png") for image in pixels]


@pytest.mark.parametrize("kind", available())
@pytest.mark.parametrize("other", ["folder", "array", "dataset"])
def test_shared_images_are_found_in_every_kind(kind: str, other: str, images: list[bytes], tmp_path: Path) -> None:
    """Half of the validation images are training images, in another order."""
    val = make(kind, tmp_path / "a", images)
    train = make(other, tmp_path / "b", images).subset(np.arange(NUM)[::-2])
    assert find_shared_images(train, val) == SharedImages([(i, (NUM - 1 - i) // 2) for i in range(1, NUM, 2)], NUM, 1.0)
    assert not find_shared_images(train, val.subset(np.arange(0, NUM, 2))).pairs


@pytest.mark.parametrize("kind", available())
def test_sizes_are_those_of_the_bytes(kind: str, images: list[bytes], tmp_path: Path) -> None:
    source = make(kind, tmp_path / "a", images).subset(np.arange(NUM)[::-3])
    if isinstance(source, EncodedSource):
        assert [source.num_bytes(i) for i in range(len(source))] == [len(data) for data in images[::-3]]


def test_sizes_of_rows_are_those_of_the_bytes(images: list[bytes], tmp_path: Path) -> None:
    """Also of selected rows, rows of several chunks, and rows without bytes; a size alone reads no image."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.png").write_bytes(images[0])
    values = [{"bytes": data, "path": None} for data in images] + [{"bytes": None, "path": str(tmp_path / "a.png")}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [*values, None]}, features=features)
    for dataset in (rows, rows.select([25, 3, 24, 3]), datasets.concatenate_datasets([rows, rows]).shuffle(seed=1)):
        source = open_source(dataset)
        assert isinstance(source, EncodedSource)
        assert [source.num_bytes(i) for i in range(len(source))] == [len(source.read(i)) for i in range(len(source))]
    paths = datasets.Dataset.from_dict({"image": values[-1:]}, features=features)
    source = open_source(paths)
    assert isinstance(source, EncodedSource) and source.num_bytes(0) == len(images[0])


def test_images_of_a_dataset_are_read_once() -> None:
    """Reading may be slow: an interrupt ends it between any two images."""

    class Counted:
        num_reads = 0

        def __len__(self) -> int:
            return 30

        def __getitem__(self, i: int) -> Any:
            if self.num_reads == 70:
                raise KeyboardInterrupt
            self.num_reads += 1
            return Image.new("RGB", (4, 4), (i, 0, 0))

    train, val = Counted(), Counted()
    sources = [open_source(dataset) for dataset in (train, val)]
    shared = find_shared_images(*sources)
    assert shared == SharedImages([(i, i) for i in range(30)], 30, 1.0)
    assert [train.num_reads, val.num_reads] == [31, 31]  # the first one is read when the dataset is opened
    val.num_reads = 60
    with pytest.raises(KeyboardInterrupt):
        find_shared_images(*sources)
    assert val.num_reads == 70


def test_equal_sizes_and_unreadable_images_are_not_shared(images: list[bytes], tmp_path: Path) -> None:
    for part, values in (("train", range(3)), ("val", range(3, 6))):
        (tmp_path / part).mkdir()
        for value in values:  # PPM: all have the same size
            (tmp_path / part / f"{value}.ppm").write_bytes(b"P6 2 2 255\n" + bytes([value]) * 12)
        (tmp_path / part / "empty.png").touch()
        (tmp_path / part / "link.png").symlink_to("nowhere")
    train, val = (open_source(tmp_path / part) for part in ("train", "val"))
    assert find_shared_images(train, val) == SharedImages([], 5, 1.0)
    one_color = [ArraySource(np.zeros((2, *size, 3), np.uint8)) for size in ((2, 3), (3, 2))]
    assert not find_shared_images(*one_color).pairs


def test_samples_of_many_images_find_copies(images: list[bytes], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(overlap, "NUM_VAL", 6)
    monkeypatch.setattr(overlap, "NUM_TRAIN", 12)
    source = make("folder", tmp_path / "a", images)
    whole = find_shared_images(source, source)
    assert whole == SharedImages([(i, i) for i in range(0, NUM, 4)], 6, 0.5)
    monkeypatch.setattr(overlap, "MAX_BYTES", sum(map(len, images[::2])) * 6 // 12 + 9)
    assert find_shared_images(source, source).searched == 0.25


@pytest.mark.parametrize("kind", ["same", "link", "copies", "hard links", "tar"])
def test_validation_images_that_are_trained_on_are_reported(
    kind: str, images: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, val = tmp_path / "back\\slash", tmp_path / "val"
    make("folder", root, images)
    if kind == "same":
        val = root
    elif kind == "link":
        val.symlink_to(root)
    elif kind == "tar":
        files = sorted(path.relative_to(root) for path in root.rglob("*.jpg"))
        val = write_tar(tmp_path / "val.tar", [(f"x/{name}", (root / name).read_bytes()) for name in files])
    else:
        shutil.copytree(root, val, copy_function=shutil.copy if kind == "copies" else os.link)
    config = Config(data=DataConfig(root=root, cache=tmp_path / "cache"), knn=KNNConfig(val_root=val))
    open_train_val(config)
    (message,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert message.startswith(f"knn.val_root: {NUM} of {NUM} validation images are also training images, such as ")
    assert rf" (= {tmp_path}/back\\slash/" in message and "); accuracies would be too high" in message


def test_automatic_split_and_test_of_an_evaluation_are_compared(
    images: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    for i, data in enumerate([*images[:20], *images[18:]]):  # two of six
        path = root / ("train" if i < 20 else "val") / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    options = DataConfig(cache=tmp_path / "cache")
    pretrained = PretrainedEncoder(
        name="tiny", encoder=nn.Identity(), preprocessing=Preprocessing(crop=16), config=Config(data=options)
    )
    for train, test, arg_name in ((root, None, "data"), (root / "train", root / "val", "--test")):
        caplog.clear()
        open_images(pretrained, train, test, KNNSettings())
        (message,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
        assert message.startswith(f"{arg_name}: 2 of 6 validation images are also training images, such as ")


def test_few_duplicates_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sets from the web have a few percent: at the bound of a twentieth it is a warning."""
    pixels = np.arange(160, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    root, val = tmp_path / "root", tmp_path / "val"
    for shared, level in ((4, logging.INFO), (5, logging.WARNING)):
        for folder, values in ((root, pixels[:60]), (val, pixels[60 - shared : 160 - shared])):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for i, image in enumerate(values):
                Image.fromarray(image).save(folder / f"{i}.png")
        caplog.clear()
        with caplog.at_level(logging.INFO):
            open_train_val(Config(data=DataConfig(root=root), knn=KNNConfig(val_root=val)))
        (record,) = (record for record in caplog.records if "are also training images" in record.message)
        assert record.levelno == level
        assert f"{shared} of 100 validation images" in record.message


def test_datasets_have_few_duplicates() -> None:
    """Fashion-MNIST's own training and test images."""
    train, val = open_train_val(Config(data=DataConfig(builtin="demo")))
    assert val is not None
    assert find_shared_images(train, val) == SharedImages([], 200, 1.0)
