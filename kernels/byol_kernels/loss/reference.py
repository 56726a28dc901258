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


def grad_factors(p_BD: Tensor) -> tuple[float, float]:
    """Factors of dcos/dp: of the gradient that the forward stores, and of the backward. Their product is -2 / B."""
    mean = -2.0 / p_BD.shape[0]
    return (1.0, mean) if p_BD.dtype == torch.float16 else (mean, 1.0)


def normalized_mse_fwd(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of one or two (prediction, target) pairs, in few passes: the CPU path.

    Returns:
        Loss [], `grad_factors(p)[0]` * dcos/dp of each prediction [B, D]; empty where not asked for.
    """
    inputs = [pa_BD, za_BD] if pb_BD is None or zb_BD is None else [pa_BD, pb_BD, za_BD, zb_BD]
    num_pairs, (batch, dim) = len(inputs) // 2, pa_BD.shape
    dtype, acc = pa_BD.dtype, accumulation_dtype(pa_BD.dtype)
    factor, _ = grad_factors(pa_BD)
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
    """`_normalized_mse_rows` of all rows: at once, or in blocks through two buffers that stay in the cache."""

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
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and statistics by the plain formula, on any device.

    Returns:
        Loss [], `grad_factors(p)[0]` * dcos/dp of each prediction [B, D] (empty where not asked for), row losses
        [N, B], mean cosine [], std of the normalized inputs [2, N, D] (predictions, then targets).
    """
    pairs = [(pa_BD, za_BD)] if pb_BD is None or zb_BD is None else [(pa_BD, za_BD), (pb_BD, zb_BD)]
    acc, (factor, _) = accumulation_dtype(pa_BD.dtype), grad_factors(pa_BD)
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


def differentiable_loss(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and statistics by operations that every transform of torch can differentiate; no derivative by a target.

    Returns:
        Loss [], row losses [N, B], mean cosine [], std of the normalized inputs [2, N, D] (predictions, then targets).
    """
    acc = accumulation_dtype(pa_BD.dtype)
    pairs = [(pa_BD, za_BD)] if pb_BD is None or zb_BD is None else [(pa_BD, za_BD), (pb_BD, zb_BD)]
    p_hat_NBD, z_hat_NBD = (
        torch.stack([torch.nn.functional.normalize(x.to(acc), dim=1, eps=eps) for x in inputs])
        for inputs in ([p for p, _ in pairs], [z.detach() for _, z in pairs])
    )
    cosine_NB = (p_hat_NBD * z_hat_NBD).sum(2)
    # Clamped without a gradient: that of `clamp` is 0 where a rounding has made a cosine greater than 1.
    cosine_NB = cosine_NB + (cosine_NB.clamp(-1.0, 1.0) - cosine_NB).detach()
    row_loss_NB = 2.0 - 2.0 * cosine_NB
    stds = torch.stack([x.detach().std(1, correction=0) for x in (p_hat_NBD, z_hat_NBD)])
    return (
        row_loss_NB.sum() / pa_BD.shape[0],
        row_loss_NB.detach(),
        1.0 - 0.5 * row_loss_NB.detach().mean(),
        stds,
    )


def normalized_mse_bwd(
    grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor | None, pa_BD: Tensor, pb_BD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The stored gradients times the upstream gradient and the factor that the forward left out."""
    # A 0-dim factor is not rounded to the dtype of what it multiplies, so a float16 gradient is rounded once here.
    scale = grad_loss * grad_factors(grad_a)[1]
    if grad_b is None:
        return grad_a * scale, grad_a.new_empty(0)
    scaled = torch._foreach_mul([grad_a, grad_b], scale)
    return scaled[0], scaled[1]
