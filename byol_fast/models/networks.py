"""The online and the target network of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from byol_fast.models.split_batchnorm_layers import num_splits


class OnlineNetwork(nn.Module):
    """Encoder, projector and predictor: the network that is trained."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(
        self, *batches: Tensor, num_views: Sequence[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Projection, prediction and (without gradient) features, `[B, D]`, of each batch of images `[B, 3, H, W]`.

        All in one call: DDP counts the calls before a backward pass.

        Args:
            batches: normalized images; sizes may differ.
            num_views: stacked views in each batch, of which batch norms take statistics of their own; None: as set by
                `num_splits`.
        """
        projections, predictions, features = [], [], []
        for i, batch in enumerate(batches):
            with nullcontext() if num_views is None else num_splits(self, num_views[i]):
                feature = self.encoder(batch).flatten(1)
                projection = self.projector(feature)
                predictions.append(self.predictor(projection))
            projections.append(projection)
            features.append(feature.detach())
        return projections, predictions, features


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
