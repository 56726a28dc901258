"""Batch norm layers that normalize stacked views apart, and the contexts that control them.

Activations that are recomputed in the backward pass (activation checkpointing of any kind) use the number of views of
the first pass (`first_pass.py`), and their statistics are not counted again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.fx import Proxy
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from byol_fast.models.first_pass import Settings, SettingsHistory, is_recomputed, settings_change
from byol_fast.models.split_batchnorm_functions import SplitBNEager, SplitBNTraceable


class BatchStats(NamedTuple):
    """Batch statistics of one call of a batch norm."""

    layer: int
    """Index of the layer, see `index_layers`."""
    mean: Tensor
    """Mean of each view, `[V, C]`, no gradient."""
    var: Tensor
    """Unbiased variance of each view, likewise."""


def num_splits(
    network: nn.Module, num_views: int, batch_stats: list[BatchStats] | None = None
) -> AbstractContextManager[None]:
    """Within this, batches in train mode are `num_views` stacked views of equal size.

    Args:
        network: a converted network.
        num_views: number of views in a batch; 1 outside of this context.
        batch_stats: list to which each call of an indexed layer appends its statistics, instead of updating its running
            statistics. None leaves that as it is: outside of such a context, the layers update them.

    Raises:
        ValueError: a layer would take the statistics of all views together, because it was put in after the conversion.

    Examples:
        >>> convert_split_batchnorm(network)
        >>> with num_splits(network, 2):
        ...     y1, y2 = network(torch.cat([view1, view2])).chunk(2)
    """
    if num_views < 1:
        raise ValueError(f"num_splits: num_views must be 1 or more, got {num_views}")
    modules = [m for m in network.modules() if isinstance(m, _NormBase)]
    norms = [m for m in modules if isinstance(m, SplitBatchNormBase)]
    if num_views > 1 and len(norms) < len(modules):
        _check_converted(network)
    return _settings_of(norms, num_views, batch_stats)


@contextmanager
def _settings_of(
    norms: Sequence[SplitBatchNormBase], num_views: int, batch_stats: list[BatchStats] | None
) -> Iterator[None]:
    before = [(norm.num_views, norm.batch_stats) for norm in norms]
    for norm in norms:
        norm.num_views = num_views
        if batch_stats is not None:
            norm.batch_stats = batch_stats
    settings_change()
    try:
        yield
    finally:
        settings_change()
        for norm, previous in zip(norms, before, strict=True):
            norm.num_views, norm.batch_stats = previous


def _check_converted(network: nn.Module) -> None:
    """Raise a ValueError if a layer in train mode takes the statistics of all stacked views together."""
    for name, module in network.named_modules():
        if not isinstance(module, _NormBase) or isinstance(module, SplitBatchNormBase) or not module.training:
            continue
        if isinstance(module, _BatchNorm) or module.track_running_stats:
            raise ValueError(
                f"num_splits: batch norms of stacked views must be converted, got {type(module).__name__} at "
                f"{name or 'the network'}, which was put in after the conversion; call "
                "byol_fast.models.convert_split_batchnorm(model) after changing layers, and "
                "byol_fast.models.convert_sync_batchnorm(model) in place of torch.nn.SyncBatchNorm's (with Lightning: "
                "sync_batchnorm=False)"
            )


@contextmanager
def frozen_running_stats(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within this, norms do not update their running statistics, because the batch has been counted already.

    By momentum 0, not by removing the statistics: autograd must save the same tensors both times.

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


class SplitBatchNormBase(_BatchNorm):
    """Base of batch norms with a number of stacked views."""

    OWN_ATTRIBUTES = ("num_views", "synchronized", "batch_stats", "index", "histories")

    num_views: int
    synchronized: bool
    batch_stats: list[BatchStats] | None = None
    index: int = -1
    """See `index_layers`; -1 for a layer whose statistics are not collected."""
    histories: dict[torch.Size, SettingsHistory]
    """Settings of the calls by the shape of the batch: a recomputation comes with the same shape."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made by `class_for` have no name that pickle could import: they are made again from the original one.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, _, state, *rest = reduced
        return _new, (original_class(self),), {**state, "histories": {}}, *rest

    def _call(self, x: Tensor, *, recomputed: bool) -> Settings:
        """Number of stacked views of a batch, and whether its statistics are collected."""
        collects_stats = self.batch_stats is not None and self.index >= 0 and self.track_running_stats
        settings = Settings(self.num_views, collects_stats)
        if not torch.compiler.is_compiling():
            history = self.histories.get(x.shape)
            if not recomputed:
                if history is None:
                    history = self.histories[x.shape] = SettingsHistory()
                history.record(settings)
            elif history is not None:
                settings = history.of_first_pass()
        if x.shape[0] % settings.num_views:
            raise ValueError(
                f"batch norm: the batch must be {settings.num_views} views of equal size, got {x.shape[0]} images; "
                "leave the last, smaller batch out"
            )
        return settings

    def _check_input_dim(self, input: Tensor) -> None:
        if isinstance(input, Proxy):
            raise TypeError(
                "batch norm: torch.fx must trace plain batch norms, got split ones; trace "
                "byol_fast.models.revert_split_batchnorm(copy.deepcopy(network))"
            )
        super()._check_input_dim(input)  # type: ignore[no-untyped-call]


