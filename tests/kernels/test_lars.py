"""LARS: rule, fused EMA and copies against float64; loss scaling, invalid input."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byol_kernels import LARS, ema_update_
from tests.kernels.conftest import not_interpreted
from tests.kernels.numerics import Array, f64, is_close, randn, relative_error
from tests.kernels.test_ema import small_resnet
from tests.oracle import lars_update

HYPER = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 1e-3}


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    """New tensors, as a backward after `zero_grad(set_to_none=True)` leaves them."""
    for index, p in enumerate(params):
        grad = torch.empty_like(p)
        p.grad = grad.copy_(randn(tuple(p.shape), 1000 * seed + index) * 0.1)


class Expected:
    """Parameters, momentum buffers and targets of LARS with EMA in float64, by the oracle."""

    def __init__(self, params: list[nn.Parameter], target: list[Tensor] | None = None) -> None:
        self.p = [f64(p).copy() for p in params]
        self.v = [np.zeros_like(p) for p in self.p]
        self.t = [f64(t).copy() for t in target or []]

    def step(self, grads: list[Array], tau: float = 1.0, **hyper: float) -> None:
        for i, g in enumerate(grads):
            self.p[i], self.v[i] = lars_update(self.p[i], g, self.v[i], **hyper)
        self.t = [tau * t + (1 - tau) * p for t, p in zip(self.t, self.p, strict=False)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_five_steps_with_ema_match_float64(channels_last: bool, as_tensors: bool, device: str) -> None:
    """Learning rate and tau change at every step, as floats and as tensors on the device."""
    online, target = (small_resnet(seed, channels_last, device) for seed in (0, 1))
    params, targets = list(online.parameters()), list(target.parameters())
    expected = Expected(params, list(target.parameters()))
    lr, tau = torch.tensor(0.0, device=device), torch.tensor(0.0, device=device)
    optimizer = LARS(params, lr if as_tensors else 0.0, weight_decay=1e-2)
    for step in range(5):
        set_gradients(params, step)
        lr_now, tau_now = 0.1 * (step + 1), 0.9 + 0.02 * step
        expected.step([f64(p.grad) for p in params if p.grad is not None], tau_now, **{**HYPER, "lr": lr_now})
        if as_tensors:
            lr.fill_(lr_now)
            tau.fill_(tau_now)
        else:
            optimizer.param_groups[0]["lr"] = lr_now
        optimizer.step(ema=(targets, tau if as_tensors else tau_now))
    for i, p in enumerate(params):
        assert is_close(p, expected.p[i])
        assert is_close(optimizer.state[p]["momentum_buffer"], expected.v[i])
        assert is_close(targets[i], expected.t[i])


@pytest.mark.parametrize("constant", [False, True])
def test_norms_of_large_tensors_are_accurate(constant: bool, device: str) -> None:
    """Equal elements are the worst case of a long float32 sum: each addition is rounded the same way."""
    shape = (263, 1001)
    p = nn.Parameter((torch.full(shape, 0.13) if constant else randn(shape, 1)).to(device))
    p.grad = (torch.full(shape, 0.17) if constant else randn(shape, 2)).to(device)
    optimizer, expected = LARS([p], HYPER["lr"], weight_decay=HYPER["weight_decay"]), Expected([p])
    optimizer.step()
    expected.step([f64(p.grad)], **HYPER)
    assert relative_error(optimizer.state[p]["momentum_buffer"], expected.v[0]) <= 1e-6
    assert relative_error(p, expected.p[0]) <= 1e-6


def test_groups_have_their_own_hyperparameters(device: str) -> None:
    params = [nn.Parameter(randn(s, i).to(device)) for i, s in enumerate([(8, 9), (9,), (3, 4, 2), (5,)])]
    hypers = [{**HYPER, "lr": 0.3, "weight_decay": 0.5}, {**HYPER, "momentum": 0.5, "trust_coefficient": 0.02}]
    groups = [{"params": params[:2], **hypers[0]}, {"params": params[2:], **hypers[1], "exclude_1d": False}]
    optimizer = LARS(groups, lr=1.0)
    state = [np.zeros(tuple(p.shape)) for p in params]
    expected = [f64(p).copy() for p in params]
    for step in range(3):
        set_gradients(params, step)
        for i, p in enumerate(params):
            assert p.grad is not None
            before = [expected[i], f64(p.grad), state[i]]
            if i == 3:  # with exclude_1d=False a vector is adapted as a matrix of one row
                before = [x[None] for x in before]
            after = lars_update(*before, **hypers[i // 2])  # type: ignore[arg-type]
            expected[i], state[i] = (x.reshape(p.shape) for x in after)
        optimizer.step()
    assert all(is_close(p, e) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("zero", ["parameter", "gradient", "both"])
def test_trust_ratio_is_one_where_a_norm_is_zero(zero: str, device: str) -> None:
    p = nn.Parameter(randn((5, 5), 0).to(device) * (zero == "gradient"))
    p.grad = randn((5, 5), 1).to(device) * (zero == "parameter")
    expected, _ = lars_update(f64(p), f64(p.grad), np.zeros((5, 5)), **{**HYPER, "weight_decay": 0.0})
    LARS([p], HYPER["lr"], trust_coefficient=HYPER["trust_coefficient"]).step()
    assert is_close(p, expected)


@pytest.mark.parametrize("size", [1e9, 1e15])
def test_small_trust_ratio_is_accurate(size: float, device: str) -> None:
    """1 - ratio is 1 in float64 for a gradient of 1e15, which must still move the parameter."""
    p = nn.Parameter(randn((30, 40), 0).to(device))
    p.grad = size * randn((30, 40), 1).to(device)
    optimizer = LARS([p], HYPER["lr"], weight_decay=HYPER["weight_decay"])
    _, v = lars_update(f64(p), f64(p.grad), np.zeros((30, 40)), **HYPER)
    optimizer.step()
    assert is_close(optimizer.state[p]["momentum_buffer"], v)


def test_trust_ratio_is_not_that_of_larc(device: str) -> None:
    """r = c |p| / |g + wd p|, and not c |p| / (|g| + wd |p|), which agrees only where g and p are parallel."""
    p = nn.Parameter(torch.tensor([[3.0, 0.0]], device=device))
    p.grad = torch.tensor([[0.0, 4.0]], device=device)
    LARS([p], 1.0, weight_decay=1.0, trust_coefficient=1.0).step()
    # |p| = 3 and |d| = |(3, 4)| = 5, so p moves by 3/5 (3, 4); LARC's ratio is 3/7.
    torch.testing.assert_close(p.detach().cpu(), torch.tensor([[3.0 - 1.8, -2.4]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zero_momentum_matches_float64(weight_decay: float, device: str) -> None:
    p = nn.Parameter(randn((30, 40), 0).to(device))
    optimizer = LARS([p], 0.2, momentum=0.0, weight_decay=weight_decay)
    hyper = {**HYPER, "momentum": 0.0, "weight_decay": weight_decay}
    expected, v = f64(p).copy(), np.zeros((30, 40))
    for step in range(2):
        set_gradients([p], step)
        assert p.grad is not None
        expected, v = lars_update(expected, f64(p.grad), v, **hyper)
        optimizer.step()
        assert is_close(p, expected) and is_close(optimizer.state[p]["momentum_buffer"], v)


def test_lr_change_acts_at_once(device: str) -> None:
    """Doubling lr doubles the step at once, momentum included."""
    p = nn.Parameter(randn((4, 4), 0).to(device))
    optimizer = LARS([p], 0.1)
    set_gradients([p], 0)
    optimizer.step()
    v, before = optimizer.state[p]["momentum_buffer"].clone(), p.detach().clone()
    assert p.grad is not None
    p.grad.zero_()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 7.0 * 0.9 * v, rtol=1e-6, atol=1e-7)


def test_parameter_without_gradient_stays_and_its_target_moves(device: str) -> None:
    params = [nn.Parameter(randn((4, 4), i).to(device)) for i in range(3)]
    targets = [randn((4, 4), 10 + i).to(device) for i in range(3)]
    set_gradients(params, 0)
    params[1].grad = None
    before, old = params[1].detach().clone(), targets[1].clone()
    optimizer = LARS(params, 0.1)
    optimizer.step(ema=(targets, 0.5))
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert is_close(targets[1], 0.5 * f64(old) + 0.5 * f64(before))
    # A gradient that comes back later starts from zero momentum.
    set_gradients(params, 1)
    optimizer.step()
    assert params[1].grad is not None
    expected, _ = lars_update(
        f64(before),
        f64(params[1].grad),
        np.zeros((4, 4)),
        **{**HYPER, "lr": 0.1, "weight_decay": 0.0},
    )
    assert is_close(params[1], expected)


def test_step_without_any_gradient_moves_targets(device: str) -> None:
    p, t = nn.Parameter(randn((4,), 0).to(device)), randn((4,), 1).to(device)
    before, expected = p.detach().clone(), 0.9 * f64(t) + 0.1 * f64(p)
    LARS([p], 0.1).step(ema=([t], 0.9))
    assert torch.equal(p, before) and is_close(t, expected)


# -------------------------------------------------------------------------------- fused EMA and copies


def fused_and_separate(device: str) -> tuple[tuple[list[nn.Parameter], list[Tensor]], ...]:
    copies = []
    for _ in range(2):
        params = [nn.Parameter(randn(s, i).to(device)) for i, s in enumerate([(70, 80), (80,), (3, 5, 3, 3), (9, 4)])]
        copies.append((params, [randn(tuple(p.shape), 20 + i).to(device) for i, p in enumerate(params[:3])]))
    return tuple(copies)


def test_fused_step_equals_separate_steps(device: str) -> None:
    (params, targets), (params2, targets2) = fused_and_separate(device)
    copies = [torch.empty_like(p, dtype=torch.float16) for p in params]
    target_copies = [torch.empty_like(t, dtype=torch.float16) for t in targets]
    fused, separate = LARS(params, 0.3, weight_decay=1e-4), LARS(params2, 0.3, weight_decay=1e-4)
    for step in range(2):
        set_gradients(params, step)
        set_gradients(params2, step)
        mapping = dict(zip(params, targets, strict=False))
        to_copy: dict[Tensor, Tensor] = dict(zip([*params, *targets], [*copies, *target_copies], strict=True))
        fused.step(ema=(mapping, 0.97), copies=to_copy)
        separate.step()
        ema_update_(targets2, [p.detach() for p in params2[:3]], 0.97)
    assert all(torch.equal(a, b) for a, b in zip(params, params2, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(targets, targets2, strict=True))
    for a, c in to_copy.items():
        assert torch.equal(c, a.detach().half())


def test_target_list_with_gaps_equals_mapping(device: str) -> None:
    (params, targets), (params2, targets2) = fused_and_separate(device)
    set_gradients(params, 0)
    set_gradients(params2, 0)
    LARS(params, 0.3).step(ema=([targets[0], None, targets[2], None], 0.9), copies=None)
    LARS(params2, 0.3).step(ema=({params2[0]: targets2[0], params2[2]: targets2[2]}, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(targets, targets2, strict=True))


def test_copies_of_some_parameters_are_written(device: str) -> None:
    params = [nn.Parameter(randn((6, 7), i).to(device)) for i in range(3)]
    copies = [torch.full((6, 7), 7.0, dtype=torch.float16, device=device) for _ in range(3)]
    set_gradients(params, 0)
    LARS(params, 0.1).step(copies=[copies[0], None, copies[2]])
    assert torch.equal(copies[0], params[0].half()) and torch.equal(copies[2], params[2].half())
    assert bool((copies[1] == 7.0).all())


# -------------------------------------------------------------------------------- loss scaling


def scaler(device: str, scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=scale)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_loss_scale_is_removed_on_the_device(unscale_first: bool, device: str) -> None:
    p, q = (nn.Parameter(randn((20, 30), 0).to(device)) for _ in range(2))
    x = randn((20, 30), 1).to(device)
    plain, scaled = LARS([p], 0.5, weight_decay=0.1), LARS([q], 0.5, weight_decay=0.1)
    amp = scaler(device, 1024.0)
    for _ in range(2):
        plain.zero_grad()
        scaled.zero_grad()
        (p * x).sum().backward()  # type: ignore[no-untyped-call]
        plain.step()
        amp.scale((q * x).sum()).backward()  # type: ignore[no-untyped-call]
        if unscale_first:
            amp.unscale_(scaled)
        amp.step(scaled)
        amp.update()
    assert torch.equal(p, q)  # a power of two costs no rounding


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_gradient_with_grad_scaler_skips_the_step(value: float, device: str) -> None:
    params = [nn.Parameter(randn((5, 6), i).to(device)) for i in range(2)]
    targets = [randn((5, 6), 5 + i).to(device) for i in range(2)]
    copies = [torch.full((5, 6), 7.0, dtype=torch.bfloat16, device=device) for _ in range(2)]
    optimizer, amp = LARS(params, 0.5), scaler(device, 8.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        amp.scale(params[0].sum() + params[1].sum() * factor).backward()  # type: ignore[no-untyped-call]
        amp.step(optimizer, ema=(targets, 0.5), copies=copies)
        amp.update()

    step(1.0)
    written = [*params, *targets, *copies, *(optimizer.state[p]["momentum_buffer"] for p in params)]
    before = [x.detach().clone() for x in written]
    step(value)
    assert all(torch.equal(x, b) for x, b in zip(written, before, strict=True))
    assert amp.get_scale() == 4.0
    step(1.0)
    assert not any(torch.equal(x, b) for x, b in zip(written[:4], before[:4], strict=True))
    assert all(x.isfinite().all() for x in written)


# -------------------------------------------------------------------------------- as an optimizer


def test_step_with_closure_scheduler_and_autocast(device: str) -> None:
    p = nn.Parameter(randn((4, 4), 0).to(device))
    q = nn.Parameter(p.detach().clone())
    optimizer = LARS([p], 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    plain = LARS([q], 1.0)
    for step in range(3):
        with torch.autocast(device, torch.bfloat16):
            loss = optimizer.step(closure)
        schedule.step()
        q.grad = 2 * q.detach()
        plain.param_groups[0]["lr"] = 1.0 / (step + 1)
        assert loss.item() == pytest.approx(q.square().sum().item(), rel=1e-6)
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_autograd_detects_update_of_saved_tensors(device: str) -> None:
    """A graph that saved an old parameter or target must refuse to run backward, as after any in-place operation."""
    p, target = nn.Parameter(randn((4, 4), 0).to(device)), randn((4, 4), 1).to(device).requires_grad_()
    losses = [p.square().sum(), target.square().sum()]
    set_gradients([p], 0)
    LARS([p], 0.1).step(ema=([target.detach()], 0.5))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


@not_interpreted
def test_operator_checks(device: str) -> None:
    params = [randn((4, 5), 0).to(device), randn((3,), 1).to(device)]
    args: tuple[Any, ...] = (
        params, [randn((4, 5), 2).to(device), randn((3,), 3).to(device)], [torch.zeros_like(p) for p in params], [0, 1],
        [randn((4, 5), 4).to(device)], [0], [torch.zeros_like(params[1], dtype=torch.bfloat16)], [1],
        [torch.zeros_like(params[0], dtype=torch.bfloat16)], [0], [0, 1], [True, False],
        [torch.tensor(0.1, device=device), None], [0.0, 0.2], [0.9, 0.9], [0.1, 0.0], [1e-3, 1e-3],
        torch.tensor(0.5, device=device), 0.0, torch.tensor(2.0, device=device), torch.tensor(0.0, device=device),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.byol_kernels.lars_step_, args)
    args[0][0].requires_grad_()  # as the optimizer passes them, under no_grad: there is no autograd to check
    torch.library.opcheck(torch.ops.byol_kernels.lars_step_, args, test_utils=("test_schema", "test_faketensor"))


def _step(ema: Any = None, copies: Any = None) -> Callable[[LARS], Any]:
    return lambda optimizer: optimizer.step(ema=ema, copies=copies)


def _overlapping_targets(optimizer: LARS) -> None:
    whole = torch.zeros(20)
    optimizer.step(ema=([whole.view(4, 5), whole[:3]], 0.5))


INVALID: dict[str, tuple[Callable[[LARS], Any], str]] = {
    "short_targets": (
        _step(([torch.zeros(4, 5)], 0.5)),
        "ema targets must have one entry for each of the 2 parameters, got 1",
    ),
    "target_shape": (_step(([torch.zeros(5, 4), None], 0.5)), r"target\[0\] must have the shape of params\[0\]"),
    "target_layout": (_step(([torch.zeros(5, 4).mT, None], 0.5)), r"target\[0\] must have the strides of params\[0\]"),
    "target_key": (_step(({torch.zeros(4, 5): torch.zeros(4, 5)}, 0.5)), "ema targets must map tensors of this step"),
    "copies_key": (_step(copies={torch.zeros(4, 5): torch.zeros(4, 5)}), "copies must map tensors of this step"),
    "tau": (_step(([torch.zeros(4, 5), None], 2.0)), "LARS.step: tau must be from 0 to 1, got 2.0"),
    "overlapping_targets": (_overlapping_targets, "must not share memory"),
    "target_is_parameter": (lambda o: o.step(ema=(o.param_groups[0]["params"], 0.5)), "must not share memory"),
    "copy_is_gradient": (
        lambda o: o.step(copies=[p.grad for p in o.param_groups[0]["params"]]),
        "must not share memory",
    ),
}


@pytest.mark.parametrize(("step", "message"), INVALID.values(), ids=INVALID)
def test_invalid_lists_raise_before_any_write(step: Callable[[LARS], Any], message: str) -> None:
    params = [nn.Parameter(randn((4, 5), 0)), nn.Parameter(randn((3,), 1))]
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        step(LARS(params, 0.1))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_tied_and_sparse_gradients_raise() -> None:
    params = [nn.Parameter(randn((4, 5), 0)), nn.Parameter(randn((4, 5), 1))]
    params[0].grad = params[1].data
    params[1].grad = randn((4, 5), 2)
    with pytest.raises(ValueError, match=r"params\[1\] must not share memory with grads\[0\]"):
        LARS(params, 0.1).step()
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="must be dense, got torch.sparse_coo"):
        LARS(embedding.parameters(), 0.1).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": torch.ones(2)}, "0-dim"),
        ({"lr": 0.1, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"lr": 0.1, "weight_decay": -1e-6}, "weight_decay must be finite"),
        ({"lr": 0.1, "trust_coefficient": float("inf")}, "trust_coefficient must be finite"),
    ],
)
def test_hyperparameters_out_of_range_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.zeros(2))], **options)
