"""Steps of a small network in each mode, precision and optimizer, for dry runs and for a test on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

import torch
from torch import Tensor

from byol_fast.config import Config, ConfigError, OptimConfig
from byol_fast.data import Batch
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.mode import Mode, compile_forward, resolve_mode
from byol_fast.training.train_step import TrainStep
from byol_fast.utils.precision import resolve_precision
from tests.networks import SmallResidualNetwork

ModeName = Literal["eager", "compile", "graph"]
PrecisionName = Literal["bf16", "fp16", "fp32"]
OptimizerName = Literal["lars", "sgd", "adamw"]

IMAGE_SIZE = 16
BATCH_SIZE = 8
STEPS = 3
"""The optimizer makes its state in the first; a graph is captured before the first and replayed in each."""
SCHEDULE = RunSchedule(total_steps=STEPS, base_lr=0.2, batch_size=BATCH_SIZE, tau_base=0.9)


class Combination(NamedTuple):
    """Mode, precision and optimizer of a step."""

    mode: ModeName
    precision: PrecisionName
    optimizer: OptimizerName

    def __str__(self) -> str:
        return " ".join(self)


def combinations() -> list[Combination]:
    """Every combination that the package accepts on one GPU."""
    every = itertools.product(get_args(ModeName), get_args(PrecisionName), get_args(OptimizerName))
    return [combination for combination in itertools.starmap(Combination, every) if _accepted(combination)]


def _accepted(combination: Combination) -> bool:
    device = torch.device("cuda")
    config = Config(mode=combination.mode, precision=combination.precision)
    try:
        resolve_mode(config, device, resolve_precision(combination.precision, device))
    except ConfigError:
        return False
    return True


def build_step(
    combination: Combination, device: torch.device, on_forward: Callable[[TrainStep], None] | None = None
) -> TrainStep:
    """A training step of the small network, put together as the trainer does it.

    Args:
        combination: how it is run. Without a GPU, mode "graph" is only compile_forward.
        device: where it runs.
        on_forward: called with the step when it is made, and at the beginning of each forward pass.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()  # torch compiles a function for eight models at most, and runs it eagerly from then on
    model = BYOL(SmallResidualNetwork(), hidden_dim=16, projection_dim=8, image_size=IMAGE_SIZE)
    model.to(device).to(memory_format=torch.channels_last)
    config = OptimConfig(name=combination.optimizer, weight_decay=1e-4)
    optimizer = build_optimizer(config, model.trainable_parameters(), list(model.online.predictor.parameters()))
    with aot_eager():
        forward = compile_forward(model, Mode(combination.mode, "as asked"))
    step: TrainStep

    def observed(*views: Tensor, **options: Any) -> Any:
        if on_forward is not None:
            on_forward(step)
        return forward(*views, **options)

    step = TrainStep(
        model, optimizer, SCHEDULE, precision=resolve_precision(combination.precision, device), forward=observed
    )
    if on_forward is not None:
        on_forward(step)
    if combination.mode == "graph" and device.type == "cuda":
        step.use_cuda_graph()
    return step


@contextmanager
def aot_eager() -> Iterator[None]:
    """Let torch.compile trace as always, and run the traced operators one by one instead of generating kernels."""
    compile_ = torch.compile

    def traced(model: Any, **options: Any) -> Any:
        kept = {name: options[name] for name in ("dynamic", "fullgraph") if name in options}
        return compile_(model, backend="aot_eager", **kept)

    with mock.patch.object(torch, "compile", traced):
        yield


def batch() -> Batch:
    """Two views of random pixels, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    view1, view2 = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Batch((view1, view2), None, torch.arange(BATCH_SIZE))
