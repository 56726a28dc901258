"""Class folders and files whose names hold anything but `/` and NUL, through every output."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast import config as configs
from byol_fast.cli import embed, main
from byol_fast.config import Config, ConfigError
from byol_fast.data import CorruptImageError, SourceError, open_source
from byol_fast.data.integrity import CorruptImages
from byol_fast.doctor.main import ScanData, scan_data
from byol_fast.evaluate import load_features
from byol_fast.export.encoder import export_encoder
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.report import preview
from byol_fast.report.pictures import maps
from byol_fast.utils.files import original_name
from byol_fast.utils.output import PlainConsole
from tests.report.parsing import svg, texts

NAMES: dict[str | bytes, str] = {
    b"caf\xe9": r"caf\xe9",
    b"[bold]x[link=http:": "[bold]x[link=http:",
    b"a\nb\tc\r": r"a\nb\tc\r",
    b"\x1b[31m\x7f": r"\x1b[31m\x7f",
    b"<script>&amp;\"'`": "<script>&amp;\"'`",
    rb"$\alpha_{$ \xe9": r"$\\alpha_{$ \\xe9",
    b"%s %(x)d {0}": "%s %(x)d {0}",
    b"-rf :smile: :100:": "-rf :smile: :100:",
    "\u202eabc\u200f\u2028\x85": r"\u202eabc\u200f\u2028\u0085",
    "ü🐈": "ü🐈",
    b"a" * 250: "a" * 250,
}  # as on disk, and as text
PRINTED = sorted(NAMES.values())


@pytest.fixture
def root(tmp_path: Path, photos: np.ndarray) -> Path:
    """A class folder of each name with two images of that name, below a folder with markup in its path."""
    folder = tmp_path / os.fsdecode(b"data\xff[") / "b]%s"
    for number, name in enumerate(NAMES):
        plain = os.fsdecode(name)
        (folder / plain).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(photos[2 * number + i, :16, :16]).save(folder / plain / f"{plain[:245]}{i}.png")
    return folder


@pytest.fixture
def encoder(tiny: Config, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build_encoder("resnet18_narrow", cifar_stem=True)
    export_encoder(network, tiny, tmp_path / "encoder", step=7, feature_dim=feature_dim(network, 16))
    return tmp_path / "encoder"


def listed(folder: Path) -> set[bytes]:
    """All files below a folder, as the file system says."""
    base = os.fsencode(folder)
    return {os.path.relpath(f + b"/" + name, base) for f, _, names in os.walk(base) for name in names}


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_features_name_the_files(
    suffix: str, encoder: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == "parquet":
        pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    output, sheet = tmp_path / f"features.{suffix}", tmp_path / "sheet.png"
    bad = next(root.glob("a\nb*")) / "broken\n[i].png"
    bad.write_bytes(b"x")
    files = listed(root) - {os.fsencode(bad.relative_to(root))}
    options = ["--output", str(output), "--threads", "1", "--device", "cpu", "--precision", "fp32"]
    with pytest.raises(ConfigError, match=r"broken\\n\[i\]\.png is not an image; replace it"):
        embed.main([str(encoder), str(root), *options])
    assert embed.main([str(encoder), str(root), *options, "--neighbors", str(sheet), "--on-corrupt", "skip"]) == 0
    assert r"1 (a\nb\tc\r/broken\n[i].png)" in capsys.readouterr().out
    results = load_features(output)
    assert set(map(os.fsencode, results.paths)) == files and len(results.paths) == len(files)
    assert results.skipped == (str(bad.relative_to(root)),)
    assert set(map(os.fsencode, results.classes)) == {os.fsencode(os.fsdecode(name)) for name in NAMES}
    assert results.labels is not None
    assert [path.split("/")[0] for path in results.paths] == [results.classes[label] for label in results.labels]
    with Image.open(sheet) as image:
        assert image.size[0] > 0
    if suffix == "parquet":
        table = pq.read_table(output)
        assert sorted(set(table["class"].to_pylist())) == PRINTED
        assert {os.fsencode(original_name(text)) for text in table["path"].to_pylist()} == files


def test_tar_members_are_named_as_in_the_archive(encoder: Path, root: Path, tmp_path: Path) -> None:
    shard = tmp_path / os.fsdecode(b"b:\xe9") / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        tar.add(root, ".", filter=lambda member: member if len(member.name) < 200 else None)
    output = tmp_path / "features.npz"
    arguments = [str(encoder), str(shard), "--output", str(output), "--threads", "1", "--device", "cpu"]
    assert embed.main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    members = [b"a.tar:./" + name for name in listed(root) if len(name) < 198]
    found = [os.fsencode(path) for path in load_features(output).paths]
    assert sorted(path.replace(b":./", b":") for path in found) == sorted(m.replace(b":./", b":") for m in members)


def test_parquet_file_that_its_reader_cannot_open_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    shard = tmp_path / os.fsdecode(b"a\xe9.parquet")
    shard.touch()
    with pytest.raises(SourceError, match=r"must have a path in UTF-8, as pyarrow needs; rename it"):
        open_source(shard)


def test_printed_names_are_lines_of_plain_text(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in root.rglob("*1.png"):
        file.write_bytes(b"x")
    result = scan_data(ScanData(root=root, threads=1), fast=False, console=PlainConsole(width=2000))["training"]
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("1.png is not an image") for line in shown) == len(NAMES)
    assert any(r"data\xff[/b]%s/caf\xe9/caf\xe91.png" in line for line in shown)
    assert any(line.startswith("training images: 22 images of 11 classes in") for line in shown)
    assert sorted(result["classes"]) == PRINTED
    assert {os.fsencode(original_name(bad["image"])) for bad in result["corrupt"]} == {
        os.fsencode(file) for file in root.rglob("*1.png")
    }

    source = open_source(root)
    for i in range(1, 22, 2):
        with pytest.raises(CorruptImageError, match="1.png is not an image; replace it") as caught:
            source.load(i)
        error = pickle.loads(pickle.dumps(caught.value))
        assert error.path == caught.value.path == source.root / source.paths[i]  # type: ignore[attr-defined]
        assert str(error) == str(caught.value) and len(str(error).splitlines()) == 1
    corrupt = CorruptImages(source.sample_name, len(source), on_corrupt="skip", corrupt_list=tmp_path / "list.jsonl")
    corrupt.add([(i, "is not an image") for i in range(0, 22, 2)], 0)
    entries = [json.loads(line) for line in (tmp_path / "list.jsonl").read_bytes().decode("ascii").splitlines()]
    assert [os.fsencode(original_name(entry["image"])) for entry in entries] == [
        os.fsencode(source.root / source.paths[i])  # type: ignore[attr-defined]
        for i in range(0, 22, 2)
    ]

    with pytest.raises(SystemExit) as end:
        main.main(["train", "demo", "--data.builtin", "none", "--data.root", f"{root}[/i]", "--name", "x"])
    assert end.value.code == 2
    assert r"data\xff[/b]%s[/i] does not exist" in capsys.readouterr().err


def test_records_figures_and_sheets_have_the_names(encoder: Path, root: Path, tmp_path: Path, tiny: Config) -> None:
    arguments = ["--train", str(root), "--test", str(root), "--device", "cpu", "--output", str(tmp_path / "eval")]
    second = tmp_path / "test"
    for file in root.rglob("*0.png"):
        (second / file.parent.name).mkdir(parents=True)
        Image.fromarray(np.asarray(Image.open(file))[::-1]).save(second / file.parent.name / "flipped.png")
    arguments[3] = str(second)
    with pytest.raises(SystemExit) as end:
        main.main(["eval", "knn", str(encoder), *arguments, "--threads", "1"])
    assert end.value.code == 0
    record = json.loads((tmp_path / "eval" / "knn.json").read_text("ascii"))
    json.dumps(record, ensure_ascii=False).encode()  # fails with lone surrogates
    assert sorted(record["classes"]) == sorted(c["class"] for c in record["per_class"]) == PRINTED
    shown = texts(svg((tmp_path / "eval" / "knn_confusion.svg").read_text("utf-8")))
    assert {r"caf\xe9", r"a\nb\tc\r", "<script>&amp;\"'`", "ü🐈", r"\x1b[31m\x7f"} <= set(shown)

    source = open_source(root)
    chart = maps(torch.randn(22, 4), source.labels, source.classes)[0]
    assert r"caf\xe9" in texts(svg(chart)) or r"\x1b[31m\x7f" in texts(svg(chart))
    config = configs.replace(tiny, {"data": {"root": root, "loader": "threaded"}})
    samples = preview.load_samples(source, config, device=torch.device("cpu"), num=22)
    assert {os.fsencode(original_name(sample.name)) for sample in samples} == {
        os.fsencode(root) + b"/" + name for name in listed(root)
    }
    preview.write(preview.draw_sheet(samples, "[/b]", source.describe()), tmp_path / "sheet.png")
