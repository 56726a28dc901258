"""Optimizers, and the learning rate and tau by step."""

from byol_fast.optim.optimizers import make_optimizer
from byol_fast.optim.schedules import RunSchedule, lr_at, tau_at

__all__ = ["RunSchedule", "lr_at", "make_optimizer", "tau_at"]
