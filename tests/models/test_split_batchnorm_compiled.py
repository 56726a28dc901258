"""Stacked views under torch.compile, with collected statistics and with recomputed activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from byol_fast.models.split_batchnorm import convert_split_batchnorm, index_layers
from byol_fast.models.split_batchnorm_layers import BatchStats, num_splits
from byol_fast.training.running_stats import RunningStats
from tests.models.helpers import Residual, at_once, equal, everything, made, separately


@pytest.mark.parametrize(("options", "views"), [({}, 2), ({"momentum": None}, 3), ({"affine": False}, 2)], ids=str)
def test_compiled_equals_separate_without_breaks(options: dict[str, Any], views: int) -> None:
    network = made(lambda: Residual(**options)).to(memory_format=torch.channels_last)
    stacked = copy.deepcopy(network)
    convert_split_batchnorm(stacked)
    torch._dynamo.reset()
    compiled: Any = torch.compile(at_once, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    x = torch.randn(views * 4, 3, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = everything(network, x, lambda n, x: separately(n, x, views))
    equal(everything(stacked, x, lambda n, x: compiled(n, x, views)), expected)


def far_from_zero() -> Tensor:
    """Channels around 0 and 10,000, and one that is constant."""
    x = torch.randn(16, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    x[:, 1] += 1e4
    x[:, 2] = 0.1
    return x


def one_outlier() -> Tensor:
    """Zeros but for one value in each channel and view, in another place each time; two are centers of the sums."""
    x = torch.zeros(16, 4, 64, 64)
    for channel, quarter in enumerate((1, 2, 3, 0)):
        for view in (x[:8], x[8:]):
            view[2 * quarter, channel, 16 * quarter, 16 * quarter] = 1000.0
    return x


@pytest.mark.parametrize("make", [far_from_zero, one_outlier])
def test_compiled_statistics_are_those_of_float64(make: Callable[[], Tensor]) -> None:
    x = make()
    norm = nn.BatchNorm2d(x.shape[1])
    convert_split_batchnorm(norm)
    index_layers([norm])
    collected: list[BatchStats] = []
    torch._dynamo.reset()
    with num_splits(norm, 2, collected):
        torch.compile(norm, backend="aot_eager", dynamic=False)(x)
    exact = x.double().view(2, 8, *x.shape[1:])
    # Sums of up to 32,768 values in fp32. About zero, squares of 10,000 would leave nothing of a variance of 1; about
    # the outlier, nothing of the variance of the rest.
    torch.testing.assert_close(collected[0].var.double(), exact.var([1, 3, 4]), rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(collected[0].mean.double(), exact.mean([1, 3, 4]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x,
        lambda x: x[:, :1].expand(-1, 6, -1, -1),
        lambda x: x[:, :, ::2, ::2],
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 2:],
    ],
    ids=["dense", "expanded", "with gaps", "sliced channels"],
)
def test_compiled_takes_any_strides_and_a_relu_in_place(prepare: Callable[[Tensor], Tensor], affine: bool) -> None:
    x = torch.randn(6, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    channels = prepare(x).shape[1]
    layers = nn.Sequential(nn.BatchNorm2d(channels, affine=affine), nn.ReLU(inplace=True)).double()
    convert_split_batchnorm(layers)
    found = []
    for function in (layers, torch.compile(layers, backend="aot_eager", dynamic=False)):
        leaf = x.clone().requires_grad_()
        with num_splits(layers, 2):
            y = function(prepare(leaf))
        (gradient,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).sin()).sum(), leaf)
        found.append((y.detach(), gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
def test_collected_statistics_move_the_running_ones_afterwards(compiled: bool, momentum: float | None) -> None:
    """The same outputs and gradients, and in the end the running statistics that torch moves in its forward pass."""
    network = made(partial(Residual, momentum=momentum))
    deferred = copy.deepcopy(network)
    convert_split_batchnorm(deferred)
    statistics = RunningStats([deferred])
    x = torch.randn(8, 3, 9, 7, dtype=torch.float64)
    collected: list[BatchStats] = []

    def run(network: nn.Module, x: Tensor) -> Tensor:
        with num_splits(network, 2, collected):
            y: Tensor = network(x)
        return y

    before = {name: b.clone() for name, b in deferred.named_buffers()}
    found = everything(deferred, x, torch.compile(run, backend="aot_eager") if compiled else run)
    assert all(torch.equal(found[name], b) for name, b in before.items())
    statistics.update(collected, torch.ones((), dtype=torch.float64))
    assert all(torch.equal(found[name], b) for name, b in before.items())
    statistics.update(collected, torch.zeros(()))
    found |= {name: b.clone() for name, b in deferred.named_buffers()}
    equal(found, everything(network, x, lambda n, x: separately(n, x, 2)))


class Checkpointed(nn.Module):
    """A residual block that keeps no activations, as users and timm write it."""

    def __init__(self, block: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return y


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
@pytest.mark.parametrize("collect", [False, True], ids=["in forward", "collected"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("views", [1, 2])
def test_recomputed_activations_have_their_views_and_are_counted_once(
    views: int, reentrant: bool, collect: bool, compiled: bool
) -> None:
    """By somebody else's checkpoint, whose backward pass runs when nobody says how many views there are."""
    network = made(Residual)
    recomputed = copy.deepcopy(network)
    convert_split_batchnorm(recomputed)
    statistics = RunningStats([recomputed])
    wrapped = Checkpointed(recomputed, reentrant=reentrant)
    x = torch.randn(8, 3, 9, 7, dtype=torch.float64)

    def forward(network: nn.Module, x: Tensor) -> tuple[Tensor, list[BatchStats] | None]:
        collected: list[BatchStats] | None = [] if collect else None
        with num_splits(network, views, collected):
            y: Tensor = network(x)
        return y, collected

    called = torch.compile(forward, backend="aot_eager") if compiled else forward

    def run(network: nn.Module, x: Tensor) -> Tensor:
        y, collected = called(network, x)
        if collected is not None:
            assert len(collected) == 3
            statistics.update(collected, torch.zeros(()))
        return y

    found = everything(wrapped, x, run)
    found = {name.replace("block.", ""): value for name, value in found.items()}
    equal(found, everything(network, x, lambda n, x: separately(n, x, views)))
