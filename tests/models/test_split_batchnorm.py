"""Stacked views against one pass for each view by torch's own batch norms."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from byol_fast.models.split_batchnorm import convert_split_batchnorm, convert_sync_batchnorm, revert_split_batchnorm
from byol_fast.models.split_batchnorm_layers import BatchStats, num_splits
from byol_fast.training.running_stats import RunningStats
from tests.models.helpers import CLOSE, Residual, at_once, equal, everything, made, separately


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-3},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_stacked_equals_separate(options: dict[str, Any], layout: torch.memory_format, views: int) -> None:
    network = made(lambda: Residual(**options)).to(memory_format=layout)
    stacked = copy.deepcopy(network)
    assert convert_split_batchnorm(stacked) is None
    x = torch.randn(views * 4, 3, 9, 7, dtype=torch.float64).contiguous(memory_format=layout)
    expected = everything(network, x, lambda n, x: separately(n, x, views))
    equal(everything(stacked, x, lambda n, x: at_once(n, x, views)), expected)
    if options.get("track_running_stats", True):
        assert expected["bn1.num_batches_tracked"] == 2 * views


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 4, 3), (6, 5, 2, 3, 4), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),  # autocast
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_one_layer_is_bit_for_bit_torchs(shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> None:
    plain = one_layer(shape).to(weights)
    stacked = copy.deepcopy(plain)
    convert_split_batchnorm(stacked)
    x, dy = (t.to(dtype) for t in torch.randn(2, *shape, dtype=torch.float64))
    if len(shape) == 4:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = separately(plain, a, 2), at_once(stacked, b, 2)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    (expected_dx,), (found_dx,) = torch.autograd.grad(expected, a, dy), torch.autograd.grad(found, b, dy)
    assert torch.equal(found_dx, expected_dx)
    for one, other in zip(stacked.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("views", [1, 2])
def test_a_layer_without_weights_keeps_its_statistics_in_float32(views: int) -> None:
    """SimSiam's last norm: nothing but the running statistics says that those of a bf16 batch are more than bf16."""
    plain = nn.BatchNorm1d(5, affine=False)
    stacked, recomputed = copy.deepcopy(plain), nn.Sequential(copy.deepcopy(plain))
    statistics = RunningStats([stacked])
    convert_split_batchnorm(recomputed)
    x = (3 * torch.randn(32, 5) + 10).bfloat16()
    expected = separately(plain, x, views)
    collected: list[BatchStats] = []
    with num_splits(stacked, views, collected):
        assert torch.equal(stacked(x), expected)
    statistics.update(collected, torch.zeros(()))
    with num_splits(recomputed, views):
        y = checkpoint(recomputed, x.requires_grad_(), use_reentrant=False)
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    for layer in (stacked, recomputed[0]):
        torch.testing.assert_close(list(layer.buffers()), list(plain.buffers()))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 4, 3), (6, 5, 2, 3, 4)], ids=str)
def test_any_memory_layout(shape: tuple[int, ...]) -> None:
    plain = one_layer(shape).double()
    stacked = copy.deepcopy(plain)
    convert_split_batchnorm(stacked)
    x = torch.randn(*shape[:-1], 3 * shape[-1], dtype=torch.float64)[..., ::3]  # with gaps
    a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
    expected, found = separately(plain, a, 2), at_once(stacked, b, 2)
    torch.testing.assert_close(found, expected, **CLOSE)
    dy = torch.randn(shape[1:], dtype=torch.float64).expand(shape)  # strides of 0
    (expected_dx,), (found_dx,) = torch.autograd.grad(expected, a, dy), torch.autograd.grad(found, b, dy)
    torch.testing.assert_close(found_dx, expected_dx, **CLOSE)


def one_layer(shape: tuple[int, ...]) -> nn.Module:
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(shape[1])
    torch.manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, shape[1]))
        layer.bias.copy_(torch.linspace(-1, 1, shape[1]))
    return cast("nn.Module", layer)


def test_autocast_is_that_of_torch() -> None:
    network = made(Residual).float().to(memory_format=torch.channels_last)
    stacked = copy.deepcopy(network)
    convert_split_batchnorm(stacked)
    x = torch.randn(8, 3, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = separately(network, x, 2), at_once(stacked, x, 2)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # convolutions round to 2^-8, batch by batch
    assert stacked.get_buffer("bn1.running_var").dtype == torch.float32


def test_outside_and_in_eval_it_is_plain_batch_norm() -> None:
    network = made(Residual)
    stacked = copy.deepcopy(network)
    convert_split_batchnorm(stacked)
    x = torch.randn(5, 3, 9, 7, dtype=torch.float64)
    equal(everything(stacked, x, lambda n, x: n(x)), everything(network, x, lambda n, x: n(x)))
    network.eval()
    stacked.eval()
    with num_splits(stacked, 2):  # five images are no two views, but nobody looks at them together
        assert torch.equal(stacked(x), network(x))


def test_a_frozen_norm_stays_frozen() -> None:
    network = made(Residual)
    stacked = copy.deepcopy(network)
    convert_split_batchnorm(stacked)
    for n in (network, stacked):
        n.get_submodule("bn2").eval()
    x = torch.randn(8, 3, 9, 7, dtype=torch.float64)
    equal(
        everything(stacked, x, lambda n, x: at_once(n, x, 2)), everything(network, x, lambda n, x: separately(n, x, 2))
    )


def test_nothing_but_the_class_changes() -> None:
    network = made(Residual)
    before, modules = {k: v.clone() for k, v in network.state_dict().items()}, dict(network.named_modules())
    parameters = list(network.parameters())
    assert convert_split_batchnorm(network) is None
    assert convert_split_batchnorm(network) is None  # again
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(m is modules[name] for name, m in network.named_modules())
    assert isinstance(network.get_submodule("bn1"), nn.BatchNorm2d)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    fresh = Residual().double()
    fresh.load_state_dict(after)


def test_views_are_stacked_within_only_and_for_this_network_only() -> None:
    network = made(Residual)
    convert_split_batchnorm(network)
    other = copy.deepcopy(network)

    def views(network: nn.Module) -> int:
        return cast("Any", network.get_submodule("bn1")).num_views  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="stop"), num_splits(network, 2):
        assert (views(network), views(other)) == (2, 1)
        with num_splits(network, 3):
            assert views(network) == 3
        assert views(network) == 2
        raise RuntimeError("stop")
    assert views(network) == 1


def test_errors_say_what_to_do() -> None:
    network = made(Residual)
    convert_split_batchnorm(network)
    x = torch.randn(5, 3, 9, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be 2 views of equal size, got 5 images"), num_splits(network, 2):
        network(x)
    with pytest.raises(ValueError, match="more than one value a channel"), num_splits(network, 2):
        network.get_submodule("norm")(torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="views must be 1 or more, got 0"), num_splits(network, 0):
        pass
    pair = x[:4].clone().requires_grad_()
    (dx,) = torch.autograd.grad(at_once(network, pair, 2).square().sum(), pair, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()  # type: ignore[no-untyped-call]


def test_reverted_network_is_the_original_again() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6))
    x = torch.randn(6, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    network(x)
    original = copy.deepcopy(network)
    attributes = [set(vars(module)) for module in network.modules()]
    assert convert_split_batchnorm(network) is None
    convert_sync_batchnorm(network)
    revert_split_batchnorm(network)
    assert [type(m) for m in network.modules()] == [type(m) for m in original.modules()]
    assert [set(vars(module)) for module in network.modules()] == attributes
    assert torch.equal(network(x), original(x))
    for ours, expected in zip(network.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(ours, expected)
