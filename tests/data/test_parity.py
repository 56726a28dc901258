"""Every operator alone, and whole views, against torchvision with the same drawn parameters; and that errors show."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2 as T

from byol_fast import config as configs
from byol_fast.config import Config, ViewConfig, recipes
from byol_fast.data import parity
from byol_fast.data.augment_params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, crop_windows, draw
from byol_fast.data.loaders.factory import dali_installed
from byol_fast.data.sources import ArraySource, FileSource, ImageSource, open_source
from tests.data.helpers import CPU, config_of, error, loader_of, pixels, plain

COLOURS = ["flip", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur", "solarize"]
VIEWS = ["view 1", "view 1, blur 23", "view 2", "view 2, blur 23"]
STRONG = dict[str, Any](brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, blur=0.5, blur_kernel=7)
STRONG |= dict[str, Any](solarize=0.5, solarize_threshold=64, interpolation="bilinear")
FUSED = {(operator, "dali, hsv") for operator in ("jitter", "view 1", "view 2")}


def paper(size: int, **data: Any) -> Config:
    changes = {"view1.size": size, "view2.size": size, "data": {"threads": 1, **data}}
    return configs.replace(recipes.imagenet_resnet50(), changes)


def names() -> set[str]:
    own = {"torchvision, PIL", "torchvision, kernels"}
    return own | {"dali, exact", "dali, hsv", "dali, kernels"} if dali_installed() else own


def failures(rows: list[parity.Row]) -> list[str]:
    return list(parity.lines(row for row in rows if not row.ok))[1:]


def measured(source: ImageSource, config: Config, **options: Any) -> list[parity.Row]:
    return list(parity.measure(source, config, parity.backends(source, config, CPU), **options))


# ---- what is measured ----------------------------------------------------------------------------------------------


def test_all_back_ends_on_photographs(photographs: FileSource) -> None:
    """The paper's recipe on 64 images of ImageNet, in smaller views."""
    rows = measured(photographs, paper(96))
    assert not failures(rows)
    judged = defaultdict(set)
    for row in rows:
        judged[row.operator].add(row.backend)
    for operator in ["decode", "decode, crop", "crop", *COLOURS, *VIEWS]:
        assert judged[operator] >= names(), operator
    assert judged["normalise"] == {"model cpu"}


def test_all_back_ends_on_files_of_odd_sizes(files: FileSource) -> None:
    """The fused jitter is at its limit for images of much colour."""
    rows = measured(files, paper(48), num_images=40)
    assert not failures([row for row in rows if (row.operator, row.backend) not in FUSED])
    assert {row.operator for row in rows} == {"decode", "decode, crop", "crop", "normalise", *COLOURS, *VIEWS}


@pytest.mark.parametrize("changes", [{}, STRONG], ids=["paper", "strong"])
def test_all_back_ends_on_arrays(changes: dict[str, Any], arrays: ArraySource) -> None:
    config = configs.replace(paper(48), {"view1": changes, "view2": changes})
    rows = measured(arrays, config, num_images=48)
    assert not failures([row for row in rows if (row.operator, row.backend) not in FUSED])
    assert {row.backend for row in rows} >= names() | {"resident, kernels"}


def test_operators_that_the_run_does_not_use_are_left_out(arrays: ArraySource) -> None:
    config = configs.replace(recipes.demo(), {"data.threads": 1})
    rows = list(parity.measure(arrays, config, [parity.Backend(arrays, config, CPU)], num_images=8))
    operators = {"crop", "flip", "brightness", "contrast", "jitter", "blur", "normalise", *VIEWS}
    assert {row.operator for row in rows} == operators
    assert not failures(rows)


def test_the_runs_own_loader_is_the_first(arrays: ArraySource, dali: None) -> None:
    for data, name in (
        ({"loader": "dali", "color": "hsv"}, "dali, hsv"),
        ({"loader": "torchvision", "augment": "library"}, "torchvision, PIL"),
        ({"loader": "resident"}, "resident, kernels"),
    ):
        config = configs.replace(paper(32), {"data": data})
        found = [backend.name for backend in parity.backends(arrays, config, CPU)]
        assert found[0] == name
        assert sorted(found) == sorted(names() | {"resident, kernels"})


