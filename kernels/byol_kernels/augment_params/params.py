"""Parameters of one view, and the table of ranges and probabilities that they are sampled from."""

from typing import NamedTuple

import torch
from torch import Tensor

from byol_kernels.photometric.params import ADJUSTMENTS

ATTEMPTS = 10
"""Candidates for a crop before the center of the image is taken, as in torchvision's RandomResizedCrop."""

NUM_RANDOM = 2 * ATTEMPTS + 16
"""Random numbers of an image in a view; the docstring of `reference.py` says which is used for what."""

TABLE_COLUMNS = (
    *("scale_min", "scale_range", "log_ratio_min", "log_ratio_range", "sigma_min", "sigma_range"),
    *(f"{name}_min" for name in ADJUSTMENTS),
    *(f"{name}_range" for name in ADJUSTMENTS),
    *("hflip_p", "color_jitter_p", "grayscale_p", "blur_p", "solarize_p"),
    *("height", "width", "sqrt_area", "center_height", "center_width"),
)
"""Smallest values and their distance to the largest; probabilities; size of the images in pixels, the square root of
their area, and the size of the centered crop that is taken where no candidate fits."""


class ViewParams(NamedTuple):
    """Parameters of one view of B images; all but the first are arguments of `photometric`."""

    crop_box: Tensor
    """Top, left, height and width of the crops in pixels, [B, 4] int32: `box` of `resized_crop`."""
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    kernel_size: Tensor
    solarize: Tensor


def empty_params(index: Tensor) -> ViewParams:
    """Uninitialized parameters of the images `index`, [B], on its device."""

    def empty(dtype: torch.dtype, *columns: int) -> Tensor:
        return index.new_empty((index.shape[0], *columns), dtype=dtype)

    return ViewParams(
        crop_box=empty(torch.int32, 4),
        flip=empty(torch.bool),
        jitter=empty(torch.bool),
        factors=empty(torch.float32, 4),
        order=empty(torch.int32, 4),
        grayscale=empty(torch.bool),
        blur=empty(torch.bool),
        sigma=empty(torch.float32),
        kernel_size=empty(torch.int32),
        solarize=empty(torch.bool),
    )
