"""Results that others have published, to stand beside ours: in the plot of the speed run and in docs/results.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_BYOL = "https://arxiv.org/abs/2006.07733"
_SIMSIAM = "https://arxiv.org/abs/2011.10566"
_LIGHTLY = (
    "https://github.com/lightly-ai/lightly/blob/master/docs/source/getting_started/benchmarks/cifar10_benchmark.py"
)
_SOLO_LEARN = "https://github.com/vturrisi/solo-learn"
_YAOX12 = "https://github.com/yaox12/BYOL-PyTorch"


@dataclass(frozen=True)
class Published:
    """Accuracy that others report for their own code."""

    method: str
    """Authors or library, such as `lightly BYOL`."""
    batch_size: int
    """Images per step, over all devices."""
    epochs: int
    protocol: Literal["kNN-200", "linear", "online linear"]
    """Evaluation on the test images: 200 nearest neighbors at temperature 0.1 (the best of all epochs), or a linear
    classifier (online: trained beside the encoder)."""
    top1: float
    """Accuracy, 0..1."""
    source: str
    """Web address."""
    recipe: str = ""
    """Recipe of this package that restates the settings; empty if none does."""
    minutes: float = 0.0
    """Whole run with its evaluations; 0 if it is not reported."""
    device: str = ""
    """Hardware of `minutes`."""

    @property
    def name(self) -> str:
        """Label for tables and charts."""
        return f"{self.method}, batch {self.batch_size}, {self.epochs} epochs"


CIFAR10_KNN = (
    Published("lightly BYOL", 128, 200, "kNN-200", 0.869, _LIGHTLY, "cifar10_lightly", 121.9, "RTX A6000"),
    Published("lightly BYOL", 512, 200, "kNN-200", 0.868, _LIGHTLY, "cifar10_lightly", 108.3, "RTX A6000"),
    Published("lightly BYOL", 512, 800, "kNN-200", 0.910, _LIGHTLY, "cifar10_lightly", 400.9, "RTX A6000"),
    Published("lightly FastSiam", 128, 200, "kNN-200", 0.906, _LIGHTLY, minutes=164.0, device="RTX A6000"),
)
"""Points of the speed run's plot: lightly's CIFAR-10 table of 2023."""

THRESHOLDS = (0.868, 0.910)
"""Accuracies whose time is reported: those of lightly's BYOL at batch 512."""

PUBLISHED = (
    *CIFAR10_KNN,
    Published("solo-learn", 256, 1000, "online linear", 0.9258, _SOLO_LEARN, "cifar10_resnet18"),
    Published("DeepMind", 4096, 1000, "linear", 0.743, _BYOL, "imagenet_resnet50", 480.0, "512 TPU v3 cores"),
    Published("DeepMind", 4096, 300, "linear", 0.725, _BYOL, "imagenet_resnet50_300"),
    Published("yaox12", 4096, 300, "linear", 0.7229, _YAOX12, "imagenet_resnet50_300"),
    Published("solo-learn", 2048, 100, "linear", 0.6837, _SOLO_LEARN, "imagenet_resnet50_100"),
    Published("yaox12", 4096, 100, "linear", 0.6434, _YAOX12, "imagenet_resnet50_100"),
    Published("Chen and He", 512, 100, "linear", 0.681, _SIMSIAM, "simsiam_imagenet"),
    Published("Chen and He", 512, 800, "linear", 0.918, _SIMSIAM, "simsiam_cifar10"),
)
"""Of all recipes."""
