r"""Gaussian blur as two products with banded Toeplitz matrices.

    out = (t_v X) t_h        t[i, j] = exp(-(i - j)^2 / (2 sigma^2)) / sum        for |i - j| <= kernel_size // 2

One program per 32 x 32 pixels of one image. The matrices are built in registers and multiplied on the tensor cores,
16 pixels at a time, for as many steps as the blur of the image needs; the image between the two passes is never
written to memory. For uint8 images the factors are float16: pixels are exact in it, and the weights are divided by the
sum of their rounded values, so that a flat image stays unchanged. Other images use float32 factors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._images import to_device
from byol_kernels._tiles import load_tile, store_tile, tile_cols, tile_rows
from byol_kernels._triton import device_guard, jit, tl
from byol_kernels.photometric.pixels import finish_channel

BLOCK = 32
BLOCK_K = 16
NUM_WARPS = 2  # 16 rows each: with more, Triton makes some repeat the others' work on the tensor cores
NUM_WARPS_FLOAT32 = 4
MAX_REGISTERS = 192

# -------------------------------------------------------------------------------- kernel


@jit
def _reflect(index: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Index mirrored into 0 ... length - 1 without repeating the border, as often as needed."""
    period = tl.maximum(2 * (length - 1), 1)
    index = tl.abs(index) % period
    return tl.minimum(index, period - index)


