"""The photometric operators in plain PyTorch: what runs on the CPU.

One image at a time, so that its planes stay in the second-level cache, by operations that write into scratch made
once a batch: a fresh tensor of this size costs more in page faults than in arithmetic. Channels are planes only where
colours mix; blur, solarize and normalise work on rows of interleaved pixels and skip the transposition.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The numbers of the jitter's parts in `order`."""

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights
_HUE_TRUNCATION = 255.999 / 255  # torchvision's way back to uint8 within adjust_hue


def photometric(
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
    """Flip, jitter, grayscale, blur, solarize, normalise and cast; see `photometric.py`."""
    batch, _, height, width = images.shape
    out_NHWC = images.new_empty((batch, height, width, 3), dtype=dtype)
    to_flip, to_gray, to_solarize = (_coins(coin, batch, False) for coin in (flip, grayscale, solarize))
    to_jitter, to_blur = _coins(jitter, batch, factors is not None), _coins(blur, batch, sigma is not None)
    factor_rows = [] if factors is None else factors.tolist()
    order_rows = [] if order is None else order.tolist()
    sigmas = [] if sigma is None else sigma.tolist()
    radii = [] if window is None else _radii(window)
    scale_row, bias_row = _normalisation(mean, std, width)
    scratch = _Scratch(height, width, max(radii, default=0))

    for i in range(batch):
        image_HWC = images[i].permute(1, 2, 0)
        if to_flip[i]:
            image_HWC = image_HWC.flip(1)
        colour = to_jitter[i] or to_gray[i]
        if dtype == torch.uint8 and not (colour or to_blur[i] or to_solarize[i]):
            out_NHWC[i] = image_HWC
            continue
        x_HWC = scratch.pixels
        if colour:
            x = scratch.planes
            x.view(3, height, width).copy_(image_HWC.permute(2, 0, 1))
            if to_jitter[i]:
                x = _jitter(x, scratch, factor_rows[i], order_rows[i], truncate)
            if to_gray[i]:
                gray = _gray(x, scratch.plane)
                x = (gray.floor_() if truncate else gray)[None]
            if dtype == torch.uint8 and not (to_blur[i] or to_solarize[i]):
                torch.stack(_to_levels(x).expand(3, -1).view(3, height, width).unbind(), dim=2, out=out_NHWC[i])
                continue
            x_HWC.permute(2, 0, 1).copy_(x.view(-1, height, width))
        else:
            x_HWC.copy_(image_HWC)
        rows = x_HWC.view(height, -1)
        if to_blur[i]:
            if colour and not truncate:
                rows.round_()  # a blurred sample passes between the two launches of the kernels as uint8
            rows = _blur_rows(rows, scratch, sigmas[i], radii[i])
            if truncate:
                rows.round_()
        if to_solarize[i]:
            _solarize_(rows, scratch, solarize_threshold)
        if dtype == torch.uint8:
            out_NHWC[i].view(height, -1).copy_(_to_levels(rows))
        else:
            out_NHWC[i].view(height, -1).copy_(rows.mul_(scale_row).add_(bias_row))
    return out_NHWC.permute(0, 3, 1, 2)


def gaussian_blur(images: Tensor, sigma: Tensor, window: Tensor, blur: Tensor | None) -> Tensor:
    """Separable Gaussian blur with the sigma and window of each image; see `blur.py`."""
    batch, _, height, width = images.shape
    out_NHWC = images.new_empty((batch, height, width, 3))
    to_blur, sigmas, radii = _coins(blur, batch, True), sigma.tolist(), _radii(window)
    scratch = _Scratch(height, width, max(radii, default=0))
    for i in range(batch):
        image_HWC = images[i].permute(1, 2, 0)
        if not to_blur[i]:
            out_NHWC[i] = image_HWC
            continue
        rows = scratch.pixels.copy_(image_HWC).view(height, -1)
        rows = _blur_rows(rows, scratch, sigmas[i], radii[i])
        out_NHWC[i].view(height, -1).copy_(_to_levels(rows) if images.dtype == torch.uint8 else rows)
    return out_NHWC.permute(0, 3, 1, 2)


class _Scratch:
    """Memory for one float32 image in all the forms it takes, used again for the next."""

    def __init__(self, height: int, width: int, radius: int) -> None:
        def new(*shape: int) -> Tensor:  # whatever torch makes by default
            return torch.empty(shape, dtype=torch.float32, device="cpu")

        self.pixels = new(height, width, 3)
        self.planes, self.other_planes = new(2, 3, height * width).unbind()
        self.plane, self.high, self.low, self.upper, self.lower = new(5, height * width).unbind()
        # With a border above and below, and with one to the left and right.
        self.above = new(height + 2 * radius, width * 3)
        self.beside = new(height * (width + 2 * radius) * 3)


# -------------------------------------------------------------------------------- colour


def _jitter(x: Tensor, scratch: _Scratch, factors: Sequence[float], order: Sequence[int], truncate: bool) -> Tensor:
    """The parts of the jitter in their order, on planes [3, HW] from 0 to 255; the result may lie in other planes."""
    for part in order:
        factor = factors[part]
        if part == HUE:
            x = _hue(x, scratch, factor)
            if truncate:
                x.mul_(_HUE_TRUNCATION)
        elif part == BRIGHTNESS:
            x.mul_(factor)
        else:
            gray = _gray(x, scratch.plane)
            if truncate:
                gray.floor_()
            other = gray.mean() if part == CONTRAST else gray
            torch.add(other.mul_(1.0 - factor), x, alpha=factor, out=x)
        if part != HUE and not 0.0 <= factor <= 1.0:  # else a convex combination of values in range
            x.clamp_(0.0, 255.0)
        if truncate:
            x.floor_()
    return x


def _gray(x: Tensor, out: Tensor) -> Tensor:
    torch.mul(x[0], _GRAY[0], out=out).add_(x[1], alpha=_GRAY[1]).add_(x[2], alpha=_GRAY[2])
    return out


def _hue(x: Tensor, scratch: _Scratch, turns: float) -> Tensor:
    """Turns the hue; see `photometric.py` for the formula. Overwrites x."""
    quotient, remainder = split_turns(turns)
    high, low, upper, lower = scratch.high, scratch.low, scratch.upper, scratch.lower
    torch.maximum(torch.maximum(x[0], x[1], out=high), x[2], out=high)
    torch.minimum(torch.minimum(x[0], x[1], out=low), x[2], out=low)
    if quotient % 2:  # the opposite colour, and three sixths less to go
        torch.sub(torch.add(high, low, out=upper), x, out=x)
    torch.lerp(low, high, abs(remainder), out=lower)
    torch.lerp(high, low, abs(remainder), out=upper)
    shift, step = (quotient - 3 * (quotient % 2)) % 6 // 2, 1 if remainder >= 0 else -1
    out = scratch.other_planes if x is scratch.planes else scratch.planes
    for c in range(3):
        this, beside = x[(c - shift) % 3], x[(c - shift + step) % 3]
        moved = torch.clamp(beside, lower, upper, out=out[c]).sub_(beside).add_(this)
        torch.clamp(moved, low, high, out=moved)
    return out


def split_turns(turns: float) -> tuple[int, float]:
    """A turn of the hue as whole sixths, 0 to 5, and a remainder of -1/2 to 1/2 sixth."""
    whole = math.floor(6.0 * turns + 0.5)
    return whole % 6, 6.0 * turns - whole


# -------------------------------------------------------------------------------- blur


def _blur_rows(rows: Tensor, scratch: _Scratch, sigma: float, radius: int) -> Tensor:
    """Blurs interleaved rows [H, 3W], which it overwrites: columns first, then rows, taps of equal weight together."""
    if radius == 0:
        return rows
    height, width = rows.shape[0], rows.shape[1] // 3
    weights, above = gaussian_weights(sigma, radius), scratch.above
    beside = scratch.beside[: height * (width + 2 * radius) * 3].view(height, -1, 3)
    above[radius : radius + height] = rows
    for k in (*range(-radius, 0), *range(height, height + radius)):
        above[radius + k] = rows[reflect(k, height)]
    middle = beside.view(height, -1)[:, 3 * radius : 3 * (radius + width)]
    torch.mul(rows, weights[0], out=middle)
    for k in range(1, radius + 1):
        middle.add_(above[radius - k :][:height], alpha=weights[k]).add_(above[radius + k :][:height], alpha=weights[k])
    for k in (*range(-radius, 0), *range(width, width + radius)):
        beside[:, radius + k] = beside[:, radius + reflect(k, width)]
    flat = beside.view(height, -1)
    torch.mul(middle, weights[0], out=rows)
    for k in range(1, radius + 1):
        for start in (3 * (radius - k), 3 * (radius + k)):
            rows.add_(flat[:, start : start + 3 * width], alpha=weights[k])
    return rows


def gaussian_weights(sigma: float, radius: int) -> list[float]:
    """Weights of the window's middle and of the pixels 1 ... radius away; both sides together they sum to 1."""
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = weights[0] + 2.0 * sum(weights[1:])
    return [w / total for w in weights]


def reflect(index: int, length: int) -> int:
    """Mirrors an index into 0 ... length - 1 without repeating the border, as often as it takes."""
    period = max(2 * (length - 1), 1)
    index = abs(index) % period
    return min(index, period - index)


def _radii(window: Tensor) -> list[int]:
    return [max(w, 0) // 2 for w in window.tolist()]


# -------------------------------------------------------------------------------- solarize, normalise, cast


def _solarize_(rows: Tensor, scratch: _Scratch, threshold: int) -> None:
    """Inverts values of at least the threshold. A value that rounds up to the threshold counts as reaching it."""
    mask, inverse = (planes.view(rows.shape) for planes in (scratch.planes, scratch.other_planes))
    torch.ge(rows, threshold - 0.5, out=mask)
    torch.mul(rows, -2.0, out=inverse).add_(255.0)
    rows.addcmul_(mask, inverse)


def _normalisation(mean: Sequence[float], std: Sequence[float], width: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of a row of pixels; without a mean, to the range 0 ... 1."""
    std = std or (1.0, 1.0, 1.0)
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], dtype=torch.float32, device="cpu")
    shift = [-m / s for m, s in zip(mean or (0.0, 0.0, 0.0), std, strict=True)]
    bias = torch.tensor(shift, dtype=torch.float32, device="cpu")
    return scale.repeat(width), bias.repeat(width)


def _to_levels(x: Tensor) -> Tensor:
    """Rounds to uint8, by way of int16: the direct conversion is not vectorised and takes five times as long."""
    return x.round_().to(torch.int16).to(torch.uint8)


def _coins(coin: Tensor | None, batch: int, default: bool) -> list[bool]:
    return [default] * batch if coin is None else coin.tolist()
