"""The photometric operator in plain PyTorch, one image at a time: the CPU path above 64 px and the reference.

The planes of one image stay in the L2 cache. Operations write into scratch memory that is allocated once per batch: a
new tensor of this size costs more in page faults than in arithmetic. Channels are planes only where colors mix; blur,
solarize and normalize work on rows of interleaved pixels and need no transposition.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels.blur.reference import BlurScratch, blur_rows_, kernel_radii, mask_list, round_to_uint8
from byol_kernels.photometric.params import BRIGHTNESS, CONTRAST, HUE, PhotometricParams

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
"""torchvision's."""
_HUE_TRUNCATION = 255.999 / 255  # torchvision's scale for the conversion to uint8 within adjust_hue


def photometric(
    images: Tensor,
    params: PhotometricParams,
    solarize_threshold: int,
    mean: Sequence[float],
    std: Sequence[float],
    truncate: bool,
    out: Tensor,
) -> None:
    """Write the augmented images [B, 3, H, W] to `out`, channels_last; see `ops.py`."""
    batch, _, height, width = images.shape
    out_NHWC = out.permute(0, 2, 3, 1)
    to_flip, to_gray, to_solarize = (
        mask_list(mask, batch, default=False) for mask in (params.flip, params.grayscale, params.solarize)
    )
    to_jitter = mask_list(params.jitter, batch, default=params.factors is not None)
    to_blur = mask_list(params.blur, batch, default=params.sigma is not None)
    factors, order, sigmas = (
        [] if values is None else values.tolist() for values in (params.factors, params.order, params.sigma)
    )
    radii = [] if params.kernel_size is None else kernel_radii(params.kernel_size)
    scale_row, bias_row = _scale_and_bias_rows(mean, std, width)
    scratch, blur_scratch = _Scratch(height, width), BlurScratch(height, width, max(radii, default=0))

    for i in range(batch):
        image_HWC, out_HWC = images[i].permute(1, 2, 0), out_NHWC[i]
        if to_flip[i]:
            image_HWC = image_HWC.flip(1)
        has_color, has_rest = to_jitter[i] or to_gray[i], to_blur[i] or to_solarize[i] or out.dtype != torch.uint8
        if not (has_color or has_rest):
            out_HWC.copy_(image_HWC)
            continue

        # --- jitter and grayscale, on planes
        if has_color:
            adjustments = [(adjustment, factors[i][adjustment]) for adjustment in order[i]] if to_jitter[i] else []
            x = _color(image_HWC, scratch, adjustments, to_gray[i], truncate)
            if not has_rest:
                torch.stack(round_to_uint8(x).expand(3, -1).view(3, height, width).unbind(), dim=2, out=out_HWC)
                continue
            image_HWC = x.view(-1, height, width).permute(1, 2, 0)

        # --- blur, solarize and normalize, on rows of interleaved pixels
        scratch.pixels.copy_(image_HWC)
        rows = scratch.pixels.view(height, -1)
        if to_blur[i]:
            if has_color and not truncate:
                rows.round_()  # the kernels pass a blurred sample between their two launches as uint8
            blur_rows_(rows, blur_scratch, sigmas[i], radii[i])
            if truncate:
                rows.round_()
        if to_solarize[i]:
            _solarize_(rows, scratch, solarize_threshold)
        if out.dtype == torch.uint8:
            rows = round_to_uint8(rows)
        else:
            rows.mul_(scale_row).add_(bias_row)
        out_HWC.view(height, -1).copy_(rows)


class _Scratch:
    """Memory for one float32 image in each layout that it takes, reused for all images of a batch."""

    def __init__(self, height: int, width: int) -> None:
        def new(*shape: int) -> Tensor:  # explicit: the defaults of torch may be others
            return torch.empty(shape, dtype=torch.float32, device="cpu")

        self.pixels = new(height, width, 3)
        self.planes, self.other_planes = new(2, 3, height * width).unbind()
        self.plane, self.high, self.low, self.upper, self.lower = new(5, height * width).unbind()


