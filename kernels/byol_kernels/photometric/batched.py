"""The photometric operator in plain PyTorch, a whole batch at a time: the CPU path up to 64 * 64 pixels.

For an image of 32 px `reference.py`, which takes one at a time, spends most of its time on calling operators. Here each
operator is called once for all samples that it applies to. The three adjustments of the jitter that are affine have one
form, x = clip(a x + g gray + q mean), so that all samples take one step of their order together, whichever adjustment
it is; the hue is shifted where it is the sample's turn.
"""

import torch
from torch import Tensor

from byol_kernels.blur.reference import gaussian_weights, reflect
from byol_kernels.photometric.params import CONTRAST, HUE, SATURATION, PhotometricParams
from byol_kernels.photometric.reference import GRAY_WEIGHTS


def photometric(images: Tensor, params: PhotometricParams, solarize_threshold: int, out: Tensor) -> None:
    """Write the augmented images [B, 3, H, W] to `out`, uint8, channels_last.

    Equal to `reference.photometric`, except for values next to a half of a level, which may be rounded to either side.
    """
    batch, _, height, width = images.shape
    x = images.to(torch.float32, memory_format=torch.contiguous_format).view(batch, 3, height * width)
    if params.flip is not None:
        rows = _rows(params.flip)
        x[rows] = images[rows].flip(3).reshape(len(rows), 3, height * width).float()
    if params.factors is not None:
        assert params.order is not None
        rows = _rows(_all(images) if params.jitter is None else params.jitter)
        x[rows] = _jitter(x[rows], params.factors[rows], params.order[rows].long())
    if params.grayscale is not None:
        rows = _rows(params.grayscale)
        x[rows] = _gray(x[rows])[:, None].expand(-1, 3, -1)
    if params.sigma is not None:
        assert params.kernel_size is not None
        to_blur = _all(images) if params.blur is None else params.blur
        _blur_(x.view(batch, 3, height, width), to_blur, params.sigma, params.kernel_size)
    if params.solarize is not None:
        rows = _rows(params.solarize)
        selected = x[rows]
        x[rows] = torch.where(selected >= solarize_threshold - 0.5, 255.0 - selected, selected)
    # By way of int16: the direct conversion is not vectorized.
    out.copy_(x.round_().to(torch.int16).view(batch, 3, height, width))


def _all(images: Tensor) -> Tensor:
    return images.new_ones(len(images), dtype=torch.bool)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _gray(x: Tensor) -> Tensor:
    red, green, blue = GRAY_WEIGHTS
    return (x[:, 0] * red).add_(x[:, 1], alpha=green).add_(x[:, 2], alpha=blue)


def _jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Adjustments in the order of each sample, on planes [B, 3, HW] from 0 to 255; overwrites x."""
    for step in range(order.shape[1]):
        adjustment = order[:, step]
        factor = factors.gather(1, adjustment[:, None])
        rest = 1.0 - factor
        a = torch.where(adjustment[:, None] == HUE, 1.0, factor)
        g = torch.where(adjustment[:, None] == SATURATION, rest, 0.0)
        q = torch.where(adjustment[:, None] == CONTRAST, rest, 0.0)
        gray = _gray(x)
        q = q * gray.mean(1, keepdim=True)
        x.mul_(a[:, :, None]).add_(gray.mul_(g).add_(q)[:, None]).clamp_(0.0, 255.0)
        rows = _rows(adjustment == HUE)
        x[rows] = _shift_hue(x[rows], factor[rows, 0])
    return x


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue of each sample shifted by its number of turns; see `kernels.py` for the formula."""
    sixths = 6.0 * turns
    whole = torch.floor(sixths + 0.5)
    d = sixths - whole
    quotient = whole.long() % 6
    odd = quotient % 2
    high = torch.maximum(torch.maximum(x[:, 0], x[:, 1]), x[:, 2])[:, None]
    low = torch.minimum(torch.minimum(x[:, 0], x[:, 1]), x[:, 2])[:, None]
    rows = _rows(odd == 1)  # half a turn, which leaves an even number of sixths
    x[rows] = (high[rows] + low[rows]) - x[rows]
    source = (torch.arange(3, device=x.device) - (quotient - 3 * odd)[:, None] % 6 // 2) % 3
    beside = (source + torch.where(d >= 0.0, 1, -1)[:, None]) % 3
    samples = torch.arange(len(x), device=x.device)[:, None]
    this, neighbor = x[samples, source], x[samples, beside]
    step = d.abs()[:, None, None]
    moved = torch.minimum(torch.maximum(neighbor, torch.lerp(low, high, step)), torch.lerp(high, low, step))
    moved.sub_(neighbor).add_(this)
    return torch.minimum(torch.maximum(moved, low, out=moved), high, out=moved)


def _blur_(x: Tensor, to_blur: Tensor, sigma: Tensor, kernel_size: Tensor) -> None:
    """Blur some samples of [B, 3, H, W] in place: those with kernels of one width together."""
    height, width = x.shape[2:]
    radii = torch.where(to_blur, kernel_size.clamp(min=0) // 2, 0)
    for radius in sorted({*radii.tolist()} - {0}):
        rows = _rows(radii == radius)
        weights = x.new_tensor([gaussian_weights(s, radius) for s in sigma[rows].tolist()])[:, :, None, None, None]
        y = x[rows].round_()  # passed to the blur as levels, as between the two launches of the kernels
        for axis, length in ((2, height), (3, width)):
            mirrored = rows.new_tensor([reflect(k, length) for k in range(-radius, length + radius)])
            padded = y.index_select(axis, mirrored)
            y = y * weights[:, 0]
            for k in range(1, radius + 1):
                both = padded.narrow(axis, radius - k, length) + padded.narrow(axis, radius + k, length)
                y.addcmul_(both, weights[:, k])
        x[rows] = y
