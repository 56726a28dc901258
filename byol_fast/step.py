"""The mathematics of one step: forward, backward, optimizer, then the target's moving average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from byol_fast.capture import Forward
from byol_fast.data.batch import Batch
from byol_fast.methods import SelfSupervisedTask
from byol_fast.schedules import RunSchedule
from byol_kernels import LARS, ema_update_


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What a step reports; the tensors stay on the device, so that reporting costs no synchronisation."""

    loss: Tensor
    """Scalar loss before the update."""
    collapse_std: Tensor
    """Scalar, see `byol_fast.methods.collapse_std`."""
    lr: float
    tau: float


class TrainStep:
    """One optimizer step on one batch.

    Args:
        task: networks and loss.
        optimizer: over `task.trainable_parameters()`.
        schedule: learning rate and tau by step.
        forward: `task.training_output`, or a compiled form of it.
        autocast: dtype the networks compute in; None leaves the weights' own.
        channels_last: bring the views into NHWC memory (a no-op for DALI's).
    """

    def __init__(
        self,
        task: SelfSupervisedTask,
        optimizer: torch.optim.Optimizer,
        schedule: RunSchedule,
        *,
        forward: Forward | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = True,
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.schedule = schedule
        self.forward = forward or task.training_output
        self.autocast = autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.target_of: dict[Tensor, Tensor] = dict(
            zip(task.trainable_parameters(), task.target_parameters(), strict=False)
        )
        self.device = next(task.parameters()).device

    def __call__(self, batch: Batch, step: int) -> StepMetrics:
        """Train on a batch.

        Args:
            batch: two views, on any device.
            step: steps finished before this one; decides learning rate and tau.
        """
        lr, tau = self.schedule.lr(step), self.schedule.tau(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        view1, view2 = self._placed(batch.view1), self._placed(batch.view2)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.forward(view1, view2)
        output.loss.backward()  # type: ignore[no-untyped-call]
        self._update(tau)
        self.optimizer.zero_grad(set_to_none=True)
        return StepMetrics(output.loss.detach(), output.collapse_std, lr, tau)

    def _update(self, tau: float) -> None:
        """The optimizer's step, then the target follows; our LARS does both in the same pass over the weights."""
        if isinstance(self.optimizer, LARS):
            self.optimizer.step(ema=(self.target_of, tau))
        else:
            self.optimizer.step()
            ema_update_(list(self.target_of.values()), list(self.target_of), tau)

    def _placed(self, view: Tensor) -> Tensor:
        return view.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
