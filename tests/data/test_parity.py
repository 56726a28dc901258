"""Operators and whole views against torchvision with the same parameters; wrong operators are detected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2 as T

from byol_fast import config as configs
from byol_fast.config import Config, Preprocessing, ViewConfig, recipes
from byol_fast.data import ViewLoader, eval_batches, make_loader, sampler
from byol_fast.data.augment_params import AugmentParams, crop_boxes, sample_augment_params
from byol_fast.data.batch import Batch
from byol_fast.data.sources import ArraySource, FileSource, ImageSource, open_source
from byol_fast.report import view_check
from byol_fast.report.view_check import Comparison, reference_view
from byol_kernels.augment_params.params import ATTEMPTS
from byol_kernels.photometric.params import ADJUSTMENTS, SATURATION
from tests.data.helpers import CPU, OPERATORS, config_of, error, loader_of, paper, pixels, plain

ALL = [*OPERATORS, "view 1", "view 2"]
LOCAL = {"num_local_views": 2, "local_view.size": 20}
STRONG = dict[str, Any](brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, blur_p=0.5, blur_kernel=7)
STRONG |= dict[str, Any](solarize_p=0.5, solarize_threshold=64, interpolation="bilinear")


def compare(source: ImageSource, config: Config, num_images: int) -> dict[str, Comparison]:
    """Errors of every operator and view."""
    return {result.name: result for result in view_check.compare(source, config, CPU, num_images=num_images)}


def failures(results: dict[str, Comparison]) -> dict[str, str]:
    return {name: str(result) for name, result in results.items() if not result.ok}


# ---- operators and views --------------------------------------------------------------------------------------------


def test_operators_and_views_of_photographs(files_backend: str, photographs: FileSource) -> None:
    errors = compare(photographs, paper(files_backend, 96), 32)
    assert not failures(errors) and list(errors) == ALL


def test_operators_and_views_of_files_of_odd_sizes(files_backend: str, files: FileSource) -> None:
    errors = compare(files, configs.replace(paper(files_backend, 48), LOCAL | {"view2.size": 40}), 40)
    assert not failures(errors) and list(errors) == [*ALL, "view 3"]


@pytest.mark.parametrize("changes", [{}, STRONG], ids=["paper", "strong"])
def test_operators_and_views_of_arrays(changes: dict[str, Any], any_backend: str, arrays: ArraySource) -> None:
    errors = compare(arrays, configs.replace(paper(any_backend, 48, **changes), LOCAL), 48)
    assert not failures(errors) and list(errors) == [*ALL, "view 3"]


@pytest.mark.parametrize("changes", [{}, STRONG], ids=["paper", "strong"])
def test_operators_and_views_of_extreme_images(
    changes: dict[str, Any], any_backend: str, extremes: ArraySource
) -> None:
    """The bounds follow from the images: what is correct for photographs is correct for all."""
    errors = compare(extremes, paper(any_backend, 24, **changes), 48)
    assert not failures(errors) and list(errors) == ALL


@pytest.mark.parametrize("size", [2, 5])
def test_blur_of_views_smaller_than_its_kernel(size: int, any_backend: str, arrays: ArraySource) -> None:
    """The image is mirrored again and again."""
    errors = compare(arrays, paper(any_backend, size, blur_sigma=(1.5, 4.0)), 16)
    assert not failures(errors) and "blur" in errors


def test_unused_operators_are_omitted(arrays: ArraySource) -> None:
    errors = compare(arrays, configs.replace(recipes.demo(), {"data.threads": 1}), 8)
    assert list(errors) == ["crop", "flip", "brightness", "contrast", "jitter", "view 1", "view 2"]
    assert not failures(errors)


def test_dali_decodes_to_the_bytes_of_pil(files: FileSource, dali: None) -> None:
    """Evaluation does not resize an image of the right size: only the decoder is compared."""
    sides = np.array([min(files.load(i).size) for i in range(len(files))])
    for side in np.unique(sides)[:8].tolist():
        source = files.subset(np.flatnonzero(sides == side))
        for images, index in eval_batches(source, Preprocessing(crop=side), 8, loader="dali"):
            for image, i in zip(pixels(images), index.tolist(), strict=True):
                assert np.array_equal(image, np.asarray(T.functional.center_crop(source.load(i), side)))


# ---- detection of errors ------------------------------------------------------------------------------------------

# Settings that are wrong by a tenth; a largest sigma of 1.8 for 2.
WRONG = dict[str, Any](interpolation="bilinear", hflip_p=0.45, brightness=0.36, contrast=0.36, saturation=0.18)
WRONG |= dict[str, Any](hue=0.09, grayscale_p=0.5, blur_sigma=(0.1, 1.8), solarize_threshold=127)


class SwappedChannels:
    """Batches of a loader with red and blue exchanged."""

    def __init__(self, loader: ViewLoader) -> None:
        self.loader, self.close = loader, loader.close

    def __next__(self) -> Batch:
        batch = next(self.loader)
        return replace(batch, views=tuple(view.flip(1) for view in batch.views))


def use_wrong_loader(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], change: Callable[[ViewLoader], Any] = lambda loader: loader
) -> None:
    """Compare with a loader that has other settings of the operators in use."""

    def changed(view: ViewConfig) -> ViewConfig:
        return replace(view, **{name: value for name, value in wrong.items() if getattr(view, name)})

    def make_wrong_loader(source: ImageSource, config: Config, views: tuple[ViewConfig, ...], **options: Any) -> Any:
        return change(make_loader(source, config, tuple(changed(view) for view in views), **options))

    monkeypatch.setattr(view_check, "make_loader", make_wrong_loader)


def test_every_wrong_operator_fails(any_backend: str, arrays: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    use_wrong_loader(monkeypatch, WRONG)
    errors = compare(arrays, paper(any_backend, 32), 48)
    assert list(failures(errors)) == ALL


@pytest.mark.parametrize(
    ("wrong", "operator"),
    [
        ({"hue": 0.0}, "jitter"),
        ({"blur_kernel": 5}, "blur"),
        ({"hflip_p": 0.4}, "view 2"),
        ({"solarize_p": 0.1}, "view 2"),
    ],
    ids=str,
)
def test_missing_part_fails(
    wrong: dict[str, Any], operator: str, arrays: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_wrong_loader(monkeypatch, wrong)
    assert operator in failures(compare(arrays, paper("threaded", 32), 48))


ONE_PIXEL = np.array([1.0] * (2 * ATTEMPTS) + [1.0, 0.9])
"""Moves most crops of images of 64 px by a few columns, and some by one."""
OTHER_HUE = np.array([1, 1, 1, -1], np.float32)
WRONG_PARAMS: dict[str, tuple[Callable[[AugmentParams], dict[str, Any]], str]] = {
    "order of the adjustments": (lambda p: {"order": p.order[:, ::-1].copy()}, "jitter"),
    "saturation last": (lambda p: {"order": last(p.order, SATURATION)}, "jitter"),
    "hue of the other sign": (lambda p: {"factors": p.factors * OTHER_HUE}, "hue"),
    "sigma doubled": (lambda p: {"sigma": 2 * p.sigma}, "blur"),
    "crop moved by a pixel": (lambda p: {"crop_candidates": p.crop_candidates * ONE_PIXEL}, "crop"),
    "mirrored": (lambda p: {"flip": ~p.flip}, "flip"),
}


def last(order: NDArray[np.int32], adjustment: int) -> NDArray[np.int32]:
    """The order with one adjustment behind the others."""
    return np.take_along_axis(order, np.argsort(order == adjustment, axis=1, kind="stable"), axis=1)


def use_wrong_params(monkeypatch: pytest.MonkeyPatch, change: Callable[[AugmentParams], dict[str, Any]]) -> None:
    def sample_wrong_params(*args: Any, **options: Any) -> AugmentParams:
        params = sample_augment_params(*args, **options)
        return replace(params, **change(params))

    monkeypatch.setattr(sampler, "sample_augment_params", sample_wrong_params)


@pytest.mark.parametrize("fault", WRONG_PARAMS)
def test_wrong_parameters_fail(fault: str, arrays: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    change, operator = WRONG_PARAMS[fault]
    use_wrong_params(monkeypatch, change)
    found = failures(compare(arrays, paper("threaded", 32), 48))
    assert operator in found and {"view 1", "view 2"} <= found.keys()


def test_swapped_channels_fail(arrays: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    use_wrong_loader(monkeypatch, {}, SwappedChannels)
    assert list(failures(compare(arrays, paper("threaded", 32), 48))) == [name for name in ALL if name != "grayscale"]


# ---- the reference -------------------------------------------------------------------------------------------------


def test_reference_equals_torchvisions_transforms(arrays: ArraySource, monkeypatch: Any) -> None:
    """Transforms as a training script composes them, in float64, with our parameters instead of their own."""
    view = ViewConfig(size=48, blur_p=0.5, solarize_p=0.5, grayscale_p=0.3)
    d = sample_augment_params(view, np.arange(len(arrays)), seed=0, epoch=0, view=0)
    d = replace(d, kernel_size=np.full_like(d.kernel_size, 23))
    given: dict[type, dict[str, Any]] = {}
    for transform in (T.RandomResizedCrop, T.ColorJitter):
        monkeypatch.setattr(transform, "make_params", lambda self, _: given[type(self)])
    for i in range(len(arrays)):
        image, sigma = arrays.load(i), float(d.sigma[i])
        box = crop_boxes(d.crop_candidates[i : i + 1], 64, 64, view.ratio)[0].tolist()
        given[T.RandomResizedCrop] = dict(zip(("top", "left", "height", "width"), box, strict=True))
        factors = zip(ADJUSTMENTS, d.factors[i].tolist(), strict=True)
        given[T.ColorJitter] = {"fn_idx": torch.from_numpy(d.order[i])} | {f"{k}_factor": v for k, v in factors}
        steps: list[Any] = [
            T.PILToTensor(),
            T.ToDtype(torch.float64, scale=True),
            T.RandomResizedCrop(48, interpolation=T.InterpolationMode.BICUBIC),
            T.Lambda(lambda x: x.clamp(0, 1)),
            T.RandomHorizontalFlip(float(d.flip[i])),
            T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue) if d.jitter[i] else T.Identity(),
            T.RandomGrayscale(float(d.grayscale[i])),
            T.GaussianBlur(23, (sigma, sigma)) if d.blur[i] else T.Identity(),
            T.RandomSolarize(127.5 / 255, float(d.solarize[i])),
        ]
        ours, bound = reference_view(image, d, i, view)
        torch.testing.assert_close(ours, 255 * T.Compose(steps)(image), rtol=0, atol=1e-3)  # its hue is in float32
        assert (bound >= 0).all()


def test_adjustments_without_a_range_are_omitted() -> None:
    """As in torchvision's ColorJitter."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    view = plain(8, color_jitter_p=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    d = sample_augment_params(view, np.arange(1), seed=0, epoch=0, view=0)
    assert sorted(d.order[0].tolist()) == [0, 1, 2, 3]
    x, bound = reference_view(image, d, 0, view)
    assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(image)) and not bound.any()


