"""Loss and gradient against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import byol_kernels
from tests import oracle
from tests.numbers.helpers import DTYPES, LOSS_TOLERANCES, as_array, gradients, relative_error, rows, tensor
from tests.oracle import Array

SHAPES = [
    pytest.param(1, 1, id="B1-D1"),
    pytest.param(1, 5, id="B1-D5"),
    pytest.param(4, 1, id="B4-D1"),
    pytest.param(7, 33, id="B7-D33"),
    pytest.param(16, 256, id="B16-D256"),
]


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
