"""Parameters of the photometric operator per image."""

from typing import NamedTuple

from torch import Tensor

ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Numbers of the jitter's adjustments in `order`, and their columns in `factors`."""


class PhotometricParams(NamedTuple):
    """Masks and values of B images, as `photometric` takes them; None where an operation is left out."""

    flip: Tensor | None = None
    jitter: Tensor | None = None
    factors: Tensor | None = None
    order: Tensor | None = None
    grayscale: Tensor | None = None
    blur: Tensor | None = None
    sigma: Tensor | None = None
    kernel_size: Tensor | None = None
    solarize: Tensor | None = None
