r"""Colour jitter, grayscale, solarize, flip, normalise and cast of uint8 images, in one launch; blurred ones in two.

The parts of the jitter are torchvision's, in the order of each sample, with gray = .2989 r + .587 g + .114 b and values
clipped after each:

    brightness clip(f x)        contrast clip(f x + (1 - f) mean(gray))        saturation clip(f x + (1 - f) gray)

The hue turns in HSV, without a division and without the hue itself. Let V and m be the largest and smallest of
(r, g, b), C = V - m. A third of a turn permutes the channels and half a turn takes each to V + m - x, so that whole
sixths cost next to nothing. There remain d sixths, |d| <= 1/2, for which

    x' = clip(x + clip(n, m + |d| C, V - |d| C) - n, m, V)

with n the next channel in the order r, g, b, r for d > 0 and the previous one for d < 0: the middle channel moves by
|d| C, and where it reaches an end of the range the rest of the way is passed on to the channel after it.

The kernel: one program per image, and two sweeps over it. The first finds the mean that the contrast needs and is
over where the contrast comes in the sample's order; the second does all the rest, reading from the second-level cache.
Which part comes when is the same for a whole program, so an order costs a branch, not a selection. Values are scaled to
0 ... 1: clipping is then part of a fused multiply-add. The samples that a blur follows are written as uint8, and the
blur's kernel finishes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from byol_kernels import photometric_reference as reference
from byol_kernels._triton import device_guard, jit, next_power_of_2, tl
from byol_kernels.blur import FLOAT_DTYPES, check_draws, check_images, launch_blur, to_device

PIXELS = 8  # of one thread: 24 bytes in, three 128-bit stores of 16-bit results
MAX_WARPS = 8
MAX_REGISTERS = 80  # three programs of 8 warps at a time; without a limit up to 112, and one program fewer
MAX_REGISTERS_STRIDED = 96

# -------------------------------------------------------------------------------- kernel


@jit
def _floor(x: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """Of 0 <= x < 2^22, by rounding down to a multiple of the last place of 2^23: FRND has an eighth of the rate."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; add.rm.f32 t, $1, 0f4B000000; sub.f32 $0, t, 0f4B000000; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505
        return tl.floor(x)


