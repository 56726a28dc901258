"""`byol-fast doctor`."""

from __future__ import annotations

import tyro


def main(argv: list[str]) -> int:
    """Run it; return the exit code."""
    from byol_fast.doctor.main import Options, examine

    return examine(tyro.cli(Options, args=argv, prog="byol-fast doctor"))
