"""Augmentation parameters: every random number of a view, sampled apart from the operators that use it.

They are a function of `(seed, epoch, image, view)` and of nothing else. Threads, batch size, shards, the loader and a
restart therefore cannot change them, and any two loaders return the same views up to the arithmetic of their
operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byol_fast.config import ViewConfig
from byol_fast.data.random_numbers import item_keys, uniform
from byol_kernels.augment_params.params import ATTEMPTS, NUM_RANDOM, TABLE_COLUMNS
from byol_kernels.photometric.params import ADJUSTMENTS

PROBABILITIES = {
    "flip": "hflip_p",
    "jitter": "color_jitter_p",
    "grayscale": "grayscale_p",
    "blur": "blur_p",
    "solarize": "solarize_p",
}
"""The operations after the crop in their order, by the names of their masks, each with its probability in
`ViewConfig`."""


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """Augmentation parameters of one view of B images.

    Values are sampled whether or not the mask selects the image: changing one probability changes nothing else.
    """

    crop_candidates: NDArray[np.float64]
    """Candidates `[B, 2 * ATTEMPTS + 2]`: widths, then heights (in units of the square root of the image's area),
    then the offset from the top and from the left as a fraction of the possible offsets."""
    flip: NDArray[np.bool_]
    """Images to mirror left and right `[B]`."""
    jitter: NDArray[np.bool_]
    """Images with color jitter `[B]`."""
    factors: NDArray[np.float32]
    """Brightness, contrast and saturation factors, and hue shift in turns `[B, 4]`."""
    order: NDArray[np.int32]
    """Order of the adjustments, by their positions in `ADJUSTMENTS` `[B, 4]`."""
    grayscale: NDArray[np.bool_]
    """Images to convert to gray `[B]`."""
    blur: NDArray[np.bool_]
    """Images to blur `[B]`."""
    sigma: NDArray[np.float32]
    """Standard deviation of the blur in pixels `[B]`."""
    kernel_size: NDArray[np.int32]
    """Width of the blur kernel in pixels, odd `[B]`; see `blur_kernel_size`."""
    solarize: NDArray[np.bool_]
    """Images whose values at or above the threshold are inverted `[B]`."""


def sample_augment_params(
    config: ViewConfig, index: NDArray[np.int64], *, seed: int, epoch: int, view: int
) -> AugmentParams:
    """Sample the augmentation parameters of one view.

    Args:
        config: ranges and probabilities.
        index: position of each image in its source, `[B]`.
        seed: seed of the run, 0 or more.
        epoch: pass over the data, from 0.
        view: number of the view, from 0.
    """
    u = uniform(item_keys(seed, epoch, view, index), NUM_RANDOM)
    area, log_ratio, offset, rest = np.split(u, [ATTEMPTS, 2 * ATTEMPTS, 2 * ATTEMPTS + 2], axis=1)
    area = _between(area, *config.scale)
    ratio = _exp(_between(log_ratio, math.log(config.ratio[0]), math.log(config.ratio[1])))
    sigma = _between(rest[:, 12], *config.blur_sigma).astype(np.float32)
    lowest, spread = factor_ranges(config)
    return AugmentParams(
        crop_candidates=np.concatenate([np.sqrt(area * ratio), np.sqrt(area / ratio), offset], axis=1),
        flip=rest[:, 0] < config.hflip_p,
        jitter=rest[:, 1] < config.color_jitter_p,
        factors=(lowest + rest[:, 2:6] * spread).astype(np.float32),
        order=np.argsort(rest[:, 6:10], axis=1, kind="stable").astype(np.int32),
        grayscale=rest[:, 10] < config.grayscale_p,
        blur=rest[:, 11] < config.blur_p,
        sigma=sigma,
        kernel_size=blur_kernel_size(sigma, config.blur_kernel),
        solarize=rest[:, 13] < config.solarize_p,
    )


def factor_ranges(config: ViewConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower ends and widths of the ranges of the `ADJUSTMENTS`, `[4]` each."""
    spread = np.array([getattr(config, name) for name in ADJUSTMENTS])
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    lowest = np.maximum(middle - spread, [0.0, 0.0, 0.0, -math.inf])
    return lowest, middle + spread - lowest


def blur_kernel_size(sigma: NDArray[np.float32], kernel: int) -> NDArray[np.int32]:
    """Width of the blur kernel: three standard deviations to each side, at most `kernel`.

    Weights beyond three sigma (0.3 % of the sum) change a pixel by at most one level of 255, for up to four times the
    time.

    Args:
        sigma: standard deviations in pixels `[B]`.
        kernel: the configured width, odd; 0 means no limit.
    """
    size = 2 * np.ceil(3 * sigma).astype(np.int32) + 1
    return np.minimum(size, kernel, dtype=np.int32) if kernel else size


def crop_boxes(
    candidates: NDArray[np.float64], height: int, width: int, ratio: tuple[float, float]
) -> NDArray[np.int32]:
    """Crops of images of one size, by the rule of torchvision's RandomResizedCrop.

    The first candidate that fits into the image; if none does, the largest center crop with an allowed aspect ratio.

    Args:
        candidates: rows of `AugmentParams.crop_candidates`, `[B, 2 * ATTEMPTS + 2]`.
        height: of the images in pixels.
        width: of the images in pixels.
        ratio: smallest and largest aspect ratio (width / height).

    Returns:
        Top, left, height and width in pixels, `[B, 4]`.
    """
    sides = np.maximum(np.floor(math.sqrt(height * width) * candidates[:, : 2 * ATTEMPTS] + 0.5), 1)
    widths, heights = sides[:, :ATTEMPTS], sides[:, ATTEMPTS:]
    fits = (widths <= width) & (heights <= height)
    rows, first = np.arange(len(candidates)), fits.argmax(axis=1)
    fits_any = fits[rows, first]
    center_h, center_w = center_crop_size(height, width, ratio)
    h = np.where(fits_any, heights[rows, first], center_h)
    w = np.where(fits_any, widths[rows, first], center_w)
    top = np.where(fits_any, np.floor(candidates[:, -2] * (height - h + 1)), (height - h) // 2)
    left = np.where(fits_any, np.floor(candidates[:, -1] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def crop_box(
    candidates: NDArray[np.float64], height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """`crop_boxes` for one image, in a fraction of the time.

    Args:
        candidates: a row of `AugmentParams.crop_candidates`, `[2 * ATTEMPTS + 2]`.
        height: of the image in pixels.
        width: of the image in pixels.
        ratio: smallest and largest aspect ratio (width / height).
    """
    root, values = math.sqrt(height * width), candidates.tolist()
    for k in range(ATTEMPTS):
        w = max(1, math.floor(root * values[k] + 0.5))
        h = max(1, math.floor(root * values[ATTEMPTS + k] + 0.5))
        if w <= width and h <= height:
            return math.floor(values[-2] * (height - h + 1)), math.floor(values[-1] * (width - w + 1)), h, w
    h, w = center_crop_size(height, width, ratio)
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop_size(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest crop with an allowed aspect ratio."""
    return (
        max(1, min(height, math.floor(width / ratio[0] + 0.5))),
        max(1, min(width, math.floor(height * ratio[1] + 0.5))),
    )


def params_table(config: ViewConfig, height: int, width: int) -> NDArray[np.float64]:
    """Argument `table` of `byol_kernels.sample_view_params` for images of one size."""
    low, high = (math.log(ratio) for ratio in config.ratio)
    ranges = {"scale": config.scale, "log_ratio": (low, high), "sigma": config.blur_sigma}
    values = {f"{name}_min": low for name, (low, _) in ranges.items()}
    values |= {f"{name}_range": high - low for name, (low, high) in ranges.items()}
    for name, lowest, spread in zip(ADJUSTMENTS, *factor_ranges(config), strict=True):
        values |= {f"{name}_min": lowest, f"{name}_range": spread}
    values |= {name: getattr(config, name) for name in PROBABILITIES.values()}
    values |= {"height": height, "width": width, "sqrt_area": math.sqrt(height * width)}
    values["center_height"], values["center_width"] = center_crop_size(height, width, config.ratio)
    return np.array([values[name] for name in TABLE_COLUMNS], np.float64)


def _between(u: NDArray[np.float64], lo: float, hi: float) -> NDArray[np.float64]:
    return lo + u * (hi - lo)


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential by sums and products only, which IEEE 754 defines exactly: a GPU returns the same bits."""
    x = x * 0.0625
    y = np.full_like(x, 1.0 / math.factorial(13))
    for k in reversed(range(13)):
        y = y * x + 1.0 / math.factorial(k)
    for _ in range(4):
        y = y * y
    return y
