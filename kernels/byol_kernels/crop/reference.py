"""Resized crops in plain PyTorch: the CPU path."""

import torch
from torch import Tensor


def resized_crop(images: Tensor, index: Tensor | None, box: Tensor, size: int, interpolation: str) -> Tensor:
    """One crop at a time by PyTorch's antialiased resize, which is vectorized for channels_last uint8."""
    batch, (height, width) = box.shape[0], images.shape[2:]
    out = images.new_empty((batch, size, size, 3)).permute(0, 3, 1, 2)
    image_index = range(batch) if index is None else index.tolist()
    for row, (i, (top, left, h, w)) in enumerate(zip(image_index, box.tolist(), strict=True)):
        if not (0 <= i < len(images) and 0 <= top < top + h <= height and 0 <= left < left + w <= width):
            raise ValueError(
                f"resized_crop: box must lie within an image of {height} x {width} pixels, one of {len(images)}, "
                f"got top {top}, left {left}, height {h}, width {w} of image {i}; sample it for images of this size"
            )
        # A slice of the batch, not an image: only with its stride PyTorch sees that channels are innermost.
        crop = images[i : i + 1, :, top : top + h, left : left + w]
        out[row] = torch.nn.functional.interpolate(crop, (size, size), mode=interpolation, antialias=True)[0]
    return out
