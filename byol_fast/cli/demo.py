"""`byol-fast demo`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.table import Table

from byol_fast import config as configs
from byol_fast.cli.options import parse_config
from byol_fast.cli.train import print_outputs
from byol_fast.config import recipes
from byol_fast.training.preflight import check_start
from byol_fast.utils.output import PlainConsole


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    config = parse_config(recipes.demo(), argv, "byol-fast demo")
    check_start(config)

    from byol_fast.api import pretrain
    from byol_fast.utils.device import resolve_device

    if resolve_device(config.device).type == "cuda" and not {"--epochs", "--steps"} & set(argv):
        config = configs.replace(config, {"epochs": recipes.DEMO_GPU_EPOCHS})
    start = time.monotonic()
    result = pretrain(recipe=config)
    table = Table(title="Fashion-MNIST, 10 classes: kNN accuracy of the features")
    table.add_column("encoder")
    table.add_column(f"kNN-{result.knn_k or config.knn.k} top-1", justify="right")
    if result.knn_top1 is not None and result.knn_top1_untrained is not None:
        table.add_row("untrained (norms calibrated)", f"{result.knn_top1_untrained:.1%}")
        table.add_row("after BYOL, without labels", f"{result.knn_top1:.1%}")
        gain = round(100 * result.knn_top1, 1) - round(100 * result.knn_top1_untrained, 1)
        table.add_row("gain", f"{gain:+.1f} points")
    PlainConsole().print(table)
    print(f"{result.steps} steps in {time.monotonic() - start:.0f} s, including evaluations")
    print_outputs(result)
    program = Path(sys.executable).with_name("byol-fast")
    print(
        f"next: your own images, on a GPU:\n  {program} train imagenet_resnet50_100 --data.root FOLDER\n"
        f"or small, on a CPU:\n  {program} train imagenet_resnet50_100 --data.root FOLDER --model.encoder resnet18 "
        "--view1.size 64 --view2.size 64 --batch-size 64 --epochs 20"
    )
    return 0
