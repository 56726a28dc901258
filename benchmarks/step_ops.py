"""What a step asks of the device besides forward and backward: operators, and how often the host waits for a number.

    python -m benchmarks.step_ops [--save FOLDER]

ResNet-50 with the paper's heads, LARS and the moving average. Forward and backward are counted apart and subtracted.
lightly comes with `pip install byol_fast[peers]`.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import NamedTuple

import torch

from byol_fast.bench.counting import Case, Count
from byol_fast.bench.kernels import optimizer_suite
from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models.base import SSLModel
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.train_step import TrainStep
from byol_fast.utils import env
from byol_fast.utils.files import atomic_path, atomic_write

SCHEDULE = RunSchedule(
    total_steps=100, warmup_steps=0, base_lr=0.2, batch_size=256, lr_schedule="cosine", tau_base=0.99,
    tau_schedule="cosine",
)  # fmt: skip


class Asked(NamedTuple):
    """Operators that reached the device, and how many of them the host waited for."""

    ops: int
    syncs: int

    def __sub__(self, other: Asked) -> Asked:
        return Asked(self.ops - other.ops, self.syncs - other.syncs)


def asked_by(case: Case) -> Asked:
    """Counts one call; call it once before, so that what happens only once is over."""
    with Count() as count:
        case()
    return Asked(count.ops, count.syncs)


def outside_forward_and_backward(model: SSLModel, size: int) -> tuple[Asked, Asked]:
    """What a trainer's step adds to forward and backward, and what LARS with the moving average have of that.

    Args:
        model: networks and loss, on the CPU.
        size: edge of the views in pixels.
    """
    config = OptimConfig(name="lars", weight_decay=1e-6)
    step = TrainStep(model, build_optimizer(config, model.trainable_parameters()), SCHEDULE)
    views = torch.randint(0, 256, (2, 4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch((views[0], views[1]), None, torch.arange(4))

    def forward_backward() -> None:
        step.forward_backward(step.to_device(batch.views))

    step(batch, 0)
    whole = asked_by(lambda: step(batch, 1))
    forward_backward()
    step.optimizer.zero_grad(set_to_none=True)
    networks = asked_by(forward_backward)
    return whole - networks, asked_by(step.update_weights_and_target)


def rows() -> list[tuple[str, Asked]]:
    """Who, and what they ask of the device in a step."""
    torch.manual_seed(0)
    everything, update = outside_forward_and_backward(BYOL("resnet50", image_size=32), 32)
    found = [("ours: LARS and average", update), ("ours: the whole step outside forward and backward", everything)]
    for name, case in optimizer_suite("cpu").cases.items():
        if not name.startswith("ours"):
            case()
            found.append((name, asked_by(case)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="folder for step_ops.csv and env.json")
    arguments = parser.parse_args()
    found = rows()
    for name, asked in found:
        print(f"{name:60s}{asked.ops:6d} operators {asked.syncs:5d} host syncs")
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        with atomic_path(arguments.save / "step_ops.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("provider", "ops", "host_syncs"))
            writer.writerows((name, *asked) for name, asked in found)
        record = env.measured_on(torch.device("cpu"))
        atomic_write(arguments.save / "environment.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
