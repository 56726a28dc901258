"""Roofline of a training step, and profiles of its time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_fast.profiling.ceilings import GPUS, Ceilings, measure, stated
    from byol_fast.profiling.flops import mfu
    from byol_fast.profiling.rooflines import Roofline, roofline
    from byol_fast.profiling.run import profile
    from byol_fast.training.memory_estimate import estimate_memory

__all__ = ["GPUS", "Ceilings", "Roofline", "estimate_memory", "measure", "mfu", "profile", "roofline", "stated"]

_HOME = {
    "GPUS": "profiling.ceilings",
    "Ceilings": "profiling.ceilings",
    "Roofline": "profiling.rooflines",
    "estimate_memory": "training.memory_estimate",
    "measure": "profiling.ceilings",
    "mfu": "profiling.flops",
    "profile": "profiling.run",
    "roofline": "profiling.rooflines",
    "stated": "profiling.ceilings",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the report of a run shows a profile without importing torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'byol_fast.profiling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"byol_fast.{_HOME[name]}"), name)
