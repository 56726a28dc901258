"""The mathematics of one step: forward, backward, optimizer, then the target's moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from byol_fast.data.batch import Batch
from byol_fast.models.base import SelfSupervisedTask, TaskOutput
from byol_fast.models.running_stats import RunningStatistics
from byol_fast.optim.optimizers import CONSTANT
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.lowp_weights import WeightCopies
from byol_fast.utils.precision import LossScale, Precision
from byol_fast.utils.profiler_ranges import phase
from byol_kernels import LARS, ema_update_

Forward = Callable[[Tensor, Tensor], TaskOutput]
Views = Sequence[tuple[Tensor, Tensor]]
FP32 = Precision("fp32", None)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What a step reports; the values stay on the device, so that reporting costs no synchronisation."""

    values: Tensor
    """Loss before the update, collapse meter, and 1 where the step was undone because something was not finite; `[3]`,
    float64."""
    lr: float
    tau: float
    features: tuple[Tensor, ...] = ()
    """`TaskOutput.features` of each batch of the step; a captured step overwrites them the next time."""

    @property
    def loss(self) -> Tensor:
        """Scalar loss before the update."""
        return self.values[0]

    @property
    def collapse_std(self) -> Tensor:
        """Scalar, see `byol_fast.models.base.collapse_std`."""
        return self.values[1]

    @property
    def undone(self) -> Tensor:
        """Scalar: 1 where the step changed nothing because its loss or gradient was not finite, else 0."""
        return self.values[2]


