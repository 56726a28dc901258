"""Columns of Parquet files and Hugging Face datasets: images by path, labels of every type, selection by name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from byol_fast.config import Config, DataConfig, replace
from byol_fast.data import CorruptImageError, ImageSource, SourceError, open_source, open_train_val
from byol_fast.data.sources import EncodedSource, FileSource
from byol_fast.data.sources.columns import LabelColumn, read_labels
from tests.data.kinds import installed, options

if not installed("datasets"):
    pytest.skip("datasets is not installed", allow_module_level=True)

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

IMAGES = [bytes([i]) * (i + 1) for i in range(6)]
"""Not images: what is read is to be what was written, byte for byte."""
FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, /, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def open_(root: object, cache: Path, **columns: str) -> ImageSource:
    return open_source(root, arg_name="data.root", options=replace(options(cache), columns))


def labels_of(source: ImageSource) -> list[str] | None:
    """Class name of each image."""
    return None if source.labels is None else [source.classes[i] for i in source.labels.tolist()]


def categories(values: list[Any], of: list[Any], *, ordered: bool = False) -> Any:
    return pa.DictionaryArray.from_arrays([of.index(v) for v in values], of, ordered=ordered)


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (categories(["b", "a", "b"], ["b", "a", "not there"]), ["b", "a", "b"]),
        (categories(["low", "high", "low"], ["low", "high"], ordered=True), ["low", "high", "low"]),
        (categories([10, 9, 10], [9, 10]), ["10", "9", "10"]),
        (pa.array([True, False, True]), ["True", "False", "True"]),
        (pa.array(["x", "01", "1"], pa.large_string()), ["x", "01", "1"]),
        (pa.array(["x", "y", "x"], pa.string_view()), ["x", "y", "x"]),
        (pa.array([2, 0, 255], pa.uint8()), ["2", "0", "255"]),
        (pa.array([2.0, 0.0, 10.0]), ["2", "0", "10"]),
        (pa.array([2.0, 0.0, 10.0], pa.float16()), ["2", "0", "10"]),
        (pa.array([2, 0, 10]).cast(pa.decimal128(21, 2)), ["2", "0", "10"]),
    ],
    ids=["category", "ordered", "category of integers", "bool", "large_string", "string_view", "uint8", "float", "half",
         "decimal"],
)  # fmt: skip
def test_labels_of_every_type_are_read(values: Any, names: list[str], tmp_path: Path) -> None:
    source = open_(write(tmp_path / "x.parquet", image=IMAGES[:3], label=values), tmp_path / "cache")
    assert labels_of(source) == names
    assert labels_of(open_source(datasets.Dataset(pa.table({"image": IMAGES[:3], "label": values})))) == names


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([[1], [0, 1], [2]], "column label of .* has the type list<element: int64>, not integers or texts"),
        ([{"a": 1}] * 3, r"column label of .* has the type \{a\}, not integers or texts"),
        (pa.array([1, 2, 3], pa.date32()), r"has the type date32\[day\]"),
        (pa.array([1, 2, 10**30], pa.decimal256(40, 0)), r"must hold integers, .* got decimal256\(40, 0\)"),
        ([0.5, 1.0, 2.0], r"column label of .*x\.parquet must hold integers, texts or categories, got double .*0\.5"),
    ],
    ids=["multi-label", "struct", "date", "large decimals", "fractions"],
)
def test_columns_that_cannot_be_labels_are_named(values: Any, problem: str, tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "x.parquet", image=IMAGES[:3], label=values)
    source = open_(path, tmp_path / "cache")
    assert source.labels is None
    assert re.search(problem, source.label_problem) and source.label_problem in caplog.text
    assert source.label_problem.endswith("name another one with --data.label-column")
    with pytest.raises(SourceError, match=r"data\.root: column label of|data\.label_column must be a column"):
        open_(path, tmp_path / "cache", label_column="label")


@pytest.mark.parametrize(
    "values", [[1, None, 2], [1.0, float("nan"), 2.0], ["a", " ", "b"], [1, -1, 2], [True, None, False]]
)
def test_images_without_a_label_are_counted(values: list[Any], tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "x.parquet", image=IMAGES[:3], label=values)
    source = open_(path, tmp_path / "cache")
    assert source.labels is None
    assert source.label_problem == f"1 of 3 images have no label, or a negative one, such as {path}:row 1"
    assert source.label_problem in caplog.text


@pytest.mark.parametrize("seed", range(100))
def test_labels_agree_with_the_values_of_arrow(seed: int) -> None:
    """Of one to three files with one type each, also other integers, texts and encodings of them."""
    rng = random.Random(seed)
    numbers: list[Any] = [0, 1, 2, 10, 100, -1, None]
    texts: list[Any] = ["a", "1", "01", "1.0", " 1", "x\ny", "\xe9", "", None]
    values, types = rng.choice([
        (numbers, [pa.int8(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.decimal128(20, 1)]),
        (texts, [pa.string(), pa.large_string(), pa.string_view()]),
        ([True, False, None], [pa.bool_()]),
    ])  # fmt: skip
    choices = rng.sample(values, rng.randint(1, 5 if len(values) > 3 else 3))
    rows: list[Any] = []
    parts = []
    for k in range(rng.randint(1, 3)):
        part = rng.choices(choices, k=rng.choice([0, 1, 5]))
        array = pa.array(part).cast(rng.choice(types)) if part else pa.array([], types[0])
        array = array.dictionary_encode() if rng.random() < 0.3 and array.type != pa.string_view() else array
        parts.append(LabelColumn(pa.chunked_array([array]), (), str(k)))
        rows += part
    result = read_labels(parts, "label", "x", str, strict=True)
    if not rows or {None, "", -1} & set(rows):
        assert result.labels is None and result.label_problem
    else:
        assert result.labels is not None and len(set(result.classes)) == len(result.classes)
        assert [result.classes[i] for i in result.labels.tolist()] == list(map(str, rows))


def test_every_file_must_hold_labels(tmp_path: Path) -> None:
    """Dates in the second file are no integers."""
    write(tmp_path / "x" / "0.parquet", image=IMAGES[:2], label=[1, 2])
    last = write(tmp_path / "x" / "1.parquet", image=IMAGES[:2], label=pa.array([1, 2], pa.timestamp("ms")))
    source = open_(tmp_path / "x", tmp_path / "cache")
    assert source.labels is None
    assert f"column label of {last} must hold integers, texts or categories, got timestamp[ms]" in source.label_problem


def test_label_column_is_in_every_file(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path / "x" / "0.parquet", image=IMAGES[:2], label=[1, 2])
    last = write(tmp_path / "x" / "1.parquet", image=IMAGES[:2])
    source = open_(tmp_path / "x", tmp_path / "cache")
    assert source.labels is None and source.label_problem == f"{last} has no column label"
    assert source.label_problem in caplog.text
    with pytest.raises(
        SourceError, match=r"data\.label_column must be a column of all files, but .*1\.parquet has no column"
    ):
        open_(tmp_path / "x", tmp_path / "cache", label_column="label")


def test_label_column_is_selected_or_named(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "x.parquet", image=IMAGES[:3], species=["a", "b", "a"], Category=[1, 0, 1], label=[[1]] * 3)
    source = open_(path, tmp_path / "cache")
    assert labels_of(source) == ["1", "0", "1"]
    assert (
        "column Category holds the labels; label is not used (select another one with --data.label-col" in caplog.text
    )
    assert labels_of(open_(path, tmp_path / "cache", label_column="species")) == ["a", "b", "a"]
    other = open_(write(tmp_path / "y.parquet", image=IMAGES[:3], species=["a", "b", "a"]), tmp_path / "cache")
    assert other.labels is None and "no column named label, labels, " in other.label_problem
    names = {"coarse_label": ["x", "y"], "fine_label": ["a", "b", "c"]}
    features = {name: datasets.ClassLabel(names=of) for name, of in names.items()}
    columns = {"image": IMAGES[:3], "coarse_label": [0, 1, 0], "fine_label": [0, 1, 2]}
    both = datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Value("binary"), **features}))
    assert labels_of(open_source(both)) == ["a", "b", "c"]
    assert "column fine_label holds the labels; coarse_label is not used" in caplog.text


def test_labels_in_names_of_folders(tmp_path: Path) -> None:
    """As pandas and Spark write them: one folder for each value of a column, which the files do not have."""
    table = pa.table({"image": IMAGES[:3], "label": ["x y", "01", "x y"]})
    pq.write_to_dataset(table, tmp_path / "data", partition_cols=["label"])
    assert labels_of(open_(tmp_path / "data", tmp_path / "cache")) == ["01", "x y", "x y"]


def test_files_without_rows_do_not_matter(tmp_path: Path) -> None:
    for k, rows in enumerate((0, 2, 0, 1)):
        labels = pa.array(["b", "a"][:rows], pa.string()) if rows else pa.array([], pa.int64())
        write(tmp_path / "x" / f"{k}.parquet", image=pa.array(IMAGES[k : k + rows], pa.binary()), label=labels)
    source = open_(tmp_path / "x", tmp_path / "cache")
    assert isinstance(source, EncodedSource) and [source.read(i) for i in range(3)] == [*IMAGES[1:3], IMAGES[3]]
    assert labels_of(source) == ["b", "a", "b"] and source.sample_name(2) == f"{tmp_path / 'x' / '3.parquet'}:row 0"


def test_index_of_pandas_is_no_image(tmp_path: Path) -> None:
    """pandas writes a named index as one more column."""
    path = write(tmp_path / "x.parquet", image=IMAGES[:2], label=["b", "a"], __index_level_0__=[5, 3])
    assert labels_of(open_(path, tmp_path / "cache")) == ["b", "a"]


def _class_labels(path: Path, order: list[str], names: list[str]) -> None:
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=order)})
    columns = {"image": IMAGES[: len(names)], "label": [order.index(name) for name in names]}
    datasets.Dataset.from_dict(columns, features).to_parquet(path)


def test_a_class_has_one_number_in_all_files(tmp_path: Path) -> None:
    """Whatever the order of the class names that each file was written with."""
    names = ["ant", "bee", "cat"]
    for order in (["ant", "bee", "cat"], ["cat", "ant", "bee"]):
        _class_labels(tmp_path / "data" / f"train-{order[0]}.parquet", order, names)
    _class_labels(tmp_path / "data" / "test-0.parquet", ["unused", "cat", "bee"], ["bee", "cat"])
    source = open_(tmp_path / "data" / "train-*.parquet", tmp_path / "cache")
    assert labels_of(source) == names * 2 and source.classes == ("ant", "bee", "cat")
    train, test = open_train_val(Config(data=DataConfig(root=tmp_path, cache=tmp_path / "cache")))
    assert test is not None and labels_of(test) == ["bee", "cat"] and test.classes == train.classes
    write(tmp_path / "texts" / "0.parquet", image=IMAGES[:2], label=categories(["b", "a"], ["b", "a"]))
    write(tmp_path / "texts" / "1.parquet", image=IMAGES[:2], label=["a", "01"])
    write(tmp_path / "texts" / "2.parquet", image=IMAGES[:1], label=pa.array(["1"], pa.large_string()))
    assert labels_of(open_(tmp_path / "texts", tmp_path / "cache")) == ["b", "a", "a", "01", "1"]


def test_integers_and_names_in_one_column_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.parquet", image=IMAGES[:2], label=[0, 1])
    write(tmp_path / "a" / "1.parquet", image=IMAGES[:2], label=["0", "1"])
    message = r"column label must have one type in all files, got integers in .*0\.parquet and names in .*1\.parquet"
    with pytest.raises(SourceError, match=message):
        open_(tmp_path / "a", tmp_path / "cache")
    _class_labels(tmp_path / "a" / "1.parquet", ["ant", "bee"], ["ant", "bee"])
    with pytest.raises(SourceError, match=message):
        open_(tmp_path / "a", tmp_path / "cache")
    (tmp_path / "a" / "0.parquet").rename(tmp_path / "a" / "train.parquet")
    (tmp_path / "a" / "1.parquet").rename(tmp_path / "a" / "val.parquet")
    config = Config(data=DataConfig(root=tmp_path / "a", cache=tmp_path / "cache"))
    _, val = open_train_val(config)
    message = r"2 of 2 validation classes are not among the training classes \(such as ant, bee; the .* are 0, 1, ...\)"
    assert val is not None and val.labels is None
    with pytest.raises(SourceError, match=message):
        open_train_val(replace(config, {"knn.enabled": "on"}))


# ---- images --------------------------------------------------------------------------------------------------------


def _texts(paths: list[str | None]) -> dict[str, Any]:
    return {"File_Path": paths}


def _structs(paths: list[str | None]) -> dict[str, Any]:
    return {"image": pa.array([{"bytes": None, "path": path} for path in paths], FILE)}


@pytest.mark.parametrize("columns", [_texts, _structs])
def test_images_by_path_are_read_from_the_folder_of_their_file(
    columns: Callable[[list[str | None]], dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    for k in range(2):
        (tmp_path / f"{k}" / "photos").mkdir(parents=True)
        for i in range(2):
            (tmp_path / f"{k}" / "photos" / f"{i}.jpg").write_bytes(IMAGES[2 * k + i])
    (tmp_path / "other.jpg").write_bytes(IMAGES[4])
    write(tmp_path / "0" / "x.parquet", **columns(["photos/0.jpg", "photos/1.jpg"]), label=[0, 1])
    last = str(tmp_path / "other.jpg")
    write(tmp_path / "1" / "y.parquet", **columns(["photos/0.jpg", "photos/1.jpg", last]), label=[1, 1, 0])
    monkeypatch.chdir(tmp_path / "0" / "photos")
    shards = str(tmp_path / "{0/x,1/y}.parquet")
    for source in (open_(shards, tmp_path / "cache"), open_(Path("../x.parquet"), tmp_path / "cache")):
        assert isinstance(source, EncodedSource)
        assert [source.read(i) for i in range(len(source))] == IMAGES[: len(source)]
        assert labels_of(source) == ["0", "1", "1", "1", "0"][: len(source)]
    write(tmp_path / "2" / "x.parquet", **columns(["photos/0.jpg"]))
    with pytest.raises(
        SourceError, match=r"none of 1 files that .* lists exists, such as .*2/photos/0\.jpg; paths are"
    ):
        open_(tmp_path / "2" / "x.parquet", tmp_path / "cache")


def test_rows_of_one_file_may_have_bytes_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGES[1])
    values = [
        {"bytes": IMAGES[0], "path": "a.jpg"},
        {"bytes": None, "path": "a.jpg"},
        {"bytes": None, "path": "no.jpg"},
    ]
    source = open_(write(tmp_path / "x.parquet", image=pa.array(values, FILE)), tmp_path / "cache")
    assert isinstance(source, EncodedSource) and [source.read(0), source.read(1)] == IMAGES[:2]
    with pytest.raises(CorruptImageError, match=r"no\.jpg does not exist"):
        source.read(2)


def test_hugging_face_dataset_of_paths(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGES[3])
    monkeypatch.chdir(tmp_path)
    source = open_source(datasets.Dataset.from_dict({"image": ["a.jpg", str(tmp_path / "a.jpg")], "label": ["x", "y"]}))
    assert isinstance(source, FileSource) and [source.read(i) for i in range(2)] == [IMAGES[3]] * 2
    assert labels_of(source) == ["x", "y"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["https://example.org/1.jpg"]}, r"lists addresses \(https://example\.org/1\.jpg\)"),
        ({"image": ["/9j/4AAQ" * 10_000]}, r"none of 1 files .* lists exists, such as /9j/4AAQ.{250,350}; paths are"),
        ({"image": [[IMAGES[0]]]}, r"no column of encoded images.* its columns are image \(list<element: binary>\)"),
        ({"image": pa.array([None])}, r"no column of encoded images.* its columns are image \(null\)"),
        ({"path": ["a.jpg", None]}, r"must have a path for each image, got none in row 1"),
        ({"left": [IMAGES[0]], "right": [IMAGES[1]]}, r"several columns of images.* --data\.image-column.* left \(bin"),
    ],
    ids=["addresses", "base64", "lists", "nothing", "missing path", "two columns"],
)
def test_columns_that_hold_no_images_are_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(SourceError, match=message):
        open_(path, tmp_path / "cache")


def test_image_column_is_selected_among_several(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "x.parquet", mask=IMAGES[:2], image=IMAGES[2:4], path=["a.jpg", "b.jpg"])
    source = open_(path, tmp_path / "cache")
    assert isinstance(source, EncodedSource) and source.read(0) == IMAGES[2]
    assert "column image holds the images; mask is not used" in caplog.text
    other = open_(path, tmp_path / "cache", image_column="mask")
    assert isinstance(other, EncodedSource) and other.read(1) == IMAGES[1]
    structs = pa.array([{"bytes": data, "path": None} for data in IMAGES[:2]], FILE)
    write(tmp_path / "y" / "0.parquet", image=structs)
    write(tmp_path / "y" / "1.parquet", image=["a.jpg"])
    with pytest.raises(SourceError, match=r"column image must have one type in all files, got string in .*1\.parquet"):
        open_(tmp_path / "y", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["parquet", "categories", "dataset", "class labels"])
def test_parts_in_a_column_are_named(kind: str, tmp_path: Path, caplog: Any) -> None:
    """Images of all parts are used; a column with one part, or with other texts, is no reason for a warning."""
    message = "the images of all parts in column split are used (test, train); to train on one, give a table of its"
    for values, warns in (
        (["train", "test", "train"], True),
        (["train"] * 3, False),
        (["north", "south", None], False),
    ):
        images: Any = {"image": IMAGES[:3]}
        if kind in {"parquet", "categories"}:
            column = pa.array(values).dictionary_encode() if kind == "categories" else values
            source: Any = write(tmp_path / f"{values[0]}-{warns}.parquet", **images, split=column)
        else:
            source = datasets.Dataset.from_dict({**images, "split": values})
            source = source.class_encode_column("split") if kind == "class labels" else source
        caplog.clear()
        open_(source, tmp_path / "cache")
        assert (message in caplog.text) == warns
    if kind == "dataset":
        rows = datasets.Dataset.from_dict({"image": IMAGES[:3], "split": ["train", "test", "train"]})
        open_(rows.select([0, 2]), tmp_path / "cache")
        assert message not in caplog.text


def test_image_column_of_any_name_beside_paths_is_named(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "x.parquet", scan=IMAGES[:2], file_name=["a.jpg", "b.jpg"])
    source = open_(path, tmp_path / "cache")
    assert isinstance(source, EncodedSource) and source.read(1) == IMAGES[1]
    assert "column scan holds the images; file_name is not used (select another one with" in caplog.text


def test_other_columns_may_have_any_type_and_description(tmp_path: Path) -> None:
    """Also types that `datasets` does not know, and features of its later versions."""
    columns = {"image": IMAGES[:2], "label": ["b", "a"], "a.b": [1, 2], "run": pa.array([1, 2], pa.duration("ns"))}
    extra = pa.array([[(1, 2.0)]] * 2, pa.map_(pa.int8(), pa.float64()))
    table = pa.table(columns).append_column("extra", extra)
    description = '{"info": {"features": {"extra": {"_type": "OfALaterVersion"}}}}'
    pq.write_table(table.replace_schema_metadata({"huggingface": description}), tmp_path / "x.parquet")
    assert labels_of(open_(tmp_path / "x.parquet", tmp_path / "cache")) == ["b", "a"]
    assert labels_of(open_(tmp_path / "x.parquet", tmp_path / "cache", label_column="a.b")) == ["1", "2"]
