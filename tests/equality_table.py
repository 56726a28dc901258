"""Ways to run the same five steps, and how far apart their weights end.

    python -m tests.equality_table

ResNet-18 at 32 px in fp32 and float64, LARS at a rate of 0.1, on random images; the largest difference of any weight or
running statistic of both networks, and that relative to how far the weights moved. A Markdown table.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from byol_fast import checkpoint as checkpoints
from byol_fast import config as configs
from byol_fast import recipes
from byol_fast.capture import Mode, compiled
from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.methods import BYOL
from byol_fast.optim import make_optimizer
from byol_fast.schedules import RunSchedule
from byol_fast.step import TrainStep

STEPS, BATCH = 5, 16
SCHEDULE = RunSchedule(
    total_steps=STEPS,
    warmup_steps=0,
    base_lr=0.1,
    batch_size=256,
    lr_schedule="cosine",
    tau_base=0.99,
    tau_schedule="cosine",
)
State = dict[str, Tensor]


def model(views: str) -> BYOL:
    torch.manual_seed(0)
    return BYOL("resnet18", image_size=32, hidden_dim=512, projection_dim=64, views=views)  # type: ignore[arg-type]


def run(dtype: torch.dtype, *, views: str = "batched", mode: str = "eager", accumulate: int = 1) -> State:
    task = model(views).to(dtype)
    optimizer = make_optimizer(OptimConfig(weight_decay=1e-4, eta=0.02), task.trainable_parameters())
    forward = compiled(task, Mode(mode, "for the table"))  # type: ignore[arg-type]
    step = TrainStep(task, optimizer, SCHEDULE, forward=forward, accumulate=accumulate)
    generator = torch.Generator().manual_seed(1)
    for k in range(STEPS):
        # Floats of the network's dtype: bytes would be normalised in fp32.
        view1, view2 = torch.randn(2, BATCH, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        # The same batch each time: batch norm sees the same images, and the mean of its gradients is one's.
        step([Batch(view1, view2, torch.arange(BATCH))] * accumulate, k)
    return copy.deepcopy(task.state_dict())


def processes(count: int) -> State:
    """Whole runs from the command line on shared images; batch norm over all processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", images=images)
        config = configs.replace(
            recipes.cifar10_resnet18(),
            {
                "data": {"root": folder / "images.npz", "loader": "torchvision", "threads": 1},
                "model": {"hidden_dim": 512, "projection_dim": 64, "cifar_stem": False},
                "optim": {"lr": 0.1, "scale_lr": False, "warmup_steps": 0},
                "batch_size": BATCH // count,
                "steps": STEPS,
                "precision": "fp32",
                "device": "cpu",
                "out": folder / "runs",
                "name": "run",
            },
        )
        (folder / "config.json").write_text(json.dumps(configs.to_dict(config)))
        (folder / "run.py").write_text(
            "import sys; from pathlib import Path; from byol_fast import cli, config, recipes\n"
            "recipes.RECIPES['spec'] = lambda: config.load(Path(sys.argv[1]))\n"
            "cli.main(['train', 'spec'])\n"
        )
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*launch, str(folder / "run.py"), str(folder / "config.json")]
        subprocess.run(command, check=True, capture_output=True)
        state: State = checkpoints.load_latest(folder / "runs" / "run" / "checkpoints")["task"]
        return state


def distance(a: State, b: State, start: State) -> tuple[float, float]:
    """Largest difference, and the difference of all weights relative to how far they moved."""
    largest = max(float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].is_floating_point())
    weights = [n for n in a if n.startswith("online") and "running" not in n and a[n].is_floating_point()]
    apart = sum(float((a[n].double() - b[n].double()).square().sum()) for n in weights)
    moved = sum(float((a[n].double() - start[n].double()).square().sum()) for n in weights)
    return largest, (apart / moved) ** 0.5


def main() -> None:
    torch.set_num_threads(1)
    start = model("batched").state_dict()
    cases: list[tuple[str, Callable[[torch.dtype], State], Callable[[torch.dtype], State]]] = [
        ("views separate / batched", lambda d: run(d, views="separate"), run),
        ("eager / compile", run, lambda d: run(d, mode="compile")),
        ("accumulate 1 / 4", run, lambda d: run(d, accumulate=4)),
    ]
    print("| | dtype | largest difference | relative to the weights' movement |\n|---|---|---|---|")
    for name, first, second in cases:
        for dtype in (torch.float32, torch.float64):
            a, b = first(dtype), second(dtype)
            if name.startswith("accumulate"):  # four times as many batches have moved the statistics, by design
                a, b = ({n: t for n, t in s.items() if "running" not in n} for s in (a, b))
            largest, relative = distance(a, b, start)
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {largest:.1e} | {relative:.1e} |", flush=True)
    # The command line's seed is the table's, so its runs begin at the same weights.
    largest, relative = distance(processes(1), processes(2), start)
    print(f"| processes 1 / 2 | float32 | {largest:.1e} | {relative:.1e} |")


if __name__ == "__main__":
    main()
