r"""The random numbers of an augmentation, drawn on the device: no host work, and the same as on the host bit for bit.

A draw is a function of a key and of the number of the image. With SplitMix64's finalizer `mix` (Steele, Lea, Flood:
Fast splittable pseudorandom number generators, OOPSLA 2014) and gamma = 0x9E3779B97F4A7C15, modulo 2^64,

    u_j = (mix(mix((key ^ image) + gamma) + j gamma) >> 11) / 2^53        j = 1 ... 36

They are used in this order: ten areas, ten logarithms of an aspect ratio, two positions, the coin of the flip, that of
the jitter, four factors, four numbers whose ranks are the order of the jitter's parts, the coins of grayscale and blur,
the blur's sigma, the coin of solarize.

All arithmetic is in float64 by operations that IEEE 754 defines exactly, each rounded for itself: the kernel is
compiled without fused multiply-adds, and the exponential function is a polynomial and four squarings. So there is
nothing in which two devices could differ.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from byol_kernels._triton import device_guard, jit, tl

ATTEMPTS = 10
"""Crops that are tried before the centre of the image is taken."""
NUM_DRAWS = 2 * ATTEMPTS + 16
TABLE = (
    *("area", "area_spread", "log_aspect", "log_aspect_spread", "sigma", "sigma_spread"),
    *("brightness", "contrast", "saturation", "hue"),
    *("brightness_spread", "contrast_spread", "saturation_spread", "hue_spread"),
    *("flip", "jitter", "grayscale", "blur", "solarize"),
    *("height", "width", "root_of_area", "centre_height", "centre_width"),
)
"""The columns of the table of a view: smallest values and their distance to the largest; probabilities; and of the
images their size in pixels, the square root of their area, and the centred crop where none of the drawn ones fits."""
BLOCK = 64

# -------------------------------------------------------------------------------- kernel


@jit
def _mix(z: tl.tensor) -> tl.tensor:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit
def _uniform(key: tl.tensor, j: tl.constexpr) -> tl.tensor:
    counter = tl.full(key.shape, j, tl.uint64) * 0x9E3779B97F4A7C15
    return (_mix(key + counter) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@jit
def _exp(x: tl.tensor) -> tl.tensor:
    """As `_exp` below, operation by operation."""
    x = x * 0.0625
    y = x * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    y = y * x + 1.0 / 39916800.0
    y = y * x + 1.0 / 3628800.0
    y = y * x + 1.0 / 362880.0
    y = y * x + 1.0 / 40320.0
    y = y * x + 1.0 / 5040.0
    y = y * x + 1.0 / 720.0
    y = y * x + 1.0 / 120.0
    y = y * x + 1.0 / 24.0
    y = y * x + 1.0 / 6.0
    y = y * x + 0.5
    y = y * x + 1.0
    y = y * x + 1.0
    y = y * y
    y = y * y
    y = y * y
    return y * y


@jit
def _draw_view_kernel(
    index_ptr: tl.tensor,  # [B] int64
    key_ptr: tl.tensor,  # [] int64
    table_ptr: tl.tensor,  # [24] float64
    window_ptr: tl.tensor,  # [B, 4] int32
    flip_ptr: tl.tensor,  # [B] bool; so too the other coins
    jitter_ptr: tl.tensor,
    factors_ptr: tl.tensor,  # [B, 4] float32
    order_ptr: tl.tensor,  # [B, 4] int32
    grayscale_ptr: tl.tensor,
    blur_ptr: tl.tensor,
    sigma_ptr: tl.tensor,  # [B] float32
    blur_window_ptr: tl.tensor,  # [B] int32
    solarize_ptr: tl.tensor,
    batch: tl.tensor,
    blur_kernel: tl.tensor,  # 0: no limit
    ATTEMPTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < batch
    index = tl.load(index_ptr + rows, mask=mask, other=0).to(tl.uint64, bitcast=True)
    key = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    key = _mix((index ^ key) + 0x9E3779B97F4A7C15)

    height = tl.load(table_ptr + 19)
    width = tl.load(table_ptr + 20)
    root = tl.load(table_ptr + 21)
    h = tl.zeros((BLOCK,), tl.float64) + tl.load(table_ptr + 22)
    w = tl.zeros((BLOCK,), tl.float64) + tl.load(table_ptr + 23)
    found = tl.zeros((BLOCK,), tl.int1)
    for k in tl.static_range(ATTEMPTS):
        area = _uniform(key, k + 1) * tl.load(table_ptr + 1) + tl.load(table_ptr)
        aspect = _exp(_uniform(key, ATTEMPTS + k + 1) * tl.load(table_ptr + 3) + tl.load(table_ptr + 2))
        candidate_w = tl.maximum(tl.floor(tl.sqrt(area * aspect) * root + 0.5), 1.0)
        candidate_h = tl.maximum(tl.floor(tl.sqrt(area / aspect) * root + 0.5), 1.0)
        fits = (candidate_w <= width) & (candidate_h <= height) & ~found
        w = tl.where(fits, candidate_w, w)
        h = tl.where(fits, candidate_h, h)
        found = found | fits
    top = tl.floor(_uniform(key, 2 * ATTEMPTS + 1) * (height - h + 1.0))
    left = tl.floor(_uniform(key, 2 * ATTEMPTS + 2) * (width - w + 1.0))
    top = tl.where(found, top, tl.floor((height - h) * 0.5))
    left = tl.where(found, left, tl.floor((width - w) * 0.5))
    tl.store(window_ptr + 4 * rows, top.to(tl.int32), mask=mask)
    tl.store(window_ptr + 4 * rows + 1, left.to(tl.int32), mask=mask)
    tl.store(window_ptr + 4 * rows + 2, h.to(tl.int32), mask=mask)
    tl.store(window_ptr + 4 * rows + 3, w.to(tl.int32), mask=mask)

    FIRST: tl.constexpr = 2 * ATTEMPTS + 3
    tl.store(flip_ptr + rows, _uniform(key, FIRST) < tl.load(table_ptr + 14), mask=mask)
    tl.store(jitter_ptr + rows, _uniform(key, FIRST + 1) < tl.load(table_ptr + 15), mask=mask)
    for part in tl.static_range(4):
        factor = _uniform(key, FIRST + 2 + part) * tl.load(table_ptr + 10 + part) + tl.load(table_ptr + 6 + part)
        tl.store(factors_ptr + 4 * rows + part, factor.to(tl.float32), mask=mask)
    for part in tl.static_range(4):
        mine = _uniform(key, FIRST + 6 + part)
        rank = tl.zeros((BLOCK,), tl.int32)
        for other in tl.static_range(4):
            theirs = _uniform(key, FIRST + 6 + other)
            if other < part:  # equal numbers keep their places
                rank += (theirs <= mine).to(tl.int32)
            else:
                rank += (theirs < mine).to(tl.int32)
        tl.store(order_ptr + 4 * rows + rank, tl.full((BLOCK,), part, tl.int32), mask=mask)
    tl.store(grayscale_ptr + rows, _uniform(key, FIRST + 10) < tl.load(table_ptr + 16), mask=mask)
    tl.store(blur_ptr + rows, _uniform(key, FIRST + 11) < tl.load(table_ptr + 17), mask=mask)
    sigma = (_uniform(key, FIRST + 12) * tl.load(table_ptr + 5) + tl.load(table_ptr + 4)).to(tl.float32)
    tl.store(sigma_ptr + rows, sigma, mask=mask)
    blur_window = 2 * tl.ceil(sigma * 3.0).to(tl.int32) + 1
    blur_window = tl.where(blur_kernel > 0, tl.minimum(blur_window, blur_kernel), blur_window)
    tl.store(blur_window_ptr + rows, blur_window, mask=mask)
    tl.store(solarize_ptr + rows, _uniform(key, FIRST + 13) < tl.load(table_ptr + 18), mask=mask)


# -------------------------------------------------------------------------------- launcher

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty(index: Tensor) -> Tensors:
    batch = index.shape[0]

    def empty(dtype: torch.dtype, *columns: int) -> Tensor:
        return index.new_empty((batch, *columns), dtype=dtype)

    return (
        empty(torch.int32, 4), empty(torch.bool), empty(torch.bool), empty(torch.float32, 4), empty(torch.int32, 4),
        empty(torch.bool), empty(torch.bool), empty(torch.float32), empty(torch.int32), empty(torch.bool),
    )  # fmt: skip


def _draw_view_cuda(index: Tensor, key: Tensor, table: Tensor, blur_kernel: int) -> Tensors:
    out, batch = _empty(index), index.shape[0]
    if batch:
        with device_guard(index):
            _draw_view_kernel[(-(-batch // BLOCK),)](
                index.contiguous(), key, table, *out, batch, blur_kernel,
                ATTEMPTS=ATTEMPTS, BLOCK=BLOCK, num_warps=BLOCK // 32, enable_fp_fusion=False,
            )  # fmt: skip
    return out


# -------------------------------------------------------------------------------- reference: what runs on the CPU


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    """Of int64 as if it were unsigned: PyTorch has no arithmetic for uint64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


