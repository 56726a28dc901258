"""Views of images that are kept on the device as one tensor: for arrays, such as CIFAR's, on a GPU with room for them.

For a batch the host only launches a handful of kernels. Its images are a slice of the epoch's order, which is
copied to the device once an epoch; augmentation parameters are sampled on the device, bit for bit the numbers of all
other loaders (see `byol_kernels/augment_params/`).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byol_fast.config import Config, ViewConfig
from byol_fast.data.augment import apply_photometric, required_params
from byol_fast.data.augment_params import params_table
from byol_fast.data.batch import Batch, Views, empty_views
from byol_fast.data.loaders.base import DeterministicLoader
from byol_fast.data.random_numbers import stream_key
from byol_fast.data.sources import ArraySource, ImageSource
from byol_kernels import resized_crop, sample_view_params


class DeviceCacheLoader(DeterministicLoader):
    """Views of a data set that is kept on the device.

    Batches are raw: uint8, `[B, 3, S, S]`, channels_last, on `device`. On a CPU threads prepare them ahead of the step.

    Args:
        source: an `ArraySource`.
        config: see `DeterministicLoader`.
        view_configs: see `DeterministicLoader`.
        options: see `DeterministicLoader`.
    """

    def __init__(
        self, source: ImageSource, config: Config, view_configs: tuple[ViewConfig, ...], **options: Any
    ) -> None:
        super().__init__(source, config, view_configs, **options)
        assert isinstance(source, ArraySource)
        self.name = f"device_cache {self.device}"
        height, width = source.images.shape[1:3]
        self._names = tuple(required_params(view) for view in view_configs)
        self._images = _as_tensor(source.images).permute(0, 3, 1, 2).to(self.device)
        self._tables = [torch.from_numpy(params_table(view, height, width)).to(self.device) for view in view_configs]
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._keys: tuple[Tensor, ...] = ()
        self._ahead: deque[tuple[NDArray[np.int64], Views, list[Future[None]]]] = deque()

    def _backend_version(self) -> str:
        return f"kernels on {self.device.type}"

    def _load_batch(self) -> Batch:
        if self.device.type != "cpu":
            views = self._augment_stream(lambda: self._compute(*self._index_and_keys(self._batch_number)))
            return self._batch(views, self.sampler.index(self._batch_number))
        while len(self._ahead) <= self.config.data.prefetch:
            self._ahead.append(self._start(self._batch_number + len(self._ahead)))
        index, views, chunks = self._ahead.popleft()
        for chunk in chunks:
            chunk.result()
        return self._batch(views, index)

    def _start(self, batch_number: int) -> tuple[NDArray[np.int64], Views, list[Future[None]]]:
        """Let threads compute a batch."""
        index, keys = self._index_and_keys(batch_number)
        views = self._empty_views()
        return index.numpy(), views, self._on_threads(partial(self._fill, views, index, keys))

    def _compute(self, index: Tensor, keys: tuple[Tensor, ...]) -> Views:
        """Launch the kernels of a batch of images `index`."""
        views = self._empty_views()
        self._fill(views, index, keys, slice(None))
        return views

    def _empty_views(self) -> Views:
        return empty_views(self.sizes, self.batch_size, device=self.device)

    def _index_and_keys(self, batch_number: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Numbers of a batch's images, and the keys of its views' parameters, on the device."""
        epoch, batch = divmod(batch_number, self.batches_per_epoch)
        if epoch != self._epoch:
            keys = [stream_key(self.config.seed, epoch, view) for view in range(len(self.view_configs))]
            self._order = self._to_device(torch.from_numpy(self.sampler.order(epoch)))
            self._keys = self._to_device(torch.tensor(keys)).unbind()
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size], self._keys

    def _to_device(self, numbers: Tensor) -> Tensor:
        return numbers if self.device.type == "cpu" else numbers.pin_memory().to(self.device, non_blocking=True)

    def _fill(self, views: Views, index: Tensor, keys: tuple[Tensor, ...], rows: slice) -> None:
        """Write some rows of a batch of images `index` into its views."""
        for out, key, table, names, view in zip(views, keys, self._tables, self._names, self.view_configs, strict=True):
            params = sample_view_params(index[rows], key, table, blur_kernel=view.blur_kernel)
            crops = resized_crop(
                self._images, params.crop_box, view.size, index=index[rows], interpolation=view.interpolation
            )
            apply_photometric(crops, {name: getattr(params, name) for name in names}, view, out=out[rows])

    def _restart(self) -> None:
        super()._restart()
        self._ahead.clear()


def _as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """The array as a tensor: without a copy, unless torch would warn that the memory is read-only."""
    return torch.from_numpy(images if images.flags.writeable else images.copy())
