"""One optimizer step: forward, backward, optimizer update, EMA of the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from byol_fast.config.fields import GradAccumSteps, check
from byol_fast.data.batch import Batch, Views
from byol_fast.models.base import ModelOutput, SSLModel
from byol_fast.optim.optimizers import CONSTANT
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.cuda_graph import CUDAGraphStep
from byol_fast.training.lowp_weights import LowPrecisionWeights
from byol_fast.training.running_stats import RunningStats
from byol_fast.utils.precision import GradScaler, Precision
from byol_fast.utils.profiler_ranges import record_range
from byol_kernels import LARS, ema_update_

Forward = Callable[..., ModelOutput]
FP32 = Precision("fp32", None)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of one step. Tensors stay on the device; reading them synchronizes."""

    values: Tensor
    """Loss before the update, `embedding_std`, and 1 if the step was skipped else 0: `[3]`, float64."""
    features: tuple[Tensor, ...] = ()
    """`ModelOutput.features` of each batch of the step; the next replay of a CUDA graph overwrites them."""
    lr: float = 0.0
    """Learning rate of the step, before `constant_predictor_lr`."""
    tau: float = 0.0
    """Decay of the target in this step."""

    @property
    def loss(self) -> Tensor:
        """Loss before the update, scalar."""
        return self.values[0]

    @property
    def embedding_std(self) -> Tensor:
        """Collapse meter, scalar: see `ModelOutput`."""
        return self.values[1]

    @property
    def skipped(self) -> Tensor:
        """1 if the loss or a gradient was not finite and the step therefore changed nothing, else 0; scalar."""
        return self.values[2]


