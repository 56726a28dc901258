"""Datasets of other libraries and of users: what is read, and by whom."""

from __future__ import annotations

import io
import sqlite3
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from byol_fast.config import Preprocessing
from byol_fast.data import CorruptImageError, SourceError, eval_batches, open_source
from byol_fast.data.sources import ArraySource, DatasetSource, FileSource, ImageSource
from tests.data.conftest import photo_like
from tests.data.helpers import config_of, loader_of, pixels, plain
from tests.data.kinds import encoded
from tests.data.test_sources import arrays_of, files_of, labels_of, put

SIZE = 24
PICTURES: NDArray[np.uint8] = photo_like(20, SIZE, SIZE)
PNGS = [encoded(picture, "png") for picture in PICTURES]


class InMemory:
    """As torchvision's MNIST and CIFAR keep them."""

    def __init__(self, data: Any, targets: Any) -> None:
        self.data, self.targets, self.classes = data, targets, ["cat", "dog"]


def test_torchvision_datasets(tmp_path: Path) -> None:
    cifar_like = InMemory(np.full((3, 8, 8, 3), 7, np.uint8), [1, 0, 1])
    mnist_like = InMemory(torch.full((3, 8, 8), 9, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    for data, value, labels in ((cifar_like, 7, [1, 0, 1]), (mnist_like, 9, [0, 1, 0])):
        source = arrays_of(data)
        assert (source.images == value).all() and source.images.shape == (3, 8, 8, 3)
        assert labels_of(source) == labels and source.classes == ("cat", "dog")
    put(tmp_path, "cat/1.png", "dog/2.png", "dog/sub/3.png")
    ours, theirs = files_of(tmp_path), files_of(torchvision.datasets.ImageFolder(tmp_path))
    assert sorted(theirs.paths) == sorted(ours.paths)
    assert theirs.classes == ours.classes and labels_of(theirs) == labels_of(ours)
    assert theirs.fingerprint == ours.fingerprint
    assert open_source(ours) is ours
    assert open_source(torch.utils.data.Subset(cifar_like, [2, 1])).labels.tolist() == [1, 0]  # type: ignore


class Indexed(torch.utils.data.Dataset[Any]):
    """Items in any of the forms that users write."""

    def __init__(self, item: Any, n: int = 5, **more: Any) -> None:
        self.item, self.n = item, n
        vars(self).update(more)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.item(i) if callable(self.item) else self.item


@pytest.mark.parametrize(
    "item",
    [
        lambda i: Image.new("RGB", (6, 4), (i, 2 * i, 3 * i)),
        lambda i: (Image.new("RGB", (6, 4), (i, 2 * i, 3 * i)).convert("RGBA"), 1),
        lambda i: (np.full((4, 6, 3), (i, 2 * i, 3 * i), np.uint8), "label", 7),
        lambda i: torch.tensor([i, 2 * i, 3 * i], dtype=torch.uint8)[:, None, None].expand(3, 4, 6),
        lambda i: {"image": Image.new("RGB", (6, 4), (i, 2 * i, 3 * i)), "caption": "x"},
    ],
    ids=["PIL", "tuple", "array", "tensor", "mapping"],
)
def test_map_style_datasets(item: Any) -> None:
    source = open_source(Indexed(item, targets=[0, 1, 0, 1, 1], transform=None, classes=["cat", "dog"]))
    assert isinstance(source, DatasetSource)
    assert len(source) == 5 and source.labels is not None and source.labels.tolist() == [0, 1, 0, 1, 1]
    for i in range(5):
        assert np.array_equal(np.asarray(source.load(i)), np.full((4, 6, 3), (i, 2 * i, 3 * i), np.uint8))
    assert np.asarray(source.subset(np.array([3])).load(0))[0, 0].tolist() == [3, 6, 9]
    assert source.subset(np.array([3])).sample_name(0) == "Indexed[3]"
    assert source.fingerprint == open_source(Indexed(item)).fingerprint != open_source(Indexed(item, 4)).fingerprint


def test_map_style_datasets_of_other_items_are_rejected() -> None:
    picture = Image.new("RGB", (6, 4))
    cases: list[tuple[Any, str]] = [
        (
            Indexed(torch.zeros(3, 4, 6)),
            r"Indexed\[0\] must be a PIL image or a uint8 array.*torch.float32 \[3, 4, 6\]",
        ),
        (Indexed((np.zeros((4, 6), np.float64), 1)), r"got \(ndarray float64 \[4, 6\], int\)"),
        (Indexed({"text": 1}), "got a mapping with text"),
        (Indexed(Image.fromarray(np.ones((4, 6), np.float32))), r"Indexed\[0\] must have 8 bits .*mode F .* 1 to 1;"),
        (Indexed(Image.fromarray(np.ones((4, 6), np.int32))), r"Indexed\[0\] must have 8 bits .*mode I with values"),
        (Indexed(np.ones((4, 6), np.uint16)), r"got ndarray uint16 \[4, 6\]"),
        (Indexed(picture, n=0), "Indexed is empty"),
        (Indexed(lambda i: 1 // i), r"Indexed\[0\] raises ZeroDivisionError"),
    ]
    for data, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            open_source(data, arg_name="data")
        assert str(caught.value).startswith("data: ")
    dark = Image.fromarray(np.full((4, 6), 4095, np.uint16))
    late = open_source(Indexed([picture, picture, dark].__getitem__))
    for i, message in ((2, r"must have 8 bits .*mode I;16 with values 4,095"), (3, r"cannot be read \(IndexError")):
        with pytest.raises(CorruptImageError, match=rf"Indexed\[{i}\] {message}"):
            late.load(i)


# ---- the dataset's own way of reading ------------------------------------------------------------------------------


class Inverted(torchvision.datasets.ImageFolder):  # type: ignore[misc]
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        return Image.fromarray(255 - np.asarray(image)), label


class InvertedSubset(torch.utils.data.Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        image, label = super().__getitem__(index)  # type: ignore[no-untyped-call]
        return 255 - np.asarray(image), label

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Reader:
    """Attributes of other datasets beside a reading of its own."""

    samples = imgs = (("gone.png", 0), ("gone.png", 1))
    data = np.zeros((2, SIZE, SIZE, 3), np.uint8)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Any:
        return PICTURES[i]


def half(path: str) -> Image.Image:
    return Image.open(path).convert("RGB").resize((4, 4))


def flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cifar(kind: Any = torchvision.datasets.CIFAR10, **more: Any) -> Any:
    """A CIFAR-10 of a few images, which is not downloaded."""
    dataset = kind.__new__(kind)
    vars(dataset).update(data=PICTURES[:2], targets=[0, 1], transform=None, target_transform=None, transforms=None)
    vars(dataset).update(more)
    return dataset


class OneImage(torchvision.datasets.CIFAR10):  # type: ignore[misc]
    def __len__(self) -> int:
        return 1


def _hugging_face(folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture) for picture in PICTURES[:3]], "label": [1, 0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}),
    )
    return rows.with_transform(lambda batch: {"image": [flipped(image) for image in batch["image"]]})


OWN_READING: dict[str, Callable[[Path], Any]] = {
    "loader": lambda folder: torchvision.datasets.ImageFolder(folder, loader=half),
    "transform": lambda folder: torchvision.datasets.ImageFolder(folder, transform=flipped),
    "subclass of ImageFolder": Inverted,
    "transform of CIFAR-10": lambda folder: cifar(transform=flipped),
    "subclass of CIFAR-10": lambda folder: cifar(OneImage),
    "subclass of Subset": lambda folder: InvertedSubset(torchvision.datasets.ImageFolder(folder), [1, 0]),
    "samples, imgs and data": lambda folder: Reader(),
    "Hugging Face's transform": _hugging_face,
}


@pytest.mark.parametrize("kind", OWN_READING)
def test_own_reading_of_a_dataset_is_used(kind: str, tmp_path: Path) -> None:
    for i, name in enumerate(("ant/0.png", "bee/1.png")):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(PNGS[i])
    dataset = OWN_READING[kind](tmp_path)
    source = open_source(dataset)
    assert len(source) == len(dataset)
    for i in range(len(dataset)):
        item = dataset[i]
        image = item["image"] if isinstance(item, dict) else item[0] if isinstance(item, tuple) else item
        assert np.array_equal(np.asarray(source.load(i)), np.asarray(image))
    if kind == "Hugging Face's transform":
        assert source.labels is not None and source.labels.tolist() == [1, 0, 1] and source.classes == ("ant", "bee")


def test_plain_torchvision_datasets_are_read_directly(tmp_path: Path) -> None:
    put(tmp_path, "ant/0.png", "bee/1.png")
    assert isinstance(open_source(torchvision.datasets.ImageFolder(tmp_path)), FileSource)
    assert isinstance(open_source(cifar()), ArraySource)
    assert isinstance(open_source(cifar(torchvision.datasets.CIFAR100)), ArraySource)


class BeesAndBugs(torchvision.datasets.ImageFolder):  # type: ignore[misc]
    """It overrides the method that torchvision documents for this."""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        return ["bee", "bug"], {"bee": 0, "bug": 1}


def test_subclass_that_chooses_other_files_is_read_directly(tmp_path: Path) -> None:
    put(tmp_path, "ant/0.png", "bee/1.png", "bug/2.png")
    source = files_of(BeesAndBugs(tmp_path))
    assert source.paths == ("bee/1.png", "bug/2.png")
    assert source.classes == ("bee", "bug") and labels_of(source) == [0, 1]


def test_target_transform_is_applied(tmp_path: Path) -> None:
    put(tmp_path, "ant/0.png", "bee/1.png", "cat/2.png")
    source = open_source(torchvision.datasets.ImageFolder(tmp_path, target_transform=lambda y: 2 - y))
    assert source.labels is not None and source.labels.tolist() == [2, 1, 0]
    assert source.classes == ("0", "1", "2")


# ---- threads -------------------------------------------------------------------------------------------------------


class OneHandle:
    """Pictures in one file that is opened once."""

    def __init__(self, folder: Path) -> None:
        (folder / "pictures").write_bytes(b"".join(PNGS))
        self.file = (folder / "pictures").open("rb")
        self.starts = np.cumsum([0, *map(len, PNGS)]).tolist()

    def __len__(self) -> int:
        return len(PNGS)

    def __getitem__(self, i: int) -> Image.Image:
        self.file.seek(self.starts[i])
        return Image.open(io.BytesIO(self.file.read(len(PNGS[i]))))


class OneTar(OneHandle):
    def __init__(self, folder: Path) -> None:
        with tarfile.open(folder / "pictures.tar", "w") as tar:
            for i, data in enumerate(PNGS):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        self.tar = tarfile.open(folder / "pictures.tar")  # noqa: SIM115
        self.members = self.tar.getmembers()

    def __getitem__(self, i: int) -> Image.Image:
        file = self.tar.extractfile(self.members[i])
        assert file is not None
        return Image.open(file)


class OneBuffer(OneHandle):
    """Every item is the same array, with other contents."""

    def __init__(self, folder: Path) -> None:
        self.buffer = np.empty_like(PICTURES[0])

    def __getitem__(self, i: int) -> Any:
        self.buffer[:] = PICTURES[i]
        return self.buffer


class OneThread(OneHandle):
    """A connection that raises an error in other threads than the one that opened it."""

    def __init__(self, folder: Path) -> None:
        self.connection = sqlite3.connect(":memory:")

    def __getitem__(self, i: int) -> Any:
        self.connection.execute("select 1")
        return PICTURES[i]


def views_of(source: ImageSource, threads: int) -> dict[int, NDArray[np.uint8]]:
    """Pixels of the images, which are not augmented."""
    loader = loader_of(source, config_of("threaded", plain(SIZE), batch_size=len(PNGS), threads=threads))
    batch = next(loader)
    loader.close()
    return dict(zip(batch.index.tolist(), pixels(batch.views[0]), strict=True))


@pytest.mark.parametrize("kind", [OneHandle, OneTar, OneBuffer, OneThread])
def test_dataset_that_several_threads_must_not_read_is_refused(kind: Any, tmp_path: Path) -> None:
    message = rf"{kind.__name__}\[\d+\] must be the same image when several threads read .*data\.threads 1"
    source = open_source(kind(tmp_path))
    with pytest.raises(SourceError, match=message):
        views_of(source, threads=2)
    with pytest.raises(SourceError, match=message):
        next(eval_batches(source, Preprocessing(crop=SIZE), 4, threads=2))


@pytest.mark.parametrize("kind", [OneHandle, OneTar])
def test_one_thread_reads_any_dataset(kind: Any, tmp_path: Path) -> None:
    """Also while the loader reads in advance and an evaluation begins."""
    source = open_source(kind(tmp_path))
    loader = loader_of(source, config_of("threaded", plain(SIZE), batch_size=10, threads=1))
    next(loader)
    images, index = next(eval_batches(source, Preprocessing(crop=SIZE), len(PNGS), threads=1))
    assert np.array_equal(pixels(images), PICTURES[index])
    batch = next(loader)
    assert np.array_equal(pixels(batch.views[0]), PICTURES[batch.index])


class Exclusive(OneHandle):
    """A dataset that notices reads at once."""

    def __init__(self) -> None:
        self.reading = threading.Lock()
        self.num_overlaps = 0

    def __getitem__(self, i: int) -> Image.Image:
        if not self.reading.acquire(blocking=False):
            self.num_overlaps += 1
            return Image.fromarray(PICTURES[0])
        try:
            return Image.open(io.BytesIO(PNGS[i])).convert("RGB")
        finally:
            self.reading.release()


def test_one_thread_means_no_reads_at_once(dali: None) -> None:
    dataset: Any = Exclusive()
    train, val = (open_source(torch.utils.data.Subset(dataset, list(part))) for part in (range(20), range(10)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for name in ("threaded", "dali"):
            loader = loader_of(train, config_of(name, plain(SIZE), threads=1))
            for _ in range(5):
                next(loader)
                list(eval_batches(val, Preprocessing(crop=SIZE), 4, threads=1))
                train.load(0)
            loader.close()
    finally:
        sys.setswitchinterval(interval)
    assert dataset.num_overlaps == 0
    with pytest.raises(SourceError, match=r"Exclusive\[\d+\] must be the same image when several threads"):
        views_of(train, threads=2)


def test_random_dataset_is_refused() -> None:
    generator = np.random.default_rng(0)
    noise = Indexed(lambda i: generator.integers(0, 256, (4, 6, 3), dtype=np.uint8), 20)
    with pytest.raises(SourceError, match=r"Indexed\[0\] must be the same image each time it is read.*random transf"):
        views_of(open_source(noise), threads=2)


def test_thread_safe_dataset_is_compared_once() -> None:
    reads: list[int] = []

    def item(i: int) -> Any:
        reads.append(i)
        return PICTURES[i]

    source = open_source(Indexed(item, len(PICTURES)))
    views = views_of(source, threads=2)
    assert all(np.array_equal(view, PICTURES[i]) for i, view in views.items())
    reads.clear()
    assert len(list(eval_batches(source.subset(np.arange(3)), Preprocessing(crop=SIZE), 8, threads=2))) == 1
    assert sorted(reads) == [0, 1, 2]


def test_corrupt_items_are_no_difference() -> None:
    source = open_source(Indexed(lambda i: PICTURES[i] if i != 10 else 1 // 0, len(PICTURES)))
    with pytest.raises(CorruptImageError, match=r"Indexed\[10\] cannot be read \(ZeroDivisionError"):
        views_of(source, threads=2)
