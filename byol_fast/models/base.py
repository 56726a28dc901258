"""Base of self-supervised models: networks, outputs, view stacking, collapse meter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from byol_fast.config.fields import ImageSize, Range, ViewBatching, Width, check
from byol_fast.models import split_batchnorm
from byol_fast.models.encoders import check_train_mode
from byol_fast.models.layers import Normalize
from byol_fast.models.networks import OnlineNetwork
from byol_fast.models.split_batchnorm_layers import BatchStats, num_splits
from byol_fast.utils.profiler_ranges import record_range
from byol_kernels import byol_loss, byol_loss_with_stats
from byol_kernels.derivatives import is_transformed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NUM_GLOBAL_VIEWS = 2
"""Views of each image that pass the target network, too; the local views come behind them."""

Pair = tuple[Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
PerView = tuple[Pair, Tensor | None]
"""Outputs of the two global views, `[B, D]` each, and of the local views, `[K, B, D]`, or None if there are none."""


class ModelOutput(NamedTuple):
    """Result of one training forward pass."""

    loss: Tensor
    """Scalar loss, fp32 (float64 in a float64 network)."""
    embedding_std: Tensor
    """Collapse meter, scalar, no gradient: std over the batch of the normalized projections, mean over their dimensions
    and the views, times sqrt(D). About 1 when they spread over the sphere, 0 when they have collapsed into one point
    (SimSiam, arXiv 2011.10566, section 4.1)."""
    features: Tensor
    """Features of the global views by the online encoder, no gradient, `[2B, D]`: those of view 1, then of view 2."""
    batch_stats: tuple[BatchStats, ...] | None = None
    """Batch statistics with which the running statistics are still to be updated; see
    `SSLModel.collect_batch_stats`."""


def check_views(what: str, views: Sequence[Tensor]) -> None:
    """Raise a ValueError unless the views are batches of as many images of one dtype; their sizes may differ."""
    if len(views) < NUM_GLOBAL_VIEWS:
        raise ValueError(f"{what}: views must be {NUM_GLOBAL_VIEWS} or more, got {len(views)}")
    first = views[0]
    for i, view in enumerate(views):
        name = f"view{i + 1}" if i < NUM_GLOBAL_VIEWS else f"local view {i + 1 - NUM_GLOBAL_VIEWS}"
        if view.ndim != 4 or (view.dtype == torch.uint8 and view.shape[1] != 3) or view.shape[0] < 2:
            raise ValueError(
                f"{what}: {name} must be images [B, 3, H, W] with B of 2 or more, got {list(view.shape)}; images in "
                "NHWC order become that by .permute(0, 3, 1, 2)"
            )
        if view.dtype != torch.uint8 and not view.is_floating_point():
            raise ValueError(f"{what}: {name} must be uint8, or normalized floating point, got {view.dtype}")
        if view.shape[:2] != first.shape[:2] or view.dtype != first.dtype:
            raise ValueError(
                f"{what}: {name} must be [{first.shape[0]}, {first.shape[1]}, H, W] as view1 (and {first.dtype}), got "
                f"{list(view.shape)} of {view.dtype}"
            )


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """Views stacked along the batch, `[V * B, C, H, W]`: no copy if they are consecutive slices of one buffer.

    Args:
        views: of one shape, each `[B, C, H, W]`.
    """
    first = views[0]
    if len(views) == 1:
        return first
    # Under torch.compile the copy is fused with the normalization that follows. Tangents are in a memory of their own.
    if torch.compiler.is_compiling() or is_transformed() or any(view.requires_grad for view in views):
        return torch.cat(list(views))
    storage, size = first.untyped_storage()._cdata, first.shape[0] * first.stride(0)
    for i, view in enumerate(views):
        if (view.untyped_storage()._cdata, view.stride()) != (storage, first.stride()):
            return torch.cat(list(views))
        if view.storage_offset() != first.storage_offset() + i * size:
            return torch.cat(list(views))
    return first.as_strided((len(views) * first.shape[0], *first.shape[1:]), first.stride())


class Stack(NamedTuple):
    """Views of one size, which pass a network together."""

    images: Tensor
    """Normalized, `[V * B, 3, H, W]`."""
    num_global: int
    num_local: int

    def only_global(self) -> Stack:
        """The global views of this stack; no copy."""
        return Stack(self.global_rows(self.images), self.num_global, 0)

    def global_rows(self, rows: Tensor) -> Tensor:
        """Rows of the global views, of a tensor `[V * B, ...]`."""
        num_views = self.num_global + self.num_local
        return rows if self.num_local == 0 else rows[: len(rows) // num_views * self.num_global]


class SSLModel(nn.Module, ABC):
    """Networks and a loss over augmented views of the same images.

    A subclass sets `online`, `normalize` and `feature_dim`, calls `_set_view_batching`, and defines `_outputs`,
    `trainable_parameters` and, if its loss is not BYOL's, `_from_byol_loss` (or `loss` and `forward_train`) and
    `takes_local_views`.
    """

    online: OnlineNetwork
    normalize: Normalize
    feature_dim: int
    """Size of the encoder's features."""
    view_batching: ViewBatching
    """Passes of the views; `separate` if `batched` was asked for but is impossible, see `not_batched_reason`."""
    takes_local_views: bool = True
    """The method's loss has a place for more than two views."""
    collect_batch_stats: bool = False
    """If set, `forward_train` returns batch statistics instead of updating the running ones, because the step may still
    be skipped. Set it with `collecting_batch_stats`."""
    _online_wrapper: list[nn.Module]  # empty, or in a list, so that nn.Module does not register it
    not_batched_reason: str | None
    """Reason why views pass separately although batching was asked for; None if there is none."""

    @property
    def supports_batch_stats(self) -> bool:
        """True if the batch norms can hand over their statistics; not in a network that mixes images elsewhere."""
        return self.not_batched_reason is None

    @property
    def encoder(self) -> nn.Module:
        """The online encoder: the one that is evaluated and exported."""
        return self.online.encoder

    def forward(self, view1: Tensor, view2: Tensor) -> Outputs:
        """Predictions, and the projections that they are compared with.

        Args:
            view1: first view `[B, 3, H, W]`, uint8 or normalized floating point.
            view2: second view, likewise; its height and width may be others.

        Returns:
            `p1, p2, z1, z2`, each `[B, projection_dim]`; no gradient reaches z1 and z2.

        Raises:
            ValueError: the views are no images of these shapes and dtypes.
        """
        outputs, _, _ = self._outputs((view1, view2), None)
        return outputs

    def forward_train(self, *views: Tensor) -> ModelOutput:
        """Loss and meters of a batch.

        Args:
            views: two global views, then the local ones, each `[B, 3, H, W]`, uint8 or normalized floating point. Their
                sizes may differ. Consecutive views of one size pass the networks together, without a copy if they are
                slices of one buffer.

        Raises:
            ValueError: as `forward`; or local views with a method that has none; or, with `view_batching` concat, local
                views, or two views of unequal size.
        """
        batch_stats: list[BatchStats] | None = [] if self.collect_batch_stats else None
        outputs, local_predictions, features = self._outputs(views, batch_stats)
        with record_range("loss"):
            loss, embedding_std = byol_loss_and_std(*outputs, local_predictions)
            loss = self._from_byol_loss(loss)
        return ModelOutput(loss, embedding_std, features, None if batch_stats is None else tuple(batch_stats))

    @abstractmethod
    def _outputs(
        self, views: Sequence[Tensor], batch_stats: list[BatchStats] | None
    ) -> tuple[Outputs, Tensor | None, Tensor]:
        """The result of `forward`, predictions of the local views `[K, B, D]`, and features as in `ModelOutput`.

        Args:
            views: see `forward_train`.
            batch_stats: list to which batch norms append their statistics; None updates the running ones.
        """

    def loss(self, predictions: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
        """The loss of `forward_train`, mean over the batch, from the results of `forward`.

        Args:
            predictions: `(p1, p2)`, then those of local views, each `[B, D]`.
            projections: `(z1, z2)`, each `[B, D]`; no gradient reaches them.

        Raises:
            ValueError: predictions of local views, with a method that has none.
        """
        (p1, p2, *local), (z1, z2) = predictions, projections
        self._check_num_views(len(predictions))
        return self._from_byol_loss(byol_loss(p1, p2, z1, z2, torch.stack(local) if local else None))

    def _from_byol_loss(self, loss: Tensor) -> Tensor:
        """The method's loss from BYOL's, which is 4 - 2 (cos(p1, z2) + cos(p2, z1)) without local views."""
        return loss

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimizer updates; first those with a partner in `target_parameters`, in its order."""

    def target_parameters(self) -> list[nn.Parameter]:
        """Parameters that follow the first of `trainable_parameters` by an exponential moving average."""
        return []

    def networks(self) -> list[nn.Module]:
        """The networks that views pass: `online`, and `target` if the model has one."""
        target = getattr(self, "target", None)
        return [self.online] if target is None else [self.online, target]

    def wrap_online(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Call the online network through a wrapper (DDP), which does not become a part of the model."""
        self._online_wrapper = [wrap(self.online)]

    def no_sync(self) -> AbstractContextManager[None]:
        """Within this, gradients are not reduced over the processes: those of further batches are added first."""
        call = self._online_call
        return call.no_sync() if isinstance(call, DistributedDataParallel) else nullcontext()

    @property
    def _online_call(self) -> nn.Module:
        """The online network, or its wrapper."""
        return self._online_wrapper[0] if self._online_wrapper else self.online

    @contextmanager
    def collecting_batch_stats(self) -> Iterator[None]:
        """Within this, `forward_train` returns `batch_stats` and leaves the running statistics as they are."""
        self.collect_batch_stats = True
        try:
            yield
        finally:
            self.collect_batch_stats = False

    def _set_view_batching(self, view_batching: ViewBatching, encoder: str | nn.Module, image_size: int) -> None:
        """Convert the networks for the way in which the views pass them."""
        self.view_batching, self.not_batched_reason = view_batching, None
        self._online_wrapper = []
        # Torchvision's batch norms are modules; other encoders are tried with an example.
        known = isinstance(encoder, str) and not encoder.startswith("timm/")
        if view_batching == "batched":
            self._batch_views(None if known else image_size)
        for network in self.networks():
            split_batchnorm.convert_recomputable(network)
        if not known:
            check_train_mode(self.online.encoder, image_size, self.feature_dim)

    def _batch_views(self, image_size: int | None) -> None:
        """Convert the networks for stacked views, or let the views pass separately; tried if a size is given."""
        like = next(self.online.parameters())
        example = None if image_size is None else torch.zeros(2, 3, image_size, image_size, device=like.device)
        self.not_batched_reason = split_batchnorm.convert_split_batchnorm(self.online, example)
        if self.not_batched_reason is not None:
            self.view_batching = "separate"
            return
        for network in self.networks():
            split_batchnorm.convert_split_batchnorm(network)

    def _check_num_views(self, num_views: int) -> None:
        if num_views > NUM_GLOBAL_VIEWS and not self.takes_local_views:
            raise ValueError(f"{type(self).__name__}: views must be {NUM_GLOBAL_VIEWS}, got {num_views}")

    def _inputs(self, views: Sequence[Tensor]) -> list[Stack]:
        """Inputs of the networks: each view, or consecutive views of one size in one batch."""
        what = type(self).__name__
        check_views(what, views)
        self._check_num_views(len(views))
        runs: list[list[Tensor]] = []
        for view in views:
            if self.view_batching != "separate" and runs and runs[-1][0].shape == view.shape:
                runs[-1].append(view)
            else:
                runs.append([view])
        if self.view_batching == "concat" and [len(run) for run in runs] != [NUM_GLOBAL_VIEWS]:
            sizes = [tuple(view.shape[2:]) for view in views]
            raise ValueError(
                f"{what}: views must be {NUM_GLOBAL_VIEWS} of one size with view_batching concat, whose batch-norm "
                f"statistics are common to both, got sizes {sizes}; set view_batching to batched"
            )
        stacks, num_left = [], NUM_GLOBAL_VIEWS
        with record_range("views"):
            for run in runs:
                num_global = min(len(run), num_left)
                num_left -= num_global
                stacks.append(Stack(self.normalize(stack_views(run)), num_global, len(run) - num_global))
        return stacks

    def _num_splits(self, stack: Stack) -> int:
        """Parts of a stack of which batch norms take statistics of their own."""
        return 1 if self.view_batching == "concat" else stack.num_global + stack.num_local

    def _pass_online(
        self, stacks: Sequence[Stack], batch_stats: list[BatchStats] | None
    ) -> tuple[PerView, PerView, Tensor]:
        """Projections and predictions of each view, and features as `ModelOutput.features`."""
        splits = [self._num_splits(stack) for stack in stacks]
        # The list is set here and not in the network: DDP hands copies of lists to it.
        with record_range("online forward"), num_splits(self.online, splits[0], batch_stats):
            projections, predictions, features = self._online_call(
                *[stack.images for stack in stacks], num_views=splits if min(splits) < max(splits) else None
            )
        of_global = [stack.global_rows(f) for stack, f in zip(stacks, features, strict=True) if stack.num_global]
        features_2B = of_global[0] if len(of_global) == 1 else torch.cat(of_global)
        return by_view(projections, stacks), by_view(predictions, stacks), features_2B


def by_view(outputs: Sequence[Tensor], stacks: Sequence[Stack]) -> PerView:
    """Outputs of each view, from those of stacks of views; no copy, unless local views are in several stacks."""
    global_views: list[Tensor] = []
    local_views: list[Tensor] = []
    for output, (_, num_global, num_local) in zip(outputs, stacks, strict=True):
        batch = len(output) // (num_global + num_local)
        sizes = [batch] * num_global + [batch * num_local] * (num_local > 0)
        parts = torch.split(output, sizes) if len(sizes) > 1 else (output,)
        global_views += parts[:num_global]
        local_views += parts[num_global:]
    first, second = global_views
    if not local_views:
        return (first, second), None
    local = local_views[0] if len(local_views) == 1 else torch.cat(local_views)
    return (first, second), local.reshape(-1, *first.shape)


def check_options(
    what: str, image_sizes: Sequence[int], projector_layers: int, view_batching: ViewBatching, **widths: int
) -> None:
    """Raise a ValueError for an option that is out of range or none of the choices."""
    for name, size in zip(("image_size", *["other_image_sizes"] * (len(image_sizes) - 1)), image_sizes, strict=True):
        check(f"{what}: {name}", ImageSize, size)
    check(f"{what}: projector_layers", Annotated[int, Range(1, 8)], projector_layers)
    check(f"{what}: view_batching", ViewBatching, view_batching)
    for name, width in widths.items():
        check(f"{what}: {name}", Width, width)


def parameter_like(what: str, network: nn.Module) -> Tensor:
    """A parameter of an encoder, whose dtype and device the heads take; a ValueError if there is none."""
    like = next(network.parameters(), None)
    if like is None:
        raise ValueError(f"{what}: encoder must have parameters to train, {type(network).__name__} has none")
    return like


def byol_loss_and_std(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """BYOL's loss, and `ModelOutput.embedding_std` from the same pass over the data."""
    loss, stats = byol_loss_with_stats(p1, p2, z1, z2, p_local)
    return loss, stats.z_std.mean() * math.sqrt(z1.shape[1])
