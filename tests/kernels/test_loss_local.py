"""BYOL loss with local views: against a loop over pairs in float64; edge cases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from byol_kernels import byol_loss, byol_loss_with_stats
from tests.kernels.conftest import not_interpreted
from tests.kernels.numerics import TOLERANCES, f64, is_close, loop_over_pairs, loss_inputs, randn

pytestmark = pytest.mark.usefixtures("few_loss_programs")

CASES = {
    "one_row": (1, (1, 256)),
    "odd": (2, (5, 33)),
    "sixteen": (16, (3, 8)),
    "several_tiles_per_program": (2, (150, 3)),
    "wide": (1, (3, 1000)),
    "wider_than_the_kernel": (2, (2, 8200)),
}  # local views, shape
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
cases = pytest.mark.parametrize(("num_local", "shape"), CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def local_inputs(num_local: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """p1, p2, z1, z2, p_local; the predictions ask for gradients."""
    p_local = randn((num_local, *shape), 4, dtype).to(device)
    return [*loss_inputs(shape, dtype, device), p_local.requires_grad_()]


@dtypes
@cases
def test_loss_gradients_and_statistics_match_float64(
    num_local: int, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    p1, p2, z1, z2, p_local = local_inputs(num_local, shape, dtype, device)
    expected, rows, expected_grads = loop_over_pairs(p1, p2, z1, z2, p_local)
    loss = byol_loss(p1, p2, z1, z2, p_local)
    loss_with_stats, stats = byol_loss_with_stats(p1, p2, z1, z2, p_local)
    tolerance = TOLERANCES[loss.dtype]
    for value in (loss, loss_with_stats):
        grads = torch.autograd.grad(value * 3.7, [p1, p2, p_local])
        assert value.item() == pytest.approx(expected.item(), rel=tolerance)
        for p, grad, e in zip((p1, p2, p_local), grads, expected_grads, strict=True):
            assert grad.dtype == dtype and grad.shape == p.shape
            assert is_close(grad, 3.7 * f64(e))

    np.testing.assert_allclose(f64(stats.row_loss), f64(rows), atol=tolerance * 4)
    assert float(stats.mean_cosine) == pytest.approx(1 - rows.mean().item() / 2, abs=tolerance * 4)
    _, of_global_views = byol_loss_with_stats(p1, p2, z1, z2)
    for std, e in ((stats.p_std, of_global_views.p_std), (stats.z_std, of_global_views.z_std)):
        torch.testing.assert_close(std, e, rtol=1e-5, atol=tolerance)  # merged of other numbers of rows
    assert not any(x.requires_grad for x in stats)


@not_interpreted
@pytest.mark.parametrize("rows", ["ordinary", "one_is_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_batch_matches_float64(dtype: torch.dtype, rows: str, device: str) -> None:
    """View by view on the CPU, in low precision in blocks; a zero row in one view sends all to the plain formula."""
    p1, p2, z1, z2, p_local = (x.detach() for x in local_inputs(2, (1300, 256), dtype, device))
    if rows == "one_is_zero":
        p_local[1, 1290] = 0.0
    leaves = [x.requires_grad_() for x in (p1, p2, p_local)]
    loss = byol_loss(p1, p2, z1, z2, p_local)
    upstream = torch.tensor(650.0, device=device)  # small ones are subnormal in float16
    grads = torch.autograd.grad(loss, leaves, upstream)
    expected, _, expected_grads = loop_over_pairs(p1, p2, z1, z2, p_local)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ordinary = torch.arange(1300) != 1290  # the gradient of a zero row is of size 1 / eps, an infinity in float16
    for grad, e in zip(grads, expected_grads, strict=True):
        assert is_close(grad[..., ordinary, :], 650.0 * f64(e)[..., ordinary.numpy(), :])


def test_row_norms_from_zero_to_huge(device: str) -> None:
    """Of local predictions, and of both targets."""
    sizes, eps = torch.tensor([0.0, 1e-15, 1e-6, 1.0, 1e15, 1.0, 1.0])[:, None], 1e-12
    p1, p2, z1, z2, p_local = (x.detach() for x in local_inputs(2, (7, 40), torch.float32, device))
    p_local *= sizes.to(device)
    z1[5], z2[6] = 0.0, z2[6] * 1e-14
    p_local.requires_grad_()
    loss, stats = byol_loss_with_stats(p1, p2, z1, z2, p_local, eps=eps)
    (grad,) = torch.autograd.grad(loss, p_local)
    _, rows, (_, _, expected_grad) = loop_over_pairs(p1, p2, z1, z2, p_local, eps)
    np.testing.assert_allclose(f64(stats.row_loss), f64(rows), rtol=1e-6, atol=1e-6)
    assert byol_loss(p1, p2, z1, z2, p_local, eps=eps).item() == pytest.approx(loss.item(), rel=1e-6)
    for view in range(2):
        for row in range(7):
            assert is_close(grad[view, row], f64(expected_grad[view, row])), (view, row)


@pytest.mark.parametrize("where", ["p_local", "z1"])
def test_nan_reaches_loss_and_own_row_only(where: str, device: str) -> None:
    p1, p2, z1, _, p_local = inputs = local_inputs(3, (4, 9), torch.float32, device)
    with torch.no_grad():
        (p_local[1] if where == "p_local" else z1)[2, 3] = float("nan")
    loss = byol_loss(*inputs)
    assert loss.isnan()
    own_row, no_row = [False, False, True, False], [False] * 4
    grad1, grad2, grad_local = (g.isnan().any(-1).tolist() for g in torch.autograd.grad(loss, [p1, p2, p_local]))
    if where == "p_local":
        assert (grad1, grad2, grad_local) == (no_row, no_row, [no_row, own_row, no_row])
    else:
        assert (grad1, grad2, grad_local) == (no_row, own_row, [own_row] * 3)


def test_bounds_are_exact(device: str) -> None:
    p = randn((30, 77), 0).to(device)
    local = torch.stack([p, 2 * p, p])
    assert 0.0 <= byol_loss(p, p, p, p, local).item() <= 1e-6
    assert 8.0 - 1e-5 <= byol_loss(p, p, -p, -p, local).item() <= 8.0
    _, stats = byol_loss_with_stats(p, p, p, -p, local)
    assert float(stats.row_loss.min()) >= 0.0 and float(stats.row_loss.max()) <= 4.0


@pytest.mark.parametrize("layout", ["slices_of_rows", "batch_first", "expanded", "transposed"])
def test_strided_local_predictions_match_float64(layout: str, device: str) -> None:
    p1, p2, z1, z2, p_local = (x.detach() for x in local_inputs(3, (6, 40), torch.float32, device))
    strided = {
        "slices_of_rows": torch.cat([p_local, p_local], 2)[..., :40],
        "batch_first": p_local.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": p_local[:1].expand(3, 6, 40),
        "transposed": p_local.transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]
    assert not strided.is_contiguous()
    strided.requires_grad_()
    loss = byol_loss(p1, p2, z1, z2, strided)
    (grad,) = torch.autograd.grad(loss, strided)
    expected, _, (_, _, expected_grad) = loop_over_pairs(p1, p2, z1, z2, strided)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert is_close(grad, f64(expected_grad))


def test_gradient_of_local_predictions_alone(device: str) -> None:
    p1, p2, z1, z2, p_local = inputs = local_inputs(2, (4, 6), torch.bfloat16, device)
    loss = byol_loss(p1.detach(), p2.detach(), z1, z2, p_local)
    (grad,) = torch.autograd.grad(loss, p_local)
    assert torch.equal(grad, torch.autograd.grad(byol_loss(*inputs), p_local)[0])
    with torch.no_grad():
        assert torch.equal(byol_loss(*inputs), loss)
