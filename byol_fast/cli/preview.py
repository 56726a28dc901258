"""`byol-fast preview`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from byol_fast import config as configs
from byol_fast.cli.options import RunOptions, find_recipe, parse, print_error
from byol_fast.config.fields import Range, check_fields
from byol_fast.data.sources.paths import check_images
from byol_fast.utils.files import check_png_file

USAGE = """\
usage: byol-fast preview RECIPE [FOLDER] [--num N] [--output FILE.png] [--epoch E] [--check] [--option ...]

Draws images, their views as in training and the augmentation parameters into preview.png. With --check it also
compares every operator with torchvision on your images, and exits with 1 if an error is too large.
`byol-fast preview RECIPE --help` lists every option with the recipe's value.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw a contact sheet of images and their views in training."""

    run: Annotated[RunOptions, tyro.conf.arg(name="")]
    """Options of the run."""
    num: Annotated[int, Range(1, 256)] = 8
    """Number of images: the first ones of the epoch."""
    output: Path = Path("preview.png")
    """PNG file."""
    epoch: Annotated[int, Range(0, 1_000_000)] = 0
    """Pass over the data, from 0; each has other views."""
    check: bool = False
    """Compare every operator with torchvision on these images, and exit with 1 if an error is too large."""

    def __post_init__(self) -> None:
        check_fields(self, "preview: ")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if name is None:
        print(USAGE, end="")
        return 0 if argv and argv[0] in {"-h", "--help"} else print_error("byol-fast preview: a recipe is missing", 2)
    prog = f"byol-fast preview {name}"
    options = parse(Options, argv, prog, Options(run=RunOptions(config=find_recipe(name, "byol-fast preview"))))
    config = options.run.resolve(argv, prog)
    check_png_file(options.output, "preview", "output")
    check_images(config)

    from byol_fast.data import open_train_val
    from byol_fast.report import preview, view_check
    from byol_fast.utils.device import resolve_device

    device = resolve_device(config.device)
    source, _ = open_train_val(configs.replace(config, {"knn.enabled": "off"}))
    sheet = preview.contact_sheet(source, config, device=device, num=options.num, epoch=options.epoch)
    preview.write(sheet, options.output)
    print(options.output)
    if not options.check:
        return 0
    num_checks = num_failed = 0
    for result in view_check.compare(source, config, device):
        print(result, flush=True)
        num_checks, num_failed = num_checks + 1, num_failed + (not result.ok)
    print("errors in levels of 255: largest / mean, and the largest that rounding explains")
    print(f"{num_checks} errors checked, {num_failed or 'none'} too large")
    return 1 if num_failed else 0
