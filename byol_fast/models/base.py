"""What BYOL and SimSiam share: the networks that views pass, their outputs, and the collapse meter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from byol_fast.models import split_batchnorm
from byol_fast.models.layers import Normalize
from byol_fast.models.split_batchnorm import BatchStats
from byol_fast.utils.profiler_ranges import phase
from byol_kernels.normalized_mse import byol_loss_with_stats

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


Views = Literal["batched", "separate", "concat"]
"""See `byol_fast.config.ModelConfig.views`."""


Pair = tuple[Tensor, Tensor]


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class TaskOutput(NamedTuple):
    """What one forward pass of a task gives the step."""

    loss: Tensor
    """Scalar to descend, fp32 (float64 in a float64 network)."""
    collapse_std: Tensor
    """Scalar, no gradient: see `collapse_std`."""
    features: Tensor | None = None
    """Features of the online encoder, no gradient, `[2B, D]`: those of the first views, then those of the second."""
    batch_stats: tuple[BatchStats, ...] | None = None
    """Statistics of the batch norms, where the running ones are still to be moved by them; see
    `SelfSupervisedTask.collects_statistics`."""


def collapse_std(projection_BD: Tensor) -> Tensor:
    """Collapse meter: std over the batch of the normalised projections, mean over dimensions, times sqrt(D).

    About 1 when the projections spread over the sphere, 0 when they have collapsed into one point
    (SimSiam, arXiv 2011.10566, section 4.1).

    Args:
        projection_BD: projections `[B, D]`, B >= 2, any floating dtype.

    Returns:
        Scalar, fp32 or float64, without gradient.
    """
    x = projection_BD.detach()
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)
    return x.std(dim=0).mean() * math.sqrt(x.shape[1])


def _check_views(what: str, view1: Tensor, view2: Tensor) -> None:
    for name, view in (("view1", view1), ("view2", view2)):
        if view.ndim != 4 or (view.dtype == torch.uint8 and view.shape[1] != 3) or view.shape[0] < 2:
            raise ValueError(
                f"{what}: {name} must be images [B, 3, H, W] with B of 2 or more, got {list(view.shape)}; images in "
                "NHWC order become that by .permute(0, 3, 1, 2)"
            )
        if view.dtype != torch.uint8 and not view.is_floating_point():
            raise ValueError(f"{what}: {name} must be uint8, or normalised floating point, got {view.dtype}")
    if view1.shape != view2.shape or view1.dtype != view2.dtype:
        raise ValueError(
            f"{what}: view2 must be {list(view1.shape)} as view1 (and {view1.dtype}), got {list(view2.shape)} of "
            f"{view2.dtype}"
        )


class SelfSupervisedTask(nn.Module, ABC):
    """A network and a loss over two views of the same images.

    A subclass sets `online`, `normalize` and `feature_dim`, and says how views pass the networks (`views`).
    """

    online: OnlineNetwork
    normalize: Normalize
    feature_dim: int
    """Size of the encoder's features."""
    views: Views
    """How views pass the networks; `separate` where `batched` was asked for and cannot be, see `views_note`."""
    collects_statistics: bool = False
    """Let `training_output` return the statistics of batch norms instead of moving the running ones: for a step
    that may yet be skipped. Only `TrainStep` sets it, for the length of a call."""
    _online_call: list[nn.Module]
    views_note: str | None
    """Why the views pass separately although batching was asked for."""

    @property
    def encoder(self) -> nn.Module:
        """The online encoder: the one that is evaluated and exported."""
        return self.online.encoder

    @abstractmethod
    def training_output(self, view1: Tensor, view2: Tensor) -> TaskOutput:
        """Loss and meters of a batch.

        Args:
            view1: first view, `[B, 3, H, W]`, uint8 or normalised floating point.
            view2: second view, likewise.
        """

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates; those with a partner in `target_parameters` come first, in its order."""

    def target_parameters(self) -> list[nn.Parameter]:
        """Parameters that follow the first of `trainable_parameters` by an exponential moving average."""
        return []

    def networks(self) -> list[nn.Module]:
        """The networks that views pass."""
        return [self.online]

    def call_online_through(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let the online network be called through a wrapper (DDP), which does not become a part of the task."""
        self._online_call = [wrap(self.online)]

    def more_to_come(self) -> AbstractContextManager[None]:
        """Within this, gradients stay on this process: those of more batches are added before they are shared."""
        call = self._online_call[0]
        return call.no_sync() if isinstance(call, DistributedDataParallel) else nullcontext()

    def _prepare_views(self, views: Views, encoder: str | nn.Module, image_size: int) -> None:
        """Make the networks fit for the way the views pass them."""
        self.views, self.views_note = views, None
        self._online_call = [self.online]
        if views != "batched":
            return
        # Torchvision's batch norms are modules; whether those of other encoders are is tried.
        known = isinstance(encoder, str) and not encoder.startswith("timm/")
        like = next(self.online.parameters())
        example = None if known else torch.zeros(2, 3, image_size, image_size, device=like.device)
        self.views_note = split_batchnorm.convert(self.online, example)
        if self.views_note is not None:
            self.views = "separate"
            return
        for network in self.networks():
            split_batchnorm.convert(network)

    def _inputs(self, view1: Tensor, view2: Tensor) -> list[Tensor]:
        """What the networks are called with: each view, or both in one batch."""
        _check_views(type(self).__name__, view1, view2)
        with phase("views"):
            if self.views == "separate":
                return [self.normalize(view1), self.normalize(view2)]
            return [self.normalize(torch.cat([view1, view2]))]

    def _views_stacked(self, network: nn.Module, collected: list[BatchStats] | None) -> AbstractContextManager[None]:
        """Tell a network's batch norms how many views are in a batch, and where its statistics go."""
        return split_batchnorm.views_stacked(network, 2 if self.views == "batched" else 1, collected)

    def _pass_online(self, inputs: Sequence[Tensor], collected: list[BatchStats] | None) -> tuple[Pair, Pair, Tensor]:
        """Projections and predictions of the two views, and their features as `TaskOutput.features`."""
        with phase("online forward"), self._views_stacked(self.online, collected):
            projections, predictions, features = self._online_call[0](*inputs)
        both = features[0] if len(features) == 1 else torch.cat(list(features))
        return _by_view(projections), _by_view(predictions), both


def _by_view(outputs: Sequence[Tensor]) -> Pair:
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
    """Encoder and projector: the slowly moving network that the online network predicts."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.requires_grad_(False)

    def forward(self, *views: Tensor) -> list[Tensor]:
        """Projection `[B, D]` of each batch of normalised images `[B, 3, H, W]`."""
        return [self.projector(self.encoder(view).flatten(1)) for view in views]


def _check_sizes(what: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{what}: {name} must be 1 or more, got {size}")


def _parameter_like(what: str, network: nn.Module) -> Tensor:
    like = next(network.parameters(), None)
    if like is None:
        raise ValueError(f"{what}: encoder must have parameters to train, {type(network).__name__} has none")
    return like


def _loss_and_meter(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """BYOL's loss, and the collapse meter over both views from the same pass over the data."""
    with phase("loss"):
        loss, stats = byol_loss_with_stats(p1, p2, z1, z2)
    return loss, stats.z_std.mean() * math.sqrt(z1.shape[1])
