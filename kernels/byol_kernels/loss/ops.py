"""The BYOL loss as an operator: schema, dispatch, autograd, checks, public functions.

For a prediction p and a target projection z, row by row (Grill et al. 2020, arXiv 2006.07733, equation 2):

    p_hat = p / max(|p|, eps)        z_hat = z / max(|z|, eps)        cos = <p_hat, z_hat>
    l(p, z) = 2 - 2 cos                                    (= |p_hat - z_hat|^2 for rows no shorter than eps)
    dl/dp = 2 (cos p_hat - z_hat) / max(|p|, eps)          (the part along p_hat is 0 where |p| < eps)

No gradient flows to z. The forward stores the gradient of the loss in the dtype of p, and the backward multiplies it by
the upstream gradient. In float16 the factor -2 / B, with K local views -2 / (B (1 + K)), is left to the backward, or
the gradient would be subnormal before a loss scale reaches it. Within the transforms of `torch.func` and in forward
mode the public functions are plain PyTorch, differentiable any number of times.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from byol_kernels._dtypes import FLOAT_DTYPES, accumulation_dtype
from byol_kernels.derivatives import is_transformed, register_autograd
from byol_kernels.loss import kernels, reference

# -------------------------------------------------------------------------------- operators


def _normalized_mse_fwd_cpu(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    local_KBD: Tensor | None,
    eps: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, grad_a, grad_b, grad_local = reference.normalized_mse_fwd(
        pa_BD, za_BD, pb_BD, zb_BD, local_KBD, eps, with_grad
    )
    # Those of a small batch are halves of one tensor, but the outputs of an operator must not share memory.
    shared = grad_a.untyped_storage().data_ptr() == grad_b.untyped_storage().data_ptr()
    return loss, grad_a, grad_b.clone() if shared else grad_b, grad_local


def _normalized_mse_fwd_cuda(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    local_KBD: Tensor | None,
    eps: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    max_dim = kernels.MAX_DIM if local_KBD is None else kernels.MAX_DIM_WITH_LOCAL
    if pa_BD.dtype == torch.float64 or pa_BD.shape[1] > max_dim:
        return reference.normalized_mse_stats_fwd(pa_BD, za_BD, pb_BD, zb_BD, local_KBD, eps, with_grad)[:4]
    factor, _ = reference.grad_factors(pa_BD, local_KBD)
    return kernels.normalized_mse_fwd(
        pa_BD, za_BD, pb_BD, zb_BD, local_KBD, eps, grad_factor=factor, with_grad=with_grad, with_stats=False
    )[:4]


def _normalized_mse_stats_fwd_cuda(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    local_KBD: Tensor | None,
    eps: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if pa_BD.dtype == torch.float64 or pa_BD.shape[1] > kernels.MAX_DIM_WITH_STATS:
        return reference.normalized_mse_stats_fwd(pa_BD, za_BD, pb_BD, zb_BD, local_KBD, eps, with_grad)
    factor, _ = reference.grad_factors(pa_BD, local_KBD)
    return kernels.normalized_mse_fwd(
        pa_BD, za_BD, pb_BD, zb_BD, local_KBD, eps, grad_factor=factor, with_grad=with_grad, with_stats=True
    )


def _normalized_mse_bwd_cuda(
    grad_loss: Tensor,
    grad_a: Tensor,
    grad_b: Tensor | None,
    grad_local: Tensor | None,
    pa_BD: Tensor,
    pb_BD: Tensor | None,
    local_KBD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_a.dtype == torch.float64:
        return reference.normalized_mse_bwd(grad_loss, grad_a, grad_b, grad_local, pa_BD, pb_BD, local_KBD)
    _, factor = reference.grad_factors(grad_a, grad_local)
    out_a, out_b, out_local = kernels.normalized_mse_bwd(grad_loss, grad_a, grad_b, grad_local, factor)
    return (
        out_a,
        grad_a.new_empty(0) if out_b is None else out_b,
        grad_a.new_empty(0) if out_local is None else out_local,
    )


def _fwd_fake(
    pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, local: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        pa.new_empty((), dtype=accumulation_dtype(pa.dtype)),
        pa.new_empty(pa.shape if with_grad else (0,)),
        pa.new_empty(pa.shape if with_grad and pb is not None else (0,)),
        pa.new_empty(local.shape if with_grad and local is not None else (0,)),
    )


def _stats_fwd_fake(
    pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, local: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, grad_a, grad_b, grad_local = _fwd_fake(pa, za, pb, zb, local, eps, with_grad)
    num_global = 1 if pb is None else 2
    num_pairs = num_global if local is None else 2 + 2 * local.shape[0]
    return (
        loss,
        grad_a,
        grad_b,
        grad_local,
        loss.new_empty((num_pairs, pa.shape[0])),
        loss.new_empty(()),
        loss.new_empty((2, num_global, pa.shape[1])),
    )


def _bwd_fake(
    grad_loss: Tensor,
    grad_a: Tensor,
    grad_b: Tensor | None,
    grad_local: Tensor | None,
    pa: Tensor,
    pb: Tensor | None,
    local: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(grad_a.new_empty(0) if g is None else torch.empty_like(g) for g in (grad_a, grad_b, grad_local))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pa, _, pb, _, local, _, with_grad = inputs
    if not with_grad:
        ctx.mark_non_differentiable(*output)
        return
    ctx.set_materialize_grads(False)  # else the backward fills a tensor of zeros for every output but the loss
    predictions = (pa, pb, local)
    grads = (grad if p is not None else None for p, grad in zip(predictions, output[1:4], strict=True))
    ctx.save_for_backward(*grads, *predictions)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    _, _, _, _, pb, local = ctx.saved_tensors
    grad_pa, grad_pb, grad_local = torch.ops.byol_kernels.normalized_mse_bwd.default(grad_loss, *ctx.saved_tensors)
    return (
        grad_pa,
        None,
        None if pb is None else grad_pb,
        None,
        None if local is None else grad_local,
        None,
        None,
    )


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "byol_kernels: the BYOL loss must be differentiated once, got a second derivative; "
        "write the loss with torch.nn.functional.normalize where a gradient penalty or a Hessian is needed"
    )


# Absent outputs are empty: the gradients of absent predictions, and gradients that were not asked for.
_IN = "(Tensor pa, Tensor za, Tensor? pb, Tensor? zb, Tensor? local, float eps, bool with_grad)"
_GRADS = "Tensor grad_a, Tensor grad_b, Tensor grad_local"
_STATS = "Tensor row_loss, Tensor cosine, Tensor std"
_SCHEMAS = {
    "normalized_mse_fwd": f"{_IN} -> (Tensor loss, {_GRADS})",
    "normalized_mse_stats_fwd": f"{_IN} -> (Tensor loss, {_GRADS}, {_STATS})",
    # The predictions only tie the result to the graph: differentiating twice then raises, instead of giving zeros.
    "normalized_mse_bwd": "(Tensor grad_loss, Tensor grad_a, Tensor? grad_b, Tensor? grad_local, Tensor pa, Tensor? pb,"
    " Tensor? local) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"byol_kernels::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl("byol_kernels::normalized_mse_fwd", "CPU", _normalized_mse_fwd_cpu)
torch.library.impl("byol_kernels::normalized_mse_fwd", "CUDA", _normalized_mse_fwd_cuda)
torch.library.impl("byol_kernels::normalized_mse_stats_fwd", "CPU", reference.normalized_mse_stats_fwd)
torch.library.impl("byol_kernels::normalized_mse_stats_fwd", "CUDA", _normalized_mse_stats_fwd_cuda)
torch.library.impl("byol_kernels::normalized_mse_bwd", "CPU", reference.normalized_mse_bwd)
torch.library.impl("byol_kernels::normalized_mse_bwd", "CUDA", _normalized_mse_bwd_cuda)
torch.library.register_fake("byol_kernels::normalized_mse_fwd", _fwd_fake)
torch.library.register_fake("byol_kernels::normalized_mse_stats_fwd", _stats_fwd_fake)
torch.library.register_fake("byol_kernels::normalized_mse_bwd", _bwd_fake)
for _name in ("normalized_mse_fwd", "normalized_mse_stats_fwd"):
    register_autograd(_name, _backward, setup_context=_setup_context)
register_autograd("normalized_mse_bwd", _refuse_double_backward)


# -------------------------------------------------------------------------------- public functions


class LossStats(NamedTuple):
    """Statistics from the same pass over the data, for monitoring; no gradient flows through any of them.

    N is the number of (prediction, target) pairs: 1 for `normalized_mse_loss_with_stats`, 2 + 2 K for
    `byol_loss_with_stats` with K local views, in the order (p1, z2), (p2, z1), (local 1, z1), (local 1, z2), (local 2,
    z1) and so on. V is the number of global views: 1 and 2.
    """

    row_loss: Tensor
    """2 - 2 cos of each row, [N, B]."""
    mean_cosine: Tensor
    """Mean of cos over all rows of all pairs, 0-dim."""
    p_std: Tensor
    """[V, D]: per-dimension standard deviation over the batch (correction 0) of the normalized predictions of the
    global views. Its mean times sqrt(D) is about 1 for a healthy representation and 0 for a collapsed one."""
    z_std: Tensor
    """The same for their normalized targets, [V, D]."""


def normalized_mse_loss(p_BD: Tensor, z_BD: Tensor, *, eps: float = 1e-12) -> Tensor:
    r"""Mean squared distance of L2-normalized rows: mean_b (2 - 2 cos(p_b, z_b)), from 0 to 4.

    Equation 2 of BYOL (arXiv 2006.07733). Rows are normalized as `torch.nn.functional.normalize` does it, x /
    max(|x|, eps): a zero row counts as normalized to zero, so its loss is 2 and its gradient -2 z_hat / eps.
    A row whose squared norm overflows float32 (|x| > 1.8e19) counts as normalized to zero too, with a
    gradient of 0. A NaN or an infinity makes the loss NaN, and the gradient of its own row only.

    Args:
        p_BD: predictions [B, D]; bfloat16, float16, float32 or float64, any strides. The gradient flows here.
        z_BD: target projections, of the same shape, dtype and device. No gradient flows here.
        eps: smallest norm that is divided by.

    Returns:
        The loss, 0-dim, float64 for float64 inputs and float32 otherwise. Differentiable once. All sums are
        taken in that dtype, so nothing changes under autocast.

    Raises:
        ValueError: on shapes, dtypes or devices that differ, an empty batch, or a dtype that is not floating
            point.
    """
    _check("normalized_mse_loss", {"p_BD": p_BD, "z_BD": z_BD}, eps)
    return _loss(p_BD, z_BD, None, None, None, eps)


def normalized_mse_loss_with_stats(p_BD: Tensor, z_BD: Tensor, *, eps: float = 1e-12) -> tuple[Tensor, LossStats]:
    """`normalized_mse_loss` and, from the same pass over the data, statistics for monitoring.

    Args:
        p_BD: predictions [B, D].
        z_BD: target projections [B, D].
        eps: smallest norm that is divided by.

    Returns:
        The loss and its `LossStats`.

    Raises:
        ValueError: as `normalized_mse_loss`.
    """
    _check("normalized_mse_loss_with_stats", {"p_BD": p_BD, "z_BD": z_BD}, eps)
    return _loss_with_stats(p_BD, z_BD, None, None, None, eps)


def byol_loss(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Tensor | None = None, *, eps: float = 1e-12
) -> Tensor:
    r"""The symmetric BYOL loss: mean_b [l(p1, z2) + l(p2, z1)] with l = 2 - 2 cos, from 0 to 8.

    The two directions are summed, not averaged, as in the reference code (google-deepmind/deepmind-research,
    byol/). Predictions of K local views are paired with both target projections: the loss is then the mean over all
    2 + 2 K pairs times 2, which is the same for K = 0. One kernel launch on a GPU for the loss, the gradient and the
    mean of all pairs; one for the backward.

    Args:
        p1: online predictions of view 1 [B, D]; see `normalized_mse_loss` for dtypes and for zero, tiny and huge rows.
        p2: online predictions of view 2 [B, D].
        z1: target projections of view 1 [B, D]. No gradient flows here.
        z2: target projections of view 2 [B, D]. No gradient flows here.
        p_local: online predictions of K local views [K, B, D], K of 1 or more.
        eps: smallest norm that is divided by.

    Returns:
        The loss, 0-dim, float64 for float64 inputs and float32 otherwise. Differentiable once.

    Raises:
        ValueError: on shapes, dtypes or devices that differ, an empty batch, or a dtype that is not floating
            point.
    """
    _check("byol_loss", {"p1": p1, "p2": p2, "z1": z1, "z2": z2}, eps, p_local)
    return _loss(p1, z2, p2, z1, p_local, eps)


def byol_loss_with_stats(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Tensor | None = None, *, eps: float = 1e-12
) -> tuple[Tensor, LossStats]:
    """`byol_loss` and, from the same pass over the data, statistics for monitoring.

    Args:
        p1: online predictions of view 1 [B, D].
        p2: online predictions of view 2 [B, D].
        z1: target projections of view 1 [B, D].
        z2: target projections of view 2 [B, D].
        p_local: online predictions of local views [K, B, D].
        eps: smallest norm that is divided by.

    Returns:
        The loss and its `LossStats`.

    Raises:
        ValueError: as `byol_loss`.
    """
    _check("byol_loss_with_stats", {"p1": p1, "p2": p2, "z1": z1, "z2": z2}, eps, p_local)
    return _loss_with_stats(p1, z2, p2, z1, p_local, eps)


def _loss(pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, local: Tensor | None, eps: float) -> Tensor:
    if is_transformed():
        return reference.differentiable_loss(pa, za, pb, zb, local, eps)[0]
    op = torch.ops.byol_kernels.normalized_mse_fwd.default
    loss: Tensor = op(pa, za, pb, zb, local, eps, _needs_grad(pa, pb, local))[0]
    return loss


def _loss_with_stats(
    pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, local: Tensor | None, eps: float
) -> tuple[Tensor, LossStats]:
    if is_transformed():
        loss, row_loss, cosine, std = reference.differentiable_loss(pa, za, pb, zb, local, eps)
    else:
        op = torch.ops.byol_kernels.normalized_mse_stats_fwd.default
        loss, _, _, _, row_loss, cosine, std = op(pa, za, pb, zb, local, eps, _needs_grad(pa, pb, local))
    p_std, z_std = std.unbind(0)
    return loss, LossStats(row_loss, cosine, p_std, z_std)


def _needs_grad(*predictions: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in predictions)


def _check(op_name: str, tensors: dict[str, Tensor], eps: float, p_local: Tensor | None = None) -> None:
    (first_name, first), *others = tensors.items()
    shape, dtype, device = first.shape, first.dtype, first.device
    if first.dim() != 2:
        raise ValueError(
            f"{op_name}: {first_name} must be [batch, dim], got shape {tuple(shape)}; "
            "flatten it to two dimensions, for instance with .flatten(1)"
        )
    if first.numel() == 0:
        raise ValueError(
            f"{op_name}: {first_name} must hold at least one row and one column, got shape {tuple(shape)}; "
            "skip empty batches"
        )
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{op_name}: {first_name} must be bfloat16, float16, float32 or float64, got {dtype}; "
            "convert it with .float()"
        )
    for name, x in others:
        if x.shape != shape:
            raise ValueError(
                f"{op_name}: {name} must have the shape of {first_name}, {tuple(shape)}, got {tuple(x.shape)}; "
                "pass predictions and projections of the same images"
            )
    if p_local is not None:
        if p_local.dim() != 3 or p_local.shape[1:] != shape or p_local.shape[0] == 0:
            raise ValueError(
                f"{op_name}: p_local must be [K, {shape[0]}, {shape[1]}], K of 1 or more times the shape of "
                f"{first_name}, got {tuple(p_local.shape)}; stack one prediction per local view, or pass None without "
                "local views"
            )
        others = [*others, ("p_local", p_local)]  # torch 2.11 traces the starred list above as a tuple
    for name, x in others:
        if x.dtype != dtype:
            raise ValueError(
                f"{op_name}: {name} must have the dtype of {first_name}, {dtype}, got {x.dtype}; "
                f"convert it with .to({dtype})"
            )
        if x.device != device:
            raise ValueError(
                f"{op_name}: {name} must be on the device of {first_name}, {device}, got {x.device}; "
                f"move it with .to('{device}')"
            )
    limits = torch.finfo(accumulation_dtype(dtype))
    if not limits.tiny <= eps <= limits.max:
        raise ValueError(
            f"{op_name}: eps must be positive and finite, {limits.tiny:.2g} to {limits.max:.2g} in {limits.dtype}, got "
            f"{eps}; leave it at 1e-12"
        )
