"""Lists of files: `.txt`, `.csv` and `.tsv`."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from byol_fast.config import DataConfig
from byol_fast.data import SourceError, open_source
from byol_fast.data.sources import FileSource
from tests.data.test_sources import labels_of, put


def list_of(path: Path, text: str) -> FileSource:
    path.write_text(text, encoding="utf-8")
    source = open_source(path, arg_name="data.root")
    assert isinstance(source, FileSource)
    return source


def test_paths_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "a b/1.png", "\u732b.png", "2.jpeg")
    source = list_of(tmp_path / "x.txt", "\n\u732b.png\r\na b/1.png\n\n./2.jpeg\n2.jpeg\n")
    assert source.paths == ("\u732b.png", "a b/1.png", "./2.jpeg", "2.jpeg")  # in the list's order, as often as there
    assert source.labels is None
    assert source.load(1).getpixel((0, 0)) == (0, 0, 255)


def test_labels_after_a_tab(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "sub/2 3.png", "4.png")
    source = list_of(tmp_path / "x.txt", "1.png\tdog\nsub/2 3.png\tcat\n4.png\tdog\n")
    assert source.paths == ("1.png", "sub/2 3.png", "4.png")
    assert source.classes == ("cat", "dog") and labels_of(source) == [1, 0, 1]
    numbered = list_of(tmp_path / "x.txt", "1.png\t2\nsub/2 3.png\t0\n4.png\t2")
    assert numbered.classes == ("0", "2") and labels_of(numbered) == [1, 0, 1]
    assert list_of(tmp_path / "x.txt", "1.png\t2\nsub/2 3.png\n").labels is None
    assert list_of(tmp_path / "x.txt", "1.png\t-1\n4.png\t0\n").labels is None


@pytest.mark.parametrize("separator", [" ", ",", ";", ", "])
@pytest.mark.parametrize("header", [False, True])
def test_labels_after_a_separator(separator: str, header: bool, tmp_path: Path) -> None:
    """Also if files are missing, or have names as long as possible, so that no file can be named like the line."""
    names = ["a b/1, 2.png", "x" * 251 + ".png", "c/3;4.png"]
    put(tmp_path, *names)
    text = "".join(f"{name}{separator}{i}\n" for i, name in enumerate(["lost.png", "y" * 300, *names, "c\\3;4.png"]))
    source = list_of(tmp_path / "x.txt", ("path label\n" if header and separator == " " else "") + text)
    assert source.paths == ("lost.png", "y" * 300, *names, "c/3;4.png")
    assert source.classes == tuple("012345") and labels_of(source) == list(range(6))
    plain = "".join(f"{name}\n" for name in names)
    source = list_of(tmp_path / "x.txt", ("filename\n" if header else f"# {'z' * 300}\n") + plain)
    assert source.paths == tuple(names) and source.labels is None


def test_labels_after_a_space(tmp_path: Path) -> None:
    """As ImageNet's own lists have them; unless the blank and the number belong to the name."""
    put(tmp_path, "photo 1.png", "photo 2.png")
    source = list_of(tmp_path / "x.txt", "photo 1.png 65\nphoto 2.png 970\n")
    assert source.paths == ("photo 1.png", "photo 2.png") and labels_of(source) == [0, 1]
    assert source.classes == ("65", "970")
    put(tmp_path, "photo 1", "photo 2")
    assert list_of(tmp_path / "x.txt", "photo 1\nphoto 2\n").paths == ("photo 1", "photo 2")


@pytest.mark.parametrize("path_column", ["path", "file", "Filename", "image"])
@pytest.mark.parametrize("label_column", ["label", "class", None])
def test_tables(path_column: str, label_column: str | None, tmp_path: Path) -> None:
    put(tmp_path, "1.png", "sub/2, 3.png")
    header = f"id,{path_column}" + (f",{label_column}" if label_column else "")
    rows = [("7", "1.png", "dog"), ("8", '"sub/2, 3.png"', "cat")]
    text = "\n".join([header, *(",".join(row[: 3 if label_column else 2]) for row in rows)])
    source = list_of(tmp_path / "x.csv", "\ufeff" + text)
    assert source.paths == ("1.png", "sub/2, 3.png")
    if label_column:
        assert source.classes == ("cat", "dog") and labels_of(source) == [1, 0]
    else:
        assert source.labels is None
    tabs = list_of(tmp_path / "x.tsv", "path\tlabel\n1.png\t0\nsub/2, 3.png\t1\n")
    assert tabs.paths == source.paths and labels_of(tabs) == [0, 1]


