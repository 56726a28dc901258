r"""Crops of uint8 RGB images, resized: the random resized crop of a whole batch, from a data set that lies on a GPU.

An output pixel is a weighted mean of the crop's pixels under a filter f that widens where the crop shrinks:

    out = (t_v X) t_h        t[i, k] = f((k + 1/2 - (i + 1/2) s) / max(s, 1)) / sum        s = crop size / output size

f is Keys' cubic with a = -1/2, or a triangle: what PIL does, and PyTorch's `interpolate(antialias=True)`. Pixels beyond
the crop do not count, though the image may go on there: as if it had been cut out first.

The kernel: one program per 32 x 32 pixels of one sample. Both passes are products with banded matrices that are made in
registers, 16 pixels at a time, and an intermediate image is never written; as in `blur.py`. Factors are float32: a
data set that fits on a GPU has small images, and float16 would cost the last bit.
"""

from typing import Literal

import torch
from torch import Tensor

from byol_kernels._triton import device_guard, jit, tl
from byol_kernels.blur import check_images

BLOCK = 32
BLOCK_K = 16
NUM_WARPS = 4
MAX_REGISTERS = 192
REACH = {"bilinear": 1, "bicubic": 2}
"""How far a filter reaches to each side, in pixels of the output or of the crop, whichever are larger."""

# -------------------------------------------------------------------------------- kernel


