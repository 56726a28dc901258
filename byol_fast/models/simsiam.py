"""SimSiam: Exploring Simple Siamese Representation Learning (arXiv 2011.10566)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from byol_fast.config.fields import ViewBatching
from byol_fast.models.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Outputs,
    SSLModel,
    check_options,
    parameter_like,
)
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.models.layers import Normalize, simsiam_predictor, simsiam_projector
from byol_fast.models.networks import OnlineNetwork
from byol_fast.models.split_batchnorm_layers import BatchStats


class SimSiam(SSLModel):
    """SimSiam: the predictor's output for one view is drawn to the other view's projection, which gets no gradient.

    The loss is `-(cos(p1, z2) + cos(p2, z1)) / 2`, from -1 to 1 (arXiv 2011.10566, equation 4).

    Args:
        encoder: as `BYOL`.
        hidden_dim: width of the projector's hidden layers.
        projection_dim: size of projections and predictions.
        projector_layers: linear layers of the projector (ImageNet 3, CIFAR-10 2).
        predictor_hidden_dim: width of the predictor's hidden layer, the bottleneck.
        image_size: height and width of the views, in pixels.
        other_image_sizes: as `BYOL`.
        cifar_stem: see `build_encoder`.
        zero_init_residual: see `build_encoder`.
        mean: channel means that uint8 input is normalized with.
        std: channel standard deviations that uint8 input is normalized with.
        view_batching: as `BYOL`.

    Raises:
        ValueError: unknown encoder, or one that does not accept images of these sizes; another argument out of range.
    """

    takes_local_views = False

    def __init__(
        self,
        encoder: str | nn.Module,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 2048,
        projector_layers: int = 3,
        predictor_hidden_dim: int = 512,
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
            "SimSiam",
            (image_size, *other_image_sizes),
            projector_layers,
            view_batching,
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            predictor_hidden_dim=predictor_hidden_dim,
        )
        network = build_encoder(
            encoder, image_size=image_size, cifar_stem=cifar_stem, zero_init_residual=zero_init_residual
        )
        self.feature_dim = feature_dim(network, image_size, *other_image_sizes)
        like = parameter_like("SimSiam", network)
        projector = simsiam_projector(self.feature_dim, hidden_dim, projection_dim, num_layers=projector_layers)
        predictor = simsiam_predictor(projection_dim, predictor_hidden_dim)
        self.normalize = Normalize(mean, std).to(like)
        self.online = OnlineNetwork(network, projector.to(like), predictor.to(like))
        self._set_view_batching(view_batching, encoder, image_size)

    def _outputs(
        self, views: Sequence[Tensor], batch_stats: list[BatchStats] | None
    ) -> tuple[Outputs, Tensor | None, Tensor]:
        ((z1, z2), _), ((p1, p2), _), features = self._pass_online(self._inputs(views), batch_stats)
        return (p1, p2, z1.detach(), z2.detach()), None, features

    def _from_byol_loss(self, loss: Tensor) -> Tensor:
        return loss / 4 - 1

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder, the projector and the predictor, in this order."""
        return list(self.online.parameters())
