"""Augmentation after the crop, by the photometric operator, on the device of the crops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams
from byol_kernels import photometric
from byol_kernels.photometric.params import ADJUSTMENTS, VALUES

PIXELS_PER_CHUNK = 1 << 20
"""Pixels of all views that a thread takes at a time: enough that calling the operators costs little beside them."""


def apply_photometric(
    crops: Tensor, params: Mapping[str, Tensor], view: ViewConfig, *, out: Tensor | None = None
) -> Tensor:
    """Flip, jitter, grayscale, blur and solarize the crops of a view.

    Args:
        crops: uint8 `[B, 3, S, S]`.
        params: arguments of `byol_kernels.photometric` by name; those of `required_params`, empty for none.
        view: configuration of the view.
        out: destination, uint8 `[B, 3, S, S]`, channels_last, not overlapping the crops; None allocates it.

    Returns:
        `out`, or uint8 `[B, 3, S, S]`; the crops themselves if there are neither `params` nor `out`.
    """
    if not params:
        return crops if out is None else out.copy_(crops)
    options: dict[str, Any] = {**params, "solarize_threshold": view.solarize_threshold}
    return photometric(crops, **options, out=out)


def required_params(view: ViewConfig, *, flip: bool = True) -> tuple[str, ...]:
    """Names of the parameters that `apply_photometric` needs for a view, without those that never change a pixel.

    Args:
        view: configuration of the view.
        flip: the crops are not mirrored yet.
    """
    masks = [mask for mask, probability in PROBABILITIES.items() if getattr(view, probability) > 0]
    if "jitter" in masks and not any(getattr(view, name) for name in ADJUSTMENTS):
        masks.remove("jitter")
    if "flip" in masks and not flip:
        masks.remove("flip")
    return tuple(name for mask in masks for name in (mask, *VALUES.get(mask, ())))


def select_rows(params: AugmentParams, names: tuple[str, ...], rows: slice) -> dict[str, Tensor]:
    """Some parameters of some images, as tensors on the CPU."""
    return {name: torch.from_numpy(getattr(params, name)[rows]) for name in names}


def row_chunks(batch_size: int, sizes: Iterable[int], num_threads: int) -> Iterator[slice]:
    """Rows of a batch in the chunks that threads take, of about `PIXELS_PER_CHUNK` in views of some `sizes`."""
    pixels = sum(size**2 for size in sizes)
    rows = max(1, min(PIXELS_PER_CHUNK // pixels, -(-batch_size // num_threads)))
    return (slice(start, min(start + rows, batch_size)) for start in range(0, batch_size, rows))
