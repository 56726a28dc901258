"""Stacked views against one pass for each view by torch's own batch norms."""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from byol_fast.models.split_batchnorm import (
    convert_split_batchnorm,
    convert_sync_batchnorm,
    index_layers,
    revert_split_batchnorm,
)
from byol_fast.models.split_batchnorm_layers import BatchStats, num_splits
from byol_fast.training.running_stats import RunningStats

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


# ------------------------------------------------------------------------------------------------ what cannot be


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


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.5), nn.ReLU())


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


# ------------------------------------------------------------------------------------------------ several processes

SHARES = ([3, 3], [2, 4])  # images of a view on each of two processes


def network_and_images(kind: str) -> tuple[nn.Module, Tensor]:
    network = made(Residual)
    if kind == "SyncBatchNorm":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    return network.to(memory_format=torch.channels_last), torch.randn(2, 6, 3, 9, 7, dtype=torch.float64)


def on_one_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results: dict[str, dict[str, Tensor]] = {}
    for kind in ("BatchNorm", "SyncBatchNorm"):
        for shares in SHARES:
            network, images = network_and_images(kind)
            assert convert_split_batchnorm(network) is None
            if kind == "BatchNorm":
                convert_sync_batchnorm(network)
            x = torch.split(images, shares, dim=1)[rank].flatten(0, 1).clone().requires_grad_()
            y = at_once(network, x, 2)
            y.square().sum().backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            found = {"y": y.detach(), "dx": x.grad} | dict(network.named_buffers())
            for name, p in network.named_parameters():
                assert p.grad is not None
                distributed.all_reduce(p.grad)
                found[f"d {name}"] = p.grad
            results[f"{kind} {shares}"] = found
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(on_one_of_two, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    network, images = network_and_images("BatchNorm")
    x = images.flatten(0, 1).requires_grad_()
    y = separately(network, x, 2)
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert len(results[0]) == 4
    for case in results[0]:
        shares = [3, 3] if "[3, 3]" in case else [2, 4]
        for name, whole in (("y", y.detach()), ("dx", x.grad)):
            for rank, part in enumerate(torch.split(whole.view(2, 6, *whole.shape[1:]), shares, dim=1)):
                torch.testing.assert_close(results[rank][case][name], part.flatten(0, 1), **CLOSE)
        for name, p in network.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(results[0][case][f"d {name}"], p.grad, **CLOSE)
        for name, buffer in network.named_buffers():
            for rank in range(2):
                torch.testing.assert_close(results[rank][case][name], buffer, **CLOSE)


def test_layers_with_a_forward_of_their_own_cannot_be_synchronized() -> None:
    network = with_norm(OwnForward(4))
    with pytest.raises(ValueError, match=r"1 must be a batch norm of torch\.nn or timm, got OwnForward"):
        convert_sync_batchnorm(network)


def test_synchronized_alone_is_plain() -> None:
    network = made(Residual)
    alone = copy.deepcopy(network)
    convert_sync_batchnorm(alone)
    x = torch.randn(6, 3, 9, 7, dtype=torch.float64)
    equal(everything(alone, x, lambda n, x: n(x)), everything(network, x, lambda n, x: n(x)))


def test_synchronized_and_compiled_without_breaks(tmp_path: Path) -> None:
    network = made(Residual).to(memory_format=torch.channels_last)
    stacked = copy.deepcopy(network)
    convert_split_batchnorm(stacked)
    convert_sync_batchnorm(stacked)
    torch._dynamo.reset()
    compiled: Any = torch.compile(at_once, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(8, 3, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        found = everything(stacked, x, lambda n, x: compiled(n, x, 2))
    finally:
        distributed.destroy_process_group()
    equal(found, everything(network, x, lambda n, x: separately(n, x, 2)))


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
