"""EMA classes of timm and torch, and the published formulas of solo-learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim import swa_utils

from byol_fast.compat import timm
from byol_fast.compat import torch as swa
from byol_fast.optim.schedules import tau_at
from byol_kernels import byol_loss, ema_update_
from tests.compat.helpers import REASON, build_network

V3: list[dict[str, Any]] = [
    {"decay": 0.9},
    {"decay": 0.9, "exclude_buffers": True},
    {"decay": 0.9, "foreach": False},
    {"decay": 0.99, "use_warmup": True, "update_after_step": 1, "min_decay": 0.3},
    {"decay": 0.9, "dtype": torch.float64},
]


@pytest.mark.peers
@pytest.mark.parametrize("options", V3, ids=str)
def test_model_ema_v3_equals_timm(options: dict[str, Any]) -> None:
    original = pytest.importorskip("timm.utils.model_ema", reason=REASON)
    model = build_network()
    mine, other = timm.ModelEmaV3(model, **options), original.ModelEmaV3(model, **options)
    x = torch.randn(8, 3, 8, 8)
    for step in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            model(x)  # moves the statistics
        number = step if options.get("use_warmup") else None
        assert mine.get_decay(number) == other.get_decay(number)
        mine.update(model, number)
        other.update(model, number)
        pairs = list(zip(mine.state_dict().items(), other.state_dict().items(), strict=True))
        for (name, a), (its_name, b) in pairs:
            assert name == its_name
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    wide = x.to(next(mine.parameters()).dtype)
    torch.testing.assert_close(mine(wide), other(wide), rtol=1e-5, atol=1e-6)
    mine.set(model)
    assert all(
        torch.equal(a.float(), b.float()) for a, b in zip(mine.module.parameters(), model.parameters(), strict=True)
    )


def test_model_ema_v3_follows_its_formula() -> None:
    model = build_network()
    average = timm.ModelEmaV3(model, decay=0.75)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model[1].running_mean.add_(4)  # type: ignore[index]
        model[1].num_batches_tracked.add_(3)  # type: ignore[index]
    average.update(model)
    for now, was in zip(average.module.parameters(), start, strict=True):
        torch.testing.assert_close(now.detach(), was + 0.25)
    stored = average.module.state_dict()
    torch.testing.assert_close(stored["1.running_mean"], torch.full((6,), 1.0))
    assert int(stored["1.num_batches_tracked"]) == 3
    assert not average.module.training
    average.update(model, step=0)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), model.parameters(), strict=True))


def test_model_ema_v3_in_float32_follows_a_bfloat16_model() -> None:
    model = build_network(torch.bfloat16)
    average = timm.ModelEmaV3(model, decay=0.999, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = [p.detach().clone() for p in average.module.parameters()]
    average.update(model)
    for was, now in zip(before, average.module.parameters(), strict=True):
        torch.testing.assert_close(now.detach() - was, torch.full_like(was, 1e-3), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", [swa.AveragedModel, swa_utils.AveragedModel], ids=["byol_fast", "torch's"])
@pytest.mark.parametrize("rule", ["ema", "equal weights"])
def test_averaged_model_equals_torch(use_buffers: bool, kind: type[swa_utils.AveragedModel], rule: str) -> None:
    model = build_network()
    torchs: Any = swa_utils.get_ema_multi_avg_fn
    functions: list[Any] = [swa.get_ema_multi_avg_fn(0.9), torchs(0.9)]
    if rule == "equal weights":
        functions = [None, None]
    mine = kind(model, multi_avg_fn=functions[0], use_buffers=use_buffers)
    other = swa_utils.AveragedModel(model, multi_avg_fn=functions[1], use_buffers=use_buffers)
    x = torch.randn(8, 3, 8, 8)
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            model(x)
        mine.update_parameters(model)
        other.update_parameters(model)
    for (name, a), (_, b) in zip(mine.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert int(mine.n_averaged) == 4
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 1.5"):
        swa.get_ema_multi_avg_fn(1.5)


def test_loss_and_ema_equal_formulas_of_solo_learn() -> None:
    """Formulas of solo-learn 1.0.6 (`losses/byol.py`, `utils/momentum.py`), which cannot be installed with this torch.

    Loss: sum over views of 2 - 2 mean(cos(p, z)) with the other view's z. EMA after the step: tau target +
    (1 - tau) online, parameters only; tau from base to final by a cosine over all steps.
    """
    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = torch.randn(4, 9, 32, dtype=torch.float64, generator=generator)
    expected = (2 - 2 * F.cosine_similarity(p1, z2, dim=-1).mean()) + (
        2 - 2 * F.cosine_similarity(p2, z1, dim=-1).mean()
    )
    unit = [F.normalize(x, dim=-1) for x in (p1, p2, z1, z2)]
    long_way = (2 - 2 * (unit[0] * unit[3]).sum(1).mean()) + (2 - 2 * (unit[1] * unit[2]).sum(1).mean())
    loss = byol_loss(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    assert loss.item() == pytest.approx(long_way.item(), abs=1e-13)

    target, online = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    other, base, final, steps = target.clone(), 0.99, 1.0, 40
    for step in range(steps):
        tau = final - (final - base) * (math.cos(math.pi * step / steps) + 1) / 2
        assert tau_at(step, steps, base) == pytest.approx(tau, abs=1e-15)
        other = tau * other + (1 - tau) * online
        ema_update_([target], [online], tau_at(step, steps, base))
    torch.testing.assert_close(target, other, rtol=1e-12, atol=1e-14)
