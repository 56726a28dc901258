r"""Gaussian blur of RGB images, with the standard deviation and the window of each.

    out = (t_v X) t_h        t[i, j] = exp(-(i - j)^2 / (2 sigma^2)) / sum        for |i - j| <= window // 2

The borders are mirrored without repeating the outermost pixel, as in `torchvision.transforms.GaussianBlur`.

The kernel: one program per 32 x 32 pixels of one image. Both passes are products with banded Toeplitz matrices, made in
registers and multiplied on the tensor cores 16 pixels at a time, as many times as the sample's own window asks for. An
intermediate image is never written. For uint8 images the factors are float16: pixels are exact in it, and the weights
are divided by the sum of their rounded values, so that a flat image stays as it is. For others they are float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels import photometric_reference as reference
from byol_kernels._triton import device_guard, jit, tl

BLOCK = 32
BLOCK_K = 16
NUM_WARPS = 2  # each of them 16 of the rows: with more, Triton has some repeat the others' work on the tensor cores
NUM_WARPS_FLOAT32 = 4
MAX_REGISTERS = 192
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# -------------------------------------------------------------------------------- kernel


@jit
def _reflect(index: tl.tensor, length: tl.tensor) -> tl.tensor:
    period = tl.maximum(2 * (length - 1), 1)
    index = tl.abs(index) % period
    return tl.minimum(index, period - index)


@jit
def _gauss(distance: tl.tensor, radius: tl.tensor, falloff: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Weights before they are divided by their sum, 1 in the middle."""
    square = (distance * distance).to(tl.float32)
    return tl.where(tl.abs(distance) <= radius, tl.exp(square * falloff), 0.0).to(DTYPE)


@jit
def _finish_pixel(
    x: tl.tensor, solarize_from: tl.tensor, scale: tl.tensor, bias: tl.tensor, ROUND: tl.constexpr
) -> tl.tensor:
    if ROUND:
        x = tl.floor(x + 0.5)
    return tl.where(x >= solarize_from, 255.0 - x, x) * scale + bias