# -------------------------------------------------------------------------------- colors


def _color(
    image_HWC: Tensor, scratch: _Scratch, adjustments: Sequence[tuple[int, float]], to_gray: bool, truncate: bool
) -> Tensor:
    """Apply adjustments with their factors, then grayscale; planes [3, HW], or [1, HW] of gray, from 0 to 255."""
    x = scratch.planes
    x.view(3, *image_HWC.shape[:2]).copy_(image_HWC.permute(2, 0, 1))
    for adjustment, factor in adjustments:
        if adjustment == HUE:
            x = _shift_hue(x, scratch, factor)
            if truncate:
                x.mul_(_HUE_TRUNCATION)
        elif adjustment == BRIGHTNESS:
            x.mul_(factor)
        else:
            gray = _gray(x, scratch.plane)
            if truncate:
                gray.floor_()
            other = gray.mean() if adjustment == CONTRAST else gray
            torch.add(other.mul_(1.0 - factor), x, alpha=factor, out=x)
        if adjustment != HUE and not 0.0 <= factor <= 1.0:  # otherwise a convex combination of values in range
            x.clamp_(0.0, 255.0)
        if truncate:
            x.floor_()
    if not to_gray:
        return x
    gray = _gray(x, scratch.plane)
    return (gray.floor_() if truncate else gray)[None]


def _gray(x: Tensor, out: Tensor) -> Tensor:
    torch.mul(x[0], GRAY_WEIGHTS[0], out=out).add_(x[1], alpha=GRAY_WEIGHTS[1]).add_(x[2], alpha=GRAY_WEIGHTS[2])
    return out


def _shift_hue(x: Tensor, scratch: _Scratch, turns: float) -> Tensor:
    """Hue shifted by a number of turns; see `kernels.py` for the formula. Overwrites x."""
    # --- whole sixths: half a turn for odd numbers; the permutation of thirds is in the indices below
    whole = math.floor(6.0 * turns + 0.5)
    quotient, d = whole % 6, 6.0 * turns - whole
    high, low, upper, lower = scratch.high, scratch.low, scratch.upper, scratch.lower
    torch.maximum(torch.maximum(x[0], x[1], out=high), x[2], out=high)
    torch.minimum(torch.minimum(x[0], x[1], out=low), x[2], out=low)
    if quotient % 2:
        torch.sub(torch.add(high, low, out=upper), x, out=x)
    shift = (quotient - 3 * (quotient % 2)) % 6 // 2

    # --- the remaining d sixths
    torch.lerp(low, high, abs(d), out=lower)
    torch.lerp(high, low, abs(d), out=upper)
    step = 1 if d >= 0 else -1
    out = scratch.other_planes if x is scratch.planes else scratch.planes
    for c in range(3):
        this, neighbor = x[(c - shift) % 3], x[(c - shift + step) % 3]
        moved = torch.clamp(neighbor, lower, upper, out=out[c]).sub_(neighbor).add_(this)
        torch.clamp(moved, low, high, out=moved)
    return out


# -------------------------------------------------------------------------------- solarize, normalize


def _solarize_(rows: Tensor, scratch: _Scratch, threshold: int) -> None:
    """Invert values of at least the threshold; a value that rounds up to the threshold counts as reaching it."""
    mask, inverse = (planes.view(rows.shape) for planes in (scratch.planes, scratch.other_planes))
    torch.ge(rows, threshold - 0.5, out=mask)
    torch.mul(rows, -2.0, out=inverse).add_(255.0)
    rows.addcmul_(mask, inverse)


def _scale_and_bias_rows(mean: Sequence[float], std: Sequence[float], width: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of a row of pixels; without mean and std, to the range 0 ... 1."""
    std = std or (1.0, 1.0, 1.0)
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], dtype=torch.float32, device="cpu")
    shift = [-m / s for m, s in zip(mean or (0.0, 0.0, 0.0), std, strict=True)]
    bias = torch.tensor(shift, dtype=torch.float32, device="cpu")
    return scale.repeat(width), bias.repeat(width)
