"""Optimizers, and the learning rate and tau by step."""

from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule, lr_at, tau_at

__all__ = ["RunSchedule", "build_optimizer", "lr_at", "tau_at"]
