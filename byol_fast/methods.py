"""Self-supervised methods: what is learned from two views.

BYOL, arXiv 2006.07733; SimSiam, arXiv 2011.10566.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from byol_fast import batchnorm
from byol_fast.batchnorm import BatchStats
from byol_fast.config import Config
from byol_fast.networks import MLPHead, Normalize, build_encoder, feature_dim, simsiam_predictor, simsiam_projector
from byol_fast.phases import phase
from byol_kernels import byol_loss, ema_update_
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
        self.views_note = batchnorm.convert(self.online, example)
        if self.views_note is not None:
            self.views = "separate"
            return
        for network in self.networks():
            batchnorm.convert(network)

    def _inputs(self, view1: Tensor, view2: Tensor) -> list[Tensor]:
        """What the networks are called with: each view, or both in one batch."""
        _check_views(type(self).__name__, view1, view2)
        with phase("views"):
            if self.views == "separate":
                return [self.normalize(view1), self.normalize(view2)]
            return [self.normalize(torch.cat([view1, view2]))]

    def _views_stacked(self, network: nn.Module, collected: list[BatchStats] | None) -> AbstractContextManager[None]:
        """Tell a network's batch norms how many views are in a batch, and where its statistics go."""
        return batchnorm.views_stacked(network, 2 if self.views == "batched" else 1, collected)

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


