"""Whole training steps against the oracle."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import byol_kernels
from byol_fast.config import OptimConfig
from byol_fast.data.batch import Batch
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule, lr_at, tau_at
from byol_fast.training.train_step import TrainStep
from tests.numbers.helpers import (
    DTYPES,
    HIDDEN,
    PROJECTION,
    SETTINGS,
    STEP_TOLERANCES,
    STEPS,
    Encoder,
    as_array,
    errors,
    load,
    module_name,
    momentum_buffer,
    relative_error,
    tensor,
    training,
    views,
)
from tests.oracle import Array


class Driver:
    """Trains the package's BYOL, one step a call; `optimizer` is over the online parameters."""

    def __init__(self, model: BYOL) -> None:
        self.model = model
        self.optimizer = self.build_optimizer()

    def build_optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def __call__(self, view1: Tensor, view2: Tensor, step: int) -> float:
        raise NotImplementedError


class RunDriver(Driver):
    """The code that a run goes through."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        s = SETTINGS
        config = OptimConfig(
            name="lars",
            lr=s.base_lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            trust_coefficient=s.trust_coefficient,
        )
        return build_optimizer(config, self.model.trainable_parameters())

    def __call__(self, view1: Tensor, view2: Tensor, step: int) -> float:
        s = SETTINGS
        schedule = RunSchedule(
            total_steps=s.total_steps,
            warmup_steps=s.warmup_steps,
            base_lr=s.base_lr,
            batch_size=s.batch_size,
            tau_base=s.tau_base,
        )
        train_step = TrainStep(self.model, self.optimizer, schedule)
        return train_step(Batch((view1, view2), None, torch.arange(len(view1))), step).loss.item()


class PublicDriver(Driver):
    """The loop that a user writes from the public parts; it also checks the gradients."""

    gradients: Mapping[str, Array]

    def build_optimizer(self) -> torch.optim.Optimizer:
        s = SETTINGS
        lars: torch.optim.Optimizer = byol_kernels.LARS(
            self.model.online.parameters(),
            lr=0.0,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            trust_coefficient=s.trust_coefficient,
        )
        return lars

    def __call__(self, view1: Tensor, view2: Tensor, step: int) -> float:
        s = SETTINGS
        p1, p2, z1, z2 = self.model(view1, view2)
        loss = self.model.loss((p1, p2), (z1, z2))
        names, parameters = zip(*self.model.online.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters)
        self.gradients = dict(zip(names, map(as_array, found), strict=True))
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = lr_at(step, s.total_steps, s.warmup_steps, s.base_lr, s.batch_size)
        self.update(tau_at(step, s.total_steps, s.tau_base))
        return float(loss.item())

    def update(self, tau: float) -> None:
        self.optimizer.step()
        self.model.update_target(tau)


class FusedDriver(PublicDriver):
    """The same, with the target's moving average inside the optimizer's launches."""

    def update(self, tau: float) -> None:
        assert isinstance(self.optimizer, byol_kernels.LARS)
        online, target = self.model.online, dict(self.model.target.named_parameters())
        self.optimizer.step(ema=([target.get(name) for name, _ in online.named_parameters()], tau))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("driver", [RunDriver, PublicDriver, FusedDriver], ids=["run", "public", "fused"])
def test_training_steps(driver: type[Driver], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Three steps: every parameter, momentum buffer and batch statistic of both networks after each."""
    judge = training(dtype)
    model = BYOL(Encoder(), hidden_dim=HIDDEN, projection_dim=PROJECTION)
    load(model.online, judge.online)
    load(model.target, judge.target)
    model = model.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    load(model.online, judge.online)  # float64 weights would have been rounded on their way in
    load(model.target, judge.target)
    package = driver(model)
    tolerance = STEP_TOLERANCES[dtype]
    for step in STEPS:
        view1, view2 = views(step, dtype)
        loss = package(tensor(view1, dtype), tensor(view2, dtype), step)
        assert relative_error(loss, judge.step(step, view1, view2)) <= tolerance
        named = dict(model.online.named_parameters())
        found = {f"online {name}": error for name, error in errors(model.online.state_dict(), judge.online).items()}
        found |= {f"target {name}": error for name, error in errors(model.target.state_dict(), judge.target).items()}
        for name, buffer in judge.momentum_buffers.items():
            got = momentum_buffer(package.optimizer, named[module_name(name)])
            found[f"momentum {name}"] = relative_error(got, buffer)
        if isinstance(package, PublicDriver):
            for name, gradient in judge.gradients.items():
                found[f"gradient {name}"] = relative_error(package.gradients[module_name(name)], gradient)
        wrong = {name: error for name, error in found.items() if not error <= tolerance}
        assert not wrong, f"step {step}: {wrong}"
