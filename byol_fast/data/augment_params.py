"""What is drawn for a view: every random number of the augmentation, outside of whoever applies it.

A draw is a function of `(seed, epoch, image, view)` and of nothing else. Threads, batch size, shards, the loader
and a restart therefore cannot change it, and any two loaders make the same views up to the arithmetic of their
operators. The generator is counter-based: SplitMix64's finalizer over the hashed key
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byol_fast.config import ViewConfig

ATTEMPTS = 10
"""Crops that are tried before the centre of the image is taken, as torchvision's RandomResizedCrop does."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Numbers of the jitter's parts in `ViewDraws.order`."""

_SHUFFLE, _SUBSTITUTE = 0xFFFF, 0xFFFE
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class ViewDraws:
    """One view's augmentation parameters of B images.

    Every number is drawn whether its coin says so or not: changing one probability leaves all else as it was.
    """

    crop: NDArray[np.float64]
    """Candidates of the crop `[B, 2 * ATTEMPTS + 2]`: widths, then heights (both in units of the square root of
    the image's area), then the position from the top and from the left as a share of the room there is."""
    flip: NDArray[np.bool_]
    """Mirror left and right `[B]`."""
    jitter: NDArray[np.bool_]
    """Apply the colour jitter `[B]`."""
    factors: NDArray[np.float32]
    """Brightness, contrast and saturation factors, and hue shift in turns `[B, 4]`."""
    order: NDArray[np.int32]
    """Which of BRIGHTNESS, CONTRAST, SATURATION, HUE comes first, second, ... `[B, 4]`."""
    grayscale: NDArray[np.bool_]
    """Drop the colour `[B]`."""
    blur: NDArray[np.bool_]
    """Blur `[B]`."""
    sigma: NDArray[np.float32]
    """Standard deviation of the blur in pixels `[B]`."""
    window: NDArray[np.int32]
    """Width of the blur's window in pixels, odd `[B]`; see `blur_window`."""
    solarize: NDArray[np.bool_]
    """Invert the values at or above the threshold `[B]`."""


def draw(config: ViewConfig, index: NDArray[np.int64], *, seed: int, epoch: int, view: int) -> ViewDraws:
    """Draw one view's parameters.

    Args:
        config: ranges and probabilities.
        index: position of each image in its source, `[B]`.
        seed: seed of the run, 0 or more.
        epoch: pass over the data, from 0.
        view: 0 or 1.
    """
    u = _uniform(_key(seed, epoch, view, index), 2 * ATTEMPTS + 16)
    area, log_aspect, at, rest = np.split(u, [ATTEMPTS, 2 * ATTEMPTS, 2 * ATTEMPTS + 2], axis=1)
    area = _between(area, *config.area)
    aspect = _exp(_between(log_aspect, math.log(config.aspect[0]), math.log(config.aspect[1])))
    sigma = _between(rest[:, 12], *config.blur_sigma).astype(np.float32)
    lowest, spread = factor_ranges(config)
    return ViewDraws(
        crop=np.concatenate([np.sqrt(area * aspect), np.sqrt(area / aspect), at], axis=1),
        flip=rest[:, 0] < config.flip,
        jitter=rest[:, 1] < config.jitter,
        factors=(lowest + rest[:, 2:6] * spread).astype(np.float32),
        order=np.argsort(rest[:, 6:10], axis=1, kind="stable").astype(np.int32),
        grayscale=rest[:, 10] < config.grayscale,
        blur=rest[:, 11] < config.blur,
        sigma=sigma,
        window=blur_window(sigma, config.blur_kernel),
        solarize=rest[:, 13] < config.solarize,
    )


def factor_ranges(config: ViewConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest factors of brightness, contrast, saturation and hue, and how far the largest are from them, `[4]`."""
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    lowest = np.maximum(middle - spread, [0.0, 0.0, 0.0, -math.inf])
    return lowest, middle + spread - lowest


def blur_window(sigma: NDArray[np.float32], kernel: int) -> NDArray[np.int32]:
    """Width of the blur's window: three standard deviations to each side, or `kernel` where that is less.

    What a wider kernel adds lies beyond three sigma (0.3 % of the weight): at most one level of 255, for up to
    four times the time.

    Args:
        sigma: standard deviations in pixels `[B]`.
        kernel: the configured width, odd; 0 means no limit.
    """
    window = 2 * np.ceil(3 * sigma).astype(np.int32) + 1
    return np.minimum(window, kernel, dtype=np.int32) if kernel else window


def crop_windows(crop: NDArray[np.float64], height: int, width: int, aspect: tuple[float, float]) -> NDArray[np.int32]:
    """The crops of images of one size: torchvision's RandomResizedCrop.

    Takes the first candidate that fits into the image; where none does, the largest centred crop whose aspect
    ratio is allowed.

    Args:
        crop: rows of `ViewDraws.crop`, `[B, 2 * ATTEMPTS + 2]`.
        height: of the images in pixels.
        width: of the images in pixels.
        aspect: smallest and largest width / height.

    Returns:
        Top, left, height and width in pixels, `[B, 4]`.
    """
    candidates = np.maximum(np.floor(math.sqrt(height * width) * crop[:, : 2 * ATTEMPTS] + 0.5), 1)
    widths, heights = candidates[:, :ATTEMPTS], candidates[:, ATTEMPTS:]
    fits = (widths <= width) & (heights <= height)
    rows, first = np.arange(len(crop)), fits.argmax(axis=1)
    found = fits[rows, first]
    else_h, else_w = centred_crop(height, width, aspect)
    h = np.where(found, heights[rows, first], else_h)
    w = np.where(found, widths[rows, first], else_w)
    top = np.where(found, np.floor(crop[:, -2] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(crop[:, -1] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def crop_window(
    crop: NDArray[np.float64], height: int, width: int, aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """`crop_windows` of one image, in a fraction of the time.

    Args:
        crop: a row of `ViewDraws.crop`, `[2 * ATTEMPTS + 2]`.
        height: of the image in pixels.
        width: of the image in pixels.
        aspect: smallest and largest width / height.
    """
    root, numbers = math.sqrt(height * width), crop.tolist()
    for k in range(ATTEMPTS):
        w = max(1, math.floor(root * numbers[k] + 0.5))
        h = max(1, math.floor(root * numbers[ATTEMPTS + k] + 0.5))
        if w <= width and h <= height:
            return math.floor(numbers[-2] * (height - h + 1)), math.floor(numbers[-1] * (width - w + 1)), h, w
    h, w = centred_crop(height, width, aspect)
    return (height - h) // 2, (width - w) // 2, h, w


def centred_crop(height: int, width: int, aspect: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest crop whose aspect ratio is allowed."""
    return (
        max(1, min(height, math.floor(width / aspect[0] + 0.5))),
        max(1, min(width, math.floor(height * aspect[1] + 0.5))),
    )


def permutation(n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits n images: a shuffle of all of them, new each epoch."""
    return np.argsort(_mix(_key(seed, epoch, _SHUFFLE, np.arange(n))), kind="stable").astype(np.int64)


def substitutes(n: int, *, seed: int, epoch: int, place: int) -> Iterator[int]:
    """The images, of n, that may take a place in an epoch's order when its own cannot be read; the first good one."""
    key = _key(seed, epoch, _SUBSTITUTE, np.array([place]))
    for k in itertools.count(1):
        yield int(_mix(key + np.array([k], np.uint64) * _GAMMA)[0] % np.uint64(n))


def stream_key(seed: int, epoch: int, view: int) -> int:
    """What the draws of a view in an epoch are hashed from, with the number of the image: 64 bits, as an int64."""
    return int(_stream(seed, epoch, view).view(np.int64)[0])


def _between(u: NDArray[np.float64], lo: float, hi: float) -> NDArray[np.float64]:
    return lo + u * (hi - lo)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream(seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix((key ^ np.uint64(part)) + _GAMMA)
    return key


def _key(seed: int, epoch: int, purpose: int, index: NDArray[np.int64]) -> NDArray[np.uint64]:
    return _mix((_stream(seed, epoch, purpose) ^ index.astype(np.uint64)) + _GAMMA)


def _uniform(key: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), `[len(key), count]`."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return (_mix(key[:, None] + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """By sums and products alone, each of which IEEE 754 defines exactly: a GPU draws the same numbers bit for bit."""
    x = x * 0.0625
    y = np.full_like(x, 1.0 / math.factorial(13))
    for k in reversed(range(13)):
        y = y * x + 1.0 / math.factorial(k)
    for _ in range(4):
        y = y * y
    return y
