"""BYOL: Bootstrap Your Own Latent (arXiv 2006.07733)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from byol_fast.config.fields import ViewBatching
from byol_fast.models.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Outputs,
    SSLModel,
    by_view,
    check_options,
    parameter_like,
)
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.models.layers import MLPHead, Normalize
from byol_fast.models.networks import OnlineNetwork, TargetNetwork
from byol_fast.models.split_batchnorm_layers import BatchStats, num_splits
from byol_fast.utils.profiler_ranges import record_range
from byol_kernels import ema_update_


class BYOL(SSLModel):
    """Bootstrap Your Own Latent: the online network predicts the target's projection of the other view.

    The loss is `mean over the batch of l(p1, z2) + l(p2, z1)` with `l = 2 - 2 cos`, from 0 to 8 (equation 2). With K
    local views, which the online network alone sees, it is twice the mean over all pairs of an online view and another
    global view: `mean over the batch of (l(p1, z2) + l(p2, z1) + sum over k of l(p_k, z1) + l(p_k, z2)) / (1 + K)`.
    Batch normalization sees one view at a time. The target runs in train mode with running statistics of its own; only
    its parameters are an EMA of the online ones.

    Args:
        encoder: a torchvision model's name, `timm/NAME`, or a module that maps `[B, 3, H, W]` to features.
        hidden_dim: width of the hidden layer of projector and predictor.
        projection_dim: size of projections and predictions.
        projector_layers: linear layers of the projector (the reference's has two).
        hidden_bias: whether the heads' layers before a batch norm have a bias (the reference's have one).
        last_bias: whether the heads' last layers have a bias (the reference's have none).
        image_size: height and width of the views, in pixels.
        other_image_sizes: those of views of another size: the encoder must take them, too.
        cifar_stem: see `build_encoder`.
        zero_init_residual: see `build_encoder`.
        mean: channel means that uint8 input is normalized with.
        std: channel standard deviations that uint8 input is normalized with.
        view_batching: how views pass the networks. `batched` (both at once, batch-norm statistics for each) becomes
            `separate` for a network it cannot serve; `not_batched_reason` then says why.

    Raises:
        ValueError: unknown encoder, or one that does not accept images of these sizes; another argument out of range.

    Examples:
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
        hidden_bias: bool = True,
        last_bias: bool = False,
        image_size: int = 224,
        other_image_sizes: Sequence[int] = (),
        cifar_stem: bool = False,
        zero_init_residual: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        view_batching: ViewBatching = "batched",
    ) -> None:
        super().__init__()
        check_options(
            "BYOL",
            (image_size, *other_image_sizes),
            projector_layers,
            view_batching,
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
        )
        network = build_encoder(
            encoder, image_size=image_size, cifar_stem=cifar_stem, zero_init_residual=zero_init_residual
        )
        features = feature_dim(network, image_size, *other_image_sizes)
        like = parameter_like("BYOL", network)
        biases = {"hidden_bias": hidden_bias, "last_bias": last_bias}
        projector = MLPHead(features, hidden_dim, projection_dim, num_layers=projector_layers, **biases).to(like)
        predictor = MLPHead(projection_dim, hidden_dim, projection_dim, **biases).to(like)
        self.normalize = Normalize(mean, std).to(like)
        self.online = OnlineNetwork(network, projector, predictor)
        self.target = TargetNetwork(copy.deepcopy(network), copy.deepcopy(projector))
        self.feature_dim = features
        self._set_view_batching(view_batching, encoder, image_size)

    def _outputs(
        self, views: Sequence[Tensor], batch_stats: list[BatchStats] | None
    ) -> tuple[Outputs, Tensor | None, Tensor]:
        stacks = self._inputs(views)
        of_target = [stack.only_global() for stack in stacks if stack.num_global]
        # One number of views serves both inputs where there are two: each is then a single view.
        splits = self._num_splits(of_target[0])
        # no_grad, not inference_mode: that breaks later compiled training.
        with record_range("target forward"), torch.no_grad(), num_splits(self.target, splits, batch_stats):
            outputs = self.target(*[stack.images for stack in of_target])
        (z1, z2), _ = by_view(outputs, of_target)
        _, ((p1, p2), local_predictions), features = self._pass_online(stacks, batch_stats)
        return (p1, p2, z1, z2), local_predictions, features

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the online encoder, projector and predictor, in this order."""
        return list(dict.fromkeys([*self._followed_parameters(), *self.online.predictor.parameters()]))

    def _followed_parameters(self) -> list[nn.Parameter]:
        return [*self.online.encoder.parameters(), *self.online.projector.parameters()]

    def target_parameters(self) -> list[nn.Parameter]:
        """Parameters of the target encoder and projector, in the order of the online ones."""
        return list(self.target.parameters())

    @torch.no_grad()
    def update_target(self, tau: float | Tensor) -> None:
        """`target = tau * target + (1 - tau) * online`, parameters only, for a training loop of your own.

        Call it once after each optimizer step that was not skipped, however many batches the step had. A `TrainStep`
        does not call it: there the optimizer step (LARS), or the step itself, updates the target.

        Args:
            tau: decay from 0 to 1, a number or a scalar tensor on the model's device.

        Raises:
            ValueError: tau is out of range, or the target is bfloat16 or float16, where it would stop moving. Under
                autocast it is float32; `copies` of `byol_kernels.ema_update_` also writes it in a low precision.
        """
        ema_update_(self.target_parameters(), self._followed_parameters(), tau)
