"""Parameters of the photometric operator per image."""

from typing import NamedTuple

import torch
from torch import Tensor

ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Numbers of the jitter's adjustments in `order`, and their columns in `factors`."""


VALUES = {
    "jitter": {"factors": ((torch.float32,), 4), "order": ((torch.int32, torch.int64), 4)},
    "blur": {"sigma": ((torch.float32,), 0), "kernel_size": ((torch.int32, torch.int64), 0)},
}
"""Operations with more than a mask: dtypes of their values by name, and columns, 0 for one value per image."""


class PhotometricParams(NamedTuple):
    """Masks and values of B images in the order of the operations; None where an operation is left out."""

    flip: Tensor | None
    jitter: Tensor | None
    factors: Tensor | None
    order: Tensor | None
    grayscale: Tensor | None
    blur: Tensor | None
    sigma: Tensor | None
    kernel_size: Tensor | None
    solarize: Tensor | None
