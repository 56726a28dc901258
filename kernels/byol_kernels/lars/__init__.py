"""LARS, with the EMA of the target and low-precision copies, for all parameters in two launches."""

from byol_kernels.lars.optimizer import LARS

__all__ = ["LARS"]
