"""LARS and non-finite gradients: the step finds them, sets `found_inf` and writes nothing else."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from byol_kernels import LARS
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.numerics import f64, is_close, randn
from tests.kernels.test_ema import FLOATS
from tests.kernels.test_lars_layouts import parameter_lists
from tests.oracle import lars_update

HYPER = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 1e-3}
NON_FINITE = [float("nan"), float("inf"), float("-inf")]

SHAPES = {
    "adapted": (70, 80),  # a whole chunk of 4096 elements, and a part of one
    "large": (2, 4099),
    "without_gradient": (6, 7),
    "one_dim": (130,),
    "large_one_dim": (9000,),
    "scalar": (),
    "adapted_one_dim": (33,),  # in a group with exclude_1d=False
}
PLACES = {
    "first_element": ("adapted", 0),
    "whole_chunk": ("adapted", 4095),
    "last_element_in_a_part_of_a_chunk": ("adapted", -1),
    "second_chunk": ("large", 5000),
    "last_of_three_chunks": ("large", -1),
    "one_dim": ("one_dim", 0),
    "end_of_one_dim": ("one_dim", -1),
    "first_chunk_of_one_dim": ("large_one_dim", 3000),
    "last_chunk_of_one_dim": ("large_one_dim", -1),
    "scalar": ("scalar", 0),
    "group_that_adapts_one_dim": ("adapted_one_dim", -1),
}


class Run(NamedTuple):
    """An optimizer and all tensors that its step writes."""

    params: dict[str, nn.Parameter]
    targets: list[Tensor]
    copies: list[Tensor]
    optimizer: LARS

    def written(self) -> list[Tensor]:
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.params.values(), *self.targets, *self.copies, *momentum]

    def step(self, grads: dict[str, Tensor]) -> None:
        set_gradients(self.params, grads)
        self.optimizer.step(ema=(self.targets, 0.9), copies=self.copies)


def build_run(device: str, dtype: torch.dtype = torch.float32) -> Run:
    params = {name: nn.Parameter(randn(SHAPES[name], i, dtype, device=device)) for i, name in enumerate(SHAPES)}
    targets = [randn(tuple(p.shape), 20 + i, dtype, device=device) for i, p in enumerate(params.values())]
    copies = [torch.full_like(p, 7.0, dtype=torch.bfloat16, requires_grad=False) for p in params.values()]
    groups = [
        {"params": [p for name, p in params.items() if name != "adapted_one_dim"]},
        {"params": [params["adapted_one_dim"]], "exclude_1d": False},
    ]
    return Run(params, targets, copies, LARS(groups, **HYPER))  # type: ignore[arg-type]


def set_gradients(params: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for name, p in params.items():
        p.grad = None
        if name in grads:
            p.grad_dtype = grads[name].dtype
            p.grad = grads[name]


def random_gradients(seed: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    return {
        name: randn(shape, 100 * seed + i, dtype, device=device)
        for i, (name, shape) in enumerate(SHAPES.items())
        if name != "without_gradient"
    }


def scalar(device: str, value: float = 0.0) -> Tensor:
    return torch.tensor(value, device=device)


def same_bits(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """NaN equals NaN."""
    return len(tensors) == len(others) and all(
        a.dtype == b.dtype
        and torch.equal(a.detach().flatten().view(torch.uint8), b.detach().flatten().view(torch.uint8))
        for a, b in zip(tensors, others, strict=True)
    )


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def expected_flag(grads: list[Tensor]) -> float:
    return float(not all(bool(torch.isfinite(g).all()) for g in grads))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_gradient_sets_the_flag_and_skips(dtype: torch.dtype, device: str) -> None:
    """The steps around skipped ones are those of an optimizer that never saw them and has no flag."""
    run, other = build_run(device), build_run(device)
    found_inf = run.optimizer.found_inf = scalar(device)
    run.step(random_gradients(0, dtype, device))
    other.step(random_gradients(0, dtype, device))
    assert found_inf.item() == 0.0
    before = clones(run.written())
    for i, (place, (row, element)) in enumerate(PLACES.items()):
        grads = random_gradients(1, dtype, device)
        grads[row].view(-1)[element] = NON_FINITE[(i + FLOATS.index(dtype)) % 3]
        grads_before = clones(list(grads.values()))
        found_inf.zero_()
        versions = found_inf._version, *(g._version for g in grads.values())
        run.step(grads)
        assert found_inf.item() == expected_flag(list(grads.values())) == 1.0, place
        assert same_bits(run.written(), before) and same_bits(list(grads.values()), grads_before), place
        assert found_inf._version > versions[0]
        assert versions[1:] == tuple(g._version for g in grads.values())
    found_inf.zero_()
    run.step(random_gradients(2, dtype, device))
    other.step(random_gradients(2, dtype, device))
    assert found_inf.item() == 0.0
    assert same_bits(run.written(), other.written())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_flag_set_on_entry_skips_and_stays(shape: tuple[int, ...], device: str) -> None:
    run = build_run(device)
    run.step(random_gradients(0, torch.float32, device))
    run.optimizer.found_inf = torch.ones(shape, device=device)
    before = clones(run.written())
    for grads in (random_gradients(1, torch.float32, device), {}):
        run.step(grads)
        assert run.optimizer.found_inf.item() == 1.0
        assert same_bits(run.written(), before)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e30),
        (torch.float16, 65504.0),
        (torch.float64, 1e300),
    ],
    ids=str,
)
def test_large_finite_gradients_are_not_skipped(dtype: torch.dtype, size: float, device: str) -> None:
    """Squares of 1e30 overflow in float32, of 1e300 in float64; the ratio is that of a step without a flag."""
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    run, other = build_run(device, param_dtype), build_run(device, param_dtype)
    found_inf = run.optimizer.found_inf = scalar(device)
    grads = {name: torch.full_like(g, size) for name, g in random_gradients(0, dtype, device).items()}
    before = {name: f64(p).copy() for name, p in run.params.items()}
    run.step(grads)
    other.step(grads)
    assert expected_flag(list(grads.values())) == found_inf.item() == 0.0
    assert same_bits(run.written(), other.written())
    for name in ("one_dim", "adapted"):
        is_vector = name == "one_dim"
        if is_vector or size * size * grads[name].numel() < torch.finfo(torch.float32).max:
            p, g = before[name], f64(grads[name])
            expected = p - HYPER["lr"] * g if is_vector else lars_update(p, g, 0 * p, **HYPER)[0]
            np.testing.assert_allclose(f64(run.params[name]), expected, rtol=1e-6, atol=1e-7)


def test_float64_gradient_beyond_float32_is_finite(device: str) -> None:
    """Each gradient is checked in its own dtype, although a float32 parameter's is rounded to float32."""
    run = build_run(device)
    found_inf = run.optimizer.found_inf = scalar(device)
    grads = {name: torch.full_like(g, 1e300) for name, g in random_gradients(0, torch.float64, device).items()}
    run.step(grads)
    assert expected_flag(list(grads.values())) == found_inf.item() == 0.0


