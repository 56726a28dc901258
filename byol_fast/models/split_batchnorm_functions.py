"""Autograd functions of split batch norm: by torch's kernels, and by the formula; see `split_batchnorm.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


class SplitBNEager(torch.autograd.Function):
    """Split batch norm by torch's kernels, one call per view, which write into one output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_views: int,
        momentum: float,
        eps: float,
        update: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output; if running statistics are not to be updated, also means and variances of the batch, `[V, C]`."""
        x = _dense(x)
        y = torch.empty_like(x)
        means_VC = torch.empty(num_views, x.shape[1], dtype=_statistics_dtype(x, weight, running_mean), device=x.device)
        invstds_VC = torch.empty_like(means_VC)
        # Running statistics that start at 0 and are updated with momentum 1 are those of the batch. The kernels return
        # only 1 / sqrt(variance + eps), in which a small variance is lost.
        batch_2VC: Tensor | None = None
        if running_mean is not None and not update:
            batch_2VC = torch.zeros(2, *means_VC.shape, dtype=means_VC.dtype, device=x.device)
        views_of_x = zip(x.chunk(num_views), y.chunk(num_views), means_VC, invstds_VC, strict=True)
        for v, (view, out, mean, invstd) in enumerate(views_of_x):
            running = (running_mean, running_var) if batch_2VC is None else (batch_2VC[0, v], batch_2VC[1, v])
            factor = momentum if batch_2VC is None else 1.0
            torch.native_batch_norm(view, weight, bias, *running, True, factor, eps, out=(out, mean, invstd))
        ctx.save_for_backward(x, weight, means_VC, invstds_VC)
        ctx.num_views, ctx.eps = num_views, eps
        if batch_2VC is None:
            return y, None, None
        mean_VC, var_VC = batch_2VC
        ctx.mark_non_differentiable(mean_VC, var_VC)
        return y, mean_VC, var_VC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients with respect to input, weight and bias."""
        x, weight, means_VC, invstds_VC = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        dy = dy.contiguous(memory_format=_memory_format(x))
        dx = torch.empty_like(x) if needed[0] else None
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        views = zip(dy.chunk(ctx.num_views), x.chunk(ctx.num_views), means_VC, invstds_VC, strict=True)
        for v, (dy_view, view, mean, invstd) in enumerate(views):
            dx_view, dw, db = torch.ops.aten.native_batch_norm_backward(
                dy_view, view, weight, None, None, mean, invstd, True, ctx.eps, needed
            )
            if dx is not None:
                dx.chunk(ctx.num_views)[v].copy_(dx_view)
            if needed[1]:
                dweight = dw if dweight is None else dweight.add_(dw)
            if needed[2]:
                dbias = db if dbias is None else dbias.add_(db)
        return dx, dweight, dbias, *(None,) * 6


def _statistics_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """Dtype in which torch's kernels return the statistics of a batch."""
    if x.is_cuda:
        return torch.float64 if x.dtype == torch.float64 else torch.float32
    return next((p.dtype for p in parameters if p is not None), x.dtype)


def _memory_format(x: Tensor) -> torch.memory_format:
    for channels_last in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if channels_last is torch.channels_last else 5
        if x.ndim == rank and x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


