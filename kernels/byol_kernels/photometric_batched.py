"""The photometric operators for small images on a CPU: a whole batch at a time.

An image of 32 pixels is an operand so small that `photometric_reference.py`, which takes one at a time, spends most of
its time on calling operators. Here each operator is called for all samples that it applies to. The three parts of the
jitter that are affine have one form, x = clip(a x + g gray + q mean), so that all samples take a step of their order
together, whichever part it is; the hue is turned for those whose turn it is.
"""

import torch
from torch import Tensor

from byol_kernels.photometric_reference import CONTRAST, HUE, SATURATION, gaussian_weights, reflect

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights
_HUE_TRUNCATION = 255.999 / 255  # torchvision's way back to uint8 within adjust_hue


def photometric_batched(
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
) -> Tensor:
    """`photometric` of small uint8 images on the CPU, for uint8 results; arguments as there.

    Returns:
        [B, 3, H, W] uint8, channels_last: what `photometric` gives, but for values next to a half of a level.
    """
    batch, _, height, width = images.shape
    x = images.to(torch.float32, memory_format=torch.contiguous_format).view(batch, 3, height * width)
    if flip is not None:
        rows = _rows(flip)
        x[rows] = images[rows].flip(3).reshape(len(rows), 3, height * width).float()
    coloured = torch.zeros(batch, dtype=torch.bool)
    if factors is not None:
        assert order is not None
        coloured = torch.ones(batch, dtype=torch.bool) if jitter is None else jitter
        rows = _rows(coloured)
        x[rows] = _jitter(x[rows], factors[rows], order[rows].long())
    if grayscale is not None:
        rows = _rows(grayscale)
        x[rows] = _gray(x[rows])[:, None].expand(-1, 3, -1)
        coloured = coloured | grayscale
    if sigma is not None:
        assert window is not None
        to_blur = torch.ones(batch, dtype=torch.bool) if blur is None else blur
        _blur_(x.view(batch, 3, height, width), to_blur, sigma, window)
    if solarize is not None:
        rows = _rows(solarize)
        some = x[rows]
        x[rows] = torch.where(some >= solarize_threshold - 0.5, 255.0 - some, some)
    # By way of int16: the direct conversion is not vectorised.
    levels = x.round_().to(torch.int16).view(batch, 3, height, width).permute(0, 2, 3, 1)
    return levels.to(torch.uint8, memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def _rows(coin: Tensor) -> Tensor:
    return coin.nonzero()[:, 0]


def _gray(x: Tensor) -> Tensor:
    return (x[:, 0] * _GRAY[0]).add_(x[:, 1], alpha=_GRAY[1]).add_(x[:, 2], alpha=_GRAY[2])


def _jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """The parts in the order of each sample, on planes [B, 3, HW] from 0 to 255; overwrites x."""
    for step in range(order.shape[1]):
        part = order[:, step]
        factor = factors.gather(1, part[:, None])
        rest = 1.0 - factor
        a = torch.where(part[:, None] == HUE, 1.0, factor)
        g = torch.where(part[:, None] == SATURATION, rest, 0.0)
        q = torch.where(part[:, None] == CONTRAST, rest, 0.0)
        gray = _gray(x)
        q = q * gray.mean(1, keepdim=True)
        x.mul_(a[:, :, None]).add_(gray.mul_(g).add_(q)[:, None]).clamp_(0.0, 255.0)
        rows = _rows(part == HUE)
        x[rows] = _hue(x[rows], factor[rows, 0])
    return x


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of each sample; see `photometric.py` for the formula."""
    sixths = 6.0 * turns
    whole = torch.floor(sixths + 0.5)
    d = sixths - whole
    quotient = whole.long() % 6
    odd = quotient % 2
    high = torch.maximum(torch.maximum(x[:, 0], x[:, 1]), x[:, 2])[:, None]
    low = torch.minimum(torch.minimum(x[:, 0], x[:, 1]), x[:, 2])[:, None]
    rows = _rows(odd == 1)  # the opposite colour, and three sixths less to go
    x[rows] = (high[rows] + low[rows]) - x[rows]
    source = (torch.arange(3) - (quotient - 3 * odd)[:, None] % 6 // 2) % 3
    beside = (source + torch.where(d >= 0.0, 1, -1)[:, None]) % 3
    numbers = torch.arange(len(x))[:, None]
    this, other = x[numbers, source], x[numbers, beside]
    step = d.abs()[:, None, None]
    moved = torch.minimum(torch.maximum(other, torch.lerp(low, high, step)), torch.lerp(high, low, step))
    moved.sub_(other).add_(this)
    return torch.minimum(torch.maximum(moved, low, out=moved), high, out=moved)


def _blur_(x: Tensor, to_blur: Tensor, sigma: Tensor, window: Tensor) -> None:
    """Blurs some samples [H, W] in place: those with windows of one width together."""
    height, width = x.shape[2:]
    radii = torch.where(to_blur, window.clamp(min=0) // 2, 0)
    for radius in sorted({*radii.tolist()} - {0}):
        rows = _rows(radii == radius)
        weights = torch.tensor([gaussian_weights(s, radius) for s in sigma[rows].tolist()])[:, :, None, None, None]
        y = x[rows].round_()  # passes to the blur as levels
        for axis, length in ((2, height), (3, width)):
            mirrored = torch.tensor([reflect(k, length) for k in range(-radius, length + radius)])
            padded = y.index_select(axis, mirrored)
            y = y * weights[:, 0]
            for k in range(1, radius + 1):
                both = padded.narrow(axis, radius - k, length) + padded.narrow(axis, radius + k, length)
                y.addcmul_(both, weights[:, k])
        x[rows] = y
