"""The package's numbers against `tests/oracle.py`: loss, gradient, tau, lr, LARS, EMA, and whole training steps.

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

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import byol_kernels
from byol_fast.config import OptimConfig
from byol_fast.data.batch import Batch
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule, lr_at, tau_at
from byol_fast.training.train_step import TrainStep
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


# ------------------------------------------------------------------------------------------------ loss

SHAPES = [
    pytest.param(1, 1, id="B1-D1"),
    pytest.param(1, 5, id="B1-D5"),
    pytest.param(4, 1, id="B4-D1"),
    pytest.param(7, 33, id="B7-D33"),
    pytest.param(16, 256, id="B16-D256"),
]


def rows(seed: int, batch: int, dim: int, dtype: torch.dtype) -> Array:
    """Random rows with norms from 0.01 to 100."""
    rng = np.random.default_rng(seed)
    return rounded(rng.normal(size=(batch, dim)) * 10.0 ** rng.uniform(-2, 2, size=(batch, 1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_normalized_mse_loss(batch: int, dim: int, dtype: torch.dtype) -> None:
    p, z = rows(1, batch, dim, dtype), rows(2, batch, dim, dtype)
    p_t, z_t = tensor(p, dtype).requires_grad_(), tensor(z, dtype).requires_grad_()
    loss = byol_kernels.normalized_mse_loss(p_t, z_t, eps=1e-12)
    p_grad, z_grad = gradients(3.0 * loss, p_t, z_t)
    assert relative_error(loss, oracle.regression_loss(p, z), floor=1.0) <= LOSS_TOLERANCES[dtype]
    # Row by row and in units of 1 / |p|, the natural size of the row's gradient: small gradients are not hidden by big.
    norm_B1 = np.linalg.norm(p, axis=1, keepdims=True)
    expected = 3.0 * oracle.regression_loss_gradient(p, z) * norm_B1 * batch
    assert relative_error(p_grad * norm_B1 * batch, expected, floor=1.0) <= LOSS_TOLERANCES[dtype]
    assert not z_grad.any(), "no gradient may reach the target"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_byol_loss(batch: int, dim: int, dtype: torch.dtype) -> None:
    p1, p2, z1, z2 = (rows(seed, batch, dim, dtype) for seed in range(4))
    tensors = [tensor(x, dtype).requires_grad_() for x in (p1, p2, z1, z2)]
    loss = byol_kernels.byol_loss(*tensors)
    grads = gradients(loss, *tensors)
    assert relative_error(loss, oracle.byol_loss(p1, p2, z1, z2), floor=1.0) <= LOSS_TOLERANCES[dtype]
    for grad, p, z in zip(grads[:2], (p1, p2), (z2, z1), strict=True):
        norm_B1 = np.linalg.norm(p, axis=1, keepdims=True)
        expected = oracle.regression_loss_gradient(p, z) * norm_B1 * batch
        assert relative_error(grad * norm_B1 * batch, expected, floor=1.0) <= LOSS_TOLERANCES[dtype]
    assert not any(grad.any() for grad in grads[2:]), "no gradient may reach the target"


def rows_with_a_zero(zero: str, dtype: torch.dtype) -> tuple[Array, Array]:
    p, z = rows(1, 4, 6, dtype), rows(2, 4, 6, dtype)
    if zero != "z":
        p[2] = 0.0
    if zero != "p":
        z[2] = 0.0
    return p, z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", ["p", "z", "both"])
def test_gradient_of_a_zero_row(zero: str, dtype: torch.dtype) -> None:
    p, z = rows_with_a_zero(zero, dtype)
    p_t = tensor(p, dtype).requires_grad_()
    (p_grad,) = gradients(byol_kernels.normalized_mse_loss(p_t, tensor(z, dtype), eps=1e-12), p_t)
    for got, want in zip(p_grad, oracle.regression_loss_gradient(p, z), strict=True):
        assert relative_error(got, want) <= LOSS_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("zero", "authors"), [("p", 1.0), ("z", 1.0), ("both", 0.0)])
def test_loss_of_a_zero_row(zero: str, authors: float, dtype: torch.dtype) -> None:
    """The one place where 2 - 2 cos is not the authors' sum of squares: a zero row has no direction.

    Its cosine is taken as 0, so that its loss is 2, as in every PyTorch package (`F.cosine_similarity`); the sum of
    squares would be 1 from a unit vector and 0 from another zero row. The gradients of both forms agree.
    """
    p, z = rows_with_a_zero(zero, dtype)
    loss = byol_kernels.normalized_mse_loss(tensor(p, dtype), tensor(z, dtype), eps=1e-12)
    expected = oracle.regression_loss(p, z) + (2.0 - authors) / len(p)
    assert relative_error(loss, expected, floor=1.0) <= LOSS_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_does_not_see_scale(dtype: torch.dtype) -> None:
    """Powers of two leave no rounding: the loss is the same number, the gradient shrinks by the factor."""
    p, z = rows(1, 5, 32, dtype), rows(2, 5, 32, dtype)
    results = []
    for scale_p, scale_z in ((1.0, 1.0), (8.0, 0.25)):
        p_t = tensor(scale_p * p, dtype).requires_grad_()
        loss = byol_kernels.normalized_mse_loss(p_t, tensor(scale_z * z, dtype), eps=1e-12)
        results.append((loss.item(), gradients(loss, p_t)[0] * scale_p))
    assert results[1][0] == pytest.approx(results[0][0], rel=LOSS_TOLERANCES[dtype])
    assert relative_error(results[1][1], results[0][1]) <= LOSS_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_ranges_from_0_to_8(dtype: torch.dtype) -> None:
    x, y = tensor(rows(1, 6, 40, dtype), dtype), tensor(rows(2, 6, 40, dtype), dtype)
    tolerance = 8 * LOSS_TOLERANCES[dtype]
    assert byol_kernels.byol_loss(x, y, y, x).item() == pytest.approx(0.0, abs=tolerance)
    assert byol_kernels.byol_loss(x, y, -y, -x).item() == pytest.approx(8.0, abs=tolerance)
    assert 0.0 <= byol_kernels.byol_loss(x, y, x, y).item() <= 8.0
    assert oracle.byol_loss(as_array(x), as_array(y), -as_array(y), -as_array(x)) == pytest.approx(8.0, abs=1e-12)


# ------------------------------------------------------------------------------------------------ schedules


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


# ------------------------------------------------------------------------------------------------ updates


def momentum_buffer(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    buffer = optimizer.state[parameter]["momentum_buffer"]
    assert isinstance(buffer, Tensor)
    return buffer


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


# ------------------------------------------------------------------------------------------------ the oracle itself


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


def test_oracle_loss_gradient_against_central_differences() -> None:
    p, z = rows(1, 4, 5, torch.float64), rows(2, 4, 5, torch.float64)
    gradient = oracle.regression_loss_gradient(p, z)
    for index in np.ndindex(p.shape):
        width = 1e-5 * float(np.linalg.norm(p[index[0]]))
        up, down = p.copy(), p.copy()
        up[index] += width
        down[index] -= width
        numeric = (oracle.regression_loss(up, z) - oracle.regression_loss(down, z)) / (2 * width)
        # Truncation width^2 / 6 * third derivative and cancellation 1e-16 / width, both 1e-10 in units of 1 / |p|.
        assert abs(numeric - gradient[index]) * float(np.linalg.norm(p[index[0]])) < 1e-9


def test_oracle_network_gradient_against_central_differences() -> None:
    """Every single parameter of the online network."""
    online, target = networks()
    view1, view2 = views(0)
    _, by_hand = oracle.loss_and_gradients(online.copy(), target.copy(), view1, view2)
    scale = max(float(np.abs(gradient).max()) for gradient in by_hand.values())

    # The target's side is constant, and the buffers that the passes move do not enter the loss.
    z1, z2 = oracle.project(target, view1), oracle.project(target, view2)

    def loss() -> float:
        p1, p2 = oracle.predict(online, view1, {})[0], oracle.predict(online, view2, {})[0]
        return oracle.byol_loss(p1, p2, z1, z2)

    width = 1e-6
    for name, parameter in online.parameters.items():
        numeric = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            kept = parameter[index]
            parameter[index] = kept + width
            up = loss()
            parameter[index] = kept - width
            numeric[index] = (up - loss()) / (2 * width)
            parameter[index] = kept
        # Cancellation: 1e-16 * loss / width = 1e-9 of the loss's own size.
        assert np.abs(numeric - by_hand[name]).max() < 1e-7 * scale, name


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


def test_oracle_against_autograd() -> None:
    """Loss, every gradient and every buffer, by a plain torch network that shares nothing with the package."""
    online, target = networks()
    torch_online = nn.ModuleDict({"encoder": Encoder(), "projector": head(CHANNELS[2]), "predictor": head(PROJECTION)})
    torch_target = nn.ModuleDict({"encoder": Encoder(), "projector": head(CHANNELS[2])})
    for module, network in ((torch_online.double(), online), (torch_target.double(), target)):
        load(module, network)
    view1, view2 = views(0)
    predictions, projections = [], []
    for view in (view1, view2):
        x = tensor(view, torch.float64)
        predictions.append(torch_online["predictor"](torch_online["projector"](torch_online["encoder"](x))))
        with torch.no_grad():
            projections.append(torch_target["projector"](torch_target["encoder"](x)))
    torch_loss = torch.zeros((), dtype=torch.float64)
    for p, z in zip(predictions, reversed(projections), strict=True):
        torch_loss = torch_loss + (F.normalize(p) - F.normalize(z)).square().sum(1).mean()
    names, parameters = zip(*torch_online.named_parameters(), strict=True)
    torch_gradients = dict(zip(names, gradients(torch_loss, *parameters), strict=True))

    loss, by_hand = oracle.loss_and_gradients(online, target, view1, view2)
    assert relative_error(torch_loss, loss) < 1e-13
    assert len(torch_gradients) == len(by_hand)
    for name, gradient in by_hand.items():
        assert relative_error(torch_gradients[module_name(name)], gradient) < 1e-12, name
    for module, network in ((torch_online, online), (torch_target, target)):
        assert max(errors(module.state_dict(), network).values()) < 1e-13


# ------------------------------------------------------------------------------------------------ training steps


def training(dtype: torch.dtype = torch.float64) -> oracle.Training:
    online, target = networks(dtype)
    return oracle.Training(online, target, SETTINGS)


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


# ------------------------------------------------------------------------------------------------ known mistakes
# Each replaces a part of the oracle by what some package has done, so that the oracle itself goes wrong in that way.

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
