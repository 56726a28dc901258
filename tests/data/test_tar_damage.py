"""Damaged tar files: nothing behind a damage is lost silently."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from byol_fast.config import DataConfig
from byol_fast.data import SourceError, open_source
from byol_fast.data.sources import TarSource, tar_index, tar_members, tar_workers
from byol_fast.data.sources.tar_index import build_index
from tests.data.kinds import write_tar

BLOCK = 512
JPEG = b"\xff\xd8\xff"
Row = tuple[str, str | None, bytes]
"""Name, class and content of an image."""


def rows_of(path: Path, on_corrupt: Literal["raise", "skip"] = "raise") -> list[Row]:
    """The images of a file or folder of shards."""
    options = DataConfig(cache=path.parent / "cache", on_corrupt=on_corrupt)
    source = open_source(path, arg_name="data.root", options=options)
    assert isinstance(source, TarSource)
    labels = [None] * len(source) if source.labels is None else source.labels.tolist()
    classes = [None if label is None else source.classes[label] for label in labels]
    return [(source.names[i], classes[i], source.read(i)) for i in range(len(source))]


def images(num: int) -> list[tuple[str, bytes]]:
    """Members of 600 bytes: three blocks each, with their headers."""
    return [(f"{i}.jpg", JPEG + bytes([i]) * 597) for i in range(num)]


def flipped(data: bytes, offset: int, mask: int = 1) -> bytes:
    return data[:offset] + bytes([data[offset] ^ mask]) + data[offset + 1 :]


THIRD = 2 * 3 * BLOCK  # the third member's header
END = 5 * 3 * BLOCK
WHOLE = END + 2 * BLOCK


@pytest.mark.parametrize(
    ("change", "offset", "problem"),
    [
        (lambda b: flipped(b, THIRD + 10), THIRD, "the header is damaged (bad checksum)"),
        (lambda b: b[:THIRD] + bytes(BLOCK) + b[THIRD + BLOCK :], THIRD, f"data follows at byte {THIRD + BLOCK}"),
        (lambda b: b[:THIRD], THIRD, "the end marker, two blocks of zeros, is missing"),
        (lambda b: b[: THIRD + 100], THIRD, f"the file ends at byte {THIRD + 100}, inside a header"),
        (lambda b: b[: THIRD + 700], THIRD, f"the file ends at byte {THIRD + 700}, inside the member"),
        (lambda b: b[:END], END, "the end marker, two blocks of zeros, is missing"),
        (lambda b: b[: END + BLOCK], END, "the end marker, two blocks of zeros, is missing"),
        (lambda b: b + b, END, "unpack joined archives with tar --ignore-zeros"),
        (lambda b: b[:WHOLE] + b"x", END, f"data follows at byte {WHOLE}"),
        (lambda b: flipped(b, 10), 0, "the header is damaged (bad checksum)"),
    ],
    ids=["flip", "zeros", "cut", "cut header", "cut member", "no marker", "one block", "joined", "more", "first"],
)
def test_damage_is_named_and_images_before_it_are_used(
    change: Any, offset: int, problem: str, tmp_path: Path, caplog: Any
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    whole = write_tar(folder / "a.tar", images(5)).read_bytes()
    (folder / "a.tar").write_bytes(change(whole))
    write_tar(folder / "b.tar", [("other.jpg", JPEG)])
    before = images(offset // (3 * BLOCK))
    for _ in range(2):  # built, and from the cache
        with pytest.raises(SourceError) as caught:
            rows_of(folder)
        message = str(caught.value)
        assert message.startswith(f"data.root: {folder / 'a.tar'} is ") and problem in message
        assert f"at byte {offset} (images before it: {len(before)})" in message
        caplog.clear()
        assert [(name, data) for name, _, data in rows_of(folder, "skip")] == [*before, ("other.jpg", JPEG)]
        assert problem in caplog.text and f"at byte {offset} " in caplog.text and "is lost" in caplog.text


def test_all_damaged_shards_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "abc":
        write_tar(folder / f"{name}.tar", images(2))
    for name in "bc":
        (folder / f"{name}.tar").write_bytes((folder / f"{name}.tar").read_bytes()[: 3 * BLOCK])
    with pytest.raises(SourceError, match=r"b\.tar is damaged at byte 1536 .*\(2 of 3 shards are damaged\)"):
        rows_of(folder)


def test_repaired_shard_is_read_again(tmp_path: Path) -> None:
    """The command that the message names for an archive without an end marker."""
    path = write_tar(tmp_path / "a.tar", images(2))
    path.write_bytes(path.read_bytes()[: 6 * BLOCK])
    with pytest.raises(SourceError, match="head -c 10240 /dev/zero >> FILE"):
        rows_of(path)
    subprocess.run(f"head -c 10240 /dev/zero >> {path}", shell=True, check=True)
    assert [(name, data) for name, _, data in rows_of(path)] == images(2)


def labeled(prefix: str) -> list[tuple[str, bytes]]:
    """A webdataset: images, labels and other members."""
    kinds = [(f"{prefix}{i}", bytes([i])) for i in range(5)]
    return [
        m
        for k, b in kinds
        for m in ((f"{k}.jpg", JPEG + b), (f"{k}.cls", str(10 + b[0] % 3).encode()), (f"{k}.json", b))
    ]


def in_folders(prefix: str) -> list[tuple[str, bytes]]:
    classes = ("h\u00fcnd", "k\u00e4tze")
    return [(f"{prefix}{classes[i % 2]}/{i}.jpg", JPEG + bytes([i])) for i in range(6)]


@pytest.mark.parametrize(
    ("members", "form"),
    [
        (labeled("k"), tarfile.USTAR_FORMAT),
        (labeled("x" * 120), tarfile.GNU_FORMAT),
        (labeled("b\u00efld/\u72ac"), tarfile.PAX_FORMAT),
        (in_folders("b\u00eflder/"), tarfile.PAX_FORMAT),
    ],
    ids=["ustar", "GNU with long names", "PAX with foreign names", "PAX with foreign folders"],
)
def test_byte_flip_is_named_or_changes_one_image(
    members: list[tuple[str, bytes]], form: int, tmp_path: Path, caplog: Any
) -> None:
    """A flip in a header, or in a name that has no checksum, loses no other image and no other label silently."""
    path = write_tar(tmp_path / "a.tar", members, format=form)
    whole = path.read_bytes()
    expected = rows_of(path)
    assert not caplog.records and [row[2] for row in expected] == [data for _, data in members if data[:3] == JPEG]
    used = [offset for offset, byte in enumerate(whole) if byte]  # a flip in padding changes nothing
    rng = random.Random(0)
    outcomes = []
    for number in range(100):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(flipped(whole, rng.choice(used), rng.randrange(1, 256)))
        caplog.clear()
        try:
            rows = rows_of(path)
        except SourceError as error:
            assert f"{path} is " in str(error) and " at byte " in str(error)
            outcomes.append("named")
            continue
        if caplog.records:
            assert str(path) in caplog.text and " at byte " in caplog.text
            outcomes.append("named")
            continue
        assert len(rows) == len(expected)
        assert sum(row != other for row, other in zip(rows, expected, strict=True)) <= 1
        outcomes.append("one image")
    assert set(outcomes) == {"named", "one image"}


@pytest.mark.parametrize(
    ("text", "at", "byte", "problem"),
    [
        (b"path=", 4, b"X", "bad record"),
        (b"20 path=", 0, b"3", "bad record"),
        (b"size=600", 5, b"7", "size '700'"),
    ],
    ids=["equals sign", "length", "size"],
)
def test_damaged_extended_header_is_named(text: bytes, at: int, byte: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(5):
            info = tarfile.TarInfo(f"f\u00f6to/{i}.jpg")
            info.size, info.pax_headers = 600, {"size": "600", "mtime": "1234567890.123"}
            tar.addfile(info, io.BytesIO(JPEG * 200))
    whole = path.read_bytes()
    assert len(rows_of(path)) == 5
    start = 2 * 5 * BLOCK
    offset = whole.index(text, start) + at
    (tmp_path / "b.tar").write_bytes(whole[:offset] + byte + whole[offset + 1 :])
    with pytest.raises(SourceError, match=rf"at byte {start} \(images before it: 2\): .*{problem}"):
        rows_of(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("text", "at", "byte", "name"),
    [
        (b"f\xc3\xb6to/2", 4, b"_", "f\u00f6t_/2.jpg"),
        (b"path=", 1, b"e", "f?to/2.jpg"),
        (b"24 mtime=", 0, b"4", "f?to/2.jpg"),
    ],
    ids=["name", "keyword", "length that takes in the next record"],
)
def test_damaged_name_is_that_of_one_image(text: bytes, at: int, byte: bytes, name: str, tmp_path: Path) -> None:
    """The name in its own header is left, or none that could be told from a good one."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="ascii", errors="replace") as tar:
        for i in range(5):
            info = tarfile.TarInfo(f"f?to/{i}.jpg")
            info.size, info.pax_headers = 600, {"mtime": "1234567890.123", "path": f"f\u00f6to/{i}.jpg"}
            tar.addfile(info, io.BytesIO(JPEG + bytes([i]) * 597))
    whole = path.read_bytes()
    offset = whole.index(text, 2 * 5 * BLOCK) + at
    (tmp_path / "b.tar").write_bytes(whole[:offset] + byte + whole[offset + 1 :])
    rows = rows_of(tmp_path / "b.tar")
    assert [row[0] for row in rows] == [name if i == 2 else f"f\u00f6to/{i}.jpg" for i in range(5)]
    assert [row[2][3] for row in rows] == list(range(5))


