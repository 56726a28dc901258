"""The training step of a small residual network in bf16 with LARS: eager, compiled and captured, against float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import Checks, SmallProblem, StepMode, byol_fast_step, set_flags
from byol_fast.bench.baseline import BaselineStep
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.numerics import relative_error
from byol_fast.bench.problem import MOMENTUM, Problem
from byol_fast.data import Batch
from byol_fast.optim.schedules import RunSchedule
from tests import oracle
from tests.kernels.numerics import f64

STEPS = 3
TRUST_COEFFICIENT, DECAY = 1e-3, 1e-6
SCHEDULE = RunSchedule(total_steps=2 * STEPS, warmup_steps=2, base_lr=0.4, tau_base=0.9)
"""Schedule whose values change every step, so that a stale one shows."""
MODES: tuple[StepMode, ...] = ("eager", "compile", "graph")
ERROR_RATIO = 2.0
"""Allowed ratio of errors to those of plain PyTorch under bf16 autocast: the same roundings in another order."""


def problem(context: Context) -> SmallProblem:
    """The training problem of all candidates."""
    return SmallProblem(batch_size=32, hidden_dim=128, projection_dim=64, device=context.device)


def views(small: Problem, step: int) -> tuple[Tensor, Tensor]:
    """Two views of a step's batch, fp32, in NHWC memory.

    They consist of large patches: features of plain noise are nearly equal, and batch norm amplifies their rounding.
    """
    patches = torch.randn(2, small.batch_size, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    images = patches.repeat_interleave(small.image_size // 2, 3).repeat_interleave(small.image_size // 2, 4)
    view1, view2 = (v.to(small.device).contiguous(memory_format=torch.channels_last) for v in images)
    return view1, view2


# ------------------------------------------------------------------------------------------------ states


@dataclass
class State:
    """Tensors changed by steps, by kind, and the losses."""

    losses: list[Tensor]
    kinds: dict[str, list[Tensor]]

    def changes_since(self, start: State) -> dict[str, list[Tensor]]:
        """Changes of matrices and of vectors, whose bf16 errors are larger; statistics and losses as they are."""
        result = {"losses": self.losses}
        for kind, tensors in self.kinds.items():
            if kind == "running statistics":
                result[kind] = tensors
                continue
            changes = [a - b for a, b in zip(tensors, start.kinds[kind], strict=True)]
            result[f"{kind} matrices"] = [t for t in changes if t.dim() > 1]
            result[f"{kind} vectors"] = [t for t in changes if t.dim() < 2]
        return result


def _copies(
    online: Sequence[Tensor], target: Sequence[Tensor], statistics: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    kinds = {"online": online, "target": target, "running statistics": statistics}
    return {kind: [t.detach().double().cpu().clone() for t in tensors] for kind, tensors in kinds.items()}


def reference_states(small: Problem, **options: Any) -> tuple[State, State]:
    """First and last state of steps of the baseline, with LARS and EMA by their formulas in float64.

    Args:
        small: networks, batch and device.
        **options: of `BaselineStep`.
    """
    baseline = BaselineStep(small, **options)
    params = [*baseline.online.parameters(), *baseline.predictor.parameters()]
    momentum = [np.zeros(p.shape) for p in params]

    def state(losses: list[Tensor]) -> State:
        buffers = [*baseline.online.buffers(), *baseline.predictor.buffers(), *baseline.target.buffers()]
        statistics = [b for b in buffers if b.is_floating_point()]
        return State(losses, _copies(params, list(baseline.target.parameters()), statistics))

    start, losses = state([]), []
    for step in range(STEPS):
        baseline.views = tuple(view.to(params[0].dtype) for view in views(small, step))
        loss = baseline.loss()
        gradients = torch.autograd.grad(loss, params)
        losses.append(loss.detach())
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
                new, momentum[i] = oracle.lars_update(
                    f64(p), f64(g), momentum[i], lr=SCHEDULE.lr(step), momentum=MOMENTUM, weight_decay=DECAY,
                    trust_coefficient=TRUST_COEFFICIENT,
                )  # fmt: skip
                p.copy_(torch.from_numpy(new))
            for t, o in zip(baseline.target.parameters(), baseline.online.parameters(), strict=True):
                t.copy_(torch.from_numpy(oracle.ema(f64(t), f64(o), SCHEDULE.tau(step))))
    return start, state(losses)


def state_of(step: ByolFastStep, losses: list[Tensor]) -> State:
    """State of byol_fast's step."""
    model = step.model
    statistics = [b for network in model.networks() for b in network.buffers() if b.is_floating_point()]
    return State(losses, _copies(list(model.online.parameters()), list(model.target.parameters()), statistics))


