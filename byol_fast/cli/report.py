"""`byol-fast report`."""

from __future__ import annotations

from pathlib import Path

import tyro


def main(argv: list[str]) -> int:
    """Run it; return the exit code."""

    def report(
        runs: tyro.conf.Positional[tuple[Path, ...]],
        to: Path | None = None,
        images: Path | None = None,
        open_nothing: bool = False,
        num: int = 2000,
    ) -> None:
        """Write one HTML page about a run: curves, evaluations, views, neighbours, a map of the features, options.

        Args:
            runs: the run folder; several are compared.
            to: the file to write; report.html in the run folder by default, ./report.html for several runs.
            images: where the run's images are now, if they were moved.
            open_nothing: open no image and no encoder: only what the run folder's own records say.
            num: images that are embedded at most, for neighbours and map.
        """
        from byol_fast.report.build import report as write

        print(write(runs, to, images=images, pictures=not open_nothing, num=num))

    tyro.cli(report, args=argv, prog="byol-fast report")
    return 0
