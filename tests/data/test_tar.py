"""Tar shards: what is found in them, at which bytes, and what is said when it cannot be."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byol_fast.config import Config, DataConfig
from byol_fast.data import CorruptImageError, SourceError, open_source, open_train_val
from byol_fast.data.sources import EncodedSource, TarSource
from tests.data.conftest import photo_like
from tests.data.kinds import encoded, installed, options, write_tar

PICTURE = encoded(photo_like(1, 12, 16)[0])


def tars_of(root: object, cache: Path) -> TarSource:
    source = open_source(root, arg_name="data.root", options=options(cache))
    assert isinstance(source, TarSource)
    return source


def bodies(*names: str) -> list[tuple[str, bytes]]:
    """Members whose contents say who they are; `.cls` members hold the digits of their key."""
    return [(name, f"contents of {name}".encode()) for name in names]


def contents(source: EncodedSource) -> list[str]:
    return [source.read(i).decode().removeprefix("contents of ") for i in range(len(source))]


NAMES = st.text(st.characters(exclude_characters="/.\0\n", exclude_categories=["Cs"]), min_size=1, max_size=150)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, min_size=1, max_size=8, unique=True),
    sizes=st.lists(st.integers(1, 2000), min_size=8, max_size=8),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_are_read_as_written(names: list[str], sizes: list[int], form: int, tmp_path: Path) -> None:
    """Any names (long and foreign ones have headers of their own), any sizes, both dialects of tar."""
    rng = np.random.default_rng(sum(sizes))
    members = [(f"{name}.jpg", rng.bytes(size)) for name, size in zip(names, sizes, strict=False)]
    write_tar(tmp_path / "x.tar", members, format=form)
    source = tars_of(tmp_path / "x.tar", tmp_path / "cache")
    assert [(source.names[i], source.read(i)) for i in range(len(source))] == members


def test_samples_and_labels(tmp_path: Path) -> None:
    """Names agree up to the first dot: one image each, with its label; other members play no part."""
    write_tar(
        tmp_path / "a.tar",
        [
            *bodies("x/000.jpg"), ("x/000.cls", b"2\n"), *bodies("x/000.json", "x/000.seg.png"),
            ("y/000.cls", b"0"), *bodies("y/000.PNG", "._0.jpg", "y/.hidden.jpg"),
        ],
    )  # fmt: skip
    write_tar(tmp_path / "b.tar", [*bodies("1.img.png"), ("1.cls.txt", b" 1 "), *bodies("notes.txt")])
    source = tars_of(tmp_path, tmp_path / "cache")
    assert contents(source) == ["x/000.jpg", "y/000.PNG", "1.img.png"]
    assert source.labels is not None and source.labels.tolist() == [2, 0, 1]
    assert source.classes == ("0", "1", "2")
    assert source.sample_name(2) == f"{tmp_path / 'b.tar'}:1.img.png"
    assert "3 images of 3 classes" in source.describe()
    part = source.subset(np.array([2, 0]))
    assert contents(part) == ["1.img.png", "x/000.jpg"] and part.labels is not None and part.labels.tolist() == [1, 2]


def test_archive_of_class_folders_has_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", bodies("./photos/dog/1.jpg", "./photos/cat/2021.01.jpg", "./photos/cat/2021.02.jpg"))
    source = tars_of(tmp_path / "a.tar", tmp_path / "cache")
    assert contents(source) == ["./photos/dog/1.jpg", "./photos/cat/2021.01.jpg", "./photos/cat/2021.02.jpg"]
    assert source.labels is not None and source.labels.tolist() == [1, 0, 0] and source.classes == ("cat", "dog")
    write_tar(tmp_path / "a.tar", bodies("photos/./dog/1.jpg", "photos//cat/2.jpg", "/photos/./dog/3.jpg"))
    source = tars_of(tmp_path / "a.tar", tmp_path / "cache")
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1] and source.classes == ("cat", "dog")


@pytest.mark.parametrize("labels", [[b"dog", b"cat", b"dog"], [b"1", b"0", b"1"]], ids=["names", "numbers"])
def test_incomplete_labels_are_dropped(labels: list[bytes], tmp_path: Path, caplog: Any) -> None:
    members = [m for i, text in enumerate(labels) for m in (*bodies(f"{i}.jpg"), (f"{i}.cls", text))]
    write_tar(tmp_path / "a.tar", members)
    source = tars_of(tmp_path / "a.tar", tmp_path / "cache")
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1]
    write_tar(tmp_path / "a.tar", members[:-1])
    assert tars_of(tmp_path / "a.tar", tmp_path / "cache").labels is None
    assert "1 of 3 images have no label" in caplog.text


def test_names_with_dots_have_labels(tmp_path: Path, caplog: Any) -> None:
    """A label belongs to the image of the same whole name, or else to the sample; others are named."""
    members = [m for i in range(3) for m in (*bodies(f"x/img_0.{i}.jpg"), (f"x/img_0.{i}.cls", f"{2 - i}".encode()))]
    write_tar(tmp_path / "a.tar", [*members, *bodies("y.jpg"), ("y.cls", b"1"), *bodies("z.input.jpg", "z.cls.txt")])
    source = tars_of(tmp_path / "a.tar", tmp_path / "cache")
    names = [source.classes[y] for y in (source.labels if source.labels is not None else ())]
    assert names == ["2", "1", "0", "1", "contents of z.cls.txt"]
    assert not caplog.records
    write_tar(tmp_path / "a.tar", [*members, *bodies("im.input.jpg"), ("im.target.cls", b"1"), ("gone.CLS", b"1")])
    assert tars_of(tmp_path / "a.tar", tmp_path / "cache").labels is None
    assert "2 labels (.cls) are left out, because no image has their name, such as " in caplog.text
    assert "a.tar:im.target.cls (header at byte" in caplog.text


@pytest.mark.parametrize("extension", ["class", "json", "txt", "index"])
def test_labels_in_other_members_are_named(extension: str, tmp_path: Path) -> None:
    members = [m for i in range(3) for m in (*bodies(f"{i}.jpg"), (f"{i}.{extension}", b"1"))]
    path = write_tar(tmp_path / "a.tar", members)
    source = tars_of(path, tmp_path / "cache")
    assert source.labels is None
    reason = "has no labels (.cls) of its images, and no class folders"
    assert source.label_problem == f"{path} {reason} (other members: 3 x .{extension})"


@pytest.mark.parametrize(
    ("root", "found"),
    [
        ("train-{000..002}.tar", ["0", "1", "2"]),
        ("train-00{2,0}.tar", ["2", "0"]),
        ("train-*.tar", ["0", "1", "2"]),
        ("train-00[01].tar", ["0", "1"]),
        ("train-001.tar", ["1"]),
        (".", ["v", "0", "1", "2"]),
    ],
)
def test_shard_patterns(root: str, found: list[str], tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"train-00{i}.tar", bodies(f"{i}.jpg"))
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "val.tar", bodies("v.jpg"))
    assert contents(tars_of(tmp_path / root, tmp_path / "cache")) == [f"{name}.jpg" for name in found]


def test_index_is_reused_until_the_file_changes(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    path, cache = tmp_path / "a.tar", tmp_path / "cache"
    write_tar(path, bodies("1.jpg", "2.jpg"))
    first = tars_of(path, cache)
    assert "1 tar files indexed, 2 images" in caplog.text
    caplog.clear()
    assert contents(tars_of(path, cache)) == contents(first) and "indexed" not in caplog.text
    write_tar(path, bodies("3.jpg", "1.jpg", "2.jpg"))
    assert contents(tars_of(path, cache)) == ["3.jpg", "1.jpg", "2.jpg"]
    for stored in (cache / "tar").iterdir():
        stored.write_bytes(stored.read_bytes()[:100])
    assert contents(tars_of(path, cache)) == ["3.jpg", "1.jpg", "2.jpg"]
    cache.joinpath("tar").rename(cache / "elsewhere")
    (cache / "tar").write_text("not a folder")
    assert contents(tars_of(path, cache)) == ["3.jpg", "1.jpg", "2.jpg"]
    assert "could not be stored" in caplog.text


def test_tar_fingerprint_covers_names_and_order_not_sizes(tmp_path: Path) -> None:
    def fingerprint(*members: tuple[str, bytes], name: str = "a.tar") -> tuple[str, tuple[int, ...]]:
        source = tars_of(write_tar(tmp_path / name, members), tmp_path / "cache")
        return source.fingerprint, source.sizes

    one = fingerprint(("1.jpg", b"x"), ("2.jpg", b"yy"))
    assert one[1] == (1, 2)
    grown = fingerprint(("1.jpg", b"xx"), ("2.jpg", b"yy"))
    assert grown[0] == one[0] and grown[1] == (2, 2)
    others = [
        fingerprint(("2.jpg", b"yy"), ("1.jpg", b"x")),
        fingerprint(("1.jpg", b"x")),
        fingerprint(("1.jpg", b"x"), ("2.jpg", b"yy"), name="b.tar"),
    ]
    assert len({one[0], *(other[0] for other in others)}) == 4


def test_training_and_validation_shards(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("imagenet-train-01.tar", "more/imagenet-train-00.tar", "imagenet-val-00.tar", "imagenet-test-0.tar"):
        write_tar(tmp_path / name, [*bodies(f"{Path(name).stem}.jpg"), (f"{Path(name).stem}.cls", b"0")])
    train, val = open_train_val(Config(data=DataConfig(root=tmp_path, cache=tmp_path / "cache")))
    assert isinstance(train, TarSource) and isinstance(val, TarSource)
    assert contents(train) == ["imagenet-train-01.jpg", "imagenet-train-00.jpg"]
    assert contents(val) == ["imagenet-val-00.jpg"]


def test_train_and_val_folders_of_shards(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "0.tar", bodies(f"{part}.jpg"))
        (tmp_path / part / "nshards.txt").write_text("1")
    train, val = open_train_val(Config(data=DataConfig(root=tmp_path, cache=tmp_path / "cache")))
    assert isinstance(train, TarSource) and isinstance(val, TarSource)
    assert contents(train) == ["train.jpg"] and contents(val) == ["test.jpg"]


def test_tables_beside_archives_are_named(tmp_path: Path, caplog: Any) -> None:
    """As img2dataset writes them."""
    write_tar(tmp_path / "00000.tar", bodies("1.jpg"))
    (tmp_path / "00000.parquet").write_bytes(b"captions")
    assert contents(tars_of(tmp_path, tmp_path / "cache")) == ["1.jpg"]
    assert f"{tmp_path}: 1 .parquet files are not used, because there are .tar files" in caplog.text


def test_images_beside_archives_are_preferred(tmp_path: Path, caplog: Any) -> None:
    write_tar(tmp_path / "a.tar", bodies("1.jpg"))
    (tmp_path / "photo.jpg").write_bytes(PICTURE)
    assert len(open_source(tmp_path)) == 1 and not isinstance(open_source(tmp_path), TarSource)
    assert "1 x .tar" in caplog.text


def test_error_messages(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.jpg", PICTURE) for i in range(5)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2500])
    (tmp_path / "zeros.tar").write_bytes(b"x" * 5000)
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    (tmp_path / "lfs.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    write_tar(tmp_path / "texts.tar", bodies("1.txt"))
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    cases = [
        (
            "cut.tar",
            r"cut\.tar is damaged at byte 1536 \(images before it: 1\): the file ends at byte 2500, inside the member",
        ),
        ("zeros.tar", r"zeros\.tar is not a tar file, or damaged at byte 0"),
        ("packed.tar", r"packed\.tar is compressed, .* unpack it"),
        ("lfs.tar", r"lfs\.tar is a Git LFS pointer"),
        ("texts.tar", r"no images in .*texts\.tar; expected members that end in \.jpg.*, got 1 x \.txt$"),
        ("empty.tar", r"no images in .*empty\.tar"),
        ("none-{0..3}.tar", r"4 of 4 shards of .* do not exist, such as .*none-0\.tar"),
        ("none-*.tar", r"1 of 1 shards of .* do not exist"),
        ("none.tar", r"does not exist; give a folder"),
    ]
    for name, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            open_source(tmp_path / name, arg_name="data.root", options=options(tmp_path / "cache"))
        assert str(caught.value).startswith("data.root: ")


def test_changed_shard_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", PICTURE) for i in range(5)])
    source = tars_of(path, tmp_path / "cache")
    assert source.load(4).size == (16, 12)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CorruptImageError, match=r"a\.tar:4\.jpg lies beyond the end of its shard"):
        source.read(4)
    gone = tars_of(write_tar(tmp_path / "b.tar", [("1.jpg", PICTURE)]), tmp_path / "cache")
    (tmp_path / "b.tar").unlink()
    with pytest.raises(CorruptImageError, match=r"b\.tar:1\.jpg is in a shard that does not exist any more"):
        gone.read(0)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    for i in range(200):
        write_tar(tmp_path / f"{i:03d}.tar", bodies(f"{i}.jpg"))
    source = tars_of(tmp_path, tmp_path / "cache")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert contents(source) == [f"{i}.jpg" for i in range(200)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 128
    del source


@pytest.mark.peers
@pytest.mark.skipif(not installed("webdataset"), reason="webdataset is not installed")
def test_shards_written_by_webdataset(tmp_path: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{tmp_path}/train-%03d.tar", maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"dir/sample{i}", "jpg": PICTURE + bytes([i]), "cls": i % 3, "json": {"i": i}})
    source = tars_of(tmp_path / "train-{000..002}.tar", tmp_path / "cache")
    assert [source.read(i) for i in range(10)] == [PICTURE + bytes([i]) for i in range(10)]
    assert source.labels is not None and source.labels.tolist() == [i % 3 for i in range(10)]
