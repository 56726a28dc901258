"""LARS of lightly: equal results, compared with lightly and with its rule written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_fast.compat import lightly
from tests.compat.helpers import REASON, WITH_LIBRARY, build_network


class LARSFormula:
    """The rule of lightly's documentation, tensor by tensor."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        defaults = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
        self.groups = [{"lr": lr, **defaults, "trust_coefficient": 0.001, "eps": 1e-8, **options, **g} for g in groups]
        self.buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d, decay = p.grad, group["weight_decay"]
                p_norm, g_norm = p.norm(), p.grad.norm()
                if decay != 0 and p_norm > 0 and g_norm > 0:
                    ratio = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
                    d = (d + decay * p) * ratio
                if group["momentum"] != 0:
                    first = p not in self.buffers
                    before = 0 if first else group["momentum"] * self.buffers[p]
                    self.buffers[p] = before + (1 if first else 1 - group["dampening"]) * d
                    d = d + group["momentum"] * self.buffers[p] if group["nesterov"] else self.buffers[p]
                p.sub_(group["lr"] * d)


def lightly_lars(library: bool) -> Any:
    return pytest.importorskip("lightly.utils.lars", reason=REASON).LARS if library else LARSFormula


RULES: list[dict[str, Any]] = [
    {"momentum": 0.9, "weight_decay": 1e-2},
    {"momentum": 0.9},
    {"weight_decay": 1e-2},
    {"momentum": 0.9, "weight_decay": 1e-2, "dampening": 0.3},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.1, "eps": 1.0},
]


def problem(dtype: torch.dtype, channels_last: bool = False) -> list[nn.Parameter]:
    """Parameters of a network, and three more: all zero, with zero gradient, without gradient."""
    net = build_network(dtype)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    extra = [torch.zeros(4), torch.ones(4), torch.ones(3, 3)]
    return [*net.parameters(), *(nn.Parameter(x.to(dtype)) for x in extra)]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(97 * step + i))
        p.grad = (noise if i != len(params) - 2 else 0 * noise).to(p.dtype)
    params[-1].grad = None


@pytest.mark.parametrize("library", WITH_LIBRARY)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_equals_lightly(library: bool, rule: dict[str, Any], dtype: torch.dtype) -> None:
    """Five steps with a changing learning rate, and a group without decay and adaptation.

    Changes of weights agree to 1e-12 in float64 and to 2e-5 in float32, where weights hundreds of times as large round
    by 1e-7 per step.
    """
    mine, other = problem(dtype), problem(dtype)
    start = [p.detach().clone() for p in mine]
    optimizers: list[Any] = []
    for kind, params in ((lightly.LARS, mine), (lightly_lars(library), other)):
        some = [{"params": params[:4]}, {"params": params[4:6], "weight_decay": 0}, {"params": params[6:]}]
        optimizers.append(kind(some, lr=0.5, **rule))
    for step in range(5):
        for optimizer, params in zip(optimizers, (mine, other), strict=True):
            give_gradients(params, step)
            for group in getattr(optimizer, "param_groups", None) or optimizer.groups:
                group["lr"] = 0.5 / (step + 1)
            optimizer.step()
    for i, (a, b, s) in enumerate(zip(mine, other, start, strict=True)):
        moved = (b.detach() - s).double().norm()
        off = float((a.detach() - (b if moved > 0 else s).detach()).double().norm() / (moved if moved > 0 else 1.0))
        assert off < (1e-12 if dtype == torch.float64 else 2e-5), (i, off)
    assert torch.equal(mine[-1], start[-1])


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_foreach_lars_equals_fused_lars(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators over lists of a GPU, on a CPU."""
    fast, lists = problem(torch.float64), problem(torch.float64)
    for params, in_lists in ((fast, False), (lists, True)):
        optimizer = lightly.LARS(params, lr=0.5, **rule)
        if in_lists:
            monkeypatch.setattr(optimizer, "_step_fused", optimizer._step_foreach)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(fast, lists, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_lars_with_other_layouts_and_dtypes() -> None:
    plain, nhwc, low = problem(torch.float32), problem(torch.float32, channels_last=True), problem(torch.bfloat16)
    for params in (plain, nhwc, low):
        optimizer = lightly.LARS(params, lr=0.5, **RULES[0])
        for step in range(3):
            give_gradients(params, step)  # NCHW gradients of NHWC parameters cannot be fused
            optimizer.step()
    for a, b, c in zip(plain, nhwc, low, strict=True):
        torch.testing.assert_close(a, b.detach().contiguous(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c.detach().float(), rtol=2e-2, atol=2e-2)


@pytest.mark.peers
def test_lars_continues_a_checkpoint_of_lightly() -> None:
    original_lars = lightly_lars(True)
    mine, other = problem(torch.float64), problem(torch.float64)
    first, second = original_lars(other, lr=0.5, **RULES[0]), original_lars(mine, lr=0.5, **RULES[0])
    for step in range(2):
        for params, optimizer in ((other, first), (mine, second)):
            give_gradients(params, step)
            optimizer.step()
    drop_in = lightly.LARS(mine, lr=0.1)
    drop_in.load_state_dict(copy.deepcopy(second.state_dict()))
    for params, optimizer in ((other, first), (mine, drop_in)):
        give_gradients(params, 2)
        optimizer.step()
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_lars_calls_its_closure_and_rejects_invalid_options() -> None:
    p = nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        p.grad = None
        loss = (p * p).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert lightly.LARS([p], lr=0.1).step(closure).item() == 3
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
    for lr, momentum, decay in ((-1.0, 0.9, 0.0), (1.0, -0.1, 0.0), (1.0, 0.9, float("nan"))):
        with pytest.raises(ValueError, match="must be 0 or more, got"):
            lightly.LARS([p], lr=lr, momentum=momentum, weight_decay=decay)
    with pytest.raises(ValueError, match="nesterov must be used with momentum"):
        lightly.LARS([p], lr=1.0, nesterov=True)