class SplitBNTraceable(torch.autograd.Function):
    """Split batch norm as one expression, for torch.compile to fuse, and over all processes if `synchronized`.

    With `relu` a ReLU follows. Its gradient is computed from the input of the norm, which the backward pass reads
    anyway: the output of the ReLU is not read, and no masked gradient is written.

    One collective forward, of `[V, 2 C + 1]` numbers (mean, variance, count), and one backward, of `[V, 2 C]`.
    The output is no view of another tensor: autograd copies the gradient of a view that is changed in place (by
    `nn.ReLU(inplace=True)`, or by adding a shortcut), and into another memory format.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_views: int,
        eps: float,
        synchronized: bool,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and means and unbiased variances, `[V, C]`."""
        x_VB = _accumulated(_by_view(input, num_views))
        var_VC, mean_VC = _var_mean(x_VB)
        count: Any = x_VB.numel() // mean_VC.numel()
        if synchronized:
            mean_VC, var_VC, count = _gathered(mean_VC, var_VC, count)
        invstd_VC = torch.rsqrt(var_VC + eps)
        xhat_VB = (x_VB - _per_channel(mean_VC, x_VB)) * _per_channel(invstd_VC, x_VB)
        y = xhat_VB.flatten(0, 1)
        if weight is not None:
            y = y * _per_channel(weight, x_VB)[0]
        if bias is not None:
            y = y + _per_channel(bias, x_VB)[0]
        if relu:
            y = torch.relu(y)
        elif weight is None and bias is None:
            y = y.clone()
        unbiased_VC = var_VC * (count / (count - 1))
        ctx.save_for_backward(input, weight, bias, mean_VC, invstd_VC, count if synchronized else None)
        ctx.num_views, ctx.synchronized, ctx.relu = num_views, synchronized, relu
        # A backward pass that asked `input` for its stride would make dynamo copy the gradients.
        is_dense = input.is_contiguous(memory_format=_memory_format(input))
        ctx.stride = input.stride() if is_dense else None
        ctx.mark_non_differentiable(mean_VC, unbiased_VC)
        return _cast(input.dtype, y), mean_VC, unbiased_VC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to input, weight and bias.

        With xhat = (x - mean) invstd: dbias = sum dy, dweight = sum dy xhat, and as mean and variance depend on every
        x, dx = weight invstd (dy - mean(dy) - xhat mean(dy xhat)), the means over all processes.
        """
        input, weight, bias, mean_VC, invstd_VC, count_V1 = ctx.saved_tensors
        scale_VC = invstd_VC if weight is None else invstd_VC * weight
        if ctx.relu:
            scale_VC = _materialized(scale_VC)
        elif ctx.stride is not None:
            # torch.compile would otherwise compute the sum of gradients behind a residual connection again in every
            # kernel that reads it, or write what it computes from it in fp32, in another layout.
            upstream = _materialized(upstream, ctx.stride)
        x_VB, dy_VB = (_accumulated(_by_view(t, ctx.num_views)) for t in (input, upstream))
        dims, scale_VB = _reduced_dims(x_VB), _per_channel(scale_VC, x_VB)
        distance_VB = x_VB - _per_channel(mean_VC, x_VB)
        xhat_VB = distance_VB * _per_channel(invstd_VC, x_VB)
        dy_xhat_VB, dy_scale_VB = dy_VB * xhat_VB, dy_VB * scale_VB
        if ctx.relu:
            is_cut_VB = distance_VB * scale_VB + (0.0 if bias is None else _per_channel(bias, x_VB)) <= 0
            # The ReLU's mask is applied to each product: dy itself, cut before them, would have three uses, and
            # torch.compile would write it to memory.
            dy_VB, dy_xhat_VB, dy_scale_VB = (torch.where(is_cut_VB, 0.0, t) for t in (dy_VB, dy_xhat_VB, dy_scale_VB))
        sums_V2C = torch.cat([dy_VB.sum(dims), dy_xhat_VB.sum(dims)], dim=1)
        dbias, dweight = sums_V2C.sum(0).chunk(2)
        if ctx.synchronized:
            sums_V2C = sums_V2C.clone()
            distributed.all_reduce(sums_V2C)
        means_V2C = sums_V2C * (1.0 / (count_V1 if ctx.synchronized else x_VB.numel() // mean_VC.numel()))
        mean_dy_VB, mean_dy_xhat_VB = (_per_channel(t, x_VB) for t in means_V2C.chunk(2, dim=1))
        dx = dy_scale_VB - (mean_dy_VB + xhat_VB * mean_dy_xhat_VB) * scale_VB
        needed = ctx.needs_input_grad
        return (
            _cast(input.dtype, dx).flatten(0, 1) if needed[0] else None,
            _cast(weight.dtype, dweight) if needed[1] else None,
            _cast(weight.dtype if weight is not None else dbias.dtype, dbias) if needed[2] else None,
            *(None,) * 4,
        )


def _var_mean(x_VB: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each view and channel, `[V, C]`.

    `torch.var_mean` is compiled to Welford's updates, whose divisions take longer than reading the values. Sums of
    distances and of their squares do not. These sums cancel if the mean is far from the center that the distances are
    taken from: the variance's relative error is that of a sum times (mean - center)^2 / variance. The center is one of
    two pixels, the one closer to zero, so that one large outlier does not matter.
    """
    dims = _reduced_dims(x_VB)
    if not torch.compiler.is_compiling():
        return torch.var_mean(x_VB, dims, correction=0)
    # Not of three: torch.compile stores the result of what reads more than eight tensors, in fp32.
    a_VC, b_VC = _pixel(x_VB, 1), _pixel(x_VB, 3)
    center_VC = torch.where(a_VC.abs() <= b_VC.abs(), a_VC, b_VC)
    distance_VB = x_VB - _per_channel(center_VC, x_VB)
    # Factors instead of divisions, as this is computed again for every element that is normalized.
    share = center_VC.numel() / x_VB.numel()
    mean_VC = distance_VB.sum(dims) * share
    var_VC = (distance_VB.square().sum(dims) * share - mean_VC.square()).clamp_min(0.0)
    return var_VC, center_VC + mean_VC