@jit
def _gauss(distance: tl.tensor, radius: tl.tensor, falloff: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Unnormalized weight at a distance from the center, where it is 1."""
    square = (distance * distance).to(tl.float32)
    return tl.where(tl.abs(distance) <= radius, tl.exp(square * falloff), 0.0).to(DTYPE)


@jit
def _target_pixels(
    out_ptr: tl.tensor,  # [H, W, 3]
    top: tl.tensor,
    left: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Addresses of a tile's pixels, and which of them are inside the image.

    Made where they are used: if they lived during the sums, these would have fewer registers.
    """
    rows = tile_rows(top, BLOCK)
    cols = tile_cols(left, BLOCK)
    return out_ptr + (rows * width + cols) * 3, (rows < height) & (cols < width)


@jit
def _gaussian_blur_kernel(
    images_ptr: tl.tensor,  # [B, 3, H, W], any strides
    out_ptr: tl.tensor,  # [B, H, W, 3]
    blur_ptr: tl.tensor,  # [B] mask, or None: all
    sigma_ptr: tl.tensor,  # [B]
    kernel_size_ptr: tl.tensor,  # [B]
    solarize_ptr: tl.tensor,  # [B] mask, or None: none
    stride_b: tl.tensor,
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    solarize_threshold: tl.tensor,  # in levels of 255
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    bias_r: tl.tensor,
    bias_g: tl.tensor,
    bias_b: tl.tensor,
    COPY: tl.constexpr,  # also write the images that are not blurred
    ROUND: tl.constexpr,  # to whole levels, before solarize
    FLOAT32: tl.constexpr,  # factors of the products: float32, or float16
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # --- which tile of which image
    # Consecutive programs take neighboring tiles, so that the borders that they share are in the cache.
    tiles_w = tl.cdiv(width, BLOCK)
    tiles = tl.cdiv(height, BLOCK) * tiles_w
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top = tile // tiles_w * BLOCK
    left = tile % tiles_w * BLOCK
    images_ptr += image * stride_b
    out_ptr += image * height * width * 3
    rows = top + tl.arange(0, BLOCK)
    cols = left + tl.arange(0, BLOCK)
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    DTYPE: tl.constexpr = tl.float32 if FLOAT32 else tl.float16
    blurred = True
    if blur_ptr is not None:
        blurred = tl.load(blur_ptr + image) != 0

    if blurred:
        # --- normalization of the weights, as they are rounded to the factors' dtype
        sigma = tl.load(sigma_ptr + image)
        falloff = -0.5 / (sigma * sigma)
        radius = tl.maximum(tl.load(kernel_size_ptr + image).to(tl.int32), 0) // 2
        steps = tl.arange(0, BLOCK_K)
        total = 0.0
        start = -radius
        while start <= radius:
            total += tl.sum(_gauss(start + steps, radius, falloff, DTYPE).to(tl.float32), axis=0)
            start += BLOCK_K
        norm = 1.0 / total

        # --- both passes: the vertical product of a strip of BLOCK_K columns is a factor of the horizontal product
        r = tl.zeros((BLOCK, BLOCK), tl.float32)
        g = tl.zeros((BLOCK, BLOCK), tl.float32)
        b = tl.zeros((BLOCK, BLOCK), tl.float32)
        col_start = left - radius
        while col_start < left + BLOCK + radius:
            in_cols = col_start + steps
            source = images_ptr + _reflect(tile_cols(col_start, BLOCK_K), width) * stride_w
            column_r = tl.zeros((BLOCK, BLOCK_K), tl.float32)
            column_g = tl.zeros((BLOCK, BLOCK_K), tl.float32)
            column_b = tl.zeros((BLOCK, BLOCK_K), tl.float32)
            row_start = top - radius
            while row_start < top + BLOCK + radius:
                in_rows = row_start + steps
                at = source + _reflect(tile_rows(row_start, BLOCK_K), height) * stride_h
                weight_v = _gauss(rows[:, None] - in_rows[None, :], radius, falloff, DTYPE)
                x_r = load_tile(at, None, BLOCK_K).to(DTYPE)
                column_r = tl.dot(weight_v, x_r, column_r, input_precision="ieee")
                x_g = load_tile(at + stride_c, None, BLOCK_K).to(DTYPE)
                column_g = tl.dot(weight_v, x_g, column_g, input_precision="ieee")
                x_b = load_tile(at + 2 * stride_c, None, BLOCK_K).to(DTYPE)
                column_b = tl.dot(weight_v, x_b, column_b, input_precision="ieee")
                row_start += BLOCK_K
            weight_h = _gauss(in_cols[:, None] - cols[None, :], radius, falloff, DTYPE)
            r = tl.dot((column_r * norm).to(DTYPE), weight_h, r, input_precision="ieee")
            g = tl.dot((column_g * norm).to(DTYPE), weight_h, g, input_precision="ieee")
            b = tl.dot((column_b * norm).to(DTYPE), weight_h, b, input_precision="ieee")
            col_start += BLOCK_K

        # --- solarize, normalize, store
        solarize_from = float("inf")
        if solarize_ptr is not None:
            solarize_from = tl.where(tl.load(solarize_ptr + image) != 0, solarize_threshold, solarize_from)
        r *= norm
        g *= norm
        b *= norm
        if ROUND:
            r = tl.floor(r + 0.5)
            g = tl.floor(g + 0.5)
            b = tl.floor(b + 0.5)
        r = finish_channel(r, 255.0, solarize_from, scale_r, bias_r)
        g = finish_channel(g, 255.0, solarize_from, scale_g, bias_g)
        b = finish_channel(b, 255.0, solarize_from, scale_b, bias_b)
        target, mask = _target_pixels(out_ptr, top, left, height, width, BLOCK)
        store_tile(target, r.to(OUT), mask, BLOCK)
        store_tile(target + 1, g.to(OUT), mask, BLOCK)
        store_tile(target + 2, b.to(OUT), mask, BLOCK)
    elif COPY:
        target, mask = _target_pixels(out_ptr, top, left, height, width, BLOCK)
        source = images_ptr + tile_rows(top, BLOCK) * stride_h + tile_cols(left, BLOCK) * stride_w
        for c in tl.static_range(3):
            tl.store(target + c, tl.load(source + c * stride_c, mask=mask), mask=mask)


# -------------------------------------------------------------------------------- launcher


def launch_gaussian_blur(
    images: Tensor,
    out_NHWC: Tensor,
    blur: Tensor | None,
    sigma: Tensor,
    kernel_size: Tensor,
    *,
    solarize: Tensor | None,
    solarize_threshold: float,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    bias: Sequence[float] = (0.0, 0.0, 0.0),
    copy: bool,
    round_levels: bool = False,
) -> None:
    """Start the kernel; sigma, kernel_size and masks must be on the device of the images.

    Args:
        images: [B, 3, H, W], any strides.
        out_NHWC: [B, H, W, 3], dense, written.
        blur: [B] mask of the images to blur, or None for all.
        sigma: standard deviations in pixels, [B].
        kernel_size: widths of the blur kernels in pixels, [B].
        solarize: [B] mask of the blurred images to invert, or None for none.
        solarize_threshold: smallest inverted value in levels of 255; half a level below a whole one.
        scale: factor of each channel, applied last.
        bias: added to each channel, applied last.
        copy: also write the images that are not blurred.
        round_levels: round to whole levels after the blur.
    """
    batch, _, height, width = images.shape
    extents = [(size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True)]
    if sum(extents) >= 2**31:
        images = images.contiguous(memory_format=torch.channels_last)  # offsets within an image have 32 bits
    float32 = images.dtype != torch.uint8
    with device_guard(images):
        _gaussian_blur_kernel[(batch * -(-height // BLOCK) * -(-width // BLOCK),)](
            images, out_NHWC, blur, sigma, kernel_size, solarize, *images.stride(), height, width,
            solarize_threshold, *scale, *bias,
            COPY=copy, ROUND=round_levels, FLOAT32=float32, BLOCK=BLOCK, BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS_FLOAT32 if float32 else NUM_WARPS, maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip


def gaussian_blur_cuda(images: Tensor, sigma: Tensor, kernel_size: Tensor, blur: Tensor | None) -> Tensor:
    """Blurred copy of the images, channels_last."""
    batch, _, height, width = images.shape
    out_NHWC = torch.empty((batch, height, width, 3), dtype=images.dtype, device=images.device)
    sigma, kernel_size = to_device(sigma, images.device), to_device(kernel_size, images.device)  # type: ignore[assignment]
    if out_NHWC.numel():
        bias = (0.5,) * 3 if images.dtype == torch.uint8 else (0.0,) * 3  # the conversion truncates
        blur = to_device(blur, images.device)
        launch_gaussian_blur(
            images, out_NHWC, blur, sigma, kernel_size, solarize=None, solarize_threshold=0.0, bias=bias,
            copy=blur is not None,
        )  # fmt: skip
    return out_NHWC.permute(0, 3, 1, 2)
