"""The ResNet-18 of lightly's CIFAR-10 benchmark."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18


def lightly_resnet18() -> nn.Module:
    """ResNet-18 of torchvision with the CIFAR stem, without its ReLU, and with PyTorch's default initialization.

    The benchmark's encoder is `Sequential(*list(ResNetGenerator("resnet-18").children())[:-1], AdaptiveAvgPool2d(1))`.
    The ReLU behind the first batch norm is no child, but a call in `forward`, and so is lost.
    """
    network: nn.Module = resnet18()
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool, network.relu = nn.Identity(), nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # torchvision has drawn them by kaiming_normal_
    return network