ROWS = [("cat/1 a.png", "cat"), ("2.png", "dog"), ("3.png", "cat")]


def _table(delimiter: str, end: str = "\n", header: tuple[str, str] = ("path", "label"), quote: str = "") -> str:
    return "".join(f"{quote}{a}{quote}{delimiter}{quote}{b}{quote}{end}" for a, b in [header, *ROWS])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", _table(";", "\r\n").encode("utf-8-sig")),
        ("x.csv", _table("\t").encode()),
        ("x.tsv", _table(",").encode()),
        ("x.csv", _table(",", quote='"').encode()),
        ("x.csv", b"\n\n" + _table(",", "\n\n").encode() + b",\n"),
        ("x.csv", _table(",", ",,\n").encode()),
        ("x.CSV", _table(",", header=(" File Name ", "CLASS")).encode()),
        ("metadata.csv", _table(",", header=("file_name", "labels")).encode()),
        ("x.txt", _table("\t", "\r\n").encode("utf-16")),
        ("x.csv", b"\xfe\xff" + _table("\t").encode("utf-16-be")),
        ("x.txt", _table(",").encode()),
        ("x.txt", b"# " + _table("\t").encode()),
        ("x.txt", _table(" ").partition("\n")[2].encode()),
        ("x.csv", _table(",").replace("cat/1 a", "cat\\1 a").encode()),
    ],
    ids=["Excel", "tabs", "commas in tsv", "quotes", "empty rows", "empty columns", "upper case", "imagefolder",
         "Excel's Unicode text", "big endian", "header in txt", "comment", "path and name", "Windows"],
)  # fmt: skip
def test_forms_of_lists_are_read_alike(name: str, content: bytes, tmp_path: Path) -> None:
    put(tmp_path, *(path for path, _ in ROWS))
    (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path / name)
    assert isinstance(source, FileSource) and source.paths == tuple(path for path, _ in ROWS)
    assert source.classes == ("cat", "dog") and labels_of(source) == [0, 1, 0]


@pytest.mark.parametrize("seed", range(50))
def test_tables_are_read_as_the_csv_module_writes_them(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    names = ["1.png", "a b/2.png", "3, 4;5.png", '"6".png', "\xe9.png"]
    put(tmp_path, *names)
    rows = [
        (rng.choice(names), rng.choice(["cat", "1", "01", "a;b", "c,d", '"e"', "g\nh", "\xfc", "i\tj"]))
        for _ in range(6)
    ]
    order = rng.sample([0, 1, 2], 3)
    text = io.StringIO()
    quoting: Any = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(text, delimiter=rng.choice(",;\t"), quoting=quoting, lineterminator=rng.choice(["\n", "\r\n"]))
    for row in [("path", "label"), *rows]:
        writer.writerow([(*row, "note")[i] for i in order])
    path = tmp_path / f"x.{rng.choice(['csv', 'tsv', 'txt'])}"
    path.write_bytes(text.getvalue().encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))
    source = open_source(path)
    assert isinstance(source, FileSource) and source.labels is not None
    assert [(name, source.classes[y]) for name, y in zip(source.paths, source.labels.tolist(), strict=True)] == rows


def test_columns_can_be_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "x.csv").write_text("scan,species,group,class\n1.png,ant,insect,a\n2.png,owl,bird,b\n")
    named = DataConfig(image_column="scan", label_column="group")
    assert open_source(tmp_path / "x.csv", options=named).classes == ("bird", "insect")
    (tmp_path / "y.csv").write_text("path,species\n1.png,ant\n2.png,owl\n")
    source = open_source(tmp_path / "y.csv")
    assert source.labels is None and "y.csv has no column named label, labels" in source.label_problem
    assert open_source(tmp_path / "y.csv", options=DataConfig(label_column="species")).classes == ("ant", "owl")
    assert not caplog.records
    several = list_of(tmp_path / "z.csv", "path,target,label\n1.png,ant,insect\n2.png,owl,bird\n")
    assert several.classes == ("bird", "insect") and "column label holds the labels; target is not used" in caplog.text
    empty = list_of(tmp_path / "z.csv", "path,label\n1.png,\n2.png, \n")
    assert empty.labels is None and empty.label_problem.startswith("no image has a label")


