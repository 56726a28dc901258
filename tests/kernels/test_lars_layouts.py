"""LARS with parameters of any layout and dtype, and from checkpoints of another layout."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from byol_kernels import LARS
from byol_kernels.layout import same_layout
from tests.kernels.conftest import INTERPRETED
from tests.kernels.numerics import Array, f64, is_close, randn
from tests.kernels.test_ema import laid_out, small_resnet
from tests.kernels.test_lars import HYPER, Expected, set_gradients
from tests.oracle import lars_update


@st.composite
def parameter_lists(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params, grads, targets = [], [], []
    layout = st.sampled_from(["contiguous", "transposed", "channels_last", "unaligned"])
    for seed in range(draw(st.integers(1, 5))):
        shape = draw(
            st.one_of(
                st.tuples(st.sampled_from([0, 1, 130])),
                st.tuples(st.integers(1, 90), st.integers(1, 90)),
                st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
            )
        )
        like = draw(layout)
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        params.append(laid_out(randn(shape, 3 * seed, dtype), like))
        grads.append(laid_out(randn(shape, 3 * seed + 1, dtype), draw(layout)))
        targets.append(laid_out(randn(shape, 3 * seed + 2), like))
    return params, grads, targets


@settings(max_examples=10 if INTERPRETED else 50, deadline=None)
@given(lists=parameter_lists(), weight_decay=st.sampled_from([0.0, 1e-3, 0.5]))
def test_any_lists_match_float64(lists: tuple[list[Tensor], list[Tensor], list[Tensor]], weight_decay: float) -> None:
    values, grads, targets = lists
    params = [nn.Parameter(v) for v in values]
    # Momentum and target have the layout of the parameter; the gradient's is its own.
    targets = [torch.empty_like(p.detach(), dtype=t.dtype).copy_(t) for p, t in zip(params, targets, strict=True)]
    expected = Expected(params, targets)
    optimizer = LARS(params, 0.2, weight_decay=weight_decay)
    for _ in range(2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone(memory_format=torch.preserve_format)
        expected.step([f64(g) for g in grads], 0.9, **{**HYPER, "weight_decay": weight_decay})
        optimizer.step(ema=(targets, 0.9))
    for i, p in enumerate(params):
        if p.numel():
            # The kernel takes norms and scalars in float32 whatever the parameters are.
            dtype = torch.float32 if INTERPRETED else p.dtype
            assert is_close(p, expected.p[i], dtype)
            assert is_close(targets[i], expected.t[i], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_computed_in_float32(dtype: torch.dtype, device: str) -> None:
    p = nn.Parameter(randn((300, 50), 0, dtype).to(device))
    p.grad = randn((300, 50), 1, dtype).to(device)
    expected, v = lars_update(f64(p), f64(p.grad), np.zeros((300, 50)), **HYPER)
    optimizer = LARS([p], HYPER["lr"], weight_decay=HYPER["weight_decay"])
    optimizer.step()
    assert p.dtype == dtype and max_ulps(p, expected) <= (1.01 if INTERPRETED else 0.51)
    assert is_close(optimizer.state[p]["momentum_buffer"], v)


def max_ulps(x: Tensor, expected: Array) -> float:
    ulp = torch.finfo(x.dtype).eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(expected), 1e-3)))
    return float(np.max(np.abs(f64(x) - expected) / ulp))


def test_checkpoint_of_other_layout_continues(device: str) -> None:
    """A checkpoint written by a contiguous network continues a channels_last one, momentum included."""
    nets = [small_resnet(0, False, device), small_resnet(0, True, device)]
    optimizers = [LARS(net.parameters(), 0.5, weight_decay=0.1) for net in nets]
    set_gradients(list(nets[0].parameters()), 0)
    optimizers[0].step()
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers, strict=True):
        set_gradients(list(net.parameters()), 1)
        optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert a.shape == b.shape and is_close(b, f64(a))
        assert same_layout(optimizers[1].state[b]["momentum_buffer"], b)


def test_state_dict_continues_bitwise(device: str) -> None:
    first = small_resnet(0, False, device)
    optimizer = LARS(first.parameters(), 0.5, weight_decay=0.1)
    assert optimizer.state_dict()["state"] == {}
    set_gradients(list(first.parameters()), 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())

    second = copy.deepcopy(first)
    resumed = LARS(second.parameters(), 9.0)
    resumed.load_state_dict(copy.deepcopy(state))
    for net, opt in ((first, optimizer), (second, resumed)):
        set_gradients(list(net.parameters()), 1)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_gradients_in_new_memory_or_layout_match_float64(device: str) -> None:
    """The table of addresses is cached; a gradient in other memory, or in the same memory the other way, is seen."""
    p = nn.Parameter(randn((6, 6), 0).to(device))
    optimizer = LARS([p], 0.1)
    memory = randn((36,), 1).to(device)
    expected, v = f64(p).copy(), np.zeros((6, 6))
    for grad in (memory.view(6, 6), memory.view(6, 6).t(), memory.view(6, 6), memory.clone().view(6, 6) * 2):
        p.grad = grad
        expected, v = lars_update(expected, f64(grad), v, **{**HYPER, "lr": 0.1, "weight_decay": 0.0})
        optimizer.step()
        assert is_close(p, expected)
