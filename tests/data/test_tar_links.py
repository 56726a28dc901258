"""Members of a tar file that are more than a header and its data: links, long names, holes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from byol_fast.data import SourceError
from byol_fast.data.sources.tar_members import read_members
from tests.data.kinds import write_tar
from tests.data.test_tar_damage import JPEG, rows_of

Member = tuple[str, bytes] | tuple[str, bytes, str]
"""Name and content, or name, type of link and target."""


def write_members(path: Path, members: list[Member], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = data, str(target[0])
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


PYTHON_TESTS = Path(tarfile.__file__).parent / "test"
TAR_OF_PYTHON = [
    path for name in ("testtar.tar", "archivetestdata/testtar.tar") if (path := PYTHON_TESTS / name).exists()
]


@pytest.mark.skipif(not TAR_OF_PYTHON, reason="Python's own tests are not installed")
def test_members_of_all_formats_are_those_of_tarfile() -> None:
    """Archive of Python's tests: V7, ustar, GNU, star, Solaris and PAX members, also with names that are not UTF-8."""
    with tarfile.open(TAR_OF_PYTHON[0], encoding="utf-8", errors="surrogateescape") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
        num_others = sum(m.issparse() or m.islnk() or m.issym() for m in tar)
    with TAR_OF_PYTHON[0].open("rb") as file:
        members = list(read_members(file))
    plain = [m for m in members if not m.is_sparse and m.type not in {HARD, SYMBOLIC}]
    assert [(m.name, m.offset, m.size) for m in plain] == expected
    assert len(members) == len(expected) + num_others


HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


def test_links_are_followed_inside_the_archive(tmp_path: Path, caplog: Any) -> None:
    members: list[Member] = [
        ("./store/blob", JPEG + b"1"),
        ("./cat/1.jpg", HARD, "./store/blob"),
        ("./cat/2.jpg", SYMBOLIC, "../later/two"),
        ("./dog/3.jpg", SYMBOLIC, "./../cat/2.jpg"),  # a link to a link
        ("./all", SYMBOLIC, "later"),
        ("./dog/4.jpg", SYMBOLIC, "../all/two"),  # through a link to a folder
        ("./dog/5.jpg", HARD, "./dog/3.jpg"),  # a second name of a link
        ("./later/two", JPEG + b"2"),
    ]
    rows = rows_of(write_members(tmp_path / "a.tar", members))
    assert [(name, label, data[3:]) for name, label, data in rows] == [
        ("cat/1.jpg", "cat", b"1"),
        ("cat/2.jpg", "cat", b"2"),
        ("dog/3.jpg", "dog", b"2"),
        ("dog/4.jpg", "dog", b"2"),
        ("dog/5.jpg", "dog", b"2"),
    ]
    assert not caplog.records


def test_linked_labels_are_read(tmp_path: Path) -> None:
    members: list[Member] = [
        ("1.jpg", JPEG), ("1.cls", b"7"), ("2.jpg", JPEG), ("2.cls", HARD, "1.cls"),
        ("3.jpg", JPEG), ("3.cls", SYMBOLIC, "4.cls"), ("4.jpg", JPEG), ("4.cls", b"8"),
    ]  # fmt: skip
    assert [row[1] for row in rows_of(write_members(tmp_path / "a.tar", members))] == ["7", "7", "8", "8"]


def test_links_without_target_are_named(tmp_path: Path, caplog: Any) -> None:
    members: list[Member] = [
        ("1.jpg", JPEG),
        ("2.jpg", SYMBOLIC, "3.jpg"),
        ("3.jpg", SYMBOLIC, "2.jpg"),
        ("4.jpg", SYMBOLIC, "/etc/passwd"),
        ("5.jpg", SYMBOLIC, "../1.jpg"),
        ("6.jpg", HARD, "7.jpg"),
        ("7.jpg", JPEG + b"7"),
    ]
    path = write_members(tmp_path / "a.tar", members)
    for _ in range(2):  # built, and from the cache
        caplog.clear()
        assert [(name, data) for name, _, data in rows_of(path)] == [("1.jpg", JPEG), ("7.jpg", JPEG + b"7")]
        assert "5 links to images are left out, because their targets are not in the archive" in caplog.text
        assert f"such as {path}:2.jpg (header at byte 1024)" in caplog.text


def test_hard_link_keeps_content_of_replaced_member(tmp_path: Path, caplog: Any) -> None:
    """As after extraction: `tar --append` adds a new version, a link to the old one stays."""
    members: list[Member] = [("1.jpg", JPEG + b"old"), ("2.jpg", HARD, "1.jpg"), ("1.jpg", JPEG + b"new")]
    rows = rows_of(write_members(tmp_path / "a.tar", members))
    assert [(name, data[3:]) for name, _, data in rows] == [("1.jpg", b"new"), ("2.jpg", b"old")]
    assert "1 members are replaced by later ones of the same name" in caplog.text


