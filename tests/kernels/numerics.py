"""Expectations in float64 by the oracle, tolerances, and random inputs of the kernel tests."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tests import oracle

Array = NDArray[np.float64]

TOLERANCES: dict[torch.dtype, float] = {
    # Relative L2 error of a tensor, against float64 on the same inputs.
    torch.float64: 1e-14,  # the same arithmetic in another order
    torch.float32: 1e-6,  # a few roundings of 6e-8 and a sum over up to 20,000 elements
    # All arithmetic is in float32, so what is left is rounding the result: half a unit in the last place, or a whole
    # one in Triton's interpreter, which truncates. A gradient is rounded twice, before and after the upstream factor.
    torch.float16: 2 * 2.0**-10,
    torch.bfloat16: 2 * 2.0**-7,
}


def f64(x: Tensor) -> Array:
    array: Array = x.detach().to(torch.float64).cpu().numpy()
    return array


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """Normal random numbers; on the CPU, so that every device sees the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(**options)


def relative_error(actual: Tensor, expected: Array) -> float:
    """Relative L2 error; 0 for two empty or equal tensors, NaN wherever either has one."""
    assert tuple(actual.shape) == expected.shape
    difference = float(np.linalg.norm(f64(actual) - expected))
    return difference if difference == 0.0 else difference / max(float(np.linalg.norm(expected)), 1e-30)


def is_close(actual: Tensor, expected: Array, dtype: torch.dtype | None = None) -> bool:
    return relative_error(actual, expected) <= TOLERANCES[dtype or actual.dtype]


def loss_inputs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """p1, p2, z1, z2; the predictions ask for gradients, and so does z1, to see that it gets none."""
    p1, p2, z1, z2 = (randn(shape, seed, dtype).to(device) for seed in range(4))
    return [p1.requires_grad_(), p2.requires_grad_(), z1.requires_grad_(), z2]


def row_losses(p: Tensor, z: Tensor) -> Array:
    """`|p_hat - z_hat|^2` [B]: 2 - 2 cos where neither row is shorter than eps."""
    losses: Array = ((oracle.normalize(f64(p)) - oracle.normalize(f64(z))) ** 2).sum(axis=1)
    return losses


def byol_loss_and_grads(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> tuple[float, Array, Array]:
    """The symmetric loss, and its derivatives by p1 and p2."""
    a, b, za, zb = map(f64, (p1, p2, z2, z1))
    return (
        oracle.regression_loss(a, za) + oracle.regression_loss(b, zb),
        oracle.regression_loss_gradient(a, za),
        oracle.regression_loss_gradient(b, zb),
    )


def loop_over_pairs(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Tensor, eps: float = 1e-12
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, row losses [N, B] and gradients by p1, p2, p_local in float64, by torch's own normalization."""
    a, b, c, d, local = (x.detach().double().cpu() for x in (p1, p2, z1, z2, p_local))
    leaves = [a.requires_grad_(), b.requires_grad_(), local.requires_grad_()]
    rows = []
    for p, z in [(a, d), (b, c), *((view, target) for view in local for target in (c, d))]:
        cosine = (F.normalize(p, dim=1, eps=eps) * F.normalize(z, dim=1, eps=eps)).sum(1)
        rows.append(2.0 - 2.0 * cosine)
    loss = 2.0 * sum(row.mean() for row in rows) / len(rows)
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.stack(rows).detach(), list(torch.autograd.grad(loss, leaves))


def ema(target: Tensor, online: Tensor, tau: float) -> Array:
    return oracle.ema(f64(target), f64(online), tau)
