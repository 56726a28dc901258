"""The methods, and a network that compiles in seconds and still has every kind of layer that a ResNet has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.models import BYOL, SimSiam, SSLModel

METHODS: list[type[SSLModel]] = [BYOL, SimSiam]


class SmallResidualNetwork(nn.Module):
    """Three convolutions with batch norm, the last two with a residual connection around them; `[B, 3, S, S]`.

    Stem and classifier have torchvision's names, so `build_encoder` can replace the one and remove the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)), inplace=True)))
        y = F.relu(x + y, inplace=True)
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


class Steep(nn.Module):
    """Scales features by a factor that overflows after a large step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * torch.cosh(self.weight)
        return scaled
