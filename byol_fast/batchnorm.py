"""Batch normalisation of stacked views: one pass through a network, statistics for each view.

BYOL normalises each view by its own statistics. Passing `[view1; view2]` through a network at once is faster than
passing one after the other, and is the same function if every batch norm takes the statistics of each view apart and
moves its running statistics once for each view, the first view first:

    mean_v = mean over view v;  var_v = biased variance of view v
    y = (x - mean_v) / sqrt(var_v + eps) * gamma + beta
    running = (1 - momentum) running + momentum (mean_v, unbiased var_v)        for v = 1, 2, ...

`convert` teaches a network's batch norms to do that, in place: parameters, buffers and their names stay. With
`synchronise` the statistics are those of all processes, as `nn.SyncBatchNorm`'s, on CPUs too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

# float64 roundings differ by 1e-13 and less even behind tens of layers; another function differs by far more.
SAME = 1e-6


# ------------------------------------------------------------------------------------------------ use


def convert(network: nn.Module, example: Tensor | None = None) -> str | None:
    """Let a network's batch norms tell stacked views apart, in place; call it within `views_stacked` then.

    Args:
        network: any network; names, dtypes and values of its parameters and buffers stay what they are.
        example: images as the network takes them, `[2, C, H, W]` or more. With it the conversion is tried on a copy
            first, so that batch normalisation which is no module, or anything else that mixes images, is found.

    Returns:
        None, or why the network cannot take stacked views; it is unchanged then.
    """
    reason = _obstacle(network)
    if reason is None and example is not None:
        reason = _difference(network, example)
    if reason is None:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                _adopt(module)
    return reason


def synchronise(network: nn.Module) -> None:
    """Let a network's batch norms take their statistics over all processes, in place.

    Works with or without `convert`. Has no effect until `torch.distributed` is initialised.

    Args:
        network: any network; names, dtypes and values of its parameters and buffers stay what they are.

    Raises:
        ValueError: a layer computes its batch normalisation itself.
    """
    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    for name, module in norms:
        if issubclass(_class_for(module), _Apart):
            raise ValueError(
                f"sync_batchnorm: {name or 'the network'} must be a batch norm of torch.nn or timm, got "
                f"{type(module).__name__} with a forward of its own; turn sync_batchnorm off"
            )
    for _, module in norms:
        _adopt(module).synchronised = True


def keep_to_itself(network: nn.Module) -> None:
    """Undo `synchronise`: what one process does alone must not wait for the others."""
    for module in network.modules():
        if isinstance(module, _ViewsBase):
            module.synchronised = False


@contextmanager
def views_stacked(network: nn.Module, views: int) -> Iterator[None]:
    """Within this, batches in train mode are `views` equal parts, one view behind the other.

    Args:
        network: a converted network.
        views: parts of a batch; 1 is what batch norms do outside.

    Example:
        >>> convert(network)
        >>> with views_stacked(network, 2):
        ...     y1, y2 = network(torch.cat([view1, view2])).chunk(2)
    """
    if views < 1:
        raise ValueError(f"views_stacked: views must be 1 or more, got {views}")
    norms = [m for m in network.modules() if isinstance(m, _ViewsBase)]
    before = [norm.views for norm in norms]
    for norm in norms:
        norm.views = views
    try:
        yield
    finally:
        for norm, previous in zip(norms, before, strict=True):
            norm.views = previous


def views_now(network: nn.Module) -> int:
    """Views that are stacked in a network's batches at this moment; 1 where nothing says otherwise."""
    return next((m.views for m in network.modules() if isinstance(m, _ViewsBase)), 1)


# ------------------------------------------------------------------------------------------------ modules


class _ViewsBase(_BatchNorm):
    """A batch norm that knows how many views are stacked."""

    views: int
    synchronised: bool

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.views:
            raise ValueError(
                f"batch norm: the batch must be {self.views} views of equal size, got {x.shape[0]} images; "
                "leave the last, smaller batch out"
            )
        return x


