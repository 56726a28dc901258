"""Distributions and independence of 20,000 samples of each augmentation parameter.

All bounds follow from one number: a correct implementation fails any test of this file with a probability of one in a
million. Seeds are fixed, so a test that passes goes on to pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import RandomResizedCrop

from byol_fast.config import ViewConfig, recipes
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams, crop_boxes, sample_augment_params
from byol_fast.data.sampler import permutation

N = 20_000
COMPARISONS = 10_000  # more than there are in this file: Bonferroni
ALPHA = 1e-6 / COMPARISONS
LOG = math.log(2 / ALPHA)
PAPER = recipes.imagenet_resnet50()
VIEWS = {"view 1": (PAPER.view1, 0), "view 2": (PAPER.view2, 1), "local view": (PAPER.local_view, 2)}
Values = NDArray[np.float64]


@functools.cache
def sampled(view: str, seed: int = 0, epoch: int = 0, first: int = 0) -> AugmentParams:
    config, number = VIEWS[view]
    return sample_augment_params(config, np.arange(first, first + N), seed=seed, epoch=epoch, view=number)


def assert_share(mask: NDArray[np.bool_], p: float) -> None:
    """Bound by Bernstein's inequality."""
    n = len(mask)
    assert abs(int(mask.sum()) - n * p) <= math.sqrt(2 * n * p * (1 - p) * LOG) + LOG / 3


def assert_uniform(values: NDArray[Any], lo: float, hi: float, slack: float = 0.0) -> None:
    """Kolmogorov-Smirnov distance with the bound of Dvoretzky, Kiefer, Wolfowitz and Massart.

    Args:
        values: samples of a uniform distribution on lo .. hi.
        lo: smallest.
        hi: largest.
        slack: effect of rounding on the distribution function.
    """
    u = (np.sort(np.asarray(values, np.float64)) - lo) / (hi - lo)
    rank = np.arange(len(u) + 1) / len(u)
    rounding = float(np.finfo(np.float32).eps) * max(abs(lo), abs(hi)) / (hi - lo)
    assert -rounding <= u[0] and u[-1] <= 1 + rounding
    distance = max(np.abs(u - rank[:-1]).max(), np.abs(u - rank[1:]).max())
    assert distance <= math.sqrt(LOG / (2 * len(u))) + slack


def assert_same_distribution(ours: Values, theirs: Values) -> None:
    """The same bound for each of two samples, at half the probability."""
    at = np.concatenate([ours, theirs])
    ranks = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (ours, theirs)]
    allowed = sum(math.sqrt((LOG + math.log(2)) / (2 * len(x))) for x in (ours, theirs))
    assert np.abs(ranks[0] - ranks[1]).max() <= allowed


def chi2_bound(degrees: NDArray[Any] | float) -> Any:
    """Upper bound of chi-square by degrees of freedom (Laurent and Massart 2000, lemma 1)."""
    return degrees + 2 * np.sqrt(degrees * LOG) + 2 * LOG


# ---- one parameter at a time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mask", PROBABILITIES)
def test_masks_have_their_probability(mask: str, view: str) -> None:
    assert_share(getattr(sampled(view), mask), getattr(VIEWS[view][0], PROBABILITIES[mask]))


def test_views_differ_as_in_the_paper() -> None:
    first, second = sampled("view 1"), sampled("view 2")
    assert first.blur.all() and not first.solarize.any()
    assert_share(second.blur, 0.1)
    assert_share(second.solarize, 0.2)
    for d in (first, second):
        assert_share(d.flip, 0.5)
        assert_share(d.jitter, 0.8)
        assert_share(d.grayscale, 0.2)


@pytest.mark.parametrize("view", VIEWS)
def test_factors_and_sigma_are_uniform_in_their_range(view: str) -> None:
    d = sampled(view)
    for values, (lo, hi) in zip(d.factors.T, ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)), strict=True):
        assert_uniform(values, lo, hi)
        assert_uniform(values[d.jitter], lo, hi)  # also where the mask selects them
    assert_uniform(d.sigma, 0.1, 2.0)
    assert_uniform(d.sigma[d.blur], 0.1, 2.0)


def test_factors_are_not_negative() -> None:
    """torchvision's ColorJitter(2.0): from max(0, 1 - 2) to 3."""
    d = sample_augment_params(
        ViewConfig(brightness=2.0, contrast=1.0, saturation=0.0, hue=0.5), np.arange(N), seed=0, epoch=0, view=0
    )
    assert_uniform(d.factors[:, 0], 0.0, 3.0)
    assert_uniform(d.factors[:, 1], 0.0, 2.0)
    assert (d.factors[:, 2] == 1).all()
    assert_uniform(d.factors[:, 3], -0.5, 0.5)


