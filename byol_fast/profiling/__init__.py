"""How fast a step could be, and where its time goes."""

from byol_fast.profiling.ceilings import GPUS, Ceilings, measure, stated
from byol_fast.profiling.flops import mfu
from byol_fast.profiling.roofline import Roofline, roofline

__all__ = ["GPUS", "Ceilings", "Roofline", "measure", "mfu", "roofline", "stated"]
