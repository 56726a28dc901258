"""Values of the photometric operator: against torchvision, every order and layout, both CPU forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_kernels import gaussian_blur, photometric
from byol_kernels.photometric import batched, reference
from byol_kernels.photometric.kernels import is_vector
from byol_kernels.photometric.ops import SMALL_AREA
from byol_kernels.photometric.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, VALUES, PhotometricParams
from tests.gpu import DEVICE
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.torchvision_reference import (
    FLOAT16_FACTORS,
    FLOAT32_LEVELS,
    ORDERS,
    Params,
    augment,
    augment_exactly,
    blur,
    make_images,
    make_params,
    max_error,
    on,
    set_masks,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOR = ("jitter", "factors", "order")
MASKS = [name for name in PhotometricParams._fields if name not in {*VALUES["jitter"], *VALUES["blur"]}]
DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def some(cases: list[Any], every: int) -> list[Any]:
    """All cases; in the interpreter, which takes tenths of a second per image, every n-th."""
    return cases[::every] if INTERPRETED else cases


# -------------------------------------------------------------------------------- values

# Each order once in the interpreter, in one layout or the other.
ORDER_CASES = [
    pytest.param(width, spread, hue, slice(first, None, 2) if INTERPRETED else slice(None), id=f"{width}-{name}")
    for (width, first) in ((24, 0), (17, 1))
    for name, spread, hue in some([("strong", 0.8, 0.5), ("byol", 0.4, 0.1)], 2)
]


@pytest.mark.parametrize(("width", "spread", "hue", "orders"), ORDER_CASES)
def test_every_order_matches_float64(width: int, spread: float, hue: float, orders: slice, device: str) -> None:
    p = set_masks(make_params(24, spread=spread, hue=hue), flip=False, jitter=True, grayscale=False, blur=False)
    assert torch.equal(p.order, ORDERS)
    p = Params(*(values[orders] for values in set_masks(p, solarize=False)))
    x = make_images(len(p.order), 9, width)
    out = photometric(x.to(device), **on(device, p, *COLOR), dtype=torch.float32)
    assert max_error(255 * out, augment_exactly(x, p)) <= FLOAT32_LEVELS


@pytest.mark.parametrize(("width", "first"), [(24, 1), (17, 0)], ids=["vector", "odd_width"])
def test_truncated_matches_torchvision(width: int, first: int, device: str) -> None:
    """Truncated after each step. A value that torchvision's float32 has on the other side of a whole number is a level
    off; that is rare, and the steps after it stretch it by no more than three: 1.4 of them twice, and a hue."""
    p = set_masks(make_params(24), blur=False, jitter=True)
    p = Params(*(values[first :: 3 if INTERPRETED else 1] for values in p))
    x = make_images(len(p.order), 9, width)
    out = photometric(x.to(device), **on(device, p, *COLOR, "flip", "grayscale", "solarize"), truncate=True)
    difference = (out.cpu().int() - augment(x, p).int()).abs()
    assert difference.max() <= 3
    assert (difference > 0).double().mean() <= 2e-3


@pytest.mark.parametrize("adjustment", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_single_adjustment(adjustment: int, device: str) -> None:
    p = set_masks(make_params(4), flip=False, jitter=True, grayscale=False, blur=False, solarize=False)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(4, 1)
    factors[:, adjustment] = torch.tensor([0.0, 0.37, 1.0, 1.63])
    if adjustment == HUE:
        factors[:, HUE] = (factors[:, HUE] - 1.0) / 2  # -1/2, -.315, 0, .315 turns
    p, x = p._replace(factors=factors), make_images(4, 11, 16, seed=1)
    exact = photometric(x.to(device), **on(device, p, *COLOR), dtype=torch.float32)
    assert max_error(255 * exact, augment_exactly(x, p)) <= FLOAT32_LEVELS
    truncated = photometric(x.to(device), **on(device, p, *COLOR), truncate=True)
    difference = (truncated.cpu().int() - augment(x, p).int()).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() <= 2e-3


@pytest.mark.parametrize("threshold", [0, 1, 64, 128, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_grayscale_and_solarize(threshold: int, dtype: torch.dtype, device: str) -> None:
    """One image for each operation, one for none, one for all."""
    x = make_images(5, 7, 24)
    yes = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 1, 0, 1]]).bool()
    p = set_masks(make_params(5), jitter=False, blur=False)._replace(flip=yes[0], grayscale=yes[1], solarize=yes[2])
    masks = on(device, p, "flip", "grayscale", "solarize")
    out = photometric(x.to(device), **masks, solarize_threshold=threshold, dtype=dtype)
    expected = augment_exactly(x, p, threshold=threshold)
    if dtype == torch.float32:
        assert max_error(255 * out, expected) <= FLOAT32_LEVELS
    else:
        assert torch.equal(out.cpu().double(), expected.round())


# Above 64 * 64 px the CPU takes one image at a time.
SHAPES = [(24, 24), (10, 15), (1, 1), (3, 8), *([] if INTERPRETED else [(70, 60)])]


@pytest.mark.parametrize(("dtype", "shape"), some(list(itertools.product(DTYPES, SHAPES)), 5), ids=str)
def test_all_operations_match_float64(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    p = set_masks(make_params(4 if INTERPRETED else 24, seed=5), blur=False)
    x = make_images(len(p.flip), *shape, seed=2)
    normalize: dict[str, Any] = {} if dtype == torch.uint8 else {"mean": MEAN, "std": STD}
    out = photometric(x.to(device), **on(device, p, "flip", *COLOR, "grayscale", "solarize"), dtype=dtype, **normalize)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    expected = augment_exactly(x, p)
    if dtype == torch.uint8:
        assert max_error(out, expected) <= 0.5 + FLOAT32_LEVELS
        return
    expected = F.normalize(expected / 255, list(MEAN), list(STD))
    rounding = ROUNDING[dtype] * (2 if INTERPRETED else 1)  # it truncates
    tolerance = FLOAT32_LEVELS / 255 / min(STD) + rounding * expected.abs()
    assert ((out.cpu().double() - expected).abs() <= tolerance).all()


# -------------------------------------------------------------------------------- with the blur


@pytest.mark.parametrize(
    ("truncate", "shape"), some(list(itertools.product([False, True], [(24, 40), (13, 21)])), 3), ids=str
)
def test_blurred_images(truncate: bool, shape: tuple[int, int], device: str) -> None:
    """The operator up to the blur, as the uint8 image that the blur reads; the rest by torchvision in float64."""
    p = make_params(12, seed=1)
    p = Params(*(values[:6] for values in p)) if INTERPRETED else p
    x = make_images(len(p.flip), *shape, seed=3)
    assert p.blur.any() and not p.blur.all() and (p.blur & p.solarize).any()
    out = 255 * photometric(x.to(device), **on(device, p), dtype=torch.float32, truncate=truncate).cpu().double()
    before = photometric(x.to(device), **on(device, p, "flip", *COLOR, "grayscale"), truncate=truncate).cpu()
    expected = blur(before, p.sigma, p.kernel_size)
    expected = expected.round() if truncate else expected
    inverted = p.solarize[:, None, None, None] & (expected >= 127.5)
    expected = torch.where(inverted, 255 - expected, expected)[p.blur]
    # With truncate a blurred value next to a half of a level may be rounded to either side.
    tolerance = 1.0 if truncate else FLOAT32_LEVELS if device == "cpu" and not INTERPRETED else FLOAT16_FACTORS
    assert max_error(out[p.blur], expected) <= tolerance + FLOAT32_LEVELS
    if not truncate:
        sharp = Params(*(values[~p.blur] for values in p))
        assert max_error(out[~p.blur], augment_exactly(x[~p.blur], sharp)) <= FLOAT32_LEVELS


def test_one_call_equals_three_calls(device: str) -> None:
    p = make_params(4 if INTERPRETED else 12, seed=2)
    x = make_images(len(p.flip), 16, 24, seed=4)
    whole = photometric(x.to(device), **on(device, p), dtype=torch.float32, mean=MEAN, std=STD, truncate=True)
    out = photometric(x.to(device), **on(device, p, "flip", *COLOR, "grayscale"), truncate=True)
    out = gaussian_blur(out, **on(device, p, "sigma", "kernel_size", "blur"))
    out = photometric(out, **on(device, p, "solarize"), dtype=torch.float32, mean=MEAN, std=STD)
    torch.testing.assert_close(whole, out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_whole_view_matches_torchvision(truncate: bool, device: str) -> None:
    p = make_params(4 if INTERPRETED else 16, seed=3)
    x = make_images(len(p.flip), 16, 24, seed=5)
    out = photometric(x.to(device), **on(device, p), truncate=truncate)
    difference = (out.cpu().double() - augment(x, p).double()).abs()
    if truncate:  # the blur rounds to the nearest, so a level more, where its sum is next to a half
        assert difference.max() <= 4 and difference.mean() <= FLOAT16_FACTORS / 2
    else:  # torchvision loses up to a level per step
        assert difference.mean() <= 2.5


# -------------------------------------------------------------------------------- the two CPU forms


def both_forms(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """uint8 results of the batched form, and of one image at a time."""
    params = PhotometricParams(*p)
    outs = (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(x, memory_format=torch.channels_last),
    )
    batched.photometric(x, params, 128, outs[0])
    reference.photometric(x, params, 128, [], [], False, outs[1])
    return outs


@not_interpreted
@pytest.mark.parametrize("shape", [(32, 32), (17, 24), (3, 8), (1, 1)], ids=str)
@pytest.mark.parametrize(("spread", "hue"), [(0.4, 0.1), (0.8, 0.5)], ids=["byol", "strong"])
def test_cpu_forms_match(shape: tuple[int, int], spread: float, hue: float) -> None:
    """The same formulas in float32; a value next to a half of a level may be rounded to either side."""
    x, p = make_images(48, *shape, seed=1), make_params(48, seed=3, spread=spread, hue=hue)
    for case in (p, set_masks(p, jitter=False, grayscale=False), set_masks(p, blur=True), set_masks(p, blur=False)):
        whole, one_by_one = both_forms(x, case)
        difference = (whole.int() - one_by_one.int()).abs()
        assert difference.max() <= 1 and (difference > 0).double().mean() <= 1e-3


@not_interpreted
def test_cpu_form_follows_size() -> None:
    p = set_masks(make_params(48, seed=3, spread=0.8, hue=0.5), jitter=True)
    for height, width in ((64, 64), (65, 64)):
        x = make_images(48, height, width, seed=1)
        whole, one_by_one = both_forms(x, p)
        assert not torch.equal(whole, one_by_one)  # or the test would show nothing
        small = height * width <= SMALL_AREA
        assert torch.equal(photometric(x, **p._asdict()), whole if small else one_by_one)


@not_interpreted
def test_default_dtype_changes_nothing() -> None:
    p = make_params(6)
    for size in (12, 70):
        x = make_images(6, size, size)
        expected = photometric(x, **p._asdict())
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(photometric(x, **p._asdict()), expected)
        finally:
            torch.set_default_dtype(torch.float32)


# -------------------------------------------------------------------------------- properties

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planar": lambda x: x.contiguous(),
    "crop": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    "crop_channels_last": lambda x: torch.nn.functional.pad(x, (8, 8, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )[:, :, 1:-1, 8:-8],
    "every_other": lambda x: x.repeat_interleave(2, 3).repeat_interleave(2, 0)[::2, :, :, ::2],
    "unaligned": lambda x: (
        torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:]
        .view(x.shape[0], *x.shape[2:], 3)
        .permute(0, 3, 1, 2)
    ),
    "batch_stride": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("size", [8, 72] if not INTERPRETED else [8])
def test_strides_change_nothing(size: int, device: str) -> None:
    x, p = make_images(3, size, 16 if size == 8 else size).to(device), on(device, make_params(3, seed=7))
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.uint8):
        expected = photometric(x, **p, dtype=dtype)
        for name, layout in LAYOUTS.items():
            strided = layout(x)
            assert torch.equal(strided, x)
            out = photometric(strided, **p, dtype=dtype)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6, msg=name)


def test_vector_path_needs_dense_aligned_pixels() -> None:
    x = make_images(6, 8, 16)
    assert is_vector(x) and not is_vector(make_images(6, 8, 15))
    vector = {name: is_vector(layout(x)) for name, layout in LAYOUTS.items()}
    assert vector == {**dict.fromkeys(LAYOUTS, False), "batch_stride": True}


def test_images_are_independent(device: str) -> None:
    """Each alone gives the same bits, and an expanded batch is as good as a repeated one."""
    for size in (8,) if INTERPRETED else (8, 72):
        x, p = make_images(3, size, 16).to(device), on(device, make_params(3, seed=4))
        whole = photometric(x, **p)
        for i in (0, 2):
            alone = photometric(x[i : i + 1], **{name: values[i : i + 1] for name, values in p.items()})
            assert torch.equal(alone[0], whole[i])
        same = photometric(x[:1].expand(3, -1, -1, -1), **p)
        assert torch.equal(same, photometric(x[:1].repeat(3, 1, 1, 1), **p))


def test_absent_masks(device: str) -> None:
    """Of what has values a missing mask means all images, otherwise none."""
    x, p = make_images(2, 8, 16).to(device), make_params(2)
    values = on(device, p, "factors", "order", "sigma", "kernel_size")
    on_all = set_masks(p, jitter=True, blur=True, flip=False, grayscale=False, solarize=False)
    assert torch.equal(photometric(x, **values), photometric(x, **on(device, on_all)))
    assert torch.equal(photometric(x), x)


def test_each_mask_changes_pixels(device: str) -> None:
    x, none = make_images(2, 8, 16).to(device), set_masks(make_params(2), **dict.fromkeys(MASKS, False))
    assert torch.equal(photometric(x, **on(device, none)), x)
    for mask in MASKS:
        assert not torch.equal(photometric(x, **on(device, set_masks(none, **{mask: True}))), x), mask


@pytest.mark.parametrize("truncate", [False, True])
def test_neutral_factors_change_nothing(truncate: bool, device: str) -> None:
    orders = ORDERS[:: 7 if INTERPRETED else 1].to(device)
    x = make_images(len(orders), 8, 16).to(device)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device).repeat(len(orders), 1)
    assert torch.equal(photometric(x, factors=factors, order=orders, truncate=truncate), x)


def test_whole_turns_of_hue_change_nothing(device: str) -> None:
    x = make_images(3, 8, 16).to(device)
    factors = torch.tensor([[1.0, 1.0, 1.0, turns] for turns in (1.0, -1.0, 3.0)], device=device)
    assert torch.equal(photometric(x, factors=factors, order=ORDERS[:3].to(device)), x)


def test_int64_parameters(device: str) -> None:
    x, p = make_images(2, 8, 16).to(device), on(device, make_params(2))
    wide = {**p, "order": p["order"].long(), "kernel_size": p["kernel_size"].long()}
    assert torch.equal(photometric(x, **p), photometric(x, **wide))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)], ids=str)
def test_empty_images(shape: tuple[int, ...], device: str) -> None:
    p = on(device, make_params(shape[0]))
    for dtype in (torch.uint8, torch.float32):
        assert photometric(torch.empty(shape, dtype=torch.uint8, device=device), **p, dtype=dtype).shape == shape


@pytest.mark.gpu("kernels")
def test_large_images_on_gpu_and_cpu() -> None:
    """Many sweeps of a program over its image, and the two implementations beside one another."""
    x, p = make_images(24, 224, 224), make_params(24)
    difference = (photometric(x.to(DEVICE), **on(DEVICE, p)).cpu().int() - photometric(x, **p._asdict()).int()).abs()
    assert difference.max() <= 1 and difference.double().mean() <= FLOAT16_FACTORS
