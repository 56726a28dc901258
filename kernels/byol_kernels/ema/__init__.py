"""EMA of the target network, for all tensors in one launch."""

from byol_kernels.ema.ops import ema_update_

__all__ = ["ema_update_"]
