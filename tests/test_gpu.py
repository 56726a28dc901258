"""Whole runs on a GPU: the same as on the CPU, with DALI's GPU backend and the compiled step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.data import Batch
from byol_fast.metrics import read
from byol_fast.trainer import Trainer, TrainingError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def gpu(tiny: Config) -> Config:
    return configs.replace(tiny, {"device": "cuda", "mode": "eager"})


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


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_every_mode_takes_the_steps_of_the_eager_one(gpu: Config, mode: str) -> None:
    """Losses of six steps, in true fp32: rates, momentum and statistics move in a replay as they should."""
    short = {"steps": 6, "data.loader": "torchvision", "optim.warmup_steps": 2, "optim.lr": 0.2, "precision": "fp32"}
    eager = losses(gpu, **short, name="eager")
    other = losses(gpu, **short, name=mode, mode=mode)
    # Sums of some thousand terms in another order, amplified by six steps; a stale rate would show in the fourth digit.
    assert other == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_a_captured_step_that_is_not_finite_is_undone(gpu: Config, optimizer: str) -> None:
    config = configs.replace(gpu, {"mode": "graph", "optim.name": optimizer, "data.loader": "torchvision"})
    trainer = Trainer(config)
    step, loader = trainer.train_step, trainer.state.loader
    first, second = (next(loader) for _ in range(2))
    ready = [Batch(b.view1.float() / 255, b.view2.float() / 255, b.index) for b in (first, second)]
    assert step(ready[0], 0).undone.item() == 0
    before = [t.detach().clone() for t in step.changing() if t is not step.bad]
    poisoned = ready[1].view1.clone()
    poisoned[1, 2, 3, 4] = math.nan
    assert step(Batch(poisoned, ready[1].view2, ready[1].index), 1).undone.item() == 1
    for was, now in zip(before, (t for t in step.changing() if t is not step.bad), strict=True):
        assert torch.equal(was, now)
    assert step(ready[1], 2).undone.item() == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, step.changing(), strict=False))


def test_a_captured_step_costs_no_synchronisation(gpu: Config) -> None:
    trainer = Trainer(configs.replace(gpu, {"mode": "graph", "precision": "bf16", "data.loader": "torchvision"}))
    batch = next(trainer.state.loader)
    for k in range(3):
        trainer.train_step(batch, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(3, 6):
            trainer.train_step(batch, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_and_recomputation_train(gpu: Config) -> None:
    for name, changes in (
        ("fp16", {"precision": "fp16"}),
        ("recomputed", {"activation_checkpointing": True, "precision": "bf16"}),
        ("accumulated", {"accumulate": 2, "precision": "bf16"}),
    ):
        found = losses(gpu, name=name, steps=30, **{"optim.lr": 2.0, "data.loader": "torchvision"}, **changes)
        assert np.mean(found[-8:]) < np.mean(found[:8]), name


def test_a_batch_that_does_not_fit_says_which_one_would(gpu: Config) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 2**28) / total)
    try:
        view = {"size": 128, "blur": 0.0}
        big = {
            "view1": view,
            "view2": view,
            "batch_size": 60,
            "model.encoder": "resnet50",
            "data.loader": "torchvision",
        }
        with pytest.raises(TrainingError, match=r"does not fit .*--batch-size \d+ --accumulate|not even 2 images fit"):
            Trainer(configs.replace(gpu, big)).fit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_gpu_and_cpu_take_the_same_first_step(gpu: Config) -> None:
    short = {"steps": 1, "data.loader": "torchvision", "optim.warmup_steps": 0}
    (on_gpu,) = losses(gpu, **short, name="gpu", precision="fp32")
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
