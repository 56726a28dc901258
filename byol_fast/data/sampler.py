"""The images and augmentation parameters of each batch, by its number."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import AugmentParams, sample_augment_params
from byol_fast.data.random_numbers import item_keys, random_bits
from byol_fast.data.sources import SourceError

_SHUFFLE, _SUBSTITUTE = 0xFFFF, 0xFFFE  # streams of random numbers, beside those of the views


@dataclasses.dataclass(frozen=True, slots=True)
class BatchSpec:
    """Contents of a batch, before an image is read."""

    index: NDArray[np.int64]
    """Positions of its images in the source `[B]`."""
    params: tuple[AugmentParams, ...]
    """Augmentation parameters of each view."""


class BatchSampler:
    """The contents of batch number n, as a function of n; the only state is the order of the current epoch.

    Each epoch shuffles all images and deals them out to the shards in turn. Where they do not divide evenly, images
    from the front of the epoch's order fill the last round: all shards take the same number of batches. Images that
    do not fill a batch are left out of that epoch.

    An excluded image is replaced by another one, which depends only on the seed, the epoch and the position.

    Args:
        num_images: number of images of the source.
        view_configs: configurations of the views.
        batch_size: images a batch.
        seed: of the order and of the augmentation parameters.
        shard_id: part of every epoch that this process takes.
        num_shards: number of parts.
        excluded: positions of corrupt images in the source. The sampler reads it at every call, so that the owner may
            add to it.

    Raises:
        ValueError: `shard_id` is out of range.
        SourceError: there are fewer images than one batch takes.
    """

    def __init__(
        self,
        num_images: int,
        view_configs: tuple[ViewConfig, ...],
        *,
        batch_size: int,
        seed: int,
        shard_id: int = 0,
        num_shards: int = 1,
        excluded: Collection[int] = (),
    ) -> None:
        if not 0 <= shard_id < num_shards:
            raise ValueError(f"loader: shard_id must be 0..{num_shards - 1} (num_shards - 1), got {shard_id}")
        self._per_shard = -(-num_images // num_shards)
        if batch_size > self._per_shard:
            shards = f" on each of {num_shards} shards" if num_shards > 1 else ""
            if self._per_shard < 2:  # no batch size would do: batch norm needs two images
                raise SourceError(f"data: there must be 2 or more training images{shards}, got 1; add images")
            raise SourceError(
                f"batch_size: must be at most the number of training images{shards}, {self._per_shard}, got "
                f"{batch_size}; use --batch-size {self._per_shard} or less, or more images"
            )
        self.num_images, self.view_configs, self.seed = num_images, view_configs, seed
        self.batch_size, self.shard_id, self.num_shards = batch_size, shard_id, num_shards
        self.batches_per_epoch = self._per_shard // batch_size
        self._excluded = excluded
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __call__(self, batch_number: int) -> BatchSpec:
        """Images and augmentation parameters of a batch, which is numbered from 0 over all epochs."""
        epoch, index = batch_number // self.batches_per_epoch, self.index(batch_number)
        params = (
            sample_augment_params(config, index, seed=self.seed, epoch=epoch, view=view)
            for view, config in enumerate(self.view_configs)
        )
        return BatchSpec(index, tuple(params))

    def index(self, batch_number: int) -> NDArray[np.int64]:
        """Images of a batch."""
        epoch, batch = divmod(batch_number, self.batches_per_epoch)
        start = batch * self.batch_size
        index = self.order(epoch)[start : start + self.batch_size]
        return self._replace_excluded(index, epoch, start) if self._excluded else index

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Images of this shard in the order of an epoch, excluded ones included."""
        if epoch != self._epoch:
            order = permutation(self.num_images, seed=self.seed, epoch=epoch)
            positions = np.arange(self.shard_id, self.shard_id + self._per_shard * self.num_shards, self.num_shards)
            self._order, self._epoch = order[positions % self.num_images], epoch
        return self._order

    def _replace_excluded(self, index: NDArray[np.int64], epoch: int, start: int) -> NDArray[np.int64]:
        index = index.copy()
        for row in np.flatnonzero(np.isin(index, np.fromiter(self._excluded, np.int64))):
            position = (start + int(row)) * self.num_shards + self.shard_id
            candidates = substitutes(self.num_images, seed=self.seed, epoch=epoch, position=position)
            index[row] = next(i for i in candidates if i not in self._excluded)
        return index


def permutation(n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of n images in an epoch: a new shuffle each epoch."""
    keys = item_keys(seed, epoch, _SHUFFLE, np.arange(n))
    return np.argsort(random_bits(keys, 0), kind="stable").astype(np.int64)


def substitutes(n: int, *, seed: int, epoch: int, position: int) -> Iterator[int]:
    """Candidates, in order, to replace a corrupt image at a position of an epoch, out of n images; endless."""
    key = item_keys(seed, epoch, _SUBSTITUTE, np.array([position]))
    for counter in itertools.count(1):
        yield int(random_bits(key, counter)[0] % np.uint64(n))
