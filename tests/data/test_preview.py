"""Contact sheets: the views of training and their augmentation parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.config import Config, ConfigError, ViewConfig, recipes
from byol_fast.data import CorruptImageError, SourceError, ViewLoader, make_loader, open_train_val
from byol_fast.data.augment_params import sample_augment_params
from byol_fast.data.sources import ArraySource, FileSource, open_source
from byol_fast.report import preview, view_check
from byol_kernels.photometric.params import ADJUSTMENTS
from tests.data.helpers import CPU, config_of, loader_of, pixels, plain

VIEW1 = ViewConfig(size=56, blur_p=0.5)
VIEW2 = ViewConfig(size=56, blur_p=0.3, solarize_p=0.3)
VIEW3 = ViewConfig(size=28, scale=(0.05, 0.25), color_jitter_p=0.0)


def load_samples(
    source: Any, backend: str = "threaded", epoch: int = 0, num: int = 12, num_local_views: int = 0, **views: Any
) -> Any:
    config = config_of(backend, views.get("view1", VIEW1), views.get("view2", VIEW2), seed=3)
    local_view = views.get("local_view", config.local_view)
    config = configs.replace(config, {"num_local_views": num_local_views, "local_view": local_view})
    return preview.load_samples(source, config, device=CPU, num=num, epoch=epoch)


def is_in(small: NDArray[np.uint8], large: NDArray[np.uint8]) -> bool:
    """True if one picture is a part of another, pixel by pixel."""
    h, w = small.shape[:2]
    corner = (large[: large.shape[0] - h + 1, : large.shape[1] - w + 1] == small[0, 0]).all(axis=2)
    return any(
        np.array_equal(large[y, x : x + w], small[0]) and np.array_equal(large[y : y + h, x : x + w], small)
        for y, x in np.argwhere(corner)
    )


@pytest.mark.parametrize("epoch", [0, 2])
def test_preview_views_are_those_of_training(any_backend: str, arrays: ArraySource, epoch: int) -> None:
    """Whatever the batch size of the run."""
    local: dict[str, Any] = {"num_local_views": 1, "local_view": VIEW3}
    config = configs.replace(config_of(any_backend, VIEW1, VIEW2, seed=3, batch_size=16), local)
    loader = loader_of(arrays, config)
    batches = [next(loader) for _ in range(3 * epoch + 1)]
    samples = load_samples(arrays, any_backend, epoch, **local)
    assert len(samples) == 12
    for row, sample in enumerate(samples):
        index = int(batches[-1].index[row])
        assert sample.name == f"array[{index}]"
        assert np.array_equal(np.asarray(sample.original), arrays.images[index])
        for view, shown in zip(batches[-1].views, sample.views, strict=True):
            assert np.array_equal(pixels(view)[row], np.asarray(shown))


def test_operations_are_the_sampled_parameters(arrays: ArraySource) -> None:
    index = loader_of(arrays, config_of("threaded", VIEW1, VIEW2, seed=3, batch_size=12)).__next__().index.numpy()
    for number, view in enumerate((VIEW1, VIEW2)):
        d = sample_augment_params(view, index, seed=3, epoch=0, view=number)
        for row, sample in enumerate(load_samples(arrays)):
            operations = dict(sample.operations[number])
            assert list(operations) == ["crop", "flip", "jitter", "gray", "blur", "solarize"]
            top, left, h, w = sample.boxes[number]
            assert operations["crop"] == [f"{w} x {h} at {left}, {top} ({h * w / 4096:.0%})"]
            for mask, label in (
                ("flip", "flip"),
                ("jitter", "jitter"),
                ("grayscale", "gray"),
                ("solarize", "solarize"),
            ):
                assert bool(operations[label]) == getattr(d, mask)[row]
            assert operations["blur"] == ([f"sigma {d.sigma[row]:.2f}"] if d.blur[row] else [])
            if d.jitter[row]:
                parts = [part.split() for part in " ".join(operations["jitter"]).split(", ")]
                assert [name for name, _ in parts] == [ADJUSTMENTS[part] for part in d.order[row].tolist()]
                shown = dict(parts)
                for part, name in enumerate(ADJUSTMENTS):
                    assert float(shown[name]) == pytest.approx(d.factors[row, part], abs=0.0051)


def test_operations_match_the_pixels(arrays: ArraySource) -> None:
    view = plain(64, hflip_p=0.5, solarize_p=0.5, solarize_threshold=100)
    seen = set()
    for sample in load_samples(arrays, view1=view, view2=view, num=24):
        for shown, operations in zip(sample.views, sample.operations, strict=True):
            expected, happened = np.asarray(sample.original), dict(operations)
            expected = expected[:, ::-1] if happened["flip"] == ["yes"] else expected
            expected = np.where(expected < 100, expected, 255 - expected) if happened["solarize"] else expected
            assert happened["crop"] == ["64 x 64 at 0, 0 (100%)"]
            assert happened["solarize"] in ([], ["from 100"])
            assert np.array_equal(np.asarray(shown), expected)
            seen.add((bool(happened["flip"]), bool(happened["solarize"])))
    assert len(seen) == 4


def test_unused_operators_are_omitted(arrays: ArraySource) -> None:
    (sample, *_) = load_samples(arrays, view1=plain(32), view2=plain(32, blur_p=0.1))
    assert [[label for label, _ in operations] for operations in sample.operations] == [["crop", "blur"]] * 2


@pytest.mark.parametrize(
    ("size", "num", "shown"), [(28, 3, 224), (96, 3, 192), (224, 1, 224), (224, 3, 224), (300, 2, 300), (512, 2, None)]
)
def test_sheet_keeps_every_pixel_of_the_views(size: int, num: int, shown: int | None, arrays: ArraySource) -> None:
    samples = load_samples(arrays, num=num, view1=ViewConfig(size=size), view2=ViewConfig(size=size, solarize_p=1.0))
    sheet = np.asarray(preview.draw_sheet(samples, "title", "subtitle"))
    for sample in samples:
        for view in sample.views:
            large = view.resize((shown, shown), 0) if shown else view.resize((224, 224), Image.Resampling.LANCZOS)
            assert is_in(np.asarray(large), sheet)


def test_sheet_shows_all_local_views(arrays: ArraySource) -> None:
    """Five views of an image beside each other, the others below them."""
    sample = load_samples(arrays, num_local_views=16, view2=ViewConfig(size=100), local_view=VIEW3)[0]
    assert [view.width for view in sample.views] == [56, 100, *[28] * 16]
    sheet = np.asarray(preview.draw_sheet([sample], "title", "subtitle"))
    step, sizes = preview.TILE + preview.GAP, [224, 200, *[224] * 16]
    found = []
    for view, size in zip(sample.views, sizes, strict=True):
        large = np.asarray(view.resize((size, size), 0))
        for x in range(preview.MARGIN + step, sheet.shape[1], step):
            column = sheet[:, x : x + size]
            rows = np.flatnonzero((column[:, :1] == large[0, :1]).all(axis=(1, 2))).tolist()
            found += [(y, x) for y in rows if np.array_equal(column[y : y + size], large)]
    assert len(found) == 18 and found == sorted(found)
    assert len({x for _, x in found}) == 5 and len({y for y, _ in found}) == 4


def test_crops_are_outlined() -> None:
    """Black images in a sheet: blue is the first crop's outline, orange the second's, green the local view's.

    Each is too small to hide those before it.
    """
    source = ArraySource(np.zeros((6, 200, 300, 3), np.uint8))
    views: dict[str, Any] = {
        "view1": ViewConfig(scale=(0.3, 0.9)),
        "view2": ViewConfig(scale=(0.05, 0.06)),
        "local_view": ViewConfig(scale=(0.03, 0.04)),
    }
    for sample in load_samples(source, num=6, num_local_views=1, **views):
        sheet = np.asarray(preview.draw_sheet([sample], "", ""))
        original = sheet[100 : 110 + preview.TILE, preview.MARGIN : preview.MARGIN + preview.TILE]
        ys, xs = np.nonzero((original == 0).all(axis=2))
        top, left, scale = ys.min(), xs.min(), preview.TILE / 300
        for (y, x, h, w), color in zip(sample.boxes, preview.VIEW_COLORS, strict=True):
            rows, columns = np.nonzero((original == ImageColor.getrgb(color)).all(axis=2))
            # Half a pixel of rounding, and the white line around the colored one.
            assert abs(rows.min() - top - y * scale) <= 2.5 and abs(rows.max() - top - (y + h) * scale) <= 3.5
            assert abs(columns.min() - left - x * scale) <= 2.5 and abs(columns.max() - left - (x + w) * scale) <= 3.5


def test_extreme_shapes_are_drawn(tmp_path: Path) -> None:
    for n, (width, height) in enumerate(((400, 8), (8, 400), (1, 1), (5000, 4000))):
        Image.new("RGB", (width, height), (10 * n, 200, 90)).save(
            tmp_path / f"a name that is far too long for it {n}.png"
        )
    samples = load_samples(open_source(tmp_path), num=4)
    sheet = preview.draw_sheet(samples, "title", "subtitle")
    assert {sample.original.size for sample in samples} == {(400, 8), (8, 400), (1, 1), (5000, 4000)}
    assert all(is_in(np.asarray(s.views[0].resize((224, 224), 0)), np.asarray(sheet)) for s in samples)


def test_num_is_limited_to_the_images(files: FileSource) -> None:
    few = files.subset(np.arange(3))
    assert sorted(sample.name for sample in load_samples(few, num=8)) == sorted(few.sample_name(i) for i in range(3))


@pytest.mark.parametrize(
    ("changes", "error"), [({"num": 0}, "num must be an integer from 1 to 256, got 0"), ({"epoch": -1}, "epoch must")]
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], error: str, arrays: ArraySource) -> None:
    with pytest.raises(ConfigError, match=error):
        load_samples(arrays, **changes)


def test_one_image_is_refused(arrays: ArraySource) -> None:
    with pytest.raises(SourceError, match="must have at least 2 images, got 1"):
        load_samples(arrays.subset(np.arange(1)))


def test_corrupt_image_is_named_or_skipped(files: FileSource, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(files.path(0).read_bytes())
    (tmp_path / "3.jpg").write_bytes(b"no image")
    source = open_source(tmp_path)
    with pytest.raises(CorruptImageError, match=r"3\.jpg is not an image"):
        load_samples(source, num=6)
    config: Config = configs.replace(config_of("threaded", VIEW1, VIEW2), {"data.on_corrupt": "skip"})
    shown = preview.load_samples(source, config, device=CPU, num=6)
    assert len(shown) == 6 and not any(sample.name.endswith("3.jpg") for sample in shown)


# ---- the command ---------------------------------------------------------------------------------------------------


def byol_fast(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "byol_fast", "preview", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240, check=False)


def test_command_writes_a_sheet_and_checks_the_loader(tmp_path: Path) -> None:
    ended = byol_fast("demo", "--num", "3", "--output", "a/sheet.png", "--check", "--data.threads", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "a/sheet.png"
    assert lines[-1].endswith("errors checked, none too large")
    assert any(line.startswith("jitter") and line.endswith("OK") for line in lines)
    assert not any("FAIL" in line for line in lines)
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        config = configs.replace(recipes.demo(), {"data.threads": 1})
        source, _ = open_train_val(config)
        assert sheet.tobytes() == preview.contact_sheet(source, config, device=CPU, num=3).tobytes()


def test_command_fails_if_an_error_is_too_large(npz: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A loader that blurs less than it was asked to."""

    def make_wrong_loader(source: Any, config: Config, views: tuple[ViewConfig, ...], **options: Any) -> ViewLoader:
        return make_loader(source, config, tuple(configs.replace(v, {"blur_kernel": 5}) for v in views), **options)

    monkeypatch.setattr(view_check, "make_loader", make_wrong_loader)
    to = tmp_path / "sheet.png"
    options = ["--data.root", str(npz), "--data.threads", "1", "--view1.blur-p", "0.5", "--output", str(to)]
    with pytest.raises(SystemExit) as stopped:
        main.main(["preview", "cifar10_resnet18", *options, "--check"])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("blur") and " FAIL (" in line for line in lines)
    assert "too large" in lines[-1] and "none" not in lines[-1]
    assert to.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "byol-fast preview: a recipe is missing"),
        (["dem"], "did you mean 'demo'?"),
        (["demo", "--output", "sheet.jpg"], "output must be a file that ends in .png, got sheet.jpg"),
        (["demo", "--num", "-3"], "num must be an integer from 1 to 256, got -3"),
        (["imagenet_resnet50"], "give --data.root FOLDER"),
        (["imagenet_resnet50", "--data.root", "nowhere"], "nowhere does not exist"),
    ],
    ids=str,
)
def test_wrong_arguments_are_explained(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main.main(["preview", *arguments])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