class _Views(_ViewsBase):
    """Statistics for each view, in one pass over all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.BatchNorm2d`, for each of the stacked views."""
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        synchronised = self.synchronised and distributed.is_available() and distributed.is_initialized()
        if not self.training or (self.views == 1 and not synchronised):
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if self._checked(x).numel() == self.views * x.shape[1] and not synchronised:
            raise ValueError(
                f"batch norm: each view must have more than one value a channel in train mode, got {list(x.shape)} for "
                f"{self.views} views; use a larger batch"
            )
        tracked = self.running_mean is not None and self.track_running_stats
        # The formula is what torch.compile can fuse, and what can wait for other processes.
        if torch.compiler.is_compiling() or synchronised or (tracked and self.momentum is None):
            x_VB = x.view(self.views, -1, *x.shape[1:])
            y_VB, mean_VC, var_VC = _ByFormula.apply(x_VB, self.weight, self.bias, self.eps, synchronised)
            if tracked:
                self._track(mean_VC, var_VC)
            return cast("Tensor", y_VB.flatten(0, 1))
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.views)
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        y = _ByKernels.apply(x, self.weight, self.bias, *running, self.views, self.momentum or 0.0, self.eps)
        return cast("Tensor", y)

    @torch.no_grad()
    def _track(self, mean_VC: Tensor, var_VC: Tensor) -> None:
        """Move the running statistics once for each view."""
        assert self.running_mean is not None
        assert self.running_var is not None
        for mean_C, var_C in zip(mean_VC, var_VC, strict=True):
            share: float | Tensor | None = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if share is None:
                    share = self.num_batches_tracked.to(mean_C.dtype).reciprocal()
            for running_C, new_C in ((self.running_mean, mean_C), (self.running_var, var_C)):
                running_C.mul_(1 - share).add_(new_C * share)  # type: ignore[operator]


class _Apart(_ViewsBase):
    """A batch norm with a forward of its own: each view goes through it on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class this was made from, for each of the stacked views."""
        forward = super().forward
        if not self.training or self.views == 1:
            return forward(x)
        return torch.cat([forward(view) for view in self._checked(x).chunk(self.views)])


