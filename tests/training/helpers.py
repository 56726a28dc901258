"""A small BYOL, its batches and its training step; small runs, also in processes of their own."""

from __future__ import annotations

import math
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from byol_fast.config import OptimConfig
from byol_fast.config.fields import ViewBatching
from byol_fast.data import Batch
from byol_fast.models import encoders
from byol_fast.models.base import SSLModel
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.callbacks import Callback
from byol_fast.training.train_step import StepOutput, TrainStep
from byol_fast.training.trainer import Trainer
from byol_fast.utils.precision import Precision
from tests.networks import SmallResidualNetwork

SCHEDULE = RunSchedule(total_steps=8, base_lr=20.0, batch_size=8, tau_base=0.9)
FP32, BF16, FP16 = Precision("fp32", None), Precision("bf16", torch.bfloat16), Precision("fp16", torch.float16)

SMALL_RUN: dict[str, Any] = {"model.encoder": "small", "data.loader": "threaded", "log": ()}
"""Changes that make `tiny` a run of a tenth of a second; see `use_small_encoder`."""

# Processes are forked from a server that has imported the package and has no threads: they start in milliseconds.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["byol_fast.training.trainer", "torchvision", "torch.utils.tensorboard", "pytest", "tests.training.helpers"]
)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes of all libraries fail behind this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def use_small_encoder() -> None:
    """Register the encoder of `SMALL_RUN` in this process, which is one of `FORK_SERVER`; use one thread."""
    encoders.OWN_ENCODERS["small"] = lambda **_: SmallResidualNetwork()
    torch.set_num_threads(1)


def small_byol(view_batching: ViewBatching = "batched") -> BYOL:
    # 32 px and not less: on CPUs torch's bf16 convolution of a single pixel with stride 2 returns garbage as its
    # weights' gradient (torch 2.15), which a ResNet meets at 16 px.
    torch.manual_seed(0)
    return BYOL("resnet18_narrow", hidden_dim=16, projection_dim=8, image_size=32, view_batching=view_batching)


def batches(count: int, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (count, 2, size, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return [Batch((v[0], v[1]), None, torch.arange(size)) for v in views]


def train_step(
    model: SSLModel, *, optimizer: str = "lars", momentum: float = 0.9, precision: Precision = FP32, **options: Any
) -> TrainStep:
    config = OptimConfig(
        name=optimizer,  # type: ignore[arg-type]
        momentum=momentum,
        weight_decay=0.01,
        trust_coefficient=0.1,
    )
    made = build_optimizer(config, model.trainable_parameters())
    return TrainStep(model, made, SCHEDULE, precision=precision, **options)


def everything(step: TrainStep) -> list[torch.Tensor]:
    return [t.detach().clone() for t in step.mutable_tensors() if t is not step.found_inf]


def poisoned(batch: Batch) -> Batch:
    """Normalized floats, one of them NaN."""
    view1 = batch.views[0].float() / 255
    view1[3, 1, 2, 5] = math.nan
    return Batch((view1, batch.views[1].float() / 255), batch.labels, batch.index)


def assert_target_is_a_copy(model: SSLModel) -> None:
    for name, tensor in model.networks()[1].state_dict().items():
        assert torch.equal(tensor, model.online.state_dict()[name]), name


class AtStep(Callback):
    """Calls a function after a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step == self.step:
            self.act()
