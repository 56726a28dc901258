"""Batch normalisation of stacked views: one pass through a network, statistics for each view.

BYOL normalises each view by its own statistics. Passing `[view1; view2]` through a network at once is faster than
passing one after the other, and is the same function if every batch norm takes the statistics of each view apart and
moves its running statistics once for each view, the first view first:

    mean_v = mean over view v;  var_v = biased variance of view v
    y = (x - mean_v) / sqrt(var_v + eps) * gamma + beta
    running = (1 - momentum) running + momentum (mean_v, unbiased var_v)        for v = 1, 2, ...

`convert_split_batchnorm` makes a network's batch norms do that, in place: parameters, buffers and their names stay.
With `convert_sync_batchnorm` the statistics are those of all processes, as `nn.SyncBatchNorm`'s, on CPUs too.

A model used alone moves its running statistics in its forward pass, as `torch.nn` does. A training step may be skipped
after it, so the step collects the statistics of the batch instead (`num_splits(..., collected=[])`) and moves all
running statistics at once when it knows that the step counts (`running_stats.py`).

Activations that are computed again during the backward pass (activation checkpointing, whoever starts it) use the
number of views of the first time, and their statistics are not counted again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from byol_fast.models.split_batchnorm_functions import SplitBNEager, SplitBNTraceable

# float64 roundings differ by 1e-13 and less even behind tens of layers; another function differs by far more.
SAME = 1e-6


# ------------------------------------------------------------------------------------------------ use


def convert_split_batchnorm(network: nn.Module, example: Tensor | None = None) -> str | None:
    """Let a network's batch norms tell stacked views apart, in place; call it within `num_splits` then.

    Args:
        network: any network; names, dtypes and values of its parameters and buffers stay what they are.
        example: images as the network takes them, `[2, C, H, W]` or more. With it the conversion is tried on a copy
            first, so that batch normalisation which is no module, or anything else that mixes images, is found.

    Returns:
        None, or why the network cannot take stacked views; it is unchanged then.
    """
    reason = _unsupported_reason(network)
    if reason is None and example is not None:
        reason = _find_mismatch(network, example)
    if reason is None:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                _convert_module(module)
    return reason


def convert_sync_batchnorm(network: nn.Module) -> None:
    """Let a network's batch norms take their statistics over all processes, in place.

    Works with or without `convert_split_batchnorm`. Has no effect until `torch.distributed` is initialised.

    Args:
        network: any network; names, dtypes and values of its parameters and buffers stay what they are.

    Raises:
        ValueError: a layer computes its batch normalisation itself.
    """
    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    for name, module in norms:
        if issubclass(_class_for(module), _ChunkedBatchNorm):
            raise ValueError(
                f"sync_batchnorm: {name or 'the network'} must be a batch norm of torch.nn or timm, got "
                f"{type(module).__name__} with a forward of its own; turn sync_batchnorm off"
            )
    for _, module in norms:
        _convert_module(module).synchronized = True


def disable_sync(network: nn.Module) -> None:
    """Undo `convert_sync_batchnorm`: what one process does alone must not wait for the others."""
    for module in network.modules():
        if isinstance(module, _SplitBatchNormBase):
            module.synchronized = False


def is_split_batchnorm(module: nn.Module) -> bool:
    """True for a batch norm that tells stacked views apart."""
    return isinstance(module, _SplitBatchNormBase)


class BatchStats(NamedTuple):
    """Statistics that one call of a batch norm took of its batch."""

    layer: int
    """Number of the layer, see `index_layers`."""
    mean: Tensor
    """Mean of each view, `[V, C]`, no gradient."""
    var: Tensor
    """Unbiased variance of each view, likewise."""


@contextmanager
def num_splits(network: nn.Module, views: int, collected: list[BatchStats] | None = None) -> Iterator[None]:
    """Within this, batches in train mode are `views` equal parts, one view behind the other.

    Args:
        network: a converted network.
        views: parts of a batch; 1 is what batch norms do outside.
        collected: takes the statistics of each call of a layer of `index_layers`, instead of the layer's running
            statistics; None lets the layers move them.

    Example:
        >>> convert_split_batchnorm(network)
        >>> with num_splits(network, 2):
        ...     y1, y2 = network(torch.cat([view1, view2])).chunk(2)
    """
    if views < 1:
        raise ValueError(f"num_splits: views must be 1 or more, got {views}")
    norms = [m for m in network.modules() if isinstance(m, _SplitBatchNormBase)]
    before = [(norm.views, norm.collected) for norm in norms]
    for norm in norms:
        norm.views, norm.collected = views, collected
    try:
        yield
    finally:
        for norm, previous in zip(norms, before, strict=True):
            norm.views, norm.collected = previous


@contextmanager
def frozen_running_stats(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within this, norms keep their running statistics: of a batch that has been counted already.

    With momentum 0 and not without running statistics: what autograd saves has to be the same both times.

    Args:
        norms: batch or instance norms.
    """
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, previous in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = previous


