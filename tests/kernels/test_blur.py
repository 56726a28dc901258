"""The Gaussian blur: against float64 and torchvision, every layout and border, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_kernels import gaussian_blur
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.photometric_restatement import FLOAT16_FACTORS, FLOAT32_LEVELS, blur, draws, f64, images
from tests.kernels.test_photometric import LAYOUTS

SHAPES = [(32, 32), (33, 31), (5, 40), (16, 17)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def expected(x: Tensor, sigma: Tensor, window: Tensor) -> Any:
    return np.stack([blur(f64(image), float(sigma[i]), int(window[i])) for i, image in enumerate(x)])


def uint8_tolerance(device: str) -> float:
    """In levels: rounding, and the error of what is rounded."""
    return 0.5 + (FLOAT16_FACTORS if device == "cuda" or INTERPRETED else FLOAT32_LEVELS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uint8_against_float64(shape: tuple[int, int], device: str) -> None:
    x, d = images(4, *shape), draws(4, seed=1)
    out = gaussian_blur(x.to(device), d.sigma.to(device), d.window.to(device))
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(f64(out) - expected(x, d.sigma, d.window)).max() <= uint8_tolerance(device)


def test_uint8_against_torchvision(device: str) -> None:
    """The next level, where the sum is near a half; a level in thirty at most, by the error of float16."""
    x, d = images(6, 32, 40, seed=1), draws(6, seed=2)
    out = gaussian_blur(x.to(device), d.sigma.to(device), d.window.to(device))
    theirs = torch.stack(
        [F.gaussian_blur(image, [int(d.window[i])] * 2, [float(d.sigma[i])] * 2) for i, image in enumerate(x)]
    )
    difference = np.abs(f64(out) - f64(theirs))
    assert difference.max() <= 1
    assert difference.mean() <= (1 / 30 if device == "cuda" or INTERPRETED else 1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_against_float64(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    d = draws(4, seed=3)
    x = ((images(4, *shape).float() / 255 - 0.45) / 0.22).to(dtype)
    out = gaussian_blur(x.to(device), d.sigma.to(device), d.window.to(device))
    assert out.dtype == dtype
    values = expected(x, d.sigma, d.window)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    rounding *= 2 if INTERPRETED else 1  # it truncates
    # Two sums of up to 23 products of values up to 2.5.
    assert (np.abs(f64(out) - values) <= 2 * 23 * 2.5 * 2.0**-24 + rounding * np.abs(values)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_a_flat_image_stays_as_it_is(dtype: torch.dtype, device: str) -> None:
    d = draws(8, seed=4)
    values = torch.tensor([0, 1, 77, 128, 200, 254, 255, 13])
    x = values.view(8, 1, 1, 1).expand(8, 3, 20, 30).to(dtype).to(device)
    out = gaussian_blur(x, d.sigma.to(device), d.window.to(device))
    if dtype == torch.uint8:
        assert torch.equal(out, x)
    else:
        torch.testing.assert_close(out, x, rtol=0.008 if INTERPRETED and dtype == torch.bfloat16 else 1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_only_the_samples_whose_coin_says_so(dtype: torch.dtype, device: str) -> None:
    x, d = images(6, 17, 20).to(dtype).to(device), draws(6)
    assert 0 < d.blur.sum() < 6
    sigma, window, coin = d.sigma.to(device), d.window.to(device), d.blur.to(device)
    out, everywhere = gaussian_blur(x, sigma, window, blur=coin), gaussian_blur(x, sigma, window)
    assert torch.equal(out[~coin], x[~coin])
    assert torch.equal(out[coin], everywhere[coin])
    nan = x[coin].float()
    nan[:] = torch.nan
    if dtype == torch.float32:  # not even a NaN of one sample reaches another
        y = x.clone()
        y[coin] = nan
        assert torch.equal(gaussian_blur(y, sigma, window, blur=coin)[~coin], x[~coin])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3)], ids=str)
def test_windows_wider_than_the_image(shape: tuple[int, int], device: str) -> None:
    """Mirrored as often as it takes, as numpy does; torchvision refuses."""
    x = images(3, *shape)
    sigma, window = torch.tensor([0.7, 2.0, 9.0]), torch.tensor([5, 13, 55])
    out = gaussian_blur(x.to(device), sigma.to(device), window.to(device))
    assert np.abs(f64(out) - expected(x, sigma, window)).max() <= uint8_tolerance(device)


def test_wide_windows(device: str) -> None:
    x = images(2, 48, 56)
    sigma, window = torch.tensor([3.7, 6.0]), torch.tensor([23, 41])
    out = gaussian_blur(x.to(device), sigma.to(device), window.to(device))
    assert np.abs(f64(out) - expected(x, sigma, window)).max() <= uint8_tolerance(device)


def test_a_window_of_one_changes_nothing(device: str) -> None:
    x = images(3, 9, 33).to(device)
    ones = torch.ones(3, dtype=torch.int64, device=device)
    assert torch.equal(gaussian_blur(x, torch.full((3,), 1.3, device=device), ones), x)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_nothing(layout: Callable[[Tensor], Tensor], device: str) -> None:
    x, d = images(4, 10, 16).to(device), draws(4)
    sigma, window = d.sigma.to(device), d.window.to(device)
    assert torch.equal(gaussian_blur(layout(x), sigma, window), gaussian_blur(x, sigma, window))


def test_empty_batch(device: str) -> None:
    none = torch.empty(0, device=device)
    assert gaussian_blur(torch.empty(0, 3, 4, 4, device=device), none, none.int()).shape == (0, 3, 4, 4)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_operator_checks(dtype: torch.dtype, device: str) -> None:
    x, d = images(3, 8, 9).to(dtype).to(device), draws(3)
    op = torch.ops.byol_kernels.gaussian_blur
    torch.library.opcheck(op, (x, d.sigma.to(device), d.window.to(device), d.blur.to(device)))
    torch.library.opcheck(op, (x, d.sigma.to(device), d.window.to(device), None))
    if dtype == torch.float32:  # its autograd refuses on purpose, so the check that differentiates it is left out
        torch.library.opcheck(
            op,
            (x.requires_grad_(), d.sigma.to(device), d.window.to(device), None),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@not_interpreted
def test_compiles_without_graph_breaks(device: str) -> None:
    x, d = images(3, 8, 9).to(device), draws(3)
    sigma, window = d.sigma.to(device), d.window.to(device)

    def model(x: Tensor) -> Tensor:
        return gaussian_blur(x, sigma, window).float() * 2

    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_backward_is_refused(device: str) -> None:
    x = torch.rand(2, 3, 4, 4, device=device, requires_grad=True)
    out = gaussian_blur(x, torch.ones(2, device=device), torch.full((2,), 3, device=device))
    with pytest.raises(RuntimeError, match="images must not require a gradient"):
        out.sum().backward()  # type: ignore[no-untyped-call]


X, S, W = torch.zeros(2, 3, 4, 4), torch.ones(2), torch.ones(2, dtype=torch.int32)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "grey": (lambda: gaussian_blur(X[:, :1], S, W), r"images must be \[batch, 3"),
    "integers": (lambda: gaussian_blur(X.int(), S, W), r"images must be torch\.uint8 or torch\.bfloat16"),
    "sigma_rows": (lambda: gaussian_blur(X, S[:1], W), r"sigma must have shape \(2,\), got \(1,\)"),
    "sigma_dtype": (lambda: gaussian_blur(X, S.double(), W), r"sigma must be torch\.float32, got torch\.float64"),
    "window_dtype": (lambda: gaussian_blur(X, S, S), "window must be torch.int32 or torch.int64"),
    "blur_dtype": (lambda: gaussian_blur(X, S, W, blur=W), "blur must be torch.bool"),
    "device": (lambda: gaussian_blur(X, S.to("meta"), W), "sigma must be on the device of images, cpu"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
