"""BYOL loss: values, gradients and statistics against float64; edge cases; the operator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byol_kernels import (
    LossStats,
    byol_loss,
    byol_loss_with_stats,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
)
from byol_kernels.loss import kernels, reference
from tests import oracle
from tests.kernels.conftest import INTERPRETED, Record, not_interpreted
from tests.kernels.numerics import TOLERANCES, byol_loss_and_grads, f64, is_close, randn, relative_error, row_losses

SHAPES = {
    "one_element": (1, 1),
    "one_row": (1, 256),
    "one_column": (7, 1),
    "odd": (5, 33),
    "typical": (64, 256),
    "several_tiles_per_program": (300, 3),
    "wide": (3, 1000),
    "very_wide": (2, 8192),
    "wider_than_the_kernel": (2, 16500),
}
STATS_SHAPES = {**SHAPES, "very_wide": (4, 4100)}  # z takes a second pass there
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches take several programs, of several tiles each."""
    monkeypatch.setattr(kernels, "MAX_PROGRAMS_PER_PAIR", 4)
    monkeypatch.setattr(kernels, "MAX_PROGRAMS_PER_PAIR_WITH_STATS", 3)


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """p1, p2, z1, z2; the predictions ask for gradients, and so does z1, to see that it gets none."""
    p1, p2, z1, z2 = (randn(shape, seed, dtype).to(device) for seed in range(4))
    return [p1.requires_grad_(), p2.requires_grad_(), z1.requires_grad_(), z2]


@dtypes
@shapes
def test_loss_and_gradient_match_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = inputs(shape, dtype, device)
    loss = byol_loss(p1, p2, z1, z2)
    (loss * 3.7).backward()  # type: ignore[no-untyped-call]

    expected, grad1, grad2 = byol_loss_and_grads(p1, p2, z1, z2)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCES[loss.dtype], abs=TOLERANCES[loss.dtype])
    assert z1.grad is None
    for p, grad in ((p1, grad1), (p2, grad2)):
        assert p.grad is not None and p.grad.dtype == dtype
        # With one column the gradient is 0, and what is left over is the difference of two numbers of size 1 / |p|.
        norm = float(np.linalg.norm(grad)) if shape[1] > 1 else float(np.linalg.norm(1 / f64(p))) / shape[0]
        assert float(np.linalg.norm(f64(p.grad) - 3.7 * grad)) <= TOLERANCES[dtype] * 3.7 * norm


