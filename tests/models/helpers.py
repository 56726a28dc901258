"""A network with batch norms, passes of stacked and of separate views, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.models.split_batchnorm_layers import num_splits

# Equal in exact arithmetic; roundings of sums in another order, a few layers deep. float64 has 2.2e-16.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


class Residual(nn.Module):
    """Every kind of layer that carries parameters or statistics in a ResNet with a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, **options)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8, **options)
        self.linear = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16, **options)
        self.last = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(x + self.bn2(self.conv2(x)))
        y: Tensor = self.last(F.relu(self.norm(self.linear(x.mean((2, 3))))))
        return y


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in float64 with parameters and statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    network = make().double()
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return network


def separately(network: nn.Module, x: Tensor, views: int) -> Tensor:
    return torch.cat([network(view) for view in x.chunk(views)])


def at_once(network: nn.Module, x: Tensor, views: int) -> Tensor:
    with num_splits(network, views):
        y: Tensor = network(x)
    return y


def everything(network: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of two steps' worth of passes under an uneven upstream gradient."""
    x = x.clone().requires_grad_()
    y = run(network, x)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    y.backward(upstream)  # type: ignore[no-untyped-call]
    again = run(network, x.detach() * 0.5 + 1)
    assert x.grad is not None
    found = {"y": y.detach(), "again": again.detach(), "dx": x.grad}
    found |= {f"d {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in network.named_buffers()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], **CLOSE, msg=partial("{}: {}".format, name))


class OwnForward(nn.BatchNorm2d):
    """As timm's and others': batch norm and activation in one, by the functional form."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return F.gelu(y)


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.5), nn.ReLU())
