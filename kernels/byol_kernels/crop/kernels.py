r"""Crops of uint8 images resized with an antialiased filter, as two products with banded matrices.

An output pixel is a weighted mean of the crop's pixels under a filter f that widens where the crop shrinks:

    out = (t_v X) t_h        t[i, k] = f((k + 1/2 - (i + 1/2) s) / max(s, 1)) / sum        s = crop size / output size

f is Keys' cubic with a = -1/2, or a triangle: as in PIL and in PyTorch's `interpolate(antialias=True)`. Pixels outside
the crop do not count even if the image continues there: the result is that of cropping first.

One program per 32 x 32 pixels of one sample. The matrices are built in registers, 16 pixels at a time, and the image
between the two passes is never written to memory; as in `blur/kernels.py`. Factors are float32: a data set that fits on
a GPU has small images, and float16 would cost the last bit.
"""

import torch
from torch import Tensor

from byol_kernels._tiles import load_tile, store_tile, tile_cols, tile_rows
from byol_kernels._triton import device_guard, jit, tl

BLOCK = 32
BLOCK_K = 16
NUM_WARPS = 4
MAX_REGISTERS = 192
REACH = {"bilinear": 1, "bicubic": 2}
"""Pixels that a filter reaches to each side: of the output or of the crop, whichever are larger."""

# -------------------------------------------------------------------------------- kernel


@jit
def _weight(distance: tl.tensor, REACH: tl.constexpr) -> tl.tensor:
    """Unnormalized weight at a distance in units of the filter's scale: Keys' cubic for REACH 2, else a triangle."""
    x = tl.abs(distance)
    if REACH == 2:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:  # noqa: RET505
        return tl.maximum(1.0 - x, 0.0)


