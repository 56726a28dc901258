"""The images and augmentation parameters of batch number n."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import ViewDraws, draw, permutation, substitutes
from byol_fast.data.sources import SourceError


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A batch before it is made."""

    index: NDArray[np.int64]
    """Positions of its images in the source `[B]`."""
    draws: tuple[ViewDraws, ViewDraws]
    """Augmentation parameters of the two views."""


class Planner:
    """Says what batch number n consists of; holds nothing but the order of the current epoch.

    Each epoch shuffles all images and deals them out to the shards in turn. Where they do not divide evenly, images
    from the front of the epoch's order fill up the last deal: all shards make the same number of steps. Images that
    do not fill a batch are left out of that epoch.

    Another image takes the place of an excluded one; who does depends on the seed, the epoch and the place alone.
    """

    excluded: Collection[int] = ()
    """Images that cannot be read; may grow from one call to the next."""

    def __init__(
        self,
        num_images: int,
        views: tuple[ViewConfig, ViewConfig],
        *,
        batch_size: int,
        seed: int,
        shard_id: int = 0,
        num_shards: int = 1,
    ) -> None:
        if not 0 <= shard_id < num_shards:
            raise ValueError(f"loader: shard_id must be 0..{num_shards - 1} (num_shards - 1), got {shard_id}")
        per_shard = -(-num_images // num_shards)
        if batch_size > per_shard:
            share = f" on each of {num_shards} shards" if num_shards > 1 else ""
            raise SourceError(
                f"batch_size: must be at most the number of training images{share}, {per_shard}, got {batch_size}; "
                f"use --batch-size {per_shard} or less, or more images"
            )
        self.num_images, self.views, self.seed = num_images, views, seed
        self.batch_size, self.shard_id, self.num_shards = batch_size, shard_id, num_shards
        self.steps_per_epoch = per_shard // batch_size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """This shard's images in the order of an epoch, bad ones included."""
        if epoch != self._epoch:
            order = permutation(self.num_images, seed=self.seed, epoch=epoch)
            dealt = np.arange(self.shard_id, self.shard_id + self._per_shard() * self.num_shards, self.num_shards)
            self._order, self._epoch = order[dealt % self.num_images], epoch
        return self._order

    def index(self, step: int) -> NDArray[np.int64]:
        """The images of batch number `step`."""
        epoch, at = divmod(step, self.steps_per_epoch)
        index = self.order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return self._without_excluded(index, epoch, at * self.batch_size) if self.excluded else index

    def __call__(self, step: int) -> Plan:
        """Batch number `step`."""
        epoch, index = step // self.steps_per_epoch, self.index(step)
        first, second = (draw(v, index, seed=self.seed, epoch=epoch, view=i) for i, v in enumerate(self.views))
        return Plan(index, (first, second))

    def _without_excluded(self, index: NDArray[np.int64], epoch: int, start: int) -> NDArray[np.int64]:
        index = index.copy()
        for row in np.flatnonzero(np.isin(index, np.fromiter(self.excluded, np.int64))):
            place = (start + int(row)) * self.num_shards + self.shard_id
            candidates = substitutes(self.num_images, seed=self.seed, epoch=epoch, place=place)
            index[row] = next(i for i in candidates if i not in self.excluded)
        return index

    def _per_shard(self) -> int:
        return -(-self.num_images // self.num_shards)
