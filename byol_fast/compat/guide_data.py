"""The data of a practical guide: CIFAR-10 in memory, in randomly cropped and flipped batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from byol_fast.config import Config, DataConfig, KNNConfig, recipes
from byol_fast.config.fields import expand_home
from byol_fast.data.loaders.threads import resolve_num_threads, single_core_threads
from byol_fast.data.sources import ArraySource, ImageSource, SourceError
from byol_fast.data.sources.open import open_train_val
from byol_fast.models.layers import Normalize

DATA_VARIABLE = "BYOL_FAST_DATA"
"""Environment variable: the images that `load_data` reads without `root`."""
PADDING = 4
_SIZE = 32


class CIFARLoader:
    """Batches of `(images, labels)` in a new order every epoch, like a `DataLoader`.

    Images are fp32 `[B, 3, 32, 32]`, padded by 4 pixels and randomly cropped, randomly flipped, and normalized with
    `CIFAR10_MEAN` and `CIFAR10_STD`; labels are int64 `[B]`, -1 without labels. Random numbers come from torch's
    default generator. The last batch of an epoch may be smaller; a single image that is left joins the batch before:
    batch norm needs two.
    """

    def __init__(self, dataset: ArraySource, batch_size: int, num_workers: int) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self._images = torch.from_numpy(dataset.images)
        labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
        self._labels = torch.from_numpy(labels)
        self._normalize = Normalize(recipes.CIFAR_MEAN, recipes.CIFAR_STD)

    def __len__(self) -> int:
        return len(self._batch_sizes())

    def _batch_sizes(self) -> list[int]:
        num_full, rest = divmod(len(self.dataset), self.batch_size)
        if rest == 1 and num_full:
            return [self.batch_size] * (num_full - 1) + [self.batch_size + 1]
        return [self.batch_size] * num_full + [rest] * (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = torch.split(torch.randperm(len(self.dataset)), self._batch_sizes())
        params = (self._sample_params(rows) for rows in batches)
        if self.num_workers == 0:
            yield from (self._batch(*batch_params) for batch_params in params)
            return
        pool = single_core_threads(self.num_workers, "byol-fast-images")
        try:
            futures: deque[Future[tuple[Tensor, Tensor]]] = deque()
            for batch_params in params:
                futures.append(pool.submit(self._batch, *batch_params))
                if len(futures) > self.num_workers:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _sample_params(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image numbers, row and column of the crop in the padded image `[2, B]`, and mask of the flipped images.

        Sampled in the calling thread, so that workers cannot change the order.
        """
        offsets = torch.randint(2 * PADDING + 1, (2, len(rows)))
        return rows, offsets, torch.rand(len(rows)) < 0.5

    def _batch(self, rows: Tensor, offsets: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        padded = nn.functional.pad(self._images[rows], (0, 0, PADDING, PADDING, PADDING, PADDING))
        pixels = torch.arange(_SIZE)
        columns = torch.where(flip[:, None], pixels.flip(0), pixels) + offsets[1][:, None]
        numbers = torch.arange(len(rows))[:, None, None]
        images = padded[numbers, (pixels + offsets[0][:, None])[:, :, None], columns[:, None, :]]
        return self._normalize(images.permute(0, 3, 1, 2)), self._labels[rows]


def load_data(batch_size: int = 256, num_workers: int = 10, *, root: str | Path | None = None) -> CIFARLoader:
    """CIFAR-10's training images, augmented and normalized, with their labels.

    Args:
        batch_size: images per batch.
        num_workers: threads that prepare batches ahead, at most one per core; 0 prepares them in the calling thread.
        root: folder of torchvision's CIFAR-10; or any path to images of 32 x 32 pixels that
            `byol_fast.data.open_source` opens. None: the environment variable BYOL_FAST_DATA, and without it CIFAR-10
            in ~/.cache/byol_fast, downloaded if missing.

    Raises:
        ValueError: invalid sizes; images are missing, cannot be downloaded, or have another size.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"load_data: batch_size must be 1 or more and num_workers 0 or more, got {batch_size} and {num_workers}; "
            "the guide's are 256 and 10"
        )
    threads = min(num_workers, resolve_num_threads(0))
    return CIFARLoader(_in_memory(_open(root), max(threads, 1)), batch_size, threads)


def _open(root: str | Path | None) -> ImageSource:
    path = root if root is not None else os.environ.get(DATA_VARIABLE) or None
    folder = None if path is None else expand_home(path)
    data = DataConfig(builtin="cifar10", root=folder)
    if folder is not None and any((folder / n).exists() for n in ("cifar-10-batches-py", "cifar-10-python.tar.gz")):
        data = DataConfig(builtin="cifar10", cache=folder)
    try:
        return open_train_val(Config(data=data, knn=KNNConfig(enabled="off")))[0]
    except SourceError as error:
        raise SourceError(
            f"load_data: {error}; in Python, use load_data(root=FOLDER), or set {DATA_VARIABLE}=FOLDER"
        ) from error


def _in_memory(source: ImageSource, threads: int) -> ArraySource:
    if not isinstance(source, ArraySource):
        with single_core_threads(threads, "byol-fast-decode") as pool:
            images = list(pool.map(lambda i: source.load_tensor(i)[0].permute(1, 2, 0).numpy(), range(len(source))))
        wrong = next((i for i, image in enumerate(images) if image.shape != (_SIZE, _SIZE, 3)), None)
        if wrong is not None:
            height, width = images[wrong].shape[:2]
            raise SourceError(
                f"load_data: images must be of 32 x 32 pixels as CIFAR-10's, got {height} x {width} in "
                f"{source.sample_name(wrong)}; train_byol takes any iterable of (images, labels)"
            )
        return ArraySource(np.stack(images), source.labels, source.classes, source.describe())
    if source.images.shape[1:3] != (_SIZE, _SIZE):
        height, width = source.images.shape[1:3]
        raise SourceError(
            f"load_data: images must be of 32 x 32 pixels as CIFAR-10's, got {height} x {width} in {source.name}; "
            "train_byol takes any iterable of (images, labels)"
        )
    return source
