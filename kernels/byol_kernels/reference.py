"""Every operator in plain PyTorch: what runs on a CPU, and the kernels' oracle.

Run on float64 tensors they are the oracle of the tests; run on float32 tensors they are the CPU implementation, so
they are written to be fast as well as clear.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from byol_kernels._multi_tensor import same_layout

# Elements that are taken at a time, so that what one operation wrote is still in the cache when the next one reads it.
_BLOCK = 1 << 20
_BLOCK_TO_CONVERT = 1 << 18
_SMALL = 1 << 16
"""Elements of a prediction up to which every operator costs more than its arithmetic."""
_ROW = 256
"""A float32 sum over many elements, one after the other, loses digits: squares are summed in rows, rows in float64."""
SHORTEST, LONGEST = 1e-15, 1e15
"""Norms between which squares in float32 neither overflow nor lose their digits."""


def is_plain(x: Tensor) -> bool:
    """A tensor on the CPU that nobody traces, records or stands in for: its operators can be called as functions.

    The way through the dispatcher takes a tenth of the time of the loss of a small batch.
    """
    return (
        x.is_cpu
        and type(x) in (Tensor, Parameter)
        and not is_in_torch_dispatch_mode()
        and not torch.compiler.is_compiling()
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are taken in float64 for float64 inputs and in float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def factors(p_BD: Tensor) -> tuple[float, float]:
    """What the forward of the loss multiplies dcos/dp by before it stores it, and what it leaves to the backward."""
    mean = -2.0 / p_BD.shape[0]
    return (1.0, mean) if p_BD.dtype == torch.float16 else (mean, 1.0)


def normalized_mse_fwd(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of one or two (prediction, target) pairs on the CPU; see `normalized_mse.py`.

    Returns:
        loss [], gradient by each prediction [B, D] as `normalized_mse.py` stores it; empty where not asked for.
    """
    inputs = [pa_BD, za_BD] if pb_BD is None or zb_BD is None else [pa_BD, pb_BD, za_BD, zb_BD]
    num_pairs, (batch, dim) = len(inputs) // 2, pa_BD.shape
    dtype, acc = pa_BD.dtype, accumulation_dtype(pa_BD.dtype)
    factor, _ = factors(pa_BD)
    grads: list[Tensor] = []
    total = 0.0
    if batch * dim <= _SMALL:  # all rows at once
        x = torch.cat(inputs)
        x = x if dtype == acc else x.to(acc)
        p, z = x.chunk(2)
        part = _normalized_mse_rows(p, z, torch.linalg.vector_norm(x, dim=1), eps, factor)
        if part is None:
            return normalized_mse_stats_fwd(pa_BD, za_BD, pb_BD, zb_BD, eps, with_grad)[:3]
        grad, total = part
        grads.extend((grad if dtype == acc else grad.to(dtype)).chunk(num_pairs))
    else:
        block = max(_BLOCK_TO_CONVERT // dim, 1)
        buffers = () if dtype == acc else pa_BD.new_empty((2, min(block, batch), dim), dtype=acc).unbind()
        for p_BD, z_BD in zip(inputs[:num_pairs], inputs[num_pairs:], strict=True):
            part = _normalized_mse_whole(p_BD, z_BD, buffers, eps, factor)
            if part is None:
                return normalized_mse_stats_fwd(pa_BD, za_BD, pb_BD, zb_BD, eps, with_grad)[:3]
            grads.append(part[0])
            total += part[1]
    loss = min(max(2.0 * num_pairs + total * (-2.0 / (batch * factor)), 0.0), 4.0 * num_pairs)
    return (
        pa_BD.new_full((), loss, dtype=acc),
        grads[0] if with_grad else pa_BD.new_empty(0),
        grads[1] if with_grad and num_pairs == 2 else pa_BD.new_empty(0),
    )


def _normalized_mse_whole(
    p_BD: Tensor, z_BD: Tensor, buffers: Sequence[Tensor], eps: float, factor: float
) -> tuple[Tensor, float] | None:
    """`_normalized_mse_rows` of all rows: at once, or through two buffers that stay in the cache."""

    def of_rows(p: Tensor, z: Tensor) -> tuple[Tensor, float] | None:
        norms = torch.cat([torch.linalg.vector_norm(x, dim=1) for x in (p, z)])
        return _normalized_mse_rows(p, z, norms, eps, factor)

    if not buffers:
        return of_rows(p_BD.contiguous(), z_BD.contiguous())
    block = buffers[0].shape[0]
    grad_BD, total = p_BD.new_empty(p_BD.shape), 0.0
    for start in range(0, p_BD.shape[0], block):
        rows = slice(start, start + block)
        p, z = (buffer[: x.shape[0]].copy_(x) for buffer, x in zip(buffers, (p_BD[rows], z_BD[rows]), strict=True))
        part = of_rows(p, z)
        if part is None:
            return None
        grad_BD[rows] = part[0]
        total += part[1]
    return grad_BD, total


def _normalized_mse_rows(p: Tensor, z: Tensor, norms: Tensor, eps: float, factor: float) -> tuple[Tensor, float] | None:
    """`factor` times the gradients of some rows' cosines and times their sum; None if the plain formula has to do it.

    The backward of weight normalisation is <p, z> / |p| and g / |p| (z - <p, z> p / |p|^2) of each row in one pass,
    with g = factor / |z| here. It knows neither eps nor overflow.
    """
    shortest, longest = torch.aminmax(norms)
    if not (shortest.item() >= max(eps, SHORTEST) and longest.item() <= LONGEST):  # or one is NaN
        return None
    p_norm, z_norm = norms.chunk(2)
    z_scale = z_norm.reciprocal().mul_(factor)
    grad, dot = torch.ops.aten._weight_norm_interface_backward.default(z, p, z_scale, p_norm, 0)
    return grad, torch.dot(dot, z_scale).item()


def normalized_mse_stats_fwd(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and statistics by the plain formula, on any device; see `normalized_mse.py`.

    Returns:
        loss [], gradient by each prediction [B, D] as `normalized_mse.py` stores it (empty where not asked for), row
        losses [N, B], mean cosine [], std of the normalised inputs [2, N, D] (predictions, then targets).
    """
    pairs = [(pa_BD, za_BD)] if pb_BD is None or zb_BD is None else [(pa_BD, za_BD), (pb_BD, zb_BD)]
    acc, (factor, _) = accumulation_dtype(pa_BD.dtype), factors(pa_BD)
    grads, cosines, p_stds, z_stds = [pa_BD.new_empty(0), pa_BD.new_empty(0)], [], [], []
    for pair, (p_BD, z_BD) in enumerate(pairs):
        # The eps convention of F.normalize: x / max(|x|, eps).
        p_norm_B1, z_norm_B1 = (torch.linalg.vector_norm(x.to(acc), dim=1, keepdim=True) for x in (p_BD, z_BD))
        p_scale_B1, z_scale_B1 = p_norm_B1.clamp_min(eps).reciprocal_(), z_norm_B1.clamp_min(eps).reciprocal_()
        p_hat_BD, z_hat_BD = p_BD * p_scale_B1, z_BD * z_scale_B1
        # Not torch.linalg.vecdot: an ambient autocast would run that in bfloat16.
        cosine_B1 = (p_hat_BD * z_hat_BD).sum(1, keepdim=True).clamp_(-1.0, 1.0)
        cosines.append(cosine_B1[:, 0])
        p_stds.append(p_hat_BD.std(0, correction=0))
        z_stds.append(z_hat_BD.std(0, correction=0))
        if with_grad:
            # Below eps the denominator is a constant, so the part along p_hat vanishes, as in F.normalize.
            along_B1 = torch.where(p_norm_B1 >= eps, cosine_B1, 0.0)
            grad_BD = z_hat_BD.addcmul_(p_hat_BD, along_B1, value=-1.0).mul_(p_scale_B1.mul_(factor))
            grads[pair] = grad_BD.to(pa_BD.dtype)
    row_loss_NB = torch.rsub(torch.stack(cosines), 2.0, alpha=2.0)
    loss = row_loss_NB.sum() / pa_BD.shape[0]
    cosine = 1.0 - 0.5 * row_loss_NB.mean()
    return loss, grads[0], grads[1], row_loss_NB, cosine, torch.stack([torch.stack(p_stds), torch.stack(z_stds)])


def normalized_mse_bwd(
    grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor | None, pa_BD: Tensor, pb_BD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The stored gradients times the upstream gradient and what the forward left out; see `normalized_mse.py`."""
    # A 0-dim factor is not rounded to the dtype of what it multiplies, so a float16 gradient is rounded once here.
    scale = grad_loss * factors(grad_a)[1]
    if grad_b is None:
        return grad_a * scale, grad_a.new_empty(0)
    scaled = torch._foreach_mul([grad_a, grad_b], scale)
    return scaled[0], scaled[1]


def ema_update_(target: list[Tensor], online: list[Tensor], tau: float, copies: list[Tensor], *, alike: bool) -> None:
    """Updates the target: target = tau * target + (1 - tau) * online, then copies = target; see `ema.py`.

    Args:
        target: tensors to update.
        online: their partners.
        tau: the decay.
        copies: of the updated targets; none, or as many.
        alike: whether all partners have the dtype of their target.
    """
    if alike:  # lerp is exact at both ends: weight 0 returns the target, weight 1 the online tensor
        torch._foreach_lerp_(target, online, 1.0 - tau)
    else:
        for t, o in zip(target, online, strict=True):
            acc = accumulation_dtype(t.dtype)
            t.copy_(torch.lerp(t.to(acc), o.to(acc), 1.0 - tau))
    if copies:
        torch._foreach_copy_(copies, target)


def update_running_stats_(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batch_mean: Sequence[Tensor],
    batch_var: Sequence[Tensor],
    counters: Sequence[Tensor],
    counter_rows: Sequence[int],
    momentum: Sequence[float],
) -> None:
    """Moves running statistics of batch norms by those of one or several batches; see `running_stats.py`.

    Args:
        running_mean: [C] of each layer.
        running_var: likewise.
        batch_mean: [V, C] of each layer.
        batch_var: likewise.
        counters: of batches, int64 scalars.
        counter_rows: the layer of each counter.
        momentum: of each layer; negative for the cumulative average.
    """
    counts = {row: int(counter) for row, counter in zip(counter_rows, counters, strict=True)}
    for split in range(max(map(len, batch_mean))):
        by_factor: dict[float, list[int]] = {}
        for row, value in enumerate(momentum):
            if split < len(batch_mean[row]):
                by_factor.setdefault(value if value >= 0.0 else 1.0 / (counts[row] + split + 1), []).append(row)
        for factor, rows in by_factor.items():
            running = [column[row] for column in (running_mean, running_var) for row in rows]
            batch = [column[row][split] for column in (batch_mean, batch_var) for row in rows]
            torch._foreach_mul_(running, 1.0 - factor)
            torch._foreach_add_(running, batch, alpha=factor)
    for row, counter in zip(counter_rows, counters, strict=True):
        counter.add_(len(batch_mean[row]))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True if no element of any tensor is an infinity or a NaN."""
    # A finite sum has finite terms and takes a tenth of the time of isfinite; it may overflow, so a non-finite one
    # decides nothing.
    return all(math.isfinite(t.sum().item()) or bool(t.isfinite().all()) for t in tensors)


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
    listed: dict[tuple[float, float], list[int]] = {}
    done = []  # but for the target
    for row, param in enumerate(params):
        grad, buffer = grads[row], momentum_buffers[row]
        if grad is None or buffer is None:
            done.append(row)
            continue
        if not same_layout(grad, param):
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        alike = param.dtype == grad.dtype == buffer.dtype == accumulation_dtype(param.dtype)
        # One pass over the data where PyTorch has one: its fused SGD computes v = momentum v + (1 - dampening) d.
        fused = alike and momentum[row] != 0.0
        if fused and not adapt[row] and grad is grads[row] and grad_scale == 1.0:
            listed.setdefault((lr[row], momentum[row]), []).append(row)
            done.append(row)
            continue
        decay = weight_decay[row] if adapt[row] else 0.0
        param_blocks, grad_blocks, buffer_blocks = _blocks(param), _blocks(grad), _blocks(buffer)
        target = targets[row]
        target_blocks = None if target is None else _blocks(target)
        ratio = _lars_ratio(param_blocks, grad_blocks, decay, grad_scale, eta[row]) if adapt[row] else 1.0
        # Backwards, because the last blocks that the norms read are still in the cache.
        for index in reversed(range(len(param_blocks))):
            p, g, v = param_blocks[index], grad_blocks[index], buffer_blocks[index]
            if grad_scale != 1.0:
                g = g.to(accumulation_dtype(p.dtype)) * (1.0 / grad_scale)
            # A dampening of 1 - ratio has no digits left of a small ratio.
            update = _fused_sgd_ if fused and ratio >= 1e-8 else _sgd_
            update([p], [g], [v], lr=lr[row], momentum=momentum[row], decay=decay, ratio=ratio)
            if target_blocks is not None:
                t = target_blocks[index]
                if t.dtype == p.dtype:
                    t.lerp_(p, 1.0 - tau)
                else:
                    ema_update_([t], [p], tau, [], alike=False)

    for (row_lr, row_momentum), rows in listed.items():
        columns = (
            [x for row in rows if (x := column[row]) is not None] for column in (params, grads, momentum_buffers)
        )
        _fused_sgd_(*columns, lr=row_lr, momentum=row_momentum, decay=0.0, ratio=1.0)
    pairs = [(target, params[row]) for row in done if (target := targets[row]) is not None]
    for alike in (True, False):
        chosen = [pair for pair in pairs if (pair[0].dtype == pair[1].dtype) is alike]
        if chosen:
            ema_update_([t for t, _ in chosen], [p for _, p in chosen], tau, [], alike=alike)


def _lars_ratio(
    param_blocks: Sequence[Tensor], grad_blocks: Sequence[Tensor], decay: float, grad_scale: float, eta: float
) -> float:
    """The trust ratio eta |p| / |g + decay p|, or 1 where either norm is 0."""
    acc = accumulation_dtype(param_blocks[0].dtype)
    p_square = g_square = p_dot_g = 0.0
    for p, g in zip(param_blocks, grad_blocks, strict=True):
        p_acc, g_acc = p.to(acc), g.to(acc)  # no copy where the dtype is acc already
        p_square += _square(p_acc)
        g_square += _square(g_acc)
        if decay:
            p_dot_g += torch.dot(p_acc, g_acc).item()
    g_square, cross = g_square / (grad_scale * grad_scale), 2.0 * decay * p_dot_g / grad_scale
    update_square = g_square + cross + decay * decay * p_square
    # The product is summed in one go. Where it matters, because both point the same way or cancel out, it is not used.
    if not abs(cross) < 1e-4 * update_square:  # or one is NaN
        update_square = 0.0
        for p, g in zip(param_blocks, grad_blocks, strict=True):
            update_square += _square(torch.add(p.to(acc) * decay, g.to(acc), alpha=1.0 / grad_scale))
    return eta * math.sqrt(p_square / update_square) if p_square > 0.0 and update_square > 0.0 else 1.0


def _square(x: Tensor) -> float:
    """The sum of the squares of a contiguous vector."""
    total, rest = 0.0, x.numel() % _ROW
    if rest < x.numel():
        norms = torch.linalg.vector_norm((x[:-rest] if rest else x).view(-1, _ROW), dim=1).double()
        total = torch.dot(norms, norms).item()
    if rest:
        tail = x[-rest:]
        total += torch.dot(tail, tail).item()
    return total


def _fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    decay: float,
    ratio: float,
) -> None:
    """V = momentum v + ratio (g + decay p), then p -= lr v, of contiguous tensors."""
    torch._fused_sgd_(
        params, grads, momentum_buffers,
        weight_decay=decay, momentum=momentum, lr=lr, dampening=1.0 - ratio,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


def _sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    decay: float,
    ratio: float,
) -> None:
    """The same for any dtypes, and without momentum."""
    for p, g, v in zip(params, grads, momentum_buffers, strict=True):
        acc = accumulation_dtype(p.dtype)
        p_acc, v_acc = p.to(acc), v.to(acc)
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
