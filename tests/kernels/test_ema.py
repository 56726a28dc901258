"""EMA: values against float64, exact ends, layouts, caching of plans, invalid input."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from byol_kernels import ema_update_
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.numerics import TOLERANCES, ema, f64, is_close, randn

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
AVERAGES = [torch.float32, torch.float64]


def small_resnet(seed: int, channels_last: bool, device: str) -> nn.Module:
    """Layers of a ResNet: 7x7, 3x3 and 1x1 convolutions, BatchNorm, a linear layer with a bias."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 40, 1, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    ).to(device)
    return net.to(memory_format=torch.channels_last) if channels_last else net


layouts = st.sampled_from(["contiguous", "transposed", "unaligned", "channels_last"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in a dense layout of another kind."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "channels_last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    return x


@st.composite
def tensor_lists(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """A target list and its online partners: mixed sizes (0 included), ranks, dtypes and layouts."""
    target, online = [], []
    for seed in range(draw(st.integers(1, 6))):
        shape = draw(
            st.one_of(
                st.just(()),
                st.tuples(st.sampled_from([0, 1, 7, 4096, 4097, 9000])),
                st.tuples(st.integers(1, 5), st.integers(1, 70)),
                st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
            )
        )
        target.append(laid_out(randn(shape, 2 * seed, draw(st.sampled_from(AVERAGES))), draw(layouts)))
        online.append(laid_out(randn(shape, 2 * seed + 1, draw(st.sampled_from(FLOATS))), draw(layouts)))
    return target, online


@settings(max_examples=12 if INTERPRETED else 60, deadline=None)
@given(lists=tensor_lists(), tau=st.floats(0, 1), as_tensor=st.booleans())
def test_any_lists_match_float64(lists: tuple[list[Tensor], list[Tensor]], tau: float, as_tensor: bool) -> None:
    target, online = lists
    before = [o.clone() for o in online]
    expected = [ema(t, o, tau) for t, o in zip(target, online, strict=True)]
    # Relative to the terms: they may cancel each other.
    largest = [np.abs(f64(t)) + np.abs(f64(o)) for t, o in zip(target, online, strict=True)]
    ema_update_(target, online, torch.tensor(tau, dtype=torch.float64) if as_tensor else tau)
    for t, e, size in zip(target, expected, largest, strict=True):
        assert (np.abs(f64(t) - e) <= TOLERANCES[t.dtype] * size).all()
    assert all(torch.equal(o, b) for o, b in zip(online, before, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_five_updates_of_a_network_match_float64(channels_last: bool, device: str) -> None:
    online, target = (small_resnet(seed, channels_last, device) for seed in (0, 1))
    buffers = {name: b.clone() for name, b in target.named_buffers()}
    expected = {name: p.detach().double().cpu().numpy() for name, p in target.named_parameters()}
    for step in range(5):
        tau = 0.99 + 0.002 * step
        with torch.no_grad():
            for p in online.parameters():
                p.mul_(1.1)
        for name, p in online.named_parameters():
            expected[name] = tau * expected[name] + (1 - tau) * p.detach().double().cpu().numpy()
        ema_update_(target.parameters(), online.parameters(), tau)
    assert all(is_close(p, expected[name]) for name, p in target.named_parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in target.named_buffers())
    assert all(p.grad_fn is None and p.requires_grad for p in target.parameters())


def test_checkpoint_of_other_layout_is_paired_by_index(device: str) -> None:
    """Loading copies values into the strides there are; the update must not pair elements by another order."""
    saved = small_resnet(1, False, device).state_dict()
    target = small_resnet(2, True, device)
    target.load_state_dict(saved)
    online = small_resnet(0, True, device)
    ema_update_(target.parameters(), online.parameters(), 0.7)
    for (name, t), o in zip(target.named_parameters(), online.parameters(), strict=True):
        assert is_close(t, ema(saved[name], o, 0.7))


def test_partners_of_different_layouts_match_float64(device: str) -> None:
    target, online = small_resnet(1, False, device), small_resnet(0, True, device)
    before = copy.deepcopy(target)
    ema_update_(target.parameters(), online.parameters(), 0.7)
    for t, b, o in zip(target.parameters(), before.parameters(), online.parameters(), strict=True):
        assert is_close(t, ema(b, o, 0.7))
    # Again, with values that changed in place: the copy in the target's layout must not be a stale one.
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    before = copy.deepcopy(target)
    ema_update_(target.parameters(), online.parameters(), 0.7)
    for t, b, o in zip(target.parameters(), before.parameters(), online.parameters(), strict=True):
        assert is_close(t, ema(b, o, 0.7))


def test_expanded_online_tensor_matches_float64(device: str) -> None:
    target, online = randn((4, 6), 0).to(device), randn((1, 6), 1).to(device).expand(4, 6)
    expected = ema(target, online, 0.3)
    ema_update_([target], [online], 0.3)
    assert is_close(target, expected)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tau_zero_and_one_are_exact(as_tensor: bool, device: str) -> None:
    sizes = [5000, 33, 4096]
    target = [randn((n,), n, AVERAGES[i % 2]).to(device) * 1e3 for i, n in enumerate(sizes)]
    online = [randn((n,), n + 1, AVERAGES[i % 2]).to(device) * 1e-3 for i, n in enumerate(sizes)]
    before = [t.clone() for t in target]
    ema_update_(target, online, torch.tensor(1.0, device=device) if as_tensor else 1.0)
    assert all(torch.equal(t, b) for t, b in zip(target, before, strict=True))
    ema_update_(target, online, torch.tensor(0.0, device=device) if as_tensor else 0.0)
    assert all(torch.equal(t, o) for t, o in zip(target, online, strict=True))


def test_tau_tensor_is_read_at_each_call(device: str) -> None:
    target, online = [randn((300,), 0).to(device)], [randn((300,), 1).to(device)]
    tau = torch.tensor(0.5, device=device)
    for value in (0.5, 0.9, 0.25):
        tau.fill_(value)
        expected = ema(target[0], online[0], value)
        ema_update_(target, online, tau)
        assert is_close(target[0], expected)


def test_tau_on_cpu_works_for_any_device(device: str) -> None:
    target, online = [randn((30,), 0).to(device)], [randn((30,), 1).to(device)]
    expected = ema(target[0], online[0], 0.9)
    ema_update_(target, online, torch.tensor(0.9))
    assert is_close(target[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_copies_equal_updated_targets(dtype: torch.dtype, device: str) -> None:
    target = [randn(s, i).to(device) for i, s in enumerate([(5000,), (3, 7), (0,)])]
    online = [randn(tuple(t.shape), 9).to(device) for t in target]
    copies = [torch.empty_like(t, dtype=dtype) for t in target]
    expected = [ema(t, o, 0.9) for t, o in zip(target, online, strict=True)]
    ema_update_(target, online, 0.9, copies=copies)
    assert all(is_close(t, e) for t, e in zip(target[:2], expected, strict=False))
    for c, t in zip(copies, target, strict=True):
        if INTERPRETED and dtype == torch.bfloat16:  # truncated there
            torch.testing.assert_close(c.float(), t, rtol=2.0**-7, atol=0)
        else:
            assert torch.equal(c, t.to(dtype))


def test_iterators_and_empty_lists_are_accepted(device: str) -> None:
    ema_update_([], [], 0.5)
    ema_update_(iter([torch.empty(0, device=device)]), iter([torch.empty(0, device=device)]), 0.5)
    target, online = torch.zeros((), device=device), torch.ones((), device=device)
    ema_update_((t for t in [target]), (o for o in [online]), 0.75)
    assert target.item() == 0.25


def _lists_with_warm_plan(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Lists after two calls, so that a third one may take the fast path of the plan."""
    target = [randn(s, i).to(device) for i, s in enumerate([(6, 5), (40,), (3, 4, 2)])]
    online = [randn(tuple(t.shape), 9 + i).to(device) for i, t in enumerate(target)]
    for _ in range(2):
        ema_update_(target, online, 0.5)
    return target, online


def _shared(target: list[Tensor], online: list[Tensor]) -> None:
    target[1].data = online[1].data


def _shrunk(target: list[Tensor], online: list[Tensor]) -> None:
    online[0].resize_(2, 5)


def _turned(target: list[Tensor], online: list[Tensor]) -> None:
    target[0].t_()


def _overlapping_others(target: list[Tensor], online: list[Tensor]) -> None:
    target[1].data, target[2].data = (whole := randn((60,), 0).to(target[0].device))[:40], whole[36:].view(3, 4, 2)


@pytest.mark.parametrize("change", [_shared, _shrunk, _turned, _overlapping_others])
def test_changed_tensors_are_checked_again(change: Callable[[list[Tensor], list[Tensor]], None], device: str) -> None:
    target, online = _lists_with_warm_plan(device)
    change(target, online)
    before = [t.clone() for t in target]
    with pytest.raises(ValueError, match="must"):
        ema_update_(target, online, 0.5)
    assert all(torch.equal(t, b) for t, b in zip(target, before, strict=True))


def test_tensors_in_new_memory_or_layout_match_float64(device: str) -> None:
    target, online = _lists_with_warm_plan(device)
    for move in (lambda x: x.clone(), lambda x: x.t().contiguous().t() if x.dim() == 2 else x):
        for tensors in (target, online):
            for x in tensors:
                x.data = move(x.data)  # type: ignore[no-untyped-call]
        expected = [ema(t, o, 0.7) for t, o in zip(target, online, strict=True)]
        ema_update_(target, online, 0.7)
        assert all(is_close(t, e) for t, e in zip(target, expected, strict=True))


def test_new_tensors_with_reused_ids_match_float64(device: str) -> None:
    """Python gives the id of a deleted object to the next one, and the allocator its memory."""
    for seed in range(8):
        shape = [(4, 6), (6, 4), (24,), (2, 12)][seed % 4]
        target, online = randn(shape, seed).to(device), randn(shape, seed + 1).to(device)
        for _ in range(3):
            expected = ema(target, online, 0.9)
            ema_update_([target], [online], 0.9)
            assert is_close(target, expected)
        del target, online
        with pytest.raises(ValueError, match="must have the shape"):
            ema_update_([randn((4, 6), 0).to(device)], [randn((6, 4), 1).to(device)], 0.9)


def test_autograd_detects_update_of_saved_tensor(device: str) -> None:
    """A graph that saved the old target must refuse to run backward, as after any in-place operation."""
    target, x = randn((5,), 0).to(device), randn((5,), 1).to(device).requires_grad_()
    y = (x * target).sum()
    ema_update_([target], [randn((5,), 2).to(device)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()  # type: ignore[no-untyped-call]


@not_interpreted
def test_cpu_equals_torch_lerp_bitwise() -> None:
    target, online = [randn((70, 70), 0)], [randn((70, 70), 1)]
    expected = torch.lerp(target[0], online[0], 1 - 0.996)
    ema_update_(target, online, 0.996)
    assert torch.equal(target[0], expected)


@not_interpreted
def test_operator_checks(device: str) -> None:
    target = [randn((4, 5), 0).to(device), randn((3,), 1).to(device)]
    online = [randn((4, 5), 2).to(device).requires_grad_(), randn((3,), 3).to(device).requires_grad_()]
    copies = [torch.zeros_like(t, dtype=torch.bfloat16) for t in target]
    # Its inputs that require grad take part under no_grad only, so there is no autograd to check.
    tests = ("test_schema", "test_faketensor")
    for tau_tensor in (None, torch.tensor(0.5, device=device)):
        args = (target, online, tau_tensor, 0.5, copies)
        torch.library.opcheck(torch.ops.byol_kernels.ema_update_, args, test_utils=tests)
    online = [o.detach() for o in online]
    torch.library.opcheck(torch.ops.byol_kernels.ema_update_, (target, online, None, 0.5, copies))


@not_interpreted
def test_compiles_once_for_all_taus(device: str) -> None:
    target, online = [randn((64,), 0).to(device)], [randn((64,), 1).to(device)]
    frames: list[int] = []

    def count(module: Any, example_inputs: Any) -> Any:
        frames.append(1)
        return module.forward

    compiled = torch.compile(lambda tau: ema_update_(target, online, tau), fullgraph=True, backend=count)
    for value in (0.9, 0.95, 0.99):
        expected = ema(target[0], online[0], value)
        compiled(torch.tensor(value, device=device))
        assert is_close(target[0], expected)
    assert len(frames) == 1


@not_interpreted
def test_compiles_with_inductor(device: str) -> None:
    online, target = (small_resnet(seed, True, device) for seed in (0, 1))
    expected = [ema(t, o, 0.9) for t, o in zip(target.parameters(), online.parameters(), strict=True)]
    update = torch.compile(ema_update_, fullgraph=True)
    update(list(target.parameters()), list(online.parameters()), torch.tensor(0.9, device=device))
    assert all(is_close(t, e) for t, e in zip(target.parameters(), expected, strict=True))


# -------------------------------------------------------------------------------- invalid input


def _three() -> list[Tensor]:
    return [randn((4, 6), seed) for seed in range(3)]


def _overlapping() -> tuple[Tensor, Tensor]:
    whole = randn((30,), 0)
    return whole[:20], whole[10:]


def _one_list() -> tuple[list[Tensor], list[Tensor], float]:
    tensors = _three()
    return tensors, tensors, 0.5


def _overlapping_partners() -> tuple[list[Tensor], list[Tensor], float]:
    a, b = _overlapping()
    return [a], [b], 0.5


def _overlapping_targets() -> tuple[list[Tensor], list[Tensor], float]:
    a, b = _overlapping()
    return [a, b], [randn((20,), 1), randn((20,), 2)], 0.5


INVALID: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "lengths": (lambda: (_three(), _three()[:2], 0.5), "online must have as many tensors as target, 3, got 2"),
    "shapes": (
        lambda: (_three(), [*_three()[:2], randn((6, 4), 0)], 0.5),
        r"online\[2\] must have the shape of target\[2\]",
    ),
    "integers": (lambda: ([torch.ones(3).long()], [torch.ones(3).long()], 0.5), r"target\[0\] must be floating point"),
    "bfloat16": (lambda: ([torch.ones(3).bfloat16()], [torch.ones(3)], 0.5), r"target\[0\] must be float32 .* copies="),
    "float16": (lambda: ([torch.ones(3).half()], [torch.ones(3)], 0.5), r"target\[0\] must be float32 .* copies="),
    "complex": (lambda: ([torch.ones(3)], [torch.ones(3) * 1j], 0.5), r"online\[0\] must be floating point"),
    "same_tensors": (_one_list, r"target\[0\] must not share memory with online\[0\]"),
    "overlapping_partners": (_overlapping_partners, r"target\[0\] must not share memory with online\[0\]"),
    "overlapping_targets": (_overlapping_targets, r"target\[0\] must not share memory with target\[1\]"),
    "gaps": (lambda: ([randn((4, 6), 0)[:, ::2]], [randn((4, 3), 0)], 0.5), r"target\[0\] must be dense"),
    "expanded_target": (
        lambda: ([randn((1, 6), 0).expand(4, 6)], [randn((4, 6), 0)], 0.5),
        r"target\[0\] must be dense",
    ),
    "tau_high": (lambda: (_three(), _three(), 1.5), "tau must be from 0 to 1, got 1.5"),
    "tau_nan": (lambda: (_three(), _three(), float("nan")), "tau must be from 0 to 1"),
    "tau_vector": (lambda: (_three(), _three(), torch.ones(2)), "0-dim"),
    "tau_int": (lambda: (_three(), _three(), torch.tensor(1)), "0-dim floating-point"),
}


@pytest.mark.parametrize(("make_arguments", "message"), INVALID.values(), ids=INVALID)
def test_invalid_lists_raise_before_any_write(make_arguments: Callable[[], tuple[Any, ...]], message: str) -> None:
    target, online, tau = make_arguments()
    before = [t.clone() for t in target]
    with pytest.raises(ValueError, match=message):
        ema_update_(target, online, tau)
    assert all(torch.equal(t, b) for t, b in zip(target, before, strict=True))


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        (lambda t: [torch.empty(4, 6), torch.empty(4, 6)], "copies must have as many tensors"),
        (lambda t: [torch.empty(6, 4).mT], r"copies\[0\] must have the strides of target\[0\]"),
        (lambda t: [t], "must not share memory"),
        (lambda t: [torch.empty(4, 6).int()], r"copies\[0\] must be floating point"),
    ],
)
def test_invalid_copies_raise(copies: Callable[[Tensor], list[Tensor]], message: str) -> None:
    target = randn((4, 6), 0)
    before = target.clone()
    with pytest.raises(ValueError, match=message):
        ema_update_([target], [randn((4, 6), 1)], 0.5, copies=copies(target))
    assert torch.equal(target, before)


def test_tied_online_tensors_are_accepted(device: str) -> None:
    """Only memory that is written must not be shared."""
    target, online = [randn((9,), 0).to(device), randn((9,), 1).to(device)], randn((9,), 2).to(device)
    expected = [ema(t, online, 0.5) for t in target]
    ema_update_(target, [online, online], 0.5)
    assert all(is_close(t, e) for t, e in zip(target, expected, strict=True))
