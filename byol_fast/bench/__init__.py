"""Timing of alternatives side by side, and the suites of `byol-fast bench`."""