# ---- errors show ---------------------------------------------------------------------------------------------------


class Wrong(parity.Backend):
    """Makes views of other settings than it was asked for, where these are in use."""

    def __init__(self, source: ImageSource, config: Config, **changes: Any) -> None:
        super().__init__(source, config, CPU)
        self.changes = changes

    def views(
        self, source: ImageSource, views: tuple[ViewConfig, ViewConfig]
    ) -> tuple[NDArray[np.int64], list[parity.Pixels]]:
        first, second = (
            dataclasses.replace(view, **{k: v for k, v in self.changes.items() if getattr(view, k)}) for view in views
        )
        return super().views(source, (first, second))


WRONG = dict[str, Any](interpolation="bilinear", flip=0.45, brightness=0.36, contrast=0.36, saturation=0.18)
WRONG |= dict[str, Any](hue=0.09, grayscale=0.5, blur_sigma=(0.1, 1.8), solarize_threshold=127)


def test_every_wrong_operator_fails(any_backend: str, arrays: ArraySource) -> None:
    """Settings that are wrong by a tenth; a largest sigma of 1.8 for 2."""
    loader, _, kernels = any_backend.partition("+")
    config = paper(32, loader=loader, augment="kernels" if kernels else "library")
    rows = list(parity.measure(arrays, config, [Wrong(arrays, config, **WRONG)], num_images=48))
    failed = {row.operator for row in rows if not row.ok}
    assert failed == {"crop", *COLOURS, "view 1", "view 2"}
    assert all(line.endswith("FAIL") for line in failures(rows))


@pytest.mark.parametrize(
    ("changes", "operator"),
    [
        ({"hue": 0.0}, "jitter"),
        ({"blur_kernel": 5}, "blur"),
        ({"flip": 0.4}, "view 2"),
        ({"solarize": 0.1}, "view 2"),
    ],
    ids=str,
)
def test_a_part_that_is_missing_fails(changes: dict[str, Any], operator: str, arrays: ArraySource) -> None:
    config = paper(32)
    rows = list(parity.measure(arrays, config, [Wrong(arrays, config, **changes)], num_images=48))
    assert operator in {row.operator for row in rows if not row.ok}


def test_leaving_out_the_clips_of_the_jitter_fails(arrays: ArraySource, dali: None) -> None:
    """In one value of a thousand it is as far off as no rounding is."""
    config = paper(48, loader="dali", color="hsv")
    backend = parity.Backend(arrays, config, CPU)
    backend.fused = False
    rows = list(parity.measure(arrays, config, [backend], num_images=48))
    row = next(row for row in rows if row.operator == "jitter")
    assert row.limit is not None and row.error.p999 > 3 * row.limit.p999
    assert not dataclasses.replace(row, limit=dataclasses.replace(row.limit, mean=np.inf)).ok


def test_the_figures_of_an_error() -> None:
    counts = np.zeros(256, np.int64)
    counts[[0, 1, 3, 200]] = 4990, 5000, 9, 1
    assert parity._error(counts) == parity.Error(max=200, p999=1, mean=(5000 + 27 + 200) / 10000)
    a, b = np.array([0, 10, 255], np.uint8), np.array([255, 12, 255], np.uint8)
    assert parity._differences(a, b).nonzero()[0].tolist() == [0, 2, 255]


