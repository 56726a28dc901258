"""The training problem that all candidates of a comparison work on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from byol_fast.models.encoders import build_encoder, feature_dim

TAU, LR, MOMENTUM = 0.99, 0.05, 0.9
AUTOCAST_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Networks, batch and device: equal for all candidates."""

    encoder: str = "resnet18"
    cifar_stem: bool = False
    image_size: int = 64
    batch_size: int = 64
    """Images per step, each with two views."""
    hidden_dim: int = 4096
    projection_dim: int = 256
    device: str = "cpu"
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms and take the fastest, for every candidate."""

    def build_encoder(self) -> nn.Module:
        """Encoder whose initial weights depend on torch's seed alone."""
        return build_encoder(self.encoder, image_size=self.image_size, cifar_stem=self.cifar_stem)

    def build_head(self, in_features: int) -> nn.Module:
        """Projector or predictor."""
        return nn.Sequential(
            nn.Linear(in_features, self.hidden_dim),
            nn.BatchNorm1d(self.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(self.hidden_dim, self.projection_dim),
        )

    @functools.cached_property
    def feature_dim(self) -> int:
        """Number of features of the encoder."""
        return feature_dim(self.build_encoder(), self.image_size)

    def build_networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Encoder, projector and predictor with the initial weights of all candidates."""
        torch.manual_seed(0)
        encoder = self.build_encoder()
        projector = self.build_head(feature_dim(encoder, self.image_size))
        predictor = self.build_head(self.projection_dim)
        return encoder, projector, predictor

    def make_views(self) -> tuple[Tensor, Tensor]:
        """Two normalized views `[B, 3, S, S]`, fp32, on the device."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.batch_size, 3, self.image_size, self.image_size)
        view1, view2 = torch.randn(shape, generator=generator).to(self.device)
        return view1, view2


def copy_parameters(target: nn.Module, source: nn.Module, skip: str | None = None) -> None:
    """Copy parameters in order: their names differ from library to library, the order of the layers does not.

    Args:
        target: module that is written to.
        source: module that is read.
        skip: name of a parameter of the source that the target does not have.
    """
    values = [p for name, p in source.named_parameters() if name != skip]
    with torch.no_grad():
        for parameter, value in zip(target.parameters(), values, strict=True):
            parameter.copy_(value)