_GAMMA = 0x9E3779B97F4A7C15


def _mix_int64(z: Tensor) -> Tensor:
    z = (z ^ _logical_shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _logical_shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _logical_shift(z, 31)


def _exp_float64(x: Tensor) -> Tensor:
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


def _draw_view_cpu(index: Tensor, key: Tensor, table: Tensor, blur_kernel: int) -> Tensors:
    """In plain PyTorch, on any device; not `addcmul` and the like, which may round once instead of twice."""
    key_B = _mix_int64((index ^ key) + _signed(_GAMMA))
    counter = torch.tensor([_signed(j * _GAMMA % (1 << 64)) for j in range(1, NUM_DRAWS + 1)], device=index.device)
    u = _logical_shift(_mix_int64(key_B[:, None] + counter), 11).to(torch.float64) * 2.0**-53
    area, log_aspect, position, rest = torch.split(u, [ATTEMPTS, ATTEMPTS, 2, 14], dim=1)

    area = area * table[1] + table[0]
    aspect = _exp_float64(log_aspect * table[3] + table[2])
    height, width, root = table[19], table[20], table[21]
    w = (torch.floor(torch.sqrt(area * aspect) * root + 0.5)).clamp_min(1.0)
    h = (torch.floor(torch.sqrt(area / aspect) * root + 0.5)).clamp_min(1.0)
    fits = (w <= width) & (h <= height)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    h = torch.where(found, h.gather(1, first)[:, 0], table[22])
    w = torch.where(found, w.gather(1, first)[:, 0], table[23])
    top = torch.where(found, torch.floor(position[:, 0] * (height - h + 1.0)), torch.floor((height - h) * 0.5))
    left = torch.where(found, torch.floor(position[:, 1] * (width - w + 1.0)), torch.floor((width - w) * 0.5))

    sigma = (rest[:, 12] * table[5] + table[4]).to(torch.float32)
    blur_window = 2 * torch.ceil(sigma * 3.0).to(torch.int32) + 1
    return (
        torch.stack([top, left, h, w], dim=1).to(torch.int32),
        rest[:, 0] < table[14],
        rest[:, 1] < table[15],
        (rest[:, 2:6] * table[10:14] + table[6:10]).to(torch.float32),
        torch.argsort(rest[:, 6:10], dim=1, stable=True).to(torch.int32),
        rest[:, 10] < table[16],
        rest[:, 11] < table[17],
        sigma,
        blur_window.clamp_max(blur_kernel) if blur_kernel else blur_window,
        rest[:, 13] < table[18],
    )


# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::draw_view",
    "(Tensor index, Tensor key, Tensor table, int blur_kernel)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("byol_kernels::draw_view", "CPU", _draw_view_cpu)
torch.library.impl("byol_kernels::draw_view", "CUDA", _draw_view_cuda)


def _draw_view_fake(index: Tensor, key: Tensor, table: Tensor, blur_kernel: int) -> Tensors:
    return _empty(index)


torch.library.register_fake("byol_kernels::draw_view", _draw_view_fake)


# -------------------------------------------------------------------------------- public function


class DrawnView(NamedTuple):
    """The parameters of one view of B images; all but the first are those of `photometric`."""

    crop: Tensor
    """Top, left, height and width of the crops in pixels, [B, 4] int32."""
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    window: Tensor
    solarize: Tensor


def draw_view(index: Tensor, key: Tensor, table: Tensor, *, blur_kernel: int = 0) -> DrawnView:
    """Draws crop, colours, blur and coins of one view of each image: one launch on a GPU.

    Args:
        index: numbers of the images, [B] int64.
        key: of the stream that is drawn from, [] int64: say, a hash of a seed, the epoch and the view.
        table: ranges and probabilities, [24] float64, columns as in `TABLE`.
        blur_kernel: largest width of the blur's window in pixels, odd; 0 leaves it at three sigma to each side.

    Returns:
        What `resized_crop` and `photometric` take, on the device of `index`.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit.

    Example:
        >>> table = torch.tensor([.08, .92, -.29, .58, .1, 1.9, .6, .6, .8, -.1, .8, .8, .4, .2,
        ...                       .5, .8, .2, 1., 0., 32, 32, 32, 32, 32], dtype=torch.float64)
        >>> draw_view(torch.arange(7), torch.tensor(42), table).crop.shape
        torch.Size([7, 4])
    """
    what = "draw_view"
    for name, numbers, shape, dtype in (
        ("index", index, index.shape[:1], torch.int64),
        ("key", key, (), torch.int64),
        ("table", table, (len(TABLE),), torch.float64),
    ):
        if tuple(numbers.shape) != tuple(shape) or numbers.dtype != dtype or numbers.device != index.device:
            raise ValueError(
                f"{what}: {name} must have shape {tuple(shape)} and dtype {dtype}, on the device of index, "
                f"{index.device}, got {tuple(numbers.shape)}, {numbers.dtype}, {numbers.device}; convert it with .to()"
            )
    return DrawnView(*torch.ops.byol_kernels.draw_view(index, key, table, blur_kernel))