def index_layers(networks: Sequence[nn.Module]) -> list[_SplitBatchNormBase]:
    """Batch norms whose statistics can be collected, each with its place in the list as `index`.

    They are those that keep running statistics and compute them as `torch.nn` does.

    Args:
        networks: changed in place: the class of these batch norms becomes one that hands out its statistics.
    """
    modules = {module: None for network in networks for module in network.modules()}  # each once, in order
    layers = [_convert_module(m) for m in modules if isinstance(m, _BatchNorm) and _hands_out_statistics(m)]
    for index, layer in enumerate(layers):
        layer.index = index
    return layers


def _hands_out_statistics(module: _BatchNorm) -> bool:
    if module.running_mean is None or not module.track_running_stats or nn.parameter.is_lazy(module.running_mean):
        return False
    return not issubclass(_class_for(module), _ChunkedBatchNorm) and getattr(module, "process_group", None) is None


# ------------------------------------------------------------------------------------------------ modules


class _SplitBatchNormBase(_BatchNorm):
    """A batch norm that knows how many views are stacked."""

    views: int
    synchronized: bool
    collected: list[BatchStats] | None = None
    index: int = -1
    """See `index_layers`; -1 for a layer whose statistics nobody collects."""
    last_calls: dict[torch.Size, tuple[int, bool]]
    """For the last batch of each shape: its views, and whether its statistics were collected. Activations that are
    computed again come as a tensor of the same shape, when nobody says any more how many views are stacked in it."""

    def _call(self, x: Tensor, *, recomputed: bool) -> tuple[int, bool]:
        """Number of views that are stacked in a batch, and whether its statistics are collected."""
        collects = self.collected is not None and self.index >= 0 and self.track_running_stats
        views = self.views
        if not torch.compiler.is_compiling():
            if recomputed:
                views, collects = self.last_calls.get(x.shape, (views, collects))
            self.last_calls[x.shape] = views, collects
        if x.shape[0] % views:
            raise ValueError(
                f"batch norm: the batch must be {views} views of equal size, got {x.shape[0]} images; "
                "leave the last, smaller batch out"
            )
        return views, collects


