"""The batch that passes from the loaders to training, and the interface of a loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

Views = tuple[Tensor, ...]
"""Augmented views of the same images, each `[B, 3, S, S]` with its own S: two global ones, then the local ones."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Augmented views of the same images.

    Views are *raw* (uint8 in 0..255; the model normalizes and casts) or *ready* (floating point, normalized), logically
    `[B, 3, H, W]` with the channels innermost in memory (`channels_last`). Neighbors of one size are slices of one
    `[V, B, 3, H, W]` buffer: in eager mode a network takes them stacked without a copy (a CUDA graph copies them into
    its inputs, and torch.compile fuses the copy with the normalization).
    """

    views: Views
    """Each `[B, 3, H, W]`: two global views, then the local ones."""
    labels: Tensor | None
    """Class of each image, int64 `[B]` on the CPU; None if the source has no labels."""
    index: Tensor
    """Position of each image in its source, int64 `[B]` on the CPU."""

    @property
    def is_raw(self) -> bool:
        """True if the views are bytes, for the model to normalize."""
        return self.views[0].dtype == torch.uint8


def empty_views(sizes: Iterable[int], batch_size: int, *, device: torch.device, pin_memory: bool = False) -> Views:
    """Uninitialized uint8 views, neighbors of one size as slices of one buffer; see `Batch`.

    Args:
        sizes: height and width of each view's images in pixels.
        batch_size: images of each view.
        device: where to allocate them.
        pin_memory: allocate page-locked memory of the CPU, for copies to a GPU beside other work.

    Returns:
        A tensor `[batch_size, 3, size, size]` for each size, channels_last.
    """
    views: list[Tensor] = []
    for size, run in groupby(sizes):
        shape = (len(list(run)), batch_size, size, size, 3)
        buffer = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pin_memory)
        views += buffer.permute(0, 1, 4, 2, 3).unbind()
    return tuple(views)


def copy_views(views: Views) -> Views:
    """Copies of views, neighbors of one size as slices of one buffer in the views' memory format."""
    copies: list[Tensor] = []
    for _, run in groupby(views, key=lambda view: view.shape):
        equal = list(run)
        copies += torch.split(torch.cat(equal), [len(view) for view in equal])
    return tuple(copies)


class ViewLoader(Protocol):
    """An endless stream of batches, epoch after epoch, that can be saved and resumed.

    Each epoch visits the source in a new order, in `batches_per_epoch` full batches; images that do not fill a batch
    are left out of that epoch. Batch number `n` (from 0) belongs to epoch `n // batches_per_epoch`.
    """

    batch_size: int
    """Images a batch."""
    batches_per_epoch: int
    """Full batches of an epoch; `grad_accum_steps` of them make one optimizer step."""

    @property
    def gpu_wait_seconds(self) -> float:
        """Time in which the host has waited for training steps on the GPU, and not for data: a loader that launches
        work on the GPU must not run ahead of the steps without bound.
        """
        ...

    name: str
    """Name of the loader, for logs: "dali cpu", "dali cuda:0, kernels", "threaded, kernels"."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream, after the last batch that was returned: plain values, bytes and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises:
            ValueError: the state belongs to other data, views, batch size, shards or seed; names the difference.
        """
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...
