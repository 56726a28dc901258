r"""Triton kernel for color jitter, grayscale, solarize, flip, normalize and cast of uint8 images.

With gray = .2989 r + .587 g + .114 b, the adjustments of the jitter are torchvision's, in the order of each sample, and
values are clipped after each:

    brightness clip(f x)        contrast clip(f x + (1 - f) mean(gray))        saturation clip(f x + (1 - f) gray)

The hue is shifted without a division and without converting to HSV. Let V and m be the largest and the smallest of
(r, g, b), and C = V - m. A third of a turn permutes the channels, and half a turn maps each to V + m - x, so that whole
sixths cost next to nothing. There remain d sixths, |d| <= 1/2, for which

    x' = clip(x + clip(n, m + |d| C, V - |d| C) - n, m, V)

with n the next channel in the order r, g, b, r for d > 0 and the previous one for d < 0: the middle channel moves by
|d| C, and where it reaches an end of the range the rest of the way is passed on to the channel after it.

One program per image makes two sweeps over it. The first computes the mean that the contrast needs and ends where the
contrast comes in the order of the sample; the second does everything else, reading from the L2 cache. The order is the
same for a whole program, so that it costs a uniform branch. Values are scaled to 0 ... 1: clipping is then part of a
fused multiply-add. Samples that are to be blurred are written as uint8; the blur kernel solarizes and normalizes them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._images import to_device
from byol_kernels._triton import device_guard, jit, next_power_of_2, tl
from byol_kernels.blur.kernels import launch_gaussian_blur
from byol_kernels.photometric.params import PhotometricParams
from byol_kernels.photometric.pixels import finish_channel, load_pixels, store_pixels

PIXELS = 8  # per thread: 24 bytes in, three 128-bit stores of 16-bit results
MAX_WARPS = 8
MAX_REGISTERS = 80  # three programs of 8 warps at a time; without a limit up to 112, and one program fewer
MAX_REGISTERS_STRIDED = 96

# -------------------------------------------------------------------------------- kernel


@jit
def _floor(x: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """Floor of 0 <= x < 2^22.

    By adding 2^23, rounded down to its last place, and subtracting it: FRND has an eighth of the rate of an addition.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; add.rm.f32 t, $1, 0f4B000000; sub.f32 $0, t, 0f4B000000; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505
        return tl.floor(x)


