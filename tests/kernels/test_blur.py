"""The Gaussian blur: against torchvision, every layout and border, and what is refused."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_kernels import gaussian_blur
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.test_photometric import LAYOUTS, ROUNDING, some
from tests.kernels.torchvision_reference import (
    FLOAT16_FACTORS,
    FLOAT32_LEVELS,
    blur,
    make_images,
    make_params,
    max_error,
    on,
)

SHAPES = [(32, 32), (33, 31), (5, 40), (16, 17)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BATCH = 2 if INTERPRETED else 4


def uint8_tolerance(device: str) -> float:
    """In levels: rounding, and the error of what is rounded."""
    return 0.5 + (FLOAT16_FACTORS if device == "cuda" or INTERPRETED else FLOAT32_LEVELS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uint8_matches_float64(shape: tuple[int, int], device: str) -> None:
    x, p = make_images(BATCH, *shape), make_params(BATCH, seed=1)
    out = gaussian_blur(x.to(device), **on(device, p, "sigma", "kernel_size"))
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    assert max_error(out, blur(x, p.sigma, p.kernel_size)) <= uint8_tolerance(device)


def test_uint8_matches_torchvision(device: str) -> None:
    """A level off where the sum is next to a half; one value in thirty at most, by the error of float16."""
    x, p = make_images(BATCH, 24, 30, seed=1), make_params(BATCH, seed=2)
    out = gaussian_blur(x.to(device), **on(device, p, "sigma", "kernel_size")).cpu()
    parameters = zip(x, p.kernel_size.tolist(), p.sigma.tolist(), strict=True)
    expected = torch.stack([F.gaussian_blur(image, [size] * 2, [sigma] * 2) for image, size, sigma in parameters])
    difference = (out.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.double().mean() <= (1 / 30 if device == "cuda" or INTERPRETED else 1e-3)


@pytest.mark.parametrize(("dtype", "shape"), some(list(itertools.product(FLOATS, SHAPES)), 5), ids=str)
def test_floats_match_float64(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    p = make_params(BATCH, seed=3)
    x = ((make_images(BATCH, *shape).float() / 255 - 0.45) / 0.22).to(dtype)
    out = gaussian_blur(x.to(device), **on(device, p, "sigma", "kernel_size"))
    assert out.dtype == dtype
    expected = blur(x, p.sigma, p.kernel_size)
    rounding = ROUNDING[dtype] * (2 if INTERPRETED else 1)  # it truncates
    # Two sums of up to 23 products of values up to 2.5.
    assert ((out.cpu().double() - expected).abs() <= 2 * 23 * 2.5 * 2.0**-24 + rounding * expected.abs()).all()


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_flat_image_stays_unchanged(dtype: torch.dtype, device: str) -> None:
    values = torch.tensor([0, 1, 77, 128, 200, 254, 255, 13])[:: 2 if INTERPRETED else 1]
    x = values.view(-1, 1, 1, 1).expand(-1, 3, 20, 30).to(dtype).to(device)
    out = gaussian_blur(x, **on(device, make_params(len(values), seed=4), "sigma", "kernel_size"))
    if dtype == torch.uint8:
        assert torch.equal(out, x)
    else:
        torch.testing.assert_close(out, x, rtol=0.008 if INTERPRETED and dtype == torch.bfloat16 else 1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mask_selects_images(dtype: torch.dtype, device: str) -> None:
    mask = torch.tensor([True, False, True])
    x, p = make_images(3, 17, 20).to(dtype).to(device), on(device, make_params(3), "sigma", "kernel_size")
    out = gaussian_blur(x, **p, blur=mask.to(device))
    selected = gaussian_blur(x[mask], **{name: values[mask] for name, values in p.items()})
    assert torch.equal(out[~mask], x[~mask]) and torch.equal(out[mask], selected)
    if dtype == torch.float32:  # a NaN in one image does not reach another
        x[mask] = torch.nan
        assert torch.equal(gaussian_blur(x, **p, blur=mask.to(device))[~mask], x[~mask])


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (20, 1), (2, 3)], ids=str)
def test_kernels_wider_than_image(shape: tuple[int, int], device: str) -> None:
    """Mirrored as often as needed, like numpy; torchvision refuses."""
    x = make_images(3, *shape)
    sigma, kernel_size = torch.tensor([0.7, 2.0, 9.0]), torch.tensor([5, 13, 45])
    out = gaussian_blur(x.to(device), sigma.to(device), kernel_size.to(device))
    assert max_error(out, blur(x, sigma, kernel_size)) <= uint8_tolerance(device)


def test_wide_kernels(device: str) -> None:
    x = make_images(2, 48, 30)
    sigma, kernel_size = torch.tensor([3.7, 6.0]), torch.tensor([23, 41])
    out = gaussian_blur(x.to(device), sigma.to(device), kernel_size.to(device))
    assert max_error(out, blur(x, sigma, kernel_size)) <= uint8_tolerance(device)


def test_kernel_size_one_changes_nothing(device: str) -> None:
    x = make_images(3, 9, 33).to(device)
    ones = torch.ones(3, dtype=torch.int64, device=device)
    assert torch.equal(gaussian_blur(x, torch.full((3,), 1.3, device=device), ones), x)


def test_strides_change_nothing(device: str) -> None:
    x, p = make_images(2, 10, 16).to(device), on(device, make_params(2), "sigma", "kernel_size")
    expected = gaussian_blur(x, **p)
    for name, layout in LAYOUTS.items():
        assert torch.equal(gaussian_blur(layout(x), **p), expected), name


def test_empty_batch(device: str) -> None:
    none = torch.empty(0, device=device)
    assert gaussian_blur(torch.empty(0, 3, 4, 4, device=device), none, none.int()).shape == (0, 3, 4, 4)


@not_interpreted
def test_default_dtype_changes_nothing() -> None:
    x, p = make_images(2, 40, 50), on("cpu", make_params(2), "sigma", "kernel_size")
    expected = gaussian_blur(x, **p)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(gaussian_blur(x, **p), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    x, p = make_images(3, 8, 9).to(dtype).to(device), on(device, make_params(3), "sigma", "kernel_size", "blur")
    op = torch.ops.byol_kernels.gaussian_blur
    torch.library.opcheck(op, (x, *p.values()))
    without_mask = (p["sigma"], p["kernel_size"], None)
    torch.library.opcheck(op, (x, *without_mask))
    if dtype == torch.float32:  # its autograd refuses on purpose, so the check that differentiates it is left out
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, (x.requires_grad_(), *without_mask), test_utils=utils)


@not_interpreted
def test_compiles_without_graph_breaks(device: str) -> None:
    x, p = make_images(3, 8, 9).to(device), on(device, make_params(3), "sigma", "kernel_size")

    def model(x: Tensor) -> Tensor:
        return gaussian_blur(x, **p).float() * 2

    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_backward_is_refused(device: str) -> None:
    x = torch.rand(2, 3, 4, 4, device=device, requires_grad=True)
    out = gaussian_blur(x, torch.ones(2, device=device), torch.full((2,), 3, device=device))
    with pytest.raises(RuntimeError, match="images must not require a gradient"):
        out.sum().backward()  # type: ignore[no-untyped-call]


X, S, W = torch.zeros(2, 3, 4, 4), torch.ones(2), torch.ones(2, dtype=torch.int32)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gray": (lambda: gaussian_blur(X[:, :1], S, W), r"images must be \[batch, 3"),
    "integers": (lambda: gaussian_blur(X.int(), S, W), r"images must be torch\.uint8 or torch\.bfloat16"),
    "sigma_rows": (lambda: gaussian_blur(X, S[:1], W), r"sigma must have shape \(2,\), got \(1,\)"),
    "sigma_dtype": (lambda: gaussian_blur(X, S.double(), W), r"sigma must be torch\.float32, got torch\.float64"),
    "kernel_size_dtype": (lambda: gaussian_blur(X, S, S), "kernel_size must be torch.int32 or torch.int64"),
    "blur_dtype": (lambda: gaussian_blur(X, S, W, blur=W), "blur must be torch.bool"),
    "device": (lambda: gaussian_blur(X, S.to("meta"), W), "sigma must be on the device of images, cpu"),
}


@not_interpreted
@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
