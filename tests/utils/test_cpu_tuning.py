"""CPU performance: small-map convolutions and reuse of freed memory."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.utils.cpu_tuning import SmallMapConv2d, keep_freed_memory, use_small_map_convolutions

NHWC = torch.channels_last
# Height, width; kernel; stride; padding.
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "3x3 on 2x2": ((2, 2), (3, 3), (1, 1), (1, 1)),
    "3x3 on 1x1": ((1, 1), (3, 3), (1, 1), (1, 1)),
    "3x3 on 3x3, weight gradient only": ((3, 3), (3, 3), (1, 1), (1, 1)),
    "3x3 on 4x4, by torch": ((4, 4), (3, 3), (1, 1), (1, 1)),
    "stride 2": ((4, 4), (3, 3), (2, 2), (1, 1)),
    "stride 2, odd": ((3, 3), (3, 3), (2, 2), (1, 1)),
    "1x1, stride 2": ((4, 4), (1, 1), (2, 2), (0, 0)),
    "1x1": ((2, 2), (1, 1), (1, 1), (0, 0)),
    "no padding": ((4, 4), (3, 3), (1, 1), (0, 0)),
    "7x7, stride 2": ((3, 4), (7, 7), (2, 2), (3, 3)),
    "5x3 on 4x1, uneven": ((4, 1), (5, 3), (3, 1), (2, 1)),
    "stride larger than the kernel": ((5, 4), (2, 1), (3, 2), (1, 0)),
    "a position in the padding only": ((2, 2), (1, 1), (1, 2), (0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_small_map_convolution_equals_torch(name: str) -> None:
    size, kernel, stride, padding = CASES[name]
    conv = nn.Conv2d(5, 7, kernel, stride=stride, padding=padding, bias=False).double().to(memory_format=NHWC)
    small = copy.deepcopy(conv)
    assert use_small_map_convolutions(small) == 1
    x = torch.randn(3, 5, *size, dtype=torch.float64).contiguous(memory_format=NHWC)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = conv(a), small(b)
    is_small = expected.shape[2] * expected.shape[3] <= 9
    assert ("SmallMapConv" in type(actual.grad_fn).__name__) == is_small
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(expected)
    for y in (expected, actual):
        y.backward(dy)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.weight.grad, conv.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_error_is_at_most_twice_that_of_torch(size: int, weights: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 32, 3, padding=1, bias=False).to(weights).to(memory_format=NHWC)
    small = copy.deepcopy(conv)
    use_small_map_convolutions(small)
    x = torch.randn(16, 64, size, size).bfloat16().float().contiguous(memory_format=NHWC)
    dy = torch.randn(16, 32, size, size).bfloat16().contiguous(memory_format=NHWC)
    truth = output_and_gradients(F.conv2d, x.double(), conv.weight.detach().bfloat16().double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [output_and_gradients(lambda x, w, padding, c=c: c(x), x, c.weight, dy) for c in (conv, small)]
    for true, by_torch, ours in zip(truth, *outputs, strict=True):
        assert ours.dtype == by_torch.dtype
        error, allowed = ((t.double() - true).norm() for t in (ours, by_torch))
        assert error <= 2 * allowed + 1e-12


def output_and_gradients(conv: Any, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and the gradients of input and weight."""
    x, weight = x.detach().requires_grad_(), weight if weight.requires_grad else weight.requires_grad_()
    y = conv(x, weight, padding=1)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], dy.to(y.dtype))]


def test_converted_resnet_equals_the_original() -> None:
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.resnet18(num_classes=4).double().to(memory_format=NHWC)
    small = copy.deepcopy(network)
    assert use_small_map_convolutions(small) == 20
    assert use_small_map_convolutions(small) == 0
    assert list(small.state_dict()) == list(network.state_dict())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=NHWC)
    expected, actual = network(x), small(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for y in (expected, actual):
        y.square().sum().backward()
    for a, b in zip(small.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)
        assert a.grad is not None
        assert a.grad.stride() == a.stride()  # otherwise autograd copies it


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, bias=False, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, bias=False, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.ConvTranspose2d(4, 4, 3, bias=False),
    ],
    ids=str,
)
def test_unsupported_convolutions_are_not_converted(conv: nn.Module) -> None:
    assert use_small_map_convolutions(conv) == 0


def test_unsupported_inputs_use_torch() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    use_small_map_convolutions(conv)
    assert isinstance(conv, SmallMapConv2d)
    x = torch.randn(2, 4, 2, 2)
    assert "SmallMapConv" not in str(conv(x).grad_fn)  # NCHW
    conv = conv.to(memory_format=NHWC)
    x = x.contiguous(memory_format=NHWC)
    assert "SmallMapConv" in str(conv(x).grad_fn)
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    with pytest.raises(RuntimeError, match="dtype|type"):
        conv(x.double())
    compiled: Any = torch.compile(conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x))


def test_freed_memory_is_reused_without_page_faults() -> None:
    """After some 64 MB blocks the heap has a free block that fits the next one: no page is mapped anew."""
    program = """
import resource
from byol_fast.utils.cpu_tuning import keep_freed_memory
import torch
torch.set_num_threads(1)
supported = keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**24)
before = faults()
torch.ones(2**24)
print(supported, faults() - before)
"""
    supported, faults = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    if supported == "False":
        pytest.skip("the C library has no mallopt")
    assert int(faults) < 2**26 / resource.getpagesize() / 10


def test_keep_freed_memory_can_be_called_twice() -> None:
    assert keep_freed_memory() == keep_freed_memory()
