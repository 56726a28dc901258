"""Networks that take stacked views, and those that cannot."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.models.split_batchnorm import convert_split_batchnorm
from tests.models.helpers import OwnForward, Residual, at_once, equal, everything, made, separately, with_norm


class Inherited(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class Functional(nn.Module):
    """Batch normalization that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class Spectral(nn.Module):
    """Moves its buffers once a call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


FINE: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "subclass": lambda: with_norm(Inherited(4)),
    "own forward": lambda: with_norm(OwnForward(4)),
    "group norm": lambda: with_norm(nn.GroupNorm(2, 4)),
    "instance norm": lambda: with_norm(nn.InstanceNorm2d(4)),
    "layer norm": lambda: with_norm(nn.LayerNorm([4, 7, 5])),
    "several outputs": lambda: Both(with_norm(nn.BatchNorm2d(4))),
}
NOT_FINE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "functional": (lambda: with_norm(Functional()), "mixes images, or is random"),
    "instance norm with statistics": (
        lambda: with_norm(nn.InstanceNorm2d(4, track_running_stats=True)),
        r"1 \(InstanceNorm2d\) updates its running statistics once per call",
    ),
    "spectral norm": (lambda: nn.Sequential(Spectral(), nn.BatchNorm2d(4)), "mixes images|its buffer .*_u differs"),
    "lazy": (lambda: with_norm(nn.LazyBatchNorm2d()), "does not know its channels yet"),
    "fails in float64": (lambda: nn.Sequential(Half(), nn.BatchNorm2d(3)), "could not be tried in float64"),
    "fails without a message": (lambda: nn.Sequential(Float32(), nn.BatchNorm2d(3)), r"float64 \(TypeError\)"),
}


class Both(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.inner(x)
        return {"maps": y, "means": [y.mean((2, 3))]}


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.eye(5))


class Float32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError
        return x


@pytest.mark.parametrize("name", FINE)
def test_networks_that_take_stacked_views(name: str) -> None:
    network = made(FINE[name])
    stacked = copy.deepcopy(network)
    assert convert_split_batchnorm(stacked, torch.zeros(4, 3, 9, 7)) is None
    assert all(torch.equal(a, b) for a, b in zip(stacked.buffers(), network.buffers(), strict=True))
    for n in (network, stacked):
        for dropout in (m for m in n.modules() if isinstance(m, nn.Dropout)):
            dropout.eval()
    x = torch.randn(8, 3, 9, 7, dtype=torch.float64)
    if name == "several outputs":
        network, stacked = network.get_submodule("inner"), stacked.get_submodule("inner")
    equal(
        everything(stacked, x, lambda n, x: at_once(n, x, 2)), everything(network, x, lambda n, x: separately(n, x, 2))
    )


@pytest.mark.parametrize("name", NOT_FINE)
def test_networks_that_do_not_say_why(name: str) -> None:
    make, reason = NOT_FINE[name]
    network = make()
    kinds = [type(m) for m in network.modules()]
    with torch.no_grad():
        found = convert_split_batchnorm(network, torch.zeros(4, 3, 7, 5))
    assert found is not None
    assert re.search(reason, found), found
    assert [type(m) for m in network.modules()] == kinds


@pytest.mark.peers
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_timm_models_take_stacked_views(name: str) -> None:
    timm = pytest.importorskip("timm")
    network = made(lambda: timm.create_model(name, num_classes=0))
    stacked = copy.deepcopy(network)
    size = 224 if "vit" in name else 64
    assert convert_split_batchnorm(stacked, torch.zeros(2, 3, size, size)) is None
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    expected, found = separately(network, x, 2), at_once(stacked, x, 2)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for a, b in zip(stacked.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
