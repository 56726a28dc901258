"""Fused Triton kernels for BYOL: the loss, the moving average, LARS. Plain PyTorch on a CPU."""

from byol_kernels.ema import ema_update_
from byol_kernels.lars import LARS
from byol_kernels.normalized_mse import (
    LossStats,
    byol_loss,
    byol_loss_with_stats,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
)

__all__ = [
    "LARS",
    "LossStats",
    "byol_loss",
    "byol_loss_with_stats",
    "ema_update_",
    "normalized_mse_loss",
    "normalized_mse_loss_with_stats",
]