class _SplitBatchNorm(SplitBatchNormBase):
    """Batch norm with statistics for each view, in one pass over all views."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """As `nn.BatchNorm2d`, for each of the stacked views.

        Args:
            x: stacked views.
            relu: apply a ReLU to the result.
        """
        if relu and not (self.training and torch.compiler.is_compiling()):
            return functional.relu(self._normalize(x), inplace=True)
        return self._normalize(x, relu=relu)

    def _normalize(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """The result; `relu`, which `forward` sets in train mode and while compiling only, applies a ReLU to it."""
        if not self.training:
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)
        recomputed = is_recomputed()
        num_views, collects_stats = self._call(x, recomputed=recomputed)
        synchronized = self.synchronized and distributed.is_available() and distributed.is_initialized()
        if num_views == 1 and not synchronized and not collects_stats and not relu:
            with frozen_running_stats([self] if recomputed else []):
                return _BatchNorm.forward(self, x)
        if x.numel() <= num_views * x.shape[1] and not synchronized:
            raise ValueError(
                f"batch norm: each view must have more than one value a channel in train mode, got {list(x.shape)} for "
                f"{num_views} views; use a larger batch"
            )
        updates_running = self.running_mean is not None and self.track_running_stats and not collects_stats
        # The traceable form is what torch.compile can fuse, and what can communicate with other processes.
        if torch.compiler.is_compiling() or synchronized or (updates_running and self.momentum is None):
            y, mean_VC, var_VC = SplitBNTraceable.apply(
                x, self.weight, self.bias, num_views, self.eps, synchronized, relu
            )
            if updates_running and not recomputed:
                self._update_running_stats(mean_VC, var_VC)
        else:
            updates_now = updates_running and not recomputed
            if updates_now and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(num_views)
            running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
            y, mean_VC, var_VC = SplitBNEager.apply(
                x, self.weight, self.bias, *running, num_views, self.momentum or 0.0, self.eps, updates_now
            )
        if self.batch_stats is not None and collects_stats and not recomputed:
            self.batch_stats.append(BatchStats(self.index, mean_VC.detach(), var_VC.detach()))
        return cast("Tensor", y)

    @torch.no_grad()
    def _update_running_stats(self, mean_VC: Tensor, var_VC: Tensor) -> None:
        """Update the running statistics once per view."""
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


class ChunkedBatchNorm(SplitBatchNormBase):
    """Batch norm with a forward of its own, called once per view."""

    def forward(self, x: Tensor) -> Tensor:
        """As the original class, for each of the stacked views."""
        forward = super().forward
        if not self.training:
            return forward(x)
        recomputed = is_recomputed()
        num_views, _ = self._call(x, recomputed=recomputed)
        with frozen_running_stats([self] if recomputed else []):
            return forward(x) if num_views == 1 else torch.cat([forward(view) for view in x.chunk(num_views)])


def takes_relu(norm: nn.Module) -> bool:
    """True if a module's forward pass is that of a split batch norm, with the argument `relu`."""
    return isinstance(norm, _SplitBatchNorm) and "forward" not in vars(norm)


class SplitBatchNorm1d(_SplitBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that takes stacked views."""


class SplitBatchNorm2d(_SplitBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that takes stacked views."""


class SplitBatchNorm3d(_SplitBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that takes stacked views."""


class SplitSyncBatchNorm(_SplitBatchNorm, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` that takes stacked views, and works on CPUs."""


class _SplitBatchNormAct(_SplitBatchNorm):
    """timm's BatchNormAct2d: batch norm, then dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """As timm's, for each of the stacked views; with `relu` a ReLU follows."""
        y = cast("Tensor", self.act(self.drop(self._normalize(x))))
        return functional.relu(y) if relu else y


_CLASSES: dict[Any, type[SplitBatchNormBase]] = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    nn.BatchNorm3d: SplitBatchNorm3d,
    nn.SyncBatchNorm: SplitSyncBatchNorm,
}


def class_for(module: _BatchNorm) -> type[SplitBatchNormBase]:
    """The split class for a batch norm."""
    kind: Any = type(module)
    return _split_class(kind)


@functools.cache
def _split_class(kind: Any) -> type[SplitBatchNormBase]:
    if issubclass(kind, SplitBatchNormBase):
        return cast("type[SplitBatchNormBase]", kind)
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        base: type = _SplitBatchNormAct
    else:
        inherited = kind.forward in {_BatchNorm.forward, nn.SyncBatchNorm.forward}
        base = _SplitBatchNorm if inherited else ChunkedBatchNorm
    return type(f"Split{kind.__name__}", (base, kind), {})


def original_class(module: SplitBatchNormBase) -> type[_BatchNorm]:
    """The class that a split batch norm had before its conversion.

    Raises:
        ValueError: the class was changed since then.
    """
    original: Any = type(module).__bases__[-1]  # the first base splits
    if _split_class(original) is not type(module):
        raise ValueError(
            f"batch norm: a split batch norm must have the class of its conversion, got {type(module).__name__}; first "
            "undo what changed it, for instance by torch.nn.utils.parametrize.remove_parametrizations"
        )
    return cast("type[_BatchNorm]", original)


def _new(original: Any) -> SplitBatchNormBase:
    """A split batch norm of an original class, before its state is set."""
    kind = _split_class(original)
    return kind.__new__(kind)


def convert_module(module: _BatchNorm) -> SplitBatchNormBase:
    """Change the class of one batch norm, in place; returns it."""
    if not isinstance(module, SplitBatchNormBase):
        # The class changes and the object stays, so that hooks and shared layers keep working.
        synchronized = isinstance(module, nn.SyncBatchNorm)
        module.__class__ = class_for(module)
        converted = cast("SplitBatchNormBase", module)
        converted.num_views, converted.synchronized, converted.histories = 1, synchronized, {}
        # Set as instance attributes now: one that appears later makes torch.compile recompile.
        converted.batch_stats, converted.index = None, -1
    return cast("SplitBatchNormBase", module)
