"""The BYOL loss: forward, gradient and mean of both directions in one launch."""

from byol_kernels.loss.ops import (
    LossStats,
    byol_loss,
    byol_loss_with_stats,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
)

__all__ = ["LossStats", "byol_loss", "byol_loss_with_stats", "normalized_mse_loss", "normalized_mse_loss_with_stats"]
