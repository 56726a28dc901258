"""Hyperparameters at and beyond the ends of their ranges, and numbers whose squares float32 cannot hold."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byol_kernels import (
    LARS,
    byol_loss,
    ema_update_,
    gaussian_blur,
    normalized_mse_loss,
    photometric,
    sample_view_params,
    update_running_stats_,
)
from byol_kernels.augment_params.params import TABLE_COLUMNS
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.numerics import TOLERANCES, f64, randn, relative_error
from tests.kernels.test_lars_found_inf import same_bits
from tests.oracle import lars_update

NAN, INF = float("nan"), float("inf")
HYPER = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 1e-3}


def is_read_by_the_host(device: str) -> bool:
    """True where a scalar tensor is on the CPU for the operator, too: it then raises."""
    return device == "cpu" and not INTERPRETED


def fused_ema(target: list[Tensor], online: list[Tensor], tau: float | Tensor) -> None:
    """The same by a step of LARS without gradients."""
    LARS([nn.Parameter(o) for o in online], 0.1).step(ema=(target, tau))


UPDATES: dict[str, Callable[[list[Tensor], list[Tensor], Any], None]] = {"ema": ema_update_, "lars": fused_ema}
updates = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


def special_values(seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """More than one chunk of normal numbers, with everything that a product with 0 does not turn into 0."""
    x = randn((5000,), seed, dtype)
    x[:5] = torch.tensor([NAN, INF, -INF, 0.0, -0.0], dtype=dtype)
    return x.roll(3 * seed).to(device)


@updates
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tau_zero_and_one_select(update: Any, as_tensor: bool, dtype: torch.dtype, device: str) -> None:
    target, online = (special_values(seed, dtype, device) for seed in (0, 1))
    before = target.clone()
    update([target], [online], torch.tensor(1.0, device=device) if as_tensor else 1.0)
    assert same_bits([target], [before])
    update([target], [online], torch.tensor(0.0, device=device) if as_tensor else 0.0)
    assert same_bits([target], [online])


@updates
@pytest.mark.parametrize("tau", [-1.0, -1e-6, 1.0 + 1e-6, 2.0, INF, -INF, NAN])
def test_tau_tensor_out_of_range_raises_or_is_clamped(update: Any, tau: float, device: str) -> None:
    """A tau that the host reads raises; one that only the device reads is clamped, and a NaN writes nothing."""
    target, online = randn((5000,), 0).to(device), randn((5000,), 1).to(device)
    before = target.clone()
    with pytest.raises(ValueError, match="tau must be from 0 to 1"):
        update([target], [online], tau)
    if is_read_by_the_host(device):
        with pytest.raises(ValueError, match="tau must be from 0 to 1"):
            update([target], [online], torch.tensor(tau))
        assert torch.equal(target, before)
    else:
        update([target], [online], torch.tensor(tau, device=device))
        assert torch.equal(target, online if tau < 0.0 else before)


@not_interpreted
def test_tau_out_of_range_raises_when_compiled() -> None:
    target, online = [torch.zeros(3)], [torch.ones(3)]
    compiled = torch.compile(lambda tau: ema_update_(target, online, tau), backend="eager")
    for tau in (2.0, torch.tensor(2.0), torch.tensor(NAN)):
        with pytest.raises(ValueError, match="tau must be from 0 to 1"):
            compiled(tau)
    assert torch.equal(target[0], torch.zeros(3))
    torch._dynamo.reset()  # it has given up functions that other tests compile


def two_groups(device: str, lr: Any) -> tuple[LARS, list[Tensor], list[Tensor]]:
    """An optimizer after a step, the targets, and all tensors that a step writes; `lr` is that of the second group."""
    params = [nn.Parameter(randn((70, 80), i).to(device)) for i in range(2)]
    targets = [randn((70, 80), 5 + i).to(device) for i in range(2)]
    optimizer = LARS([{"params": params[:1]}, {"params": params[1:], "lr": lr}], 0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(ema=(targets, 0.5))
    return optimizer, targets, [*params, *targets, *(optimizer.state[p]["momentum_buffer"] for p in params)]


@pytest.mark.parametrize("lr", [NAN, INF, -INF, -0.1])
def test_lr_tensor_out_of_range_raises_or_skips_the_step(lr: float, device: str) -> None:
    """Of one group: the other group is not stepped either."""
    lr_tensor = torch.tensor(0.3, device=device)
    optimizer, targets, written = two_groups(device, lr_tensor)
    before = [x.detach().clone() for x in written]
    lr_tensor.fill_(lr)
    if is_read_by_the_host(device):
        with pytest.raises(ValueError, match=r"LARS.step: lr must be finite and not negative"):
            optimizer.step(ema=(targets, 0.5))
    else:
        optimizer.step(ema=(targets, 0.5))
    assert same_bits(written, before)
    lr_tensor.fill_(0.3)
    optimizer.step(ema=(targets, 0.5))
    assert not any(torch.equal(x, b) for x, b in zip(written, before, strict=True))


def test_tau_of_nan_skips_the_whole_step(device: str) -> None:
    optimizer, targets, written = two_groups(device, 0.3)
    before = [x.detach().clone() for x in written]
    if is_read_by_the_host(device):
        with pytest.raises(ValueError, match="tau must be from 0 to 1"):
            optimizer.step(ema=(targets, torch.tensor(NAN)))
    else:
        optimizer.step(ema=(targets, torch.tensor(NAN, device=device)))
    assert same_bits(written, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", NAN), ("momentum", NAN), ("momentum", 1.0), ("weight_decay", -1e-6), ("trust_coefficient", NAN)],
)
def test_hyperparameters_changed_out_of_range_raise(name: str, value: float, device: str) -> None:
    """As a scheduler or a checkpoint may change them."""
    optimizer, targets, written = two_groups(device, 0.3)
    before = [x.detach().clone() for x in written]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"LARS.step: {name} must be"):
        optimizer.step(ema=(targets, 0.5))
    assert same_bits(written, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_lars_refuses_parameters_without_floating_point(dtype: torch.dtype) -> None:
    wrong = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"params\[1\] must be floating point, got {dtype}"):
        LARS([nn.Parameter(torch.ones(3)), wrong], 0.1)
    optimizer = LARS([nn.Parameter(torch.ones(3))], 0.1)
    with pytest.raises(ValueError, match=r"params\[0\] must be floating point"):
        optimizer.add_param_group({"params": [wrong]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("shape", [(30, 40), (3, 2000)], ids=str)  # a part of a chunk, and more than one
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize(
    ("p_size", "g_size"),
    [(1.0, 1e-30), (1.0, 1e-20), (1.0, 1e20), (1.0, 1e37), (1e-30, 1.0), (1e-30, 1e-30), (1e-20, 1e-37), (1e20, 1e20)],
)
def test_norms_are_right_where_squares_are_not(
    p_size: float, g_size: float, weight_decay: float, shape: tuple[int, int], device: str
) -> None:
    p = nn.Parameter((p_size * randn(shape, 0)).to(device))
    p.grad = (g_size * randn(shape, 1)).to(device)
    hyper = {**HYPER, "weight_decay": weight_decay}
    expected, v = lars_update(f64(p), f64(p.grad), np.zeros(shape), **hyper)
    optimizer = LARS([p], HYPER["lr"], weight_decay=weight_decay)
    optimizer.step()
    assert relative_error(p, expected) <= TOLERANCES[torch.float32]
    # At 1e37 the factor r is near the smallest float32 number, and loses digits itself.
    tolerance = 5e-6 if g_size == 1e37 else TOLERANCES[torch.float32]
    assert np.linalg.norm(f64(optimizer.state[p]["momentum_buffer"]) - v) <= tolerance * np.linalg.norm(v)


def test_norm_counts_elements_of_very_different_sizes(device: str) -> None:
    """A chunk of tiny elements, one whose squares overflow, and one of zeros, in one tensor."""
    g = torch.cat([torch.full((4096,), 1e-30), torch.full((4096,), 1e20), torch.zeros(4096)]).view(3, 4096)
    p = nn.Parameter(randn((3, 4096), 0).to(device))
    p.grad = g.to(device)
    _, v = lars_update(f64(p), f64(g), np.zeros((3, 4096)), **{**HYPER, "weight_decay": 0.0})
    optimizer = LARS([p], HYPER["lr"])
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert relative_error(optimizer.state[p]["momentum_buffer"], v) <= TOLERANCES[torch.float32]
    assert optimizer.found_inf.item() == 0.0


def _table(**values: float) -> Tensor:
    return torch.tensor([values.get(name, 0.5) for name in TABLE_COLUMNS], dtype=torch.float64)


def _running_stats(momentum: float) -> None:
    x = [torch.ones(3)]
    update_running_stats_(x, [torch.ones(3)], [torch.ones(1, 3)], [torch.ones(1, 3)], [torch.tensor(0)], [momentum])


_IMAGES, _ROWS = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 3)
INVALID: dict[str, tuple[Callable[[], Any], str]] = {
    "eps_below_float32": (lambda: normalized_mse_loss(_ROWS, _ROWS, eps=1e-50), "eps must be positive and finite"),
    "eps_above_float32": (lambda: byol_loss(_ROWS, _ROWS, _ROWS, _ROWS, eps=1e300), "eps must be positive and finite"),
    "momentum_negative": (lambda: _running_stats(-0.1), r"momentum\[0\] must be from 0 to 1, got -0.1"),
    "momentum_nan": (lambda: _running_stats(NAN), r"momentum\[0\] must be from 0 to 1, got nan"),
    "blur_kernel_even": (
        lambda: sample_view_params(torch.arange(2), torch.tensor(1), _table(), blur_kernel=4),
        "blur_kernel must be 0 or odd, got 4",
    ),
    "blur_kernel_negative": (
        lambda: sample_view_params(torch.arange(2), torch.tensor(1), _table(), blur_kernel=-3),
        "blur_kernel must be 0 or odd, got -3",
    ),
    "mean_nan": (
        lambda: photometric(_IMAGES, mean=(0.5, NAN, 0.5), std=(1, 1, 1), dtype=torch.float32),
        "mean must be three numbers, all from -1e.06 to 1e.06, got",
    ),
    "std_nan": (
        lambda: photometric(_IMAGES, mean=(0.5, 0.5, 0.5), std=(1, NAN, 1), dtype=torch.float32),
        "std must be three numbers, all from 1e-06 to 1e.06, got",
    ),
}


@pytest.mark.parametrize(("call", "message"), INVALID.values(), ids=INVALID)
def test_options_out_of_range_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@not_interpreted
@pytest.mark.parametrize("sigma", [0.0, -1.0, NAN])
def test_sigma_out_of_range_raises_on_the_cpu(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be positive, got"):
        gaussian_blur(_IMAGES, torch.tensor([sigma]), torch.tensor([3]))
    with pytest.raises(ValueError, match="sigma must be positive, got"):
        photometric(_IMAGES, sigma=torch.tensor([sigma]), kernel_size=torch.tensor([3]))
    # The mask leaves an image out, whatever its sigma is.
    gaussian_blur(_IMAGES, torch.tensor([sigma]), torch.tensor([3]), blur=torch.tensor([False]))


@not_interpreted
@updates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_copy_moves_like_float64(update: Any, dtype: torch.dtype, device: str) -> None:
    """After 1,000 updates the same weights have changed as of a float64 average; in `dtype` alone most would not."""
    target = 0.05 * randn((2000,), 0).to(device)
    online = target + 1e-3 * randn((2000,), 1).to(device)
    start, average = target.to(dtype), f64(target)
    copy = torch.empty_like(target, dtype=dtype)
    optimizer = LARS([nn.Parameter(online)], 0.1)
    for _ in range(1000):
        if update is ema_update_:
            ema_update_([target], [online], 0.996, copies=[copy])
        else:
            optimizer.step(ema=([target], 0.996), copies={target: copy})
        average += (1 - 0.996) * (f64(online) - average)
    expected = torch.from_numpy(average).to(device, dtype)
    changed, expected_changed = (float((x != start).double().mean()) for x in (copy, expected))
    assert expected_changed > 0.5
    assert changed == pytest.approx(expected_changed, abs=2e-3)  # 4 of 2,000 on the edge between two numbers
    assert (copy == expected).double().mean() >= 0.998


@updates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_target_is_refused(update: Any, dtype: torch.dtype, device: str) -> None:
    targets = [torch.zeros(3, device=device), torch.zeros(4, dtype=dtype, device=device)]
    with pytest.raises(ValueError, match=rf"target\[1\] must be float32 or float64, got {dtype}, .* copies="):
        update(targets, [torch.ones(3, device=device), torch.ones(4, device=device)], 0.5)
    assert not any(t.any() for t in targets)
