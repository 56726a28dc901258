"""Features of folders, their files, and the command that writes them."""

from __future__ import annotations

import errno
import json
import re
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from byol_fast.cli import embed as command
from byol_fast.config import Config, ConfigError, DataConfig, Preprocessing
from byol_fast.config.evaluation import KNNSettings
from byol_fast.data import CorruptImageError, SourceError, open_source
from byol_fast.evaluate import Features, embed_folder, evaluate_knn, load_features, save_features
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.images import open_images
from byol_fast.export.encoder import export_encoder, load_encoder
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.report.neighbor_sheet import sheet_size


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


def test_features_are_in_order_of_paths(encoder: Path, folder: Path) -> None:
    results = embed_folder(encoder, folder, batch_size=5, device="cpu", precision="fp32", threads=1)
    assert results.paths == tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")))
    assert results.classes == ("cats", "dogs")
    assert results.labels is not None
    assert [results.classes[label] for label in results.labels] == [name.partition("/")[0] for name in results.paths]
    network, metadata = load_encoder(encoder)
    pixels = np.stack([np.asarray(Image.open(folder / name)) for name in results.paths])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(metadata["preprocessing"][name]).view(3, 1, 1) for name in ("mean", "std"))
    x = (x - mean) / std
    with torch.no_grad():
        expected = network.double()(x).flatten(1)
    np.testing.assert_allclose(results.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert (results.metadata["step"], results.metadata["precision"]) == (7, "fp32")


@pytest.mark.parametrize("wrong", [nn.Identity(), (nn.Identity(), None), (1, 2), 7, None])
def test_wrong_kind_of_encoder_is_refused(wrong: Any, folder: Path) -> None:
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=rf"embed_folder: encoder must be .* a pair \(module, metadata\), got {kind};"):
        embed_folder(wrong, folder, device="cpu", threads=1)
    with pytest.raises(TypeError, match=rf"eval: encoder must be .* or a PretrainedEncoder, got {kind};"):
        evaluate_knn(wrong, folder, folder)


def test_metadata_without_feature_dim_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="embed_folder: metadata must have feature_dim"):
        embed_folder((nn.Identity(), {"preprocessing": Preprocessing(crop=16).to_dict()}), folder, device="cpu")


def test_corrupt_images_raise_or_are_skipped(encoder: Path, folder: Path) -> None:
    whole = embed_folder(encoder, folder, device="cpu", precision="fp32", threads=1)
    bad = folder / whole.paths[4]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(CorruptImageError, match=bad.name):
        embed_folder(encoder, folder, device="cpu", threads=1)
    results = embed_folder(encoder, folder, device="cpu", precision="fp32", threads=1, on_corrupt="skip")
    assert results.skipped == (whole.paths[4],)
    assert results.paths == whole.paths[:4] + whole.paths[5:]
    assert results.index.tolist() == [0, 1, 2, 3, *range(5, 12)]
    np.testing.assert_allclose(results.features, np.delete(whole.features, 4, 0), rtol=1e-4, atol=1e-5)
    assert results.labels is not None
    assert whole.labels is not None
    assert results.labels.tolist() == np.delete(whole.labels, 4).tolist()


def test_damaged_tar_raises_or_is_used_up_to_the_damage(encoder: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".png")]
    with path.open("r+b") as file:
        file.seek(members[9].offset)
        file.write(b"x")
    options = DataConfig(cache=tmp_path / "cache")
    with pytest.raises(SourceError, match=r"images\.tar is damaged at byte \d+ \(images before it: 9\)"):
        embed_folder(encoder, path, device="cpu", threads=1, options=options)
    results = embed_folder(encoder, path, device="cpu", threads=1, on_corrupt="skip", options=options)
    pretrained = PretrainedEncoder(
        name="tiny", encoder=nn.Identity(), preprocessing=Preprocessing(crop=16), config=Config(data=options)
    )
    with pytest.raises(SourceError, match=r"--train: .*images\.tar is damaged at byte"):
        open_images(pretrained, path, folder, KNNSettings())
    assert len(open_images(pretrained, path, folder, KNNSettings(on_corrupt="skip")).train) == 9
    assert list(results.paths) == [f"images.tar:{member.name[2:]}" for member in members[:9]]


