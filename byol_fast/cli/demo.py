"""`byol-fast demo`."""

from __future__ import annotations

import time

from rich.table import Table

from byol_fast import config as configs
from byol_fast.cli.options import parse_config
from byol_fast.cli.run_end import print_end
from byol_fast.config import recipes
from byol_fast.training.preflight import check_start
from byol_fast.utils.commands import program
from byol_fast.utils.output import PlainConsole

NAMES = {
    "raw pixels": "raw pixels",
    "untrained": "untrained (norms calibrated)",
    "trained": "after BYOL, without labels",
}
"""Names of the classifiers in the table."""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    start = time.monotonic()
    config = parse_config(recipes.demo(), argv, "byol-fast demo")
    check_start(config)

    from byol_fast.api import pretrain
    from byol_fast.training.moved_images import MovedImages
    from byol_fast.utils.device import resolve_device

    if resolve_device(config.device).type == "cuda" and not {"--epochs", "--steps"} & set(argv):
        config = configs.replace(config, {"epochs": recipes.DEMO_GPU_EPOCHS})
    moved_images = MovedImages()
    # Other images may be many and large: the packaged ones are known to fit into memory.
    result = pretrain(recipe=config, callbacks=[moved_images] if config.data.root is None else [])
    if moved_images.top1:
        print_table(moved_images.top1, k=result.knn_k or config.knn.k)
    code = print_end(result, config, seconds=time.monotonic() - start)
    small = "--model.encoder resnet18 --image-size 64 --batch-size 64 --epochs 20"
    train = f"  {program()} train imagenet_resnet50_100 path/to/images"
    print(f"your own images, on a GPU:\n{train}\nor small, on a CPU:\n{train} {small}")
    return code


def print_table(top1: dict[str, dict[str, float]], *, k: int) -> None:
    """Print accuracies.

    Args:
        top1: accuracy, 0..1, by classifier and kind of test images.
        k: number of neighbors.
    """
    kinds = list(next(iter(top1.values())))
    table = Table(title=f"Fashion-MNIST, 10 classes: kNN-{k} top-1 accuracy on test images")
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name, values in top1.items():
        table.add_row(NAMES[name], *(f"{values[kind]:.1%}" for kind in kinds))
    PlainConsole().print(table)