class ViewsBatchNorm1d(_Views, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that takes stacked views."""


class ViewsBatchNorm2d(_Views, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that takes stacked views."""


class ViewsBatchNorm3d(_Views, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that takes stacked views."""


class ViewsSyncBatchNorm(_Views, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` that takes stacked views, and works on CPUs."""


class _ViewsAct(_Views):
    """timm's BatchNormAct2d: dropout and activation behind the batch norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, for each of the stacked views."""
        return cast("Tensor", self.act(self.drop(self._normalise(x))))


_CLASSES: dict[Any, type[_ViewsBase]] = {
    nn.BatchNorm1d: ViewsBatchNorm1d,
    nn.BatchNorm2d: ViewsBatchNorm2d,
    nn.BatchNorm3d: ViewsBatchNorm3d,
    nn.SyncBatchNorm: ViewsSyncBatchNorm,
}


def _class_for(module: _BatchNorm) -> type[_ViewsBase]:
    """The class that a batch norm becomes."""
    kind: Any = type(module)
    return _made_of(kind)


@functools.cache
def _made_of(kind: Any) -> type[_ViewsBase]:
    if issubclass(kind, _ViewsBase):
        return cast("type[_ViewsBase]", kind)
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        base: type = _ViewsAct
    else:
        inherited = kind.forward in {_BatchNorm.forward, nn.SyncBatchNorm.forward}
        base = _Views if inherited else _Apart
    return type(f"Views{kind.__name__}", (base, kind), {})


def _adopt(module: _BatchNorm) -> _ViewsBase:
    if not isinstance(module, _ViewsBase):
        # The class changes and the object stays: whoever holds it, hooks and shared layers included, need not know.
        synchronised = isinstance(module, nn.SyncBatchNorm)
        module.__class__ = _class_for(module)
        adopted = cast("_ViewsBase", module)
        adopted.views, adopted.synchronised = 1, synchronised
    return cast("_ViewsBase", module)


# ------------------------------------------------------------------------------------------------ arithmetic


class _ByKernels(torch.autograd.Function):
    """Eager: torch's kernels for each view, whose outputs lie side by side from the start."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        views: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Output; the running statistics are moved."""
        x = _dense(x)
        y = torch.empty_like(x)
        means_VC = torch.empty(views, x.shape[1], dtype=_statistics_dtype(x, weight, running_mean), device=x.device)
        invstds_VC = torch.empty_like(means_VC)
        for view, out, mean, invstd in zip(x.chunk(views), y.chunk(views), means_VC, invstds_VC, strict=True):
            torch.native_batch_norm(
                view, weight, bias, running_mean, running_var, True, momentum, eps, out=(out, mean, invstd)
            )
        ctx.save_for_backward(x, weight, means_VC, invstds_VC)
        ctx.views, ctx.eps = views, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to input, weight and bias."""
        x, weight, means_VC, invstds_VC = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        dy = dy.contiguous(memory_format=_memory_format(x))
        dx = torch.empty_like(x) if needed[0] else None
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        views = zip(dy.chunk(ctx.views), x.chunk(ctx.views), means_VC, invstds_VC, strict=True)
        for v, (dy_view, view, mean, invstd) in enumerate(views):
            dx_view, dw, db = torch.ops.aten.native_batch_norm_backward(
                dy_view, view, weight, None, None, mean, invstd, True, ctx.eps, needed
            )
            if dx is not None:
                dx.chunk(ctx.views)[v].copy_(dx_view)
            if needed[1]:
                dweight = dw if dweight is None else dweight.add_(dw)
            if needed[2]:
                dbias = db if dbias is None else dbias.add_(db)
        return dx, dweight, dbias, None, None, None, None, None


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


class _ByFormula(torch.autograd.Function):
    """All views in one expression, for torch.compile to fuse, and with statistics of all processes if asked for.

    One collective forward, of `[V, 2 C + 1]` numbers (mean, variance, count), and one backward, of `[V, 2 C]`.
    """

    @staticmethod
    def forward(
        ctx: Any, input_VB: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, synchronised: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output `[V, B, C, ...]`, and `[V, C]` means and unbiased variances."""
        x_VB = _accumulated(input_VB)
        over = _over(x_VB)
        var_VC, mean_VC = torch.var_mean(x_VB, over, correction=0)
        count_V1 = torch.full_like(mean_VC[:, :1], x_VB.numel() // mean_VC.numel())
        if synchronised:
            mean_VC, var_VC, count_V1 = _gathered(mean_VC, var_VC, count_V1)
        invstd_VC = torch.rsqrt(var_VC + eps)
        y = (x_VB - _per_channel(mean_VC, x_VB)) * _per_channel(invstd_VC, x_VB)
        if weight is not None:
            y = y * _per_channel(weight, x_VB)
        if bias is not None:
            y = y + _per_channel(bias, x_VB)
        unbiased_VC = var_VC * (count_V1 / (count_V1 - 1))
        ctx.save_for_backward(input_VB, weight, mean_VC, invstd_VC, count_V1)
        ctx.synchronised = synchronised
        ctx.mark_non_differentiable(mean_VC, unbiased_VC)
        return _in(input_VB.dtype, y), mean_VC, unbiased_VC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_VB: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to input, weight and bias.

        With xhat = (x - mean) invstd: dbias = sum dy, dweight = sum dy xhat, and as mean and variance depend on every
        x, dx = weight invstd (dy - mean(dy) - xhat mean(dy xhat)), the means over all processes.
        """
        input_VB, weight, mean_VC, invstd_VC, count_V1 = ctx.saved_tensors
        x_VB, dy_VB = _accumulated(input_VB), _accumulated(upstream_VB)
        over = _over(x_VB)
        xhat_VB = (x_VB - _per_channel(mean_VC, x_VB)) * _per_channel(invstd_VC, x_VB)
        sums_V2C = torch.cat([dy_VB.sum(over), (dy_VB * xhat_VB).sum(over)], dim=1)
        dbias, dweight = sums_V2C.sum(0).chunk(2)
        if ctx.synchronised:
            sums_V2C = sums_V2C.clone()
            distributed.all_reduce(sums_V2C)
        mean_dy_VC, mean_dy_xhat_VC = (sums_V2C / count_V1).chunk(2, dim=1)
        dx = dy_VB - _per_channel(mean_dy_VC, x_VB) - xhat_VB * _per_channel(mean_dy_xhat_VC, x_VB)
        dx = dx * _per_channel(invstd_VC if weight is None else invstd_VC * weight, x_VB)
        needed = ctx.needs_input_grad
        return (
            _in(input_VB.dtype, dx) if needed[0] else None,
            _in(weight.dtype, dweight) if needed[1] else None,
            _in(weight.dtype if weight is not None else dbias.dtype, dbias) if needed[2] else None,
            None,
            None,
        )


def _accumulated(x: Tensor) -> Tensor:
    """In the dtype that sums are taken in."""
    return x if x.dtype == torch.float64 else _in(torch.float32, x)


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """In a dtype. torch 2.11 compiles a `to` that changes nothing, of what a function returns, to a zero gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def _over(x_VB: Tensor) -> list[int]:
    """All dimensions but views and channels."""
    return [1, *range(3, x_VB.ndim)]


def _per_channel(values: Tensor, x_VB: Tensor) -> Tensor:
    """`[V, C]` or `[C]` shaped to go with `[V, B, C, ...]`."""
    return values.reshape(-1, 1, values.shape[-1], *(1 for _ in x_VB.shape[3:]))


def _gathered(mean_VC: Tensor, var_VC: Tensor, count_V1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all processes.

    Variances are combined about the common mean (Chan, Golub, LeVeque 1979): sums of squares would cancel.
    """
    own = torch.cat([mean_VC, var_VC, count_V1], dim=1)
    world, channels = distributed.get_world_size(), mean_VC.shape[1]
    every = torch.empty(world * own.shape[0], own.shape[1], dtype=own.dtype, device=own.device)
    distributed.all_gather_into_tensor(every, own)
    every = every.view(world, *own.shape)
    means, variances, counts = every[..., :channels], every[..., channels:-1], every[..., -1:]
    total_V1 = counts.sum(0)
    mean = (means * counts).sum(0) / total_V1
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / total_V1, total_V1


# ------------------------------------------------------------------------------------------------ what cannot be


def _obstacle(network: nn.Module) -> str | None:
    """A layer of which it is known that stacked views are not for it."""
    for name, module in network.named_modules():
        what = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and any(
            p is not None and nn.parameter.is_lazy(p) for p in (module.weight, module.running_mean)
        ):
            return f"{what} does not know its channels yet"
        if getattr(module, "process_group", None) is not None:
            return f"{what} has a process group of its own"
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            return f"{what} moves its running statistics once a call"
        if type(module).__name__ == "StochasticDepth" and getattr(module, "mode", "") == "batch":
            return f"{what} draws once for a whole batch"
    return None


def _difference(network: nn.Module, example: Tensor) -> str | None:
    """Compare stacked and separate views on copies, in float64 and train mode; how they differ, or None."""
    views = torch.randn(2, *example.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = views.to(example.device)
    apart, stacked = (_without_chance(copy.deepcopy(network).double().train()) for _ in range(2))
    convert(stacked)
    try:
        with torch.no_grad():
            expected = [_tensors(apart(view)) for view in views]
            with views_stacked(stacked, 2):
                found = [t.chunk(2) for t in _tensors(stacked(views.flatten(0, 1)))]
    except Exception as error:
        return f"it could not be tried in float64 ({type(error).__name__}: {str(error).splitlines()[0]})"
    for first, second, both in zip(*expected, found, strict=True):
        if not (_same(first, both[0]) and _same(second, both[1])):
            return "its outputs differ when the views pass at once: something in it mixes images, or is random"
    for (name, a), b in zip(apart.named_buffers(), stacked.buffers(), strict=True):
        if not _same(a, b):
            return f"its buffer {name} differs when the views pass at once"
    return None


def _without_chance(network: nn.Module) -> nn.Module:
    """Stacked views draw other random numbers, from the same distribution: that is no difference."""
    for module in network.modules():
        for probability in ("p", "drop_prob"):
            if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
                setattr(module, probability, 0.0)
    return network


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= SAME * a.abs().max().clamp_min(1.0)) if a.numel() else True
