"""Two views of images that lie on the device as one tensor: for arrays, as of CIFAR, on a GPU that has room for them.

The host does nothing in a step but start a handful of kernels. Which images a step takes is a slice of the epoch's
order, copied there once an epoch; what is done to them is drawn on the device, bit for bit the numbers that all other
loaders draw (see `byol_kernels/augment_params/`).
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byol_fast.config import Config, ViewConfig
from byol_fast.data.augment import Views, finish, joined, needed, parts
from byol_fast.data.augment_params import centred_crop, factor_ranges, stream_key
from byol_fast.data.batch import Batch
from byol_fast.data.loaders.base import PlannedLoader, thread_count
from byol_fast.data.loaders.prefetch import SideStream, single_core_threads
from byol_fast.data.sources import ArraySource, ImageSource
from byol_kernels import resized_crop, sample_params


class ResidentLoader(PlannedLoader):
    """Two views of each image, of a data set that lies on the device.

    Batches are raw: uint8, `[B, 3, S, S]`, channels_last, on `device`. On a CPU threads make them ahead of the step.
    """

    def __init__(
        self,
        source: ImageSource,
        config: Config,
        *,
        device: torch.device,
        shard_id: int = 0,
        num_shards: int = 1,
        report: Path | None = None,
    ) -> None:
        super().__init__(source, config, device=device, shard_id=shard_id, num_shards=num_shards, report=report)
        assert isinstance(source, ArraySource)
        self.backend = f"resident {device}"
        height, width = source.images.shape[1:3]
        self._views = (config.view1, config.view2)
        self._names = tuple(needed(view) for view in self._views)
        self._images = _tensor(source.images).permute(0, 3, 1, 2).to(device)
        self._tables = [torch.from_numpy(table(view, height, width)).to(device) for view in self._views]
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._keys = [torch.empty(0)] * 2
        self._side_stream = SideStream(device, ahead=config.data.prefetch + 1)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[NDArray[np.int64], list[Future[Views]]]] = deque()

    def _made_by(self) -> str:
        return f"kernels on {self.device.type}"

    def _make(self) -> Batch:
        if self.device.type == "cpu":
            while len(self._ahead) <= self.config.data.prefetch:
                self._ahead.append(self._begin_on_threads(self._step + len(self._ahead)))
            index, work = self._ahead.popleft()
            view1, view2 = joined(work)
        else:
            index = self.planner.index(self._step)
            view1, view2 = self._side_stream(lambda: self._both(*self._place(self._step)))
        return self._batch((view1, view2), index)

    def _place(self, step: int) -> tuple[Tensor, list[Tensor]]:
        """The numbers of a step's images on the device, and the keys of the two views' draws."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            keys = [stream_key(self.config.seed, epoch, view) for view in range(2)]
            self._order = self._to_device(torch.from_numpy(self.planner.order(epoch)))
            self._keys = list(self._to_device(torch.tensor(keys)).unbind())
            self._epoch = epoch
        return self._order[at * self.batch_size : (at + 1) * self.batch_size], self._keys

    def _to_device(self, numbers: Tensor) -> Tensor:
        return numbers if self.device.type == "cpu" else numbers.pin_memory().to(self.device, non_blocking=True)

    def _both(self, index: Tensor, keys: list[Tensor]) -> Views:
        first, second = (
            self._view(index, *each) for each in zip(keys, self._tables, self._names, self._views, strict=True)
        )
        return first, second

    def _view(self, index: Tensor, key: Tensor, table: Tensor, names: tuple[str, ...], view: ViewConfig) -> Tensor:
        drawn = sample_params(index, key, table, blur_kernel=view.blur_kernel)
        crops = resized_crop(self._images, drawn.crop, view.size, index=index, interpolation=view.interpolation)
        return finish(crops, {name: getattr(drawn, name) for name in names}, view)

    def _begin_on_threads(self, step: int) -> tuple[NDArray[np.int64], list[Future[Views]]]:
        threads = thread_count(self.config.data.threads)
        if self._pool is None:
            self._pool = single_core_threads(threads, "byol-fast-views")
        index, keys = self._place(step)
        pieces = parts(self.batch_size, self._views[0].size, threads)
        return index.numpy(), [self._pool.submit(self._both, index[rows], keys) for rows in pieces]

    def _restart(self) -> None:
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def table(view: ViewConfig, height: int, width: int) -> NDArray[np.float64]:
    """Table of a view and its images for `byol_kernels.sample_params`; columns: its `TABLE_COLUMNS`."""
    lowest, spread = factor_ranges(view)
    (area, largest), (sigma, widest) = view.area, view.blur_sigma
    low, high = (math.log(aspect) for aspect in view.aspect)
    coins = view.flip, view.jitter, view.grayscale, view.blur, view.solarize
    size = height, width, math.sqrt(height * width), *centred_crop(height, width, view.aspect)
    ranges = area, largest - area, low, high - low, sigma, widest - sigma
    return np.array([*ranges, *lowest, *spread, *coins, *size], np.float64)


def _tensor(images: NDArray[np.uint8]) -> Tensor:
    """Without a copy, unless torch would warn of memory that may not be written."""
    return torch.from_numpy(images if images.flags.writeable else images.copy())
