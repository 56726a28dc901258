"""Every operator in plain PyTorch: what runs on the CPU, and what the kernels are tested against.

Run on float64 tensors they are the oracle of the tests; run on float32 tensors they are the CPU implementation, so
they are written to be fast as well as clear.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._multi_tensor import same_layout


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are taken in float64 for float64 inputs and in float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized_mse_fwd(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    eps: float,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, unscaled gradient and statistics of one or two (prediction, target) pairs; see `normalized_mse.py`.

    Returns:
        loss [], per-pair gradient before the mean's 1/B [N, B, D], row losses [N, B], mean cosine [],
        std of the normalised inputs [2, N, D] (predictions, then targets). Outputs that were not asked for are empty.
    """
    pairs = [(pa_BD, za_BD)] if pb_BD is None or zb_BD is None else [(pa_BD, za_BD), (pb_BD, zb_BD)]
    batch, dim = pa_BD.shape
    acc = accumulation_dtype(pa_BD.dtype)
    p_N = [p.to(acc) for p, _ in pairs]
    z_N = [z.to(acc) for _, z in pairs]
    p_norm_NB = torch.stack([torch.linalg.vector_norm(p, dim=1) for p in p_N])
    z_norm_NB = torch.stack([torch.linalg.vector_norm(z, dim=1) for z in z_N])
    # The eps convention of F.normalize: x / max(|x|, eps).
    p_scale_NB = p_norm_NB.clamp_min(eps).reciprocal_()
    z_scale_NB = z_norm_NB.clamp_min(eps).reciprocal_()

    # Scaling the products instead of the rows saves half the memory traffic. It may overflow where a norm does, so such
    # rows are scaled first; what is left to multiply is then 1. (On a GPU the question itself would be a host sync.)
    p_left_NB: Tensor | float = p_scale_NB
    z_left_NB: Tensor | float = z_scale_NB
    if with_stats or pa_BD.is_cuda or not torch.isfinite(p_norm_NB + z_norm_NB).all():
        p_N = [p * scale_B[:, None] for p, scale_B in zip(p_N, p_scale_NB, strict=True)]
        z_N = [z * scale_B[:, None] for z, scale_B in zip(z_N, z_scale_NB, strict=True)]
        p_left_NB = z_left_NB = 1.0

    # Not torch.linalg.vecdot: an ambient autocast would run that in bfloat16.
    dot_NB = torch.stack([(p * z).sum(1) for p, z in zip(p_N, z_N, strict=True)])
    cosine_NB = dot_NB.mul_(p_left_NB).mul_(z_left_NB).clamp_(-1.0, 1.0)
    row_loss_NB = torch.rsub(cosine_NB, 2.0, alpha=2.0)
    loss = row_loss_NB.sum() / batch

    if with_stats:
        cosine = 1.0 - 0.5 * row_loss_NB.mean()
        std_2ND = torch.stack([x_hat.std(0, correction=0) for x_hat in (*p_N, *z_N)]).view(2, len(pairs), dim)
    else:  # three tensors and not one: the outputs of an operator must not share memory
        row_loss_NB, cosine, std_2ND = (loss.new_empty(0) for _ in range(3))
    grad_NBD = pa_BD.new_empty((len(pairs), batch, dim) if with_grad else 0)
    if with_grad:
        # Below eps the denominator is a constant, so the part along p_hat vanishes, as in F.normalize.
        along_NB = torch.where(p_norm_NB >= eps, cosine_NB, 0.0)
        p_factor_NB = along_NB.mul_(p_left_NB).mul_(p_scale_NB).mul_(2.0)
        z_factor_NB = (p_scale_NB * -2.0).mul_(z_left_NB)
        for n, grad_BD in enumerate(grad_NBD):
            sum_BD = torch.mul(p_N[n], p_factor_NB[n][:, None], out=grad_BD if grad_BD.dtype == acc else None)
            sum_BD.addcmul_(z_N[n], z_factor_NB[n][:, None])
            if sum_BD is not grad_BD:
                grad_BD.copy_(sum_BD)
    return loss, grad_NBD, row_loss_NB, cosine, std_2ND


def normalized_mse_bwd(grad_loss: Tensor, grad_NBD: Tensor, pa_BD: Tensor, pb_BD: Tensor | None) -> Tensor:
    """The forward's gradient times the upstream gradient and the mean's 1/B; see `normalized_mse.py`."""
    scale = grad_loss / grad_NBD.shape[1]
    if grad_NBD.dtype == scale.dtype:
        return grad_NBD * scale
    return (grad_NBD.to(scale.dtype) * scale).to(grad_NBD.dtype)