@pytest.mark.parametrize("value", NON_FINITE)
def test_nonfinite_parameter_does_not_set_the_flag(value: float, device: str) -> None:
    run, other = build_run(device), build_run(device)
    found_inf = run.optimizer.found_inf = scalar(device)
    for r in (run, other):
        with torch.no_grad():
            for p in r.params.values():
                p.view(-1)[-1] = value
        r.step(random_gradients(0, torch.float32, device))
    assert found_inf.item() == 0.0
    assert same_bits(run.written(), other.written())


@pytest.mark.parametrize("scale", [1024.0, 2.0**-100])
def test_flag_ignores_loss_scale(scale: float, device: str) -> None:
    """Gradients are checked before they are unscaled: a scale below 1 overflows what was finite."""
    run, other = build_run(device), build_run(device)
    found_inf = run.optimizer.found_inf = scalar(device)
    run.optimizer.grad_scale = other.optimizer.grad_scale = scalar(device, scale)
    grads = random_gradients(0, torch.float32, device)
    p, g = f64(run.params["one_dim"]), f64(grads["one_dim"]) / scale
    run.step(grads)
    other.step(grads)
    assert found_inf.item() == 0.0
    assert same_bits(run.written(), other.written())
    assert is_close(run.params["one_dim"], lars_update(p, g, np.zeros_like(p), **HYPER)[0])

    large = {name: torch.full_like(g, 1e20) for name, g in grads.items()}
    run.step(large)
    assert found_inf.item() == expected_flag(list(large.values())) == 0.0

    grads["adapted"][3, 4] = float("inf")
    before = clones(run.written())
    run.step(grads)
    assert found_inf.item() == 1.0
    assert same_bits(run.written(), before)


