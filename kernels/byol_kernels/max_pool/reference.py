"""Max pooling in plain PyTorch: the CPU path."""

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
GEOMETRY = ([3, 3], [2, 2], [1, 1], [1, 1])
"""Kernel, stride, padding and dilation."""


def max_pool2d_3x3_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima, and the place of each in its window: 0 to 8, row by row; int8. Both channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    y, index = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    first_row, first_column = _first(y.shape[2], x), _first(y.shape[3], x)
    place = 3 * (index // x.shape[3] - first_row[:, None]) + index % x.shape[3] - first_column
    return y, place.to(torch.int8).contiguous(memory_format=torch.channels_last)


def max_pool2d_3x3_bwd(dy: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """Gradient of the input `[B, C, height, width]`, channels_last."""
    row = place // 3 + _first(place.shape[2], dy)[:, None]
    column = place % 3 + _first(place.shape[3], dy)
    dy = dy.contiguous(memory_format=torch.channels_last)
    x = dy.new_empty((*dy.shape[:2], height, width)).contiguous(memory_format=torch.channels_last)
    dx: Tensor = aten.max_pool2d_with_indices_backward(dy, x, *GEOMETRY, False, row * width + column)
    return dx


def _first(windows: int, like: Tensor) -> Tensor:
    """First row (or column) of each window; that of the first window is outside of the image."""
    return 2 * torch.arange(windows, device=like.device) - 1
