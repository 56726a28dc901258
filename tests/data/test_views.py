"""Augmentation parameters: dependencies and effect; their distributions are in `test_distributions.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import AugmentParams, crop_box, crop_boxes, sample_augment_params
from byol_fast.data.sources import ArraySource
from tests.data.helpers import config_of, loader_of, pixels, plain

N = 20_000
VIEW = ViewConfig(grayscale_p=0.2, blur_p=0.1, solarize_p=0.2, hue=0.1, saturation=0.2)


@pytest.fixture(scope="module")
def params() -> AugmentParams:
    return sample_augment_params(VIEW, np.arange(N), seed=0, epoch=0, view=0)


def fields(d: AugmentParams) -> dict[str, Any]:
    return {name: getattr(d, name) for name in AugmentParams.__slots__}


def test_center_crop_if_no_candidate_fits() -> None:
    crop = sample_augment_params(ViewConfig(scale=(0.9, 1.0)), np.arange(50), seed=0, epoch=0, view=0).crop_candidates
    for (height, width), box in {
        (10, 1000): (0, 493, 10, 13),
        (1000, 10): (493, 0, 13, 10),
        (1, 1): (0, 0, 1, 1),
    }.items():
        assert (crop_boxes(crop, height, width, (3 / 4, 4 / 3)) == box).all()


def test_crop_box_equals_crop_boxes() -> None:
    for view in (VIEW, ViewConfig(scale=(0.9, 1.0), ratio=(0.2, 0.3))):
        crop = sample_augment_params(view, np.arange(300), seed=0, epoch=0, view=0).crop_candidates
        for height, width in ((375, 500), (32, 32), (100, 900), (1, 7)):
            one_by_one = [crop_box(row, height, width, view.ratio) for row in crop]
            assert np.array_equal(one_by_one, crop_boxes(crop, height, width, view.ratio))


def test_params_depend_on_seed_epoch_image_and_view_only() -> None:
    index = np.array([5, 900, 3])
    d = fields(sample_augment_params(VIEW, index, seed=1, epoch=2, view=0))
    alone = fields(sample_augment_params(VIEW, index[1:2], seed=1, epoch=2, view=0))
    for name, values in d.items():
        assert np.array_equal(values[1:2], alone[name]), name
    for changed in ({"seed": 2}, {"epoch": 3}, {"view": 1}):
        other = sample_augment_params(VIEW, index, **{"seed": 1, "epoch": 2, "view": 0, **changed})
        assert not np.isclose(other.crop_candidates, d["crop_candidates"]).any(), changed


def test_changing_one_probability_changes_nothing_else(params: AugmentParams) -> None:
    view = ViewConfig(grayscale_p=0.2, blur_p=0.7, solarize_p=0.2)
    other = fields(sample_augment_params(view, np.arange(N), seed=0, epoch=0, view=0))
    for name, values in fields(params).items():
        assert np.array_equal(values, other[name]) == (name != "blur"), name


def test_samples_of_a_batch_are_augmented_independently(any_backend: str, arrays: ArraySource) -> None:
    """One image 256 times: rows and views have independent parameters."""
    same = ArraySource(np.repeat(arrays.images[:1], 256, axis=0))
    view = plain(64, hflip_p=0.5, solarize_p=0.3)
    batch = next(loader_of(same, config_of(any_backend, view, batch_size=256)))
    original = arrays.images[0]
    variants = [
        np.where(x < 128, x, 255 - x) if solarized else x
        for x in (original, original[:, ::-1])
        for solarized in (False, True)
    ]
    kinds = np.array(
        [
            [next(k for k, v in enumerate(variants) if np.array_equal(x, v)) for x in pixels(view)]
            for view in (batch.views[0], batch.views[1])
        ]
    )
    share = np.array([0.35, 0.15, 0.35, 0.15])
    for counts in (np.bincount(row, minlength=4) for row in kinds):
        assert ((counts - 256 * share) ** 2 / (256 * share)).sum() < 22  # chi2, 3 degrees: one in ten thousand
    joint = np.bincount(kinds[0] * 4 + kinds[1], minlength=16).reshape(4, 4)
    expected = 256 * np.outer(share, share)
    assert ((joint - expected) ** 2 / expected).sum() < 45  # 15 degrees: one in ten thousand
