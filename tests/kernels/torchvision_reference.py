"""torchvision as the reference of the photometric operator and the blur; images and parameters to compare them on."""

import colorsys
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_kernels.photometric.params import HUE

ORDERS = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.int32)

FLOAT32_LEVELS = 2e-3
"""Error of float32 arithmetic in levels of 255: some hundred roundings of 255 * 2^-25 each."""

FLOAT16_FACTORS = 0.25
"""Error in levels of the blur's products of float16. The intermediate result is rounded by at most 2^-4 level; weights,
by 2^-12 of themselves, in each of two passes, where they weigh differences of up to 255."""


class Params(NamedTuple):
    """Arguments of `photometric`, by its names."""

    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    kernel_size: Tensor
    solarize: Tensor


def make_params(batch: int, seed: int = 0, *, spread: float = 0.4, hue: float = 0.1) -> Params:
    """Masks with probability one half, orders that run through all 24, BYOL's blur.

    Results are compared with float64: an operation that jumps between levels must be off, and tested by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(5, batch, generator=generator) < 0.5
    half = torch.tensor([spread, spread, spread, hue])
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]) + half * (2 * torch.rand(batch, 4, generator=generator) - 1)
    sigma = 0.1 + 1.9 * torch.rand(batch, generator=generator)
    kernel_size = 2 * torch.ceil(3 * sigma).int() + 1
    order = ORDERS[torch.arange(seed, seed + batch) % 24]
    return Params(masks[0], masks[1], factors, order, masks[2], masks[3], sigma, kernel_size, masks[4])


def set_masks(p: Params, **masks: bool) -> Params:
    """Parameters with some masks the same for all images."""
    return p._replace(**{name: torch.full_like(p.flip, value) for name, value in masks.items()})


def make_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [B, 3, H, W] in channels_last: smooth colors, noise, and rows of black, white, gray and pure colors."""
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


def augment(images: Tensor, p: Params, *, threshold: int = 128) -> Tensor:
    """All operations but normalize on uint8 tensors, with whole levels after each."""
    return torch.stack([_augment(image, p, i, threshold) for i, image in enumerate(images)])


def augment_exactly(images: Tensor, p: Params, *, threshold: int = 128) -> Tensor:
    """The same in float64 without any rounding, in levels of 255; for parameters without a blur."""
    assert not p.blur.any()
    # A value that rounds up to the threshold counts as reaching it.
    exact = [_augment(image.double() / 255, p, i, (threshold - 0.5) / 255) for i, image in enumerate(images)]
    return 255 * torch.stack(exact)


def _augment(x: Tensor, p: Params, i: int, threshold: float) -> Tensor:
    x = F.horizontal_flip(x) if p.flip[i] else x
    adjust: Any = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    if p.jitter[i]:
        for adjustment in p.order[i].tolist():
            factor = float(p.factors[i, adjustment])
            # torchvision shifts the hue in float32, whatever the dtype.
            exact_hue = adjustment == HUE and x.is_floating_point()
            x = _shift_hue(x, factor) if exact_hue else adjust[adjustment](x, factor)
    if p.grayscale[i]:
        x = F.rgb_to_grayscale(x, 3)
    if p.blur[i]:
        x = F.gaussian_blur(x, [int(p.kernel_size[i])] * 2, [float(p.sigma[i])] * 2)
    return F.solarize(x, threshold) if p.solarize[i] else x


def _shift_hue(x: Tensor, turns: float) -> Tensor:
    """By Python's own conversion to HSV and back, pixel by pixel."""
    pixels = []
    for rgb in x.flatten(1).T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        pixels.append(colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value))
    return torch.tensor(pixels, dtype=x.dtype).T.reshape(x.shape)


def blur(images: Tensor, sigma: Tensor, kernel_size: Tensor) -> Tensor:
    """Gaussian blur of [B, 3, H, W] in float64, with kernels of any width."""
    blurred = []
    for image, s, w in zip(images.double(), sigma.tolist(), kernel_size.tolist(), strict=True):
        # torchvision refuses kernels wider than the image: mirror the borders first, as often as needed.
        radius, (height, width) = w // 2, image.shape[1:]
        padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), *[(radius, radius)] * 2), mode="reflect"))
        blurred.append(F.gaussian_blur(padded, [w, w], [s, s])[:, radius : radius + height, radius : radius + width])
    return torch.stack(blurred)


def max_error(x: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return float((x.detach().double().cpu() - expected.double().cpu()).abs().max())


def on(device: str, p: Params, *names: str) -> dict[str, Any]:
    """Parameters on a device, as keyword arguments: all, or those named."""
    return {name: getattr(p, name).to(device) for name in names or p._fields}