@pytest.mark.parametrize("view", VIEWS)
def test_all_orders_of_the_jitter_are_equally_likely(view: str) -> None:
    order = sampled(view).order
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (N, 1)))
    _, counts = np.unique(order @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert ((counts - N / 24) ** 2 / (N / 24)).sum() <= chi2_bound(23)


# ---- crops ---------------------------------------------------------------------------------------------------------


def test_area_aspect_and_position_are_uniform_where_every_crop_fits() -> None:
    """4000 x 4000 pixels and at most half of them: rounding to pixels moves the distribution functions little."""
    view = ViewConfig(scale=(0.08, 0.5))
    d = sample_augment_params(view, np.arange(N), seed=0, epoch=0, view=0)
    top, left, h, w = crop_boxes(d.crop_candidates, 4000, 4000, view.ratio).T.astype(float)
    # A pixel is at most 1/980 of a side. The logarithm of the aspect ranges over 0.58, the area over 0.42.
    assert_uniform(np.clip(h * w / 4000**2, 0.08, 0.5), 0.08, 0.5, slack=0.5 / 980 / 0.42)
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert_uniform(np.clip(np.log(w / h), low, high), low, high, slack=1 / 980 / 0.57)
    places = [(start + 0.5) / (4000 - side + 1) for start, side in ((top, h), (left, w))]
    for place in places:
        assert_uniform(place, 0, 1, slack=0.5 / 1000)
    columns = np.column_stack([h * w, w / h, *places])
    assert_independent(columns, columns, but={(i, i) for i in range(4)})


SHAPES = {
    "photograph": (375, 500),
    "CIFAR": (32, 32),
    "tall": (500, 150),
    "mostly too wide": (100, 900),
    "always too tall": (1000, 10),
    "tiny": (3, 2),
}


@pytest.mark.parametrize(
    "view",
    [ViewConfig(), ViewConfig(scale=(0.7, 1.0), ratio=(0.6, 1.0)), PAPER.local_view],
    ids=["paper", "large and upright", "local"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_crops_are_distributed_as_torchvisions(shape: str, view: ViewConfig) -> None:
    """Against its own `get_params`, the fallback to the center included."""
    height, width = SHAPES[shape]
    d = sample_augment_params(view, np.arange(N), seed=0, epoch=0, view=0)
    ours = crop_boxes(d.crop_candidates, height, width, view.ratio)
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    params = [RandomResizedCrop.get_params(blank, list(view.scale), list(view.ratio)) for _ in range(2000)]
    mine, theirs = (features(np.array(x, float), height, width, view) for x in (ours, params))
    for name, values in mine.items():
        assert_same_distribution(values, theirs[name])
    top, left, h, w = ours.T
    assert (np.minimum(top, left) >= 0).all() and (np.minimum(h, w) >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def features(boxes: Values, height: int, width: int, view: ViewConfig) -> Mapping[str, Values]:
    top, left, h, w = boxes.T
    largest_h, largest_w = min(height, round(width / view.ratio[0])), min(width, round(height * view.ratio[1]))
    return {
        "area": h * w / (height * width),
        "aspect": np.log(w / h),
        "middle from the top": top + h / 2,
        "middle from the left": left + w / 2,
        "is the largest": ((h == largest_h) & (w == largest_w)).astype(float),
    }


def test_center_crop_has_its_probability() -> None:
    """100 x 400: a crop fits if its height is at most 100; a tenth power of the others remains."""
    view = ViewConfig(scale=(0.2, 1.0))
    d = sample_augment_params(view, np.arange(N), seed=0, epoch=0, view=0)
    boxes = crop_boxes(d.crop_candidates, 100, 400, view.ratio)
    is_center = (boxes == (0, 133, 100, 133)).all(axis=1)
    # height^2 = area * 40000 / aspect <= 100.5^2, area uniform on 0.2 .. 1, log(aspect) uniform on +- log(4/3)
    log_aspect = np.linspace(math.log(3 / 4), math.log(4 / 3), 100_001)
    fits = np.clip((100.5**2 / 40000 * np.exp(log_aspect) - 0.2) / 0.8, 0, 1).mean()
    assert_share(is_center, (1 - fits) ** 10)


# ---- independence --------------------------------------------------------------------------------------------------


def table(d: AugmentParams) -> Values:
    """All parameters of all samples `[N, columns]`; of the crop the last candidate only."""
    width, height, *position = d.crop_candidates[:, [9, 19, 20, 21]].T
    masks = [getattr(d, mask) for mask in PROBABILITIES]
    parts = [width * height, width / height, *position, *d.factors.T, *d.order.T[:3], d.sigma]
    return np.column_stack([*parts, *masks]).astype(np.float64)


def cells(columns: Values) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each column in up to four classes of about the same size, and the number of classes."""
    out = np.empty(columns.shape, np.int64)
    for k, column in enumerate(columns.T):
        values = np.unique(column)
        edges = np.quantile(column, [0.25, 0.5, 0.75]) if len(values) > 4 else values[1:]
        out[:, k] = np.searchsorted(edges, column, side="right")
    return out, out.max(axis=0) + 1


def assert_independent(a: Values, b: Values, *, but: set[tuple[int, int]] | None = None) -> None:
    """Correlation, and chi-square of the contingency table, of each column of one with each of the other."""
    skip = np.zeros((a.shape[1], b.shape[1]), bool)
    for pair in but or ():
        skip[pair] = True
    spread = a.std(axis=0)[:, None] * b.std(axis=0)[None, :]
    skip |= spread == 0  # a mask of probability 0 or 1
    covariance = (a - a.mean(axis=0)).T @ (b - b.mean(axis=0)) / len(a)
    correlation = np.where(skip, 0, covariance) / np.where(skip, 1, spread)
    assert np.abs(correlation).max() <= NormalDist().inv_cdf(1 - ALPHA / 2) / math.sqrt(len(a))
    (x, num_x), (y, num_y) = cells(a), cells(b)
    in_x = (x[:, :, None] == np.arange(4)).reshape(len(a), -1).astype(np.float64)
    in_y = (y[:, :, None] == np.arange(4)).reshape(len(b), -1).astype(np.float64)
    shape = (a.shape[1], 4, b.shape[1], 4)
    found = (in_x.T @ in_y).reshape(shape)
    expected = np.outer(in_x.sum(axis=0), in_y.sum(axis=0)).reshape(shape) / len(a)
    chi2 = ((found - expected) ** 2 / np.where(expected > 0, expected, 1)).sum(axis=(1, 3))
    allowed = chi2_bound((num_x[:, None] - 1) * (num_y[None, :] - 1))
    assert (np.where(skip, 0, chi2) <= allowed).all()


def test_parameters_are_independent_of_each_other() -> None:
    for view in VIEWS:
        columns = table(sampled(view))
        k = columns.shape[1]
        order = range(8, 11)  # the first adjustment cannot be the second, too
        assert_independent(columns, columns, but={(i, i) for i in range(k)} | {(i, j) for i in order for j in order})


def test_candidates_of_a_crop_are_independent_of_each_other() -> None:
    crop = sampled("view 1").crop_candidates
    area, aspect = crop[:, :10] * crop[:, 10:20], crop[:, :10] / crop[:, 10:20]
    columns = np.concatenate([area, aspect], axis=1)
    assert_independent(columns, columns, but={(i, i) for i in range(20)})


def test_views_epochs_seeds_and_samples_are_independent() -> None:
    mine = table(sampled("view 1"))
    assert_independent(mine, table(sampled("view 2")))
    for view in ("view 1", "view 2"):
        assert_independent(table(sampled(view)), table(sampled("local view")))
    assert_independent(mine, table(sampled("view 1", epoch=1)))
    assert_independent(mine, table(sampled("view 1", seed=1)))
    assert_independent(mine, table(sampled("view 2", epoch=1)))
    assert_independent(table(sampled("view 1", seed=0, epoch=1)), table(sampled("view 1", seed=1, epoch=0)))
    for distance in (1, 2, 256, 4096):
        assert_independent(mine, table(sampled("view 1", first=distance)))
    assert_independent(mine, mine[permutation(N, seed=0, epoch=0)])


def test_one_image_over_many_epochs_has_the_same_distributions() -> None:
    parts = [sample_augment_params(PAPER.view2, np.array([7]), seed=0, epoch=epoch, view=1) for epoch in range(2000)]
    columns = np.concatenate([table(d) for d in parts])
    assert_uniform(columns[:, 2], 0, 1)
    assert_uniform(columns[:, 4], 0.6, 1.4)
    assert_share(np.concatenate([d.solarize for d in parts]), 0.2)
    assert_independent(columns[1:], columns[:-1])


# ---- the order of the images ---------------------------------------------------------------------------------------


def test_position_in_an_epoch_is_uniform() -> None:
    orders = np.array([permutation(10, seed=4, epoch=e) for e in range(5000)])
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(10), (5000, 1)))
    counts = np.array([np.bincount(place, minlength=10) for place in orders.T])
    assert ((counts - 500) ** 2 / 500).sum() <= chi2_bound(81)
    places = np.argsort(orders, axis=1).astype(np.float64)
    assert_independent(places[1:], places[:-1])


def test_consecutive_images_are_not_consecutive_in_the_source() -> None:
    order = permutation(N, seed=0, epoch=0).astype(np.float64)[:, None]
    assert_independent(order[1:], order[:-1])
    assert_independent(order, np.arange(N, dtype=np.float64)[:, None])
    assert_independent(order, permutation(N, seed=0, epoch=1).astype(np.float64)[:, None])
    assert_independent(order, permutation(N, seed=1, epoch=0).astype(np.float64)[:, None])
