"""Running statistics of batch normalization, for all layers in one launch."""

from byol_kernels.running_stats.ops import update_running_stats_

__all__ = ["update_running_stats_"]
