"""Features of folders, their files, effective rank, and sheets of nearest neighbours."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast.cli import embed as command
from byol_fast.config import Config, ConfigError
from byol_fast.data import CorruptImageError, open_source
from byol_fast.data.sources import ArraySource
from byol_fast.evaluate import Features, embed_folder, load_features, nearest, rankme, save_features
from byol_fast.evaluate.neighbors import choose_queries
from byol_fast.export.encoder import export_encoder, load_encoder
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.report.neighbor_sheet import FRAME, GAP, LINE, MARGIN, OTHER, SAME, TILE, TITLE, neighbor_sheet
from byol_fast.report.preview import INK


@pytest.fixture
def encoder(tiny: Config, tmp_path: Path) -> Path:
    """An exported encoder for 16 px, untrained."""
    torch.manual_seed(0)
    network = build_encoder("resnet18_narrow", cifar_stem=True)  # as the recipe says
    folder = tmp_path / "encoder"
    export_encoder(network, tiny, folder, step=7, feature_dim=feature_dim(network, 16))
    return folder


@pytest.fixture
def folder(tmp_path: Path, photos: np.ndarray) -> Path:
    """Twelve PNGs of 16 px in two classes, one in a nested folder."""
    root = tmp_path / "images"
    for i, pixels in enumerate(photos[:12]):
        path = root / ("cats/young" if i == 3 else "cats" if i % 2 else "dogs") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:16, :16]).save(path)
    return root


def test_features_are_the_encoders_of_each_image_in_the_order_of_the_paths(encoder: Path, folder: Path) -> None:
    found = embed_folder(encoder, folder, batch_size=5, device="cpu", precision="fp32", threads=1)
    assert found.paths == tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")))
    assert found.classes == ("cats", "dogs")
    assert found.labels is not None
    assert [found.classes[label] for label in found.labels] == [name.partition("/")[0] for name in found.paths]
    network, about = load_encoder(encoder)
    pixels = np.stack([np.asarray(Image.open(folder / name)) for name in found.paths])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    x = (x - torch.tensor(about["mean"]).view(3, 1, 1)) / torch.tensor(about["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = network.double()(x).flatten(1)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert (found.about["step"], found.about["precision"]) == (7, "fp32")


def test_images_that_cannot_be_read_are_named_or_left_out_and_listed(encoder: Path, folder: Path) -> None:
    whole = embed_folder(encoder, folder, device="cpu", precision="fp32", threads=1)
    bad = folder / whole.paths[4]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(CorruptImageError, match=bad.name):
        embed_folder(encoder, folder, device="cpu", threads=1)
    found = embed_folder(encoder, folder, device="cpu", precision="fp32", threads=1, on_bad="skip")
    assert found.skipped == (whole.paths[4],)
    assert found.paths == whole.paths[:4] + whole.paths[5:]
    assert found.index.tolist() == [0, 1, 2, 3, *range(5, 12)]
    np.testing.assert_allclose(found.features, np.delete(whole.features, 4, 0), rtol=1e-4, atol=1e-5)
    assert found.labels is not None
    assert whole.labels is not None
    assert found.labels.tolist() == np.delete(whole.labels, 4).tolist()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("labelled", [False, True])
def test_files_give_back_what_was_written(tmp_path: Path, suffix: str, labelled: bool) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    written = Features(
        features=np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        paths=("a/ü 1.jpg", "b.jpg", "c.jpg"),
        index=np.array([0, 2, 3]),
        labels=np.array([1, -1, 0]) if labelled else None,
        classes=("x", "y") if labelled else (),
        skipped=("bad.jpg",),
        rankme=2.5,
        about={"encoder": "resnet18", "mean": [0.5, 0.5, 0.5]},
    )
    path = tmp_path / "new" / f"features{suffix}"
    save_features(written, path)
    read = load_features(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for name in ("features", "index", "labels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert replace(read, features=0, index=0, labels=None) == replace(written, features=0, index=0, labels=None)  # type: ignore[arg-type]
    if suffix == ".npz":  # what other programs find in it
        with np.load(path) as file:
            assert {"features", "paths"} <= set(file)
            assert ("labels" in file) == ("classes" in file) == labelled


def test_what_cannot_be_written_or_read_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Features(features=np.zeros((1, 2), np.float32), paths=("a",), index=np.array([0]))
    with pytest.raises(ConfigError, match=r"must be a file that ends in .npz or .parquet, got .*features.csv"):
        save_features(found, tmp_path / "features.csv")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output must be a file that can be written"):
        save_features(found, tmp_path / "file" / "features.npz")
    with pytest.raises(FileNotFoundError, match="byol-fast embed"):
        load_features(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ConfigError, match=r"other.npz must be a file of `byol-fast embed`"):
        load_features(tmp_path / "other.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs pyarrow; pip install pyarrow, or write .npz"):
        save_features(found, tmp_path / "features.parquet")


# ---- effective rank ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (40, 40), (5, 1), (1, 5)], ids=str)
def test_rankme_is_the_papers_formula_on_numpys_singular_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.geomspace(1, 1e-3, shape[1]) + 0.3).astype(np.float32)
    sigma = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    expected = np.exp(-(p * np.log(p)).sum())
    assert rankme(torch.from_numpy(x), chunk=7) == pytest.approx(expected, rel=1e-6)


def test_rankme_of_known_ranks() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    for rank in (1, 2, 16, 64):  # as many equal directions
        x = torch.randn(500, rank, dtype=torch.float64)
        x = torch.linalg.qr(x)[0] @ basis[:rank]
        assert rankme(x) == pytest.approx(rank, rel=1e-3)
    assert rankme(torch.zeros(4, 3)) == 0
    assert math.isnan(rankme(torch.full((4, 3), math.nan)))
    with pytest.raises(ValueError, match=r"features must be \[N, D\]"):
        rankme(torch.zeros(0, 3))


# ---- neighbours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_nearest_is_the_definition(chunk: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    x[31] = 2 * x[4]  # equally similar to anything, later
    queries = [4, 17, 49]
    similarity, rows = nearest(x, x[queries], k=49, exclude=queries, chunk=chunk)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    for row, query in enumerate(queries):
        cosines = unit @ unit[query]
        others = sorted((i for i in range(50) if i != query), key=lambda i: (-round(cosines[i], 6), i))
        assert rows[row].tolist() == others
        np.testing.assert_allclose(similarity[row], cosines[others], atol=1e-6)


def test_queries_come_from_all_classes_and_are_always_the_same() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 2, 1])
    for num in (1, 2, 4, 6, 20, 500):
        chosen = choose_queries(153, num, labels)
        assert chosen == choose_queries(153, num, labels)
        assert len(set(chosen)) == len(chosen) == min(num, 153)
        assert len({int(labels[i]) for i in chosen}) == min(num, 4)
    assert choose_queries(100, 4) == choose_queries(100, 4, np.full(100, -1)) == [12, 37, 62, 87]


def test_the_sheet_shows_the_nearest_and_whether_their_class_agrees() -> None:
    """Images of one colour for each of four groups; features tell the groups apart, labels only pairs of them."""
    group = np.arange(20) % 4
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)
    images = np.broadcast_to(colours[group][:, None, None], (20, 30, 30, 3)).copy()
    source = ArraySource(images)
    features = np.eye(4, dtype=np.float32)[group] + np.float32(0.01)
    labels = np.where(np.arange(20) < 12, group, (group + 1) % 4)  # the last two of each group are labelled otherwise
    sheet = neighbor_sheet(source, features, queries=[0, 1, 14], k=4, labels=labels)

    def tile(row: int, column: int) -> tuple[Any, Any]:
        x = MARGIN + column * (TILE + GAP) + (GAP if column else 0)
        y = 2 * MARGIN + TITLE + LINE + 8 + row * (TILE + GAP + 2 * LINE)
        return sheet.getpixel((x + FRAME // 2, y + TILE // 2)), sheet.getpixel((x + TILE // 2, y + TILE // 2))

    def rgb(text: str) -> tuple[int, ...]:
        return tuple(bytes.fromhex(text[1:]))

    for row, query in enumerate([0, 1, 14]):
        assert tile(row, 0) == (rgb(INK), tuple(colours[group[query]]))
        for column, i in enumerate((j for j in range(20) if group[j] == group[query] and j != query), start=1):
            frame = SAME if labels[i] == labels[query] else OTHER
            assert tile(row, column) == (rgb(frame), tuple(colours[group[query]]))
    own = ArraySource(images[3:4])
    sheet = neighbor_sheet(source, features, own=(own, features[3:4]), k=2)
    assert [tile(0, column)[1] for column in (0, 1, 2)] == [tuple(colours[3])] * 3


def test_wrong_arguments_of_sheets_are_explained(photos: np.ndarray) -> None:
    source = ArraySource(photos)
    with pytest.raises(ValueError, match="one for each of 2 or more images, got 59 for 60"):
        neighbor_sheet(source, np.ones((59, 4), np.float32))
    with pytest.raises(ValueError, match="features must be finite"):
        neighbor_sheet(source, np.full((60, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"k must be 1..59"):
        nearest(np.ones((60, 4), np.float32), np.ones((1, 4), np.float32), k=60, exclude=[3])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_features_and_a_sheet(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, sheet = tmp_path / "f.npz", tmp_path / "sheet.png"
    (folder / "cats" / "07.png").write_bytes(b"no image")
    options = ["--output", str(to), "--threads", "1", "--precision", "fp32", "--device", "cpu"]
    with pytest.raises(ConfigError, match=r"07.png .*leave such images out: --on-bad skip"):
        command.main([str(encoder), str(folder), *options])
    assert not to.exists()
    mine = tmp_path / "mine.png"
    Image.open(folder / "dogs" / "00.png").save(mine)
    arguments = [*options, "--on-bad", "skip", "--neighbors", str(sheet), "--k", "3", "--query", str(mine)]
    assert command.main([str(encoder), str(folder), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{to}: 11 images, 256 features each, 2 classes" in printed
    assert "cannot be read: 1 (cats/07.png)" in printed
    assert len(load_features(to).paths) == 11
    with Image.open(sheet) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 100
    expected = open_source(folder).subset(load_features(to).index)
    assert [Path(expected.sample_name(i)).name for i in range(2)] == [Path(p).name for p in load_features(to).paths[:2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "x.png"], "add --neighbors FILE.png"),
        (["--neighbors", "x.png", "--query", "no.png"], r"query images must exist, no\.png does not"),
        (["--neighbors", "x.jpg"], "neighbors must be a file that ends in .png"),
        (["--output", "x.csv"], "output must be a file that ends in .npz or .parquet"),
        (["--k", "0"], "k and batch_size must be 1 or more"),
    ],
)
def test_wrong_options_are_explained_before_anything_is_read(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(["no/run", "no/folder", *options])


def test_what_cannot_be_written_is_told_before_anything_is_embedded(
    encoder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byol_fast.evaluate.embed_folder", lambda *_, **__: pytest.fail("it embeds"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    for to in ("file/features.npz", "folder.npz"):
        with pytest.raises(ConfigError, match=r"\.npz cannot be written \(.*choose another file"):
            command.main([str(encoder), str(folder), "--output", str(tmp_path / to)])


def test_a_file_that_exists_is_replaced_only_when_asked_for(encoder: Path, folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "features.npz"
    options = [str(encoder), str(folder), "--output", str(to), "--threads", "1", "--device", "cpu"]
    assert command.main(options) == 0
    first = to.read_bytes()
    (folder / "cats" / "07.png").unlink()
    with pytest.raises(ConfigError, match=r"features\.npz exists already; .* --overwrite"):
        command.main(options)
    assert to.read_bytes() == first
    assert command.main([*options, "--overwrite"]) == 0
    assert len(load_features(to).paths) == 11


def test_parts_of_a_data_set_taken_for_classes_are_pointed_out(
    encoder: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cats").rename(folder / "train")
    (folder / "dogs").rename(folder / "val")
    embed_folder(encoder, folder, device="cpu", threads=1)
    assert "the folders train and val are taken as classes" in caplog.text
