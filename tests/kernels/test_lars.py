"""LARS: the reference's rule against float64, its checkpoints, its loss scaling, and the fused average and copies."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from byol_kernels import LARS, ema_update_
from byol_kernels._multi_tensor import same_layout
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.restatement import Array, close, error, f64, lars, make
from tests.kernels.test_ema import laid_out, small_resnet

HYPER = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, "eta": 1e-3}


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    """New tensors, as a backward after `zero_grad(set_to_none=True)` leaves them."""
    for index, p in enumerate(params):
        grad = torch.empty_like(p)
        p.grad = grad.copy_(make(tuple(p.shape), 1000 * seed + index) * 0.1)


class Restated:
    """Five steps of LARS and the moving average in float64, for parameters and targets in lists."""

    def __init__(self, params: list[nn.Parameter], target: list[Tensor] | None = None) -> None:
        self.p = [f64(p).copy() for p in params]
        self.v = [np.zeros_like(p) for p in self.p]
        self.t = [f64(t).copy() for t in target or []]

    def step(self, grads: list[Array], tau: float = 1.0, **hyper: float) -> None:
        for i, g in enumerate(grads):
            self.p[i], self.v[i] = lars(self.p[i], g, self.v[i], excluded=self.p[i].ndim <= 1, **hyper)
        self.t = [tau * t + (1 - tau) * p for t, p in zip(self.t, self.p, strict=False)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_five_steps_with_ema_match_float64(channels_last: bool, as_tensors: bool, device: str) -> None:
    """Learning rate and tau change at every step, as floats and as tensors on the device."""
    online, target = (small_resnet(seed, channels_last, device) for seed in (0, 1))
    params, targets = list(online.parameters()), list(target.parameters())
    expected = Restated(params, list(target.parameters()))
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
        assert close(p, expected.p[i])
        assert close(optimizer.state[p]["momentum_buffer"], expected.v[i])
        assert close(targets[i], expected.t[i])


@pytest.mark.parametrize("constant", [False, True])
def test_norms_of_large_tensors_keep_their_digits(constant: bool, device: str) -> None:
    """Equal elements are the worst case of a long float32 sum: each addition is rounded the same way."""
    shape = (263, 1001)
    p = nn.Parameter((torch.full(shape, 0.13) if constant else make(shape, 1)).to(device))
    p.grad = (torch.full(shape, 0.17) if constant else make(shape, 2)).to(device)
    optimizer, expected = LARS([p], HYPER["lr"], weight_decay=HYPER["weight_decay"]), Restated([p])
    optimizer.step()
    expected.step([f64(p.grad)], **HYPER)
    assert error(optimizer.state[p]["momentum_buffer"], expected.v[0]) <= 1e-6
    assert error(p, expected.p[0]) <= 1e-6


def test_groups_have_their_own_hyperparameters(device: str) -> None:
    params = [nn.Parameter(make(s, i).to(device)) for i, s in enumerate([(8, 9), (9,), (3, 4, 2), (5,)])]
    hypers = [{**HYPER, "lr": 0.3, "weight_decay": 0.5}, {**HYPER, "momentum": 0.5, "eta": 0.02}]
    groups = [{"params": params[:2], **hypers[0]}, {"params": params[2:], **hypers[1], "exclude_1d": False}]
    optimizer = LARS(groups, lr=1.0)
    state = [np.zeros(tuple(p.shape)) for p in params]
    expected = [f64(p).copy() for p in params]
    for step in range(3):
        set_gradients(params, step)
        for i, p in enumerate(params):
            assert p.grad is not None
            expected[i], state[i] = lars(expected[i], f64(p.grad), state[i], excluded=i == 1, **hypers[i // 2])
        optimizer.step()
    assert all(close(p, e) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("zero", ["parameter", "gradient", "both"])
def test_ratio_is_one_where_a_norm_is_zero(zero: str, device: str) -> None:
    p = nn.Parameter(make((5, 5), 0).to(device) * (zero == "gradient"))
    p.grad = make((5, 5), 1).to(device) * (zero == "parameter")
    expected, _ = lars(f64(p), f64(p.grad), np.zeros((5, 5)), **{**HYPER, "weight_decay": 0.0}, excluded=False)
    LARS([p], HYPER["lr"], eta=HYPER["eta"]).step()
    assert close(p, expected)


@pytest.mark.parametrize("size", [1e9, 1e15])
def test_small_ratio_keeps_its_digits(size: float, device: str) -> None:
    """1 - ratio is 1 in float64 for a gradient of 1e15, which must still move the parameter by eta |p|."""
    p = nn.Parameter(make((30, 40), 0).to(device))
    p.grad = size * make((30, 40), 1).to(device)
    optimizer = LARS([p], HYPER["lr"], weight_decay=HYPER["weight_decay"])
    _, v = lars(f64(p), f64(p.grad), np.zeros((30, 40)), **HYPER, excluded=False)
    optimizer.step()
    assert close(optimizer.state[p]["momentum_buffer"], v)


def test_it_is_not_the_rule_of_larc(device: str) -> None:
    """r = eta |p| / |g + wd p|, and not eta |p| / (|g| + wd |p|), which agrees only where g and p are parallel."""
    p = nn.Parameter(torch.tensor([[3.0, 0.0]], device=device))
    p.grad = torch.tensor([[0.0, 4.0]], device=device)
    LARS([p], 1.0, weight_decay=1.0, eta=1.0).step()
    # |p| = 3 and |d| = |(3, 4)| = 5, so p moves by 3/5 (3, 4); LARC's ratio is 3/7.
    torch.testing.assert_close(p.detach().cpu(), torch.tensor([[3.0 - 1.8, -2.4]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_momentum(weight_decay: float, device: str) -> None:
    p = nn.Parameter(make((30, 40), 0).to(device))
    optimizer = LARS([p], 0.2, momentum=0.0, weight_decay=weight_decay)
    hyper = {**HYPER, "momentum": 0.0, "weight_decay": weight_decay}
    expected, v = f64(p).copy(), np.zeros((30, 40))
    for step in range(2):
        set_gradients([p], step)
        assert p.grad is not None
        expected, v = lars(expected, f64(p.grad), v, **hyper, excluded=False)
        optimizer.step()
        assert close(p, expected) and close(optimizer.state[p]["momentum_buffer"], v)


def test_momentum_holds_no_learning_rate(device: str) -> None:
    """Doubling lr doubles the step at once, momentum included."""
    p = nn.Parameter(make((4, 4), 0).to(device))
    optimizer = LARS([p], 0.1)
    set_gradients([p], 0)
    optimizer.step()
    v, before = optimizer.state[p]["momentum_buffer"].clone(), p.detach().clone()
    assert p.grad is not None
    p.grad.zero_()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 7.0 * 0.9 * v, rtol=1e-6, atol=1e-7)


def test_parameters_without_a_gradient_stay_and_their_targets_move(device: str) -> None:
    params = [nn.Parameter(make((4, 4), i).to(device)) for i in range(3)]
    targets = [make((4, 4), 10 + i).to(device) for i in range(3)]
    set_gradients(params, 0)
    params[1].grad = None
    before, old = params[1].detach().clone(), targets[1].clone()
    optimizer = LARS(params, 0.1)
    optimizer.step(ema=(targets, 0.5))
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert close(targets[1], 0.5 * f64(old) + 0.5 * f64(before))
    # A gradient that comes back later starts from zero momentum.
    set_gradients(params, 1)
    optimizer.step()
    assert params[1].grad is not None
    expected, _ = lars(
        f64(before), f64(params[1].grad), np.zeros((4, 4)), **{**HYPER, "lr": 0.1, "weight_decay": 0.0}, excluded=False
    )
    assert close(params[1], expected)


def test_no_gradient_at_all(device: str) -> None:
    p, t = nn.Parameter(make((4,), 0).to(device)), make((4,), 1).to(device)
    before, expected = p.detach().clone(), 0.9 * f64(t) + 0.1 * f64(p)
    LARS([p], 0.1).step(ema=([t], 0.9))
    assert torch.equal(p, before) and close(t, expected)


# -------------------------------------------------------------------------------- the fused average and copies


def fused_and_separate(device: str) -> tuple[tuple[list[nn.Parameter], list[Tensor]], ...]:
    made = []
    for _ in range(2):
        params = [nn.Parameter(make(s, i).to(device)) for i, s in enumerate([(70, 80), (80,), (3, 5, 3, 3), (9, 4)])]
        made.append((params, [make(tuple(p.shape), 20 + i).to(device) for i, p in enumerate(params[:3])]))
    return tuple(made)


def test_fused_step_is_the_separate_steps(device: str) -> None:
    (params, targets), (params2, targets2) = fused_and_separate(device)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    target_copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets]
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
        assert torch.equal(c, a.detach().bfloat16())


def test_targets_as_a_list_with_gaps(device: str) -> None:
    (params, targets), (params2, targets2) = fused_and_separate(device)
    set_gradients(params, 0)
    set_gradients(params2, 0)
    LARS(params, 0.3).step(ema=([targets[0], None, targets[2], None], 0.9), copies=None)
    LARS(params2, 0.3).step(ema=({params2[0]: targets2[0], params2[2]: targets2[2]}, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(targets, targets2, strict=True))


def test_copies_of_some_parameters(device: str) -> None:
    params = [nn.Parameter(make((6, 7), i).to(device)) for i in range(3)]
    copies = [torch.full((6, 7), 7.0, dtype=torch.float16, device=device) for _ in range(3)]
    set_gradients(params, 0)
    LARS(params, 0.1).step(copies=[copies[0], None, copies[2]])
    assert torch.equal(copies[0], params[0].half()) and torch.equal(copies[2], params[2].half())
    assert bool((copies[1] == 7.0).all())


# -------------------------------------------------------------------------------- loss scaling


def scaler(device: str, scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=scale)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_loss_scale_is_taken_off_on_the_device(unscale_first: bool, device: str) -> None:
    p, q = (nn.Parameter(make((20, 30), 0).to(device)) for _ in range(2))
    x = make((20, 30), 1).to(device)
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


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_gradient_skips_everything(bad: float, device: str) -> None:
    params = [nn.Parameter(make((5, 6), i).to(device)) for i in range(2)]
    targets = [make((5, 6), 5 + i).to(device) for i in range(2)]
    copies = [torch.full((5, 6), 7.0, dtype=torch.bfloat16, device=device) for _ in range(2)]
    optimizer, amp = LARS(params, 0.5), scaler(device, 8.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        amp.scale(params[0].sum() + params[1].sum() * factor).backward()  # type: ignore[no-untyped-call]
        amp.step(optimizer, ema=(targets, 0.5), copies=copies)
        amp.update()

    step(1.0)
    everything = [*params, *targets, *copies, *(optimizer.state[p]["momentum_buffer"] for p in params)]
    before = [x.detach().clone() for x in everything]
    step(bad)
    assert all(torch.equal(x, b) for x, b in zip(everything, before, strict=True))
    assert amp.get_scale() == 4.0
    step(1.0)
    assert not any(torch.equal(x, b) for x, b in zip(everything[:4], before[:4], strict=True))
    assert all(x.isfinite().all() for x in everything)


# -------------------------------------------------------------------------------- layouts, dtypes, checkpoints


@st.composite
def parameter_lists(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params, grads, targets = [], [], []
    layout = st.sampled_from(["contiguous", "transposed", "channels_last", "unaligned"])
    for seed in range(draw(st.integers(1, 5))):
        shape = draw(
            st.one_of(
                st.tuples(st.sampled_from([0, 1, 130])),
                st.tuples(st.integers(1, 90), st.integers(1, 90)),
                st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
            )
        )
        like = draw(layout)
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        params.append(laid_out(make(shape, 3 * seed, dtype), like))
        grads.append(laid_out(make(shape, 3 * seed + 1, dtype), draw(layout)))
        targets.append(laid_out(make(shape, 3 * seed + 2), like))
    return params, grads, targets


@settings(max_examples=10 if INTERPRETED else 50, deadline=None)
@given(lists=parameter_lists(), weight_decay=st.sampled_from([0.0, 1e-3, 0.5]))
def test_any_lists_match_float64(lists: tuple[list[Tensor], list[Tensor], list[Tensor]], weight_decay: float) -> None:
    values, grads, targets = lists
    params = [nn.Parameter(v) for v in values]
    # Momentum and target have the layout of the parameter; the gradient's is its own.
    targets = [torch.empty_like(p.detach(), dtype=t.dtype).copy_(t) for p, t in zip(params, targets, strict=True)]
    expected = Restated(params, targets)
    optimizer = LARS(params, 0.2, weight_decay=weight_decay)
    for _ in range(2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone(memory_format=torch.preserve_format)
        expected.step([f64(g) for g in grads], 0.9, **{**HYPER, "weight_decay": weight_decay})
        optimizer.step(ema=(targets, 0.9))
    for i, p in enumerate(params):
        if p.numel():
            # The kernel takes norms and scalars in float32 whatever the parameters are.
            dtype = torch.float32 if INTERPRETED else p.dtype
            assert close(p, expected.p[i], dtype)
            assert close(targets[i], expected.t[i], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_computed_in_float32(dtype: torch.dtype, device: str) -> None:
    p = nn.Parameter(make((300, 50), 0, dtype).to(device))
    p.grad = make((300, 50), 1, dtype).to(device)
    expected, v = lars(f64(p), f64(p.grad), np.zeros((300, 50)), **HYPER, excluded=False)
    optimizer = LARS([p], HYPER["lr"], weight_decay=HYPER["weight_decay"])
    optimizer.step()
    assert p.dtype == dtype and error_in_ulps(p, expected) <= (1.01 if INTERPRETED else 0.51)
    assert close(optimizer.state[p]["momentum_buffer"], v)


def error_in_ulps(x: Tensor, expected: Array) -> float:
    ulp = torch.finfo(x.dtype).eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(expected), 1e-3)))
    return float(np.max(np.abs(f64(x) - expected) / ulp))


def test_a_checkpoint_of_the_other_layout_changes_nothing(device: str) -> None:
    """A checkpoint written by a contiguous network continues a channels_last one, momentum included."""
    nets = [small_resnet(0, False, device), small_resnet(0, True, device)]
    optimizers = [LARS(net.parameters(), 0.5, weight_decay=0.1) for net in nets]
    set_gradients(list(nets[0].parameters()), 0)
    optimizers[0].step()
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers, strict=True):
        set_gradients(list(net.parameters()), 1)
        optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert a.shape == b.shape and close(b, f64(a))
        assert same_layout(optimizers[1].state[b]["momentum_buffer"], b)


def test_state_dict_is_plain_and_continues_bit_for_bit(device: str) -> None:
    first = small_resnet(0, False, device)
    optimizer = LARS(first.parameters(), 0.5, weight_decay=0.1)
    assert optimizer.state_dict()["state"] == {}
    set_gradients(list(first.parameters()), 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())

    second = copy.deepcopy(first)
    resumed = LARS(second.parameters(), 9.0)
    resumed.load_state_dict(copy.deepcopy(state))
    for net, opt in ((first, optimizer), (second, resumed)):
        set_gradients(list(net.parameters()), 1)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_gradients_that_move_or_change_layout_are_followed(device: str) -> None:
    """The table of addresses is cached; a gradient in other memory, or in the same memory the other way, is seen."""
    p = nn.Parameter(make((6, 6), 0).to(device))
    optimizer = LARS([p], 0.1)
    memory = make((36,), 1).to(device)
    expected, v = f64(p).copy(), np.zeros((6, 6))
    for grad in (memory.view(6, 6), memory.view(6, 6).t(), memory.view(6, 6), memory.clone().view(6, 6) * 2):
        p.grad = grad
        expected, v = lars(expected, f64(grad), v, **{**HYPER, "lr": 0.1, "weight_decay": 0.0}, excluded=False)
        optimizer.step()
        assert close(p, expected)


# -------------------------------------------------------------------------------- as an optimizer


def test_closure_scheduler_and_autocast(device: str) -> None:
    p = nn.Parameter(make((4, 4), 0).to(device))
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


@not_interpreted
def test_operator_checks(device: str) -> None:
    params = [make((4, 5), 0).to(device), make((3,), 1).to(device)]
    args: tuple[Any, ...] = (
        params, [make((4, 5), 2).to(device), make((3,), 3).to(device)], [torch.zeros_like(p) for p in params], [0, 1],
        [make((4, 5), 4).to(device)], [0], [torch.zeros_like(params[1], dtype=torch.bfloat16)], [1],
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


BAD: dict[str, tuple[Callable[[LARS], Any], str]] = {
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


@pytest.mark.parametrize(("step", "message"), BAD.values(), ids=BAD)
def test_refuses_before_anything_is_written(step: Callable[[LARS], Any], message: str) -> None:
    params = [nn.Parameter(make((4, 5), 0)), nn.Parameter(make((3,), 1))]
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        step(LARS(params, 0.1))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_refuses_tied_and_sparse_gradients() -> None:
    params = [nn.Parameter(make((4, 5), 0)), nn.Parameter(make((4, 5), 1))]
    params[0].grad = params[1].data
    params[1].grad = make((4, 5), 2)
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
        ({"lr": 0.1, "eta": float("inf")}, "eta must be finite"),
    ],
)
def test_refuses_hyperparameters_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.zeros(2))], **options)