def ema_update_(target: Sequence[Tensor], online: Sequence[Tensor], tau: float, copies: Sequence[Tensor]) -> None:
    """Updates the target: target = tau * target + (1 - tau) * online, then copies = target; see `ema.py`."""
    alike = [i for i, (t, o) in enumerate(zip(target, online, strict=True)) if t.dtype == o.dtype]
    if alike:
        # lerp is exact at both ends: weight 0 returns the target, weight 1 the online tensor.
        torch._foreach_lerp_([target[i] for i in alike], [online[i] for i in alike], 1.0 - tau)
    for i in set(range(len(target))).difference(alike):
        acc = accumulation_dtype(target[i].dtype)
        target[i].copy_(torch.lerp(target[i].to(acc), online[i].to(acc), 1.0 - tau))
    if copies:
        torch._foreach_copy_(list(copies), list(target))


_BLOCK = 1 << 18
"""Elements that LARS takes at a time: what one operation wrote is still in the cache when the next one reads it, and
a float32 sum over this many stays exact to 1e-6."""


def lars_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    eta: Sequence[float],
    adapt: Sequence[bool],
    grad_scale: float,
    tau: float,
) -> None:
    """One LARS step and, where a parameter has a target, the target's moving average; see `lars.py`.

    All sequences have one entry per parameter, and the tensors of one entry are dense and laid out alike (a gradient
    need not be). A parameter without a gradient stays as it is; its target moves all the same.
    """
    scratch = torch.empty(0)
    for row, param in enumerate(params):
        grad, buffer, target = grads[row], momentum_buffers[row], targets[row]
        acc = accumulation_dtype(param.dtype)
        if scratch.dtype != acc or scratch.numel() < min(_BLOCK, param.numel()):
            scratch = torch.empty(min(_BLOCK, param.numel()), dtype=acc)
        if grad is not None and not same_layout(grad, param):
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        decay = weight_decay[row] if adapt[row] else 0.0
        param_blocks, grad_blocks, buffer_blocks, target_blocks = map(_blocks, (param, grad, buffer, target))

        ratio = 1.0
        if grad_blocks and adapt[row]:
            param_square = update_square = 0.0
            for p, g in zip(param_blocks, grad_blocks, strict=True):
                p_acc = p.to(acc)  # no copy where the dtype is acc already; so too below
                update = torch.add(
                    _unscaled(g.to(acc), grad_scale, scratch), p_acc, alpha=decay, out=scratch[: p.numel()]
                )
                param_square += torch.dot(p_acc, p_acc).item()
                update_square += torch.dot(update, update).item()
            if param_square > 0.0 and update_square > 0.0:
                ratio = eta[row] * math.sqrt(param_square / update_square)

        # One pass over the data where PyTorch has one: its fused SGD computes v = momentum v + (1 - dampening) d.
        alike = grad is not None and buffer is not None and param.dtype == grad.dtype == buffer.dtype == acc
        fused = alike and momentum[row] != 0.0
        for index, p in enumerate(param_blocks):
            if fused:
                torch._fused_sgd_(
                    [p],
                    [_unscaled(grad_blocks[index], grad_scale, scratch)],
                    [buffer_blocks[index]],
                    weight_decay=decay,
                    momentum=momentum[row],
                    lr=lr[row],
                    dampening=1.0 - ratio,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                )
            elif grad_blocks and buffer_blocks:
                p_acc, v_acc = p.to(acc), buffer_blocks[index].to(acc)
                g_acc = _unscaled(grad_blocks[index].to(acc), grad_scale, scratch)
                v_acc.mul_(momentum[row]).add_(g_acc, alpha=ratio)
                if decay:
                    v_acc.add_(p_acc, alpha=ratio * decay)
                p_acc.add_(v_acc, alpha=-lr[row])
                if p.dtype != acc:
                    p.copy_(p_acc)
                    buffer_blocks[index].copy_(v_acc)
            if target_blocks:
                ema_update_([target_blocks[index]], [p], tau, [])


def _unscaled(grad: Tensor, grad_scale: float, scratch: Tensor) -> Tensor:
    return grad if grad_scale == 1.0 else torch.mul(grad, 1.0 / grad_scale, out=scratch[: grad.numel()])


def _blocks(tensor: Tensor | None) -> tuple[Tensor, ...]:
    """A dense tensor in the order of its memory, in blocks; nothing for no tensor."""
    return () if tensor is None else tensor.as_strided((tensor.numel(),), (1,)).split(_BLOCK)  # type: ignore[no-untyped-call]
