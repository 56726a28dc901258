"""Mistakes known from other packages lie far above the tolerance of training steps.

Each replaces a part of the oracle by what some package has done, so that the oracle itself goes wrong in that way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests import oracle
from tests.numbers.helpers import STEP_TOLERANCES, STEPS, relative_error, training, views
from tests.oracle import Array, Network

Mistake = Callable[[pytest.MonkeyPatch], None]


def averaged_directions(patch: pytest.MonkeyPatch) -> None:
    right = oracle.regression_loss_gradient
    patch.setattr(oracle, "regression_loss_gradient", lambda p, z: 0.5 * right(p, z))


def concatenated_views(patch: pytest.MonkeyPatch) -> None:
    def loss_and_gradients(
        online: Network, target: Network, view1: Array, view2: Array
    ) -> tuple[float, oracle.Gradients]:
        grads: oracle.Gradients = {}
        p, back = oracle.predict(online, np.concatenate([view1, view2]), grads)
        z = oracle.project(target, np.concatenate([view2, view1]))
        back(2 * oracle.regression_loss_gradient(p, z))
        return 2 * oracle.regression_loss(p, z), grads

    patch.setattr(oracle, "loss_and_gradients", loss_and_gradients)


def biased_running_variance(patch: pytest.MonkeyPatch) -> None:
    right = oracle.batch_norm

    def batch_norm(net: Network, name: str, x: Array, grads: oracle.Gradients) -> tuple[Array, oracle.Backward]:
        kept, count = 0.9 * net.buffers[f"{name}.running_var"], x.size // x.shape[1]
        result = right(net, name, x, grads)
        net.buffers[f"{name}.running_var"] = kept + (net.buffers[f"{name}.running_var"] - kept) * (count - 1) / count
        return result

    patch.setattr(oracle, "batch_norm", batch_norm)


def larc(patch: pytest.MonkeyPatch) -> None:
    def lars_update(
        parameter: Array,
        gradient: Array,
        buffer: Array,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
    ) -> tuple[Array, Array]:
        ratio, decay = 1.0, 0.0
        if parameter.ndim > 1:
            decay, norm = weight_decay, float(np.linalg.norm(parameter))
            ratio = trust_coefficient * norm / (float(np.linalg.norm(gradient)) + decay * norm)
        buffer = momentum * buffer + ratio * (gradient + decay * parameter)
        return parameter - lr * buffer, buffer

    patch.setattr(oracle, "lars_update", lars_update)


def lr_inside_the_momentum(patch: pytest.MonkeyPatch) -> None:
    right = oracle.lars_update

    def lars_update(
        parameter: Array, gradient: Array, buffer: Array, *, lr: float, **rest: float
    ) -> tuple[Array, Array]:
        step = right(np.asarray(parameter), gradient, np.zeros_like(buffer), lr=lr, **rest)[0] - parameter
        buffer = rest["momentum"] * buffer - step
        return parameter - buffer, buffer

    patch.setattr(oracle, "lars_update", lars_update)


def adapted_norms(patch: pytest.MonkeyPatch) -> None:
    right = oracle.lars_update

    def lars_update(parameter: Array, gradient: Array, buffer: Array, **rest: float) -> tuple[Array, Array]:
        new = right(parameter[None], gradient[None], buffer[None], **rest)
        return new[0][0], new[1][0]

    patch.setattr(oracle, "lars_update", lars_update)


def tau_of_the_next_step(patch: pytest.MonkeyPatch) -> None:
    right = oracle.tau
    patch.setattr(oracle, "tau", lambda step, total, base: right(step + 1, total, base))


def cosine_over_the_total(patch: pytest.MonkeyPatch) -> None:
    right = oracle.lr
    patch.setattr(
        oracle, "lr", lambda step, total, warmup, base, batch: right(step, total + warmup, warmup, base, batch)
    )


def averaged_buffers(patch: pytest.MonkeyPatch) -> None:
    right = oracle.Training.step

    def step(self: oracle.Training, step: int, view1: Array, view2: Array) -> float:
        loss = right(self, step, view1, view2)
        decay = oracle.tau(step, self.settings.total_steps, self.settings.tau_base)
        for name, buffer in self.target.buffers.items():
            self.target.buffers[name] = oracle.ema(buffer, self.online.buffers[name], decay)
        return loss

    patch.setattr(oracle.Training, "step", step)


def target_before_the_optimizer(patch: pytest.MonkeyPatch) -> None:
    right = oracle.Training.step

    def step(self: oracle.Training, step: int, view1: Array, view2: Array) -> float:
        online, target = self.online.copy(), self.target.copy()
        loss = right(self, step, view1, view2)
        decay = oracle.tau(step, self.settings.total_steps, self.settings.tau_base)
        for name, parameter in target.parameters.items():
            self.target.parameters[name] = oracle.ema(parameter, online.parameters[name], decay)
        return loss

    patch.setattr(oracle.Training, "step", step)


MISTAKES: list[Mistake] = [
    averaged_directions,
    concatenated_views,
    biased_running_variance,
    larc,
    lr_inside_the_momentum,
    adapted_norms,
    tau_of_the_next_step,
    cosine_over_the_total,
    averaged_buffers,
    target_before_the_optimizer,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: str(mistake.__name__))
def test_tolerance_tells_mistakes(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three steps, parameters and buffers are off by ten times the fp32 tolerance at least."""
    right = training()
    for step in STEPS:
        right.step(step, *views(step))
    mistake(monkeypatch)
    wrong = training()
    for step in STEPS:
        wrong.step(step, *views(step))
    off = 0.0
    for good, bad in ((right.online, wrong.online), (right.target, wrong.target)):
        expected, got = good.parameters | good.buffers, bad.parameters | bad.buffers
        off = max(off, *(relative_error(got[name], expected[name]) for name in expected))
    assert off >= 10 * STEP_TOLERANCES[torch.float32]