def test_nul_in_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("1.jpg", "2\0.jpg", "3.jpg"):
            info = tarfile.TarInfo("x.jpg")
            info.pax_headers = {"path": name}
            tar.addfile(info)
    with pytest.raises(SourceError, match=r"at byte 1536 \(images before it: 1\): .*path with a NUL byte"):
        rows_of(path)


@pytest.mark.parametrize(
    "stored",
    [
        lambda name: name.encode("ascii", "replace").decode(),  # Python
        lambda name: os.fsencode(name).decode("latin-1"),  # the bytes as they are
        lambda name: name.encode("ascii", "ignore").decode(),
        lambda name: unicodedata.normalize("NFD", name),
        lambda name: name.encode("ascii", "backslashreplace").decode(),
        lambda name: name[-100:],  # star
        lambda name: name.rpartition("/")[2][:98],  # bsdtar
        lambda name: "PaxHeader",
    ],
    ids=["replaced", "bytes", "dropped", "decomposed", "escaped", "end", "base", "other"],
)
def test_names_of_other_writers_are_read(stored: Any, tmp_path: Path) -> None:
    """Writers differ in the short name that they leave in the header itself."""
    names = [
        *("h\u00fcnd/\u72ac1.jpg", "k\u00e4tze/2.jpg", "h\u00fcnd/" + "l" * 120 + ".jpg"),
        *("latin-\udce9/3.jpg", "f" * 60 + "/" + "l" * 60 + ".jpg", "f" * 20 + "/4.jpg"),
    ]
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", errors="replace") as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(stored(name)[:100])
            info.pax_headers = {"path": name}
            info.size = 4
            tar.addfile(info, io.BytesIO(JPEG + bytes([i])))
    assert [(name, data[3]) for name, _, data in rows_of(tmp_path / "a.tar")] == list(zip(names, range(6), strict=True))


def test_global_headers_and_empty_members(tmp_path: Path) -> None:
    """As `git archive` writes them."""
    with tarfile.open(tmp_path / "a.tar", "w", pax_headers={"comment": "5" * 40}) as tar:
        tar.addfile(tarfile.TarInfo("empty.jpg"))
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(JPEG))
    assert [(name, data) for name, _, data in rows_of(tmp_path / "a.tar")] == [("empty.jpg", b""), ("1.jpg", JPEG)]


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
def test_incremental_archive_of_gnu_tar(tmp_path: Path) -> None:
    """GNU tar's own format has times where the POSIX format has the beginning of a name."""
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(JPEG + name.encode())
    command = ["tar", "--format=gnu", f"--listed-incremental={tmp_path / 'snapshot'}", "-C", str(tmp_path / "in")]
    subprocess.run([*command, "-cf", str(tmp_path / "a.tar"), "."], check=True)
    assert rows_of(tmp_path / "a.tar") == [
        ("cat/1.jpg", "cat", JPEG + b"cat"), ("dog/1.jpg", "dog", JPEG + b"dog")
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_members(form: str, tmp_path: Path, caplog: Any) -> None:
    """GNU tar stores files with holes in two ways; an image with holes cannot be read in one piece."""
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "1.jpg").open("wb") as file:
        file.write(JPEG)
        file.truncate(2**20)
    (tmp_path / "in" / "2.jpg").write_bytes(JPEG + b"2")
    command = ["tar", "--sparse", f"--format={form}", "-C", str(tmp_path / "in"), "-cf", str(tmp_path / "a.tar")]
    subprocess.run([*command, "1.jpg", "2.jpg"], check=True)
    assert [(name, data) for name, _, data in rows_of(tmp_path / "a.tar")] == [("2.jpg", JPEG + b"2")]
    assert "1 images are left out, because they are stored with holes" in caplog.text


def test_sparse_member_without_holes_is_read(tmp_path: Path, caplog: Any) -> None:
    """GNU tar writes one where a file system has compressed a file."""
    path = write_tar(tmp_path / "a.tar", [("1.jpg", JPEG * 200), ("2.jpg", JPEG)], format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    for at, number in ((386, 0), (398, 600), (483, 600)):  # offset and size of the only part, size of the file
        data[at : at + 12] = f"{number:011o}\0".encode()
    data[410:434] = f"{600:011o}\0{0:011o}\0".encode()
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert [(name, content) for name, _, content in rows_of(path)] == [("1.jpg", JPEG * 200), ("2.jpg", JPEG)]
    assert not caplog.records
