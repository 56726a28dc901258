"""`byol-fast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from byol_fast.report.reading import check_is_run


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""

    def report(
        runs: tyro.conf.Positional[tuple[Path, ...]],
        output: Path | None = None,
        images: Path | None = None,
        no_images: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
        num: int = 2000,
    ) -> None:
        """Write an HTML page about a run: curves, evaluations, views, neighbors, a map of the features, options.

        Args:
            runs: run folder; several are compared.
            output: output file; report.html in the run folder by default, ./report.html for several runs.
            images: current location of the images, if they were moved.
            no_images: read no image and no encoder: report only the run folder's records.
            num: largest number of images that are embedded for neighbors and map.
        """
        for folder in runs:
            check_is_run(folder)

        from byol_fast.profiling.page import run_sections
        from byol_fast.report.build import report as write

        print(write(runs, output, images=images, pictures=not no_images, num=num, extra_sections=run_sections))

    tyro.cli(report, args=argv, prog="byol-fast report")
    return 0
