"""The max pooling of a ResNet: values, places and gradients against torch's, every layout, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from byol_kernels import max_pool2d_3x3
from tests.kernels.conftest import not_interpreted

SHAPES = [(2, 5, 8, 12), (1, 64, 7, 9), (3, 3, 1, 1), (1, 100, 2, 5), (1, 16, 6, 150)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def images(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Few different values, so that many windows hold the largest one more than once."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).to(device)


def gradients(pool: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Result, and the gradient for whole numbers as upstream gradient, whose sums are exact in any order."""
    x = x.detach().requires_grad_()
    y = pool(x)
    upstream = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype).to(y.device)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


def torchs(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = images(shape, dtype, device)
    expected = gradients(torchs, x.cpu())
    found = gradients(max_pool2d_3x3, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.cpu(), b)


def test_nan_and_infinities(device: str) -> None:
    """A NaN wins and gets the gradient; of -inf alone the first pixel does."""
    x = images((2, 4, 9, 9), torch.float32, "cpu")
    x[0, 0], x[0, 1, 3:5], x[1, 2, 4, 4], x[1, 3, ::2] = -torch.inf, torch.inf, torch.nan, -torch.inf
    found, expected = gradients(max_pool2d_3x3, x.to(device)), gradients(torchs, x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu().nan_to_num(nan=1e9), b.nan_to_num(nan=1e9))


def test_any_strides(device: str) -> None:
    x = images((3, 6, 10, 11), torch.float32, device)
    expected = gradients(max_pool2d_3x3, x)
    wide = torch.zeros(3, 8, 14, 15, device=device)
    wide[:, 1:7, 2:12, 3:14] = x
    for other in (x.contiguous(), wide[:, 1:7, 2:12, 3:14], x.transpose(2, 3).contiguous().transpose(2, 3)):
        found = gradients(max_pool2d_3x3, other)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    x.requires_grad_()
    (expanded,) = torch.autograd.grad(max_pool2d_3x3(x).sum(), x)  # an upstream gradient of stride 0
    (exact,) = torch.autograd.grad(torchs(x).sum(), x)
    assert torch.equal(expanded, exact)


def test_empty_batch(device: str) -> None:
    x = torch.zeros(0, 4, 8, 8, device=device, requires_grad=True)
    y = max_pool2d_3x3(x)
    assert y.shape == (0, 4, 4, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@not_interpreted
def test_opcheck_and_compile() -> None:
    x = images((2, 3, 6, 7), torch.float32, "cpu").requires_grad_()
    torch.library.opcheck(torch.ops.byol_kernels.max_pool2d_3x3_fwd.default, (x,))
    y, place = torch.ops.byol_kernels.max_pool2d_3x3_fwd(x.detach())
    torch.library.opcheck(torch.ops.byol_kernels.max_pool2d_3x3_bwd.default, (y, place, 6, 7))
    compiled = torch.compile(max_pool2d_3x3, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled, x), gradients(torchs, x), strict=True))


@not_interpreted
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(max_pool2d_3x3(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once"):
        dx.sum().backward()  # type: ignore[no-untyped-call]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dimensions": (
        lambda: max_pool2d_3x3(torch.zeros(3, 8, 8)),
        r"x must be images \[B, C, H, W\].*got shape \(3, 8, 8\)",
    ),
    "no_pixels": (lambda: max_pool2d_3x3(torch.zeros(2, 3, 0, 8)), "at least one channel and one pixel"),
    "dtype": (lambda: max_pool2d_3x3(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), r"got torch\.uint8; convert"),
}


@not_interpreted
@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