def _is_recomputed() -> bool:
    """True within a backward pass: a forward pass there computes activations again that were not kept."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _SplitBatchNorm(_SplitBatchNormBase):
    """Statistics for each view, in one pass over all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.BatchNorm2d`, for each of the stacked views."""
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return _BatchNorm.forward(self, x)
        recomputed = _is_recomputed()
        views, collects = self._call(x, recomputed=recomputed)
        synchronized = self.synchronized and distributed.is_available() and distributed.is_initialized()
        if views == 1 and not synchronized and not collects:
            with frozen_running_stats([self] if recomputed else []):
                return _BatchNorm.forward(self, x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if x.numel() == views * x.shape[1] and not synchronized:
            raise ValueError(
                f"batch norm: each view must have more than one value a channel in train mode, got {list(x.shape)} for "
                f"{views} views; use a larger batch"
            )
        moves = self.running_mean is not None and self.track_running_stats and not collects
        # The formula is what torch.compile can fuse, and what can wait for other processes.
        if torch.compiler.is_compiling() or synchronized or (moves and self.momentum is None):
            x_VB = x.view(views, -1, *x.shape[1:])
            y_VB, mean_VC, var_VC = SplitBNTraceable.apply(x_VB, self.weight, self.bias, self.eps, synchronized)
            y = y_VB.flatten(0, 1)
            if moves and not recomputed:
                self._track(mean_VC, var_VC)
        else:
            now = moves and not recomputed
            if now and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(views)
            running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
            y, mean_VC, var_VC = SplitBNEager.apply(
                x, self.weight, self.bias, *running, views, self.momentum or 0.0, self.eps, now
            )
        if self.collected is not None and collects and not recomputed:
            self.collected.append(BatchStats(self.index, mean_VC.detach(), var_VC.detach()))
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


class _ChunkedBatchNorm(_SplitBatchNormBase):
    """A batch norm with a forward of its own: each view goes through it on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class this was made from, for each of the stacked views."""
        forward = super().forward
        if not self.training:
            return forward(x)
        recomputed = _is_recomputed()
        views, _ = self._call(x, recomputed=recomputed)
        with frozen_running_stats([self] if recomputed else []):
            return forward(x) if views == 1 else torch.cat([forward(view) for view in x.chunk(views)])


class SplitBatchNorm1d(_SplitBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that takes stacked views."""


class SplitBatchNorm2d(_SplitBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that takes stacked views."""


class SplitBatchNorm3d(_SplitBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that takes stacked views."""


class SplitSyncBatchNorm(_SplitBatchNorm, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` that takes stacked views, and works on CPUs."""


class _SplitBatchNormAct(_SplitBatchNorm):
    """timm's BatchNormAct2d: dropout and activation behind the batch norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, for each of the stacked views."""
        return cast("Tensor", self.act(self.drop(self._normalise(x))))


_CLASSES: dict[Any, type[_SplitBatchNormBase]] = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    nn.BatchNorm3d: SplitBatchNorm3d,
    nn.SyncBatchNorm: SplitSyncBatchNorm,
}


def _class_for(module: _BatchNorm) -> type[_SplitBatchNormBase]:
    """The class that a batch norm becomes."""
    kind: Any = type(module)
    return _made_of(kind)


@functools.cache
def _made_of(kind: Any) -> type[_SplitBatchNormBase]:
    if issubclass(kind, _SplitBatchNormBase):
        return cast("type[_SplitBatchNormBase]", kind)
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        base: type = _SplitBatchNormAct
    else:
        inherited = kind.forward in {_BatchNorm.forward, nn.SyncBatchNorm.forward}
        base = _SplitBatchNorm if inherited else _ChunkedBatchNorm
    return type(f"Split{kind.__name__}", (base, kind), {})


def _convert_module(module: _BatchNorm) -> _SplitBatchNormBase:
    if not isinstance(module, _SplitBatchNormBase):
        # The class changes and the object stays: whoever holds it, hooks and shared layers included, need not know.
        synchronized = isinstance(module, nn.SyncBatchNorm)
        module.__class__ = _class_for(module)
        adopted = cast("_SplitBatchNormBase", module)
        adopted.views, adopted.synchronized, adopted.last_calls = 1, synchronized, {}
        # Attributes of the object from the start: one that appears later makes torch.compile compile anew.
        adopted.collected, adopted.index = None, -1
    return cast("_SplitBatchNormBase", module)


# ------------------------------------------------------------------------------------------------ what cannot be


def _unsupported_reason(network: nn.Module) -> str | None:
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


def _find_mismatch(network: nn.Module, example: Tensor) -> str | None:
    """Compare stacked and separate views on copies, in float64 and train mode; how they differ, or None."""
    views = torch.randn(2, *example.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = views.to(example.device)
    apart, stacked = (_without_dropout(copy.deepcopy(network).double().train()) for _ in range(2))
    convert_split_batchnorm(stacked)
    try:
        with torch.no_grad():
            expected = [_tensors(apart(view)) for view in views]
            with num_splits(stacked, 2):
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


def _without_dropout(network: nn.Module) -> nn.Module:
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
