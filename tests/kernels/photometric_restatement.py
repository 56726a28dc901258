"""Colour jitter, blur and the rest restated in float64 numpy, textbook formulas and all; and images to try them on.

In the interpreter's session this file puts the kernels in the place of the CPU operators, as `conftest.py` does for the
others.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_kernels.blur import _gaussian_blur_cuda
from byol_kernels.photometric import _photometric_cuda
from tests.kernels.conftest import INTERPRETED

Array = NDArray[np.float64]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.int32)

if INTERPRETED:
    _override = torch.library.Library("byol_kernels", "IMPL")  # type: ignore[no-untyped-call]
    for _name, _launcher in {"photometric": _photometric_cuda, "gaussian_blur": _gaussian_blur_cuda}.items():
        partial(_override.impl, allow_override=True)(_name, _launcher, "CPU")

FLOAT32_LEVELS = 2e-3
"""Error of float32 arithmetic in levels of 255: some hundred roundings of 255 * 2^-25 each."""

FLOAT16_FACTORS = 0.25
"""Error in levels of the blur's products of float16. The intermediate result is rounded by at most 2^-4 level; weights,
by 2^-12 of themselves, in each of two passes, where they weigh differences of up to 255."""


class Draws(NamedTuple):
    """What `photometric` takes, by its names."""

    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    window: Tensor
    solarize: Tensor


def draws(batch: int, seed: int = 0, *, spread: float = 0.4, hue: float = 0.1) -> Draws:
    """Coins of one half each, orders that run through all there are, BYOL's blur."""
    generator = torch.Generator().manual_seed(seed)
    coins = torch.rand(5, batch, generator=generator) < 0.5
    half = torch.tensor([spread, spread, spread, hue])
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]) + half * (2 * torch.rand(batch, 4, generator=generator) - 1)
    sigma = 0.1 + 1.9 * torch.rand(batch, generator=generator)
    window = 2 * torch.ceil(3 * sigma).int() + 1
    order = ORDERS[torch.arange(seed, seed + batch) % 24]
    return Draws(coins[0], coins[1], factors, order, coins[2], coins[3], sigma, window, coins[4])


def images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [B, 3, H, W] in channels_last: smooth colours, noise, and rows of black, white, grey and pure colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    smooth[1::3] = torch.rand(smooth[1::3].shape, generator=generator) * 255.99  # noise
    special = torch.tensor(
        [[0, 0, 0], [255, 255, 255], [77, 77, 77], [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 200]]
    )
    n = min(width, len(special))
    smooth[::2, :, -1, :n] = special[:n].T.float()
    return smooth.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def view(image: Array, d: Draws, i: int, *, threshold: int = 128) -> Array:
    """Flip, jitter, grayscale and solarize of one image [3, H, W] from 0 to 255, without any rounding."""
    x = image[:, :, ::-1] if d.flip[i] else image
    if d.jitter[i]:
        for part in d.order[i].tolist():
            x = adjust(x, part, float(d.factors[i, part]))
    if d.grayscale[i]:
        x = np.broadcast_to(gray(x), x.shape)
    return solarize(x, threshold) if d.solarize[i] else x


def gray(x: Array) -> Array:
    result: Array = 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    return result


def solarize(x: Array, threshold: int) -> Array:
    return np.where(x >= threshold - 0.5, 255.0 - x, x)


def adjust(x: Array, part: int, factor: float) -> Array:
    if part == HUE:
        return turn_hue(x, factor)
    other = {BRIGHTNESS: 0.0, CONTRAST: gray(x).mean(), SATURATION: gray(x)}[part]
    result: Array = np.clip(factor * x + (1.0 - factor) * other, 0.0, 255.0)
    return result


def turn_hue(x: Array, turns: float) -> Array:
    """By way of hue, chroma and value (Smith: Color gamut transform pairs, SIGGRAPH 1978)."""
    r, g, b = x
    value, chroma = x.max(0), x.max(0) - x.min(0)
    c = np.where(chroma == 0, 1.0, chroma)
    sector = np.where(value == r, (g - b) / c, np.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    hue = np.where(chroma == 0, 0.0, sector) + 6.0 * turns
    k = (np.array([5.0, 3.0, 1.0])[:, None, None] + hue) % 6.0
    return np.asarray(value - chroma * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))


def blur(image: Array, sigma: float, window: int) -> Array:
    """Two one-dimensional convolutions of [3, H, W] with mirrored borders."""
    radius = window // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, pad, mode="reflect")
        length = image.shape[axis]
        image = np.sum([w * np.take(padded, range(k, k + length), axis=axis) for k, w in enumerate(weights)], axis=0)
    return image


def by_torchvision(image: Tensor, d: Draws, i: int, *, threshold: int = 128) -> Tensor:
    """The same, and the blur, by torchvision on a uint8 tensor [3, H, W]: whole levels after each step."""
    x = F.horizontal_flip(image) if d.flip[i] else image
    parts: Any = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    if d.jitter[i]:
        for part in d.order[i].tolist():
            x = parts[part](x, float(d.factors[i, part]))
    if d.grayscale[i]:
        x = F.rgb_to_grayscale(x, 3)
    if d.blur[i]:
        x = F.gaussian_blur(x, [int(d.window[i])] * 2, [float(d.sigma[i])] * 2)
    return F.solarize(x, threshold) if d.solarize[i] else x


def f64(x: Tensor) -> Array:
    array: Array = x.detach().to(torch.float64).cpu().numpy()
    return array


def on(device: str, d: Draws) -> dict[str, Any]:
    return {name: x.to(device) for name, x in d._asdict().items()}