@jit
def _resized_crop_kernel(
    images_ptr: tl.tensor,  # [N, 3, H, W] uint8, any strides
    index_ptr: tl.tensor,  # [B], or None: N = B, sample b is cut from image b
    box_ptr: tl.tensor,  # [B, 4]: top, left, height, width
    out_ptr: tl.tensor,  # [B, SIZE, SIZE, 3]
    stride_n: tl.tensor,
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    SIZE: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # --- which tile of which sample, and its crop
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    tile = tl.program_id(0) % (TILES * TILES)
    image = sample
    if index_ptr is not None:
        image = tl.load(index_ptr + sample).to(tl.int64)
    top = tl.load(box_ptr + 4 * sample).to(tl.int64)
    left = tl.load(box_ptr + 4 * sample + 1).to(tl.int64)
    height = tl.load(box_ptr + 4 * sample + 2).to(tl.int32)
    width = tl.load(box_ptr + 4 * sample + 3).to(tl.int32)
    images_ptr += image * stride_n + top * stride_h + left * stride_w

    # --- rows and columns of the crop that the tile depends on; an end beyond the output only costs time
    rows = tile // TILES * BLOCK + tl.arange(0, BLOCK)
    cols = tile % TILES * BLOCK + tl.arange(0, BLOCK)
    scale_v = height.to(tl.float32) / SIZE
    scale_h = width.to(tl.float32) / SIZE
    narrow_v = 1.0 / tl.maximum(scale_v, 1.0)
    narrow_h = 1.0 / tl.maximum(scale_h, 1.0)
    center_v = (rows.to(tl.float32) + 0.5) * scale_v - 0.5  # in pixels of the crop
    center_h = (cols.to(tl.float32) + 0.5) * scale_h - 0.5
    reach_v = REACH * tl.maximum(scale_v, 1.0)
    reach_h = REACH * tl.maximum(scale_h, 1.0)
    first_row = tl.maximum(tl.ceil(tl.min(center_v, axis=0) - reach_v).to(tl.int32), 0)
    first_col = tl.maximum(tl.ceil(tl.min(center_h, axis=0) - reach_h).to(tl.int32), 0)
    end_row = tl.minimum(tl.floor(tl.max(center_v, axis=0) + reach_v).to(tl.int32) + 1, height)
    end_col = tl.minimum(tl.floor(tl.max(center_h, axis=0) + reach_h).to(tl.int32) + 1, width)

    # --- both passes: the vertical product of a strip of BLOCK_K columns is a factor of the horizontal product
    steps = tl.arange(0, BLOCK_K)
    r = tl.zeros((BLOCK, BLOCK), tl.float32)
    g = tl.zeros((BLOCK, BLOCK), tl.float32)
    b = tl.zeros((BLOCK, BLOCK), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_h = tl.zeros((BLOCK,), tl.float32)
    col_start = first_col
    while col_start < end_col:
        in_cols = col_start + steps
        inside_cols = tile_cols(col_start, BLOCK_K) < width
        source = images_ptr + tile_cols(col_start, BLOCK_K) * stride_w
        column_r = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        column_g = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        column_b = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        sum_v = tl.zeros((BLOCK,), tl.float32)  # the same for each strip
        row_start = first_row
        while row_start < end_row:
            in_rows = row_start + steps
            inside = (tile_rows(row_start, BLOCK_K) < height) & inside_cols
            at = source + tile_rows(row_start, BLOCK_K) * stride_h
            weight_v = _weight((in_rows[None, :].to(tl.float32) - center_v[:, None]) * narrow_v, REACH)
            weight_v = tl.where((in_rows < height)[None, :], weight_v, 0.0)
            sum_v += tl.sum(weight_v, axis=1)
            x_r = load_tile(at, inside, BLOCK_K).to(tl.float32)
            x_g = load_tile(at + stride_c, inside, BLOCK_K).to(tl.float32)
            x_b = load_tile(at + 2 * stride_c, inside, BLOCK_K).to(tl.float32)
            column_r = tl.dot(weight_v, x_r, column_r, input_precision="ieee")
            column_g = tl.dot(weight_v, x_g, column_g, input_precision="ieee")
            column_b = tl.dot(weight_v, x_b, column_b, input_precision="ieee")
            row_start += BLOCK_K
        weight_h = _weight((in_cols[:, None].to(tl.float32) - center_h[None, :]) * narrow_h, REACH)
        weight_h = tl.where((in_cols < width)[:, None], weight_h, 0.0)
        sum_h += tl.sum(weight_h, axis=0)
        r = tl.dot(column_r, weight_h, r, input_precision="ieee")
        g = tl.dot(column_g, weight_h, g, input_precision="ieee")
        b = tl.dot(column_b, weight_h, b, input_precision="ieee")
        col_start += BLOCK_K

    # --- divide by the sums of the weights, clip what the cubic overshoots, store
    norm = 1.0 / (sum_v[:, None] * sum_h[None, :])
    pixel_rows = tile_rows(tile // TILES * BLOCK, BLOCK)
    pixel_cols = tile_cols(tile % TILES * BLOCK, BLOCK)
    mask = (pixel_rows < SIZE) & (pixel_cols < SIZE)
    target = out_ptr + sample * (SIZE * SIZE * 3) + (pixel_rows * SIZE + pixel_cols) * 3
    # + 0.5: the conversion truncates.
    store_tile(target, (tl.minimum(tl.maximum(r * norm, 0.0), 255.0) + 0.5).to(tl.uint8), mask, BLOCK)
    store_tile(target + 1, (tl.minimum(tl.maximum(g * norm, 0.0), 255.0) + 0.5).to(tl.uint8), mask, BLOCK)
    store_tile(target + 2, (tl.minimum(tl.maximum(b * norm, 0.0), 255.0) + 0.5).to(tl.uint8), mask, BLOCK)


# -------------------------------------------------------------------------------- launcher


def resized_crop_cuda(images: Tensor, index: Tensor | None, box: Tensor, size: int, interpolation: str) -> Tensor:
    """Crops [B, 3, size, size], channels_last."""
    batch = box.shape[0]
    out_NHWC = torch.empty((batch, size, size, 3), dtype=torch.uint8, device=images.device)
    if batch:
        with device_guard(images):
            _resized_crop_kernel[(batch * (-(-size // BLOCK)) ** 2,)](
                images, index, box.contiguous(), out_NHWC, *images.stride(),
                SIZE=size, REACH=REACH[interpolation], BLOCK=BLOCK, BLOCK_K=BLOCK_K,
                num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
            )  # fmt: skip
    return out_NHWC.permute(0, 3, 1, 2)
