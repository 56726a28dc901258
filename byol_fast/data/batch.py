"""The batch that passes from the loaders to training, and the interface of a loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Augmented views of the same images.

    Views are *raw* (uint8 in 0..255; the model normalizes and casts) or *ready* (floating point, normalized), logically
    `[B, 3, H, W]` with the channels innermost in memory (`channels_last`). Views of one size are slices of one
    `[V, B, 3, H, W]` buffer, so that a network takes them stacked without a copy.
    """

    views: tuple[Tensor, ...]
    """Each `[B, 3, H, W]`."""
    labels: Tensor | None
    """Class of each image, int64 `[B]` on the CPU; None if the source has no labels."""
    index: Tensor
    """Position of each image in its source, int64 `[B]` on the CPU."""

    @property
    def is_raw(self) -> bool:
        """True if the views are bytes, for the model to normalize."""
        return self.views[0].dtype == torch.uint8


class ViewLoader(Protocol):
    """An endless stream of batches, epoch after epoch, that knows where it stands.

    Each epoch visits the source in a new order, in `steps_per_epoch` full batches; what does not fill a batch is
    left out of that epoch. Batch number `n` (from 0) belongs to epoch `n // steps_per_epoch`.
    """

    batch_size: int
    """Images a batch."""
    steps_per_epoch: int
    """Batches an epoch."""
    backend: str
    """Name of the loader, for logs: "dali cpu", "dali cuda:0", "torchvision"."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the batch handed out last: plain values, bytes and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            ValueError: the state belongs to other data, views, batch size, shards or seed; says which differs.
        """
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...
