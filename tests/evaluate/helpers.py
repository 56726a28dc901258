"""Tiny images and encoders, and their evaluation by each protocol."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from byol_fast.data import ImageSource
from byol_fast.data.sources import array_source
from byol_fast.evaluate import evaluate_finetune, evaluate_knn, evaluate_linear

SIZE = 12
CLASSES = ("red", "green", "blue")
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1}
QUICK: dict[str, dict[str, Any]] = {
    "linear": {"protocol": "fast", "l2": (1e-3, 1e-1), **CPU},
    "linear_reference": {"protocol": "reference", "lr": (0.4, 0.1), "epochs": 4, "batch_size": 16, **CPU},
    "finetune": {"labels": (0.5,), "lr": (0.1, 0.02), "epochs": (3,), "batch_size": 16, **CPU},
}
PROTOCOLS = ("knn", "linear", "linear_reference", "finetune")


def labeled_images(count: int, seed: int, noise: float = 60.0) -> ImageSource:
    """Noise with a larger mean in the channel of the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    values = 110 + noise * rng.normal(size=(count, SIZE, SIZE, 3))
    values[np.arange(count), :, :, labels] += 40
    images = np.clip(values, 0, 255).astype(np.uint8)
    return array_source(images, labels, CLASSES, arg_name="images")


class RecordingEncoder(nn.Sequential):
    """An encoder that records BN mode and statistics of every call, also those of its copies."""

    calls: ClassVar[list[tuple[bool, Tensor]]] = []

    def forward(self, x: Tensor) -> Tensor:
        norm = self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        self.calls.append((norm.training, norm.running_mean.clone()))
        result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return result


def network() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return RecordingEncoder(*layers)


def run(protocol: str, *arguments: object, **options: Any) -> Any:
    """Evaluation by a protocol; of fine-tuning the last one."""
    if protocol == "knn":
        return evaluate_knn(*arguments, **(CPU | options))  # type: ignore[arg-type]
    if protocol.startswith("linear"):
        return evaluate_linear(*arguments, **(QUICK[protocol] | options))  # type: ignore[arg-type]
    return evaluate_finetune(*arguments, **(QUICK[protocol] | options))[-1]  # type: ignore[arg-type]


def matrix(cells: Any) -> NDArray[np.int64]:
    """Confusion matrix of the three classes."""
    counts = np.zeros((3, 3), np.int64)
    for true, predicted, count in cells:
        counts[true, predicted] += count
    return counts
