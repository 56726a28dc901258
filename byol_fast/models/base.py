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
from byol_fast.models.split_batchnorm_layers import BatchStats, num_splits
from byol_fast.utils.profiler_ranges import record_range
from byol_kernels import byol_loss, byol_loss_with_stats
from byol_kernels.derivatives import is_transformed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NUM_VIEWS = 2
"""Views of each image that a step takes."""

Pair = tuple[Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class ModelOutput(NamedTuple):
    """Result of one training forward pass."""

    loss: Tensor
    """Scalar loss, fp32 (float64 in a float64 network)."""
    embedding_std: Tensor
    """Collapse meter, scalar, no gradient: std over the batch of the normalized projections, mean over their dimensions
    and the views, times sqrt(D). About 1 when they spread over the sphere, 0 when they have collapsed into one point
    (SimSiam, arXiv 2011.10566, section 4.1)."""
    features: Tensor
    """Features of the online encoder, no gradient, `[2B, D]`: those of the first views, then those of the second."""
    batch_stats: tuple[BatchStats, ...] | None = None
    """Batch statistics with which the running statistics are still to be updated; see
    `SSLModel.collect_batch_stats`."""


def check_views(what: str, views: Sequence[Tensor]) -> None:
    """Raise a ValueError unless the views are two batches of images of one shape and dtype."""
    if len(views) != NUM_VIEWS:
        raise ValueError(f"{what}: views must be {NUM_VIEWS}, got {len(views)}")
    view1, view2 = views
    for name, view in (("view1", view1), ("view2", view2)):
        if view.ndim != 4 or (view.dtype == torch.uint8 and view.shape[1] != 3) or view.shape[0] < 2:
            raise ValueError(
                f"{what}: {name} must be images [B, 3, H, W] with B of 2 or more, got {list(view.shape)}; images in "
                "NHWC order become that by .permute(0, 3, 1, 2)"
            )
        if view.dtype != torch.uint8 and not view.is_floating_point():
            raise ValueError(f"{what}: {name} must be uint8, or normalized floating point, got {view.dtype}")
    if view1.shape != view2.shape or view1.dtype != view2.dtype:
        raise ValueError(
            f"{what}: view2 must be {list(view1.shape)} as view1 (and {view1.dtype}), got {list(view2.shape)} of "
            f"{view2.dtype}"
        )


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """Views stacked along the batch, `[V * B, C, H, W]`: no copy if they are consecutive slices of one buffer.

    Args:
        views: of one shape, each `[B, C, H, W]`.
    """
    first = views[0]
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


class SSLModel(nn.Module, ABC):
    """Networks and a loss over augmented views of the same images.

    A subclass sets `online`, `normalize` and `feature_dim`, calls `_set_view_batching`, and defines `_outputs`,
    `trainable_parameters` and, if its loss is not BYOL's, `_from_byol_loss` (or `loss` and `forward_train`).
    """

    online: OnlineNetwork
    normalize: Normalize
    feature_dim: int
    """Size of the encoder's features."""
    view_batching: ViewBatching
    """Passes of the views; `separate` if `batched` was asked for but is impossible, see `not_batched_reason`."""
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
            view2: second view, likewise.

        Returns:
            `p1, p2, z1, z2`, each `[B, projection_dim]`; no gradient reaches z1 and z2.

        Raises:
            ValueError: the views are no images of these shapes and dtypes.
        """
        return self._outputs((view1, view2), None)[0]

    def forward_train(self, *views: Tensor) -> ModelOutput:
        """Loss and meters of a batch.

        Args:
            views: two, each `[B, 3, H, W]`, uint8 or normalized floating point.

        Raises:
            ValueError: as `forward`.
        """
        batch_stats: list[BatchStats] | None = [] if self.collect_batch_stats else None
        outputs, features = self._outputs(views, batch_stats)
        with record_range("loss"):
            loss, embedding_std = byol_loss_and_std(*outputs)
            loss = self._from_byol_loss(loss)
        return ModelOutput(loss, embedding_std, features, None if batch_stats is None else tuple(batch_stats))

    @abstractmethod
    def _outputs(self, views: Sequence[Tensor], batch_stats: list[BatchStats] | None) -> tuple[Outputs, Tensor]:
        """The result of `forward`, and the online encoder's features as in `ModelOutput`.

        Args:
            views: see `forward_train`.
            batch_stats: list to which batch norms append their statistics; None updates the running ones.
        """

    def loss(self, predictions: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
        """The loss of `forward_train`, mean over the batch, from the results of `forward`.

        Args:
            predictions: `(p1, p2)`, each `[B, D]`.
            projections: `(z1, z2)`, each `[B, D]`; no gradient reaches them.
        """
        (p1, p2), (z1, z2) = predictions, projections
        return self._from_byol_loss(byol_loss(p1, p2, z1, z2))

    def _from_byol_loss(self, loss: Tensor) -> Tensor:
        """The method's loss from BYOL's, which is 4 - 2 (cos(p1, z2) + cos(p2, z1))."""
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

    def _inputs(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Normalized inputs of the networks: each view, or all in one batch."""
        check_views(type(self).__name__, views)
        with record_range("views"):
            if self.view_batching == "separate":
                return [self.normalize(view) for view in views]
            return [self.normalize(stack_views(views))]

    def _num_splits(self, network: nn.Module, batch_stats: list[BatchStats] | None) -> AbstractContextManager[None]:
        """Set how many views are in a batch, and where its statistics go, on a network's batch norms."""
        return num_splits(network, NUM_VIEWS if self.view_batching == "batched" else 1, batch_stats)

    def _pass_online(self, inputs: Sequence[Tensor], batch_stats: list[BatchStats] | None) -> tuple[Pair, Pair, Tensor]:
        """Projections and predictions of the two views, and their features as `ModelOutput.features`."""
        with record_range("online forward"), self._num_splits(self.online, batch_stats):
            projections, predictions, features = self._online_call(*inputs)
        both = features[0] if len(features) == 1 else torch.cat(list(features))
        return by_view(projections), by_view(predictions), both


def by_view(outputs: Sequence[Tensor]) -> Pair:
    """Outputs of the first and the second view, from two outputs or from one with both views stacked."""
    if len(outputs) == 2:
        return outputs[0], outputs[1]
    first, second = outputs[0].chunk(2)
    return first, second


class OnlineNetwork(nn.Module):
    """Encoder, projector and predictor: the network that is trained."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(self, *views: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Projection, prediction and (without gradient) features, `[B, D]`, of each batch of images `[B, 3, H, W]`.

        All in one call: DDP counts the calls before a backward pass.
        """
        features = [self.encoder(view).flatten(1) for view in views]
        projections = [self.projector(f) for f in features]
        return projections, [self.predictor(projection) for projection in projections], [f.detach() for f in features]


class TargetNetwork(nn.Module):
    """Encoder and projector: the EMA of the online network, whose projections the online network predicts."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.requires_grad_(False)

    def forward(self, *views: Tensor) -> list[Tensor]:
        """Projection `[B, D]` of each batch of normalized images `[B, 3, H, W]`."""
        return [self.projector(self.encoder(view).flatten(1)) for view in views]


def check_options(
    what: str, image_size: int, projector_layers: int, view_batching: ViewBatching, **widths: int
) -> None:
    """Raise a ValueError for an option that is out of range or none of the choices."""
    check(f"{what}: image_size", ImageSize, image_size)
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


def byol_loss_and_std(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """BYOL's loss, and `ModelOutput.embedding_std` from the same pass over the data."""
    loss, stats = byol_loss_with_stats(p1, p2, z1, z2)
    return loss, stats.z_std.mean() * math.sqrt(z1.shape[1])