def documented_arrays() -> set[str]:
    """Names in the table of `docs/evaluation.md`."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    table = text[text.index("| array | contents |") :].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("labeled", [False, True])
def test_saved_features_are_loaded_unchanged(
    tmp_path: Path, suffix: str, labeled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        monkeypatch.setattr("byol_fast.evaluate.features.ROW_GROUP_VALUES", 5)
    written = Features(
        features=np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        paths=("a/ü 1.jpg", "b.jpg", "c.jpg"),
        index=np.array([0, 2, 3]),
        labels=np.array([1, -1, 0]) if labeled else None,
        classes=("x", "y") if labeled else (),
        skipped=("bad.jpg",),
        rankme=2.5,
        metadata={"encoder": "resnet18", "mean": [0.5, 0.5, 0.5]},
    )
    path = tmp_path / "new" / f"features{suffix}"
    save_features(written, path)
    read = load_features(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for name in ("features", "index", "labels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert replace(read, features=0, index=0, labels=None) == replace(written, features=0, index=0, labels=None)  # type: ignore[arg-type]
    if suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        assert ParquetFile(path).num_row_groups == 3
    if suffix == ".npz":  # for other programs
        with np.load(path) as file:  # without pickled objects
            assert set(file) == documented_arrays() - (set() if labeled else {"labels", "classes"})
            assert (file["features"].dtype, file["index"].dtype) == (np.float32, np.int64)
            assert all(file[name].dtype.kind == "U" for name in ("paths", "skipped", "metadata"))
            assert json.loads(str(file["metadata"])) == written.metadata


def test_unusable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Features(features=np.zeros((1, 2), np.float32), paths=("a",), index=np.array([0]))
    with pytest.raises(ConfigError, match=r"must be a file that ends in .npz or .parquet, got .*features.csv"):
        save_features(results, tmp_path / "features.csv")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"embed: .* cannot be written .*; choose another file"):
        save_features(results, tmp_path / "file" / "features.npz")
    with pytest.raises(FileNotFoundError, match="byol-fast embed"):
        load_features(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ConfigError, match=r"other.npz must be a file of `byol-fast embed`"):
        load_features(tmp_path / "other.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs pyarrow; pip install pyarrow, or write .npz"):
        save_features(results, tmp_path / "features.parquet")


def test_split_folders_as_classes_are_a_warning(encoder: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cats").rename(folder / "Train")
    (folder / "dogs").rename(folder / "val2017")
    embed_folder(encoder, folder, device="cpu", threads=1)
    assert "the folders Train and val2017 are taken as classes" in caplog.text


def test_command_writes_features_and_sheet(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, sheet = tmp_path / "f.npz", tmp_path / "neighbors.png"
    (folder / "cats" / "07.png").write_bytes(b"no image")
    options = ["--output", str(output), "--threads", "1", "--precision", "fp32", "--device", "cpu"]
    with pytest.raises(ConfigError, match=r"07.png .*leave out such images with --on-corrupt skip"):
        command.main([str(encoder), str(folder), *options])
    with pytest.raises(ConfigError, match=r"07.png .*; replace it, or leave it out of --query"):
        arguments = [*options, "--on-corrupt", "skip", "--query", str(folder / "cats" / "07.png")]
        command.main([str(encoder), str(folder), *arguments])
    assert not output.exists()
    mine = tmp_path / "mine.png"
    Image.open(folder / "dogs" / "00.png").save(mine)
    arguments = [*options, "--on-corrupt", "skip", "--k", "3", "--query", str(mine)]
    assert command.main([str(encoder), str(folder), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{output}: 11 images, 256 features each, 2 classes" in printed
    assert "cannot be read: 1 (cats/07.png)" in printed
    results = load_features(output)
    assert len(results.paths) == 11
    unit = results.features.astype(np.float64) / np.linalg.norm(results.features.astype(np.float64), axis=1)[:, None]
    cosines = unit @ unit[list(results.paths).index("dogs/00.png")]
    nearest = np.argsort(-cosines, kind="stable")[:3]
    lines = [f"  {cosines[i]:.3f}  {folder / results.paths[i]}" for i in nearest]
    assert "\n".join([f"{mine}: the most similar images, by the cosine of their features", *lines]) in printed
    with Image.open(sheet) as image:
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    assert len(colors) > 100
    expected = open_source(folder).subset(load_features(output).index)
    assert [Path(expected.sample_name(i)).name for i in range(2)] == [
        Path(p).name for p in load_features(output).paths[:2]
    ]


def test_query_finds_the_only_image(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = folder / "cats" / "young" / "03.png"
    arguments = [str(only.parent), "--output", f"{tmp_path}/f.npz", "--query", str(only), "--device", "cpu"]
    assert command.main([str(encoder), *arguments, "--threads", "1"]) == 0
    assert f"  1.000  {only}" in capsys.readouterr().out
    with Image.open(tmp_path / "neighbors.png") as sheet:
        assert sheet.size == sheet_size(1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "."], r"query must be image files, got the folder \.; name the images in it"),
        (["--query", "no.png"], r"query images must exist, no\.png does not"),
        (["--neighbors", "x.png", "--query", "no.png"], r"query images must exist, no\.png does not"),
        (["--neighbors", "x.jpg"], "neighbors must be a file that ends in .png"),
        (["--output", "x.csv"], "output must be a file that ends in .npz or .parquet"),
    ],
)
def test_invalid_options_are_refused_before_reading(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(["no/run", "no/folder", *options])


def test_unwritable_output_is_refused_before_embedding(
    encoder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byol_fast.evaluate.embed_folder", lambda *_, **__: pytest.fail("it embeds"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    for output in ("file/features.npz", "folder.npz", "ü" * 126 + ".npz"):
        with pytest.raises(ConfigError, match=r"\.npz cannot be written \(.*choose another file"):
            command.main([str(encoder), str(folder), "--output", str(tmp_path / output)])
    one = folder / "cats" / "young"
    with pytest.raises(
        ConfigError, match=r"must have 2 or more images to select from, got 1 in .*young; leave --neigh"
    ):
        command.main([str(encoder), str(one), "--output", str(tmp_path / "f.npz"), "--neighbors", f"{tmp_path}/n.png"])
    options = [str(encoder), str(folder), "--output", str(tmp_path / "f.npz"), "--neighbors", str(tmp_path / "n.png")]
    with pytest.raises(ValueError, match=r"at most 89,478,485 pixels, got [\d,]+ x [\d,]+ for 9000 and 12; set"):
        command.main([*options, "--k", "99", "--query", *[str(folder / "dogs" / "00.png")] * 9000])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * 256 * 4 - 1))
    with pytest.raises(ConfigError, match=r"needs 1\.14e-05 GiB for 12 images with 256 features, .* free; free space"):
        command.main(options)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * 256 * 4))
    monkeypatch.setattr("PIL.Image.Image.save", fail_to_write)
    with pytest.raises(ConfigError, match=r"n\.png cannot be written"):
        command.main(options)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder.npz", "images", "encoder", "photos.npz"}


def fail_to_write(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_existing_file_needs_overwrite(encoder: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "features.npz"
    options = [str(encoder), str(folder), "--output", str(output), "--threads", "1", "--device", "cpu"]
    assert command.main(options) == 0
    first = output.read_bytes()
    (folder / "cats" / "07.png").unlink()
    with pytest.raises(
        ConfigError, match=r"features\.npz exists already; name another file with --output, or .* --overwrite"
    ):
        command.main(options)
    assert output.read_bytes() == first
    assert command.main([*options, "--overwrite"]) == 0
    assert len(load_features(output).paths) == 11
