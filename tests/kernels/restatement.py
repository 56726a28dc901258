"""BYOL's loss, moving average and LARS restated in float64 numpy, and how close to it float32 has to come.

Written from the paper (arXiv 2006.07733) and its authors' code, not from the package, and without an autograd.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def error(actual: Tensor, expected: Array) -> float:
    """Relative L2 error; 0 for two empty or equal tensors, NaN wherever either has one."""
    assert tuple(actual.shape) == expected.shape
    difference = float(np.linalg.norm(f64(actual) - expected))
    return difference if difference == 0.0 else difference / max(float(np.linalg.norm(expected)), 1e-30)


def close(actual: Tensor, expected: Array, dtype: torch.dtype | None = None) -> bool:
    return error(actual, expected) <= TOLERANCES[dtype or actual.dtype]


def normalized_mse(p: Array, z: Array, eps: float = 1e-12) -> tuple[Array, Array]:
    """Row losses 2 - 2 cos [B], and the derivative of their mean by p [B, D]."""
    p_norm = np.sqrt((p * p).sum(1, keepdims=True))
    z_norm = np.sqrt((z * z).sum(1, keepdims=True))
    p_hat = p / np.maximum(p_norm, eps)
    z_hat = z / np.maximum(z_norm, eps)
    cos = (p_hat * z_hat).sum(1, keepdims=True)
    # Where |p| >= eps the derivative of p / |p| is (1 - p_hat p_hat^T) / |p|; below, that of p / eps is 1 / eps.
    inner = np.where(p_norm >= eps, z_hat - p_hat * cos, z_hat)
    return 2.0 - 2.0 * cos[:, 0], -2.0 * inner / np.maximum(p_norm, eps) / p.shape[0]


def byol(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, eps: float = 1e-12) -> tuple[float, Array, Array]:
    """mean_b [l(p1, z2) + l(p2, z1)], and its derivatives by p1 and p2."""
    rows1, grad1 = normalized_mse(f64(p1), f64(z2), eps)
    rows2, grad2 = normalized_mse(f64(p2), f64(z1), eps)
    return float((rows1 + rows2).mean()), grad1, grad2


def ema(target: Tensor, online: Tensor, tau: float) -> Array:
    expected: Array = tau * f64(target) + (1.0 - tau) * f64(online)
    return expected


def lars(
    p: Array, g: Array, v: Array, *, lr: float, momentum: float, weight_decay: float, eta: float, excluded: bool
) -> tuple[Array, Array]:
    """The parameter and its momentum after one step (byol/utils/optimizers.py of the authors' code)."""
    d = g if excluded else g + weight_decay * p
    p_norm, d_norm = np.sqrt((p * p).sum()), np.sqrt((d * d).sum())
    ratio = eta * p_norm / d_norm if not excluded and p_norm > 0 and d_norm > 0 else 1.0
    v = momentum * v + ratio * d
    return p - lr * v, v


def make(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """Normal random numbers; on the CPU, so that every device sees the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(**options)
