"""Gaussian blur in plain PyTorch: the CPU path.

One image at a time, in scratch memory allocated once per batch: a new tensor of this size costs more in page faults
than in arithmetic. An image is rows of interleaved pixels, so that neither pass needs a transposition.
"""

import math

import torch
from torch import Tensor


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: Tensor, blur: Tensor | None) -> Tensor:
    """Blurred copy of the images [B, 3, H, W], channels_last; see `ops.py`."""
    batch, _, height, width = images.shape
    out_NHWC = images.new_empty((batch, height, width, 3))
    to_blur, sigmas, radii = mask_list(blur, batch, default=True), sigma.tolist(), kernel_radii(kernel_size)
    pixels = torch.empty((height, width, 3), dtype=torch.float32, device="cpu")
    scratch = BlurScratch(height, width, max(radii, default=0))
    for i in range(batch):
        image_HWC = images[i].permute(1, 2, 0)
        if not to_blur[i]:
            out_NHWC[i] = image_HWC
            continue
        rows = pixels.copy_(image_HWC).view(height, -1)
        blur_rows_(rows, scratch, sigmas[i], radii[i])
        out_NHWC[i].view(height, -1).copy_(round_to_uint8(rows) if images.dtype == torch.uint8 else rows)
    return out_NHWC.permute(0, 3, 1, 2)


class BlurScratch:
    """Memory for one image with mirrored borders, reused for all images of a batch.

    Args:
        height: of the images in pixels.
        width: of the images in pixels.
        radius: of the widest kernel in pixels.
    """

    def __init__(self, height: int, width: int, radius: int) -> None:
        # The dtype and the device are explicit: the defaults of torch may be others.
        self.border_rows = torch.empty((height + 2 * radius, width * 3), dtype=torch.float32, device="cpu")
        self.border_columns = torch.empty(height * (width + 2 * radius) * 3, dtype=torch.float32, device="cpu")


def blur_rows_(rows: Tensor, scratch: BlurScratch, sigma: float, radius: int) -> None:
    """Blur one image of interleaved rows [H, 3W] in place: vertical pass, then horizontal pass."""
    if radius == 0:
        return
    height, width = rows.shape[0], rows.shape[1] // 3
    weights, padded = gaussian_weights(sigma, radius), scratch.border_rows

    # --- vertical pass, from `padded` into the middle of `beside`
    beside = scratch.border_columns[: height * (width + 2 * radius) * 3].view(height, -1, 3)
    padded[radius : radius + height] = rows
    for k in (*range(-radius, 0), *range(height, height + radius)):
        padded[radius + k] = rows[reflect(k, height)]
    middle = beside.view(height, -1)[:, 3 * radius : 3 * (radius + width)]
    torch.mul(rows, weights[0], out=middle)
    for k in range(1, radius + 1):
        above, below = padded[radius - k :][:height], padded[radius + k :][:height]
        middle.add_(above, alpha=weights[k]).add_(below, alpha=weights[k])

    # --- horizontal pass, back into `rows`
    for k in (*range(-radius, 0), *range(width, width + radius)):
        beside[:, radius + k] = beside[:, radius + reflect(k, width)]
    flat = beside.view(height, -1)
    torch.mul(middle, weights[0], out=rows)
    for k in range(1, radius + 1):
        for start in (3 * (radius - k), 3 * (radius + k)):
            rows.add_(flat[:, start : start + 3 * width], alpha=weights[k])


def gaussian_weights(sigma: float, radius: int) -> list[float]:
    """Weights at distances 0 ... radius from the center; over both sides they sum to 1."""
    if radius and not sigma > 0.0:
        raise ValueError(f"gaussian_blur: sigma must be positive, got {sigma}; leave images out by the mask blur")
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = weights[0] + 2.0 * sum(weights[1:])
    return [w / total for w in weights]


def reflect(index: int, length: int) -> int:
    """Index mirrored into 0 ... length - 1 without repeating the border, as often as needed."""
    period = max(2 * (length - 1), 1)
    index = abs(index) % period
    return min(index, period - index)


def kernel_radii(kernel_size: Tensor) -> list[int]:
    """Pixels that each kernel [B] reaches to each side."""
    return [max(w, 0) // 2 for w in kernel_size.tolist()]


def mask_list(mask: Tensor | None, batch: int, *, default: bool) -> list[bool]:
    """Mask [B] as a list; `default` for all images where there is none."""
    return [default] * batch if mask is None else mask.tolist()


def round_to_uint8(x: Tensor) -> Tensor:
    """Round in place and convert, by way of int16: the direct conversion is not vectorized and five times slower."""
    return x.round_().to(torch.int16).to(torch.uint8)
