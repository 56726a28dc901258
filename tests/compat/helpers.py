"""Small networks and comparisons shared by the tests of `byol_fast.compat`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms

from byol_fast.compat import guide
from byol_fast.config import ViewConfig

REASON = "pip install '.[peers]'"
WITH_LIBRARY = [pytest.param(False, id="formula"), pytest.param(True, marks=pytest.mark.peers, id="lightly")]
"""Compare with the rule written out, and with lightly itself."""

SMALL_VIEW = ViewConfig(size=16, scale=(0.2, 1.0), interpolation="bilinear", blur_p=0.5, blur_kernel=3)


def build_network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5)
    )
    return net.to(dtype)


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def small_guide() -> guide.BYOL:
    torch.manual_seed(0)
    net = small_network()
    return guide.BYOL(net, net, 8, view=SMALL_VIEW)


def normalize(photos: np.ndarray) -> Tensor:
    """Images normalized as by the guide's data loader."""
    to_float = transforms.Compose([transforms.ToTensor(), transforms.Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)])
    return torch.stack([to_float(image) for image in photos])


def max_difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest difference of two lists of tensors, relative to the largest value if that exceeds 1."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(a, b, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1.0)) for x, y in pairs)
