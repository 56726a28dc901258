"""Tolerances, random data and networks of the tests against `tests/oracle.py`.

Where the numbers come from: the oracle restates BYOL (arXiv 2006.07733) and its authors' code by hand, in numpy
float64, without autograd and without the package. It is itself judged here twice: its hand-derived gradients against
central differences, and against torch's autograd in float64.

Tolerances are errors relative to the largest entry of the compared tensor (or to `FLOOR`, see `relative_error`).

- float64: 1e-10, about 1e6 units of rounding (1.1e-16), and far below every mistake one can make.
- fp32: one unit of rounding is u = 6e-8. The loss of one row takes a norm, a dot product and a difference over D <= 256
  terms: at most (log2 D + 8) u of pairwise summation, about 1e-6 of a value of order one; 4e-6 is allowed. A training
  step passes about 30 roundings forward and back; batch normalization multiplies an error by the ratio of a channel's
  spread to what is left after centering, some 10 here; over three steps 3 * 30 * 10 * u = 5e-5, so 1e-4 is allowed
  (found: 8e-6). `test_tolerance_tells_mistakes` shows that the mistakes known from other packages lie far above it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracle
from tests.oracle import Array, Network

LOSS_TOLERANCES = {torch.float32: 4e-6, torch.float64: 1e-10}
STEP_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="float64")]

FLOOR = 0.1
"""Smallest scale an error is measured against. Parameters, buffers and gradients here are of order 0.1 to 1, except the
gradient of a bias in front of a batch normalization: it is exactly 0, and what a machine finds is pure rounding."""

CHANNELS, HIDDEN, PROJECTION, BATCH, IMAGE = (3, 4, 5), 7, 6, 8, 7
STEPS = (0, 1, 2)
SETTINGS = oracle.Hyperparameters(
    total_steps=6,
    warmup_steps=1,
    base_lr=16.0,
    batch_size=BATCH,
    tau_base=0.8,
    momentum=0.9,
    weight_decay=0.05,
    trust_coefficient=0.08,
)
"""A run in which everything matters: lr is 0, then its peak of 2, then below; tau moves by 0.01 and more a step; decay
pulls about as hard as the gradient; the trust coefficient is large enough for LARS to move a matrix
by some percent a step."""


def as_array(value: Tensor | Array | float) -> Array:
    return np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)


def relative_error(actual: Tensor | Array | float, expected: Array | float, floor: float = FLOOR) -> float:
    """Largest difference over the largest expected entry; NaN counts as infinite."""
    got, want = as_array(actual), as_array(expected)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return 0.0
    difference = np.abs(got - want).max()
    return float(difference / max(np.abs(want).max(), floor)) if np.isfinite(difference) else float("inf")


def tensor(array: Array, dtype: torch.dtype) -> Tensor:
    return torch.tensor(array, dtype=dtype)


def rounded(array: Array, dtype: torch.dtype) -> Array:
    """The float64 values of what `dtype` can hold, so that the oracle and the package start from the same numbers."""
    return array.astype(np.float32).astype(np.float64) if dtype == torch.float32 else array


def gradients(loss: Tensor, *leaves: Tensor) -> list[Array]:
    """Gradients of a scalar; zeros where it does not depend on a leaf."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        as_array(torch.zeros_like(leaf) if grad is None else grad) for leaf, grad in zip(leaves, found, strict=True)
    ]


def rows(seed: int, batch: int, dim: int, dtype: torch.dtype) -> Array:
    """Random rows with norms from 0.01 to 100."""
    rng = np.random.default_rng(seed)
    return rounded(rng.normal(size=(batch, dim)) * 10.0 ** rng.uniform(-2, 2, size=(batch, 1)), dtype)


def momentum_buffer(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    buffer = optimizer.state[parameter]["momentum_buffer"]
    assert isinstance(buffer, Tensor)
    return buffer


def views(step: int, dtype: torch.dtype = torch.float64) -> tuple[Array, Array]:
    """Two views of one random batch; the second with other contrast and brightness, so that per-view BN matters."""
    rng = np.random.default_rng(100 + step)
    colors = rng.normal(size=(BATCH, CHANNELS[0], 1, 1))
    contrasts = rng.uniform(0.2, 2.0, size=(BATCH, 1, 1, 1))
    images = colors + contrasts * rng.normal(size=(BATCH, CHANNELS[0], IMAGE, IMAGE))
    view1 = images + 0.3 * rng.normal(size=images.shape)
    view2 = 0.5 * images + 0.7 + 0.3 * rng.normal(size=images.shape)
    return rounded(view1, dtype), rounded(view2, dtype)


def networks(dtype: torch.dtype = torch.float64) -> tuple[Network, Network]:
    """An online and a target network that differ everywhere, with numbers that `dtype` can hold."""
    rng = np.random.default_rng(7)
    online = oracle.init_network(rng, CHANNELS, HIDDEN, PROJECTION, predictor=True)
    target = oracle.init_network(rng, CHANNELS, HIDDEN, PROJECTION, predictor=False)
    for network in (online, target):
        network.parameters = {name: rounded(value, dtype) for name, value in network.parameters.items()}
    return online, target


class Encoder(nn.Module):
    """The oracle's encoder in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS[0], CHANNELS[1], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[1])
        self.conv2 = nn.Conv2d(CHANNELS[1], CHANNELS[2], 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS[2])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def head(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PROJECTION, bias=False)
    )


def module_name(name: str) -> str:
    """The oracle's name of a tensor, as `nn.Sequential` heads call it."""
    for layer, number in (("linear1", "0"), ("bn", "1"), ("linear2", "3")):
        name = name.replace(f"projector.{layer}.", f"projector.{number}.")
        name = name.replace(f"predictor.{layer}.", f"predictor.{number}.")
    return name


def load(module: nn.Module, network: Network) -> None:
    """Copy the oracle's numbers into a module; strict, so that neither side has a tensor that the other lacks."""
    tensors = network.parameters | network.buffers
    module.load_state_dict({module_name(name): torch.as_tensor(value) for name, value in tensors.items()}, strict=True)


def errors(actual: Mapping[str, Tensor], network: Network) -> dict[str, float]:
    """Error of each of a network's parameters and buffers; the count of batches has to be exact."""
    result = {}
    for name, expected in (network.parameters | network.buffers).items():
        got = actual[module_name(name)]
        if name.endswith("num_batches_tracked"):
            result[name] = 0.0 if float(got) == float(expected) else float("inf")
        else:
            result[name] = relative_error(got, expected)
    return result


def training(dtype: torch.dtype = torch.float64) -> oracle.Training:
    online, target = networks(dtype)
    return oracle.Training(online, target, SETTINGS)
