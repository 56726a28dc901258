"""Ways to run the same five steps, and how far apart their weights end.

    python -m tests.equality_table

ResNet-18 at 32 px in fp32 and float64, LARS at a rate of 0.1, on random images; the largest difference of any weight or
running statistic of both networks, and that relative to how far the weights moved. A Markdown table.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models import split_batchnorm
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training import distributed
from byol_fast.training.mode import Mode, compile_forward
from byol_fast.training.train_step import TrainStep

STEPS, BATCH = 5, 16
SCHEDULE = RunSchedule(total_steps=STEPS, base_lr=0.1, tau_base=0.99)
State = dict[str, Tensor]


def small_model(views: str) -> BYOL:
    torch.manual_seed(0)
    return BYOL("resnet18", image_size=32, hidden_dim=512, projection_dim=64, view_batching=views)  # type: ignore[arg-type]


def batches(dtype: torch.dtype) -> list[Batch]:
    """Floats of the network's dtype: bytes would be normalized in fp32."""
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(STEPS, 2, BATCH, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return [Batch((view1, view2), None, torch.arange(BATCH)) for view1, view2 in views]


def run(dtype: torch.dtype, *, views: str = "batched", mode: str = "eager", grad_accum_steps: int = 1) -> State:
    model = small_model(views).to(dtype)
    optimizer = build_optimizer(OptimConfig(weight_decay=1e-4, trust_coefficient=0.02), model.trainable_parameters())
    forward = compile_forward(model, Mode(mode, "for the table"))  # type: ignore[arg-type]
    step = TrainStep(model, optimizer, SCHEDULE, forward=forward, grad_accum_steps=grad_accum_steps)
    for k, batch in enumerate(batches(dtype)):
        # The same batch each time: batch norm sees the same images, and the mean of its gradients is one's.
        step([batch] * grad_accum_steps, k)
    return copy.deepcopy(model.state_dict())


def processes(dtype: torch.dtype, count: int) -> State:
    """The same steps by several processes, each with its share of every batch; batch norm over all of them."""
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "state.pt"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*launch, "-m", "tests.equality_table", str(dtype).removeprefix("torch."), str(result)]
        subprocess.run(command, check=True, capture_output=True)
        state: State = torch.load(result, weights_only=True)
        return state


def one_of_several(dtype: torch.dtype, result: Path) -> None:
    torch.set_num_threads(1)
    world = distributed.init_process_group("cpu", 5)
    model = small_model("batched").to(dtype)
    for network in model.networks():
        split_batchnorm.convert_sync_batchnorm(network)
    model.wrap_online(lambda network: distributed.wrap_ddp(network, torch.device("cpu")))
    optimizer = build_optimizer(OptimConfig(weight_decay=1e-4, trust_coefficient=0.02), model.trainable_parameters())
    step = TrainStep(model, optimizer, SCHEDULE, all_reduce_found_inf=distributed.all_reduce_found_inf)
    for k, batch in enumerate(batches(dtype)):
        mine = slice(world.rank, None, world.size)
        step(Batch((batch.views[0][mine], batch.views[1][mine]), None, batch.index[mine]), k)
    if world.is_main_process:
        torch.save(model.state_dict(), result)
    distributed.destroy_process_group()


def distance(a: State, b: State, start: State) -> tuple[float, float]:
    """Largest difference, and the difference of all weights relative to how far they moved."""
    largest = max(float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].is_floating_point())
    weights = [n for n in a if n.startswith("online") and "running" not in n and a[n].is_floating_point()]
    apart = sum(float((a[n].double() - b[n].double()).square().sum()) for n in weights)
    moved = sum(float((a[n].double() - start[n].double()).square().sum()) for n in weights)
    return largest, (apart / moved) ** 0.5


def main() -> None:
    torch.set_num_threads(1)
    start = small_model("batched").state_dict()
    cases: list[tuple[str, Callable[[torch.dtype], State], Callable[[torch.dtype], State]]] = [
        ("views separate / batched", lambda d: run(d, views="separate"), run),
        ("eager / compile", run, lambda d: run(d, mode="compile")),
        ("grad_accum_steps 1 / 4", run, lambda d: run(d, grad_accum_steps=4)),
        ("processes 1 / 2", run, lambda d: processes(d, 2)),
    ]
    print("| | dtype | largest difference | relative to the weights' movement |\n|---|---|---|---|")
    for name, first, second in cases:
        for dtype in (torch.float32, torch.float64):
            a, b = first(dtype), second(dtype)
            if name.startswith("grad_accum_steps"):  # four times as many batches have moved the statistics, by design
                a, b = ({n: t for n, t in s.items() if "running" not in n} for s in (a, b))
            largest, relative = distance(a, b, start)
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {largest:.1e} | {relative:.1e} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_of_several(getattr(torch, sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
