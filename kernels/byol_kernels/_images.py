"""Argument checks and transfers shared by the operators on images."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_images(op: str, images: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise a ValueError unless `images` is a batch of RGB images of one of the dtypes."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{op}: images must be [batch, 3, height, width], got shape {tuple(images.shape)}; "
            "an NHWC batch becomes one with .permute(0, 3, 1, 2), without a copy"
        )
    if images.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{op}: images must be {names}, got {images.dtype}; convert them with .to({dtypes[0]})")


def check_params(
    op: str, images: Tensor, params: dict[str, Tensor | None], dtypes: tuple[torch.dtype, ...], columns: int = 0
) -> None:
    """Raise a ValueError unless each parameter has one row per image, one of the dtypes and a readable device.

    Args:
        op: name of the operator, for the message.
        images: [B, 3, H, W].
        params: by name; None is accepted.
        dtypes: accepted dtypes.
        columns: of a parameter [B, columns]; 0 for [B].
    """
    shape = (images.shape[0], columns) if columns else (images.shape[0],)
    for name, param in params.items():
        if param is None:
            continue
        if tuple(param.shape) != shape:
            raise ValueError(
                f"{op}: {name} must have shape {shape}, got {tuple(param.shape)}; pass one row for each image"
            )
        if param.dtype not in dtypes:
            names = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{op}: {name} must be {names}, got {param.dtype}; convert it with .to({dtypes[0]})")
        if param.device not in (images.device, torch.device("cpu")):
            raise ValueError(
                f"{op}: {name} must be on the device of images, {images.device}, or on the CPU, got {param.device}; "
                f"move it with .to('{images.device}')"
            )


def to_device(param: Tensor | None, device: torch.device) -> Tensor | None:
    """Parameter on the device, dense; the copy from the CPU does not synchronize."""
    return None if param is None else param.to(device, non_blocking=True).contiguous()
