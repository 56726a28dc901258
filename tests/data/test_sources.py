"""Folders, arrays, datasets: what is taken, how it is numbered, and what is said when it cannot be."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast.config import Config, ConfigError, DataConfig, KNNConfig
from byol_fast.data import SourceError, open_source, open_train_val
from byol_fast.data.sources import ArraySource, FileSource
from byol_fast.data.sources.base import evenly_spaced
from byol_fast.training.knn_monitor import knn_problem


def put(root: Path, *names: str) -> Path:
    """Write small images of different colors."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)).save(path, format="png")
    return root


def files_of(root: object) -> FileSource:
    source = open_source(root)
    assert isinstance(source, FileSource)
    return source


def arrays_of(root: object) -> ArraySource:
    source = open_source(root)
    assert isinstance(source, ArraySource)
    return source


def labels_of(source: FileSource | ArraySource) -> list[int]:
    assert source.labels is not None and source.labels.dtype == np.int64
    return [int(label) for label in source.labels]


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "dog/2.png", "dog/1.JPG", "cat/deep/er/x.webp", "cat/a.tiff", "ant/z.bmp")
    source = files_of(tmp_path)
    assert source.paths == ("ant/z.bmp", "cat/a.tiff", "cat/deep/er/x.webp", "dog/1.JPG", "dog/2.png")
    assert source.classes == ("ant", "cat", "dog")
    assert labels_of(source) == [0, 1, 1, 2, 2]
    assert "5 images of 3 classes" in source.describe()
    assert np.asarray(source.load(0))[0, 0].tolist() == [4, 8, 251]


@pytest.mark.parametrize(
    "names",
    [("b.png", "a.png"), ("photos/b.png", "photos/2020/a.png"), ("a.png", "b.png", "cat/a.png", "dog/b.png")],
    ids=["flat", "one folder", "images beside folders"],
)
def test_folder_without_classes_has_no_labels(names: tuple[str, ...], tmp_path: Path) -> None:
    source = files_of(put(tmp_path, *names))
    assert source.paths == tuple(sorted(names))
    assert source.labels is None and source.classes == ()


def test_non_image_files_are_ignored_and_logged(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, "a/1.png", "b/\u732b \U0001f408.png", "a/.hidden.png", ".cache/2.png")
    (tmp_path / "a" / "movie.gif").write_bytes(b"GIF89a")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    source = files_of(tmp_path)
    assert source.paths == ("a/1.png", "b/\u732b \U0001f408.png")
    assert source.ignored == 3 and sorted(source.ignored_examples) == ["README", "a/movie.gif", "notes.txt"]
    assert "3 files that are not images" in caplog.text and "a/movie.gif" in caplog.text


