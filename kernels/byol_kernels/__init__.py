"""Fused Triton kernels for BYOL: loss, EMA of the target, LARS, running statistics, max pooling, views of images.

On a CPU plain PyTorch.
"""

from byol_kernels.augment_params.ops import sample_view_params
from byol_kernels.augment_params.params import ViewParams
from byol_kernels.blur.ops import gaussian_blur
from byol_kernels.crop.ops import resized_crop
from byol_kernels.ema import ema_update_
from byol_kernels.lars import LARS
from byol_kernels.loss import (
    LossStats,
    byol_loss,
    byol_loss_with_stats,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
)
from byol_kernels.max_pool import max_pool2d_3x3
from byol_kernels.photometric.ops import photometric
from byol_kernels.running_stats import update_running_stats_

__all__ = [
    "LARS",
    "LossStats",
    "ViewParams",
    "byol_loss",
    "byol_loss_with_stats",
    "ema_update_",
    "gaussian_blur",
    "max_pool2d_3x3",
    "normalized_mse_loss",
    "normalized_mse_loss_with_stats",
    "photometric",
    "resized_crop",
    "sample_view_params",
    "update_running_stats_",
]