@not_interpreted
@pytest.mark.parametrize("rows", ["ordinary", "one_is_zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_low_precision_batch_matches_float64(dtype: torch.dtype, rows: str, device: str) -> None:
    """Converted in blocks on the CPU; a zero row in the second block sends all to the plain formula."""
    p1, p2, z1, z2 = (randn((1300, 256), seed, dtype).to(device) for seed in range(4))
    if rows == "one_is_zero":
        p2[1290] = 0.0
    p1.requires_grad_()
    p2.requires_grad_()
    loss = byol_loss(p1, p2, z1, z2)
    grads = torch.autograd.grad(
        loss, [p1, p2], torch.tensor(650.0, device=device)
    )  # small ones are subnormal in float16
    expected, *expected_grads = byol_loss_and_grads(p1, p2, z1, z2)
    if rows == "one_is_zero":
        expected += 1.0 / 1300  # 2 - 2 cos is 2 for a zero row, where |p_hat - z_hat|^2 is 1
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    ordinary = torch.arange(1300) != 1290  # the gradient of a zero row is z_hat / eps, an infinity in float16
    for grad, e in zip(grads, expected_grads, strict=True):
        assert is_close(grad[ordinary], 650.0 * e[ordinary.numpy()])


@dtypes
def test_one_direction_matches_float64(dtype: torch.dtype, device: str) -> None:
    p, z = (randn((37, 129), seed, dtype).to(device) for seed in (4, 5))
    p.requires_grad_()
    loss = normalized_mse_loss(p, z)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(oracle.regression_loss(f64(p), f64(z)), rel=TOLERANCES[loss.dtype])
    assert p.grad is not None and is_close(p.grad, oracle.regression_loss_gradient(f64(p), f64(z)))


def test_symmetric_loss_is_the_sum_of_both_directions(device: str) -> None:
    p1, p2, z1, z2 = inputs((31, 64), torch.float32, device)
    both = byol_loss(p1, p2, z1, z2).item()
    assert both == pytest.approx(normalized_mse_loss(p1, z2).item() + normalized_mse_loss(p2, z1).item(), rel=1e-6)


@dtypes
@pytest.mark.parametrize("shape", STATS_SHAPES.values(), ids=STATS_SHAPES)
def test_statistics_match_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = inputs(shape, dtype, device)
    loss, stats = byol_loss_with_stats(p1, p2, z1, z2)
    (loss * 3.7).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(loss, byol_loss(p1, p2, z1, z2)) or loss.item() == pytest.approx(
        byol_loss(p1, p2, z1, z2).item(), rel=1e-6, abs=1e-6
    )
    _, plain_grad1, _ = byol_loss_and_grads(p1, p2, z1, z2)
    assert p1.grad is not None
    assert shape[1] == 1 or is_close(p1.grad, 3.7 * plain_grad1)

    unit = [f64(x) / np.linalg.norm(f64(x), axis=1, keepdims=True) for x in (p1, p2, z2, z1)]
    rows = np.stack([row_losses(p1, z2), row_losses(p2, z1)])
    # Absolute: a row loss is at most 4, a cosine and a component of a unit vector at most 1.
    tolerance = TOLERANCES[loss.dtype] * 4
    np.testing.assert_allclose(f64(stats.row_loss), rows, atol=tolerance)
    assert float(stats.mean_cosine) == pytest.approx(1 - rows.mean() / 2, abs=tolerance)
    np.testing.assert_allclose(f64(stats.p_std), np.stack([u.std(0) for u in unit[:2]]), atol=tolerance)
    np.testing.assert_allclose(f64(stats.z_std), np.stack([u.std(0) for u in unit[2:]]), atol=tolerance)
    assert not any(x.requires_grad for x in stats)


def test_statistics_of_one_direction(device: str) -> None:
    p, z = randn((19, 8), 0).to(device), randn((19, 8), 1).to(device)
    loss, stats = normalized_mse_loss_with_stats(p, z)
    assert isinstance(stats, LossStats)
    assert stats.row_loss.shape == (1, 19) and stats.p_std.shape == stats.z_std.shape == (1, 8)
    assert float(stats.row_loss.mean()) == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(stats.z_std[0], F.normalize(z, dim=1).std(0, correction=0), rtol=1e-5, atol=1e-7)


def test_collapse_shows_in_the_statistics(device: str) -> None:
    one = randn((1, 256), 0).to(device)
    collapsed = one * torch.arange(1, 129, device=device)[:, None]  # one direction at many lengths
    healthy = randn((128, 256), 1).to(device)
    _, stats = normalized_mse_loss_with_stats(healthy, collapsed)
    assert float(stats.z_std.mean()) * 16 < 1e-5
    assert 0.95 < float(stats.p_std.mean()) * 16 < 1.05


# -------------------------------------------------------------------------------- edges


def test_row_norms_from_zero_to_overflow(device: str) -> None:
    """Zero, below eps, ordinary, huge and overflowing rows in one batch."""
    sizes, eps = [0.0, 1e-15, 1e-6, 1.0, 1e15, 1e25], 1e-12
    p = randn((6, 40), 0) * torch.tensor(sizes)[:, None]
    p, z = p.to(device).requires_grad_(), randn((6, 40), 1).to(device)
    loss, stats = normalized_mse_loss_with_stats(p, z)
    loss.backward()  # type: ignore[no-untyped-call]
    rows, grad = row_losses(p, z), oracle.regression_loss_gradient(f64(p), f64(z))
    z_hat = oracle.normalize(f64(z))
    for row in (0, 1):  # below eps the loss is 2 - 2 <p / eps, z_hat>
        rows[row], grad[row] = 2.0 - 2.0 * f64(p)[row] @ z_hat[row] / eps, -2.0 * z_hat[row] / eps / 6
    rows[5], grad[5] = 2.0, 0.0  # documented: float32 cannot hold the squared norm
    np.testing.assert_allclose(f64(stats.row_loss)[0], rows, rtol=1e-6)
    assert rows[0] == 2.0
    assert p.grad is not None
    for row in range(6):
        assert relative_error(p.grad[row], grad[row]) <= 2e-6, sizes[row]


def test_zero_target_has_finite_loss_and_zero_gradient(device: str) -> None:
    p = randn((3, 5), 0).to(device).requires_grad_()
    loss = normalized_mse_loss(p, torch.zeros(3, 5, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 2.0
    assert p.grad is not None and not p.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["p", "z"])
def test_nonfinite_input_reaches_loss_and_own_row_only(value: float, where: str, device: str) -> None:
    p, z = randn((4, 9), 0).to(device), randn((4, 9), 1).to(device)
    (p if where == "p" else z)[2, 3] = value
    p.requires_grad_()
    loss = normalized_mse_loss(p, z)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isnan()
    assert p.grad is not None
    assert p.grad.isnan().any(1).tolist() == [False, False, True, False]


@dtypes
def test_bounds_are_exact(dtype: torch.dtype, device: str) -> None:
    p = randn((30, 77), 0, dtype).to(device)
    assert 0.0 <= byol_loss(p, p, p, p).item() <= 1e-6
    assert 8.0 - 1e-5 <= byol_loss(p, p, -p, -p).item() <= 8.0
    _, stats = byol_loss_with_stats(p, p, p, -p)
    assert float(stats.row_loss.min()) >= 0.0 and float(stats.row_loss.max()) <= 4.0


@settings(max_examples=5 if INTERPRETED else 25, deadline=None)
@given(
    batch=st.integers(1, 9),
    dim=st.integers(2, 40),
    scale=st.sampled_from([2.0**-20, 0.25, 3.0, 2.0**20]),
    seed=st.integers(0, 1000),
)
def test_loss_is_scale_invariant_and_gradient_tangential(batch: int, dim: int, scale: float, seed: int) -> None:
    p, z = randn((batch, dim), seed).requires_grad_(), randn((batch, dim), seed + 1)
    scaled = (p.detach() * scale).requires_grad_()
    loss, scaled_loss = normalized_mse_loss(p, z), normalized_mse_loss(scaled, z * scale)
    assert scaled_loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-6)
    (grad,) = torch.autograd.grad(loss, p)
    (scaled_grad,) = torch.autograd.grad(scaled_loss, scaled)
    torch.testing.assert_close(scaled_grad * scale, grad, rtol=1e-4, atol=1e-6)
    # A row's gradient is orthogonal to the row: moving along p does not change its direction.
    assert float((p.detach() * grad).sum(1).abs().max()) < 1e-5


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row_strided": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "transposed": lambda x: x.t().contiguous().t(),
    "every_other_column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every_other_row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_match_float64(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = inputs((9, 48), dtype, device)
    views = [layout(x.detach()) for x in (p1, p2, z1, z2)]
    assert all(torch.equal(view, x) for view, x in zip(views, (p1, p2, z1, z2), strict=True))
    leaves = [view.requires_grad_() for view in views[:2]]
    loss = byol_loss(*leaves, *views[2:])
    grads = torch.autograd.grad(loss, leaves)
    expected, *expected_grads = byol_loss_and_grads(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(is_close(grad, e) for grad, e in zip(grads, expected_grads, strict=True))


def test_expanded_targets_match_float64(device: str) -> None:
    p, z = randn((6, 32), 0).to(device).requires_grad_(), randn((1, 32), 1).to(device)
    (grad,) = torch.autograd.grad(normalized_mse_loss(p, z.expand(6, 32)), p)
    assert is_close(grad, oracle.regression_loss_gradient(f64(p), f64(z).repeat(6, 0)))


def test_bfloat16_gradient_error_is_at_most_twice_pytorchs(device: str) -> None:
    p, z = (randn((64, 256), seed, torch.bfloat16).to(device) for seed in (0, 1))
    p.requires_grad_()
    by_torch = (2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1)).mean()
    (torch_grad,) = torch.autograd.grad(by_torch, p)
    (grad,) = torch.autograd.grad(normalized_mse_loss(p, z), p)
    expected = oracle.regression_loss_gradient(f64(p), f64(z))
    assert relative_error(grad, expected) <= 2 * relative_error(torch_grad, expected)


def test_float16_gradient_does_not_underflow_before_loss_scale(device: str) -> None:
    """Long predictions of a large batch have gradients below float16's range; the upstream factor lifts them."""
    p, z = randn((512, 32), 0, torch.float16).to(device) * 30, randn((512, 32), 1, torch.float16).to(device)
    p.requires_grad_()
    (grad,) = torch.autograd.grad(normalized_mse_loss(p, z) * 65536.0, p)
    expected = oracle.regression_loss_gradient(f64(p), f64(z))
    assert np.abs(expected).max() < torch.finfo(torch.float16).tiny
    assert is_close(grad, 65536.0 * expected)


# -------------------------------------------------------------------------------- as an operator


def test_gradient_only_where_required(device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 6), torch.float32, device)
    expected = torch.autograd.grad(byol_loss(p1, p2, z1, z2), p2)[0]
    loss = byol_loss(p1.detach(), p2, z1, z2)
    assert torch.equal(torch.autograd.grad(loss, p2)[0], expected)
    with torch.no_grad():
        assert not byol_loss(p1, p2, z1, z2).requires_grad
    assert not byol_loss(p1.detach(), p2.detach(), z1, z2).requires_grad


def test_second_backward_through_retained_graph_is_equal(device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 6), torch.bfloat16, device)
    loss = byol_loss(p1, p2, z1, z2)
    first = torch.autograd.grad(loss, [p1, p2], retain_graph=True)
    second = torch.autograd.grad(loss, [p1, p2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@not_interpreted  # programs run one after the other there
def test_loss_is_bit_reproducible(device: str) -> None:
    p1, p2, z1, z2 = inputs((301, 65), torch.float32, device)
    losses = {byol_loss(p1, p2, z1, z2).item() for _ in range(3)}
    assert len(losses) == 1


@pytest.mark.parametrize("wrt", ["p1", "p2"])
def test_second_derivative_is_refused(wrt: str, device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 6), torch.float32, device)
    p = p1 if wrt == "p1" else p2
    (grad,) = torch.autograd.grad(byol_loss(p1, p2, z1, z2), p, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("rows", [3] if INTERPRETED else [3, 400])  # the CPU path takes 400 another way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_leaves_stored_gradient_unchanged(rows: int, dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = inputs((rows, 256), dtype, device)
    _, *expected = byol_loss_and_grads(p1, p2, z1, z2)
    loss = byol_loss(p1, p2, z1, z2)
    for scale in (None, None, 3.0, None):
        upstream = None if scale is None else torch.tensor(scale, device=device)
        loss.backward(upstream, retain_graph=True)  # type: ignore[no-untyped-call]
        for p, grad in zip((p1, p2), expected, strict=True):
            assert p.grad is not None and is_close(p.grad, (scale or 1.0) * grad)
            p.grad.mul_(5.0)
            p.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    loss = byol_loss(p1, p2, z1, z2)
    loss.backward()  # type: ignore[no-untyped-call]
    for p, grad in zip((p1, p2), expected, strict=True):
        assert p.grad is not None and is_close(p.grad, 2.0 * grad)  # added up


@not_interpreted  # the interpreter cuts off where it converts to bfloat16
def test_plain_backward_rounds_once(device: str) -> None:
    p1, p2, z1, z2 = inputs((5, 300), torch.bfloat16, device)
    byol_loss(p1, p2, z1, z2).backward()  # type: ignore[no-untyped-call]
    for p, grad in zip((p1, p2), byol_loss_and_grads(p1, p2, z1, z2)[1:], strict=True):
        assert p.grad is not None
        equal = p.grad.cpu() == torch.from_numpy(grad).to(torch.bfloat16)
        assert equal.double().mean() > 0.99  # all but those next to the middle between two numbers


def test_loss_ignores_autocast(device: str) -> None:
    p1, p2, z1, z2 = inputs((8, 16), torch.bfloat16, device)
    expected = byol_loss(p1, p2, z1, z2)
    with torch.autocast(device, torch.bfloat16):
        loss = byol_loss(p1, p2, z1, z2)
        full = byol_loss(*(x.detach().float() for x in (p1, p2, z1, z2)))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert full.item() == pytest.approx(expected.item(), rel=1e-6)


def test_forward_and_backward_are_one_operator_each(device: str) -> None:
    p1, p2, z1, z2 = inputs((8, 16), torch.float32, device)
    with Record() as record:
        loss = byol_loss(p1, p2, z1, z2)
    assert record.names == ["byol_kernels.normalized_mse_fwd.default"]
    with Record() as record:
        torch.autograd.grad(loss, [p1, p2])
    computing = [name for name in record.names if not name.startswith(("aten.select", "aten.detach", "aten.ones_like"))]
    assert computing == ["byol_kernels.normalized_mse_bwd.default"]


@not_interpreted
def test_cpu_gradient_passes_gradcheck() -> None:
    p1, p2, z1, z2 = inputs((3, 4), torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda a, b: byol_loss(a, b, z1, z2), (p1, p2))
    assert torch.autograd.gradcheck(lambda a: normalized_mse_loss(a, z2, eps=5.0), (p1,))  # below eps: the other branch


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("stats", [False, True])
def test_operator_checks(dtype: torch.dtype, pairs: int, stats: bool, device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 8), dtype, device)
    args = (p1, z2, p2, z1.detach()) if pairs == 2 else (p1, z2, None, None)
    op = torch.ops.byol_kernels.normalized_mse_stats_fwd if stats else torch.ops.byol_kernels.normalized_mse_fwd
    torch.library.opcheck(op, (*args, 1e-12, True))
    torch.library.opcheck(op, (*args, 1e-12, False))
    grads = [randn((4, 8), seed, dtype).to(device) for seed in range(9, 9 + pairs)]
    # Its autograd refuses on purpose, so the check that differentiates it is left out.
    torch.library.opcheck(
        torch.ops.byol_kernels.normalized_mse_bwd,
        (torch.tensor(2.0, device=device), grads[0], grads[1] if pairs == 2 else None, p1, p2 if pairs == 2 else None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@not_interpreted
def test_compiles_with_fullgraph(device: str) -> None:
    p1, p2, z1, z2 = inputs((16, 32), torch.float32, device)

    def step(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        return byol_loss(p1, p2, z1, z2)

    compiled = torch.compile(step, fullgraph=True)
    loss, expected = compiled(p1, p2, z1, z2), step(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(loss, [p1, p2]), torch.autograd.grad(expected, [p1, p2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


INVALID: dict[str, tuple[Callable[[], Any], str]] = {
    "three_dimensions": (
        lambda: normalized_mse_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
        r"p_BD must be \[batch",
    ),
    "empty_batch": (lambda: normalized_mse_loss(torch.ones(0, 4), torch.ones(0, 4)), "at least one row"),
    "no_columns": (lambda: normalized_mse_loss(torch.ones(4, 0), torch.ones(4, 0)), "at least one row and one column"),
    "integers": (lambda: normalized_mse_loss(torch.ones(2, 3).int(), torch.ones(2, 3).int()), r"got torch\.int32"),
    "shapes": (lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 4)), r"\(2, 3\), got \(2, 4\)"),
    "broadcast": (lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(1, 3)), "must have the shape of p_BD"),
    "dtypes": (
        lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3).half()),
        r"convert it with \.to\(torch.float32",
    ),
    "devices": (
        lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3, device="meta")),
        "on the device of p_BD",
    ),
    "eps": (lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3), eps=0.0), "eps must be positive"),
    "eps_nan": (
        lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3), eps=float("nan")),
        "eps must be positive",
    ),
    "second_pair": (
        lambda: byol_loss(*(torch.ones(2, n) for n in (3, 3, 3, 5))),
        "byol_loss: z2 must have the shape of p1",
    ),
    "stats": (lambda: byol_loss_with_stats(*(torch.ones(n, 3) for n in (2, 3, 2, 2))), "byol_loss_with_stats: p2"),
}


@pytest.mark.parametrize(("call", "message"), INVALID.values(), ids=INVALID)
def test_invalid_input_raises(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_low_precision_is_computed_in_float32(device: str) -> None:
    """Whatever comes in, the CPU path rounds only its outputs."""
    p1, p2, z1, z2 = (x.detach() for x in inputs((6, 10), torch.bfloat16, device))
    for function in (reference.normalized_mse_fwd, reference.normalized_mse_stats_fwd):
        low = function(p1, z2, p2, z1, 1e-12, True)
        full = function(p1.float(), z2.float(), p2.float(), z1.float(), 1e-12, True)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(low, full, strict=True))
