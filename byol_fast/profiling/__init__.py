"""Roofline of a training step, and profiles of its time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_fast.profiling.ceilings import GPUS, Ceilings, measure, stated
    from byol_fast.profiling.flops import mfu
    from byol_fast.profiling.rooflines import Roofline, roofline
    from byol_fast.profiling.run import profile

__all__ = ["GPUS", "Ceilings", "Roofline", "measure", "mfu", "profile", "roofline", "stated"]

_HOME = {
    "GPUS": "ceilings",
    "Ceilings": "ceilings",
    "Roofline": "rooflines",
    "measure": "ceilings",
    "mfu": "flops",
    "profile": "run",
    "roofline": "rooflines",
    "stated": "ceilings",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the report of a run shows a profile without importing torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'byol_fast.profiling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"byol_fast.profiling.{_HOME[name]}"), name)
