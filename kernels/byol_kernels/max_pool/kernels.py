"""Triton kernels of max pooling, and their launchers.

Both passes read and write each element of memory once, except for what overlapping windows share in the cache. The
gradient is gathered, four pixels a thread, so that no two programs add to the same one and the order of sums is fixed:
an even row lies in the middle of one window, an odd one at the end of one window and the start of the next.
"""

from typing import Any

import torch
from torch import Tensor

from byol_kernels._dtypes import accumulation_dtype
from byol_kernels._triton import device_guard, jit, next_power_of_2, tl, tl_dtype

BLOCK = 1024
"""Values of a tile: windows of a row times channels."""
BLOCK_C = 64
NUM_WARPS = 4

# -------------------------------------------------------------------------------- kernels


@jit
def _windows(out_height: tl.tensor, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Windows of a program, a part of one row: row of the batch, image, row of the image, columns, channels."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, row // out_height, (row % out_height).to(tl.int32), columns, channels


@jit
def _max_pool_fwd_kernel(
    x_ptr: tl.tensor,  # [B, height, width, channels]
    y_ptr: tl.tensor,  # [B, out_height, out_width, channels]
    place_ptr: tl.tensor,  # like y, int8
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    channels: tl.tensor,
    COMPUTE: tl.constexpr,  # dtype of comparisons
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    # --- which windows
    row, image, window_row, columns, channel = _windows(out_height, BLOCK_W, BLOCK_C)
    is_channel = (channel < channels)[None, :]

    # --- the first of the largest values; a NaN counts as larger, as in torch
    best = tl.full((BLOCK_W, BLOCK_C), float("-inf"), COMPUTE)
    # Where all values are -inf, the first pixel inside the image.
    first = tl.where(window_row == 0, 3, 0) + tl.where(columns == 0, 1, 0)
    place = tl.zeros((BLOCK_W, BLOCK_C), tl.int32) + first[:, None]
    for i in tl.static_range(3):
        in_row = 2 * window_row - 1 + i
        in_width = tl.where((in_row >= 0) & (in_row < height), width, 0)  # of the image in this row
        x_row_ptr = x_ptr + (image * height + in_row) * width * channels
        for j in tl.static_range(3):
            in_column = 2 * columns - 1 + j
            inside = (in_column >= 0) & (in_column < in_width)
            at = in_column[:, None] * channels + channel[None, :]
            value = tl.load(x_row_ptr + at, mask=inside[:, None] & is_channel, other=float("-inf")).to(COMPUTE)
            larger = (value > best) | (value != value)  # noqa: PLR0124
            best = tl.where(larger, value, best)
            place = tl.where(larger, 3 * i + j, place)

    # --- store
    target = (row * out_width + columns[:, None]) * channels + channel[None, :]
    mask = (columns < out_width)[:, None] & is_channel
    tl.store(y_ptr + target, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(place_ptr + target, place.to(tl.int8), mask=mask)


@jit
def _max_pool_bwd_kernel(
    dy_ptr: tl.tensor,  # [B, out_height, out_width, channels]
    place_ptr: tl.tensor,  # like dy, int8
    dx_ptr: tl.tensor,  # [B, height, width, channels]
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    channels: tl.tensor,
    COMPUTE: tl.constexpr,  # dtype of sums
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    # --- which pixels: 2x2 for each window
    row, image, window_row, columns, channel = _windows(out_height, BLOCK_W, BLOCK_C)
    is_channel = (channel < channels)[None, :]

    # --- this window and its neighbors on the right and below; where there is none, no maximum is at place -1
    at = (row * out_width + columns[:, None]) * channels + channel[None, :]
    here = (columns < out_width)[:, None] & is_channel
    right = (columns + 1 < out_width)[:, None] & is_channel
    width_below = tl.where(window_row + 1 < out_height, out_width, 0)
    below = (columns < width_below)[:, None] & is_channel
    both = (columns + 1 < width_below)[:, None] & is_channel
    place = tl.load(place_ptr + at, mask=here, other=-1)
    place_right = tl.load(place_ptr + at + channels, mask=right, other=-1)
    place_below = tl.load(place_ptr + at + out_width * channels, mask=below, other=-1)
    place_both = tl.load(place_ptr + at + (out_width + 1) * channels, mask=both, other=-1)
    dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(COMPUTE)
    dy_right = tl.load(dy_ptr + at + channels, mask=right, other=0.0).to(COMPUTE)
    dy_below = tl.load(dy_ptr + at + out_width * channels, mask=below, other=0.0).to(COMPUTE)
    dy_both = tl.load(dy_ptr + at + (out_width + 1) * channels, mask=both, other=0.0).to(COMPUTE)

    # --- sums over the windows that hold a pixel
    even_even = tl.where(place == 4, dy, 0.0)
    even_odd = tl.where(place == 5, dy, 0.0) + tl.where(place_right == 3, dy_right, 0.0)
    odd_even = tl.where(place == 7, dy, 0.0) + tl.where(place_below == 1, dy_below, 0.0)
    odd_odd = tl.where(place == 8, dy, 0.0) + tl.where(place_right == 6, dy_right, 0.0)
    odd_odd += tl.where(place_below == 2, dy_below, 0.0) + tl.where(place_both == 0, dy_both, 0.0)

    # --- store
    pixel_row = image * height + 2 * window_row
    target = dx_ptr + (pixel_row * width + 2 * columns[:, None]) * channels + channel[None, :]
    odd_width = tl.where(2 * window_row + 1 < height, width, 0)  # of the image in the odd row
    tl.store(target, even_even, mask=here)
    tl.store(target + channels, even_odd, mask=(2 * columns + 1 < width)[:, None] & is_channel)
    tl.store(target + width * channels, odd_even, mask=(2 * columns < odd_width)[:, None] & is_channel)
    tl.store(target + (width + 1) * channels, odd_odd, mask=(2 * columns + 1 < odd_width)[:, None] & is_channel)


# -------------------------------------------------------------------------------- launchers


def tile_of(channels: int) -> tuple[int, int]:
    """Windows of a row and channels of a tile."""
    block_c = min(BLOCK_C, next_power_of_2(channels))
    return BLOCK // block_c, block_c


def max_pool2d_3x3_fwd_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and their places; see `reference.max_pool2d_3x3_fwd`."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = empty_output(x, x.dtype)
    place = empty_output(x, torch.int8)
    if y.numel():
        _launch(_max_pool_fwd_kernel, (x, y, place), x.shape, y.shape)
    return y, place


def max_pool2d_3x3_bwd_cuda(dy: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """Gradient of the input; see `reference.max_pool2d_3x3_bwd`."""
    dy, place = (t.contiguous(memory_format=torch.channels_last) for t in (dy, place))
    dx = empty_channels_last(dy, (*dy.shape[:2], height, width), dy.dtype)
    if dx.numel():
        _launch(_max_pool_bwd_kernel, (dy, place, dx), dx.shape, dy.shape)
    return dx


def _launch(kernel: Any, tensors: tuple[Tensor, ...], shape: torch.Size, out_shape: torch.Size) -> None:
    batch, channels, height, width = shape
    out_height, out_width = out_shape[2:]
    block_w, block_c = tile_of(channels)
    grid = (batch * out_height, -(-out_width // block_w), -(-channels // block_c))
    with device_guard(tensors[0]):
        kernel[grid](
            *tensors, height, width, out_height, out_width, channels,
            COMPUTE=tl_dtype(accumulation_dtype(tensors[0].dtype)), BLOCK_W=block_w, BLOCK_C=block_c,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def empty_output(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized result of pooling, channels_last."""
    batch, channels, height, width = x.shape
    return empty_channels_last(x, (batch, channels, (height + 1) // 2, (width + 1) // 2), dtype)


def empty_channels_last(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized channels_last tensor."""
    batch, channels, height, width = shape
    return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
