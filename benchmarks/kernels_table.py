"""Moved to `byol_fast.bench.counting`; kept until nothing imports it from here."""

from byol_fast.bench.counting import Case, Count, Suite, agree, is_installed

__all__ = ["Case", "Count", "Suite", "agree", "is_installed"]