def all_tensors(step: ByolFastStep) -> list[Tensor]:
    """Copies of all tensors changed by a step, except `found_inf`."""
    return [t.detach().clone() for t in step.step.mutable_tensors() if t is not step.step.found_inf]


def num_unequal(a: list[Tensor], b: list[Tensor]) -> int:
    """Number of tensors that are not equal bit for bit."""
    return sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ checks


def run(context: Context, checks: Checks) -> None:
    """Run all checks of the step.

    Args:
        context: of the item.
        checks: that record them.
    """
    small = problem(context)
    set_flags(deterministic=True)
    start, exact = reference_states(small, dtype=torch.float64)
    _, rounded = reference_states(small, precision="bf16", channels_last=True)
    bounds = {
        kind: ERROR_RATIO * relative_error(tensors, exact.changes_since(start)[kind])
        for kind, tensors in rounded.changes_since(start).items()
    }
    for mode in MODES:
        step = _build_step(context, small, mode)
        losses = [_take_step(step, small, number) for number in range(STEPS)]
        for kind, tensors in state_of(step, losses).changes_since(start).items():
            error = relative_error(tensors, exact.changes_since(start)[kind])
            checks(f"small network, {mode}: {kind} after {STEPS} steps", error, bounds[kind])
        _skipped_step(step, small, mode, checks)
    for mode in ("eager", "graph"):
        _resume(context, small, mode, checks)


def _build_step(context: Context, small: Problem, mode: StepMode) -> ByolFastStep:
    step = byol_fast_step(context, small, mode)
    step.step.schedule = SCHEDULE
    set_flags(deterministic=True)
    return step


def _take_step(step: ByolFastStep, small: Problem, number: int) -> Tensor:
    view1, view2 = views(small, number)
    return step.step(Batch((view1, view2), None, torch.arange(small.batch_size)), number).loss


def _skipped_step(step: ByolFastStep, small: Problem, mode: str, checks: Checks) -> None:
    """A batch with one NaN changes nothing, and the next one does."""
    before = all_tensors(step)
    view1, view2 = views(small, STEPS)
    view1[0, 0, 0, 0] = torch.nan
    metrics = step.step(Batch((view1, view2), None, torch.arange(small.batch_size)), STEPS)
    checks(f"small network, {mode}: tensors that a skipped step changed", num_unequal(before, all_tensors(step)), 0)
    checks(f"small network, {mode}: flag of a skipped step, distance from 1", abs(float(metrics.values[2]) - 1), 0)
    loss = _take_step(step, small, STEPS)
    after = num_unequal(before, all_tensors(step))
    finite = bool(torch.isfinite(loss)) and after > 0
    checks(f"small network, {mode}: the step after it, 0 where it counts", float(not finite), 0)


def _resume(context: Context, small: Problem, mode: StepMode, checks: Checks) -> None:
    """A new step with the state of another one continues bit for bit like it."""
    first, second = (_build_step(context, small, mode) for _ in range(2))
    for number in range(2):
        _take_step(first, small, number)
    saved = copy.deepcopy((first.model.state_dict(), first.step.optimizer.state_dict()))
    second.model.load_state_dict(saved[0])
    second.step.optimizer.load_state_dict(saved[1])
    second.step.on_weights_loaded()
    losses = [[_take_step(step, small, number) for number in range(2, STEPS + 1)] for step in (first, second)]
    unequal = num_unequal(losses[0], losses[1]) + num_unequal(all_tensors(first), all_tensors(second))
    checks(f"small network, {mode}: tensors that differ after resuming", unequal, 0)
