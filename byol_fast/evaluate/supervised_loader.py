"""Random crops and flips of labeled images, to train classifiers on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from byol_fast.config import Config, DataConfig, ViewConfig
from byol_fast.data import ImageSource, make_loader
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.images import labels_of
from byol_fast.evaluate.runner import EvalContext


class SupervisedLoader:
    """Batches with the reference's augmentation for classifiers: random resized crop (area 0.08 to 1) and flip.

    Every epoch is a new permutation of all images; an incomplete last batch is dropped.

    Args:
        pretrained: its input format is used.
        source: labeled images.
        context: device, and settings of the decoding.
        batch_size: images per batch; limited to the number of images.
        seed: of the order and the crops.
    """

    def __init__(
        self, pretrained: PretrainedEncoder, source: ImageSource, context: EvalContext, *, batch_size: int, seed: int
    ) -> None:
        settings = context.settings
        view = ViewConfig(
            size=pretrained.preprocessing.crop,
            interpolation=pretrained.preprocessing.interpolation,
            color_jitter_p=0.0,
            grayscale_p=0.0,
            blur_p=0.0,
        )
        self.batch_size = min(batch_size, len(source))
        config = Config(
            batch_size=self.batch_size,
            seed=seed,
            view1=view,
            view2=view,
            data=DataConfig(threads=settings.threads, on_corrupt=settings.on_corrupt),
        )
        self._loader = make_loader(source, config, (view,), device=context.device)
        self._labels, self._device = labels_of(source), context.device
        self.batches_per_epoch = self._loader.batches_per_epoch

    def batches(self, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, uint8 `[B, 3, S, S]`, and labels `[B]`, on the device; closes the loader at the end."""
        try:
            for _ in range(num_batches):
                batch = next(self._loader)
                yield batch.views[0], self._labels[batch.index].to(self._device, non_blocking=True)
        finally:
            self._loader.close()


def generator(seed: int) -> torch.Generator:
    """A CPU generator, independent of torch's default one."""
    return torch.Generator().manual_seed(seed)