def test_image_that_lost_its_name_is_reported(tmp_path: Path, caplog: Any) -> None:
    """Behind its first 100 bytes, a name has no checksum and no second copy."""
    path = write_tar(tmp_path / "a.tar", [(f"{'x' * 120}{i}.jpg", JPEG) for i in range(3)], format=tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    path = tmp_path / "b.tar"
    path.write_bytes(whole.replace(b"1.jpg\0", b"1.jqg\0"))
    assert [name[120:] for name, _, _ in rows_of(path)] == ["0.jpg", "2.jpg"]
    assert "1 members that seem to be images are left out, because their names are hidden or not those" in caplog.text
    assert f"{path}:{'x' * 120}1.jqg (header at byte 2048)" in caplog.text


def test_stray_image_is_reported(tmp_path: Path, caplog: Any) -> None:
    names = ["b\u00f6/cat/1.jpg", "b\u00f6/dog/2.jpg", "b\u00e4/dog/3.jpg"]
    path = write_tar(tmp_path / "a.tar", [(name, JPEG) for name in names])
    assert [label for _, label, _ in rows_of(path)] == ["b\u00f6", "b\u00f6", "b\u00e4"]
    assert f"only {path}:{names[2]} (header at byte 4096) is outside of the folder b\u00f6" in caplog.text


@pytest.mark.parametrize(
    "form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT], ids=["pax", "gnu", "ustar"]
)
def test_headers_are_read_as_by_tarfile(form: Literal[0, 1, 2], monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual headers are read without `tarfile`: changed in any byte, with and without its checksum, they are equal."""

    def members_of(data: bytes) -> object:
        try:
            return list(tar_members.read_members(io.BytesIO(data)))
        except tar_members.TarDamageError as error:
            return error.offset, error.problem

    archives = []
    for name in ("a/ü.jpg", "x" * 100, f"{'long/' * 25}name.jpg", "dot.", "folder/"):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uid = 3, 0o644, 1000
        info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # with a PAX header
        archives.append(info.tobuf(form, "utf-8", "surrogateescape") + b"abc".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    blocks = archives[0][-4 * BLOCK : -3 * BLOCK]
    for offset in range(BLOCK):
        for value in b"\0 7x\xff":
            changed = blocks[:offset] + bytes([value]) + blocks[offset + 1 :]
            total = sum(changed[:148]) + sum(changed[156:]) + 256
            signed = changed[:148] + b"%06o\0 " % total + changed[156:]
            archives += [block + archives[0][-3 * BLOCK :] for block in (changed, signed)]
    usual = [members_of(data) for data in archives]
    monkeypatch.setattr(tar_members, "_usual_header", lambda block: None)
    assert usual == [members_of(data) for data in archives]
    assert any(isinstance(members, tuple) for members in usual) and sum(members != [] for members in usual) > 100


def test_indexes_by_processes_are_those_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of damaged shards, and their errors."""
    shards = [write_tar(tmp_path / f"{i}.tar", images(3 + i)) for i in range(5)]
    shards[2].write_bytes(flipped(shards[2].read_bytes(), 3 * BLOCK + 5))
    monkeypatch.setattr(tar_workers, "THREAD_SECONDS", -1.0)
    read: list[int] = []
    with tar_workers.IndexBuilder(read.append, use_processes=True) as build:
        indexes = [build(shard) for shard in shards]
        with pytest.raises(FileNotFoundError, match="No such file"):
            build(tmp_path / "gone.tar")
        assert sum(read) == 0  # the first report is of the first member
        (process,) = build._processes
        process.kill()
        process.wait()
        indexes.append(build(shards[2]))  # by this process
    for shard, index in zip([*shards, shards[2]], indexes, strict=True):
        expected = build_index(shard)
        assert index.keys() == expected.keys()
        assert all(np.array_equal(index[name], values) for name, values in expected.items())
    assert str(indexes[2]["damage"]) and not str(indexes[1]["damage"])


@pytest.mark.parametrize("line", ["print('cno_such_module\\nname')", "raise SystemExit"], ids=["prints", "ends"])
def test_processes_that_do_not_work_are_replaced_by_threads(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their search path has what is no text, and a module that prints or ends the process when it is imported."""
    (tmp_path / "pickle.py").write_text(line)
    monkeypatch.setattr(sys, "path", [tmp_path, str(tmp_path), *sys.path])
    monkeypatch.setattr(tar_workers, "THREAD_SECONDS", -1.0)
    shards = [write_tar(tmp_path / f"{i}.tar", images(3 + i)) for i in range(4)]
    read: list[int] = []
    with tar_workers.IndexBuilder(read.append, use_processes=True) as build:
        assert [len(build(shard)["offset"]) for shard in shards] == [3, 4, 5, 6]
        assert len(build._processes) == 1


def test_indexes_under_way_are_given_up_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "a.tar", images(5))
    monkeypatch.setattr(tar_index, "_MEMBERS_PER_REPORT", 1)
    reached, closed = threading.Event(), threading.Event()
    num_reports = 0

    def on_read(num_bytes: int) -> None:
        nonlocal num_reports
        num_reports += 1
        reached.set()
        assert closed.wait(60)

    with ThreadPoolExecutor(1) as pool:
        with tar_workers.IndexBuilder(on_read, use_processes=True) as build:
            index = pool.submit(build, shard)
            assert reached.wait(60)
        closed.set()
        assert type(index.exception(60)).__name__ == "_ClosedError"
    assert num_reports == 1
