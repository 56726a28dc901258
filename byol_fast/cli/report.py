"""`byol-fast report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from byol_fast.cli.options import parse, print_error
from byol_fast.report.reading import check_is_run

USAGE = """\
usage: byol-fast report RUN [RUN ...] [--output FILE.html] [--images FOLDER] [--no-images]

Writes report.html into the run folder; several runs are compared in ./report.html.
`byol-fast report --help` lists the options.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write an HTML page about a run: curves, evaluations, views, neighbors, a map of the features, options."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folder; several are compared."""
    output: Path | None = None
    """Output file; report.html in the run folder by default, ./report.html for several runs."""
    images: Path | None = None
    """Current location of the images, if they were moved."""
    no_images: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read no image and no encoder: report only the run folder's records."""
    num: int = 2000
    """Largest number of images that are embedded for neighbors and map."""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse(Options, argv, "byol-fast report")
    if not options.runs:
        print(USAGE, end="")
        return print_error("byol-fast report: a run folder is missing", 2)
    for folder in options.runs:
        check_is_run(folder)

    from byol_fast.profiling.page import run_sections
    from byol_fast.report.build import report

    path = report(
        options.runs,
        options.output,
        images=options.images,
        pictures=not options.no_images,
        num=options.num,
        extra_sections=run_sections,
    )
    print(path)
    return 0
