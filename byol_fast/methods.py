"""Self-supervised methods: what is learned from two views. BYOL, arXiv 2006.07733."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.networks import MLPHead, Normalize, build_encoder, feature_dim
from byol_kernels import byol_loss, ema_update_

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TaskOutput(NamedTuple):
    """What one forward pass of a task gives the step."""

    loss: Tensor
    """Scalar to descend, fp32 (float64 in a float64 network)."""
    collapse_std: Tensor
    """Scalar, no gradient: see `collapse_std`."""


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


def _check_view(name: str, view: Tensor) -> None:
    if view.ndim != 4 or (view.dtype == torch.uint8 and view.shape[1] != 3) or view.shape[0] < 2:
        raise ValueError(
            f"BYOL: {name} must be images [B, 3, H, W] with B of 2 or more, got {list(view.shape)}; images in NHWC "
            "order become that by .permute(0, 3, 1, 2)"
        )
    if view.dtype != torch.uint8 and not view.is_floating_point():
        raise ValueError(f"BYOL: {name} must be uint8, or normalised floating point, got {view.dtype}")


class SelfSupervisedTask(nn.Module, ABC):
    """A network and a loss over two views of the same images."""

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The encoder that is evaluated and exported."""

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


class OnlineNetwork(nn.Module):
    """Encoder, projector and predictor: the network that is trained."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Projection and prediction, each `[B, D]`, of normalised images `[B, 3, H, W]`."""
        projection = self.projector(self.encoder(view).flatten(1))
        return projection, self.predictor(projection)


class TargetNetwork(nn.Module):
    """Encoder and projector: the slowly moving network that the online network predicts."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.requires_grad_(False)

    def forward(self, view: Tensor) -> Tensor:
        """Projection `[B, D]` of normalised images `[B, 3, H, W]`."""
        projection: Tensor = self.projector(self.encoder(view).flatten(1))
        return projection


class BYOL(SelfSupervisedTask):
    """Bootstrap Your Own Latent: the online network predicts the target's projection of the other view.

    Each view goes through each network on its own, so that batch normalisation sees one view at a time. The target
    runs in train mode with running statistics of its own; only its parameters follow the online network's.

    Args:
        encoder: a torchvision model's name, or a module that maps `[B, 3, H, W]` to features.
        hidden_dim: width of the hidden layer of projector and predictor.
        projection_dim: size of projections and predictions.
        last_bias: whether the heads' last layers have a bias (the reference's have none).
        image_size: height and width of the views, in pixels.
        cifar_stem: see `build_encoder`.
        zero_init_residual: see `build_encoder`.
        pretrained: see `build_encoder`.
        mean: channel means that uint8 input is normalised with.
        std: channel standard deviations that uint8 input is normalised with.

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
        last_bias: bool = False,
        image_size: int = 224,
        cifar_stem: bool = False,
        zero_init_residual: bool = False,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_dim", hidden_dim), ("projection_dim", projection_dim), ("image_size", image_size)):
            if size < 1:
                raise ValueError(f"BYOL: {name} must be 1 or more, got {size}")
        network = build_encoder(
            encoder, cifar_stem=cifar_stem, zero_init_residual=zero_init_residual, pretrained=pretrained
        )
        features = feature_dim(network, image_size)
        like = next(network.parameters(), None)
        if like is None:
            raise ValueError(f"BYOL: encoder must have parameters to train, {type(encoder).__name__} has none")
        projector = MLPHead(features, hidden_dim, projection_dim, last_bias=last_bias).to(like)
        predictor = MLPHead(projection_dim, hidden_dim, projection_dim, last_bias=last_bias).to(like)
        self.normalize = Normalize(mean, std)
        self.online = OnlineNetwork(network, projector, predictor)
        self.target = TargetNetwork(copy.deepcopy(network), copy.deepcopy(projector))
        self.feature_dim = features

    @property
    def encoder(self) -> nn.Module:
        """The online encoder."""
        return self.online.encoder

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
        (_, p1), (_, p2), z1, z2 = self._views(view1, view2)
        return p1, p2, z1, z2

    def _views(
        self, view1: Tensor, view2: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
        for name, view in (("view1", view1), ("view2", view2)):
            _check_view(name, view)
        if view1.shape != view2.shape:
            raise ValueError(f"BYOL: view2 must be {list(view1.shape)} as view1, got {list(view2.shape)}")
        view1, view2 = self.normalize(view1), self.normalize(view2)
        with torch.no_grad():  # not inference_mode: it breaks later compiled training
            z1, z2 = self.target(view1), self.target(view2)
        return self.online(view1), self.online(view2), z1, z2

    def loss(self, predictions: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
        """`mean over the batch of l(p1, z2) + l(p2, z1)` with `l = 2 - 2 cos`, from 0 to 8.

        Args:
            predictions: the online network's `(p1, p2)`, each `[B, D]`.
            projections: the target network's `(z1, z2)`, each `[B, D]`.
        """
        (p1, p2), (z1, z2) = predictions, projections
        return byol_loss(p1, p2, z1, z2)

    def training_output(self, view1: Tensor, view2: Tensor) -> TaskOutput:
        """See `SelfSupervisedTask.training_output`; the collapse meter is of view 1's online projections."""
        (projection1, p1), (_, p2), z1, z2 = self._views(view1, view2)
        return TaskOutput(self.loss((p1, p2), (z1, z2)), collapse_std(projection1))

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
