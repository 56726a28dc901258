"""Items: speed of ResNet-18 on CIFAR-10's images, and the recipe from the files to kNN accuracy."""

from __future__ import annotations

import functools
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import (
    ROOT,
    StepMode,
    byol_fast_step,
    free,
    is_small,
    peak_gib,
    resnet18,
    set_flags,
    skip_value_errors,
)
from benchmarks.gpu.items.timing import STEPS, Case, figures, interleaved, rounded
from byol_fast import config as configs
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.speed_log import SpeedLog
from byol_fast.bench.speed_plan import SpeedPlan, speed_run_config
from byol_fast.bench.speed_run import train_all
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.data import ViewLoader, make_loader
from byol_fast.data.sources import ArraySource
from byol_fast.training.callbacks import Callback
from byol_fast.training.run_dir import RunResult
from byol_fast.training.trainer import Trainer

COMPILATION = 60.0
"""Seconds that must be left to start with a compiled step."""
RESERVE = 20.0
"""Seconds that the plan leaves for the last checkpoint and the export; training stops when half of them are left."""
MODES: tuple[StepMode, ...] = ("eager", "graph")


# ------------------------------------------------------------------------------------------------ speed


def speed(context: Context) -> str | None:
    """Images per second, eager and captured, on a fixed batch and through the loader that caches data on the GPU."""
    for batch in (4,) if is_small(context) else (256, 512):
        problem = resnet18(context, batch)
        config = _config({"batch_size": problem.batch_size, "data": {"loader": "device_cache"}})
        for mode in MODES:
            if mode == "graph" and context.seconds_left() < COMPILATION:
                return f"no time was left to compile for batch {batch}"
            free(context)
            step = byol_fast_step(context, problem, mode)
            flags = set_flags()
            start = time.perf_counter()
            peak = peak_gib(context, step)  # of the first call, because a replay allocates nothing
            first = {"peak_gib": peak, "first_call_seconds": rounded(time.perf_counter() - start)}
            loader = make_loader(_random_images(problem.batch_size), config, device=torch.device(context.device))
            cases: dict[str, Case] = {"ready views": step, "device cache": _Loop(step, loader)}
            if mode == "eager":
                cases["loader alone"] = functools.partial(next, loader)
            for name, timing in interleaved(context, cases, rounds=7, sample=STEPS).items():
                prefix = "" if name == "loader alone" else f"byol_fast, {mode}, "
                values = {} if name == "loader alone" else first
                context.record(
                    f"{prefix}{name}, batch {batch}", **figures(timing, images=problem.batch_size), **values, **flags
                )
            loader.close()
            del step, cases, loader
    return None


class _Loop:
    """A step on the next batch of a loader."""

    def __init__(self, step: ByolFastStep, loader: ViewLoader) -> None:
        self._step, self._loader = step, loader

    def __call__(self) -> object:
        return self._step.step(next(self._loader), 0).loss


def _random_images(at_least: int) -> ArraySource:
    """Random images, in the number of CIFAR-10's training set."""
    count = 50_000 if at_least >= 256 else 10 * at_least
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return ArraySource(images, name="random")


def _config(changes: dict[str, Any]) -> Config:
    return configs.replace(recipes.cifar10_resnet18(), changes)


# ------------------------------------------------------------------------------------------------ recipe


def recipe(context: Context) -> str | None:
    """`byol-fast bench cifar10 cifar10_fast`: as many epochs as fit the time, with kNN on all test images."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unpack(ROOT / context.item.files[0], folder / "images", most=60 if is_small(context) else None)
        context.record("images", seconds=rounded(time.perf_counter() - start))
        plan = _speed_plan(context, folder)
        logs: list[SpeedLog] = []
        try:
            with skip_value_errors(context, "training"):
                logs = train_all(plan, [_Progress(context)])
        except ConfigError as error:  # not one epoch fits the time
            return str(error)
        for log in logs:
            last, header = log.evaluations[-1], log.header
            context.record(
                "training",
                epochs=last["epoch"],
                planned_epochs=header["epochs"],
                steps=last["step"],
                batch=header["config"]["batch_size"],
                seconds=rounded(header["seconds"]),
                setup_seconds=rounded(header["setup_seconds"]),
                decode_seconds=rounded(header["decode_seconds"]),
                images_per_second=last["images_per_second"],
                knn_200_top1=rounded(last["knn_top1"]),
                mode=header["environment"]["mode"],
                precision=header["environment"]["precision"],
                loader=header["environment"]["loader"],
            )
    if is_small(context):
        return None
    last = logs[0].evaluations[-1]
    return None if last["epoch"] >= logs[0].header["epochs"] else f"stopped after {last['epoch']:.2f} epochs"


def unpack(archive: Path, folder: Path, *, most: int | None = None) -> None:
    """Extract the JPEG files of an archive.

    Args:
        archive: a tar file of PART/CLASS/NAME.jpg; PART is train or test.
        folder: to extract into.
        most: maximum number of images per class and part; None for all.
    """
    counts: Counter[Path] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            parent = Path(member.name).parent
            if member.name.endswith(".jpg") and counts[parent] != most:
                counts[parent] += 1
                tar.extract(member, folder, filter="data")


def _speed_plan(context: Context, folder: Path) -> SpeedPlan:
    """A run of the recipe that fits the time left, less that for what follows it."""
    changes: dict[str, Any] = {"device": context.device, "data.root": folder / "images"}
    if is_small(context):
        tiny = {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16}
        changes |= {"epochs": 2, "batch_size": 20, "model": tiny, "log_every": 2, "max_skipped_steps": 1000}
    return SpeedPlan(
        configs=(configs.replace(speed_run_config(recipes.cifar10_fast()), changes),),
        output=folder / "cifar10",
        minutes=(context.seconds_left() - RESERVE) / 60,
    )


class _Progress(Callback):
    """Records evaluations and, about every fifteen seconds, the loss; stops a run that takes longer than planned."""

    def __init__(self, context: Context) -> None:
        self._context, self._last = context, time.monotonic()

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        names = ("epoch", "knn_top1")
        self._context.record(f"kNN-{record['knn_k']}, step {record['step']}", **{name: record[name] for name in names})
        self._keep_log(trainer)

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        self._keep_log(trainer)

    def _keep_log(self, trainer: Trainer) -> None:
        shutil.copy(trainer.run_dir.with_suffix(".jsonl"), self._context.folder)

    def on_log(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        if self._context.seconds_left() < RESERVE / 2:
            trainer.stop()
        if time.monotonic() - self._last > 15:
            self._last = time.monotonic()
            names = ("epoch", "loss", "images_per_second", "embedding_std")
            self._context.record(f"step {records[-1]['step']}", **{name: records[-1][name] for name in names})
