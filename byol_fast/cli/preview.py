"""`byol-fast preview`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from byol_fast import config as configs
from byol_fast.cli.options import print_error
from byol_fast.config import Config, recipes

USAGE = """\
usage: byol-fast preview RECIPE [--data.root FOLDER] [--num N] [--output FILE.png] [--epoch E] [--check] [--option ...]

Draws images, their two views as in training and the augmentation parameters into preview.png. With --check it also
compares every operator with torchvision on your images, and exits with 1 if an error is too large.
`byol-fast preview RECIPE --help` lists every option with the recipe's value.
"""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if name is None:
        print(USAGE, end="")
        return 0 if argv and argv[0] in {"-h", "--help"} else print_error("byol-fast preview: a recipe is missing", 2)
    recipe = recipes.get(name)

    def options(
        config: Annotated[Config, tyro.conf.arg(name="")] = recipe,
        num: int = 8,
        output: Path = Path("preview.png"),
        epoch: int = 0,
        check: bool = False,
    ) -> tuple[Config, int, Path, int, bool]:
        """Draw a contact sheet of images and their views in training.

        Args:
            config: of the run.
            num: number of images: the first ones of the epoch.
            output: PNG file.
            epoch: pass over the data, from 0; each has other views.
            check: compare every operator with torchvision on these images, and exit with 1 if an error is too large.
        """
        return config, num, output, epoch, check

    config, num, output, epoch, check = tyro.cli(options, args=argv, prog=f"byol-fast preview {name}")

    from byol_fast.data import open_train_val
    from byol_fast.report import preview, view_check
    from byol_fast.utils.device import resolve_device

    preview.check_path(output)
    device = resolve_device(config.device)
    source, _ = open_train_val(configs.replace(config, {"knn.enabled": "off"}))
    preview.write(preview.contact_sheet(source, config, device=device, num=num, epoch=epoch), output)
    print(output)
    if not check:
        return 0
    num_checks = num_failed = 0
    for result in view_check.compare(source, config, device):
        print(result, flush=True)
        num_checks, num_failed = num_checks + 1, num_failed + (not result.ok)
    print("errors in levels of 255: largest / mean, and the largest that rounding explains")
    print(f"{num_checks} errors checked, {num_failed or 'none'} too large")
    return 1 if num_failed else 0
