"""Measuring: interleaved rounds, medians with their spread, and the record of the machine."""

from byol_fast.bench.table import Table
from byol_fast.bench.timing import Timing, interleaved, ratio

__all__ = ["Table", "Timing", "interleaved", "ratio"]
