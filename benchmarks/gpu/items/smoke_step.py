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
from benchmarks.gpu.items.common import Checks, SmallProblem, StepMode, byol_fast_step, relative_error, same_flags
from byol_fast.bench.networks import MOMENTUM, Ours, Problem, Textbook
from byol_fast.data import Batch
from byol_fast.optim.schedules import RunSchedule
from tests import oracle
from tests.kernels.numerics import f64

STEPS = 3
TRUST_COEFFICIENT, DECAY = 1e-3, 1e-6
MODES: tuple[StepMode, ...] = ("eager", "compile", "graph")
TIMES = 2.0
"""Errors may be so many times those of plain PyTorch under bf16 autocast: the same roundings in another order."""


def problem(context: Context) -> SmallProblem:
    """The training problem of all candidates."""
    return SmallProblem(batch_size=32, hidden_dim=128, projection_dim=64, device=context.device)


def schedule() -> RunSchedule:
    """Rates that move, so that a stale one shows."""
    return RunSchedule(
        total_steps=2 * STEPS,
        warmup_steps=2,
        base_lr=0.4,
        batch_size=256,
        lr_schedule="cosine",
        tau_base=0.9,
        tau_schedule="cosine",
    )


def views(small: Problem, step: int) -> tuple[Tensor, Tensor]:
    """Two views of a step's batch, fp32, in NHWC memory.

    Of large patches: features of mere noise are all alike, and batch norm makes their rounding large.
    """
    patches = torch.randn(2, small.batch_size, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    made = patches.repeat_interleave(small.image_size // 2, 3).repeat_interleave(small.image_size // 2, 4)
    view1, view2 = (v.to(small.device).contiguous(memory_format=torch.channels_last) for v in made)
    return view1, view2


# ------------------------------------------------------------------------------------------------ states


@dataclass
class State:
    """Tensors that steps change, by kind, and the losses."""

    losses: list[Tensor]
    kinds: dict[str, list[Tensor]]

    def moved_from(self, start: State) -> dict[str, list[Tensor]]:
        """Changes of matrices and of vectors, which bf16 moves more coarsely; statistics and losses as they are."""
        found = {"losses": self.losses}
        for kind, tensors in self.kinds.items():
            if kind == "running statistics":
                found[kind] = tensors
                continue
            changes = [a - b for a, b in zip(tensors, start.kinds[kind], strict=True)]
            found[f"{kind} matrices"] = [t for t in changes if t.dim() > 1]
            found[f"{kind} vectors"] = [t for t in changes if t.dim() < 2]
        return found


def _copied(
    online: Sequence[Tensor], target: Sequence[Tensor], statistics: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    kinds = {"online": online, "target": target, "running statistics": statistics}
    return {kind: [t.detach().double().cpu().clone() for t in tensors] for kind, tensors in kinds.items()}


def by_formula(small: Problem, **options: Any) -> tuple[State, State]:
    """Start and end of steps of the loop that guides print, with LARS and the average by their formulas in float64.

    Args:
        small: what to do.
        **options: of `Textbook`.
    """
    loop, rates = Textbook(small, **options), schedule()
    params = [*loop.online.parameters(), *loop.predictor.parameters()]
    momentum = [np.zeros(p.shape) for p in params]

    def state(losses: list[Tensor]) -> State:
        buffers = [*loop.online.buffers(), *loop.predictor.buffers(), *loop.target.buffers()]
        statistics = [b for b in buffers if b.is_floating_point()]
        return State(losses, _copied(params, list(loop.target.parameters()), statistics))

    start, losses = state([]), []
    for step in range(STEPS):
        loop.views = tuple(view.to(params[0].dtype) for view in views(small, step))
        loss = loop.loss()
        gradients = torch.autograd.grad(loss, params)
        losses.append(loss.detach())
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
                new, momentum[i] = oracle.lars_update(
                    f64(p), f64(g), momentum[i], lr=rates.lr(step), momentum=MOMENTUM, weight_decay=DECAY,
                    trust_coefficient=TRUST_COEFFICIENT,
                )  # fmt: skip
                p.copy_(torch.from_numpy(new))
            for t, o in zip(loop.target.parameters(), loop.online.parameters(), strict=True):
                t.copy_(torch.from_numpy(oracle.ema(f64(t), f64(o), rates.tau(step))))
    return start, state(losses)


def state_of(step: Ours, losses: list[Tensor]) -> State:
    """The state of byol_fast's step."""
    model = step.model
    statistics = [b for network in model.networks() for b in network.buffers() if b.is_floating_point()]
    return State(losses, _copied(list(model.online.parameters()), list(model.target.parameters()), statistics))


def all_tensors(step: Ours) -> list[Tensor]:
    """Copies of all that a step changes, but for its flag."""
    optimizer = step.step.optimizer.state
    momentum = [v for entry in optimizer.values() for v in entry.values() if isinstance(v, Tensor)]
    copies = [] if step.step.lowp_weights is None else list(step.step.lowp_weights.copies.values())
    return [t.detach().clone() for t in (*step.model.parameters(), *step.model.buffers(), *momentum, *copies)]


def num_unequal(a: list[Tensor], b: list[Tensor]) -> int:
    """Tensors that are not equal bit for bit."""
    return sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ checks


def run(context: Context, checks: Checks) -> None:
    """All checks of the step.

    Args:
        context: of the item.
        checks: where they are made.
    """
    small = problem(context)
    same_flags(deterministic=True)
    start, exact = by_formula(small, dtype=torch.float64)
    _, rounded = by_formula(small, precision="bf16", channels_last=True)
    bounds = {
        kind: TIMES * relative_error(tensors, exact.moved_from(start)[kind])
        for kind, tensors in rounded.moved_from(start).items()
    }
    for mode in MODES:
        step = _new(context, small, mode)
        losses = [_take(step, small, number) for number in range(STEPS)]
        for kind, tensors in state_of(step, losses).moved_from(start).items():
            error = relative_error(tensors, exact.moved_from(start)[kind])
            checks(f"small network, {mode}: {kind} after {STEPS} steps", error, bounds[kind])
        _skipped_step(step, small, mode, checks)
    for mode in ("eager", "graph"):
        _resume(context, small, mode, checks)


def _new(context: Context, small: Problem, mode: StepMode) -> Ours:
    step = byol_fast_step(context, small, mode)
    step.step.schedule = schedule()
    same_flags(deterministic=True)
    return step


def _take(step: Ours, small: Problem, number: int) -> Tensor:
    view1, view2 = views(small, number)
    return step.step(Batch((view1, view2), None, torch.arange(small.batch_size)), number).loss


def _skipped_step(step: Ours, small: Problem, mode: str, checks: Checks) -> None:
    """A batch with one NaN changes nothing, and the next one counts again."""
    before = all_tensors(step)
    view1, view2 = views(small, STEPS)
    view1[0, 0, 0, 0] = torch.nan
    metrics = step.step(Batch((view1, view2), None, torch.arange(small.batch_size)), STEPS)
    checks(f"small network, {mode}: tensors that a skipped step changed", num_unequal(before, all_tensors(step)), 0)
    checks(f"small network, {mode}: flag of a skipped step, distance from 1", abs(float(metrics.values[2]) - 1), 0)
    loss = _take(step, small, STEPS)
    after = num_unequal(before, all_tensors(step))
    finite = bool(torch.isfinite(loss)) and after > 0
    checks(f"small network, {mode}: the step after it, 0 where it counts", float(not finite), 0)


def _resume(context: Context, small: Problem, mode: StepMode, checks: Checks) -> None:
    """A new step that is given the state of another goes on as that one, bit for bit."""
    first, second = (_new(context, small, mode) for _ in range(2))
    for number in range(2):
        _take(first, small, number)
    saved = copy.deepcopy((first.model.state_dict(), first.step.optimizer.state_dict()))
    second.model.load_state_dict(saved[0])
    second.step.optimizer.load_state_dict(saved[1])
    second.step.on_weights_loaded()
    losses = [[_take(step, small, number) for number in range(2, STEPS + 1)] for step in (first, second)]
    unequal = num_unequal(losses[0], losses[1]) + num_unequal(all_tensors(first), all_tensors(second))
    checks(f"small network, {mode}: tensors that differ after resuming", unequal, 0)
