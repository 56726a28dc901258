"""Accuracy on images that were cropped, shifted or flipped, measured beside a run's own evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.transforms import v2

from byol_fast.data import ImageSource
from byol_fast.evaluate.extract import ImageBatches
from byol_fast.evaluate.images import labels_of
from byol_fast.training.callbacks import Callback
from byol_fast.training.knn_monitor import EvalFeatures, KNNMonitor

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult
    from byol_fast.training.trainer import Trainer

PLAIN = "as they are"
_BATCH_SIZE = 256


def moved(images: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """Images that were cropped, shifted and flipped, each in its own way.

    Args:
        images: uint8 `[N, C, S, S]`, on the CPU.
        seed: of the crops and shifts. The state of torch's generator does not change.

    Returns:
        Images of the same shape: crops of 50 to 100 % of the area, shifts by up to 20 % in both directions, horizontal
        flips.
    """
    size = images.shape[-1]
    crop, shift = v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomAffine(0, translate=(0.2, 0.2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "cropped": torch.stack([crop(image) for image in images]),
            "shifted": torch.stack([shift(image) for image in images]),
            "flipped": v2.functional.horizontal_flip(images),
        }


class MovedImages(Callback):
    """Measures the kNN accuracy on moved validation images of raw pixels, the untrained and the trained encoder.

    The training images, among which neighbors are searched, stay as they are; their features are those of the run's
    first and last evaluation. All images must fit into memory.
    """

    def __init__(self) -> None:
        self.top1: dict[str, dict[str, float]] = {}
        """Accuracy, 0..1, by classifier and kind of images."""
        self._val: dict[str, Tensor] = {}

    def on_run_begin(self, trainer: Trainer) -> None:
        """Ask for the features of the evaluations."""
        if trainer.knn is not None:
            trainer.knn.on_features = lambda features: self._measure_encoder(trainer, features)

    def _measure_encoder(self, trainer: Trainer, features: EvalFeatures) -> None:
        if trainer.state.step not in {0, trainer.total_steps}:
            return
        assert trainer.knn is not None
        if not self._val:
            plain = _center_crops(trainer.knn, trainer.knn.val)
            self._val = {PLAIN: plain} | moved(plain)
        x = {kind: features.extract(_batches(images))[0] for kind, images in self._val.items() if kind != PLAIN}
        name = "trained" if trainer.state.step else "untrained"
        top1 = _top1(trainer.knn, features.train_x, features.train_y, x)
        self.top1[name] = {PLAIN: features.knn.top1} | top1

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        """Measure the accuracy of raw pixels, normalized as the encoder's input."""
        if trainer.knn is None or not self._val:
            return

        def pixels(images: Tensor) -> Tensor:
            x: Tensor = trainer.model.normalize(images.to(trainer.device))
            # The channels of gray images are equal: one has the same cosines in a third of the time.
            return x[:, : 1 if is_gray else 3].flatten(1)

        train = _center_crops(trainer.knn, trainer.knn.train)
        is_gray = all(bool((x == x[:, :1]).all()) for x in (train, self._val[PLAIN]))
        x = {kind: pixels(images) for kind, images in self._val.items()}
        train_y = labels_of(trainer.knn.train).to(trainer.device)
        self.top1 = {"raw pixels": _top1(trainer.knn, pixels(train), train_y, x)} | self.top1


def _center_crops(knn: KNNMonitor, source: ImageSource) -> Tensor:
    """All images as they are evaluated, uint8 `[N, 3, S, S]`, on the CPU."""
    return torch.cat([images.cpu() for images, _ in knn.batches(source, "images to move")])


def _batches(images: Tensor) -> ImageBatches:
    positions = torch.arange(len(images))
    return zip(torch.split(images, _BATCH_SIZE), torch.split(positions, _BATCH_SIZE), strict=True)


def _top1(knn: KNNMonitor, train_x: Tensor, train_y: Tensor, val_x: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of each set of features of the validation images, as the run measures it."""
    val_y = labels_of(knn.val)
    return {kind: knn.accuracy(train_x, train_y, x, val_y).top1 for kind, x in val_x.items()}
