"""The photometric operators for small images, all samples at once: against float64, and against one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from byol_kernels import photometric
from byol_kernels.photometric_batched import photometric_batched
from tests.kernels.conftest import not_interpreted
from tests.kernels.photometric_restatement import FLOAT32_LEVELS, ORDERS, draws, f64, images, view

pytestmark = not_interpreted

SHAPES = [(32, 32), (17, 24), (3, 8), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("spread", "hue"), [(0.4, 0.1), (0.8, 0.5)], ids=["byol", "strong"])
def test_against_float64(shape: tuple[int, int], spread: float, hue: float) -> None:
    x, d = images(24, *shape), draws(24, spread=spread, hue=hue)
    assert torch.equal(d.order, ORDERS)
    options = {name: x for name, x in d._asdict().items() if name not in {"blur", "sigma", "window"}}
    out = photometric_batched(x, **options)
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    expected = np.stack([view(f64(image), d, i) for i, image in enumerate(x)])
    # A value within float32's error of the threshold of the solarization may fall to either side.
    near = np.abs(expected - 127.5) <= FLOAT32_LEVELS
    assert (np.abs(f64(out) - expected)[~near] <= 0.5 + FLOAT32_LEVELS).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("left_out", [(), ("jitter", "factors", "order"), ("blur",), ("flip", "grayscale", "solarize")])
def test_against_one_at_a_time(shape: tuple[int, int], left_out: tuple[str, ...]) -> None:
    """The same formulas in float32; a value next to a half of a level may be rounded to either side."""
    x, d = images(40, *shape, seed=1), draws(40, seed=3)
    options = {name: x for name, x in d._asdict().items() if name not in left_out}
    difference = (photometric_batched(x, **options).int() - photometric(x, **options).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


def test_samples_do_not_depend_on_one_another() -> None:
    x, d = images(24, 28, 20), draws(24, seed=2)
    alone = [photometric_batched(x[i : i + 1], **{n: v[i : i + 1] for n, v in d._asdict().items()}) for i in range(24)]
    assert torch.equal(photometric_batched(x, **d._asdict()), torch.cat(alone))


def test_the_images_stay_as_they_are() -> None:
    x, d = images(8, 12, 12), draws(8)
    before = x.clone()
    photometric_batched(x, **d._asdict())
    assert torch.equal(x, before)
    assert torch.equal(photometric_batched(x), x)