class TrainStep:
    """Trains on one batch, or on `grad_accum_steps` batches whose gradients are averaged.

    A step with a non-finite loss or gradient is skipped: weights, optimizer state, target and running statistics stay
    as they were. The decision is a scalar on the device (`found_inf`), so that it needs no host synchronization and the
    whole step can be captured in a CUDA graph. Schedules advance with the step counter either way.

    Args:
        model: online and target networks and the loss.
        optimizer: over `model.trainable_parameters()`, built by `build_optimizer`.
        schedule: learning rate and tau by step.
        precision: autocast dtype, and whether the loss is scaled.
        forward: `model.forward_train`, or a compiled version of it.
        grad_accum_steps: batches per step.
        channels_last: bring the views into NHWC memory; no copy if they are already.
        lowp_weights: let LARS write the weights in the autocast dtype, instead of casting them in every step, where
            that is possible: one batch per step, one process.
        all_reduce_found_inf: with several processes, makes the flag 1 on all ranks if it is 1 on any.

    Raises:
        ValueError: `grad_accum_steps` is out of range.
    """

    def __init__(
        self,
        model: SSLModel,
        optimizer: torch.optim.Optimizer,
        schedule: RunSchedule,
        *,
        precision: Precision = FP32,
        forward: Forward | None = None,
        grad_accum_steps: int = 1,
        channels_last: bool = True,
        lowp_weights: bool = True,
        all_reduce_found_inf: Callable[[Tensor], None] | None = None,
    ) -> None:
        check("TrainStep: grad_accum_steps", GradAccumSteps, grad_accum_steps)
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.forward = forward or model.forward_train
        self.grad_accum_steps = grad_accum_steps
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.device = next(model.parameters()).device
        self.parameters = model.trainable_parameters()
        # Not strict: the predictor's parameters come last and have no target.
        self.target_of: dict[Tensor, Tensor] = dict(zip(self.parameters, model.target_parameters(), strict=False))
        self.running_stats = RunningStats(model.networks(), has_batch_stats=model.supports_batch_stats)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.device)  # as the fused optimizers take it
        """1 once the current step has met a non-finite value."""
        self.grad_scaler = GradScaler(self.device) if precision.needs_grad_scaler else None
        self._all_reduce_found_inf = all_reduce_found_inf
        # Low-precision copies of the weights receive low-precision gradients. Sums over batches or processes need fp32.
        possible = isinstance(optimizer, LARS) and grad_accum_steps == 1 and all_reduce_found_inf is None
        self.lowp_weights: LowPrecisionWeights | None = None
        if lowp_weights and possible and precision.autocast_dtype is not None:
            self.lowp_weights = LowPrecisionWeights(model.networks(), precision.autocast_dtype)
        self._tau: float | Tensor = torch.ones((), device=self.device) if self.device.type == "cuda" else 1.0
        # `_step`, or its CUDA graph.
        self._run: Callable[[Sequence[Views]], StepOutput] = self._step

    def __call__(self, batches: Batch | Sequence[Batch], step: int) -> StepOutput:
        """Run step number `step`.

        Args:
            batches: as many as `grad_accum_steps`, on any device; one batch may come without its list.
            step: steps finished before this one; decides learning rate and tau.

        Raises:
            ValueError: not `grad_accum_steps` batches.
        """
        batches = [batches] if isinstance(batches, Batch) else batches
        if len(batches) != self.grad_accum_steps:
            raise ValueError(
                f"TrainStep: batches must be {self.grad_accum_steps} (grad_accum_steps), got {len(batches)}"
            )
        lr, tau = self.schedule.lr(step), self.schedule.tau(step)
        self._set_lr_and_tau(lr, self.schedule.constant_lr(step), tau)
        with record_range("views"):
            views_of_batches = [self.to_device(batch.views) for batch in batches]
        return replace(self._run(views_of_batches), lr=lr, tau=tau)

    def to_device(self, views: Sequence[Tensor]) -> Views:
        """Views on the model's device, in its memory format.

        Args:
            views: each `[B, 3, H, W]`, on any device.
        """
        return tuple(
            view.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format) for view in views
        )

    def use_cuda_graph(self) -> None:
        """Replay steps from a CUDA graph, captured at the next call."""
        self._run = CUDAGraphStep(self._step, self.mutable_tensors, self.device)

    @contextmanager
    def without_cuda_graph(self, forward: Forward | None = None) -> Iterator[None]:
        """Within this, run steps as they come, without the CUDA graph.

        Args:
            forward: used meanwhile instead of the step's own forward pass.
        """
        before = self._run, self.forward
        self._run, self.forward = self._step, forward or self.forward
        try:
            yield
        finally:
            self._run, self.forward = before

    def mutable_tensors(self) -> list[Tensor]:
        """All tensors that a step changes."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        scaler = [] if self.grad_scaler is None else self.grad_scaler.tensors()
        copies = [] if self.lowp_weights is None else list(self.lowp_weights.copies.values())
        return [*self.model.parameters(), *self.model.buffers(), *state, *scaler, *copies, self.found_inf]

    def on_weights_loaded(self) -> None:
        """Cast the low-precision copies anew after weights were changed outside the optimizer."""
        if self.lowp_weights is not None:
            self.lowp_weights.refresh()

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.lowp_weights is not None:
            self.lowp_weights.zero_grad()

    def forward_backward(self, views: Sequence[Tensor]) -> ModelOutput:
        """Add the gradients of one batch to `.grad`.

        Args:
            views: as `to_device` returns them.
        """
        dtype = self.precision.autocast_dtype
        # The copies stay in place during the backward pass, which may recompute activations.
        with self.lowp_weights.swapped_in() if self.lowp_weights is not None else nullcontext():
            with (
                self.model.collecting_batch_stats(),
                torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
            ):
                output = self.forward(*views)
            self._check_output(output, views)
            loss = output.loss / self.grad_accum_steps if self.grad_accum_steps > 1 else output.loss
            with record_range("backward"):
                scaled = loss if self.grad_scaler is None else loss * self.grad_scaler.scale
                scaled.backward()  # type: ignore[no-untyped-call]
        return output

    def _check_output(self, output: ModelOutput, views: Sequence[Tensor]) -> None:
        """Refuse a method's output that is incomplete; a loss alone would train, with wrong records."""
        method, num_images = f"TrainStep: {type(self.model).__name__}.forward_train", 2 * len(views[0])
        if output.batch_stats is None and self.running_stats.num_layers:
            raise ValueError(
                f"{method} must return batch_stats where collect_batch_stats is set, got None; collect them as "
                "SSLModel._pass_online does"
            )
        features: Tensor | None = output.features
        if features is None or len(features) != num_images:
            got = None if features is None else list(features.shape)
            raise ValueError(f"{method} must return features of both global views, [{num_images}, D], got {got}")

    def _step(self, views_of_batches: Sequence[Views]) -> StepOutput:
        """The device work of one step; what the CUDA graph captures. Nothing here waits for the device."""
        # --- forward and backward
        self.running_stats.save_others()
        outputs: list[ModelOutput] = []
        for views in views_of_batches:
            is_last = len(outputs) == len(views_of_batches) - 1
            with nullcontext() if is_last else self.model.no_sync():  # DDP reduces once per step
                outputs.append(self.forward_backward(views))
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()

        # --- optimizer, EMA and running statistics, all conditional on found_inf
        with record_range("optimizer + EMA"):
            if self.lowp_weights is not None:
                self.lowp_weights.move_grads()
            self._check_loss_finite(loss)
            self.update_weights_and_target()
            # Once per step and only now: a batch with NaN would leave the running statistics NaN for good.
            batch_stats = [entry for output in outputs for entry in output.batch_stats or ()]
            self.running_stats.update(batch_stats, self.found_inf)
            if self.grad_scaler is not None:
                self.grad_scaler.update(self.found_inf)
            self.zero_grad()
        values = torch.stack([loss.double(), outputs[-1].embedding_std.double(), self.found_inf.double()])
        return StepOutput(values, tuple(output.features for output in outputs))

    def _check_loss_finite(self, loss: Tensor) -> None:
        """Set `found_inf` by the loss; with several processes by that of any: only gradients are equal on all."""
        self.found_inf.copy_(~torch.isfinite(loss))
        if self._all_reduce_found_inf is not None:
            self._all_reduce_found_inf(self.found_inf)

    def update_weights_and_target(self) -> None:
        """Optimizer step, then EMA of the target; our LARS does both in one pass over the weights."""
        optimizer = self.optimizer
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        optimizer.grad_scale = None if self.grad_scaler is None else self.grad_scaler.scale  # type: ignore[attr-defined]
        if isinstance(optimizer, LARS):
            copies = None if self.lowp_weights is None else self.lowp_weights.copies
            optimizer.step(ema=(self.target_of, self._tau) if self.target_of else None, copies=copies)
        else:
            self._check_gradients_finite()
            optimizer.step()
            self._ema_without_lars()
        # Both belong to this step only: reset them so that the optimizer can be used elsewhere.
        optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _check_gradients_finite(self) -> None:
        """Set `found_inf` by the gradients; LARS does that in its own pass over them."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in self.parameters:
            if p.grad is not None and p.grad.numel():
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for gradients in by_dtype.values():
            # The largest magnitude: it exists for every dtype on every device, and keeps an inf or NaN.
            largest = torch.stack(torch._foreach_norm(gradients, math.inf))
            torch.maximum(self.found_inf, (~torch.isfinite(largest)).any().to(self.found_inf.dtype), out=self.found_inf)

    def _ema_without_lars(self) -> None:
        """EMA of the target in a launch of its own; LARS does it in its own step. Tau 1 leaves the target unchanged."""
        if self.target_of:
            on_cpu = self.device.type == "cpu"
            tau = (1.0 if self.found_inf else self._tau) if on_cpu else torch.where(self.found_inf > 0, 1.0, self._tau)
            ema_update_(list(self.target_of.values()), list(self.target_of), tau)

    def _set_lr_and_tau(self, lr: float, constant_lr: float, tau: float) -> None:
        """Set learning rates and tau; on a GPU as scalars there, so that a captured step reads the new values."""
        on_gpu = self.device.type == "cuda"
        for group in self.optimizer.param_groups:
            value = constant_lr if group.get(CONSTANT) else lr
            if not on_gpu:
                group["lr"] = value
            elif isinstance(group["lr"], Tensor) and group["lr"].device == self.device:
                group["lr"].fill_(value)
            else:
                group["lr"] = torch.full((), value, device=self.device)
        if isinstance(self._tau, Tensor):
            self._tau.fill_(tau)
        else:
            self._tau = tau
