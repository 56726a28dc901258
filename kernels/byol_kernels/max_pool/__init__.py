"""Max pooling as in a ResNet: 3x3 with stride 2 and padding 1."""

from byol_kernels.max_pool.ops import max_pool2d_3x3

__all__ = ["max_pool2d_3x3"]
