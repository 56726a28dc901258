"""Configuration of a view: its size, its crop and its augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from byol_fast.config.fields import ImageSize, Interpolation, Probability, Range, check_fields, require

CropArea = Annotated[float, Range(1e-6, 1)]
CropRatio = Annotated[float, Range(0.01, 100)]
JitterRange = Annotated[float, Range(0, 10)]
BlurSigma = Annotated[float, Range(1e-3, 80)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Augmentation of one view; the defaults are view 1 of the paper (appendix B)."""

    size: ImageSize = 224
    """Height and width of the view in pixels."""
    scale: tuple[CropArea, CropArea] = (0.08, 1.0)
    """Area of the random crop as a fraction of the image's, smallest and largest."""
    ratio: tuple[CropRatio, CropRatio] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, smallest and largest; its logarithm is uniform."""
    interpolation: Interpolation = "bicubic"
    """Filter that resizes the crop (always antialiased)."""
    hflip_p: Probability = 0.5
    """Probability of a horizontal flip."""
    color_jitter_p: Probability = 0.8
    """Probability of the color jitter; its four adjustments are applied in random order."""
    brightness: JitterRange = 0.4
    """The brightness factor is uniform on 1 - brightness .. 1 + brightness."""
    contrast: JitterRange = 0.4
    """The contrast factor (about the mean of the gray image) is uniform on 1 - contrast .. 1 + contrast."""
    saturation: JitterRange = 0.2
    """The saturation factor is uniform on 1 - saturation .. 1 + saturation."""
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    """The hue shift is uniform on -hue .. hue, in turns (0.5 is the opposite color)."""
    grayscale_p: Probability = 0.2
    """Probability of the conversion to gray."""
    blur_p: Probability = 1.0
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[BlurSigma, BlurSigma] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, smallest and largest."""
    blur_kernel: Annotated[int, Range(0, 501)] = 23
    """Largest width of the blur kernel in pixels, odd (it covers three sigma to each side); 0 for no limit."""
    solarize_p: Probability = 0.0
    """Probability of solarization: values at or above the threshold are inverted."""
    solarize_threshold: Annotated[int, Range(0, 256)] = 128
    """Threshold of the solarization, 0..256."""

    def __post_init__(self) -> None:
        check_fields(self, "config: view.")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            require(low <= high, f"config: view.{name}", "be the smallest and the largest value", (low, high))
        kernel = self.blur_kernel
        require(kernel == 0 or kernel % 2 == 1, "config: view.blur_kernel", "be 0 or odd", kernel)
