"""Draws on the device: bit for bit what the loaders draw in numpy."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byol_fast.config import ViewConfig
from byol_fast.data import augment_params
from byol_kernels import draw_view, draws
from tests.kernels.conftest import INTERPRETED, not_interpreted

if INTERPRETED:
    _override = torch.library.Library("byol_kernels", "IMPL")  # type: ignore[no-untyped-call]
    partial(_override.impl, allow_override=True)("draw_view", draws._draw_view_cuda, "CPU")

VIEWS = {
    "paper": ViewConfig(),
    "second": ViewConfig(blur=0.1, solarize=0.2),
    "nothing fits": ViewConfig(area=(0.9, 1.0), aspect=(0.2, 0.3)),
    "strong": ViewConfig(aspect=(0.05, 30.0), area=(1e-4, 1.0), brightness=1.7, hue=0.5, blur_kernel=0),
    "narrow": ViewConfig(area=(0.5, 0.5), aspect=(1.0, 1.0), blur_sigma=(1.0, 1.0), blur_kernel=3),
}
SIZES = [(17, 400)] if INTERPRETED else [(32, 32), (17, 400), (1, 1)]


def table(view: ViewConfig, height: int, width: int) -> Tensor:
    """Column by column from the configuration, by the names that the operator gives them."""
    lowest, spread = augment_params.factor_ranges(view)
    centre = augment_params.centred_crop(height, width, view.aspect)
    values = {
        "area": view.area[0],
        "area_spread": view.area[1] - view.area[0],
        "log_aspect": math.log(view.aspect[0]),
        "log_aspect_spread": math.log(view.aspect[1]) - math.log(view.aspect[0]),
        "sigma": view.blur_sigma[0],
        "sigma_spread": view.blur_sigma[1] - view.blur_sigma[0],
        **dict(zip(("brightness", "contrast", "saturation", "hue"), lowest, strict=True)),
        **{f"{n}_spread": s for n, s in zip(("brightness", "contrast", "saturation", "hue"), spread, strict=True)},
        **{coin: getattr(view, coin) for coin in ("flip", "jitter", "grayscale", "blur", "solarize")},
        "height": height,
        "width": width,
        "root_of_area": math.sqrt(height * width),
        "centre_height": centre[0],
        "centre_width": centre[1],
    }
    return torch.tensor([values[name] for name in draws.TABLE], dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_draws_what_numpy_draws(name: str, size: tuple[int, int], device: str) -> None:
    view, n = VIEWS[name], 150 if INTERPRETED else 20_000
    for seed, epoch, number in ((0, 0, 0), (2**63 + 11, 977, 1)):
        index = np.random.default_rng(seed % 997).integers(0, 2**40, n)
        drawn: Any = augment_params.draw(view, index, seed=seed, epoch=epoch, view=number)
        key = torch.tensor(augment_params.stream_key(seed, epoch, number))
        ours = draw_view(
            torch.from_numpy(index).to(device),
            key.to(device),
            table(view, *size).to(device),
            blur_kernel=view.blur_kernel,
        )
        assert np.array_equal(ours.crop.cpu(), augment_params.crop_windows(drawn.crop, *size, view.aspect))
        for field in ours._fields[1:]:
            mine, theirs = getattr(ours, field).cpu().numpy(), getattr(drawn, field)
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), field


def test_views_tries_as_many_crops() -> None:
    assert augment_params.ATTEMPTS == draws.ATTEMPTS


def test_exponential_function() -> None:
    """Fourteen terms at a sixteenth: what is left of the series is below one rounding, taken to the 16th power."""
    x = np.linspace(-4, 4, 999)
    assert np.abs(augment_params._exp(x) / np.exp(x) - 1).max() <= 32 * 2.0**-52
    assert np.array_equal(augment_params._exp(x), draws._exp_float64(torch.from_numpy(x)))


@not_interpreted
def test_opcheck() -> None:
    arguments = (torch.arange(5), torch.tensor(3), table(ViewConfig(), 8, 8), 23)
    torch.library.opcheck(torch.ops.byol_kernels.draw_view.default, arguments)


def test_nothing_in_nothing_out(device: str) -> None:
    key, t = torch.tensor(3).to(device), table(ViewConfig(), 8, 8).to(device)
    assert draw_view(torch.arange(0).to(device), key, t).crop.shape == (0, 4)


@pytest.mark.parametrize("name", ["index", "key", "table"])
def test_refuses(name: str) -> None:
    good = {"index": torch.arange(5), "key": torch.tensor(3), "table": table(ViewConfig(), 8, 8)}
    for wrong in (good[name].float(), good[name][None], good[name].to("meta") if name != "index" else good[name].int()):
        with pytest.raises(ValueError, match=f"draw_view: {name} must have shape"):
            draw_view(*{**good, name: wrong}.values())
