"""Learning rate and tau by step, as the reference has them (deepmind-research `byol/utils/schedules.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from byol_fast.config.fields import Schedule, check


def _check(name: str, step: int, total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"{name}: total_steps must be 1 or more, got {total_steps}")
    if step < 0:
        raise ValueError(f"{name}: step must be 0 or more, got {step}")


def _cosine(step: int, total_steps: int) -> float:
    """From 1 at step 0 to 0 at `total_steps` and beyond."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step, total_steps) / total_steps))


def tau_at(step: int, total_steps: int, tau_base: float) -> float:
    """Decay of the target network at a step.

    `tau(k) = 1 - (1 - tau_base) * (cos(pi k / K) + 1) / 2` (BYOL, arXiv 2006.07733, section 3.2).

    Args:
        step: steps done before this one, from 0; beyond `total_steps` tau stays 1.
        total_steps: K, optimizer steps of the whole run.
        tau_base: first tau.

    Returns:
        tau, from `tau_base` at step 0 to 1 at step K.

    Raises:
        ValueError: negative step, no steps, or tau_base outside [0, 1].
    """
    _check("tau_at", step, total_steps)
    if not 0.0 <= tau_base <= 1.0:
        raise ValueError(f"tau_at: tau_base must be between 0 and 1, got {tau_base}")
    return 1.0 - (1.0 - tau_base) * _cosine(step, total_steps)


def lr_at(step: int, total_steps: int, warmup_steps: int, base_lr: float, batch_size: int) -> float:
    """Learning rate at a step: linear warm-up from 0, then cosine to 0 over the rest.

    Args:
        step: steps done before this one, from 0.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of the warm-up; the rate reaches its peak at step `warmup_steps`.
        base_lr: learning rate for a batch of 256.
        batch_size: global batch: images per optimizer step, over all ranks and accumulated batches.

    Returns:
        `base_lr * batch_size / 256` times the schedule's factor at this step.

    Raises:
        ValueError: negative step or warm-up, no steps, or a warm-up longer than the run.
    """
    _check("lr_at", step, total_steps)
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"lr_at: warmup_steps must be 0..total_steps ({total_steps}), got {warmup_steps}")
    peak = base_lr * batch_size / 256.0
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * _cosine(step - warmup_steps, max(total_steps - warmup_steps, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSchedule:
    """Learning rate and tau of a run, both functions of its one step counter."""

    total_steps: int
    first_step: int = 0
    """Step from which on the schedules, also their epochs, are those of a run of the remaining steps alone: of a run
    that extends another one, the steps of that one."""
    warmup_steps: int = 0
    base_lr: float
    batch_size: int = 256
    """Effective batch that the learning rate is scaled with (256: not at all)."""
    lr_schedule: Schedule = "cosine"
    steps_per_epoch: int | Fraction | None = None
    """Take the cosine of the learning rate once per epoch of so many steps, at its first one; None: at every step."""
    tau_base: float
    tau_schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        check("RunSchedule: lr_schedule", Schedule, self.lr_schedule)
        check("RunSchedule: tau_schedule", Schedule, self.tau_schedule)

    def lr(self, step: int) -> float:
        """Learning rate of the step that follows `step` finished ones."""
        if self.lr_schedule == "constant":
            return self.constant_lr(step)
        step -= self.first_step
        if self.steps_per_epoch is not None and step > self.warmup_steps:
            # A step of batches of two epochs belongs to that of its first batch.
            epoch = step // self.steps_per_epoch
            step = max(math.ceil(epoch * self.steps_per_epoch), self.warmup_steps)
        return lr_at(step, self._num_steps, self.warmup_steps, self.base_lr, self.batch_size)

    def constant_lr(self, step: int) -> float:
        """The learning rate of what keeps its peak after the warm-up."""
        step = min(step - self.first_step, self.warmup_steps)
        return lr_at(step, self._num_steps, self.warmup_steps, self.base_lr, self.batch_size)

    def tau(self, step: int) -> float:
        """Target decay of the step that follows `step` finished ones."""
        step = 0 if self.tau_schedule == "constant" else step - self.first_step
        return tau_at(step, self._num_steps, self.tau_base)

    @property
    def _num_steps(self) -> int:
        return self.total_steps - self.first_step