def test_bounds_hold_for_pillow(extremes: ArraySource) -> None:
    """PIL rounds a resize twice, too: its largest error is next to the bound."""
    view = plain(24, scale=(0.1, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bilinear")
    d = sample_augment_params(view, np.arange(len(extremes)), seed=0, epoch=0, view=0)
    errors = []
    for i, (top, left, h, w) in enumerate(crop_boxes(d.crop_candidates, 64, 64, view.ratio).tolist()):
        crop = extremes.load(i).crop((left, top, left + w, top + h)).resize((24, 24), Image.Resampling.BILINEAR)
        expected, bound = reference_view(extremes.load(i), d, i, view, crop="rounded twice")
        error = np.abs(np.asarray(crop) - expected.permute(1, 2, 0).numpy())
        assert (error <= bound.permute(1, 2, 0).numpy()).all()
        errors.append(error.max() / float(bound.max()))
    assert max(errors) > 0.8


# ---- beyond torchvision ----------------------------------------------------------------------------------------------


def test_whole_image_is_unchanged(any_backend: str, arrays: ArraySource) -> None:
    batch = next(loader_of(arrays, config_of(any_backend, plain(64), batch_size=48)))
    assert np.array_equal(pixels(batch.views[0]), arrays.images[batch.index.numpy()])


def test_dali_crop_is_rounded_once(arrays: ArraySource, dali: None) -> None:
    """Same box, same antialiased cubic filter as torch's in float64, of upward and downward resizes."""
    view = plain(48, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    batch = next(loader_of(arrays, config_of("dali", view, batch_size=48)))
    d = sample_augment_params(view, batch.index.numpy(), seed=0, epoch=0, view=0)
    expected = []
    for k, (top, left, h, w) in zip(batch.index, crop_boxes(d.crop_candidates, 64, 64, view.ratio), strict=True):
        image = torch.from_numpy(arrays.images[int(k)]).permute(2, 0, 1).double()
        crop = image[None, :, top : top + h, left : left + w]
        resized = torch.nn.functional.interpolate(crop, (48, 48), mode="bicubic", antialias=True, align_corners=False)
        expected.append(resized[0].permute(1, 2, 0).clamp(0, 255).round().numpy())
    difference = error(pixels(batch.views[0]), np.stack(expected))
    assert difference.mean() <= 0.05
    assert np.quantile(difference, 0.999) <= 1
    assert difference.max() <= 2  # DALI looks its filter up in a table


def test_dali_crops_agree_for_all_shapes(tmp_path: Path, dali: None) -> None:
    """The crop box is computed by DALI for files and in Python otherwise; gradients show a shift by a pixel."""
    shapes = [(1, 1), (2, 100), (100, 2), (37, 64), (64, 37), (90, 90), (17, 100), (128, 40)]
    for n, (h, w) in enumerate(shapes * 8):
        y, x = np.mgrid[0:h, 0:w]
        ramp = np.stack([x * 255 / max(w - 1, 1), y * 255 / max(h - 1, 1), (x + y) * 255 / max(h + w - 2, 1)], axis=2)
        Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / f"{n:03}.png")
    source = open_source(tmp_path)
    view = plain(24, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip_p=0.5, interpolation="bilinear")
    views = [
        next(loader_of(source, config_of(b, view, batch_size=64))).views[0]
        for b in ("threaded", "dali", "dali+kernels")
    ]
    for other in views[1:]:
        assert error(pixels(views[0]), pixels(other)).max() <= 1