# ---- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [False, True], ids=["PIL", "tensors"])
def test_the_reference_is_torchvisions_own_pipeline(tensors: bool, arrays: ArraySource, monkeypatch: Any) -> None:
    """Its transforms as a training script composes them, with drawn parameters in the place of their own."""
    view = ViewConfig(size=48, blur=0.5, solarize=0.5, grayscale=0.3)
    d = draw(view, np.arange(len(arrays)), seed=0, epoch=0, view=0)
    given: dict[type, dict[str, Any]] = {}
    for transform in (T.RandomResizedCrop, T.ColorJitter):
        monkeypatch.setattr(transform, "make_params", lambda self, _: given[type(self)])
    for i in range(len(arrays)):
        image, sigma = arrays.load(i), float(d.sigma[i])
        window = crop_windows(d.crop[i : i + 1], 64, 64, view.aspect)[0].tolist()
        given[T.RandomResizedCrop] = dict(zip(("top", "left", "height", "width"), window, strict=True))
        factors = zip(("brightness", "contrast", "saturation", "hue"), d.factors[i].tolist(), strict=True)
        given[T.ColorJitter] = {"fn_idx": torch.from_numpy(d.order[i])} | {f"{k}_factor": v for k, v in factors}
        steps: list[Any] = [
            T.RandomResizedCrop(48, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(float(d.flip[i])),
            T.PILToTensor() if tensors else T.Identity(),
            T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue) if d.jitter[i] else T.Identity(),
            T.RandomGrayscale(float(d.grayscale[i])),
            T.GaussianBlur(23, (sigma, sigma)) if d.blur[i] else T.Identity(),
            T.RandomSolarize(128, float(d.solarize[i])),
            T.Identity() if tensors else T.PILToTensor(),
        ]
        expected = T.Compose(steps)(image).permute(1, 2, 0).numpy()
        ours = parity.torchvision_view(image, d, i, view, colours="tensors" if tensors else "PIL", kernel=23)
        assert np.array_equal(ours, expected)


def test_parts_of_the_jitter_without_a_range_are_left_out() -> None:
    """As torchvision's ColorJitter does: PIL's way to HSV and back is not free, even for no turn at all."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    view = plain(8, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    d: ViewDraws = draw(view, np.arange(1), seed=0, epoch=0, view=0)
    assert set(d.order[0].tolist()) == {BRIGHTNESS, CONTRAST, SATURATION, HUE}
    assert np.array_equal(parity.torchvision_view(image, d, 0, view), np.asarray(image))


# ---- beyond the table ----------------------------------------------------------------------------------------------


def test_the_whole_of_an_image_is_left_as_it_is(any_backend: str, arrays: ArraySource) -> None:
    batch = next(loader_of(arrays, config_of(any_backend, plain(64), batch_size=48)))
    assert np.array_equal(pixels(batch.views[0]), arrays.images[batch.index.numpy()])


def test_a_crop_in_dali_is_rounded_once(arrays: ArraySource, dali: None) -> None:
    """Same window, same antialiased cubic filter as torch's in float64, of upward and downward resizes."""
    view = plain(48, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3))
    batch = next(loader_of(arrays, config_of("dali", view, batch_size=48)))
    d = draw(view, batch.index.numpy(), seed=0, epoch=0, view=0)
    expected = []
    for k, (top, left, h, w) in zip(batch.index, crop_windows(d.crop, 64, 64, view.aspect), strict=True):
        image = torch.from_numpy(arrays.images[int(k)]).permute(2, 0, 1).double()
        crop = image[None, :, top : top + h, left : left + w]
        resized = torch.nn.functional.interpolate(crop, (48, 48), mode="bicubic", antialias=True, align_corners=False)
        expected.append(resized[0].permute(1, 2, 0).clamp(0, 255).round().numpy())
    difference = error(pixels(batch.views[0]), np.stack(expected))
    assert difference.mean() <= 0.05
    assert np.quantile(difference, 0.999) <= 1
    assert difference.max() <= 2  # DALI looks its filter up in a table


def test_crops_agree_for_all_shapes_of_files(tmp_path: Path, dali: None) -> None:
    """The window is computed in DALI's graph for files and in Python otherwise; gradients show a shift by a pixel."""
    shapes = [(1, 1), (2, 300), (300, 2), (37, 64), (64, 37), (90, 90), (17, 100), (128, 40)]
    for n, (h, w) in enumerate(shapes * 8):
        y, x = np.mgrid[0:h, 0:w]
        ramp = np.stack([x * 255 / max(w - 1, 1), y * 255 / max(h - 1, 1), (x + y) * 255 / max(h + w - 2, 1)], axis=2)
        Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / f"{n:03}.png")
    source = open_source(tmp_path)
    view = plain(24, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), flip=0.5, interpolation="bilinear")
    views = [
        next(loader_of(source, config_of(b, view, batch_size=64))).views[0]
        for b in ("torchvision", "dali", "dali+kernels", "torchvision+kernels")
    ]
    for other in views[1:]:
        assert error(pixels(views[0]), pixels(other)).max() <= 1