def _pixel(x_VB: Tensor, quarter: int) -> Tensor:
    """Values of a pixel of each view, `[V, C]`: that many quarters along the images, rows and columns."""
    pixel = x_VB[:, x_VB.shape[1] * quarter // 4]
    for size in x_VB.shape[3:]:
        pixel = pixel.select(2, size * quarter // 4)
    return pixel


def _accumulated(x: Tensor) -> Tensor:
    """In the dtype that sums are taken in."""
    return x if x.dtype == torch.float64 else _cast(torch.float32, x)


def _cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Cast. A `to` that changes nothing, of what a function returns, is compiled by torch 2.11 to a zero gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def _materialized(x: Tensor, stride: tuple[int, ...] | None = None) -> Tensor:
    """The values, which torch.compile then writes to memory once, instead of computing them again in every kernel.

    Args:
        x: values.
        stride: their strides in memory; None leaves them as they are.
    """
    if not torch.compiler.is_compiling():
        return x
    try:
        from torch._inductor.inductor_prims import force_stride_order  # takes a second
    except ImportError:  # not a public name: without it the code is slower
        return x
    materialized: Tensor = force_stride_order(x, x.stride() if stride is None else stride)
    return materialized


def _by_view(x: Tensor, num_views: int) -> Tensor:
    """`[V B, C, ...]` as `[V, B, C, ...]`."""
    return x.view(num_views, -1, *x.shape[1:])


def _reduced_dims(x_VB: Tensor) -> list[int]:
    """All dimensions but views and channels."""
    return [1, *range(3, x_VB.ndim)]


def _per_channel(values: Tensor, x_VB: Tensor) -> Tensor:
    """`[V, C]` or `[C]` shaped to go with `[V, B, C, ...]`."""
    return values.reshape(-1, 1, values.shape[-1], *(1 for _ in x_VB.shape[3:]))


def _gathered(mean_VC: Tensor, var_VC: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count, `[V, 1]`, over all processes.

    Variances are combined about the common mean (Chan, Golub, LeVeque 1979): sums of squares would cancel.
    """
    own = torch.cat([mean_VC, var_VC, torch.full_like(mean_VC[:, :1], count)], dim=1)
    world, channels = distributed.get_world_size(), mean_VC.shape[1]
    every = torch.empty(world * own.shape[0], own.shape[1], dtype=own.dtype, device=own.device)
    distributed.all_gather_into_tensor(every, own)
    every = every.view(world, *own.shape)
    means, variances, counts = every[..., :channels], every[..., channels:-1], every[..., -1:]
    total_V1 = counts.sum(0)
    mean = (means * counts).sum(0) / total_V1
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / total_V1, total_V1
