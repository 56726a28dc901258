"""`byol-fast doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from byol_fast.cli.options import one_folder, parse
from byol_fast.data.sources.paths import check_path


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    from byol_fast.doctor import main as doctor

    options = parse(doctor.Options, argv, "byol-fast doctor")
    if options.folder:
        folder = Path(one_folder(options.folder, argv, "byol-fast doctor"))
        options = replace(options, data=replace(options.data, root=folder))
    if options.data.root is not None:
        check_path(options.data.root, "data.root")
    return doctor.main(options)