class TrainStep:
    """One optimizer step on one batch, or on several whose gradients are averaged.

    A step whose loss or gradient is not finite is undone on the device: weights, momentum, target and the running
    statistics of both networks are those from before. Learning rate and tau go on with the step counter.

    Args:
        task: networks and loss.
        optimizer: over `task.trainable_parameters()`, made by `make_optimizer`.
        schedule: learning rate and tau by step.
        precision: what the networks compute with.
        forward: `task.training_output`, or a compiled form of it.
        accumulate: batches a step.
        channels_last: bring the views into NHWC memory (a no-op for DALI's).
        weight_copies: let LARS write the weights in the networks' precision, instead of casting them in every step,
            where it can: one batch a step, one process.
        agree: with several processes, makes a flag on the device 1 on all where it is 1 on any.
    """

    def __init__(
        self,
        task: SelfSupervisedTask,
        optimizer: torch.optim.Optimizer,
        schedule: RunSchedule,
        *,
        precision: Precision = FP32,
        forward: Forward | None = None,
        accumulate: int = 1,
        channels_last: bool = True,
        weight_copies: bool = True,
        agree: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.forward = forward or task.training_output
        self.accumulate = accumulate
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.device = next(task.parameters()).device
        self.parameters = task.trainable_parameters()
        self.target_of: dict[Tensor, Tensor] = dict(zip(self.parameters, task.target_parameters(), strict=False))
        self.running_statistics = RunningStatistics(task.networks(), collected=task.views_note is None)
        self.bad = torch.zeros((), device=self.device)
        """1 while the step under way has met something that is not finite."""
        self.loss_scale = LossScale(self.device) if precision.scales_loss else None
        self._agree = agree
        # Copies take the gradients in low precision: fine for one batch and one process, too coarse for sums of them.
        fit = weight_copies and isinstance(optimizer, LARS) and accumulate == 1 and agree is None
        self.copies = WeightCopies(task, precision.autocast) if fit and precision.autocast is not None else None
        self._tau: float | Tensor = torch.ones((), device=self.device) if self.device.type == "cuda" else 1.0
        self.run: Callable[[Views], Tensor] = self.body
        self._features: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch | Sequence[Batch], step: int) -> StepMetrics:
        """Train on a batch, or on as many as `accumulate` says.

        Args:
            batch: two views, on any device.
            step: steps finished before this one; decides learning rate and tau.
        """
        batches = [batch] if isinstance(batch, Batch) else batch
        if len(batches) != self.accumulate:
            raise ValueError(f"TrainStep: batch must be {self.accumulate} batches (accumulate), got {len(batches)}")
        lr, tau = self.schedule.lr(step), self.schedule.tau(step)
        self._set_rates(lr, self.schedule.constant_lr(step), tau)
        with phase("views"):
            views = [(self._placed(b.view1), self._placed(b.view2)) for b in batches]
        values = self.run(views)
        return StepMetrics(values, lr, tau, self._features)

    def body(self, views: Views) -> Tensor:
        """The work of a step: all of it runs on the device, and none of it waits for the host.

        Args:
            views: pairs of views on the device.

        Returns:
            `StepMetrics.values`.
        """
        self.running_statistics.save_others()
        outputs: list[TaskOutput] = []
        for view1, view2 in views:
            last = len(outputs) == len(views) - 1
            with nullcontext() if last else self.task.more_to_come():
                outputs.append(self._backward(view1, view2))
        self._features = tuple(output.features for output in outputs if output.features is not None)
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        with phase("optimizer + average"):
            if self.copies is not None:
                self.copies.hand_over_gradients()
            self._look_at_the_loss(loss)
            self._update()
            statistics = [entry for output in outputs for entry in output.batch_stats or ()]
            self.running_statistics.update(statistics, self.bad)
            if self.loss_scale is not None:
                self.loss_scale.update(self.bad)
            self.drop_gradients()
        return torch.stack([loss.double(), outputs[-1].collapse_std.double(), self.bad.double()])

    def changing(self) -> list[Tensor]:
        """All tensors that a step changes."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        own = [] if self.loss_scale is None else self.loss_scale.tensors()
        copies = [] if self.copies is None else list(self.copies.of.values())
        return [*self.task.parameters(), *self.task.buffers(), *state, *own, *copies, self.bad]

    def weights_changed(self) -> None:
        """Take note that weights were loaded."""
        if self.copies is not None:
            self.copies.refresh()

    def drop_gradients(self) -> None:
        """Free all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.copies is not None:
            self.copies.drop_gradients()

    def forward_backward(self, view1: Tensor, view2: Tensor) -> TaskOutput:
        """Add a batch's gradients to what is there.

        Args:
            view1: `[B, 3, H, W]`, on any device.
            view2: likewise.
        """
        return self._backward(self._placed(view1), self._placed(view2))

    def _backward(self, view1: Tensor, view2: Tensor) -> TaskOutput:
        dtype = self.precision.autocast
        # The copies stay in place during the backward pass, which may compute activations again.
        with self.copies.in_place() if self.copies is not None else nullcontext():
            self.task.collects_statistics = True
            try:
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    output = self.forward(view1, view2)
            finally:
                self.task.collects_statistics = False
            if output.batch_stats is None and self.running_statistics.num_layers:
                raise ValueError(
                    f"TrainStep: {type(self.task).__name__}.training_output must return batch_stats where "
                    "collects_statistics is set, got None; pass a list to views_stacked as BYOL.training_output does"
                )
            loss = output.loss / self.accumulate if self.accumulate > 1 else output.loss
            with phase("backward"):
                (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()  # type: ignore[no-untyped-call]
        return output

    def _look_at_the_loss(self, loss: Tensor) -> None:
        """Begin the flag: with several processes it is that of any loss. Gradients are the same on all of them."""
        self.bad.copy_(~torch.isfinite(loss))
        if self._agree is not None:
            self._agree(self.bad)

    def _look_at_gradients(self) -> None:
        """Set the flag where a gradient is not finite; LARS does that in its own pass over them."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in self.parameters:
            if p.grad is not None and p.grad.numel():
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for gradients in by_dtype.values():
            # The largest magnitude: it exists for every dtype on every device, and an inf or NaN stays one in it.
            largest = torch.stack(torch._foreach_norm(gradients, math.inf))
            torch.maximum(self.bad, (~torch.isfinite(largest)).any().to(self.bad.dtype), out=self.bad)

    def _update(self) -> None:
        """The optimizer's step, then the target follows; our LARS does both in the same pass over the weights."""
        optimizer = self.optimizer
        optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        optimizer.grad_scale = None if self.loss_scale is None else self.loss_scale.scale  # type: ignore[attr-defined]
        if isinstance(optimizer, LARS):
            copies = None if self.copies is None else self.copies.of
            optimizer.step(ema=(self.target_of, self._tau) if self.target_of else None, copies=copies)
        else:
            self._look_at_gradients()
            optimizer.step()
            self._move_target()
        # A step that somebody else takes with this optimizer has a flag and a scale of its own.
        optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _move_target(self) -> None:
        """The target's moving average in a launch of its own; with tau 1 it stays as it is, bit for bit."""
        if self.target_of:
            on_cpu = self.device.type == "cpu"
            tau = (1.0 if self.bad else self._tau) if on_cpu else torch.where(self.bad > 0, 1.0, self._tau)
            ema_update_(list(self.target_of.values()), list(self.target_of), tau)

    def _set_rates(self, lr: float, constant_lr: float, tau: float) -> None:
        """Learning rate and tau; on a GPU as scalars there, so that a captured step follows them."""
        on_device = self.device.type == "cuda"
        for group in self.optimizer.param_groups:
            value = constant_lr if group.get(CONSTANT) else lr
            if not on_device:
                group["lr"] = value
            elif isinstance(group["lr"], Tensor) and group["lr"].device == self.device:
                group["lr"].fill_(value)
            else:
                group["lr"] = torch.full((), value, device=self.device)
        if isinstance(self._tau, Tensor):
            self._tau.fill_(tau)
        else:
            self._tau = tau

    def _placed(self, view: Tensor) -> Tensor:
        return view.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