@jit
def _weight(distance: tl.tensor, REACH: tl.constexpr) -> tl.tensor:
    """The filter before it is divided by its sum, at a distance in units of its width."""
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
    index_ptr: tl.tensor,  # [B], or None: N = B and each sample has an image of its own
    window_ptr: tl.tensor,  # [B, 4]: top, left, height, width
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
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    tile = tl.program_id(0) % (TILES * TILES)
    image = sample
    if index_ptr is not None:
        image = tl.load(index_ptr + sample).to(tl.int64)
    top = tl.load(window_ptr + 4 * sample).to(tl.int64)
    left = tl.load(window_ptr + 4 * sample + 1).to(tl.int64)
    height = tl.load(window_ptr + 4 * sample + 2).to(tl.int32)
    width = tl.load(window_ptr + 4 * sample + 3).to(tl.int32)
    images_ptr += image * stride_n + top * stride_h + left * stride_w

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
    # The rows and columns of the crop that the tile draws on; an end beyond the output only costs time.
    first_row = tl.maximum(tl.ceil(tl.min(center_v, axis=0) - reach_v).to(tl.int32), 0)
    first_col = tl.maximum(tl.ceil(tl.min(center_h, axis=0) - reach_h).to(tl.int32), 0)
    end_row = tl.minimum(tl.floor(tl.max(center_v, axis=0) + reach_v).to(tl.int32) + 1, height)
    end_col = tl.minimum(tl.floor(tl.max(center_h, axis=0) + reach_h).to(tl.int32) + 1, width)

    steps = tl.arange(0, BLOCK_K)
    r = tl.zeros((BLOCK, BLOCK), tl.float32)
    g = tl.zeros((BLOCK, BLOCK), tl.float32)
    b = tl.zeros((BLOCK, BLOCK), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_h = tl.zeros((BLOCK,), tl.float32)
    across = first_col
    while across < end_col:
        in_cols = across + steps
        column_r = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        column_g = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        column_b = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        sum_v = tl.zeros((BLOCK,), tl.float32)
        down = first_row
        while down < end_row:
            in_rows = down + steps
            inside = (in_rows < height)[:, None] & (in_cols < width)[None, :]
            at = images_ptr + in_rows[:, None] * stride_h + in_cols[None, :] * stride_w
            weight_v = _weight((in_rows[None, :].to(tl.float32) - center_v[:, None]) * narrow_v, REACH)
            weight_v = tl.where((in_rows < height)[None, :], weight_v, 0.0)
            sum_v += tl.sum(weight_v, axis=1)
            x_r = tl.load(at, mask=inside, other=0).to(tl.float32)
            x_g = tl.load(at + stride_c, mask=inside, other=0).to(tl.float32)
            x_b = tl.load(at + 2 * stride_c, mask=inside, other=0).to(tl.float32)
            column_r = tl.dot(weight_v, x_r, column_r, input_precision="ieee")
            column_g = tl.dot(weight_v, x_g, column_g, input_precision="ieee")
            column_b = tl.dot(weight_v, x_b, column_b, input_precision="ieee")
            down += BLOCK_K
        weight_h = _weight((in_cols[:, None].to(tl.float32) - center_h[None, :]) * narrow_h, REACH)
        weight_h = tl.where((in_cols < width)[:, None], weight_h, 0.0)
        sum_h += tl.sum(weight_h, axis=0)
        r = tl.dot(column_r, weight_h, r, input_precision="ieee")
        g = tl.dot(column_g, weight_h, g, input_precision="ieee")
        b = tl.dot(column_b, weight_h, b, input_precision="ieee")
        across += BLOCK_K

    norm = 1.0 / (sum_v[:, None] * sum_h[None, :])
    mask = (rows < SIZE)[:, None] & (cols < SIZE)[None, :]
    target = out_ptr + sample * (SIZE * SIZE * 3) + (rows[:, None] * SIZE + cols[None, :]) * 3
    # The conversion truncates.
    tl.store(target, (tl.minimum(tl.maximum(r * norm, 0.0), 255.0) + 0.5).to(tl.uint8), mask=mask)
    tl.store(target + 1, (tl.minimum(tl.maximum(g * norm, 0.0), 255.0) + 0.5).to(tl.uint8), mask=mask)
    tl.store(target + 2, (tl.minimum(tl.maximum(b * norm, 0.0), 255.0) + 0.5).to(tl.uint8), mask=mask)


# -------------------------------------------------------------------------------- launcher


def _resized_crop_cuda(images: Tensor, index: Tensor | None, window: Tensor, size: int, reach: int) -> Tensor:
    batch = window.shape[0]
    out_NHWC = torch.empty((batch, size, size, 3), dtype=torch.uint8, device=images.device)
    if batch:
        with device_guard(images):
            _resized_crop_kernel[(batch * (-(-size // BLOCK)) ** 2,)](
                images, index, window.contiguous(), out_NHWC, *images.stride(),
                SIZE=size, REACH=reach, BLOCK=BLOCK, BLOCK_K=BLOCK_K,
                num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
            )  # fmt: skip
    return out_NHWC.permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------- reference: what runs on the CPU


def _resized_crop_cpu(images: Tensor, index: Tensor | None, window: Tensor, size: int, reach: int) -> Tensor:
    """One image at a time by PyTorch's own antialiased resize, which is vectorised for channels_last uint8."""
    batch, (height, width) = window.shape[0], images.shape[2:]
    out = torch.empty((batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    numbers = range(batch) if index is None else index.tolist()
    mode = "bicubic" if reach == REACH["bicubic"] else "bilinear"
    for row, (i, (top, left, h, w)) in enumerate(zip(numbers, window.tolist(), strict=True)):
        if not (0 <= i < len(images) and 0 <= top < top + h <= height and 0 <= left < left + w <= width):
            raise ValueError(
                f"resized_crop: window must lie within an image of {height} x {width} pixels, one of {len(images)}, "
                f"got top {top}, left {left}, height {h}, width {w} of image {i}; draw it for images of this size"
            )
        # A slice of the batch and not an image: only with its stride PyTorch sees that channels are innermost.
        crop = images[i : i + 1, :, top : top + h, left : left + w]
        out[row] = torch.nn.functional.interpolate(crop, (size, size), mode=mode, antialias=True)[0]
    return out


# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::resized_crop",
    "(Tensor images, Tensor? index, Tensor window, int size, int reach) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("byol_kernels::resized_crop", "CPU", _resized_crop_cpu)
torch.library.impl("byol_kernels::resized_crop", "CUDA", _resized_crop_cuda)


def _resized_crop_fake(images: Tensor, index: Tensor | None, window: Tensor, size: int, reach: int) -> Tensor:
    out_NHWC = images.new_empty((window.shape[0], size, size, 3), dtype=torch.uint8)
    return out_NHWC.permute(0, 3, 1, 2)


torch.library.register_fake("byol_kernels::resized_crop", _resized_crop_fake)


# -------------------------------------------------------------------------------- public function


def resized_crop(
    images: Tensor,
    window: Tensor,
    size: int,
    *,
    index: Tensor | None = None,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Crops of images, each resized to a square with an antialiased filter: one launch on a GPU.

    On the CPU it is torchvision's `resized_crop` of uint8 tensors, which rounds to levels between its two passes; on a
    GPU there is one rounding, at the end.

    Args:
        images: [N, 3, H, W] uint8, any strides.
        window: top, left, height and width of each sample's crop in pixels, [B, 4] int32 or int64, on the device of
            the images. Crops have at least one pixel and lie within the image (on a GPU nobody checks).
        size: height and width of the result in pixels.
        index: which image each sample is cut from, [B] int32 or int64 on the same device; None: N = B, and each from
            its own.
        interpolation: the filter.

    Returns:
        [B, 3, size, size] uint8, channels_last.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit; on the CPU also on a window that lies outside.

    Example:
        >>> images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        >>> window = torch.tensor([[0, 0, 16, 16], [8, 4, 24, 20]])
        >>> resized_crop(images, window, 28, index=torch.tensor([4, 0])).shape
        torch.Size([2, 3, 28, 28])
    """
    what = "resized_crop"
    check_images(what, images, (torch.uint8,))
    if interpolation not in REACH:
        raise ValueError(f"{what}: interpolation must be bicubic or bilinear, got {interpolation!r}")
    if size < 1:
        raise ValueError(f"{what}: size must be at least 1, got {size}")
    batch = images.shape[0] if index is None else index.shape[0]
    for name, numbers, shape in (("window", window, (batch, 4)), ("index", index, (batch,))):
        if numbers is None:
            continue
        if tuple(numbers.shape) != shape:
            raise ValueError(
                f"{what}: {name} must have shape {shape}, got {tuple(numbers.shape)}; give one row for each sample"
            )
        if numbers.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{what}: {name} must be int32 or int64, got {numbers.dtype}; convert it with .to()")
        if numbers.device != images.device:
            raise ValueError(
                f"{what}: {name} must be on the device of images, {images.device}, got {numbers.device}; "
                f"move it with .to('{images.device}')"
            )
    result: Tensor = torch.ops.byol_kernels.resized_crop(images, index, window, size, REACH[interpolation])
    return result
