"""Random crops and flips of labelled images: what classifiers are trained on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from byol_fast.config import Config, DataConfig, ViewConfig
from byol_fast.data import ImageSource, make_loader
from byol_fast.evaluate.encoder import Subject, Workplace, labels_of


class Crops:
    """The reference's augmentation for classifiers: random resized crop (area 0.08 to 1) and flip, nothing else.

    Every epoch visits all images in a new order; what does not fill a batch is left out of that epoch.

    Args:
        subject: says how large the crops are.
        source: images with labels.
        workplace: where the crops are wanted.
        batch_size: images at a time; all of them where there are fewer.
        seed: of order and crops.
    """

    def __init__(
        self, subject: Subject, source: ImageSource, workplace: Workplace, *, batch_size: int, seed: int
    ) -> None:
        settings = workplace.settings
        view = ViewConfig(
            size=subject.image_size, interpolation=subject.interpolation, jitter=0.0, grayscale=0.0, blur=0.0
        )
        self.batch_size = min(batch_size, len(source))
        config = Config(
            batch_size=self.batch_size,
            seed=seed,
            data=DataConfig(threads=settings.threads, on_bad=settings.on_bad),
        )
        self._loader = make_loader(source, config, (view,), device=workplace.device)
        self._labels, self._device = labels_of(source), workplace.device
        self.steps_per_epoch = self._loader.steps_per_epoch

    def take(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches: uint8 `[B, 3, S, S]` and classes `[B]`; the loader is closed after them."""
        try:
            for _ in range(steps):
                batch = next(self._loader)
                yield batch.views[0], self._labels[batch.index].to(self._device, non_blocking=True)
        finally:
            self._loader.close()


def generator(seed: int) -> torch.Generator:
    """A source of random numbers on the CPU, apart from torch's own."""
    return torch.Generator().manual_seed(seed)