def test_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png", "2.png")
    put(tmp_path / "data", "a/0.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert files_of(tmp_path / "data").paths == ("a/0.png", "b/1.png", "b/2.png")


def test_file_fingerprint_covers_names_not_sizes(tmp_path: Path) -> None:
    put(tmp_path / "one", "a/1.png", "b/2.png")
    put(tmp_path / "copy", "a/1.png", "b/2.png")
    first, copy = files_of(tmp_path / "one"), files_of(tmp_path / "copy")
    assert copy.fingerprint == first.fingerprint and copy.sizes == first.sizes
    with (tmp_path / "copy" / "a" / "1.png").open("ab") as file:
        file.write(b"x")
    grown = files_of(tmp_path / "copy")
    assert grown.fingerprint == first.fingerprint
    assert grown.sizes == (first.sizes[0] + 1, first.sizes[1])
    (tmp_path / "copy" / "a" / "1.png").rename(tmp_path / "copy" / "a" / "3.png")
    assert files_of(tmp_path / "copy").fingerprint != first.fingerprint


@pytest.mark.parametrize("shape", [(6, 8, 9), (6, 8, 9, 1), (6, 1, 8, 9), (6, 8, 9, 3), (6, 3, 8, 9)])
@pytest.mark.parametrize("kind", ["numpy", "torch", "npz"])
def test_array_layouts_are_converted(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=x)
    given = {"numpy": x, "torch": torch.from_numpy(x), "npz": str(tmp_path / "x.npz")}[kind]
    source = arrays_of(given)
    expected = x[..., None] if x.ndim == 3 else x if shape[-1] in {1, 3} else x.transpose(0, 2, 3, 1)
    assert source.images.shape == (6, 8, 9, 3) and source.images.flags.c_contiguous
    assert np.array_equal(source.images, np.broadcast_to(expected, source.images.shape))
    assert source.labels is None


def test_npz_with_labels_and_classes(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "named.npz", images=images, labels=[0, 1, 1, 0], classes=["cat", "dog"])
    np.savez(tmp_path / "numbered.npz", images=images, labels=np.array([2, 1, 1, 0], np.uint8))
    np.savez(tmp_path / "unlabeled.npz", images=images, labels=[0, -1, 1, 0])
    assert arrays_of(tmp_path / "named.npz").classes == ("cat", "dog")
    assert arrays_of(tmp_path / "numbered.npz").classes == ("0", "1", "2")
    assert labels_of(arrays_of(tmp_path / "numbered.npz")) == [2, 1, 1, 0]
    assert arrays_of(tmp_path / "unlabeled.npz").labels is None


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([2.0, 0.0, 2.0], np.float32), ["2", "0", "2"]),
        (np.array([True, False, True]), ["True", "False", "True"]),
        (np.array([[7], [3], [7]], np.uint8), ["7", "3", "7"]),
        (np.array([7, 10, 7], ">i4"), ["7", "10", "7"]),
        (np.array(["dog", "cat", "dog"]), ["dog", "cat", "dog"]),
        (np.array([b"dog", b"cat", b"dog"]), ["dog", "cat", "dog"]),
        (np.array([["01"], ["1"], ["01"]]), ["01", "1", "01"]),
    ],
    ids=["floats", "booleans", "column", "big-endian", "names", "bytes", "column of names"],
)
def test_npz_labels_of_every_type_are_read(labels: Any, names: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.NPZ.npz", images=np.zeros((3, 4, 5, 3), np.uint8), labels=labels)
    source = open_source((tmp_path / "x.NPZ.npz").rename(tmp_path / "x.NPZ"))
    assert source.labels is not None and [source.classes[y] for y in source.labels] == names


def test_npz_labels_that_are_not_read_are_named(tmp_path: Path) -> None:
    path, images = tmp_path / "x.npz", np.zeros((3, 4, 5, 3), np.uint8)
    np.savez(path, images=images, targets=[0, 1, 0])
    assert open_source(path).label_problem == f"{path} has no array `labels` (it has images, targets)"
    for labels in ([0.5, 1.0, 2.0], [np.nan, 1.0, 2.0], [1e300, 1.0, 2.0], np.eye(3), ["a", "b"]):
        np.savez(path, images=images, labels=labels)
        with pytest.raises(SourceError, match="labels must be 3 integers, one per image, got "):
            open_source(path)
    np.savez(path, images=images, labels=[0, 1, 0], classes=[b"cat", b"dog"])
    assert open_source(path).classes == ("cat", "dog")
    with path.open("wb") as file:
        np.save(file, images)
    with pytest.raises(SourceError, match=r"cannot be read as a \.npz file \(it is not a zip archive\); save it with"):
        open_source(path)


def test_array_fingerprint_covers_every_byte() -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    y = x.copy()
    assert arrays_of(x).fingerprint == arrays_of(y).fingerprint
    y[-1, -1, -1, -1] ^= 1
    assert arrays_of(x).fingerprint != arrays_of(y).fingerprint
    assert arrays_of(x).fingerprint != arrays_of(x.reshape(6, 9, 8, 3)).fingerprint


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16])
def test_array_source_of_another_dtype_is_refused(dtype: type[Any]) -> None:
    images: Any = np.ones((4, 8, 8, 3), dtype)
    with pytest.raises(SourceError, match=f"array: must be uint8 in 0..255, got {np.dtype(dtype)}; convert it"):
        ArraySource(images)


