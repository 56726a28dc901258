"""The draws: their distributions, what they depend on, and that views and samples are independent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from byol_fast.config import ViewConfig
from byol_fast.data.sources import ArraySource
from byol_fast.data.views import ViewDraws, crop_window, crop_windows, draw, permutation
from tests.data.helpers import config_of, loader_of, pixels, plain

N = 20_000
VIEW = ViewConfig(grayscale=0.2, blur=0.1, solarize=0.2, hue=0.1, saturation=0.2)


@pytest.fixture(scope="module")
def draws() -> ViewDraws:
    return draw(VIEW, np.arange(N), seed=0, epoch=0, view=0)


def fields(d: ViewDraws) -> dict[str, Any]:
    return {name: getattr(d, name) for name in ViewDraws.__slots__}


@pytest.mark.parametrize("coin", ["flip", "jitter", "grayscale", "blur", "solarize"])
def test_coins_have_their_probability(coin: str, draws: ViewDraws) -> None:
    p = getattr(VIEW, coin)
    assert abs(getattr(draws, coin).mean() - p) < 4 * math.sqrt(p * (1 - p) / N)


def test_numbers_are_uniform_in_their_range(draws: ViewDraws) -> None:
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), VIEW.blur_sigma]
    columns = [*draws.factors.T, draws.sigma]
    for (lo, hi), values in zip(ranges, columns, strict=True):
        u = np.sort((values.astype(np.float64) - lo) / (hi - lo))
        assert u[0] > -1e-6 and u[-1] < 1 + 1e-6
        # Kolmogorov-Smirnov at one in a hundred thousand
        assert np.abs(u - np.arange(N) / N).max() < 2.5 / math.sqrt(N)


def test_all_orders_are_equally_likely(draws: ViewDraws) -> None:
    assert np.array_equal(np.sort(draws.order, axis=1), np.tile(np.arange(4), (N, 1)))
    _, counts = np.unique(draws.order @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    chi2 = ((counts - N / 24) ** 2 / (N / 24)).sum()
    assert chi2 < 60  # 23 degrees of freedom: one in thirty thousand


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (100, 900)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int, draws: ViewDraws) -> None:
    ours = crop_windows(draws.crop[:4000], height, width, VIEW.aspect).astype(float)
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    params = [RandomResizedCrop.get_params(blank, list(VIEW.area), list(VIEW.aspect)) for _ in range(4000)]
    theirs = np.array(params, float)
    for a, b in zip(features(ours, height, width), features(theirs, height, width), strict=True):
        grid = np.concatenate([a, b])
        cdf = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
        assert np.abs(cdf[0] - cdf[1]).max() < 2.5 * math.sqrt(2 / 4000)
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()


def features(windows: Any, height: int, width: int) -> list[Any]:
    """Area, log aspect and position of crops."""
    top, left, h, w = windows.T
    return [h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width]


def test_where_nothing_fits_the_middle_is_taken() -> None:
    crop = draw(ViewConfig(area=(0.9, 1.0)), np.arange(50), seed=0, epoch=0, view=0).crop
    for (height, width), window in {
        (10, 1000): (0, 493, 10, 13),
        (1000, 10): (493, 0, 13, 10),
        (1, 1): (0, 0, 1, 1),
    }.items():
        assert (crop_windows(crop, height, width, (3 / 4, 4 / 3)) == window).all()


def test_the_crop_of_one_image_is_that_of_many() -> None:
    for view in (VIEW, ViewConfig(area=(0.9, 1.0), aspect=(0.2, 0.3))):
        crop = draw(view, np.arange(300), seed=0, epoch=0, view=0).crop
        for height, width in ((375, 500), (32, 32), (100, 900), (1, 7)):
            one_by_one = [crop_window(row, height, width, view.aspect) for row in crop]
            assert np.array_equal(one_by_one, crop_windows(crop, height, width, view.aspect))


def test_draws_depend_on_seed_epoch_image_and_view_only() -> None:
    index = np.array([5, 900, 3])
    d = fields(draw(VIEW, index, seed=1, epoch=2, view=0))
    alone = fields(draw(VIEW, index[1:2], seed=1, epoch=2, view=0))
    for name, values in d.items():
        assert np.array_equal(values[1:2], alone[name]), name
    for changed in ({"seed": 2}, {"epoch": 3}, {"view": 1}):
        other = draw(VIEW, index, **{"seed": 1, "epoch": 2, "view": 0, **changed})
        assert not np.isclose(other.crop, d["crop"]).any(), changed


def test_changing_one_probability_changes_nothing_else(draws: ViewDraws) -> None:
    other = fields(draw(ViewConfig(grayscale=0.2, blur=0.7, solarize=0.2), np.arange(N), seed=0, epoch=0, view=0))
    for name, values in fields(draws).items():
        assert np.array_equal(values, other[name]) == (name != "blur"), name


def test_views_samples_and_epochs_are_uncorrelated(draws: ViewDraws) -> None:
    def columns(d: ViewDraws) -> Any:
        coins = [d.flip, d.jitter, d.grayscale, d.blur, d.solarize]
        return np.column_stack([d.crop[:, [0, 10, 20, 21]], d.factors, d.sigma, *coins]).astype(float)

    mine = columns(draws)
    others = {
        "view": columns(draw(VIEW, np.arange(N), seed=0, epoch=0, view=1)),
        "epoch": columns(draw(VIEW, np.arange(N), seed=0, epoch=1, view=0)),
        "seed": columns(draw(VIEW, np.arange(N), seed=1, epoch=0, view=0)),
        "neighbour": np.roll(mine, 1, axis=0),
    }
    k = mine.shape[1]
    for name, other in others.items():
        correlation = np.corrcoef(mine, other, rowvar=False)[:k, k:]
        assert np.abs(correlation).max() < 5 / math.sqrt(N), name
    own = np.corrcoef(mine, rowvar=False) - np.eye(k)
    own[0, 1] = own[1, 0] = 0  # width and height candidates share the area
    assert np.abs(own).max() < 5 / math.sqrt(N)


def test_order_of_an_epoch_is_a_fair_shuffle() -> None:
    orders = np.array([permutation(10, seed=4, epoch=e) for e in range(5000)])
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(10), (5000, 1)))
    counts = np.array([np.bincount(orders[:, at], minlength=10) for at in range(10)])
    assert np.abs(counts - 500).max() < 5 * math.sqrt(500)
    assert not np.array_equal(permutation(10, seed=4, epoch=0), permutation(10, seed=5, epoch=0))


def test_samples_of_a_batch_are_augmented_independently(backend: str, arrays: ArraySource) -> None:
    """One image 256 times, through the pipeline: each decides for itself, and the two views apart."""
    same = ArraySource(np.repeat(arrays.images[:1], 256, axis=0))
    view = plain(64, flip=0.5, solarize=0.3)
    batch = next(loader_of(same, config_of(backend, view, batch_size=256)))
    original = arrays.images[0]
    variants = [
        np.where(x < 128, x, 255 - x) if solarized else x
        for x in (original, original[:, ::-1])
        for solarized in (False, True)
    ]
    kinds = np.array(
        [
            [next(k for k, v in enumerate(variants) if np.array_equal(x, v)) for x in pixels(view)]
            for view in (batch.view1, batch.view2)
        ]
    )
    share = np.array([0.35, 0.15, 0.35, 0.15])
    for counts in (np.bincount(row, minlength=4) for row in kinds):
        assert ((counts - 256 * share) ** 2 / (256 * share)).sum() < 22  # chi2, 3 degrees: one in ten thousand
    joint = np.bincount(kinds[0] * 4 + kinds[1], minlength=16).reshape(4, 4)
    expected = 256 * np.outer(share, share)
    assert ((joint - expected) ** 2 / expected).sum() < 45  # 15 degrees: one in ten thousand
