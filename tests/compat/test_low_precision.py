"""Averages in bfloat16 and float16: kept in float32, by the rule of the library that is replaced, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from byol_fast.compat import guide, lightly, timm
from byol_fast.compat import torch as swa
from byol_fast.models import BYOL
from tests.compat.helpers import build_network, small_guide
from tests.networks import SmallResidualNetwork

low_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def move_(network: nn.Module, step: float) -> None:
    """Add random numbers to the parameters."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape), alpha=step)


def parameters(network: nn.Module) -> list[Tensor]:
    return [p.detach() for p in network.parameters()]


def saved_and_loaded(model: guide.BYOL, how: str, folder: Path) -> guide.BYOL:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        torch.save(model, folder / "model.pt")
        loaded: guide.BYOL = torch.load(folder / "model.pt", weights_only=False)
        return loaded
    if how == "memory_format":
        return model.to(memory_format=torch.channels_last)
    torch.save(model.state_dict(), folder / "state.pt")
    other = small_guide().to(next(model.parameters()).dtype)
    other.load_state_dict(torch.load(folder / "state.pt"))
    return other


@low_dtypes
def test_guide_moves_a_low_precision_target_like_float64(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever is done with the model between two updates, the target is what the float64 average rounds to."""
    model = small_guide().to(dtype)
    start = [p.clone() for p in parameters(model.target_encoder)]
    move_(model.online_encoder, 1e-3)
    online = [o.double() for o in parameters(model.online_encoder)]
    expected = [o + 0.996**1000 * (s.double() - o) for s, o in zip(start, online, strict=True)]
    for how in ("deepcopy", "pickle", "memory_format", "state_dict", "nothing"):
        for _ in range(200):
            model.update_target_network()
        if how != "nothing":
            model = saved_and_loaded(model, how, tmp_path)
    target, rounded = parameters(model.target_encoder), [e.to(dtype) for e in expected]
    values = [torch.cat([x.flatten() for x in tensors]) for tensors in (target, rounded, start)]
    changed, expected_changed = (float((x != values[2]).double().mean()) for x in values[:2])
    assert expected_changed > 0.1
    assert changed == pytest.approx(expected_changed, abs=1e-4)
    assert float((values[0] == values[1]).double().mean()) > 0.9999

    model.float().update_target_network()
    for t, e, o in zip(parameters(model.target_encoder), expected, online, strict=True):
        torch.testing.assert_close(t.double(), e + (1 - 0.996) * (o - e), rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == small_guide().state_dict().keys()


def test_guide_takes_over_changed_targets() -> None:
    """Values that were loaded or set by hand count, not the average of those before."""
    model = small_guide().bfloat16()
    without_average = copy.deepcopy(model.state_dict())
    move_(model.online_encoder, 0.1)
    for _ in range(3):
        model.update_target_network()
    move_(model, 0.1)
    assert len(model.state_dict()) > len(without_average)
    changed = model.target_encoder.projector[0].weight  # type: ignore[union-attr, index]
    for change in ("load", "set"):
        if change == "load":
            model.load_state_dict(without_average)
        else:
            with torch.no_grad():
                changed[0] = 3.0
        start = [p.double() for p in parameters(model.target_encoder)]
        model.update_target_network()
        for t, s, o in zip(parameters(model.target_encoder), start, parameters(model.online_encoder), strict=True):
            # The average that goes on is within half a unit of what the parameter was.
            expected = s + (1 - 0.996) * (o.double() - s)
            torch.testing.assert_close(t.double(), expected, rtol=2**-7, atol=1e-8)


def test_guide_keeps_full_precision_parts_of_a_target() -> None:
    model = small_guide()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.bfloat16()
    move_(model.online_encoder, 0.1)
    start = [p.clone() for p in parameters(model.target_encoder)]
    model.update_target_network()
    for t, s, o in zip(parameters(model.target_encoder), start, parameters(model.online_encoder), strict=True):
        assert t.dtype == s.dtype
        expected = torch.lerp(s.double(), o.double(), 1 - 0.996)
        torch.testing.assert_close(t.double(), expected, rtol=2**-8 if t.dtype == torch.bfloat16 else 1e-6, atol=1e-8)


@low_dtypes
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_equals_torch_bitwise(dtype: torch.dtype, use_buffers: bool) -> None:
    model = build_network(dtype)
    mine = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    torchs: Any = swa_utils.get_ema_multi_avg_fn
    other = swa_utils.AveragedModel(model, multi_avg_fn=torchs(0.9), use_buffers=use_buffers)
    for _ in range(3):
        move_(model, 0.1)
        mine.update_parameters(model)
        other.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True))


@low_dtypes
def test_update_momentum_equals_lightly_bitwise(dtype: torch.dtype) -> None:
    """Formula of lightly 1.6 (`models/utils.py`): multiply all, then add all."""
    model, average = build_network(dtype), build_network(dtype, seed=1)
    average[0].float()  # type: ignore[index]
    model[0].float()  # type: ignore[index]
    expected = [p.clone() for p in parameters(average)]
    torch._foreach_mul_(expected, 0.9)
    torch._foreach_add_(expected, parameters(model), alpha=1.0 - 0.9)
    lightly.update_momentum(model, average, 0.9)
    for a, e in zip(parameters(average), expected, strict=True):
        assert torch.equal(a, e) if e.dtype == dtype else torch.allclose(a, e, rtol=1e-6)
    with pytest.raises(ValueError, match="tau must be from 0 to 1, got 1.5"):
        lightly.update_momentum(model.to(dtype), average.to(dtype), 1.5)


def test_model_ema_v3_rounds_bfloat16_at_random() -> None:
    """The mean of many weights moves as that of float64; without random rounding none moves."""
    model = nn.Linear(100, 100).bfloat16()
    nn.init.ones_(model.weight)
    averages = [timm.ModelEmaV3(model, decay=0.999, stochastic_rounding=at_random) for at_random in (True, False)]
    with torch.no_grad():
        model.weight.fill_(1.5)
    state = torch.random.get_rng_state()
    for _ in range(50):
        for average in averages:
            average.update(model)
    averages = copy.deepcopy(averages)
    for _ in range(50):
        for average in averages:
            average.update(model)
    assert torch.equal(state, torch.random.get_rng_state())
    moved, still = (parameters(average.module)[0].double() for average in averages)
    # The bfloat16 numbers here are 2^-7 apart: a weight is off by less than that, their mean by a hundredth of it.
    assert float(moved.mean()) == pytest.approx(1.5 - 0.5 * 0.999**100, abs=3 * 2**-7 / 100)
    assert bool((still == 1.0).all())


V3: list[dict[str, Any]] = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "exclude_buffers": True, "stochastic_rounding_seed": 3},
    {"dtype": torch.bfloat16, "foreach": False},
    {"dtype": torch.bfloat16, "stochastic_rounding": False},
    {"dtype": torch.float16},
    {"dtype": torch.float16, "foreach": False},
]


@pytest.mark.peers
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", V3, ids=str)
def test_model_ema_v3_equals_timm_bitwise(options: dict[str, Any], model_dtype: torch.dtype) -> None:
    original = pytest.importorskip("timm.utils.model_ema", reason="pip install '.[peers]'")
    model = build_network(model_dtype)
    mine, other = (kind(model, decay=0.99, **options) for kind in (timm.ModelEmaV3, original.ModelEmaV3))
    for _ in range(4):
        move_(model, 0.1)
        mine.update(model)
        other.update(model)
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True))


@low_dtypes
def test_update_target_refuses_a_low_precision_target(dtype: torch.dtype) -> None:
    model = BYOL(SmallResidualNetwork(), hidden_dim=16, projection_dim=8, image_size=16).to(dtype)
    before = [p.clone() for p in parameters(model.target)]
    move_(model.online, 0.1)
    with pytest.raises(ValueError, match=rf"target\[0\] must be float32 or float64, got {dtype}, .* copies="):
        model.update_target(0.5)
    assert all(torch.equal(p, b) for p, b in zip(parameters(model.target), before, strict=True))
    model.target.float()
    model.update_target(0.5)
    for t, b, o in zip(parameters(model.target), before, parameters(model.online), strict=False):
        torch.testing.assert_close(t, (b.float() + o.float()) / 2)