def test_error_messages(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "file.doc").write_text("x")
    (tmp_path / "photos.tar.gz").write_text("x")
    (tmp_path / "broken.npz").write_bytes(b"PK not a zip")
    np.savez(tmp_path / "other.npz", pictures=images)
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**59, 8)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + images.tobytes())
    np.savez(tmp_path / "short.npz", images=images, labels=[0, 1])
    np.savez(tmp_path / "names.npz", images=images, labels=[0, 1, 2, 3], classes=["a", "b"])
    cases: list[tuple[object, str]] = [
        (tmp_path / "no" / "such", rf"does not exist; give a folder .*that exists is {tmp_path}\)"),
        (tmp_path / "empty", r"no images in .*empty or below \(no files at all\); expected files that end in \.jpg"),
        (tmp_path / "texts", r"only 1 x \.txt"),
        (tmp_path / "file.doc", "is a file of an unknown kind; give a folder of images, a list"),
        (tmp_path / "photos.tar.gz", "is a file of an unknown kind; unpack it first"),
        (tmp_path / "broken.npz", "cannot be read as a .npz file"),
        (tmp_path / "objects.npz", "must be uint8 in 0..255, got object"),
        (tmp_path / "huge.npz", "huge.npz must be a .npz file whose arrays fit the memory"),
        (tmp_path / "other.npz", r"no array `images` \(it has pictures\); save it with numpy.savez"),
        (tmp_path / "short.npz", "labels must be 4 integers, one per image, got int64 of shape"),
        (tmp_path / "names.npz", "labels must be below the number of class names, 2, got 3"),
        (images.astype(np.float32) / 255, "must be uint8 in 0..255, got float32; convert it"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"with C = 1 or 3, got \[4, 8, 8, 4\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "has no images"),
        (3.5, "expected a folder, a list of files.* got float"),
    ]
    for root, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            open_source(root, arg_name="data.root")
        assert str(caught.value).startswith("data.root: ")


# ---- training and validation images --------------------------------------------------------------------------------


def run(root: Path | None, **knn: Any) -> Config:
    return Config(data=DataConfig(root=root), knn=KNNConfig(**knn))


def test_validation_labels_are_numbered_as_the_training_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "val/a/5.png")
    train, val = open_train_val(run(tmp_path))
    assert isinstance(val, FileSource) and val.paths == ("a/5.png", "c/4.png")
    assert val.classes == train.classes and labels_of(val) == [0, 2]


def test_folder_with_train_only_has_no_validation_images(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/2.png")
    train, val = open_train_val(run(tmp_path))
    assert train.classes == ("a", "b") and val is None


def test_train_folder_beside_other_files_is_used_alone(tmp_path: Path, caplog: Any) -> None:
    """As datasets are handed around: notes, archives, development kits, images without labels, a sample picture."""
    put(tmp_path, "train/a/1.png", "train/b/2.png", "unlabeled/x/3.png", "sample.png")
    (tmp_path / "devkit" / "data").mkdir(parents=True)
    (tmp_path / "devkit.tar.gz").write_text("x")
    caplog.set_level("INFO")
    train, val = open_train_val(run(tmp_path))
    assert isinstance(train, FileSource) and train.paths == ("a/1.png", "b/2.png") and val is None
    assert "only train is used, not devkit, devkit.tar.gz, sample.png, unlabeled" in caplog.text


def test_train_folder_beside_class_folders_is_a_class(tmp_path: Path) -> None:
    put(tmp_path, "car/1.png", "plane/2.png", "train/3.png")
    train, val = open_train_val(run(tmp_path))
    assert train.classes == ("car", "plane", "train") and len(train) == 3 and val is None


def test_separate_validation_folder(tmp_path: Path) -> None:
    put(tmp_path, "mine/a/1.png", "mine/b/2.png", "check/b/3.png", "check/a/4.png", "alien/x/1.png", "alien/y/2.png")
    _, val = open_train_val(run(tmp_path / "mine", val_root=tmp_path / "check"))
    assert val is not None and val.labels is not None and val.labels.tolist() == [0, 1]
    with pytest.raises(SourceError, match="2 of 2 validation classes are not among the training classes"):
        open_train_val(run(tmp_path / "mine", val_root=tmp_path / "alien"))
    with pytest.raises(SourceError, match=r"knn\.val_root: .* does not exist"):
        open_train_val(run(tmp_path / "mine", val_root=tmp_path / "nothing"))


def test_unknown_validation_classes_are_dropped_with_automatic_knn(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, "train/a/1.png", "train/b/2.png", "test/x/1.png", "test/y/2.png")
    _, val = open_train_val(run(tmp_path))
    assert val is not None and val.labels is None
    assert "not among the training classes" in caplog.text
    with pytest.raises(SourceError, match="not among the training classes"):
        open_train_val(run(tmp_path, enabled="on"))


def test_npz_with_validation_images(tmp_path: Path) -> None:
    images = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8)
    np.savez(tmp_path / "x.npz", images=images[:4], labels=[0, 1, 0, 1], val_images=images[4:], val_labels=[1, 0])
    train, val = open_train_val(run(tmp_path / "x.npz"))
    assert isinstance(train, ArraySource) and isinstance(val, ArraySource)
    assert np.array_equal(val.images[..., 0], images[4:]) and labels_of(val) == [1, 0]