def test_grad_scaler_flag_skips_the_step(device: str) -> None:
    """`GradScaler` hands over a flag that it has set itself, and halves its scale."""
    run = build_run(device)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    run.step(random_gradients(0, torch.float32, device))
    scaler.scale(torch.ones((), device=device))
    for place in ("one_dim", None, "large"):
        before, scale = clones(run.written()), scaler.get_scale()
        grads = random_gradients(1, torch.float32, device)
        if place is not None:
            grads[place].view(-1)[-1] = float("nan")
        set_gradients(run.params, grads)
        scaler.step(run.optimizer, ema=(run.targets, 0.9), copies=run.copies)
        scaler.update()
        assert same_bits(run.written(), before) == (place is not None)
        assert scaler.get_scale() == (scale / 2 if place is not None else scale)


def test_targets_move_without_any_gradient(device: str) -> None:
    run = build_run(device)
    found_inf = run.optimizer.found_inf = scalar(device)
    expected = [0.9 * f64(t) + 0.1 * f64(p) for t, p in zip(run.targets, run.params.values(), strict=True)]
    run.step({})
    assert found_inf.item() == 0.0
    assert all(is_close(t, e) for t, e in zip(run.targets, expected, strict=True))


@settings(max_examples=10 if INTERPRETED else 50, deadline=None)
@given(lists=parameter_lists(), data=st.data())
def test_flag_equals_isfinite_for_any_lists(
    lists: tuple[list[Tensor], list[Tensor], list[Tensor]], data: st.DataObject
) -> None:
    """Any layouts, those that are copied first included, and empty tensors; some elements are not finite."""
    params, grads = [nn.Parameter(v) for v in lists[0]], lists[1]
    for row in data.draw(st.lists(st.integers(0, len(params) - 1), max_size=2)):
        if numel := grads[row].numel():
            index = np.unravel_index(data.draw(st.integers(0, numel - 1)), grads[row].shape)
            grads[row][tuple(map(int, index))] = data.draw(st.sampled_from(NON_FINITE))
    optimizer = LARS(params, 0.2, weight_decay=data.draw(st.sampled_from([0.0, 0.5])))
    found_inf = optimizer.found_inf = torch.zeros(())
    set_gradients(
        dict(zip(map(str, range(len(params))), params, strict=True)), {str(i): g for i, g in enumerate(grads)}
    )
    before = clones(list(params))
    optimizer.step()
    expected = expected_flag([g for g in grads if g.numel()])
    assert found_inf.item() == expected
    assert expected == 0.0 or same_bits(list(params), before)


@pytest.mark.parametrize(
    ("found_inf", "message"),
    [
        (torch.zeros((), dtype=torch.float64), "got shape () of torch.float64 on cpu"),
        (torch.zeros((), dtype=torch.bool), "got shape () of torch.bool on cpu"),
        (torch.zeros(2), "got shape (2,) of torch.float32 on cpu"),
        (torch.zeros((), device="meta"), "got shape () of torch.float32 on meta"),
    ],
    ids=["float64", "bool", "two", "elsewhere"],
)
def test_invalid_flag_raises(found_inf: Tensor, message: str) -> None:
    run = build_run("cpu")
    before = clones(run.written())
    run.optimizer.found_inf = found_inf
    with pytest.raises(ValueError, match="LARS.step: found_inf must be one float32 number on cpu") as raised:
        run.step(random_gradients(0, torch.float32, "cpu"))
    assert message in str(raised.value)
    assert same_bits(run.written(), before)


@not_interpreted
@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("with_flag", [True, False])
def test_operator_checks(value: float, with_flag: bool, device: str) -> None:
    params = [randn((4, 5), 0, device=device), randn((3,), 1, device=device)]
    grads = [randn((4, 5), 2, device=device), torch.full((3,), value, device=device)]
    args: tuple[Any, ...] = (
        params, grads, [torch.zeros_like(p) for p in params], [0, 1],
        [randn((4, 5), 4, device=device)], [0], [], [], [], [], [0, 0], [True, False],
        [None], [0.2], [0.9], [0.1], [1e-3], None, 0.5, scalar(device, 2.0), scalar(device) if with_flag else None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.byol_kernels.lars_step_, args)