@jit
def _clipped_fma(a: tl.tensor, x: tl.tensor, t: tl.tensor, TRUNCATE: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    """clip(a x + t) to 0 ... 1, or to 0 ... 255 and whole numbers."""
    if TRUNCATE:
        return _floor(tl.minimum(tl.maximum(a * x + t, 0.0), 255.0), PTX)
    elif PTX:  # noqa: RET505 ptxas makes this of min and max, too, but not for sm_100
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, x, t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.minimum(tl.maximum(a * x + t, 0.0), 1.0)


@jit
def _gray(r: tl.tensor, g: tl.tensor, b: tl.tensor, TRUNCATE: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    gray = r * 0.2989 + g * 0.587 + b * 0.114
    if TRUNCATE:
        gray = _floor(gray, PTX)
    return gray


@jit
def _turn_hue(
    r: tl.tensor, g: tl.tensor, b: tl.tensor, sixths: tl.tensor, TRUNCATE: tl.constexpr, PTX: tl.constexpr
) -> tl.tensor:
    """The hue turned by a number of sixths of a turn; see the top of the file."""
    whole = tl.floor(sixths + 0.5)
    d = sixths - whole
    whole = whole.to(tl.int32) + 6 * 64  # the remainder of a negative number would be negative
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
    # No branch from here on, and so no plane of intermediate values that has to wait in registers for its end.
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    step = tl.abs(d) * (high - low)
    lower = low + step
    upper = high - step
    beside_r = tl.where(d >= 0.0, g, b)
    beside_g = tl.where(d >= 0.0, b, r)
    beside_b = tl.where(d >= 0.0, r, g)
    r += tl.minimum(tl.maximum(beside_r, lower), upper) - beside_r
    g += tl.minimum(tl.maximum(beside_g, lower), upper) - beside_g
    b += tl.minimum(tl.maximum(beside_b, lower), upper) - beside_b
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
    order: tl.tensor,  # two bits a part, the first lowest
    num_parts: tl.tensor,
    brightness: tl.tensor,
    contrast: tl.tensor,
    saturation: tl.tensor,
    sixths: tl.tensor,
    mean: tl.tensor,
    TRUNCATE: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tensor:
    k = 0
    while k < num_parts:
        part = (order >> (2 * k)) & 3
        if part == 3:
            r, g, b = _turn_hue(r, g, b, sixths, TRUNCATE, PTX)
        else:
            factor = tl.where(part == 0, brightness, tl.where(part == 1, contrast, saturation))
            offset = tl.where(part == 1, (1.0 - contrast) * mean, 0.0)
            a = tl.zeros_like(r) + factor
            t = tl.zeros_like(r) + offset
            if part == 2:
                t = _gray(r, g, b, TRUNCATE, PTX) * (1.0 - saturation)
            r = _clipped_fma(a, r, t, TRUNCATE, PTX)
            g = _clipped_fma(a, g, t, TRUNCATE, PTX)
            b = _clipped_fma(a, b, t, TRUNCATE, PTX)
        k += 1
    return r, g, b


@jit
def _byte(word: tl.tensor, index: tl.constexpr, TRUNCATE: tl.constexpr) -> tl.tensor:
    x = ((word >> (8 * index)) & 255).to(tl.int32).to(tl.float32)
    if not TRUNCATE:
        x *= 1.0 / 255.0
    return x


@jit
def _join8(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
) -> tl.tensor:
    """Eight [G] -> [G, 8], all in the registers of one thread."""
    joined = tl.join(tl.join(tl.join(x0, x4), tl.join(x2, x6)), tl.join(tl.join(x1, x5), tl.join(x3, x7)))
    return joined.reshape(x0.shape[0], 8)


@jit
def _split8(x: tl.tensor) -> tl.tensor:
    """[G, 8] -> eight [G]."""
    even, odd = x.reshape(x.shape[0], 2, 2, 2).split()
    x04, x26 = even.split()
    x15, x37 = odd.split()
    x0, x4 = x04.split()
    x2, x6 = x26.split()
    x1, x5 = x15.split()
    x3, x7 = x37.split()
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def _load(
    image_ptr: tl.tensor,
    groups: tl.tensor,  # of 8 pixels
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TRUNCATE: tl.constexpr,
) -> tl.tensor:
    """R, g and b of the pixels [G, 8]."""
    T: tl.constexpr = TRUNCATE
    if VECTOR:
        words_ptr = image_ptr.to(tl.pointer_type(tl.int64)) + groups * 3
        mask = groups < AREA // 8
        u = tl.load(words_ptr, mask=mask, other=0)
        v = tl.load(words_ptr + 1, mask=mask, other=0)
        w = tl.load(words_ptr + 2, mask=mask, other=0)
        r = _join8(
            _byte(u, 0, T), _byte(u, 3, T), _byte(u, 6, T), _byte(v, 1, T),
            _byte(v, 4, T), _byte(v, 7, T), _byte(w, 2, T), _byte(w, 5, T),
        )  # fmt: skip
        g = _join8(
            _byte(u, 1, T), _byte(u, 4, T), _byte(u, 7, T), _byte(v, 2, T),
            _byte(v, 5, T), _byte(w, 0, T), _byte(w, 3, T), _byte(w, 6, T),
        )  # fmt: skip
        b = _join8(
            _byte(u, 2, T), _byte(u, 5, T), _byte(v, 0, T), _byte(v, 3, T),
            _byte(v, 6, T), _byte(w, 1, T), _byte(w, 4, T), _byte(w, 7, T),
        )  # fmt: skip
    else:
        pixels = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
        mask = pixels < AREA
        at = image_ptr + (pixels // WIDTH).to(tl.int64) * stride_h + (pixels % WIDTH).to(tl.int64) * stride_w
        r = _byte(tl.load(at, mask=mask, other=0).to(tl.int32), 0, T)
        g = _byte(tl.load(at + stride_c, mask=mask, other=0).to(tl.int32), 0, T)
        b = _byte(tl.load(at + 2 * stride_c, mask=mask, other=0).to(tl.int32), 0, T)
    return r, g, b


@jit
def _store(
    out_ptr: tl.tensor,
    groups: tl.tensor,
    mirrored: tl.tensor,
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    if VECTOR:
        r0, r1, r2, r3, r4, r5, r6, r7 = _split8(r.to(OUT))
        g0, g1, g2, g3, g4, g5, g6, g7 = _split8(g.to(OUT))
        b0, b1, b2, b3, b4, b5, b6, b7 = _split8(b.to(OUT))
        mask = (groups < AREA // 8)[:, None]
        if mirrored:
            row = groups // (WIDTH // 8)
            groups = (2 * row + 1) * (WIDTH // 8) - 1 - groups
            at = out_ptr + groups[:, None] * 24 + tl.arange(0, 8)[None, :]
            tl.store(at, _join8(r7, g7, b7, r6, g6, b6, r5, g5), mask=mask)
            tl.store(at + 8, _join8(b5, r4, g4, b4, r3, g3, b3, r2), mask=mask)
            tl.store(at + 16, _join8(g2, b2, r1, g1, b1, r0, g0, b0), mask=mask)
        else:
            at = out_ptr + groups[:, None] * 24 + tl.arange(0, 8)[None, :]
            tl.store(at, _join8(r0, g0, b0, r1, g1, b1, r2, g2), mask=mask)
            tl.store(at + 8, _join8(b2, r3, g3, b3, r4, g4, b4, r5), mask=mask)
            tl.store(at + 16, _join8(g5, b5, r6, g6, b6, r7, g7, b7), mask=mask)
    else:
        pixels = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
        mask = pixels < AREA
        if mirrored:
            pixels = (2 * (pixels // WIDTH) + 1) * WIDTH - 1 - pixels
        at = out_ptr + pixels * 3
        tl.store(at, r.to(OUT), mask=mask)
        tl.store(at + 1, g.to(OUT), mask=mask)
        tl.store(at + 2, b.to(OUT), mask=mask)


@jit
def _store_finished(
    out_ptr: tl.tensor,
    groups: tl.tensor,
    mirrored: tl.tensor,
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    top: tl.tensor,
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
    r = tl.where(r >= solarize_from, top - r, r) * scale_r + bias_r
    g = tl.where(g >= solarize_from, top - g, g) * scale_g + bias_g
    b = tl.where(b >= solarize_from, top - b, b) * scale_b + bias_b
    _store(out_ptr, groups, mirrored, r, g, b, AREA, WIDTH, VECTOR)


@jit
def _photometric_kernel(
    images_ptr: tl.tensor,  # [B, 3, H, W] uint8, any strides
    out_ptr: tl.tensor,  # [B, H, W, 3]
    blurred_ptr: tl.tensor,  # [B, H, W, 3] uint8: where samples go that a blur follows, or None: there are none
    flip_ptr: tl.tensor,  # [B], or None: none; so too below
    jitter_ptr: tl.tensor,  # [B], or None: all where there are factors
    factors_ptr: tl.tensor,  # [B, 4]
    order_ptr: tl.tensor,  # [B, 4]
    grayscale_ptr: tl.tensor,  # [B]
    blur_ptr: tl.tensor,  # [B], or None: all where there is blurred_ptr
    solarize_ptr: tl.tensor,  # [B]
    stride_b: tl.tensor,
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    solarize_threshold: tl.tensor,  # scale and bias, too, for values from 0 to 1, or to 255 with TRUNCATE
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    bias_r: tl.tensor,
    bias_g: tl.tensor,
    bias_b: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,  # dense pixels, 8-byte aligned images, WIDTH a multiple of 8
    TRUNCATE: tl.constexpr,  # to whole numbers after each step, and values from 0 to 255
    PTX: tl.constexpr,  # not in the interpreter
    BLOCK: tl.constexpr,  # groups of 8 pixels at a time
) -> None:
    sample = tl.program_id(0).to(tl.int64)
    images_ptr += sample * stride_b
    out_ptr += sample * (AREA * 3)
    lanes = tl.arange(0, BLOCK)
    TOP: tl.constexpr = 255.0 if TRUNCATE else 1.0
    T: tl.constexpr = TRUNCATE

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
        before_contrast = 0
        for k in tl.static_range(4):
            part = tl.load(order_ptr + 4 * sample + k).to(tl.int32)
            order = order | (part << (2 * k))
            before_contrast = tl.where(part == 1, k, before_contrast)
        num_parts = 4
        if jitter_ptr is not None:
            num_parts = tl.where(tl.load(jitter_ptr + sample) != 0, 4, 0)
        mean = 0.0
        if (num_parts > 0) & (contrast != 1.0):
            gray_sum = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, (AREA + 7) // 8, BLOCK):
                groups = start + lanes
                r, g, b = _load(images_ptr, groups, stride_c, stride_h, stride_w, AREA, WIDTH, VECTOR, T)
                r, g, b = _jitter(
                    r, g, b, order, before_contrast, brightness, contrast, saturation, sixths, mean, T, PTX
                )
                gray_sum += tl.sum(
                    _gray(r, g, b, T, PTX), axis=1
                )  # 0 beyond the image, whatever came before the contrast
            mean = tl.sum(gray_sum) / AREA

    for start in range(0, (AREA + 7) // 8, BLOCK):
        groups = start + lanes
        r, g, b = _load(images_ptr, groups, stride_c, stride_h, stride_w, AREA, WIDTH, VECTOR, T)
        if factors_ptr is not None:
            r, g, b = _jitter(r, g, b, order, num_parts, brightness, contrast, saturation, sixths, mean, T, PTX)
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
                _store(at, groups, flip, r * LEVELS + 0.5, g * LEVELS + 0.5, b * LEVELS + 0.5, AREA, WIDTH, VECTOR)
            else:
                _store_finished(
                    out_ptr, groups, flip, r, g, b, TOP, solarize_from, scale_r, scale_g, scale_b,
                    bias_r, bias_g, bias_b, AREA, WIDTH, VECTOR,
                )  # fmt: skip


# -------------------------------------------------------------------------------- launcher


def tile_of(area: int) -> tuple[int, int]:
    """BLOCK and the number of warps for images of `area` pixels: one group of pixels a thread."""
    num_warps = min(MAX_WARPS, next_power_of_2(-(-area // (PIXELS * 32))))
    return 32 * num_warps, num_warps


def is_vector(images: Tensor) -> bool:
    """Whether groups of eight pixels are 24 bytes in a row that start at a multiple of eight."""
    _, _, height, width = images.shape
    stride_b, *strides = images.stride()
    return (
        strides == [1, 3 * width, 3]
        and width % PIXELS == 0
        and (stride_b % 8 == 0 or images.shape[0] == 1)
        and images.data_ptr() % 8 == 0
        and height > 0
    )


def _photometric_cuda(
    images: Tensor,
    flip: Tensor | None,
    jitter: Tensor | None,
    factors: Tensor | None,
    order: Tensor | None,
    grayscale: Tensor | None,
    blur: Tensor | None,
    sigma: Tensor | None,
    window: Tensor | None,
    solarize: Tensor | None,
    solarize_threshold: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    truncate: bool,
) -> Tensor:
    batch, _, height, width = images.shape
    out_NHWC = torch.empty((batch, height, width, 3), dtype=dtype, device=images.device)
    if not out_NHWC.numel():
        return out_NHWC.permute(0, 3, 1, 2)
    if blur is not None and blur.device.type == "cpu" and not bool(blur.any()):
        sigma = window = None  # one launch; not worth waiting for where the coins are on the GPU
    flip, jitter, factors, order, grayscale, blur, sigma, window, solarize = (
        to_device(draws, images.device)
        for draws in (flip, jitter, factors, order, grayscale, blur, sigma, window, solarize)
    )
    blurred = None if sigma is None else torch.empty_like(out_NHWC, dtype=torch.uint8)
    scale, bias = _normalisation(mean, std, dtype, truncate)
    top = 255.0 if truncate else 1.0
    block, num_warps = tile_of(height * width)
    vector = is_vector(images)
    with device_guard(images):
        _photometric_kernel[(batch,)](
            images, out_NHWC, blurred, flip, jitter, factors, order, grayscale, None if sigma is None else blur,
            solarize, *images.stride(), (solarize_threshold - 0.5) * top / 255.0,
            *(s * 255.0 / top for s in scale), *bias,
            AREA=height * width, WIDTH=width, VECTOR=vector, TRUNCATE=truncate, PTX=images.is_cuda,
            BLOCK=block, num_warps=num_warps, maxnreg=MAX_REGISTERS if vector else MAX_REGISTERS_STRIDED,
            enable_fp_fusion=True,
        )  # fmt: skip
    if blurred is not None:
        assert sigma is not None and window is not None
        launch_blur(
            blurred.permute(0, 3, 1, 2), out_NHWC, blur, sigma, window, solarize=solarize,
            solarize_threshold=solarize_threshold - 0.5, scale=scale, bias=bias, copy=False, round_levels=truncate,
        )  # fmt: skip
    return out_NHWC.permute(0, 3, 1, 2)


def _normalisation(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, truncate: bool
) -> tuple[list[float], list[float]]:
    """Scale and bias of each channel, for values from 0 to 255."""
    if dtype == torch.uint8:
        return [1.0] * 3, [0.5] * 3  # the conversion truncates
    std = std or (1.0,) * 3
    return [1.0 / (255.0 * s) for s in std], [-m / s for m, s in zip(mean or (0.0,) * 3, std, strict=True)]


# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::photometric",
    "(Tensor images, Tensor? flip, Tensor? jitter, Tensor? factors, Tensor? order, Tensor? grayscale, Tensor? blur,"
    " Tensor? sigma, Tensor? window, Tensor? solarize, int solarize_threshold, float[] mean, float[] std,"
    " ScalarType dtype, bool truncate) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("byol_kernels::photometric", "CPU", reference.photometric)
torch.library.impl("byol_kernels::photometric", "CUDA", _photometric_cuda)


def _photometric_fake(images: Tensor, *draws_and_options: Any) -> Tensor:
    *_, dtype, _ = draws_and_options
    return torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


torch.library.register_fake("byol_kernels::photometric", _photometric_fake)


# -------------------------------------------------------------------------------- public function


def photometric(
    images: Tensor,
    *,
    flip: Tensor | None = None,
    jitter: Tensor | None = None,
    factors: Tensor | None = None,
    order: Tensor | None = None,
    grayscale: Tensor | None = None,
    blur: Tensor | None = None,
    sigma: Tensor | None = None,
    window: Tensor | None = None,
    solarize: Tensor | None = None,
    solarize_threshold: int = 128,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.uint8,
    truncate: bool = False,
) -> Tensor:
    """The augmentation of BYOL after the crop, each sample with its own parameters.

    In the order of the paper's code (google-deepmind/deepmind-research, byol/): flip, colour jitter, grayscale, blur,
    solarize, normalise, cast. The operations are torchvision's; what is left out does not happen. On a GPU one
    launch, and a second one where samples are blurred.

    With a blur of one's own in the middle: call it with the draws up to `grayscale` for uint8 images, blur these, and
    call it again with `solarize`, `mean`, `std` and `dtype`.

    Args:
        images: [B, 3, H, W] uint8; any strides, fastest in channels_last with W a multiple of 8.
        flip: which samples to mirror left and right, [B] bool; None for none.
        jitter: which samples get the colour jitter, [B] bool; None for all, where there are `factors`.
        factors: of brightness, contrast and saturation (not negative), and the hue's shift in turns, [B, 4] float32.
        order: which of them comes first, second, ..., [B, 4] int32 or int64: a permutation of 0 ... 3 in each row.
        grayscale: which samples lose their colour, [B] bool; None for none.
        blur: which samples to blur, [B] bool; None for all, where there is a `sigma`.
        sigma: standard deviations of the blur in pixels, [B] float32, positive.
        window: widths of the blur in pixels, [B] int32 or int64, odd; see `gaussian_blur`.
        solarize: which samples are inverted at and above the threshold, [B] bool; None for none.
        solarize_threshold: in levels of 255.
        mean: to subtract from each channel, for values from 0 to 1; None with `std` for neither.
        std: to divide each channel by.
        dtype: of the result. uint8 is rounded to the nearest level; floating-point values go from 0 to 1 before `mean`
            and `std`.
        truncate: round down to whole levels after each step of the jitter and the grayscale, and to the nearest after
            the blur, as torchvision does with uint8 tensors. That darkens by up to a level a step; the paper's code
            computes in floating point.

    Returns:
        [B, 3, H, W], channels_last.

    Draws may be on the CPU and the images on a GPU: they are copied without waiting for it, and where no sample is to
    be blurred, there is one launch. Within the capture of a CUDA graph draws have to be on the GPU.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or one of two arguments that belong together.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> coins = torch.tensor([True, False])
        >>> photometric(images, flip=coins, solarize=coins, dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    what = "photometric"
    check_images(what, images, (torch.uint8,))
    coins = {"flip": flip, "jitter": jitter, "grayscale": grayscale, "blur": blur, "solarize": solarize}
    check_draws(what, images, coins, (torch.bool,))
    check_draws(what, images, {"factors": factors}, (torch.float32,), columns=4)
    check_draws(what, images, {"order": order}, (torch.int32, torch.int64), columns=4)
    check_draws(what, images, {"sigma": sigma}, (torch.float32,))
    check_draws(what, images, {"window": window}, (torch.int32, torch.int64))
    _check_pair(what, "factors", factors, "order", order, "jitter", jitter)
    _check_pair(what, "sigma", sigma, "window", window, "blur", blur)
    if dtype not in (torch.uint8, *FLOAT_DTYPES):
        raise ValueError(
            f"{what}: dtype must be torch.uint8, torch.bfloat16, torch.float16 or torch.float32, got {dtype}; "
            "convert the result with .to()"
        )
    mean, std = _checked_normalisation(what, mean, std, dtype)
    result: Tensor = torch.ops.byol_kernels.photometric(
        images, flip, jitter, factors, order, grayscale, blur, sigma, window, solarize,
        solarize_threshold, mean, std, dtype, truncate,
    )  # fmt: skip
    return result


def _check_pair(
    what: str, name: str, draws: Tensor | None, other: str, others: Tensor | None, coin: str, coins: Tensor | None
) -> None:
    if (draws is None) != (others is None) or (draws is None and coins is not None):
        missing = [n for n, x in ((name, draws), (other, others)) if x is None]
        raise ValueError(
            f"{what}: {name} and {other} must come together, and with {coin}, got no {' and no '.join(missing)}; "
            "pass all of them or none"
        )


def _checked_normalisation(
    what: str, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Mean and std as the operator takes them: three numbers each, or none."""
    if mean is None and std is None:
        return [], []
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != 3 or (name == "std" and not min(values) > 0):
            raise ValueError(
                f"{what}: {name} must be three numbers{', all positive' if name == 'std' else ''}, got {values}; "
                "pass both mean and std, for values from 0 to 1, or neither"
            )
    if dtype == torch.uint8:
        raise ValueError(
            f"{what}: dtype must be floating point with mean and std, got {dtype}; pass dtype=torch.bfloat16, say"
        )
    assert mean is not None and std is not None
    return [float(m) for m in mean], [float(s) for s in std]