@jit
def _clipped_fma(a: tl.tensor, x: tl.tensor, t: tl.tensor, TRUNCATE: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    """Clip a x + t to 0 ... 1; with TRUNCATE clip it to 0 ... 255 and round down."""
    if TRUNCATE:
        return _floor(tl.minimum(tl.maximum(a * x + t, 0.0), 255.0), PTX)
    elif PTX:  # noqa: RET505 inline, since ptxas does not fuse min and max into the FMA for sm_100
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, x, t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.minimum(tl.maximum(a * x + t, 0.0), 1.0)


@jit
def _gray(r: tl.tensor, g: tl.tensor, b: tl.tensor, TRUNCATE: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    """Luma with torchvision's weights."""
    gray = r * 0.2989 + g * 0.587 + b * 0.114
    if TRUNCATE:
        gray = _floor(gray, PTX)
    return gray


@jit
def _shift_hue(
    r: tl.tensor, g: tl.tensor, b: tl.tensor, sixths: tl.tensor, TRUNCATE: tl.constexpr, PTX: tl.constexpr
) -> tl.tensor:
    """Shift the hue by a number of sixths of a turn; see the top of the file."""
    # --- whole sixths: half a turn for odd numbers, then thirds as a permutation of the channels
    whole = tl.floor(sixths + 0.5)
    d = sixths - whole
    whole = whole.to(tl.int32) + 6 * 64  # positive, since the remainder of a negative number is negative
    if whole % 2 == 1:
        both = tl.maximum(r, tl.maximum(g, b)) + tl.minimum(r, tl.minimum(g, b))
        r = both - r
        g = both - g
        b = both - b
        whole += 3
    if whole % 6 == 2:
        r, g, b = b, r, g
    elif whole % 6 == 4:
        r, g, b = g, b, r
    # --- the remaining d sixths, without a branch: values live across one would have to wait in registers for its end
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    step = tl.abs(d) * (high - low)
    lower = low + step
    upper = high - step
    neighbor_r = tl.where(d >= 0.0, g, b)
    neighbor_g = tl.where(d >= 0.0, b, r)
    neighbor_b = tl.where(d >= 0.0, r, g)
    r += tl.minimum(tl.maximum(neighbor_r, lower), upper) - neighbor_r
    g += tl.minimum(tl.maximum(neighbor_g, lower), upper) - neighbor_g
    b += tl.minimum(tl.maximum(neighbor_b, lower), upper) - neighbor_b
    r = tl.minimum(tl.maximum(r, low), high)
    g = tl.minimum(tl.maximum(g, low), high)
    b = tl.minimum(tl.maximum(b, low), high)
    if TRUNCATE:
        r = _floor(r * (255.999 / 255), PTX)
        g = _floor(g * (255.999 / 255), PTX)
        b = _floor(b * (255.999 / 255), PTX)
    return r, g, b


@jit
def _jitter(
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    order: tl.tensor,  # two bits per adjustment, the first lowest
    num_adjustments: tl.tensor,
    brightness: tl.tensor,
    contrast: tl.tensor,
    saturation: tl.tensor,
    sixths: tl.tensor,  # of a turn of the hue
    mean: tl.tensor,  # of gray, for the contrast
    TRUNCATE: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tensor:
    """Apply the first `num_adjustments` of brightness (0), contrast (1), saturation (2) and hue (3) in `order`."""
    k = 0
    while k < num_adjustments:
        adjustment = (order >> (2 * k)) & 3  # the same for the whole program: a uniform branch
        if adjustment == 3:
            r, g, b = _shift_hue(r, g, b, sixths, TRUNCATE, PTX)
        else:
            factor = tl.where(adjustment == 0, brightness, tl.where(adjustment == 1, contrast, saturation))
            offset = tl.where(adjustment == 1, (1.0 - contrast) * mean, 0.0)
            a = tl.zeros_like(r) + factor
            t = tl.zeros_like(r) + offset
            if adjustment == 2:
                t = _gray(r, g, b, TRUNCATE, PTX) * (1.0 - saturation)
            r = _clipped_fma(a, r, t, TRUNCATE, PTX)
            g = _clipped_fma(a, g, t, TRUNCATE, PTX)
            b = _clipped_fma(a, b, t, TRUNCATE, PTX)
        k += 1
    return r, g, b


@jit
def _store_finished(
    out_ptr: tl.tensor,  # [H, W, 3]
    groups: tl.tensor,  # of 8 pixels
    mirrored: tl.tensor,
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    top: tl.tensor,  # largest value: 1, or 255
    solarize_from: tl.tensor,
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    bias_r: tl.tensor,
    bias_g: tl.tensor,
    bias_b: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Solarize, normalize and store."""
    r = finish_channel(r, top, solarize_from, scale_r, bias_r)
    g = finish_channel(g, top, solarize_from, scale_g, bias_g)
    b = finish_channel(b, top, solarize_from, scale_b, bias_b)
    store_pixels(out_ptr, groups, mirrored, r, g, b, AREA, WIDTH, VECTOR)


@jit
def _photometric_kernel(
    images_ptr: tl.tensor,  # [B, 3, H, W] uint8, any strides
    out_ptr: tl.tensor,  # [B, H, W, 3]
    blurred_ptr: tl.tensor,  # [B, H, W, 3] uint8: input of the blur, or None: nothing is blurred
    flip_ptr: tl.tensor,  # [B] mask, or None: none; likewise grayscale and solarize
    jitter_ptr: tl.tensor,  # [B] mask, or None: all if there are factors
    factors_ptr: tl.tensor,  # [B, 4], or None: no jitter
    order_ptr: tl.tensor,  # [B, 4]
    grayscale_ptr: tl.tensor,
    blur_ptr: tl.tensor,  # [B] mask, or None: all if there is blurred_ptr
    solarize_ptr: tl.tensor,
    stride_b: tl.tensor,
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    solarize_threshold: tl.tensor,  # like scale and bias for values from 0 to 1, with TRUNCATE from 0 to 255
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    bias_r: tl.tensor,
    bias_g: tl.tensor,
    bias_b: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,  # dense pixels, 8-byte aligned images, WIDTH a multiple of 8
    TRUNCATE: tl.constexpr,  # round down after each step; values go from 0 to 255 then
    PTX: tl.constexpr,  # inline assembly; False in the interpreter
    BLOCK: tl.constexpr,  # groups of 8 pixels per iteration
) -> None:
    sample = tl.program_id(0).to(tl.int64)
    images_ptr += sample * stride_b
    out_ptr += sample * (AREA * 3)
    lanes = tl.arange(0, BLOCK)
    TOP: tl.constexpr = 255.0 if TRUNCATE else 1.0
    T: tl.constexpr = TRUNCATE

    # --- parameters of the sample
    flip = False
    if flip_ptr is not None:
        flip = tl.load(flip_ptr + sample) != 0
    grayscale = False
    if grayscale_ptr is not None:
        grayscale = tl.load(grayscale_ptr + sample) != 0
    solarize_from = 2.0 * TOP
    if solarize_ptr is not None:
        solarize_from = tl.where(tl.load(solarize_ptr + sample) != 0, solarize_threshold, solarize_from)

    if factors_ptr is not None:
        brightness = tl.load(factors_ptr + 4 * sample)
        contrast = tl.load(factors_ptr + 4 * sample + 1)
        saturation = tl.load(factors_ptr + 4 * sample + 2)
        sixths = tl.load(factors_ptr + 4 * sample + 3) * 6.0
        order = 0
        before_contrast = 0  # number of adjustments that precede the contrast
        for k in tl.static_range(4):
            adjustment = tl.load(order_ptr + 4 * sample + k).to(tl.int32)
            order = order | (adjustment << (2 * k))
            before_contrast = tl.where(adjustment == 1, k, before_contrast)
        num_adjustments = 4
        if jitter_ptr is not None:
            num_adjustments = tl.where(tl.load(jitter_ptr + sample) != 0, 4, 0)

        # --- first sweep: mean of gray where the contrast comes in the order
        mean = 0.0
        if (num_adjustments > 0) & (contrast != 1.0):
            gray_sum = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, (AREA + 7) // 8, BLOCK):
                groups = start + lanes
                r, g, b = load_pixels(images_ptr, groups, stride_c, stride_h, stride_w, AREA, WIDTH, VECTOR, T)
                r, g, b = _jitter(
                    r, g, b, order, before_contrast, brightness, contrast, saturation, sixths, mean, T, PTX
                )
                # Pixels beyond the image are black, and no adjustment before the contrast changes black.
                gray_sum += tl.sum(_gray(r, g, b, T, PTX), axis=1)
            mean = tl.sum(gray_sum) / AREA

    # --- second sweep: jitter and grayscale, then the final pixels, or uint8 for the blur
    for start in range(0, (AREA + 7) // 8, BLOCK):
        groups = start + lanes
        r, g, b = load_pixels(images_ptr, groups, stride_c, stride_h, stride_w, AREA, WIDTH, VECTOR, T)
        if factors_ptr is not None:
            r, g, b = _jitter(r, g, b, order, num_adjustments, brightness, contrast, saturation, sixths, mean, T, PTX)
        if grayscale:
            gray = _gray(r, g, b, T, PTX)
            r = gray
            g = gray
            b = gray
        if blurred_ptr is None:
            _store_finished(
                out_ptr, groups, flip, r, g, b, TOP, solarize_from, scale_r, scale_g, scale_b, bias_r, bias_g, bias_b,
                AREA, WIDTH, VECTOR,
            )  # fmt: skip
        else:
            to_blur = True
            if blur_ptr is not None:
                to_blur = tl.load(blur_ptr + sample) != 0
            if to_blur:
                LEVELS: tl.constexpr = 255.0 / TOP
                at = blurred_ptr + sample * (AREA * 3)
                store_pixels(
                    at, groups, flip, r * LEVELS + 0.5, g * LEVELS + 0.5, b * LEVELS + 0.5, AREA, WIDTH, VECTOR
                )
            else:
                _store_finished(
                    out_ptr, groups, flip, r, g, b, TOP, solarize_from, scale_r, scale_g, scale_b,
                    bias_r, bias_g, bias_b, AREA, WIDTH, VECTOR,
                )  # fmt: skip


# -------------------------------------------------------------------------------- launcher


def tile_of(area: int) -> tuple[int, int]:
    """BLOCK and the number of warps for images of `area` pixels: one group of 8 pixels per thread."""
    num_warps = min(MAX_WARPS, next_power_of_2(-(-area // (PIXELS * 32))))
    return 32 * num_warps, num_warps


def is_vector(images: Tensor) -> bool:
    """True if groups of eight pixels are 24 consecutive bytes that start at a multiple of eight."""
    _, _, height, width = images.shape
    stride_b, *strides = images.stride()
    return (
        strides == [1, 3 * width, 3]
        and width % PIXELS == 0
        and (stride_b % 8 == 0 or images.shape[0] == 1)
        and images.data_ptr() % 8 == 0
        and height > 0
    )


def launch_photometric(
    images: Tensor,
    params: PhotometricParams,
    solarize_threshold: int,
    mean: Sequence[float],
    std: Sequence[float],
    truncate: bool,
    out: Tensor,
) -> None:
    """Write the augmented images to `out`, channels_last: one launch, and a second one if images are blurred."""
    batch, _, height, width = images.shape
    blur, sigma, kernel_size = params.blur, params.sigma, params.kernel_size
    if blur is not None and blur.device.type == "cpu" and not bool(blur.any()):
        blur = sigma = kernel_size = None  # saves a launch; a mask on the GPU is not worth a synchronization
    params = params._replace(blur=blur, sigma=sigma, kernel_size=kernel_size)
    p = PhotometricParams(*(to_device(param, images.device) for param in params))
    out_NHWC = out.permute(0, 2, 3, 1)
    blurred = None if p.sigma is None else torch.empty((batch, height, width, 3), dtype=torch.uint8, device=out.device)
    scale, bias = _scale_and_bias(mean, std, out.dtype)
    top = 255.0 if truncate else 1.0
    block, num_warps = tile_of(height * width)
    vector = is_vector(images)
    with device_guard(images):
        _photometric_kernel[(batch,)](
            images, out_NHWC, blurred, p.flip, p.jitter, p.factors, p.order, p.grayscale, p.blur, p.solarize,
            *images.stride(), (solarize_threshold - 0.5) * top / 255.0, *(s * 255.0 / top for s in scale), *bias,
            AREA=height * width, WIDTH=width, VECTOR=vector, TRUNCATE=truncate, PTX=images.is_cuda,
            BLOCK=block, num_warps=num_warps, maxnreg=MAX_REGISTERS if vector else MAX_REGISTERS_STRIDED,
            enable_fp_fusion=True,
        )  # fmt: skip
    if blurred is not None:
        assert p.sigma is not None and p.kernel_size is not None
        launch_gaussian_blur(
            blurred.permute(0, 3, 1, 2), out_NHWC, p.blur, p.sigma, p.kernel_size, solarize=p.solarize,
            solarize_threshold=solarize_threshold - 0.5, scale=scale, bias=bias, copy=False, round_levels=truncate,
        )  # fmt: skip


def _scale_and_bias(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Scale and bias of each channel, for values from 0 to 255."""
    if dtype == torch.uint8:
        return [1.0] * 3, [0.5] * 3  # the conversion truncates
    std = std or (1.0,) * 3
    return [1.0 / (255.0 * s) for s in std], [-m / s for m, s in zip(mean or (0.0,) * 3, std, strict=True)]
