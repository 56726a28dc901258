"""Parquet files and Hugging Face datasets with encoded images."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from byol_fast.config import Config, DataConfig, replace
from byol_fast.data import CorruptImageError, SourceError, open_source, open_train_val
from byol_fast.data.sources import EncodedSource, HuggingFaceSource, ParquetSource
from tests.data.kinds import encoded, installed, options, write_parquet

if not installed("datasets"):
    pytest.skip("datasets is not installed", allow_module_level=True)

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

IMAGES = [bytes([i]) * (3 * i + 1) for i in range(25)]
"""Not images: what is read is to be what was written, byte for byte."""


INT128 = (  # a file of polars with a column of integers of 128 bits, compressed
    "c-nnZ-D(p-6h1SiAxJ2>=oxlkFBYLoLPLH=+aw~zX;Rx_th+%idbjOnleB49vi;LX@Hu=1q4W{NJ71uezJ$;-yNh_EhvEFp_kHJ_i{t50"
    "8w>al?ICgmfa<sAZ)d3nz^J%JzzRO96I8(>7IV0y0XV^&!2>MIbtqP(wKO{oCSxoMF5ZdH?xtG;QrEFz)bN*DTmU@J<cy}MJC4h86^hd0"
    "voO`~3(vh}AZ@XU13^s6ZW($eMJ}K178Y@Qjs?K-D$fT4E~A6o^Z>!7E$i+Lv;Vi9xZ$`0?iX(VW4`#oQGoc$1b0i~J6kb}SY<sLy*_xF"
    "98Jfkf%S_ujcvTwWZTAdFR8xv^E&-{sdb|JY4r7)NBGs1`QOuelJoXbsc~Dz4UdV`jsG;wcw1Q@^WG4?mgRni_kBa1WYnGciPnR}tTr@o"
    "KV_y%>d~uo$o7QzCi>a%LEgHV?&llmg{gys_Vj~#tHIj$;(4%0oa)C<=hOJC=3I^!$t*r|RHNN!In~39**tVQQLm*A!^cq+s!kMjRoH%_"
    "I^Cev3si4Cid57I#$iv@WZed!2S4f5Ji5bsKwOGC"
)


def parquet_of(root: object, cache: Path, **columns: str) -> ParquetSource:
    source = open_source(root, arg_name="data.root", options=replace(options(cache), columns))
    assert isinstance(source, ParquetSource)
    return source


def contents(source: EncodedSource) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_rows_are_read_as_written(kind: str, compression: str, row_group_size: int, tmp_path: Path) -> None:
    form = {"row_group_size": row_group_size, "compression": compression}
    if kind == "struct":
        write_parquet(tmp_path / "x.parquet", IMAGES, [i % 3 for i in range(25)], **form)
    else:
        table = pa.table({"label": [i % 3 for i in range(25)], "img": pa.array(IMAGES, getattr(pa, kind)())})
        pq.write_table(table, tmp_path / "x.parquet", **form)
    source = parquet_of(tmp_path / "x.parquet", tmp_path / "cache")
    assert contents(source) == IMAGES
    assert source.labels is not None and source.labels.tolist() == [i % 3 for i in range(25)]
    assert source.sample_name(7) == f"{tmp_path / 'x.parquet'}:row 7"
    part = source.subset(np.array([9, 2]))
    assert contents(part) == [IMAGES[9], IMAGES[2]] and part.sample_name(0).endswith("row 9")


def test_rows_without_an_image_are_corrupt(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [IMAGES[3], None, b"", IMAGES[4]], [0, 1, 0, 1])
    source = parquet_of(tmp_path / "x.parquet", tmp_path / "cache")
    assert contents(source) == [IMAGES[3], b"", b"", IMAGES[4]]
    for i in (1, 2):
        with pytest.raises(CorruptImageError, match=rf"row {i} is empty \(0 bytes\)"):
            source.load(i)


def test_several_files_labels_and_class_names(tmp_path: Path) -> None:
    info = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}
    for k in range(2):
        table = pa.table({"image": IMAGES[k * 3 : k * 3 + 3], "label": [1, 0, k]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, tmp_path / f"part-{k}.parquet")
    source = parquet_of(tmp_path / "part-{0..1}.parquet", tmp_path / "cache")
    assert contents(source) == IMAGES[:6] and source.classes == ("ant", "bee", "cat")
    assert source.labels is not None and source.labels.tolist() == [1, 0, 0, 1, 0, 1]
    write_parquet(tmp_path / "words.parquet", IMAGES[:3], ["dog", "cat", "dog"])
    words = parquet_of(tmp_path / "words.parquet", tmp_path / "cache")
    assert words.classes == ("cat", "dog") and words.labels is not None and words.labels.tolist() == [1, 0, 1]
    write_parquet(tmp_path / "some.parquet", IMAGES[:3], [1, None, 0])
    assert parquet_of(tmp_path / "some.parquet", tmp_path / "cache").labels is None
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "x.jpg"}]}), tmp_path / "words-without.parquet")
    mixed = parquet_of(tmp_path / "words*.parquet", tmp_path / "cache")
    assert sorted(contents(mixed)) == sorted([*IMAGES[:3], b"x"]) and mixed.labels is None


def test_columns_are_selected_or_named(tmp_path: Path) -> None:
    table = pa.table({"id": [b"1", b"2"], "scan": [b"x", b"y"], "kind": ["a", "b"], "coarse": [3, 4]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        SourceError, match=r"several columns of images or binary data.*--data\.image-column; its columns are id "
    ):
        parquet_of(tmp_path / "x.parquet", tmp_path / "cache")
    one = parquet_of(tmp_path / "x.parquet", tmp_path / "cache", image_column="scan", label_column="kind")
    assert contents(one) == [b"x", b"y"] and one.classes == ("a", "b")
    other = parquet_of(tmp_path / "x.parquet", tmp_path / "cache", image_column="id")
    assert contents(other) == [b"1", b"2"] and other.labels is None
    for columns, message in (
        ({"image_column": "coarse"}, "data.image_column must be a column of encoded images .* got 'coarse'"),
        ({"image_column": "kind"}, "none of 2 files that .*x.parquet lists exists, such as .*/a; paths are relative"),
        ({"image_column": "scan", "label_column": "scan"}, "data.label_column must be a column of integers or texts"),
        ({"image_column": "scan", "label_column": "no"}, "got 'no'; its columns are id .binary., scan"),
    ):
        with pytest.raises(SourceError, match=message):
            parquet_of(tmp_path / "x.parquet", tmp_path / "cache", **columns)


def test_copy_is_reused_until_the_file_changes(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    write_parquet(tmp_path / "x.parquet", IMAGES, list(range(25)))
    first = parquet_of(tmp_path / "x.parquet", tmp_path / "cache")
    assert "copying its images" in caplog.text
    caplog.clear()
    assert contents(parquet_of(tmp_path / "x.parquet", tmp_path / "cache")) == IMAGES
    assert "copying" not in caplog.text
    write_parquet(tmp_path / "x.parquet", IMAGES[::-1], list(range(25)))
    again = parquet_of(tmp_path / "x.parquet", tmp_path / "cache")
    assert contents(again) == IMAGES[::-1]
    assert again.fingerprint == first.fingerprint and again.sizes != first.sizes
    copies = list((tmp_path / "cache" / "parquet").rglob("*.arrow"))
    assert len(copies) == 1  # the old one did not stay
    shutil.rmtree(tmp_path / "cache")
    assert contents(parquet_of(tmp_path / "x.parquet", tmp_path / "cache")) == IMAGES[::-1]


def test_copy_has_selected_columns_only(tmp_path: Path, capfd: Any) -> None:
    """Other columns are not copied, names of files may look like patterns, bars and settings stay as they were."""
    folder = tmp_path / "a[1] *"
    folder.mkdir()
    rows = {"image": IMAGES, "label": list(range(25)), "more": [bytes(10**5)] * 25}
    pq.write_table(pa.table(rows), folder / "x{0}.parquet")
    assert contents(parquet_of(folder / "x{0}.parquet", tmp_path / "cache")) == IMAGES
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 10**5
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_concurrent_opens(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", IMAGES, list(range(25)))
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: contents(parquet_of(tmp_path / "x.parquet", tmp_path / "cache")), range(3)))
    assert results == [IMAGES] * 3


def test_training_and_validation_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("x")
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", IMAGES[:4], [0, 1, 0, 1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", IMAGES[4:6], [1, 1])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", IMAGES[6:8], [1, 0])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", IMAGES[8:], [-1] * 17)
    train, val = open_train_val(Config(data=DataConfig(root=tmp_path, cache=tmp_path / "cache")))
    assert isinstance(train, ParquetSource) and isinstance(val, ParquetSource)
    assert contents(train) == IMAGES[:6] and contents(val) == IMAGES[6:8]
    assert val.labels is not None and val.labels.tolist() == [1, 0]


@pytest.mark.parametrize("folders", [("split=train", "split=test"), ("x/split=Train/label=a", "x/split=val/label=a")])
def test_partitions_by_part(folders: tuple[str, str], tmp_path: Path) -> None:
    for folder, part in zip(folders, (IMAGES[:4], IMAGES[4:6]), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        write_parquet(tmp_path / folder / "0c5fa3f4-0.parquet", part, [0, 1, 0, 1][: len(part)])
    (tmp_path / folders[0] / "_temporary").mkdir()  # remains of a job of Spark that was stopped
    write_parquet(tmp_path / folders[0] / "_temporary" / "0.parquet", IMAGES[:1], [0])
    train, val = open_train_val(Config(data=DataConfig(root=tmp_path, cache=tmp_path / "cache")))
    assert isinstance(train, ParquetSource) and isinstance(val, ParquetSource)
    assert contents(train) == IMAGES[:4] and contents(val) == IMAGES[4:6]


def test_error_messages(tmp_path: Path, monkeypatch: Any) -> None:
    good = write_parquet(tmp_path / "good.parquet", IMAGES, list(range(25)), compression="none").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(good[:-40])
    middle = len(good) // 4
    (tmp_path / "bent.parquet").write_bytes(good[:8] + b"\xff" * middle + good[8 + middle :])
    pq.write_table(pa.table({"text": ["x"], "label": [1]}), tmp_path / "texts.parquet")
    write_parquet(tmp_path / "empty.parquet", [], [])
    (tmp_path / "int128.parquet").write_bytes(zlib.decompress(base64.b85decode(INT128)))
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "cache" / "parquet").mkdir(parents=True)
    for name, message in (
        ("cut.parquet", r"cut\.parquet cannot be read as Parquet"),
        ("bent.parquet", r"bent\.parquet is damaged"),
        ("texts.parquet", r"no column of encoded images.* its columns are text \(string\), label \(int64\)"),
        ("empty.parquet", "no column of encoded images|has no rows"),
        ("int128.parquet", r"int128\.parquet cannot be read as Parquet \(Integers with more than 64 bits"),
        ("lfs.parquet", r"lfs\.parquet is a Git LFS pointer; fetch the file itself \(git lfs pull\)"),
    ):
        with pytest.raises(SourceError, match=message):
            parquet_of(tmp_path / name, tmp_path / "cache")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match=r"could not be copied into .*file.*; set --data\.cache to a folder"):
        parquet_of(tmp_path / "good.parquet", tmp_path / "file")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"which needs datasets; pip install datasets$"):
        parquet_of(tmp_path / "good.parquet", tmp_path / "cache")


def test_full_disk_is_detected_before_copying(tmp_path: Path, monkeypatch: Any) -> None:
    write_parquet(tmp_path / "x.parquet", [np.random.default_rng(i).bytes(2**20) for i in range(4)], [0] * 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    with pytest.raises(SourceError, match=r"copied into .* once, but only 0\.0 GiB are free there; set --data\.cache"):
        parquet_of(tmp_path / "x.parquet", tmp_path / "cache")


class TestHuggingFace:
    @staticmethod
    def dataset(images: list[bytes], **more: Any) -> Any:
        features = datasets.Features(
            {"text": datasets.Value("string"), "image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
        )
        columns = {
            "text": ["x"] * len(images),
            "image": [{"bytes": data, "path": None} for data in images],
            "kind": [i % 2 for i in range(len(images))],
        }
        return datasets.Dataset.from_dict(columns, features=features, **more)

    def test_images_are_read_encoded(self, tmp_path: Path) -> None:
        source = open_source(self.dataset(IMAGES))
        assert isinstance(source, HuggingFaceSource)
        assert contents(source) == IMAGES
        assert source.classes == ("a", "b") and source.labels is not None and source.labels.tolist()[:3] == [0, 1, 0]
        assert contents(source.subset(np.array([5, 1]))) == [IMAGES[5], IMAGES[1]]
        picked = open_source(self.dataset(IMAGES).select([7, 3]).with_format("torch"))
        assert isinstance(picked, HuggingFaceSource) and contents(picked) == [IMAGES[7], IMAGES[3]]
        assert source.fingerprint == open_source(self.dataset(IMAGES)).fingerprint
        assert source.fingerprint != open_source(self.dataset(IMAGES[::-1])).fingerprint
        # Not a function of the library's description of a column, which differs between its versions.
        binary = datasets.Dataset.from_dict({"image": IMAGES}, datasets.Features({"image": datasets.Value("binary")}))
        assert source.fingerprint == open_source(binary).fingerprint

    def test_exported_parquet_has_equal_images(self, tmp_path: Path) -> None:
        dataset = self.dataset([encoded(np.full((4, 4, 3), i, np.uint8)) for i in range(10)])
        dataset.to_parquet(tmp_path / "x.parquet")
        source = parquet_of(tmp_path / "x.parquet", tmp_path / "cache", label_column="kind")
        ours = open_source(dataset)
        assert isinstance(ours, HuggingFaceSource) and contents(source) == contents(ours)
        assert source.classes == ("a", "b")

    def test_images_stored_as_files(self, tmp_path: Path) -> None:
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column(
            "image", datasets.Image()
        )
        source = open_source(dataset)
        assert isinstance(source, HuggingFaceSource) and source.read(0) == (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").unlink()
        with pytest.raises(CorruptImageError, match=r"a\.png does not exist any more"):
            source.read(0)

    def test_other_dataset_types_are_rejected(self) -> None:
        dataset = self.dataset([encoded(np.zeros((4, 4, 3), np.uint8))])
        with pytest.raises(SourceError, match="must be a datasets.Dataset, got DatasetDict; pick a split"):
            open_source(datasets.DatasetDict({"train": dataset}))
        with pytest.raises(SourceError, match="got IterableDataset; pick a split, and do not stream"):
            open_source(dataset.to_iterable_dataset())
        with pytest.raises(
            SourceError, match=r"has no column of encoded images.* are text \(string\), kind \(class label\)"
        ):
            open_source(dataset.remove_columns("image"))


def test_png_pixels_are_unchanged(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_parquet(tmp_path / "x.parquet", [encoded(picture, "png")], [0])
    assert np.array_equal(np.asarray(parquet_of(tmp_path / "x.parquet", tmp_path / "cache").load(0)), picture)
    assert Image.open(io.BytesIO(parquet_of(tmp_path / "x.parquet", tmp_path / "cache").read(0))).format == "PNG"
