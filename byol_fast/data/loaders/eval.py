"""Center crops of images in order, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from byol_fast.data.integrity import CorruptImages
from byol_fast.data.loaders.factory import choose_backend
from byol_fast.data.sources import ArraySource, ImageSource


def eval_batches(
    source: ImageSource,
    size: int,
    batch_size: int,
    *,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    threads: int = 0,
    loader: Literal["auto", "dali", "torchvision", "resident"] = "auto",
    device: torch.device | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a source once, in order, without augmentation, for evaluation.

    The shorter side is resized to 256 / 224 of `size`, unless it is `size` already, and the middle is cut out.

    Args:
        source: the images.
        size: height and width of the result in pixels.
        batch_size: images at a time; the last batch may have fewer.
        interpolation: of the resize, antialiased.
        threads: decoding threads; 0 means one per CPU core that this process may use.
        loader: who decodes, as in `DataConfig.loader`.
        device: where the images are wanted; the CPU when None.
        on_bad: whether an image that cannot be read ends it, or is left out: its position is then not yielded.

    Yields:
        Images, uint8 `[b, 3, size, size]`, channels_last, and their positions in the source, int64 `[b]` on the CPU.

    Raises:
        CorruptImageError: an image cannot be read, and `on_bad` is "raise"; or half of all cannot.
    """
    device = device or torch.device("cpu")
    if isinstance(source, ArraySource) and source.images.shape[1:3] == (size, size):
        for start in range(0, len(source), batch_size):
            images = torch.from_numpy(source.images[start : start + batch_size].copy())
            yield images.permute(0, 3, 1, 2).to(device), torch.arange(start, start + len(images))
        return
    if choose_backend(loader, device) == "dali":
        from byol_fast.data.loaders.dali import eval_batches as made
    else:
        from byol_fast.data.loaders.threaded import eval_batches as made
    bad = CorruptImages(source.sample_name, len(source), on_corrupt=on_bad, max_fraction=0.5, action="evaluated")
    yield from made(source, size, batch_size, interpolation=interpolation, threads=threads, device=device, bad=bad)
