r"""Augmentation parameters in plain PyTorch: the CPU path, and where the random numbers are defined.

They are a function of a key and of the number of the image. With SplitMix64's finalizer `mix` (Steele, Lea, Flood: Fast
splittable pseudorandom number generators, OOPSLA 2014) and gamma = 0x9E3779B97F4A7C15, modulo 2^64,

    u_j = (mix(mix((key ^ image) + gamma) + j gamma) >> 11) / 2^53        j = 1 ... 36

In this order they give: ten areas of a crop, ten logarithms of an aspect ratio, two positions, the masks flip and
jitter, four factors, four numbers whose ranks are the order of the adjustments, the masks grayscale and blur, the
blur's sigma, and the mask solarize. All are sampled whether used or not: changing a probability changes nothing else.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from byol_kernels.augment_params.params import ATTEMPTS, NUM_RANDOM, TABLE_COLUMNS, ViewParams
from byol_kernels.photometric.params import ADJUSTMENTS

_GAMMA = 0x9E3779B97F4A7C15


def sample_view_params(index: Tensor, key: Tensor, table: Tensor, blur_kernel: int) -> ViewParams:
    """Parameters of the images; see `ops.py`. No `addcmul` and the like, which may round once instead of twice."""
    columns = dict(zip(TABLE_COLUMNS, table.unbind(), strict=True))
    u = _uniform(index, key)
    scale, log_ratio, position, rest = torch.split(u, [ATTEMPTS, ATTEMPTS, 2, NUM_RANDOM - 2 * ATTEMPTS - 2], dim=1)
    scale = scale * columns["scale_range"] + columns["scale_min"]
    ratio = exp(log_ratio * columns["log_ratio_range"] + columns["log_ratio_min"])
    smallest, spread = (torch.stack([columns[f"{name}_{end}"] for name in ADJUSTMENTS]) for end in ("min", "range"))
    sigma = (rest[:, 12] * columns["sigma_range"] + columns["sigma_min"]).to(torch.float32)
    kernel_size = 2 * torch.ceil(sigma * 3.0).to(torch.int32) + 1
    return ViewParams(
        crop_box=_crop_box(scale, ratio, position, columns),
        flip=rest[:, 0] < columns["hflip_p"],
        jitter=rest[:, 1] < columns["color_jitter_p"],
        factors=(rest[:, 2:6] * spread + smallest).to(torch.float32),
        order=torch.argsort(rest[:, 6:10], dim=1, stable=True).to(torch.int32),
        grayscale=rest[:, 10] < columns["grayscale_p"],
        blur=rest[:, 11] < columns["blur_p"],
        sigma=sigma,
        kernel_size=kernel_size.clamp_max(blur_kernel) if blur_kernel else kernel_size,
        solarize=rest[:, 13] < columns["solarize_p"],
    )


def _crop_box(scale: Tensor, ratio: Tensor, position: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """First candidate that fits into the image, at a random position, or else the centered crop, [B, 4] int32."""
    height, width, sqrt_area = columns["height"], columns["width"], columns["sqrt_area"]
    w = (torch.floor(torch.sqrt(scale * ratio) * sqrt_area + 0.5)).clamp_min(1.0)
    h = (torch.floor(torch.sqrt(scale / ratio) * sqrt_area + 0.5)).clamp_min(1.0)
    fits = (w <= width) & (h <= height)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    has_fit = fits.any(dim=1)
    h = torch.where(has_fit, h.gather(1, first)[:, 0], columns["center_height"])
    w = torch.where(has_fit, w.gather(1, first)[:, 0], columns["center_width"])
    top = torch.where(has_fit, torch.floor(position[:, 0] * (height - h + 1.0)), torch.floor((height - h) * 0.5))
    left = torch.where(has_fit, torch.floor(position[:, 1] * (width - w + 1.0)), torch.floor((width - w) * 0.5))
    return torch.stack([top, left, h, w], dim=1).to(torch.int32)


def _uniform(index: Tensor, key: Tensor) -> Tensor:
    """Random numbers from 0 to 1, [B, NUM_RANDOM] float64."""
    key_B = _mix((index ^ key) + _to_int64(_GAMMA))
    counters = [_to_int64(j * _GAMMA % (1 << 64)) for j in range(1, NUM_RANDOM + 1)]
    counter = torch.tensor(counters, device=index.device)
    return _logical_shift(_mix(key_B[:, None] + counter), 11).to(torch.float64) * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, in int64: PyTorch has no arithmetic for uint64."""
    z = (z ^ _logical_shift(z, 30)) * _to_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _logical_shift(z, 27)) * _to_int64(0x94D049BB133111EB)
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    """Right shift of int64 as if it were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _to_int64(number: int) -> int:
    """Signed number with the bits of an unsigned one."""
    return number - (1 << 64) if number >= 1 << 63 else number


def exp(x: Tensor) -> Tensor:
    """Exponential function of float64 by operations that are equal on all devices: a polynomial and four squarings."""
    factorial, coefficients = 1, [1.0]
    for k in range(1, 14):
        factorial *= k
        coefficients.append(1.0 / factorial)
    x = x * 0.0625
    y = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        y = y * x + coefficient
    for _ in range(4):
        y = y * y
    return y
