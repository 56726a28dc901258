"""Triton kernel that samples the augmentation parameters of a batch.

All arithmetic is in float64 by operations that IEEE 754 defines exactly, each rounded by itself: the kernel is compiled
without fused multiply-adds, and the exponential function is a polynomial and four squarings. Every device therefore
gives the same bits as `reference.py`, where the random numbers are defined.
"""

from torch import Tensor

from byol_kernels._triton import constexpr_function, device_guard, jit, tl
from byol_kernels.augment_params.params import ATTEMPTS, TABLE_COLUMNS, ViewParams, empty_params

BLOCK = 64
_COLUMNS = tl.constexpr({name: number for number, name in enumerate(TABLE_COLUMNS)})

# -------------------------------------------------------------------------------- kernel


@jit
def _mix(z: tl.tensor) -> tl.tensor:
    """SplitMix64's finalizer."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit
def _uniform(key: tl.tensor, j: tl.constexpr) -> tl.tensor:
    """Number j of each key's stream, from 0 to 1."""
    counter = tl.full(key.shape, j, tl.uint64) * 0x9E3779B97F4A7C15
    return (_mix(key + counter) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@jit
def _exp(x: tl.tensor) -> tl.tensor:
    """The operations of `exp` in `reference.py`, in the same order."""
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


@constexpr_function
def _number(columns: dict[str, int], name: str) -> int:
    return columns[name]


@jit
def _column(table_ptr: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    return tl.load(table_ptr + _number(_COLUMNS, NAME))


@jit
def _between(u: tl.tensor, table_ptr: tl.tensor, MIN: tl.constexpr, RANGE: tl.constexpr) -> tl.tensor:
    """Numbers from 0 to 1, scaled to a range of the table."""
    return u * _column(table_ptr, RANGE) + _column(table_ptr, MIN)


@jit
def _sample_view_params_kernel(
    index_ptr: tl.tensor,  # [B] int64
    key_ptr: tl.tensor,  # [] int64
    table_ptr: tl.tensor,  # [len(TABLE_COLUMNS)] float64
    crop_box_ptr: tl.tensor,  # [B, 4] int32: top, left, height, width
    flip_ptr: tl.tensor,  # [B] bool, like the other masks
    jitter_ptr: tl.tensor,
    factors_ptr: tl.tensor,  # [B, 4] float32
    order_ptr: tl.tensor,  # [B, 4] int32
    grayscale_ptr: tl.tensor,
    blur_ptr: tl.tensor,
    sigma_ptr: tl.tensor,  # [B] float32
    kernel_size_ptr: tl.tensor,  # [B] int32, of the blur
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

    # --- crop: the first candidate that fits into the image, or else the centered crop
    height = _column(table_ptr, "height")
    width = _column(table_ptr, "width")
    sqrt_area = _column(table_ptr, "sqrt_area")
    h = tl.zeros((BLOCK,), tl.float64) + _column(table_ptr, "center_height")
    w = tl.zeros((BLOCK,), tl.float64) + _column(table_ptr, "center_width")
    has_fit = tl.zeros((BLOCK,), tl.int1)
    for k in tl.static_range(ATTEMPTS):
        scale = _between(_uniform(key, k + 1), table_ptr, "scale_min", "scale_range")
        log_ratio = _between(_uniform(key, ATTEMPTS + k + 1), table_ptr, "log_ratio_min", "log_ratio_range")
        ratio = _exp(log_ratio)
        candidate_w = tl.maximum(tl.floor(tl.sqrt(scale * ratio) * sqrt_area + 0.5), 1.0)
        candidate_h = tl.maximum(tl.floor(tl.sqrt(scale / ratio) * sqrt_area + 0.5), 1.0)
        fits = (candidate_w <= width) & (candidate_h <= height) & ~has_fit
        w = tl.where(fits, candidate_w, w)
        h = tl.where(fits, candidate_h, h)
        has_fit = has_fit | fits
    top = tl.floor(_uniform(key, 2 * ATTEMPTS + 1) * (height - h + 1.0))
    left = tl.floor(_uniform(key, 2 * ATTEMPTS + 2) * (width - w + 1.0))
    top = tl.where(has_fit, top, tl.floor((height - h) * 0.5))
    left = tl.where(has_fit, left, tl.floor((width - w) * 0.5))
    tl.store(crop_box_ptr + 4 * rows, top.to(tl.int32), mask=mask)
    tl.store(crop_box_ptr + 4 * rows + 1, left.to(tl.int32), mask=mask)
    tl.store(crop_box_ptr + 4 * rows + 2, h.to(tl.int32), mask=mask)
    tl.store(crop_box_ptr + 4 * rows + 3, w.to(tl.int32), mask=mask)

    # --- flip and jitter; the order of the adjustments are the ranks of four numbers
    FIRST: tl.constexpr = 2 * ATTEMPTS + 3
    tl.store(flip_ptr + rows, _uniform(key, FIRST) < _column(table_ptr, "hflip_p"), mask=mask)
    tl.store(jitter_ptr + rows, _uniform(key, FIRST + 1) < _column(table_ptr, "color_jitter_p"), mask=mask)
    for column in tl.static_range(4):
        u = _uniform(key, FIRST + 2 + column)
        factor = _between(u, table_ptr + column, "brightness_min", "brightness_range")
        tl.store(factors_ptr + 4 * rows + column, factor.to(tl.float32), mask=mask)
    for adjustment in tl.static_range(4):
        number = _uniform(key, FIRST + 6 + adjustment)
        rank = tl.zeros((BLOCK,), tl.int32)
        for other in tl.static_range(4):
            other_number = _uniform(key, FIRST + 6 + other)
            if other < adjustment:  # equal numbers keep their order
                rank += (other_number <= number).to(tl.int32)
            else:
                rank += (other_number < number).to(tl.int32)
        tl.store(order_ptr + 4 * rows + rank, tl.full((BLOCK,), adjustment, tl.int32), mask=mask)

    # --- grayscale, blur and solarize
    tl.store(grayscale_ptr + rows, _uniform(key, FIRST + 10) < _column(table_ptr, "grayscale_p"), mask=mask)
    tl.store(blur_ptr + rows, _uniform(key, FIRST + 11) < _column(table_ptr, "blur_p"), mask=mask)
    sigma = _between(_uniform(key, FIRST + 12), table_ptr, "sigma_min", "sigma_range").to(tl.float32)
    tl.store(sigma_ptr + rows, sigma, mask=mask)
    kernel_size = 2 * tl.ceil(sigma * 3.0).to(tl.int32) + 1
    kernel_size = tl.where(blur_kernel > 0, tl.minimum(kernel_size, blur_kernel), kernel_size)
    tl.store(kernel_size_ptr + rows, kernel_size, mask=mask)
    tl.store(solarize_ptr + rows, _uniform(key, FIRST + 13) < _column(table_ptr, "solarize_p"), mask=mask)


# -------------------------------------------------------------------------------- launcher


def sample_view_params_cuda(index: Tensor, key: Tensor, table: Tensor, blur_kernel: int) -> ViewParams:
    """Parameters of the images; see `ops.py`."""
    params, batch = empty_params(index), index.shape[0]
    if batch:
        with device_guard(index):
            _sample_view_params_kernel[(-(-batch // BLOCK),)](
                index.contiguous(), key, table, *params, batch, blur_kernel,
                ATTEMPTS=ATTEMPTS, BLOCK=BLOCK, num_warps=BLOCK // 32, enable_fp_fusion=False,
            )  # fmt: skip
    return params
