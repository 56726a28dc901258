"""Interleaved timing of alternatives, and the suites of `byol-fast bench`."""
