"""Operators and host synchronizations of a training step besides forward and backward.

    python -m benchmarks.step_ops [--save FOLDER]

ResNet-50 with the paper's heads, LARS and EMA. Forward and backward are counted separately and subtracted.
`pip install '.[peers]'` installs lightly.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.tables import save_table
from byol_fast.bench.counting import Case, OperatorCounter
from byol_fast.bench.kernels import optimizer_suite
from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models.base import SSLModel
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.train_step import TrainStep

COLUMNS = ("provider", "ops", "host_syncs")
SCHEDULE = RunSchedule(total_steps=100, base_lr=0.2, tau_base=0.99)


class Counts(NamedTuple):
    """Operators that reached the device, and those that the host waited for."""

    ops: int
    syncs: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.ops - other.ops, self.syncs - other.syncs)


def count_operators(case: Case) -> Counts:
    """Counts of one call; call the case once before, because the first call allocates state."""
    with OperatorCounter() as count:
        case()
    return Counts(count.ops, count.syncs)


def outside_forward_and_backward(model: SSLModel, size: int) -> tuple[Counts, Counts]:
    """Counts of a step without forward and backward, and of LARS and EMA alone.

    Args:
        model: networks and loss, on the CPU.
        size: height and width of the views in pixels.
    """
    config = OptimConfig(name="lars", weight_decay=1e-6)
    step = TrainStep(model, build_optimizer(config, model.trainable_parameters()), SCHEDULE)
    views = torch.randint(0, 256, (2, 4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch((views[0], views[1]), None, torch.arange(4))

    def forward_backward() -> None:
        step.forward_backward(step.to_device(batch.views))

    step(batch, 0)
    total = count_operators(lambda: step(batch, 1))
    forward_backward()
    step.optimizer.zero_grad(set_to_none=True)
    networks = count_operators(forward_backward)
    return total - networks, count_operators(step.update_weights_and_target)


def rows() -> list[tuple[str, Counts]]:
    """Counts of byol_fast and of other libraries, by name."""
    torch.manual_seed(0)
    step, update = outside_forward_and_backward(BYOL("resnet50", image_size=32), 32)
    counts = [("byol_fast: LARS and EMA", update), ("byol_fast: step without forward and backward", step)]
    for name, case in optimizer_suite("cpu").cases.items():
        if not name.startswith("byol_fast"):
            case()
            counts.append((name, count_operators(case)))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="folder for step_ops.csv and environment.json")
    arguments = parser.parse_args()
    counts = rows()
    for name, count in counts:
        print(f"{name:60s}{count.ops:6d} operators {count.syncs:5d} host syncs")
    save_table(arguments.save, "step_ops", COLUMNS, [(name, *count) for name, count in counts], device="cpu")


if __name__ == "__main__":
    main()
