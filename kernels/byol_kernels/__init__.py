"""Fused Triton kernels for BYOL: loss, EMA of the target, LARS, running statistics, views of images.

On a CPU plain PyTorch.
"""

from byol_kernels.blur import gaussian_blur
from byol_kernels.crop import resized_crop
from byol_kernels.draws import DrawnView, draw_view
from byol_kernels.ema import ema_update_
from byol_kernels.lars import LARS
from byol_kernels.loss import (
    LossStats,
    byol_loss,
    byol_loss_with_stats,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
)
from byol_kernels.photometric import photometric
from byol_kernels.running_stats import update_running_stats_

__all__ = [
    "LARS",
    "DrawnView",
    "LossStats",
    "byol_loss",
    "byol_loss_with_stats",
    "draw_view",
    "ema_update_",
    "gaussian_blur",
    "normalized_mse_loss",
    "normalized_mse_loss_with_stats",
    "photometric",
    "resized_crop",
    "update_running_stats_",
]