def test_table_in_a_folder_of_images_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")
    source = open_source(tmp_path)
    assert source.labels is None and "metadata.csv" in caplog.text
    assert (
        source.label_problem
        == f"{tmp_path}/metadata.csv is not read with the folder; give the table itself to use its labels"
    )


def test_images_listed_with_two_labels_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "1.png", "2.png")
    list_of(tmp_path / "x.csv", "path,label\n1.png,a\n1.png,a\n2.png,b\n")
    assert not caplog.records
    list_of(tmp_path / "x.csv", "path,label\n1.png,a\n2.png,b\n1.png,b\n")
    assert "1 images are listed again with another label, such as 1.png" in caplog.text


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Names and captions may hold Unicode's other separators, and quoted fields any."""
    names = ["a\u2028b.png", "c\x85d.png", "e\x0cf.png"]
    put(tmp_path, *names, "g\nh.png")
    assert list_of(tmp_path / "x.txt", "\n".join(names)).paths == tuple(names)
    rows = "".join(f'{name},"line\nline",{i}\n' for i, name in enumerate(names))
    source = list_of(tmp_path / "x.csv", f'path,caption,label\n{rows}"g\nh.png",x\u2028y,3\n')
    assert source.paths == (*names, "g\nh.png") and labels_of(source) == [0, 1, 2, 3]


def test_absolute_and_parent_paths(tmp_path: Path) -> None:
    put(tmp_path / "photos", "1.png")
    (tmp_path / "lists").mkdir()
    source = list_of(tmp_path / "lists" / "x.txt", f"{tmp_path / 'photos' / '1.png'}\n../photos/1.png\n")
    assert source.load(0).tobytes() == source.load(1).tobytes()
    assert source.sample_name(0) == str(tmp_path / "photos" / "1.png")


def test_error_messages(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "a/1.png", "b/1.png")
    for name, text, message in (
        ("x.txt", "\n \n", r"x\.txt lists no images; expected one path a line"),
        (
            "x.csv",
            "",
            r"must have a header with a column `path` \(and `label`\), got nothing; name another column with ",
        ),
        ("x.csv", "1.png,0\n", r"a header with a column `path` \(and `label`\), got 1\.png, 0"),
        ("x.csv", "path,label\n", "lists no images"),
        ("x.csv", 'path,label\n"1.png,0\n' + "1.png,0\n" * 20_000, r"a second quotation mark .* behind line 1 \("),
        ("x.txt", "no.png\nnor.png\n", r"none of 2 files that .* lists exists, such as .*no\.png; paths are relative"),
        ("x.csv", 'path,label\n1.png,0\n"1.png,1\n', "a second quotation mark .* behind line 2"),
        ("x.csv", "path,label\n1.png,0\na,b.png,1\n", "at most 2 fields, as the header has, .* a, b.png, 1 in line 3"),
        ("x.csv", "label,path\n0,1.png\n1,\n", "must have a path in each line, got 1,  in line 3"),
        ("x.csv", "path,label,label\n1.png,0,1\n", "data.label_column must be one column of .* there are 2"),
        ("x.csv", "p\0a\0t\0h\0", "must be text in UTF-8, got NUL bytes"),
        ("x.csv", "path\nC:\\photos\\1.png\n", r"none of 1 files .* such as .*C:/photos/1\.png; paths are relative"),
        ("x.txt", "0 1.png\n1 1.png\n", r"none of 2 files .* such as .*/0 1\.png; paths are relative"),
        ("y.txt", "a\nb\n", r"none of 2 files that .* lists exists, such as .*/a; paths are relative"),  # folders
        ("x.txt", "https://example.org/1.png\n", "lists addresses"),
    ):
        with pytest.raises(SourceError, match=message) as caught:
            list_of(tmp_path / name, text)
        assert str(caught.value).startswith("data.root: ")


@pytest.mark.parametrize(
    ("parts", "warns"), [(["train", "Test"], True), (["train", "train"], False), (["a", ""], False)]
)
def test_parts_in_a_table_are_named(parts: list[str], warns: bool, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "1.jpg").write_bytes(b"x")
    (tmp_path / "x.csv").write_text("path,Split\n" + "".join(f"1.jpg,{part}\n" for part in parts) + "1.jpg\n")
    assert len(open_source(tmp_path / "x.csv")) == 3
    message = "x.csv: the images of all parts in column Split are used (Test, train); to train on one, give a table"
    assert (message in caplog.text) == warns
