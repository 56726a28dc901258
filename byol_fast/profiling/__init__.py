"""Roofline of a training step, and profiles of its time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byol_fast.utils.lazy import on_first_use

if TYPE_CHECKING:
    from byol_fast.profiling.ceilings import Ceilings, measure, stated
    from byol_fast.profiling.flops import mfu
    from byol_fast.profiling.gpus import GPUS
    from byol_fast.profiling.rooflines import Roofline, roofline
    from byol_fast.profiling.run import profile
    from byol_fast.training.memory_estimate import estimate_memory

__all__ = ["GPUS", "Ceilings", "Roofline", "estimate_memory", "measure", "mfu", "profile", "roofline", "stated"]

_MODULES = {
    "GPUS": "byol_fast.profiling.gpus",
    "Ceilings": "byol_fast.profiling.ceilings",
    "Roofline": "byol_fast.profiling.rooflines",
    "estimate_memory": "byol_fast.training.memory_estimate",
    "measure": "byol_fast.profiling.ceilings",
    "mfu": "byol_fast.profiling.flops",
    "profile": "byol_fast.profiling.run",
    "roofline": "byol_fast.profiling.rooflines",
    "stated": "byol_fast.profiling.ceilings",
}

__getattr__ = on_first_use(__name__, _MODULES)
