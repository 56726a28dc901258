"""Schedules, LARS and EMA against the oracle."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import byol_kernels
from byol_fast.optim.schedules import RunSchedule, lr_at, tau_at
from tests import oracle
from tests.numbers.helpers import DTYPES, as_array, momentum_buffer, relative_error, rounded, tensor


@pytest.mark.parametrize(("total", "base"), [(1, 0.5), (7, 0.97), (1000, 0.996), (500_400, 0.99), (10, 0.0), (10, 1.0)])
def test_tau(total: int, base: float) -> None:
    for step in sorted({0, 1, total // 3, total // 2, total - 1, total, total + 1, 2 * total}):
        assert tau_at(step, total, base) == pytest.approx(oracle.tau(step, total, base), rel=1e-10, abs=1e-15)
    assert tau_at(0, total, base) == pytest.approx(base, abs=1e-15)
    assert tau_at(total, total, base) == 1.0
    taus = [tau_at(step, total, base) for step in range(0, total + 1, max(1, total // 50))]
    assert taus == sorted(taus)


def test_tau_at_known_points() -> None:
    """By hand: halfway the cosine is 0, at a third it is 1/2, at two thirds -1/2."""
    assert tau_at(50, 100, 0.98) == pytest.approx(0.99, rel=1e-12)
    assert tau_at(1, 3, 0.96) == pytest.approx(1 - 0.04 * 0.75, rel=1e-12)
    assert tau_at(2, 3, 0.96) == pytest.approx(1 - 0.04 * 0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("total", "warmup", "base", "batch"),
    [
        pytest.param(100, 10, 0.45, 4096, id="warm-up"),
        pytest.param(100, 0, 0.3, 64, id="no-warm-up"),
        pytest.param(7, 1, 1.0, 256, id="warm-up-of-one"),
        pytest.param(312_750, 3_127, 0.2, 4096, id="long"),
        pytest.param(5, 4, 0.2, 100, id="almost-all-warm-up"),
    ],
)
def test_lr(total: int, warmup: int, base: float, batch: int) -> None:
    peak = base * batch / 256
    steps = {0, 1, warmup - 1, warmup, warmup + 1, (warmup + total) // 2, total - 1, total, total + 3}
    for step in sorted(steps - {-1}):
        expected = oracle.lr(step, total, warmup, base, batch)
        assert lr_at(step, total, warmup, base, batch) == pytest.approx(expected, rel=1e-10, abs=1e-15 * peak)
    assert lr_at(0, total, warmup, base, batch) == (0.0 if warmup else peak)
    assert lr_at(warmup, total, warmup, base, batch) == peak
    assert lr_at(total, total, warmup, base, batch) == pytest.approx(0.0, abs=1e-15 * peak)
    rates = [lr_at(step, total, warmup, base, batch) for step in range(0, total + 1, max(1, total // 50))]
    assert max(rates) <= peak


def test_lr_at_known_points() -> None:
    """By hand, with a peak of 0.3 * 1024 / 256 = 1.2: a quarter of the warm-up, then a third and half of the rest."""
    assert lr_at(5, 80, 20, 0.3, 1024) == pytest.approx(0.3, rel=1e-12)
    assert lr_at(40, 80, 20, 0.3, 1024) == pytest.approx(0.9, rel=1e-12)
    assert lr_at(50, 80, 20, 0.3, 1024) == pytest.approx(0.6, rel=1e-12)


def peak_sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.24)


def test_lr_by_epoch_equals_torchs_cosine() -> None:
    """Of torch's scheduler, which is stepped after every epoch of 97 batches; tau stays by step."""
    run = RunSchedule(total_steps=200 * 97, base_lr=0.12, batch_size=512, steps_per_epoch=97, tau_base=0.99)
    optimizer = peak_sgd()
    scheduler = CosineAnnealingLR(optimizer, 200)
    for epoch in range(200):
        for step in range(97 * epoch, 97 * epoch + 97):
            assert run.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            assert run.constant_lr(step) == pytest.approx(0.24)
            assert run.tau(step) == pytest.approx(oracle.tau(step, 200 * 97, 0.99), rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("batches", "grad_accum_steps"), [(10, 1), (7, 2), (97, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("warmup", [0, 1, 17])
def test_lr_by_epoch_is_that_of_the_first_step_behind_the_warm_up(
    batches: int, grad_accum_steps: int, warmup: int
) -> None:
    """Batches are dealt out as a loader does it; the rate by step is that of torch's LambdaLR."""
    total, peak = 6 * batches * grad_accum_steps + 18, 0.24
    schedule = {"total_steps": total, "warmup_steps": warmup, "base_lr": peak, "tau_base": 0.99}
    run = RunSchedule(**schedule, steps_per_epoch=Fraction(batches, grad_accum_steps))  # type: ignore[arg-type]
    by_step = LambdaLR(peak_sgd(), lambda step: oracle.lr(step, total, warmup, 1.0, 256))
    seen, expected = -1, 0.0
    for step in range(total):
        epoch = step * grad_accum_steps // batches  # of the first of the step's batches
        if epoch > seen or step <= warmup:
            seen, expected = epoch, float(by_step.get_last_lr()[0])
        assert run.lr(step) == pytest.approx(expected, rel=1e-12)
        by_step.optimizer.step()
        by_step.step()
    constant = RunSchedule(**schedule, steps_per_epoch=batches, lr_schedule="constant")  # type: ignore[arg-type]
    assert constant.lr(total - 1) == peak


@pytest.mark.parametrize("dtype", DTYPES)
def test_lars_five_steps(dtype: torch.dtype) -> None:
    """Every kind of parameter, with an lr that changes: inside the momentum, old steps would keep their old lr."""
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        "conv": (5, 3, 3, 3),
        "linear": (7, 11),
        "norm": (9,),
        "scalar": (),
        "1x1": (1, 1),
    }
    values = {name: rounded(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    values["zero_weight"] = np.zeros((3, 4))  # |p| = 0: the rate is 1
    values["no_gradient"] = rounded(rng.normal(size=(3, 4)), dtype)  # d is the decay alone
    values["dead"] = np.zeros((2, 2))  # neither: |d| = 0
    parameters = {name: nn.Parameter(tensor(value, dtype)) for name, value in values.items()}
    optimizer = byol_kernels.LARS(
        list(parameters.values()), lr=0.0, momentum=0.9, weight_decay=0.03, trust_coefficient=0.02
    )
    buffers = {name: np.zeros_like(value) for name, value in values.items()}
    for rate in (0.0, 1.5, 3.0, 1.0, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        for name, parameter in parameters.items():
            silent = name in {"no_gradient", "dead"}
            gradient = np.zeros(parameter.shape) if silent else rounded(rng.normal(size=parameter.shape), dtype)
            parameter.grad = tensor(gradient, dtype)
            values[name], buffers[name] = oracle.lars_update(
                values[name], gradient, buffers[name], lr=rate, momentum=0.9, weight_decay=0.03, trust_coefficient=0.02
            )
        optimizer.step()
    # Five steps of fewer than ten roundings each: 50 u = 3e-6.
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-10}[dtype]
    for name, parameter in parameters.items():
        assert relative_error(parameter, values[name], floor=1e-6) <= tolerance, name
        assert relative_error(momentum_buffer(optimizer, parameter), buffers[name], floor=1e-6) <= tolerance, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "0-dim"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.996, 1.0])
def test_ema(decay: float, as_tensor: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    shapes: list[tuple[int, ...]] = [(4, 3, 3, 3), (1,), (), (300, 7), (0,)]
    targets, onlines = ([rounded(rng.normal(size=shape), dtype) for shape in shapes] for _ in range(2))
    moved = [tensor(target, dtype) for target in targets]
    followed = [tensor(online, dtype) for online in onlines]
    byol_kernels.ema_update_(moved, followed, torch.tensor(decay, dtype=torch.float64) if as_tensor else decay)
    for got, target, online, kept in zip(moved, targets, onlines, followed, strict=True):
        assert (
            relative_error(got, oracle.ema(target, online, decay)) <= {torch.float32: 3e-7, torch.float64: 1e-10}[dtype]
        )
        assert np.array_equal(as_array(kept), online)
        if decay in (0.0, 1.0):
            assert np.array_equal(as_array(got), target if decay else online)
