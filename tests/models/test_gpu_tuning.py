"""Layers of a ResNet as a GPU computes them, against torch's and torchvision's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from byol_fast.models import gpu_tuning
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.encoders import build_encoder
from byol_fast.models.gpu_tuning import (
    GatherMaxPool2d,
    NormReluBasicBlock,
    NormReluResNet,
    SpaceToDepthConv2d,
    space_to_depth_conv,
    tune_for_gpu,
)
from byol_fast.models.split_batchnorm import convert_split_batchnorm
from byol_fast.models.split_batchnorm_layers import num_splits
from tests.gpu import DEVICE, REHEARSING


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (16, 16), (10, 32)])
def test_the_convolution_is_torchs_with_its_gradients(height: int, width: int, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, height, width), (5, 3, 7, 7), (5,))
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    x, weight, bias = inputs
    x = x.contiguous(memory_format=layout)
    expected, found = F.conv2d(x, weight, bias, stride=2, padding=3), space_to_depth_conv(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_only_some_layers_of_a_resnet_are_converted_and_nothing_else_of_it_changes() -> None:
    network = resnet18()
    before = copy.deepcopy(network.state_dict())
    assert tune_for_gpu(network) == 3 + 8
    assert type(network) is NormReluResNet
    assert type(network.conv1) is SpaceToDepthConv2d
    assert type(network.maxpool) is GatherMaxPool2d
    assert {type(block) for block in network.layer2} == {NormReluBasicBlock}
    assert tune_for_gpu(network) == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.conv1(images), nn.Conv2d.forward(network.conv1, images))  # a CPU calls torch
    assert torch.equal(network.maxpool(images), nn.MaxPool2d(3, 2, 1)(images))
    others = [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(3, 4, 7, 2, 2),
        nn.Conv2d(4, 4, 7, 2, 3),
        nn.Conv2d(3, 4, 7, 1, 3),
        nn.Conv2d(3, 6, 7, 2, 3, groups=3),
        nn.Conv2d(3, 4, 7, 2, 3, dilation=2),
        nn.Conv2d(3, 4, 7, 2, 3, padding_mode="reflect"),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        with_gelu(BasicBlock(4, 4)),
        with_gelu(Bottleneck(16, 4)),
    ]
    assert tune_for_gpu(nn.ModuleList(others)) == 0


def test_stem_without_relu_stays_and_its_blocks_are_converted() -> None:
    """Both views at once, with blocks that are computed again: features and gradients of each view alone."""
    torch.manual_seed(0)
    network = build_encoder("resnet18_lightly").double()
    tuned = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert tune_for_gpu(tuned) == 8
    assert type(tuned) is ResNet and type(tuned.conv1) is nn.Conv2d
    convert_split_batchnorm(tuned)
    assert checkpoint_blocks(tuned) == 8
    images = torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
    expected = torch.cat([network(view) for view in images])
    gradient = torch.randn_like(expected)
    expected.backward(gradient)  # type: ignore[no-untyped-call]
    with num_splits(tuned, 2):
        found = tuned(images.flatten(0, 1))
        found.backward(gradient)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for p, q in zip(tuned.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)


def with_gelu(block: nn.Module) -> nn.Module:
    """A block with another activation."""
    block.relu = nn.GELU()
    return block


def small_resnet(block: Any, norm: Any) -> nn.Module:
    """A ResNet of one block in each stage, whose norms have weights of both signs and two dead channels."""
    torch.manual_seed(0)
    network: Any = ResNet(block, [1, 1, 1, 1], num_classes=5, norm_layer=norm).double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.normal_()
                module.bias.normal_()
                module.weight[:2], module.bias[:2] = 0.0, torch.tensor([0.5, -0.5])
        network.conv1.weight[3], network.bn1.bias[3] = 0.0, 0.0  # its output, and that of the norm, is 0 everywhere
    resnet: nn.Module = network.to(memory_format=torch.channels_last)
    return resnet


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    ("norm", "compiled"),
    [(nn.BatchNorm2d, False), (nn.BatchNorm2d, True), (functools.partial(nn.GroupNorm, 2), True)],
    ids=["eager", "compiled", "group norm"],
)
def test_blocks_whose_norms_apply_the_relu_are_torchvisions_with_their_gradients(
    block: Any, norm: Any, compiled: bool
) -> None:
    network = small_resnet(block, norm)
    tuned = copy.deepcopy(network)
    tune_for_gpu(tuned)
    convert_split_batchnorm(tuned)
    torch._dynamo.reset()
    forward = torch.compile(tuned, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else tuned
    images = torch.randn(2, 3, 3, 64, 64, dtype=torch.float64)
    expected = torch.cat([network(view) for view in images])
    with num_splits(tuned, 2):
        found = forward(images.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)  # type: ignore[no-untyped-call]
    found.backward(gradient)
    size = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    for (name, a), b in zip(network.named_parameters(), tuned.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        # Sums in another order, tens of layers deep; ReLU's gradient at 0 is 0 in both.
        assert (a.grad - b.grad).norm() <= 1e-11 * size, name
    for (name, buffer), other in zip(network.named_buffers(), tuned.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, rtol=0, atol=1e-10, msg=name)
    # Changed later: another activation, and a norm whose forward pass is wrapped.
    for changed in (network, tuned):
        changed.get_submodule("layer1.0").relu = nn.GELU()
    norm = tuned.get_submodule("layer2.0.bn1")
    norm.forward = functools.partial(norm.forward)
    torch.testing.assert_close(tuned.eval()(images[0]), network.eval()(images[0]), rtol=0, atol=1e-10)


@pytest.mark.gpu("step")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "bias"), [(64, False), (32, True), (33, True)])
def test_under_autocast_the_convolution_is_within_rounding(
    size: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=bias)
    images = torch.randn(4, 3, size, size)
    exact = conv.double()(images.double()).detach()
    conv = conv.float().to(DEVICE)
    used = []

    def noted(*args: Any) -> Tensor:
        used.append(len(args))
        return space_to_depth_conv(*args)

    monkeypatch.setattr(gpu_tuning, "space_to_depth_conv", noted)
    assert tune_for_gpu(nn.Sequential(conv)) == 1
    with torch.autocast(DEVICE, dtype):
        found = conv(images.to(DEVICE)).detach()
    assert len(used) == (0 if REHEARSING or size % 2 else 1)
    assert found.dtype == dtype
    # Each factor and the sum are rounded to half precision.
    assert float((found.double().cpu() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps
    used.clear()
    conv(images.to(DEVICE))  # in fp32
    assert not used
