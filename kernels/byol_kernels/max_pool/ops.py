"""`max_pool2d_3x3`: the max pooling of a ResNet, with a gradient that needs no index arithmetic."""

from typing import Any

import torch
from torch import Tensor

from byol_kernels._dtypes import FLOAT_DTYPES
from byol_kernels.derivatives import is_transformed, register_autograd
from byol_kernels.max_pool import kernels, reference

# -------------------------------------------------------------------------------- operators

torch.library.define(
    "byol_kernels::max_pool2d_3x3_fwd", "(Tensor x) -> (Tensor y, Tensor place)", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    "byol_kernels::max_pool2d_3x3_bwd",
    "(Tensor dy, Tensor place, SymInt height, SymInt width) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fwd_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.empty_output(x, x.dtype), kernels.empty_output(x, torch.int8)


def _bwd_fake(dy: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    return kernels.empty_channels_last(dy, (*dy.shape[:2], height, width), dy.dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.size = inputs[0].shape[2:]


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> Tensor | None:
    if dy is None:
        return None
    (place,) = ctx.saved_tensors
    dx: Tensor = torch.ops.byol_kernels.max_pool2d_3x3_bwd(dy, place, *ctx.size)
    return dx


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "byol_kernels: max_pool2d_3x3 must be differentiated once, got a second derivative; use "
        "torch.nn.functional.max_pool2d where a gradient penalty or a Hessian is needed"
    )


torch.library.impl("byol_kernels::max_pool2d_3x3_fwd", "CPU", reference.max_pool2d_3x3_fwd)
torch.library.impl("byol_kernels::max_pool2d_3x3_fwd", "CUDA", kernels.max_pool2d_3x3_fwd_cuda)
torch.library.impl("byol_kernels::max_pool2d_3x3_bwd", "CPU", reference.max_pool2d_3x3_bwd)
torch.library.impl("byol_kernels::max_pool2d_3x3_bwd", "CUDA", kernels.max_pool2d_3x3_bwd_cuda)
torch.library.register_fake("byol_kernels::max_pool2d_3x3_fwd", _fwd_fake)
torch.library.register_fake("byol_kernels::max_pool2d_3x3_bwd", _bwd_fake)
register_autograd("max_pool2d_3x3_fwd", _backward, setup_context=_setup_context)
register_autograd("max_pool2d_3x3_bwd", _refuse_double_backward)


# -------------------------------------------------------------------------------- public function


def max_pool2d_3x3(x: Tensor) -> Tensor:
    """`torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)`, bit for bit.

    One launch on a GPU, one for the gradient, which is deterministic: torch's adds in no fixed order there. Within the
    transforms of `torch.func` and in forward mode it is torch's operator.

    Args:
        x: images [B, C, H, W]; bfloat16, float16, float32 or float64, any strides.

    Returns:
        [B, C, (H + 1) // 2, (W + 1) // 2], channels_last. Differentiable once.

    Raises:
        ValueError: other than four dimensions, an image without pixels or channels, or a dtype that is not floating
            point.

    Examples:
        >>> max_pool2d_3x3(torch.zeros(2, 64, 112, 112)).shape
        torch.Size([2, 64, 56, 56])
    """
    op = "max_pool2d_3x3"
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: x must be images [B, C, H, W] of at least one channel and one pixel, got shape {tuple(x.shape)}"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{op}: x must be bfloat16, float16, float32 or float64, got {x.dtype}; convert it with .float()"
        )
    if is_transformed():
        return torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)
    y: Tensor = torch.ops.byol_kernels.max_pool2d_3x3_fwd(x)[0]
    return y
