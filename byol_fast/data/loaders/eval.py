"""Center crops of images in order, for evaluation."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from byol_fast.config import Preprocessing
from byol_fast.config.fields import BatchSize, Loader, OnCorrupt, Threads, check
from byol_fast.data.errors import CorruptImageError
from byol_fast.data.integrity import CorruptImages
from byol_fast.data.loaders.backend import resolve_decoder
from byol_fast.data.loaders.threads import resolve_num_threads
from byol_fast.data.sources import ArraySource, ImageSource

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def eval_batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    threads: int = 0,
    loader: Loader = "auto",
    device: torch.device | None = None,
    on_corrupt: OnCorrupt = "raise",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a source once, in order, without augmentation, for evaluation.

    Args:
        source: the images.
        preprocessing: resize and crop; `mean` and `std` are not applied.
        batch_size: images at a time; the last batch may have fewer.
        threads: decoding threads; 0 means one per CPU core that this process may use.
        loader: the decoder, as in `DataConfig.loader`.
        device: where the images go; None for the CPU.
        on_corrupt: raise an error if an image cannot be read, or skip it: its position is then not yielded.

    Yields:
        Images, uint8 `[b, 3, crop, crop]`, channels_last, and their positions in the source, int64 `[b]` on the CPU.

    Raises:
        CorruptImageError: an image cannot be read, and `on_corrupt` is "raise"; or half of all cannot.
        SourceError: the images may be read by one thread only.
        ConfigError: an argument is out of range.
    """
    check("eval_batches: batch_size", BatchSize, batch_size)
    check("eval_batches: threads", Threads, threads)
    check("eval_batches: loader", Loader, loader)
    check("eval_batches: on_corrupt", OnCorrupt, on_corrupt)
    source.check_thread_safety(resolve_num_threads(threads))
    device = device or torch.device("cpu")
    if isinstance(source, ArraySource) and source.images.shape[1:3] == (preprocessing.crop,) * 2:
        for start in range(0, len(source), batch_size):
            images = torch.from_numpy(source.images[start : start + batch_size].copy())
            yield images.permute(0, 3, 1, 2).to(device), torch.arange(start, start + len(images))
        return
    if resolve_decoder(loader, device) == "dali":
        from byol_fast.data.loaders.dali import center_crops  # an optional package
    else:
        center_crops = _center_crops
    corrupt = CorruptImages(
        source.sample_name, len(source), on_corrupt=on_corrupt, max_fraction=0.5, action="evaluated"
    )
    yield from center_crops(source, preprocessing, batch_size, threads, device, corrupt)


def _center_crops(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    threads: int,
    device: torch.device,
    corrupt: CorruptImages,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Center crops by PIL on threads, one batch ahead; arguments and results as in `eval_batches`."""
    chunks = iter([np.arange(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)])
    pool = ThreadPoolExecutor(resolve_num_threads(threads), "byol-fast-eval")

    def load(i: int) -> NDArray[np.uint8] | str:
        try:
            return center_crop(source.load(i), preprocessing)
        except CorruptImageError as error:
            return error.reason

    def start(index: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Future[NDArray[np.uint8] | str]]]:
        return index, [pool.submit(load, int(i)) for i in index]

    try:
        ahead = deque(start(index) for index in itertools.islice(chunks, 2))
        while ahead:
            index, futures = ahead.popleft()
            ahead.extend(start(index) for index in itertools.islice(chunks, 1))
            results = [future.result() for future in futures]
            corrupt.add([(int(i), row) for i, row in zip(index, results, strict=True) if isinstance(row, str)], 0)
            good = [i for i, row in enumerate(results) if not isinstance(row, str)]
            if good:
                images = torch.from_numpy(np.stack([row for row in results if not isinstance(row, str)]))
                yield images.permute(0, 3, 1, 2).to(device), torch.from_numpy(index[good])
    finally:
        pool.shutdown(cancel_futures=True)


def center_crop(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resized center `[crop, crop, 3]` of an RGB image."""
    shorter, size = min(image.size), preprocessing.crop
    target = size if shorter == size else preprocessing.resize
    w, h = (side * target // shorter for side in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)  # halves to even, as torchvision's center_crop
    x = image.resize((w, h), RESAMPLING[preprocessing.interpolation])
    return np.array(x.crop((left, top, left + size, top + size)))
