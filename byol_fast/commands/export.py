"""`byol-fast export`."""

from __future__ import annotations

from pathlib import Path

import tyro


def main(argv: list[str]) -> int:
    """Run it; return the exit code."""

    def export(run: tyro.conf.Positional[Path], to: Path | None = None) -> None:
        """Write the online encoder of a run's newest checkpoint.

        Args:
            run: the run folder.
            to: where to write encoder.safetensors and encoder.json; the run folder by default.
        """
        from byol_fast.export import export_run

        for path in export_run(run, to):
            print(path)

    tyro.cli(export, args=argv, prog="byol-fast export")
    return 0
