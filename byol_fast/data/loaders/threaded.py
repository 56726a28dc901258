"""Views of images on CPU threads: torchvision's decoder, then our crop, color and blur operators.

Augmentation parameters are those of all other loaders (see `byol_fast.data.augment_params`); pixels differ by the
rounding of decoder and crop. Decoders and operators release the interpreter's lock, so threads share the work and
nothing needs to be copied between processes.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from byol_fast.config import Config, ViewConfig
from byol_fast.data.augment import apply_photometric, required_params, select_rows
from byol_fast.data.augment_params import crop_box, crop_boxes
from byol_fast.data.batch import Batch, Views, empty_views
from byol_fast.data.errors import CorruptImageError
from byol_fast.data.loaders.base import DeterministicLoader
from byol_fast.data.sampler import BatchSpec
from byol_fast.data.sources import ArraySource, ImageSource
from byol_kernels import resized_crop

Unreadable = list[tuple[int, str]]  # positions of images that cannot be read, and why


class _PendingBatch:
    """A batch whose rows threads are filling."""

    def __init__(self, spec: BatchSpec, views: Views, chunks: list[Future[Unreadable]]) -> None:
        self.spec, self.views, self.chunks = spec, views, chunks

    def unreadable(self) -> Unreadable:
        """Wait for all rows; positions of the images that cannot be read, and why."""
        return [image for chunk in self.chunks for image in chunk.result()]


class ThreadedLoader(DeterministicLoader):
    """Views whose crops are made by CPU threads, and augmented there or, if the batches go to a GPU, on the GPU.

    Batches are raw: uint8, `[B, 3, S, S]`, channels_last, on `device`.

    Args:
        source: the images.
        config: see `DeterministicLoader`.
        view_configs: see `DeterministicLoader`.
        options: see `DeterministicLoader`.
    """

    def __init__(
        self, source: ImageSource, config: Config, view_configs: tuple[ViewConfig, ...], **options: Any
    ) -> None:
        super().__init__(source, config, view_configs, **options)
        self.name = "threaded, kernels"
        self._names = tuple(required_params(view) for view in view_configs)
        self._on_gpu = self.device.type == "cuda"
        self._ahead: deque[_PendingBatch] = deque()

    def _backend_version(self) -> str:
        return f"torchvision {torchvision.__version__}, kernels"

    def _load_batch(self) -> Batch:
        while len(self._ahead) <= self.config.data.prefetch:
            self._ahead.append(self._start(self._batch_number + len(self._ahead)))
        pending = self._ahead[0]
        while unreadable := pending.unreadable():
            try:
                self.corrupt.add(unreadable, self._batch_number)
            except CorruptImageError:
                self._restart()  # so that the next call tries again
                raise
            self._replace_images(pending, self.sampler(self._batch_number))
        self._ahead.popleft()
        views = self._augment_stream(partial(self._augment_on_gpu, pending)) if self._on_gpu else pending.views
        return self._batch(views, pending.spec.index)

    def _start(self, batch_number: int) -> _PendingBatch:
        """Let threads fill a batch."""
        cpu = torch.device("cpu")
        views = empty_views(self.sizes, self.batch_size, device=cpu, pin_memory=self._on_gpu)
        spec = self.sampler(batch_number)
        return _PendingBatch(spec, views, self._on_threads(partial(self._fill, views, spec)))

    def _replace_images(self, pending: _PendingBatch, spec: BatchSpec) -> None:
        """Fill the rows again that have another image in `spec`."""
        assert self._pool is not None
        changed = np.flatnonzero(spec.index != pending.spec.index).tolist()
        fill = partial(self._fill, pending.views, spec)
        pending.chunks = [self._pool.submit(fill, slice(row, row + 1)) for row in changed]
        pending.spec = spec

    def _fill(self, views: Views, spec: BatchSpec, rows: slice) -> Unreadable:
        """Write some rows of a batch into its views: crops, augmented unless that is done on a GPU."""
        # Crops that are not augmented here go straight into the batch.
        in_place = [self._on_gpu or not names for names in self._names]
        outs = [view[rows] for view in views]
        crops = [out if final else torch.empty_like(out) for out, final in zip(outs, in_place, strict=True)]
        unreadable: Unreadable = []
        if isinstance(self.source, ArraySource):
            self._crop_arrays(self.source, crops, spec, rows)
        else:
            unreadable = self._crop_files(crops, spec, rows)
        for k, final in enumerate(in_place):
            if not final:
                params = select_rows(spec.params[k], self._names[k], rows)
                apply_photometric(crops[k], params, self.view_configs[k], out=outs[k])
        return unreadable

    def _crop_arrays(self, source: ArraySource, crops: list[Tensor], spec: BatchSpec, rows: slice) -> None:
        images = torch.from_numpy(source.images[spec.index[rows]]).permute(0, 3, 1, 2)
        for crop, params, view in zip(crops, spec.params, self.view_configs, strict=True):
            boxes = crop_boxes(params.crop_candidates[rows], images.shape[2], images.shape[3], view.ratio)
            crop[:] = resized_crop(images, torch.from_numpy(boxes), view.size, interpolation=view.interpolation)

    def _crop_files(self, crops: list[Tensor], spec: BatchSpec, rows: slice) -> Unreadable:
        """Decode each image once and crop all views from it; positions of those that cannot be read."""
        unreadable: Unreadable = []
        for k, row in enumerate(range(rows.start, rows.stop)):
            try:
                image = self.source.load_tensor(int(spec.index[row]))
            except CorruptImageError as error:
                unreadable.append((int(spec.index[row]), error.reason))
                continue
            for crop, params, view in zip(crops, spec.params, self.view_configs, strict=True):
                box = torch.tensor([crop_box(params.crop_candidates[row], image.shape[2], image.shape[3], view.ratio)])
                crop[k] = resized_crop(image, box, view.size, interpolation=view.interpolation)[0]
        return unreadable

    def _augment_on_gpu(self, pending: _PendingBatch) -> Views:
        """Copy the crops to the GPU and launch the rest of the augmentation there."""
        views, crops = (empty_views(self.sizes, self.batch_size, device=self.device) for _ in range(2))
        for k, names in enumerate(self._names):
            if names:
                crops[k].copy_(pending.views[k], non_blocking=True)
                params = select_rows(pending.spec.params[k], names, slice(None))
                apply_photometric(crops[k], params, self.view_configs[k], out=views[k])
            else:
                views[k].copy_(pending.views[k], non_blocking=True)
        return views

    def _restart(self) -> None:
        super()._restart()
        self._ahead.clear()
