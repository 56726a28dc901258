"""Augmentation parameters sampled on the device: bit for bit those that the loaders sample in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byol_fast.config import ViewConfig
from byol_fast.data import augment_params as numpy_params
from byol_fast.data.random_numbers import stream_key
from byol_kernels import ViewParams, sample_view_params
from byol_kernels.augment_params import reference
from byol_kernels.photometric.params import VALUES, PhotometricParams
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.torchvision_reference import Params

# Every mask is on for half of the images, so that no two may be swapped.
ON: dict[str, Any] = dict.fromkeys(numpy_params.PROBABILITIES.values(), 0.5)
VIEWS = {
    "paper": ViewConfig(),
    "second": ViewConfig(blur_p=0.1, solarize_p=0.2),
    "nothing fits": ViewConfig(scale=(0.9, 1.0), ratio=(0.2, 0.3)),
    "strong": ViewConfig(**ON, ratio=(0.05, 30.0), scale=(1e-4, 1.0), brightness=1.7, hue=0.5, blur_kernel=0),
    "narrow": ViewConfig(scale=(0.5, 0.5), ratio=(1.0, 1.0), blur_sigma=(1.0, 1.0), blur_kernel=3),
}
SIZES = [(32, 32), (17, 400), (1, 1)]
if INTERPRETED:
    SIZES, VIEWS = SIZES[1:2], {name: VIEWS[name] for name in ("paper", "nothing fits", "strong")}

STREAMS = ((0, 0, 0), (2**63 + 11, 977, 1))[INTERPRETED:]


def table(view: ViewConfig, height: int, width: int) -> Tensor:
    return torch.from_numpy(numpy_params.params_table(view, height, width))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_parameters_equal_numpy(name: str, size: tuple[int, int], device: str) -> None:
    view, n = VIEWS[name], 70 if INTERPRETED else 20_000
    for seed, epoch, number in STREAMS:
        index = np.random.default_rng(seed % 997).integers(0, 2**40, n)
        expected: Any = numpy_params.sample_augment_params(view, index, seed=seed, epoch=epoch, view=number)
        key = torch.tensor(stream_key(seed, epoch, number))
        ours = sample_view_params(
            torch.from_numpy(index).to(device),
            key.to(device),
            table(view, *size).to(device),
            blur_kernel=view.blur_kernel,
        )
        assert np.array_equal(ours.crop_box.cpu(), numpy_params.crop_boxes(expected.crop_candidates, *size, view.ratio))
        for field in ours._fields[1:]:
            out, numbers = getattr(ours, field).cpu().numpy(), getattr(expected, field)
            assert out.dtype == numbers.dtype and np.array_equal(out, numbers), field


@not_interpreted
def test_names_of_operations_and_parameters_are_the_same_everywhere() -> None:
    """A parameter that one of them lacks would be left out in silence."""
    names, values = PhotometricParams._fields, {name for values in VALUES.values() for name in values}
    assert ViewParams._fields == ("crop_box", *names) and Params._fields == names
    assert tuple(numpy_params.AugmentParams.__slots__) == ("crop_candidates", *names)
    assert list(numpy_params.PROBABILITIES) == [name for name in names if name not in values]
    assert list(numpy_params.PROBABILITIES.values()) == [name for name in ViewConfig.__slots__ if name.endswith("_p")]


@not_interpreted
def test_exponential_function() -> None:
    """Fourteen terms at a sixteenth: what is left of the series is below one rounding, taken to the 16th power."""
    x = np.linspace(-4, 4, 999)
    assert np.abs(numpy_params._exp(x) / np.exp(x) - 1).max() <= 32 * 2.0**-52
    assert np.array_equal(numpy_params._exp(x), reference.exp(torch.from_numpy(x)))


@not_interpreted
def test_opcheck() -> None:
    arguments = (torch.arange(5), torch.tensor(3), table(ViewConfig(), 8, 8), 23)
    torch.library.opcheck(torch.ops.byol_kernels.sample_view_params.default, arguments)


def test_empty_batch(device: str) -> None:
    key, t = torch.tensor(3).to(device), table(ViewConfig(), 8, 8).to(device)
    assert sample_view_params(torch.arange(0).to(device), key, t).crop_box.shape == (0, 4)


@not_interpreted
@pytest.mark.parametrize("name", ["index", "key", "table"])
def test_arguments_are_refused(name: str) -> None:
    good = {"index": torch.arange(5), "key": torch.tensor(3), "table": table(ViewConfig(), 8, 8)}
    for wrong in (good[name].float(), good[name][None], good[name].to("meta") if name != "index" else good[name].int()):
        with pytest.raises(ValueError, match=f"sample_view_params: {name} must have shape"):
            sample_view_params(*{**good, name: wrong}.values())
