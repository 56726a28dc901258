"""`gaussian_blur`: Gaussian blur of RGB images, with a standard deviation and a kernel size per image."""

import torch
from torch import Tensor

from byol_kernels._images import FLOAT_DTYPES, check_images, check_params
from byol_kernels.blur import kernels, reference
from byol_kernels.derivatives import register_autograd

# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::gaussian_blur",
    "(Tensor images, Tensor sigma, Tensor kernel_size, Tensor? blur) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("byol_kernels::gaussian_blur", "CPU", reference.gaussian_blur)
torch.library.impl("byol_kernels::gaussian_blur", "CUDA", kernels.gaussian_blur_cuda)


def _gaussian_blur_fake(images: Tensor, sigma: Tensor, kernel_size: Tensor, blur: Tensor | None) -> Tensor:
    return torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _refuse_backward(ctx: object, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "gaussian_blur: images must not require a gradient, got a backward pass; "
        "detach them, or blur with torch.nn.functional.conv2d"
    )


torch.library.register_fake("byol_kernels::gaussian_blur", _gaussian_blur_fake)
register_autograd("gaussian_blur", _refuse_backward)


# -------------------------------------------------------------------------------- public function


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: Tensor, *, blur: Tensor | None = None) -> Tensor:
    """Blur each image with its own Gaussian: `torchvision.transforms.GaussianBlur` with parameters per image.

    The kernel of image b reaches kernel_size[b] // 2 pixels to each side; its weights exp(-k^2 / (2 sigma^2)) sum to 1.
    Borders are mirrored. The arithmetic is in float32 (on a GPU, for uint8 images, with float16 factors: at most one
    level of 255 off), and uint8 results are rounded to the nearest level. One launch on a GPU.

    Args:
        images: [B, 3, H, W], uint8, bfloat16, float16 or float32, any strides.
        sigma: standard deviations in pixels, [B] float32, positive.
        kernel_size: widths in pixels, [B] int32 or int64, odd. 1 changes nothing.
        blur: mask of the images to blur, [B] bool; the others are copied. None blurs all.

    Returns:
        The blurred images, same dtype, channels_last.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        RuntimeError: in the backward pass, and for a derivative in forward mode or by `torch.func`.

    Examples:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> gaussian_blur(images, torch.tensor([0.5, 2.0]), torch.tensor([5, 13])).shape
        torch.Size([2, 3, 8, 8])
    """
    op = "gaussian_blur"
    check_images(op, images, (torch.uint8, *FLOAT_DTYPES))
    check_params(op, images, {"sigma": sigma}, (torch.float32,))
    check_params(op, images, {"kernel_size": kernel_size}, (torch.int32, torch.int64))
    check_params(op, images, {"blur": blur}, (torch.bool,))
    result: Tensor = torch.ops.byol_kernels.gaussian_blur(images, sigma, kernel_size, blur)
    return result
