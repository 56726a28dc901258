"""The BYOL loss in plain PyTorch: the CPU path, and in float64 the oracle of the kernels.

`normalized_mse_stats_fwd` is the plain formula, for any device; `normalized_mse_fwd` computes the same in fewer passes.
`differentiable_loss` leaves the derivative to torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._dtypes import accumulation_dtype

_SMALL = 1 << 16
"""Elements of a prediction up to which every operator costs more than its arithmetic."""
_BLOCK_TO_CONVERT = 1 << 18
"""Elements that are converted at a time, so that the next operation finds them in the cache."""
_MIN_NORM, _MAX_NORM = 1e-15, 1e15
"""Norms between which squares in float32 neither overflow nor lose their digits."""


def grad_factors(p_BD: Tensor, local_KBD: Tensor | None) -> tuple[float, float]:
    """Factors of dcos/dp: of the gradient that the forward stores, and of the backward.

    Their product is -2 / (B (1 + K)): the mean over the batch, and twice the mean over 2 + 2 K pairs.
    """
    mean = -2.0 / (p_BD.shape[0] * _loss_divisor(local_KBD))
    return (1.0, mean) if p_BD.dtype == torch.float16 else (mean, 1.0)


def _loss_divisor(local_KBD: Tensor | None) -> int:
    """1 + K, by which the sum over all pairs is divided: half of their number 2 + 2 K, and 1 for one pair."""
    return 1 if local_KBD is None else 1 + local_KBD.shape[0]


def normalized_mse_fwd(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    local_KBD: Tensor | None,
    eps: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of all pairs, in few passes: the CPU path.

    Args:
        pa_BD: predictions of the first pair.
        za_BD: targets of the first pair.
        pb_BD: predictions of the second pair; None: one pair.
        zb_BD: targets of the second pair, or None.
        local_KBD: predictions that are paired with zb_BD and with za_BD, or None.
        eps: smallest norm that is divided by.
        with_grad: return gradients.

    Returns:
        Loss [], `grad_factors(p, local)[0]` * dcos/dp of each prediction [B, D], [B, D], [K, B, D]; empty where not
        asked for.
    """
    dtype, acc = pa_BD.dtype, accumulation_dtype(pa_BD.dtype)
    (batch, dim), (factor, _) = pa_BD.shape, grad_factors(pa_BD, local_KBD)
    pairs = [(pa_BD, za_BD)] if pb_BD is None or zb_BD is None else [(pa_BD, za_BD), (pb_BD, zb_BD)]
    buffers: Sequence[Tensor] = ()
    if batch * dim > _SMALL and dtype != acc:
        rows = min(max(_BLOCK_TO_CONVERT // dim, 1), batch)
        buffers = pa_BD.new_empty((2, rows, dim), dtype=acc).unbind()
    part = _global_views(pairs, buffers, eps, factor)
    local_part: tuple[Tensor, float] | None = (pa_BD.new_empty(0), 0.0)
    if local_KBD is not None and zb_BD is not None and part is not None:
        local_part = _local_views(local_KBD, za_BD, zb_BD, buffers, eps, factor)
    if part is None or local_part is None:
        return normalized_mse_stats_fwd(pa_BD, za_BD, pb_BD, zb_BD, local_KBD, eps, with_grad)[:4]
    total = part[1] + local_part[1]
    mean = 2.0 * len(pairs) + total * (-2.0 / (batch * _loss_divisor(local_KBD) * factor))
    loss = pa_BD.new_full((), min(max(mean, 0.0), 4.0 * len(pairs)), dtype=acc)
    if not with_grad:
        return loss, pa_BD.new_empty(0), pa_BD.new_empty(0), pa_BD.new_empty(0)
    grad_b = pa_BD.new_empty(0) if pb_BD is None else part[0][1]
    return loss, part[0][0], grad_b, local_part[0]


def _global_views(
    pairs: Sequence[tuple[Tensor, Tensor]], buffers: Sequence[Tensor], eps: float, factor: float
) -> tuple[Sequence[Tensor], float] | None:
    """`_normalized_mse_rows` of each pair; gradients in the dtype of the predictions, [B, D] each."""
    first = pairs[0][0]
    if first.numel() <= _SMALL:  # all rows at once
        x = torch.cat([*(p for p, _ in pairs), *(z for _, z in pairs)]).to(accumulation_dtype(first.dtype))
        p, z = x.chunk(2)
        part = _normalized_mse_rows(p, z, torch.linalg.vector_norm(x, dim=1), eps, factor)
        return None if part is None else (part[0].to(first.dtype).chunk(len(pairs)), part[1])
    grads, total = [], 0.0
    for p_BD, z_BD in pairs:
        part = _normalized_mse_whole(p_BD, z_BD, None, buffers, eps, factor)
        if part is None:
            return None
        grads.append(part[0])
        total += part[1]
    return grads, total


def _local_views(
    local_KBD: Tensor, za_BD: Tensor, zb_BD: Tensor, buffers: Sequence[Tensor], eps: float, factor: float
) -> tuple[Tensor, float] | None:
    """`_normalized_mse_rows` of local views, for targets whose norms are in range, as `_global_views` has checked.

    The sum of the cosines with two targets is the product with the sum of the normalized targets.
    """
    num_local, batch, dim = local_KBD.shape
    z = torch.stack([za_BD, zb_BD]).to(accumulation_dtype(za_BD.dtype))
    z_BD, one_B = z.div_(torch.linalg.vector_norm(z, dim=2, keepdim=True)).sum(0), z.new_ones(batch)
    if batch * dim <= _SMALL:  # all views at once
        p = local_KBD.to(z.dtype).reshape(-1, dim)
        part = _normalized_mse_whole(p, z_BD.repeat(num_local, 1), one_B.repeat(num_local), (), eps, factor)
        return None if part is None else (part[0].to(local_KBD.dtype).view(local_KBD.shape), part[1])
    grads, total = [], 0.0
    for p_BD in local_KBD:
        part = _normalized_mse_whole(p_BD, z_BD, one_B, buffers, eps, factor)
        if part is None:
            return None
        grads.append(part[0])
        total += part[1]
    return torch.stack(grads), total


def _normalized_mse_whole(
    p_BD: Tensor, z_BD: Tensor, z_norm_B: Tensor | None, buffers: Sequence[Tensor], eps: float, factor: float
) -> tuple[Tensor, float] | None:
    """`_normalized_mse_rows` of all rows: at once, or in blocks through two buffers that stay in the cache."""

    def of_rows(p: Tensor, z: Tensor, rows: slice) -> tuple[Tensor, float] | None:
        p_norm = torch.linalg.vector_norm(p, dim=1)
        z_norm = torch.linalg.vector_norm(z, dim=1) if z_norm_B is None else z_norm_B[rows]
        return _normalized_mse_rows(p, z, torch.cat([p_norm, z_norm]), eps, factor)

    if not buffers:
        return of_rows(p_BD.contiguous(), z_BD.contiguous(), slice(None))
    block = buffers[0].shape[0]
    grad_BD, total = p_BD.new_empty(p_BD.shape), 0.0
    for start in range(0, p_BD.shape[0], block):
        rows = slice(start, start + block)
        p, z = (buffer[: x.shape[0]].copy_(x) for buffer, x in zip(buffers, (p_BD[rows], z_BD[rows]), strict=True))
        part = of_rows(p, z, rows)
        if part is None:
            return None
        grad_BD[rows] = part[0]
        total += part[1]
    return grad_BD, total


def _normalized_mse_rows(p: Tensor, z: Tensor, norms: Tensor, eps: float, factor: float) -> tuple[Tensor, float] | None:
    """`factor` times dcos/dp of some rows, and times the sum of their cosines; None for norms out of range.

    The backward of weight normalization is <p, z> / |p| and g / |p| (z - <p, z> p / |p|^2) of each row in one pass,
    with g = factor / |z| here. It knows neither eps nor overflow.
    """
    shortest, longest = torch.aminmax(norms)
    if not (shortest.item() >= max(eps, _MIN_NORM) and longest.item() <= _MAX_NORM):  # or one is NaN
        return None
    p_norm, z_norm = norms.chunk(2)
    z_scale = z_norm.reciprocal().mul_(factor)
    grad, dot = torch.ops.aten._weight_norm_interface_backward.default(z, p, z_scale, p_norm, 0)
    return grad, torch.dot(dot, z_scale).item()


def normalized_mse_stats_fwd(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    local_KBD: Tensor | None,
    eps: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and statistics by the plain formula, on any device.

    Returns:
        Loss [], `grad_factors(p, local)[0]` * dcos/dp of each prediction [B, D], [B, D], [K, B, D] (empty where not
        asked for), row losses [N, B], mean cosine [], std of the normalized inputs of the V global views [2, V, D]
        (predictions, then targets).
    """
    acc, (factor, _) = accumulation_dtype(pa_BD.dtype), grad_factors(pa_BD, local_KBD)
    views = _targets_of_views(pa_BD, za_BD, pb_BD, zb_BD, local_KBD)
    grads, cosines, p_stds, z_stds = [], [], [], []
    for p_BD, targets in views:
        # The eps convention of F.normalize: x / max(|x|, eps).
        p_norm_B1 = torch.linalg.vector_norm(p_BD.to(acc), dim=1, keepdim=True)
        p_scale_B1 = p_norm_B1.clamp_min(eps).reciprocal_()
        p_hat_BD, grad_BD = p_BD * p_scale_B1, None
        for z_BD in targets:
            z_norm_B1 = torch.linalg.vector_norm(z_BD.to(acc), dim=1, keepdim=True)
            z_hat_BD = z_BD * z_norm_B1.clamp_min(eps).reciprocal_()
            # Not torch.linalg.vecdot: an ambient autocast would run that in bfloat16.
            cosine_B1 = (p_hat_BD * z_hat_BD).sum(1, keepdim=True).clamp_(-1.0, 1.0)
            cosines.append(cosine_B1[:, 0])
            if len(targets) == 1:  # a global view
                p_stds.append(p_hat_BD.std(0, correction=0))
                z_stds.append(z_hat_BD.std(0, correction=0))
            if with_grad:
                # Below eps the denominator is a constant, so the part along p_hat vanishes, as in F.normalize.
                along_B1 = torch.where(p_norm_B1 >= eps, cosine_B1, 0.0)
                z_hat_BD.addcmul_(p_hat_BD, along_B1, value=-1.0)
                grad_BD = z_hat_BD if grad_BD is None else grad_BD.add_(z_hat_BD)
        grads.append(pa_BD.new_empty(0) if grad_BD is None else grad_BD.mul_(p_scale_B1.mul_(factor)).to(pa_BD.dtype))
    row_loss_NB = torch.rsub(torch.stack(cosines), 2.0, alpha=2.0)
    loss = row_loss_NB.sum() / (pa_BD.shape[0] * _loss_divisor(local_KBD))
    cosine = 1.0 - 0.5 * row_loss_NB.mean()
    grad_b = pa_BD.new_empty(0) if pb_BD is None else grads[1]
    grad_local = torch.stack(grads[2:]) if with_grad and local_KBD is not None else pa_BD.new_empty(0)
    return (
        loss,
        grads[0],
        grad_b,
        grad_local,
        row_loss_NB,
        cosine,
        torch.stack([torch.stack(p_stds), torch.stack(z_stds)]),
    )


def _targets_of_views(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, local_KBD: Tensor | None
) -> list[tuple[Tensor, list[Tensor]]]:
    """Predictions of each view with its targets, in the order of the pairs."""
    if pb_BD is None or zb_BD is None:
        return [(pa_BD, [za_BD])]
    local = () if local_KBD is None else local_KBD.unbind()
    return [(pa_BD, [za_BD]), (pb_BD, [zb_BD]), *((p_BD, [zb_BD, za_BD]) for p_BD in local)]


def differentiable_loss(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, local_KBD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and statistics by operations that every transform of torch can differentiate; no derivative by a target.

    Returns:
        Loss [], row losses [N, B], mean cosine [], std of the normalized inputs of the V global views [2, V, D]
        (predictions, then targets).
    """
    acc = accumulation_dtype(pa_BD.dtype)
    views = _targets_of_views(pa_BD, za_BD, pb_BD, zb_BD, local_KBD)
    pairs = [
        (p_hat_BD, torch.nn.functional.normalize(z_BD.detach().to(acc), dim=1, eps=eps))
        for p_BD, targets in views
        for p_hat_BD in [torch.nn.functional.normalize(p_BD.to(acc), dim=1, eps=eps)]  # once: one rounded gradient
        for z_BD in targets
    ]
    p_hat_NBD, z_hat_NBD = (torch.stack(inputs) for inputs in zip(*pairs, strict=True))
    cosine_NB = (p_hat_NBD * z_hat_NBD).sum(2)
    # Clamped without a gradient: that of `clamp` is 0 where a rounding has made a cosine greater than 1.
    cosine_NB = cosine_NB + (cosine_NB.clamp(-1.0, 1.0) - cosine_NB).detach()
    row_loss_NB = 2.0 - 2.0 * cosine_NB
    stds = torch.stack([x[:2].detach().std(1, correction=0) for x in (p_hat_NBD, z_hat_NBD)])
    return (
        row_loss_NB.sum() / (pa_BD.shape[0] * _loss_divisor(local_KBD)),
        row_loss_NB.detach(),
        1.0 - 0.5 * row_loss_NB.detach().mean(),
        stds,
    )


def normalized_mse_bwd(
    grad_loss: Tensor,
    grad_a: Tensor,
    grad_b: Tensor | None,
    grad_local: Tensor | None,
    pa_BD: Tensor,
    pb_BD: Tensor | None,
    local_KBD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stored gradients times the upstream gradient and the factor that the forward left out."""
    # A 0-dim factor is not rounded to the dtype of what it multiplies, so a float16 gradient is rounded once here.
    scale = grad_loss * grad_factors(grad_a, grad_local)[1]
    if grad_b is None:
        return grad_a * scale, grad_a.new_empty(0), grad_a.new_empty(0)
    if grad_local is None:
        scaled = torch._foreach_mul([grad_a, grad_b], scale)
        return scaled[0], scaled[1], grad_a.new_empty(0)
    scaled = torch._foreach_mul([grad_a, grad_b, grad_local], scale)
    return scaled[0], scaled[1], scaled[2]
