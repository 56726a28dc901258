"""`resized_crop`: crops of uint8 RGB images, resized to a square."""

from typing import Literal

import torch
from torch import Tensor

from byol_kernels._images import check_images
from byol_kernels.crop import kernels, reference

MAX_SIZE = 32_768
"""Largest height and width of the result in pixels: a larger one has more than 2^31 values."""

# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::resized_crop",
    "(Tensor images, Tensor? index, Tensor box, int size, str interpolation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _resized_crop_fake(images: Tensor, index: Tensor | None, box: Tensor, size: int, interpolation: str) -> Tensor:
    return images.new_empty((box.shape[0], size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


torch.library.impl("byol_kernels::resized_crop", "CPU", reference.resized_crop)
torch.library.impl("byol_kernels::resized_crop", "CUDA", kernels.resized_crop_cuda)
torch.library.register_fake("byol_kernels::resized_crop", _resized_crop_fake)

# -------------------------------------------------------------------------------- public function


def resized_crop(
    images: Tensor,
    box: Tensor,
    size: int,
    *,
    index: Tensor | None = None,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Crop images and resize each crop to a square with an antialiased filter; one launch on a GPU.

    On the CPU it is torchvision's `resized_crop` of uint8 tensors, which rounds to levels between its two passes; on a
    GPU there is one rounding, at the end.

    Args:
        images: [N, 3, H, W] uint8, any strides.
        box: top, left, height and width of each sample's crop in pixels, [B, 4] int32 or int64, on the device of
            the images. Crops have at least one pixel and lie within the image (not checked on a GPU).
        size: height and width of the result in pixels.
        index: image that each sample is cut from, [B] int32 or int64 on the same device; None: N = B, sample b is cut
            from image b.
        interpolation: the filter.

    Returns:
        [B, 3, size, size] uint8, channels_last.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; on the CPU also a box that lies outside.

    Examples:
        >>> images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        >>> box = torch.tensor([[0, 0, 16, 16], [8, 4, 24, 20]])
        >>> resized_crop(images, box, 28, index=torch.tensor([4, 0])).shape
        torch.Size([2, 3, 28, 28])
    """
    op = "resized_crop"
    check_images(op, images, (torch.uint8,))
    if interpolation not in kernels.REACH:
        raise ValueError(f"{op}: interpolation must be bicubic or bilinear, got {interpolation!r}")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"{op}: size must be 1..{MAX_SIZE} pixels, got {size}")
    batch = images.shape[0] if index is None else index.shape[0]
    for name, numbers, shape in (("box", box, (batch, 4)), ("index", index, (batch,))):
        if numbers is None:
            continue
        if tuple(numbers.shape) != shape:
            raise ValueError(
                f"{op}: {name} must have shape {shape}, got {tuple(numbers.shape)}; pass one row for each sample"
            )
        if numbers.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: {name} must be int32 or int64, got {numbers.dtype}; convert it with .to()")
        if numbers.device != images.device:
            raise ValueError(
                f"{op}: {name} must be on the device of images, {images.device}, got {numbers.device}; "
                f"move it with .to('{images.device}')"
            )
    result: Tensor = torch.ops.byol_kernels.resized_crop(images, index, box, size, interpolation)
    return result
