"""Folders as people have them: parts of a data set, hidden and system folders, stray images, links, odd roots."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from byol_fast.config import Config, DataConfig, KNNConfig
from byol_fast.data import ImageSource, SourceError, open_source, open_train_val
from byol_fast.data.sources import FileSource, TarSource
from byol_fast.data.sources.base import labels_from_folders
from tests.data.kinds import options, write_tar


def put(root: Path, *names: str) -> Path:
    """Write files whose contents are their names, folders (`a/`), links (`a -> target`) and tars of one image."""
    for line in names:
        name, _, target = line.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir()
        elif name.endswith(".tar"):
            write_tar(path, [(f"{path.stem}.jpg", name.encode())])
        else:
            path.write_text(name)
    return root


def classes_in(folder: str, *classes: str) -> list[str]:
    return [f"{folder}/{name}/{i}.jpg" for name in classes or ("ant", "bee") for i in range(2)]


def run(root: Path, **knn: Any) -> Config:
    return Config(data=DataConfig(root=root, cache=root.parent / "cache"), knn=KNNConfig(**knn))


def contents(source: ImageSource | None) -> list[str]:
    assert isinstance(source, FileSource | TarSource)
    return [source.read(i).decode() for i in range(len(source))]


def assert_same_as_torchvision(source: ImageSource | None, folder: Path) -> None:
    expected = ImageFolder(folder)
    assert isinstance(source, FileSource) and source.labels is not None
    assert [str(source.path(i)) for i in range(len(source))] == [path for path, _ in expected.samples]
    assert source.labels.tolist() == expected.targets and list(source.classes) == expected.classes


# ---- parts of a data set -------------------------------------------------------------------------------------------

PARTS = [
    ("train", "val"), ("train", "validation"), ("train", "valid"), ("train", "test"), ("train", "dev"),
    ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("Training", "Validation"), ("train", "eval"),
    ("train2017", "val2017"), ("training_set", "test_set"), ("train_images", "test_images"), ("trainset", "testset"),
]  # fmt: skip


@pytest.mark.parametrize(("train", "val"), PARTS)
def test_parts_are_recognized_by_their_usual_names(train: str, val: str, tmp_path: Path) -> None:
    """Folders of images, shards, and folders of shards."""
    root = put(tmp_path / "images", *classes_in(train), *classes_in(val), "README", "labels/1.txt")
    sources = open_train_val(run(root))
    assert_same_as_torchvision(sources[0], root / train)
    assert_same_as_torchvision(sources[1], root / val)
    assert open_train_val(run(root, enabled="off"))[1] is None
    assert open_train_val(run(tmp_path), data=str(root))[0].fingerprint == sources[0].fingerprint

    shards = [[f"x-{train}-{i}.tar" for i in range(2)], [f"x-{val}-0.tar"]]
    sources = open_train_val(run(put(tmp_path / "shards", *shards[0], *shards[1])))
    assert [contents(source) for source in sources] == shards
    shards = [[f"x/{train}/{i}.tar" for i in range(2)], [f"x/{val}/0.tar"]]
    sources = open_train_val(run(put(tmp_path / "folders", *shards[0], *shards[1])))
    assert [contents(source) for source in sources] == shards


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train2017", "val2014", "val2017"], "train2017", "val2017"),
        (["train", "test", "test1", "val"], "train", "val"),
        (["train", "validation", "trainval", "testing"], "train", "validation"),
        (["train", "unlabeled", "train_extra"], "train", None),
    ],
)
def test_preferred_parts(names: list[str], train: str, val: str | None, tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, *(image for name in names for image in classes_in(name)))
    sources = open_train_val(run(tmp_path))
    left_out = [f"{tmp_path}: only train is used, not train_extra, unlabeled"] if val is None else []
    assert [record.message for record in caplog.records if "only" in record.message] == left_out  # warnings
    assert_same_as_torchvision(sources[0], tmp_path / train)
    if val is None:
        assert sources[1] is None
    else:
        assert_same_as_torchvision(sources[1], tmp_path / val)


@pytest.mark.parametrize(
    ("above", "others"),
    [
        ("data", []),
        ("ILSVRC/Data/CLS-LOC", ["ILSVRC/Annotations/CLS-LOC/train/1.xml", "ILSVRC/Data/CLS-LOC/test/1.jpg", "x.csv"]),
        ("chest_xray", ["__MACOSX/chest_xray/._1.jpg", *classes_in("chest_xray/chest_xray/train")]),
        ("x", ["lost -> nothing", "y/1.txt"]),
    ],
)
def test_parts_in_a_folder_that_holds_all_images(above: str, others: list[str], tmp_path: Path) -> None:
    put(tmp_path, *classes_in(f"{above}/train"), *classes_in(f"{above}/val"), *others)
    sources = open_train_val(run(tmp_path))
    assert_same_as_torchvision(sources[0], tmp_path / above / "train")
    assert_same_as_torchvision(sources[1], tmp_path / above / "val")


def test_linked_part_is_the_same_part(tmp_path: Path) -> None:
    put(tmp_path, "train -> train2017", *classes_in("train2017"), *classes_in("val2017"))
    assert_same_as_torchvision(open_train_val(run(tmp_path))[0], tmp_path / "train2017")


@pytest.mark.parametrize(
    ("folders", "shown", "train", "val"),
    [
        (["train", "training", "val"], "train, training, val", "train", "val"),
        (["Train", "train"], "Train, train", "Train", None),
        (["train2014", "train2017", "val2017"], "train2014, train2017, val2017", "train2014", "val2017"),
        (["val", "test"], "test, val", "test", "val"),
        (["train_a", "val_a"], "train_a, val_a", "train_a", "val_a"),
        (["trainA", "trainB", "testA", "testB"], "testA, testB, trainA, trainB", "trainA", "testA"),
        (["cars_train", "cars_test"], "cars_test, cars_train", "cars_train", "cars_test"),
        (["trainval", "test"], "test, trainval", "trainval", "test"),
        (["x_test", "x_train", "x_val", "y"], "x_test, x_train, x_val, y", "x_train", "x_val"),
        (["large_data", "large_test", "large_val"], "large_data, large_test, large_val", "large_data", "large_val"),
        (["a/x/Train", "a/x/train"], "Train, train", "a/x/Train", None),
        (["data_256", "test_256", "val_256"], "data_256, test_256, val_256", "data_256", "val_256"),
    ],
)
def test_ambiguous_parts_are_a_question(
    folders: list[str], shown: str, train: str, val: str | None, tmp_path: Path
) -> None:
    """The two ways that the message shows lead on."""
    root = tmp_path / "x"
    put(root, *(name for folder in folders for name in ([folder] if folder[-1] == "/" else classes_in(folder))))
    with pytest.raises(SourceError) as caught:
        open_train_val(run(root))
    message = str(caught.value)
    assert f"seem to be parts of a data set ({shown}), and it is not clear which to train on" in message
    one = f"set data.root to that one, such as {root / train}" + (f", and knn.val_root to {root / val}" if val else "")
    assert f"{one}; or, to train on all of them, set data.root to a list of the images (.txt)" in message
    assert_same_as_torchvision(open_train_val(run(root / train))[0], root / train)
    images = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    (root / "all.txt").write_text("\n".join(images))
    assert contents(open_train_val(run(root / "all.txt"))[0]) == images


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["val-0.tar", "test-0.tar"], r"\(val-0\.tar, test-0\.tar\), .* pattern of those, such as .*/\*\.tar for all"),
        (["0.tar", "Test/0.tar"], r"\(Test/0\.tar, 0\.tar\), "),
        (["trainval.tar", "test.tar"], r"\(test\.tar, trainval\.tar\), "),
    ],
)
def test_ambiguous_shards_are_a_question(names: list[str], advice: str, tmp_path: Path) -> None:
    put(tmp_path / "x", *names)
    with pytest.raises(SourceError, match=f"the shards in {tmp_path}/x seem to be parts of a data set {advice}"):
        open_train_val(run(tmp_path / "x"))


def test_archive_of_parts_is_a_question(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"") for name in [*classes_in("x/train"), *classes_in("x/test")]])
    with pytest.raises(SourceError, match=r"in .*a\.tar/x seem to be parts .*\(test, train\).*; unpack them, and set"):
        open_train_val(run(path))
    assert len(open_source(path, options=options(tmp_path / "cache"))) == 8


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "train"),
        ("car", "crash_test", "freight_train"),
        ("car", "test"),
        ("freight_train", "steam_train"),
        ("train1", "train2", "train3"),
        ("test", "testament", "trainer"),
    ],
)
def test_classes_with_the_names_of_parts_are_classes(classes: tuple[str, ...], tmp_path: Path, caplog: Any) -> None:
    put(tmp_path / "x", *(f"{name}/{i}.jpg" for name in classes for i in range(2)))
    train, val = open_train_val(run(tmp_path / "x"))
    assert_same_as_torchvision(train, tmp_path / "x")
    assert val is None
    usual = [name for name in classes if re.fullmatch(r"(train|test)\d*", name)]
    expected = [f"{tmp_path}/x: classes, not parts of a data set: {', '.join(usual)}"] if usual else []
    assert [record.message for record in caplog.records] == expected


def test_parts_in_class_folders_are_reported(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, *(f"{name}/{part}/1.jpg" for name in ("bottle", "cable") for part in ("train", "test")))
    assert open_train_val(run(tmp_path))[0].classes == ("bottle", "cable")
    assert "images of all parts are used (test, train in bottle, and others)" in caplog.text


@pytest.mark.parametrize("above", ["", "all/"])
def test_classes_with_the_same_subfolders_are_reported(above: str, tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, *(f"{above}{part}/{name}/1.jpg" for part in ("trn", "tst") for name in ("ant", "bee")))
    assert open_train_val(run(tmp_path))[0].classes == ("trn", "tst")
    assert "the classes trn, tst have the same subfolders (ant, bee); if they are parts" in caplog.text
    caplog.clear()
    put(tmp_path, f"{above}tst/cat/1.jpg")
    assert open_train_val(run(tmp_path))[0].classes == ("trn", "tst") and not caplog.records


@pytest.mark.parametrize("name", ["train", "Train"])
def test_empty_training_folder_is_an_error(name: str, tmp_path: Path) -> None:
    put(tmp_path, f"{name}/1.txt", *classes_in("val"))
    with pytest.raises(SourceError, match=rf"no images in .*/{name} or below \(only 1 x \.txt\)"):
        open_train_val(run(tmp_path))


@pytest.mark.parametrize("name", ["train", "val"])
def test_broken_link_to_a_part_is_an_error(name: str, tmp_path: Path) -> None:
    """Such as one to a disk that is not there; a part that is not used may be one."""
    put(tmp_path, f"{name} -> nothing", "test -> nothing", *classes_in({"train": "val", "val": "train"}[name]))
    with pytest.raises(SourceError, match=f"/{name} is a broken link"):
        open_train_val(run(tmp_path))
    (tmp_path / name).unlink()
    put(tmp_path, *classes_in(name))
    assert_same_as_torchvision(open_train_val(run(tmp_path))[1], tmp_path / "val")


def test_folders_of_code_are_not_parts(tmp_path: Path) -> None:
    put(tmp_path, "training/main.py", "eval/main.py", *classes_in("."))
    assert open_train_val(run(tmp_path))[0].classes == ("ant", "bee")
    put(tmp_path, *classes_in("train"))
    train, val = open_train_val(run(tmp_path))
    assert_same_as_torchvision(train, tmp_path / "train")
    assert val is None


# ---- hidden and system folders, stray images -----------------------------------------------------------------------

CLUTTER = [
    ".trash/1.jpg", ".git/objects/1.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/ant/._0.jpg",
    "#recycle/1.jpg", "@Recently-Snapshot/1/ant/0.jpg", "$RECYCLE.BIN/1.jpg", "System Volume Information/1.jpg",
    "lost+found/1.jpg", "ant/.ipynb_checkpoints/0.jpg", "bee/@EADIR/1.jpg", "ant/._0.jpg",
]  # fmt: skip


@pytest.mark.parametrize("top", ["photos", ".photos"])
def test_hidden_and_system_folders_are_left_out(top: str, tmp_path: Path, caplog: Any) -> None:
    """From folders and archives, whose own name does not matter."""
    root = put(tmp_path / top, *classes_in("."))
    expected = ImageFolder(root)
    names = [os.path.relpath(path, root) for path, _ in expected.samples]
    put(root, *CLUTTER, ".DS_Store", "ant/Thumbs.db", ".shards/0.tar", "@eaDir/0.tar")
    caplog.set_level("INFO")
    source = open_source(root)
    assert contents(source) == [f"./{name}" for name in names]
    assert source.classes == ("ant", "bee") and source.labels is not None
    assert source.labels.tolist() == expected.targets
    assert "13 hidden or system folders and files are left out, such as " in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING" and "Thumbs" not in record.message]

    caplog.clear()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root, top)
    packed = open_source(tmp_path / "a.tar", options=options(tmp_path / "cache"))
    assert isinstance(packed, TarSource) and sorted(packed.names) == [f"{top}/{name}" for name in names]
    assert packed.classes == ("ant", "bee")
    assert "10 hidden or system folders and files are left out" in caplog.text


def test_hidden_folders_alone_are_named(tmp_path: Path) -> None:
    put(tmp_path / "x", ".images/1.jpg", "@eaDir/2.jpg")
    with pytest.raises(SourceError, match=r"no images in .* or below \(no files at all; hidden: 2, such as \.images\)"):
        open_source(tmp_path / "x")
    path = write_tar(tmp_path / "a.tar", [(".images/1.jpg", b""), ("@eaDir/2.jpg", b"")])
    with pytest.raises(SourceError, match=r"no images in .*a\.tar but in hidden folders, such as \.images/1\.jpg"):
        open_source(path, options=options(tmp_path / "cache"))


def test_shards_in_hidden_folders_are_left_out_and_links_followed(tmp_path: Path) -> None:
    put(tmp_path / "x", "0.tar", ".old/1.tar", "@eaDir/2.tar", "more -> ../y", "again -> ../y", "up -> ..")
    put(tmp_path / "y", "3.tar", "4.TAR/", "5.tar -> ../x/0.tar")
    assert contents(open_source(tmp_path / "x", options=options(tmp_path / "cache"))) == ["0.tar", "3.tar", "0.tar"]
    put(tmp_path / "y", "6.tar -> nothing")
    with pytest.raises(SourceError, match=r"must be files, got .*again/6\.tar, which is a broken link; .*\(1 of 4\)"):
        open_source(tmp_path / "x", options=options(tmp_path / "cache"))
    os.mkfifo(tmp_path / "z.tar")
    with pytest.raises(SourceError, match=r"must be files, got .*z\.tar, which is no regular file; .*\(1 of 1\)"):
        open_source(tmp_path / "z*.tar", options=options(tmp_path / "cache"))


@pytest.mark.parametrize("above", ["", "photos/", "photos/photos/"])
@pytest.mark.parametrize(
    ("num_stray", "num_others", "has_labels"),
    [(0, 2, True), (1, 2, True), (2, 38, False), (2, 39, True), (10, 190, False), (10, 191, True), (11, 9999, False)],
)
def test_few_images_beside_class_folders(
    above: str, num_stray: int, num_others: int, has_labels: bool, caplog: Any
) -> None:
    """One, or up to ten and fewer than 1 in 20."""
    others = [f"{above}{'ab'[i % 2]}/x/{i}.jpg" for i in range(num_others)]
    names = [f"{above}{i}.jpg" for i in range(num_stray)] + others
    used, (labels, classes, problem) = labels_from_folders(names, "title", names.__getitem__)
    if has_labels:
        assert [names[i] for i in used] == others and classes == ("a", "b")
        assert labels is not None and labels.tolist() == [i % 2 for i in range(num_others)]
        assert num_stray == 0 or f"{num_stray} of {len(names)} images lie beside the class folders" in caplog.text
        assert all(name in caplog.text for name in names[:num_stray])
    else:
        assert list(used) == list(range(len(names))) and labels is None and classes == ()
        assert problem in caplog.text
        assert problem.startswith(
            f"{num_stray} of {len(names):,} images have no label, such as {names[0]}: they lie beside 2"
        )


def test_stray_image_is_left_out_of_folders_and_archives(tmp_path: Path, caplog: Any) -> None:
    root = put(tmp_path / "x", *(f"{name}/{i}.jpg" for name in ("ant", "bee") for i in range(15)))
    expected = ImageFolder(root)
    put(root, "cover.jpg")
    source = open_source(root)
    assert isinstance(source, FileSource) and source.labels is not None
    assert [str(source.path(i)) for i in range(30)] == [path for path, _ in expected.samples]
    assert source.labels.tolist() == expected.targets and "left out (cover.jpg); to use" in caplog.text
    for top in ("x", "."):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(root, top)
        packed = open_source(tmp_path / "a.tar", options=options(tmp_path / "cache"))
        assert isinstance(packed, TarSource) and packed.labels is not None and packed.classes == ("ant", "bee")
        assert np.bincount(packed.labels).tolist() == [15, 15]
        assert {packed.read(i).decode() for i in range(30)} == set(contents(source))


# ---- links, empty folders, roots -----------------------------------------------------------------------------------


def test_folder_comes_before_links_to_it(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path / "x", "a_link -> z", "z/1.jpg", "b/2.jpg", "b/up -> ..", "c -> ../y", "d -> ../y/", "z/self -> .")
    put(tmp_path / "y", "3.jpg", "deep/4.jpg")
    source = open_source(tmp_path / "x")
    assert isinstance(source, FileSource)
    assert source.paths == ("b/2.jpg", "c/3.jpg", "c/deep/4.jpg", "z/1.jpg") and source.classes == ("b", "c", "z")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/x: 2 links to folders that are used already are left out (a_link, d)"
    ]


def test_folders_without_images_beside_classes_are_named(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, "x/a/1.jpg", "x/b/2.JPEG", "x/c/", "x/d/e/", "x/lost -> ../nothing", "x/b/foo.jpg/3.jpg", "x/.e/")
    source = open_source(tmp_path)
    assert isinstance(source, FileSource) and source.paths == ("x/a/1.jpg", "x/b/2.JPEG", "x/b/foo.jpg/3.jpg")
    assert source.classes == ("a", "b")
    assert f"{tmp_path}/x: 3 folders without images are no classes (c, d, lost)" in caplog.text


@pytest.mark.parametrize("root", ["data", "./data/", "../here/data", "~/data", "link", "outer", "outer/data/../", "~x"])
def test_spellings_of_a_root(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one folder above the classes, as archives are unpacked."""
    here = tmp_path / "here"
    put(here / "data", *classes_in("."))
    put(here, "link -> data", "~x -> data", "outer/data -> ../data")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    for source in (open_source(root), open_train_val(run(Path(root)))[0]):
        assert contents(source) == [f"./{name[2:]}" for name in classes_in(".")]
        assert source.classes == ("ant", "bee")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, r"cannot be read \(File name too long\)"),
        ("x\0y", "does not exist"),
        ("file.txt/x", "does not exist"),
        ("lost", "is a broken link"),
        ("loop", r"cannot be read \(Too many levels of symbolic links\)"),
        ("pipe", "is neither a file nor a folder"),
    ],
)
def test_unusable_roots_are_named(name: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, "file.txt", "lost -> nothing", "loop -> loop", "links/loop -> loop", "links/a/1.jpg")
    os.mkfifo(tmp_path / "pipe")
    for root in (lambda: open_source(tmp_path / name), lambda: open_train_val(run(tmp_path / name))):
        with pytest.raises(SourceError, match=re.escape(f"{tmp_path}/{name} ") + f"{message}; give a folder of images"):
            root()
    assert len(open_train_val(run(tmp_path / "links"))[0]) == 1
