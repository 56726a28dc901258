"""ResNet-18 with half the channels."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class NarrowResNet(ResNet):  # type: ignore[misc]
    """torchvision's `ResNet` with half the channels in every stage."""

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return super()._make_layer(block, planes // 2, *args, **kwargs)


def narrow_resnet18() -> nn.Module:
    """ResNet-18 with half the channels in every stage (2.8 M parameters): the demo's encoder."""
    return NarrowResNet(BasicBlock, [2, 2, 2, 2])