def test_missing_data_root_is_rejected() -> None:
    with pytest.raises(SourceError, match=r"data\.root must be set, got None; give --data\.root FOLDER"):
        open_train_val(run(None))


def test_demo_data() -> None:
    train, val = open_train_val(Config(data=DataConfig(builtin="demo")))
    assert isinstance(train, ArraySource) and isinstance(val, ArraySource)
    assert train.images.shape == (10_000, 28, 28, 3) and val.images.shape == (2_000, 28, 28, 3)
    assert np.bincount(labels_of(train)).tolist() == [1000] * 10
    assert np.bincount(labels_of(val)).tolist() == [200] * 10
    assert train.classes == val.classes and train.classes[9] == "Ankle boot"
    # real images, each one once, and none of the validation's among them
    seen = {image.tobytes() for image in train.images}
    assert len(seen) > 9_990
    assert len(seen & {image.tobytes() for image in val.images}) < 5
    assert 70 < train.images.mean() < 76  # Fashion-MNIST's mean is 72.9
    import byol_fast.data

    folder = Path(byol_fast.data.__file__).parent / "demo"
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 6_000_000
    assert "Copyright (c) 2017 Zalando SE" in (folder / "LICENSE-fashion-mnist.txt").read_text()


def test_cifar10_without_network_is_explained(tmp_path: Path, monkeypatch: Any) -> None:
    """Without a network: a clear error for an empty cache; a file that is not CIFAR-10 is not taken for it."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    config = Config(data=DataConfig(builtin="cifar10", cache=tmp_path))
    advice = rf"give --data\.root FOLDER, or put cifar-10-python\.tar\.gz into {tmp_path}"
    with pytest.raises(SourceError, match=advice):
        open_train_val(config)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz"):
        pass
    with pytest.raises(SourceError, match=advice):
        open_train_val(config)


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (("a/1.png", "b/2.png"), None, "there are no validation images: set knn.val_root, or give a root with train"),
        (("1.png", "2.png"), ("a/1.png", "b/2.png"), "the training images have no labels: sort them into one folder"),
        (("a/1.png", "b/2.png"), ("1.png",), "the validation images have no labels: sort them into one folder"),
    ],
)
def test_knn_without_labels_names_the_unlabeled_images(
    train: tuple[str, ...], val: tuple[str, ...] | None, said: str, tmp_path: Path
) -> None:
    training = open_source(put(tmp_path / "train", *train))
    validation = None if val is None else open_source(put(tmp_path / "val", *val))
    assert said in (knn_problem(run(tmp_path, enabled="auto"), training, validation) or "")
    with pytest.raises(ConfigError, match=f"knn.enabled is 'on', but {said}"):
        knn_problem(run(tmp_path, enabled="on"), training, validation)


@pytest.mark.parametrize("num_items", [0, 1, 5, 16, 1001])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_evenly_spaced_positions(num_items: int, count: int) -> None:
    """The first item, or the middle one, of each of `count` equal parts."""
    first, middle = (evenly_spaced(num_items, count, centered=centered).tolist() for centered in (False, True))
    parts = min(num_items, count)
    assert first == [k * num_items // parts for k in range(parts)]
    assert middle == [(2 * k + 1) * num_items // (2 * parts) for k in range(parts)]
    assert evenly_spaced(num_items, count).dtype == np.int64
