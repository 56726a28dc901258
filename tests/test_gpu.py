"""Whole runs on a GPU: the same as on the CPU, with DALI's GPU backend and the compiled step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.metrics import read
from byol_fast.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def gpu(tiny: Config) -> Config:
    return configs.replace(tiny, {"device": "cuda", "compile": "off"})


def losses(config: Config, **changes: object) -> list[float]:
    run = Trainer(configs.replace(config, changes)).fit().run_dir
    return [r["loss"] for r in read(run / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss(gpu: Config, loader: str, precision: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = configs.replace(gpu, {"data.loader": loader, "precision": precision, "optim.lr": 2.0, "steps": 40})
    trainer = Trainer(config)
    assert next(trainer.task.parameters()).is_cuda
    assert trainer.state.loader.backend.startswith(loader)
    found = [r["loss"] for r in read(trainer.fit().run_dir / "metrics.jsonl")]
    assert np.mean(found[-8:]) < 0.9 * np.mean(found[:8])


def test_compiled_first_step_equals_the_eager_one(gpu: Config) -> None:
    short = {"steps": 1, "data.loader": "torchvision", "optim.warmup_steps": 0}
    (eager,) = losses(gpu, **short, name="eager")
    (compiled,) = losses(gpu, **short, name="compiled", compile="on")
    assert math.isclose(eager, compiled, rel_tol=1e-4)  # fp32 sums of some thousand terms in another order


def test_gpu_and_cpu_take_the_same_first_step(gpu: Config) -> None:
    short = {"steps": 1, "data.loader": "torchvision", "optim.warmup_steps": 0}
    torch.backends.cudnn.allow_tf32 = False
    try:
        (on_gpu,) = losses(gpu, **short, name="gpu")
    finally:
        torch.backends.cudnn.allow_tf32 = True
    (on_cpu,) = losses(gpu, **short, name="cpu", device="cpu")
    assert math.isclose(on_gpu, on_cpu, rel_tol=1e-4)


def test_resumed_run_goes_on_where_it_stopped(gpu: Config) -> None:
    whole = losses(gpu, name="whole", **{"data.loader": "torchvision"})
    half = configs.replace(gpu, {"name": "half", "data.loader": "torchvision", "checkpoint_every": 6})
    trainer = Trainer(half)
    trainer.total_steps = 6  # as if killed there: the schedules still count to 12
    run = trainer.fit().run_dir
    Trainer(half, resume=run).fit()
    resumed = [r["loss"] for r in read(run / "metrics.jsonl") if "loss" in r]
    # cuDNN's sums are not repeatable and training amplifies them; another batch or schedule would differ by tenths.
    assert resumed == pytest.approx(whole, rel=0.02)
