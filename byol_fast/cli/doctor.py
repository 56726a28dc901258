"""`byol-fast doctor`."""

from __future__ import annotations

import tyro


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    from byol_fast.doctor import main as doctor

    return doctor.main(tyro.cli(doctor.Options, args=argv, prog="byol-fast doctor"))