@jit
def _gaussian_blur_kernel(
    images_ptr: tl.tensor,  # [B, 3, H, W], any strides
    out_ptr: tl.tensor,  # [B, H, W, 3]
    blur_ptr: tl.tensor,  # [B], or None: all
    sigma_ptr: tl.tensor,  # [B]
    window_ptr: tl.tensor,  # [B]
    solarize_ptr: tl.tensor,  # [B], or None: none
    stride_b: tl.tensor,
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    solarize_threshold: tl.tensor,
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    bias_r: tl.tensor,
    bias_g: tl.tensor,
    bias_b: tl.tensor,
    COPY: tl.constexpr,  # write the images that are not blurred, too
    ROUND: tl.constexpr,  # to whole levels, before solarize
    FLOAT32: tl.constexpr,  # factors of the products: float32, or float16
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Tiles of one image lie next to one another in time: their borders overlap in the cache.
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
        sigma = tl.load(sigma_ptr + image)
        falloff = -0.5 / (sigma * sigma)
        radius = tl.maximum(tl.load(window_ptr + image).to(tl.int32), 0) // 2
        steps = tl.arange(0, BLOCK_K)
        total = 0.0
        start = -radius
        while start <= radius:
            total += tl.sum(_gauss(start + steps, radius, falloff, DTYPE).to(tl.float32), axis=0)
            start += BLOCK_K
        norm = 1.0 / total

        r = tl.zeros((BLOCK, BLOCK), tl.float32)
        g = tl.zeros((BLOCK, BLOCK), tl.float32)
        b = tl.zeros((BLOCK, BLOCK), tl.float32)
        across = left - radius
        while across < left + BLOCK + radius:
            in_cols = across + steps
            source = images_ptr + _reflect(in_cols, width)[None, :] * stride_w
            column_r = tl.zeros((BLOCK, BLOCK_K), tl.float32)
            column_g = tl.zeros((BLOCK, BLOCK_K), tl.float32)
            column_b = tl.zeros((BLOCK, BLOCK_K), tl.float32)
            down = top - radius
            while down < top + BLOCK + radius:
                in_rows = down + steps
                at = source + _reflect(in_rows, height)[:, None] * stride_h
                weight_v = _gauss(rows[:, None] - in_rows[None, :], radius, falloff, DTYPE)
                column_r = tl.dot(weight_v, tl.load(at).to(DTYPE), column_r, input_precision="ieee")
                column_g = tl.dot(weight_v, tl.load(at + stride_c).to(DTYPE), column_g, input_precision="ieee")
                column_b = tl.dot(weight_v, tl.load(at + 2 * stride_c).to(DTYPE), column_b, input_precision="ieee")
                down += BLOCK_K
            weight_h = _gauss(in_cols[:, None] - cols[None, :], radius, falloff, DTYPE)
            r = tl.dot((column_r * norm).to(DTYPE), weight_h, r, input_precision="ieee")
            g = tl.dot((column_g * norm).to(DTYPE), weight_h, g, input_precision="ieee")
            b = tl.dot((column_b * norm).to(DTYPE), weight_h, b, input_precision="ieee")
            across += BLOCK_K

        solarize_from = float("inf")
        if solarize_ptr is not None:
            solarize_from = tl.where(tl.load(solarize_ptr + image) != 0, solarize_threshold, solarize_from)
        r = _finish_pixel(r * norm, solarize_from, scale_r, bias_r, ROUND)
        g = _finish_pixel(g * norm, solarize_from, scale_g, bias_g, ROUND)
        b = _finish_pixel(b * norm, solarize_from, scale_b, bias_b, ROUND)
        mask = (rows < height)[:, None] & (cols < width)[None, :]
        target = out_ptr + (rows[:, None] * width + cols[None, :]) * 3
        tl.store(target, r.to(OUT), mask=mask)
        tl.store(target + 1, g.to(OUT), mask=mask)
        tl.store(target + 2, b.to(OUT), mask=mask)
    elif COPY:
        source = images_ptr + rows[:, None] * stride_h + cols[None, :] * stride_w
        mask = (rows < height)[:, None] & (cols < width)[None, :]
        target = out_ptr + (rows[:, None] * width + cols[None, :]) * 3
        for c in tl.static_range(3):
            tl.store(target + c, tl.load(source + c * stride_c, mask=mask), mask=mask)


# -------------------------------------------------------------------------------- launcher


def launch_blur(
    images: Tensor,
    out_NHWC: Tensor,
    blur: Tensor | None,
    sigma: Tensor,
    window: Tensor,
    *,
    solarize: Tensor | None = None,
    solarize_threshold: float = 0.0,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    bias: Sequence[float] = (0.0, 0.0, 0.0),
    copy: bool,
    round_levels: bool = False,
) -> None:
    """Starts the kernel; draws lie on the device of the images.

    Args:
        images: [B, 3, H, W], any strides.
        out_NHWC: where to write, dense.
        blur: which images, or None for all.
        sigma: standard deviations.
        window: widths of the windows.
        solarize: which of the blurred images are inverted from a threshold on, or None for none.
        solarize_threshold: the threshold; half a level less than a whole one.
        scale: of each channel, at the end.
        bias: of each channel, at the end.
        copy: also write the images that are not blurred.
        round_levels: round to whole levels after the blur.
    """
    batch, _, height, width = images.shape
    if (
        sum((size - 1) * abs(stride) for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True))
        >= 2**31
    ):
        images = images.contiguous(memory_format=torch.channels_last)  # offsets within an image have 32 bits
    float32 = images.dtype != torch.uint8
    with device_guard(images):
        _gaussian_blur_kernel[(batch * -(-height // BLOCK) * -(-width // BLOCK),)](
            images, out_NHWC, blur, sigma, window, solarize, *images.stride(), height, width,
            solarize_threshold, *scale, *bias,
            COPY=copy, ROUND=round_levels, FLOAT32=float32, BLOCK=BLOCK, BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS_FLOAT32 if float32 else NUM_WARPS, maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip


def to_device(draws: Tensor | None, device: torch.device) -> Tensor | None:
    """Drawn parameters where the kernels read them, dense; from the CPU without waiting for the device."""
    return None if draws is None else draws.to(device, non_blocking=True).contiguous()


def _gaussian_blur_cuda(images: Tensor, sigma: Tensor, window: Tensor, blur: Tensor | None) -> Tensor:
    batch, _, height, width = images.shape
    out_NHWC = torch.empty((batch, height, width, 3), dtype=images.dtype, device=images.device)
    sigma, window = to_device(sigma, images.device), to_device(window, images.device)  # type: ignore[assignment]
    if out_NHWC.numel():
        bias = (0.5,) * 3 if images.dtype == torch.uint8 else (0.0,) * 3  # the conversion truncates
        launch_blur(images, out_NHWC, to_device(blur, images.device), sigma, window, bias=bias, copy=blur is not None)
    return out_NHWC.permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::gaussian_blur",
    "(Tensor images, Tensor sigma, Tensor window, Tensor? blur) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("byol_kernels::gaussian_blur", "CPU", reference.gaussian_blur)
torch.library.impl("byol_kernels::gaussian_blur", "CUDA", _gaussian_blur_cuda)


def _gaussian_blur_fake(images: Tensor, sigma: Tensor, window: Tensor, blur: Tensor | None) -> Tensor:
    return torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _refuse_backward(ctx: object, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "gaussian_blur: images must not require a gradient, got a backward pass; "
        "detach them, or blur with torch.nn.functional.conv2d"
    )


torch.library.register_fake("byol_kernels::gaussian_blur", _gaussian_blur_fake)
torch.library.register_autograd("byol_kernels::gaussian_blur", _refuse_backward)


# -------------------------------------------------------------------------------- public function


def gaussian_blur(images: Tensor, sigma: Tensor, window: Tensor, *, blur: Tensor | None = None) -> Tensor:
    """Blurs each image with its own Gaussian: `torchvision.transforms.GaussianBlur`, drawn per sample.

    The window of sample b reaches window[b] // 2 pixels to each side; its weights exp(-k^2 / (2 sigma^2)) sum to 1.
    Borders are mirrored. The arithmetic is in float32 (on a GPU, for uint8 images, with factors in float16: at most one
    level of 255 from it), and uint8 results are rounded to the nearest level. One launch on a GPU.

    Args:
        images: [B, 3, H, W], uint8, bfloat16, float16 or float32, any strides.
        sigma: standard deviations in pixels, [B] float32, positive.
        window: widths in pixels, [B] int32 or int64, odd. 1 changes nothing.
        blur: which samples to blur, [B] bool; the others are copied. None blurs all.

    Returns:
        The blurred images, same dtype, channels_last.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit.
        RuntimeError: in a backward pass through it.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> gaussian_blur(images, torch.tensor([0.5, 2.0]), torch.tensor([5, 13])).shape
        torch.Size([2, 3, 8, 8])
    """
    what = "gaussian_blur"
    check_images(what, images, (torch.uint8, *FLOAT_DTYPES))
    check_draws(what, images, {"sigma": sigma}, (torch.float32,))
    check_draws(what, images, {"window": window}, (torch.int32, torch.int64))
    check_draws(what, images, {"blur": blur}, (torch.bool,))
    result: Tensor = torch.ops.byol_kernels.gaussian_blur(images, sigma, window, blur)
    return result


def check_images(what: str, images: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises a ValueError unless `images` is a batch of RGB images of one of the dtypes."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{what}: images must be [batch, 3, height, width], got shape {tuple(images.shape)}; "
            "an NHWC batch becomes one with .permute(0, 3, 1, 2), without a copy"
        )
    if images.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{what}: images must be {names}, got {images.dtype}; convert them with .to({dtypes[0]})")


def check_draws(
    what: str, images: Tensor, draws: dict[str, Tensor | None], dtypes: tuple[torch.dtype, ...], columns: int = 0
) -> None:
    """Raises a ValueError unless each draw has one row a sample, one of the dtypes, and a device that can be read."""
    shape = (images.shape[0], columns) if columns else (images.shape[0],)
    for name, draw in draws.items():
        if draw is None:
            continue
        if tuple(draw.shape) != shape:
            raise ValueError(
                f"{what}: {name} must have shape {shape}, got {tuple(draw.shape)}; draw one for each image"
            )
        if draw.dtype not in dtypes:
            names = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{what}: {name} must be {names}, got {draw.dtype}; convert it with .to({dtypes[0]})")
        if draw.device not in (images.device, torch.device("cpu")):
            raise ValueError(
                f"{what}: {name} must be on the device of images, {images.device}, or on the CPU, got {draw.device}; "
                f"move it with .to('{images.device}')"
            )
