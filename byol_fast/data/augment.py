"""The augmentation after the crop, by the photometric operator, on whatever device the crops are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import ViewDraws
from byol_kernels import photometric

Views = tuple[Tensor, Tensor]


PIXELS_PER_TASK = 1 << 19
"""A thread takes so many pixels of a view at a time: enough that calling the operators costs little beside them."""


def finish(crops: Tensor, draws: Mapping[str, Tensor], view: ViewConfig) -> Tensor:
    """All of a view's augmentation after the crop; uint8 in and out, `[B, 3, S, S]`."""
    if not draws:  # on a GPU a copy all the same: what DALI owns is bound to the stream that it was made for
        return crops.clone() if crops.is_cuda else crops
    options: dict[str, Any] = {**draws, "solarize_threshold": view.solarize_threshold}
    return photometric(crops, **options)


def needed(view: ViewConfig, *, flip: bool = True) -> tuple[str, ...]:
    """Names of the draws that `finish` takes for a view; without those that never change a pixel.

    Args:
        view: the view's configuration.
        flip: whether the crops are not mirrored yet.
    """
    names: list[str] = ["flip"] if flip and view.flip > 0 else []
    if view.jitter > 0 and max(view.brightness, view.contrast, view.saturation, view.hue) > 0:
        names += ["jitter", "factors", "order"]
    names += ["grayscale"] if view.grayscale > 0 else []
    names += ["blur", "sigma", "window"] if view.blur > 0 else []
    return (*names, "solarize") if view.solarize > 0 else tuple(names)


def chosen(draws: ViewDraws, names: tuple[str, ...], rows: slice) -> dict[str, Tensor]:
    """Some draws of some rows, as tensors."""
    return {name: torch.from_numpy(getattr(draws, name)[rows]) for name in names}


def parts(batch_size: int, size: int, threads: int) -> Iterator[slice]:
    """The rows of a batch in pieces of the size that a thread takes at a time."""
    rows = max(1, min(PIXELS_PER_TASK // size**2, -(-batch_size // threads)))
    return (slice(start, min(start + rows, batch_size)) for start in range(0, batch_size, rows))


def joined(work: list[Future[Views]]) -> Views:
    """The pieces of a batch in one, once they are made."""
    pieces = [part.result() for part in work]
    first, second = (
        torch.cat([piece[view].permute(0, 2, 3, 1) for piece in pieces]).permute(0, 3, 1, 2) for view in range(2)
    )
    return first, second
