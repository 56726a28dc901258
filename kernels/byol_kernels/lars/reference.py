"""LARS in plain PyTorch: the CPU path, and in float64 the oracle of the kernels.

The rule of BYOL's reference code (google-deepmind/deepmind-research, byol/utils/optimizers.py). Per tensor:

    d = g + weight_decay p                      (d = g for biases and norm parameters)
    r = trust_coefficient |p| / |d|             (r = 1 where either norm is 0, and for biases and norm parameters)
    v = momentum v + r d
    p = p - lr v

The learning rate is outside the momentum, so a changing one acts at once. Two things differ from the LARC of most
PyTorch packages: the ratio is of |p| to |d|, not to |g| + weight_decay |p|, and on a GPU no norm leaves the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._dtypes import accumulation_dtype
from byol_kernels.ema.reference import ema_update_
from byol_kernels.layout import same_layout

_BLOCK = 1 << 20
"""Elements that are taken at a time, so that what one operation wrote is still in the cache for the next one."""
_ROW = 256
"""A float32 sum over many elements, one after the other, loses digits: squares are summed in rows, rows in float64."""
_SMALL_SQUARE = 2.0**-100
"""Squares in float32 whose mean is less may have terms below 2^-126, which lose their digits."""


def lars_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    *,
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    trust_coefficient: Sequence[float],
    adapt: Sequence[bool],
    grad_scale: float,
    tau: float,
) -> None:
    """One LARS step and, where a parameter has a target, the target's EMA.

    All sequences have one entry per parameter, and the tensors of one entry are dense and laid out alike (a gradient
    need not be). A parameter without a gradient stays as it is; its target moves all the same.
    """
    for row, param in enumerate(params):
        grad, buffer, target = grads[row], momentum_buffers[row], targets[row]
        if grad is None or buffer is None:
            if target is not None:
                ema_update_([target], [param], tau)
            continue
        if not same_layout(grad, param):
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        decay = weight_decay[row] if adapt[row] else 0.0
        param_blocks, grad_blocks, buffer_blocks = _blocks(param), _blocks(grad), _blocks(buffer)
        target_blocks = [None] * len(param_blocks) if target is None else _blocks(target)

        ratio = 1.0
        if adapt[row]:
            ratio = _trust_ratio(param_blocks, grad_blocks, decay, grad_scale, trust_coefficient[row])
        # Backwards, because the last blocks that the norms read are still in the cache.
        for p, g, v, t in reversed(list(zip(param_blocks, grad_blocks, buffer_blocks, target_blocks, strict=True))):
            _sgd_(p, g, v, lr=lr[row], momentum=momentum[row], decay=decay, ratio=ratio, grad_scale=grad_scale)
            if t is not None:
                ema_update_([t], [p], tau)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True if no element of any tensor is an infinity or a NaN."""
    # A finite sum has finite terms and takes a tenth of the time of isfinite; it may overflow, so a non-finite one
    # decides nothing.
    return all(math.isfinite(t.sum().item()) or bool(t.isfinite().all()) for t in tensors)


def _trust_ratio(
    param_blocks: Sequence[Tensor],
    grad_blocks: Sequence[Tensor],
    decay: float,
    grad_scale: float,
    trust_coefficient: float,
) -> float:
    """The ratio trust_coefficient |p| / |g + decay p|, or 1 where either norm is 0."""
    acc = accumulation_dtype(param_blocks[0].dtype)
    p_square = g_square = p_dot_g = 0.0
    smallest = _SMALL_SQUARE * sum(map(Tensor.numel, param_blocks))
    for p, g in zip(param_blocks, grad_blocks, strict=True):
        p_acc, g_acc = p.to(acc), g.to(acc)  # no copy where the dtype is acc already
        p_square += _square(p_acc)
        g_square += _square(g_acc)
        if decay:
            p_dot_g += torch.dot(p_acc, g_acc).item()
    is_small = 0.0 < p_square < smallest or 0.0 < g_square < smallest
    g_square, cross = g_square / (grad_scale * grad_scale), 2.0 * decay * p_dot_g / grad_scale
    update_square = g_square + cross + decay * decay * p_square
    # The product <p, g> is one float32 sum. Where it matters, because p and g point the same way or cancel out, or may
    # have lost its digits, the update is formed and its squares are summed instead.
    if is_small or not abs(cross) < 1e-4 * update_square:  # or one is NaN
        update_square = 0.0
        for p, g in zip(param_blocks, grad_blocks, strict=True):
            update_square += _square(torch.add(p.to(acc) * decay, g.to(acc), alpha=1.0 / grad_scale))
    if not (p_square > 0.0 and update_square > 0.0):
        return 1.0
    return min(trust_coefficient * math.sqrt(p_square / update_square), torch.finfo(acc).max)


def _square(x: Tensor) -> float:
    """The sum of the squares of a contiguous vector; in float64 where float32 squares overflow or lose digits."""
    total, rest = 0.0, x.numel() % _ROW
    if rest < x.numel():
        norms = torch.linalg.vector_norm((x[:-rest] if rest else x).view(-1, _ROW), dim=1).double()
        total = torch.dot(norms, norms).item()
    if rest:
        tail = x[-rest:]
        total += torch.dot(tail, tail).item()
    if not _SMALL_SQUARE * x.numel() <= total < math.inf:
        total = x.double().square().sum().item()
    return total


def _sgd_(
    p: Tensor, g: Tensor, v: Tensor, *, lr: float, momentum: float, decay: float, ratio: float, grad_scale: float
) -> None:
    """Update `v = momentum v + ratio (g / grad_scale + decay p)`, then `p -= lr v`, of contiguous tensors."""
    acc = accumulation_dtype(p.dtype)
    # PyTorch's fused SGD is one pass over the data: v = momentum v + (1 - dampening) d. Without momentum it ignores the
    # dampening, and a dampening of 1 - ratio has no digits left of a small ratio.
    is_fused = p.dtype == g.dtype == v.dtype == acc and momentum != 0.0 and ratio >= 1e-8
    if grad_scale != 1.0:
        g = g.to(acc) * (1.0 / grad_scale)
    if is_fused:
        torch._fused_sgd_(
            [p], [g], [v],
            weight_decay=decay, momentum=momentum, lr=lr, dampening=1.0 - ratio,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        return
    p_acc, v_acc = p.to(acc), v.to(acc)  # no copy where the dtype is acc already
    v_acc.mul_(momentum).add_(g.to(acc), alpha=ratio)
    if decay:
        v_acc.add_(p_acc, alpha=ratio * decay)
    p_acc.add_(v_acc, alpha=-lr)
    if p.dtype != acc:
        p.copy_(p_acc)
    if v.dtype != acc:
        v.copy_(v_acc)


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    """A dense tensor in the order of its memory, in blocks."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
    # Not split, whose Python side takes longer than its views.
    return (flat,) if flat.numel() <= _BLOCK else flat.chunk(-(-flat.numel() // _BLOCK))