class BYOL(SelfSupervisedTask):
    """Bootstrap Your Own Latent: the online network predicts the target's projection of the other view.

    Batch normalisation sees one view at a time. The target runs in train mode with running statistics of its own; only
    its parameters follow the online network's.

    Args:
        encoder: a torchvision model's name, `timm/NAME`, or a module that maps `[B, 3, H, W]` to features.
        hidden_dim: width of the hidden layer of projector and predictor.
        projection_dim: size of projections and predictions.
        projector_layers: linear layers of the projector (the reference's has two).
        last_bias: whether the heads' last layers have a bias (the reference's have none).
        image_size: height and width of the views, in pixels.
        cifar_stem: see `build_encoder`.
        zero_init_residual: see `build_encoder`.
        pretrained: see `build_encoder`.
        mean: channel means that uint8 input is normalised with.
        std: channel standard deviations that uint8 input is normalised with.
        views: how views pass the networks. `batched` (both at once, batch-norm statistics for each) becomes
            `separate` for a network it cannot serve; `views_note` then says why.

    Raises:
        ValueError: unknown encoder, or one that does not accept images of this size.

    Example:
        >>> model = BYOL("resnet18", image_size=32)
        >>> p1, p2, z1, z2 = model(view1, view2)
        >>> model.loss((p1, p2), (z1, z2)).backward()
        >>> optimizer.step()
        >>> model.update_target(tau=0.996)
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        *,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        projector_layers: int = 2,
        last_bias: bool = False,
        image_size: int = 224,
        cifar_stem: bool = False,
        zero_init_residual: bool = False,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        views: Views = "batched",
    ) -> None:
        super().__init__()
        _check_sizes("BYOL", hidden_dim=hidden_dim, projection_dim=projection_dim, image_size=image_size)
        network = build_encoder(
            encoder,
            image_size=image_size,
            cifar_stem=cifar_stem,
            zero_init_residual=zero_init_residual,
            pretrained=pretrained,
        )
        features = feature_dim(network, image_size)
        like = _parameter_like("BYOL", network)
        projector = MLPHead(features, hidden_dim, projection_dim, num_layers=projector_layers, last_bias=last_bias).to(
            like
        )
        predictor = MLPHead(projection_dim, hidden_dim, projection_dim, last_bias=last_bias).to(like)
        self.normalize = Normalize(mean, std)
        self.online = OnlineNetwork(network, projector, predictor)
        self.target = TargetNetwork(copy.deepcopy(network), copy.deepcopy(projector))
        self.feature_dim = features
        self._prepare_views(views, encoder, image_size)

    def networks(self) -> list[nn.Module]:
        """The online network and the target."""
        return [self.online, self.target]

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions of the online network and projections of the target.

        Args:
            view1: first view `[B, 3, H, W]`, uint8 or normalised floating point.
            view2: second view, likewise.

        Returns:
            `p1, p2, z1, z2`, each `[B, projection_dim]`; no gradient reaches z1 and z2.

        Raises:
            ValueError: the views are no images of these shapes and dtypes.
        """
        return self._outputs(view1, view2, None)[0]

    def _outputs(self, view1: Tensor, view2: Tensor, collected: list[BatchStats] | None) -> tuple[Outputs, Tensor]:
        """What `forward` returns, and the online encoder's features."""
        inputs = self._inputs(view1, view2)
        with phase("target forward"), torch.no_grad(), self._views_stacked(self.target, collected):
            z1, z2 = _by_view(self.target(*inputs))  # no_grad, not inference_mode: that breaks later compiled training
        _, (p1, p2), features = self._pass_online(inputs, collected)
        return (p1, p2, z1, z2), features

    def loss(self, predictions: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
        """`mean over the batch of l(p1, z2) + l(p2, z1)` with `l = 2 - 2 cos`, from 0 to 8.

        Args:
            predictions: the online network's `(p1, p2)`, each `[B, D]`.
            projections: the target network's `(z1, z2)`, each `[B, D]`.
        """
        (p1, p2), (z1, z2) = predictions, projections
        return byol_loss(p1, p2, z1, z2)

    def training_output(self, view1: Tensor, view2: Tensor) -> TaskOutput:
        """See `SelfSupervisedTask.training_output`; the collapse meter is of the target's projections."""
        collected: list[BatchStats] | None = [] if self.collects_statistics else None
        outputs, features = self._outputs(view1, view2, collected)
        return TaskOutput(*_loss_and_meter(*outputs), features, None if collected is None else tuple(collected))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the online encoder, projector and predictor, in this order."""
        return [*self._followed_parameters(), *self.online.predictor.parameters()]

    def _followed_parameters(self) -> list[nn.Parameter]:
        return [*self.online.encoder.parameters(), *self.online.projector.parameters()]

    def target_parameters(self) -> list[nn.Parameter]:
        """Parameters of the target encoder and projector, in the order of the online ones."""
        return list(self.target.parameters())

    @torch.no_grad()
    def update_target(self, tau: float | Tensor) -> None:
        """`target = tau * target + (1 - tau) * online`, parameters only; call it after the optimizer's step.

        Args:
            tau: decay from 0 to 1, a number or a scalar tensor on the model's device.
        """
        ema_update_(self.target_parameters(), self._followed_parameters(), tau)


def _loss_and_meter(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """BYOL's loss, and the collapse meter over both views from the same pass over the data."""
    with phase("loss"):
        loss, stats = byol_loss_with_stats(p1, p2, z1, z2)
    return loss, stats.z_std.mean() * math.sqrt(z1.shape[1])


class SimSiam(SelfSupervisedTask):
    """SimSiam: the predictor's output for one view is drawn to the other view's projection, which gets no gradient.

    The loss is `-(cos(p1, z2) + cos(p2, z1)) / 2`, from -1 to 1 (arXiv 2011.10566, equation 4).

    Args:
        encoder: as `BYOL`.
        hidden_dim: width of the projector's hidden layers.
        projection_dim: size of projections and predictions.
        projector_layers: linear layers of the projector (ImageNet 3, CIFAR-10 2).
        predictor_hidden_dim: width of the predictor's hidden layer, the bottleneck.
        image_size: height and width of the views, in pixels.
        cifar_stem: see `build_encoder`.
        zero_init_residual: see `build_encoder`.
        pretrained: see `build_encoder`.
        mean: channel means that uint8 input is normalised with.
        std: channel standard deviations that uint8 input is normalised with.
        views: as `BYOL`.

    Raises:
        ValueError: unknown encoder, or one that does not accept images of this size.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 2048,
        projector_layers: int = 3,
        predictor_hidden_dim: int = 512,
        image_size: int = 224,
        cifar_stem: bool = False,
        zero_init_residual: bool = False,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        views: Views = "batched",
    ) -> None:
        super().__init__()
        _check_sizes(
            "SimSiam",
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            predictor_hidden_dim=predictor_hidden_dim,
            image_size=image_size,
        )
        network = build_encoder(
            encoder,
            image_size=image_size,
            cifar_stem=cifar_stem,
            zero_init_residual=zero_init_residual,
            pretrained=pretrained,
        )
        self.feature_dim = feature_dim(network, image_size)
        like = _parameter_like("SimSiam", network)
        projector = simsiam_projector(self.feature_dim, hidden_dim, projection_dim, num_layers=projector_layers)
        predictor = simsiam_predictor(projection_dim, predictor_hidden_dim)
        self.normalize = Normalize(mean, std)
        self.online = OnlineNetwork(network, projector.to(like), predictor.to(like))
        self._prepare_views(views, encoder, image_size)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions and projections.

        Args:
            view1: first view `[B, 3, H, W]`, uint8 or normalised floating point.
            view2: second view, likewise.

        Returns:
            `p1, p2, z1, z2`, each `[B, projection_dim]`; z1 and z2 are detached.

        Raises:
            ValueError: the views are no images of these shapes and dtypes.
        """
        return self._outputs(view1, view2, None)[0]

    def _outputs(self, view1: Tensor, view2: Tensor, collected: list[BatchStats] | None) -> tuple[Outputs, Tensor]:
        """What `forward` returns, and the encoder's features."""
        (z1, z2), (p1, p2), features = self._pass_online(self._inputs(view1, view2), collected)
        return (p1, p2, z1.detach(), z2.detach()), features

    def loss(self, predictions: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
        """`-(cos(p1, z2) + cos(p2, z1)) / 2`, mean over the batch.

        Args:
            predictions: `(p1, p2)`, each `[B, D]`.
            projections: `(z1, z2)`, each `[B, D]`.
        """
        (p1, p2), (z1, z2) = predictions, projections
        return _from_byol(byol_loss(p1, p2, z1, z2))

    def training_output(self, view1: Tensor, view2: Tensor) -> TaskOutput:
        """See `SelfSupervisedTask.training_output`; the collapse meter is of the projections."""
        collected: list[BatchStats] | None = [] if self.collects_statistics else None
        outputs, features = self._outputs(view1, view2, collected)
        loss, meter = _loss_and_meter(*outputs)
        return TaskOutput(_from_byol(loss), meter, features, None if collected is None else tuple(collected))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder, the projector and the predictor, in this order."""
        return list(self.online.parameters())


def _from_byol(loss: Tensor) -> Tensor:
    """SimSiam's loss: BYOL's is 4 - 2 (cos + cos)."""
    return loss / 4 - 1


def make_task(config: Config, *, pretrained: bool) -> SelfSupervisedTask:
    """The task of a configuration.

    Args:
        config: of it `method`, `model` and `view1.size` are used.
        pretrained: whether `model.pretrained` is obeyed; weights that are about to be loaded need not be fetched.
    """
    model = config.model
    common: dict[str, Any] = {
        "hidden_dim": model.hidden_dim,
        "projection_dim": model.projection_dim,
        "projector_layers": model.projector_layers,
        "image_size": config.view1.size,
        "cifar_stem": model.cifar_stem,
        "zero_init_residual": model.zero_init_residual,
        "pretrained": model.pretrained and pretrained,
        "mean": model.mean,
        "std": model.std,
        "views": model.views,
    }
    if config.method == "simsiam":
        return SimSiam(model.encoder, predictor_hidden_dim=model.predictor_hidden_dim, **common)
    return BYOL(model.encoder, last_bias=model.last_bias, **common)
