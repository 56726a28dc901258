"""BYOL loss: values, gradients and statistics against float64; edge cases."""

from collections.abc import Callable

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
from tests import oracle
from tests.kernels.conftest import INTERPRETED, not_interpreted
from tests.kernels.numerics import (
    TOLERANCES,
    byol_loss_and_grads,
    f64,
    is_close,
    loss_inputs,
    randn,
    relative_error,
    row_losses,
)

pytestmark = pytest.mark.usefixtures("few_loss_programs")

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


@dtypes
@shapes
def test_loss_and_gradient_match_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = loss_inputs(shape, dtype, device)
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
    p1, p2, z1, z2 = loss_inputs((31, 64), torch.float32, device)
    both = byol_loss(p1, p2, z1, z2).item()
    assert both == pytest.approx(normalized_mse_loss(p1, z2).item() + normalized_mse_loss(p2, z1).item(), rel=1e-6)


@dtypes
@pytest.mark.parametrize("shape", STATS_SHAPES.values(), ids=STATS_SHAPES)
def test_statistics_match_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = loss_inputs(shape, dtype, device)
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
    p1, p2, z1, z2 = loss_inputs((9, 48), dtype, device)
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
