"""Items: speed of ResNet-18 on CIFAR-10's images, and the recipe from the files to kNN accuracy."""

from __future__ import annotations

import functools
import io
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
from benchmarks.gpu.items.timing import STEPS, Case, figures, interleaved, rounded, seconds_of
from byol_fast import config as configs
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.config import Config, recipes
from byol_fast.data import ViewLoader, make_loader
from byol_fast.data.sources import ArraySource
from byol_fast.data.sources.arrays import array_source
from byol_fast.evaluate.extract import extract_features
from byol_fast.evaluate.knn import knn_rankings
from byol_fast.training.callbacks import Callback
from byol_fast.training.cuda_graph import restore_state_after
from byol_fast.training.trainer import Trainer
from byol_fast.utils.env import num_cpus

COMPILATION = 60.0
"""Seconds that must be left to start with a compiled step."""
AFTER_TRAINING, RESERVE = 30.0, 20.0
"""Seconds reserved for checkpoint, export and nearest neighbors: in the plan, and while training runs."""
NEIGHBORS, TEMPERATURE = (200, 20), 0.1
MEASURED_STEPS = 30
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
    """Train CIFAR-10's recipe for as many epochs as fit the time, and classify the test images by kNN."""
    start = time.perf_counter()
    train, test = read_images(ROOT / context.item.files[0], most=60 if is_small(context) else None)
    context.record(
        "images",
        train=len(train),
        test=len(test),
        seconds=rounded(time.perf_counter() - start),
        classes=len(train.classes),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(context, train, Path(folder))
        step_seconds = _measured_step(context, trainer)
        steps = _steps_that_fit(context, trainer, step_seconds)
        trainer.total_steps = steps
        warmup = min(round(10 * trainer.loader.batches_per_epoch), steps // 4)
        trainer.train_step.schedule = replace(trainer.train_step.schedule, total_steps=steps, warmup_steps=warmup)
        start = time.perf_counter()
        with skip_value_errors(context, "training"):
            result = trainer.fit()
            seconds = time.perf_counter() - start
            shutil.copy(trainer.metrics.path, context.folder / "metrics.jsonl")
            context.record(
                "training",
                epochs=rounded(trainer.state.epoch),
                steps=result.steps,
                planned_steps=steps,
                batch=trainer.config.batch_size,
                seconds=rounded(seconds),
                images_per_second=rounded(result.steps * trainer.config.batch_size / seconds),
                loss=rounded(result.loss),
                mode=trainer.mode.name,
                precision=trainer.precision.name,
                loader=trainer.loader.name,
            )
    start = time.perf_counter()
    with skip_value_errors(context, "nearest neighbors"):
        accuracies = nearest_neighbors(trainer, train, test)
        context.record(
            "kNN top-1 on the test images",
            epochs=rounded(trainer.state.epoch),
            temperature=TEMPERATURE,
            seconds=rounded(time.perf_counter() - start),
            **{f"knn_{k}_top1": rounded(accuracy) for k, accuracy in accuracies.items()},
        )
    epochs = trainer.state.epoch
    return None if epochs >= 1 or is_small(context) else f"only {epochs:.2f} epochs fitted the time"


def read_images(path: Path, *, most: int | None = None) -> tuple[ArraySource, ArraySource]:
    """Training and test images of an archive of JPEG files, decoded by threads.

    Args:
        path: a tar file of PART/CLASS/NAME.jpg; PART is train or test.
        most: maximum number of images per class and part; None for all.
    """
    encoded: list[tuple[str, bytes]] = []
    counts: Counter[Path] = Counter()
    with tarfile.open(path) as archive:
        for member in archive:
            folder = Path(member.name).parent
            if not member.name.endswith(".jpg") or counts[folder] == most:
                continue
            file = archive.extractfile(member)
            assert file is not None
            encoded.append((member.name, file.read()))
            counts[folder] += 1
    encoded.sort()
    with ThreadPoolExecutor(num_cpus()) as pool:
        images = list(pool.map(_decoded, (content for _, content in encoded), chunksize=500))
    places = [Path(name).parts[-3:-1] for name, _ in encoded]
    classes = sorted({name for _, name in places})
    parts = []
    for part in ("train", "test"):
        rows = [row for row, (where, _) in enumerate(places) if where == part]
        labels = [classes.index(places[row][1]) for row in rows]
        parts.append(
            array_source(np.stack([images[row] for row in rows]), labels, classes, name=f"{path.name}, {part}")
        )
    return parts[0], parts[1]


def _decoded(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _trainer(context: Context, train: ArraySource, folder: Path) -> Trainer:
    """A run of the recipe without checkpoints and evaluations; the number of steps is set later."""
    changes: dict[str, Any] = {
        "device": context.device,
        "mode": "graph" if context.device == "cuda" else "eager",
        "precision": "bf16",
        "knn.enabled": "off",
        "probe.enabled": "off",
        "log": (),
        "out": folder,
        "name": "cifar10",
        "checkpoint_every": 10**9,
        "log_every": 100,
    }
    if is_small(context):
        tiny = {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16}
        changes |= {"batch_size": 20, "model": tiny, "log_every": 2, "max_skipped_steps": 1000}
    return Trainer(_config(changes), data=train, callbacks=[_Progress(context)])


class _Progress(Callback):
    """Records the loss about every fifteen seconds, and stops the run if it takes longer than planned."""

    def __init__(self, context: Context) -> None:
        self._context, self._last = context, time.monotonic()

    def on_log(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        if self._context.seconds_left() < RESERVE:
            trainer.stop()
        if time.monotonic() - self._last > 15:
            self._last = time.monotonic()
            names = ("epoch", "loss", "images_per_second", "embedding_std")
            self._context.record(f"step {records[-1]['step']}", **{name: records[-1][name] for name in names})


def _measured_step(context: Context, trainer: Trainer) -> float:
    """Seconds of a step through the loader, after compilation and capture; the state is restored afterwards."""
    step, loader = trainer.train_step, trainer.loader
    position = loader.state_dict()
    seconds: list[float] = []

    def steps() -> None:
        start = time.perf_counter()
        step(next(loader), 0)
        context.record("first step", seconds=rounded(time.perf_counter() - start))
        for _ in range(3):
            step(next(loader), 0)
        calls = 2 if is_small(context) else MEASURED_STEPS
        seconds.append(seconds_of(lambda: step(next(loader), 0), context.device, calls))

    restore_state_after(steps, step.mutable_tensors, trainer.device)
    step.on_weights_loaded()
    loader.load_state_dict(position)
    batch = trainer.config.batch_size
    context.record("step", ms=rounded(1e3 * seconds[0]), images_per_second=rounded(batch / max(seconds[0], 1e-9)))
    return seconds[0]


def _steps_that_fit(context: Context, trainer: Trainer, step_seconds: float) -> int:
    """Number of steps of as many whole epochs as fit the time, or of a part of the first one."""
    if is_small(context):
        return 4
    epoch = trainer.loader.batches_per_epoch
    fit = int((context.seconds_left() - AFTER_TRAINING) / (1.05 * max(step_seconds, 1e-6)))
    return min(max(fit // epoch * epoch or fit, 1), trainer.config.epochs * epoch)


def nearest_neighbors(trainer: Trainer, train: ArraySource, test: ArraySource) -> dict[int, float]:
    """kNN top-1 accuracy on the test images, for several numbers of neighbors.

    Args:
        trainer: with the encoder.
        train: labeled images.
        test: images to classify.
    """

    def batches(source: ArraySource) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in np.array_split(np.arange(len(source)), -(-len(source) // 1000)):
            yield torch.from_numpy(source.images[rows]).permute(0, 3, 1, 2), torch.from_numpy(rows)

    features = [
        extract_features(
            trainer.model.encoder,
            batches(source),
            normalize=trainer.model.normalize,
            device=trainer.device,
            autocast=trainer.precision.autocast_dtype,
        )[0]
        for source in (train, test)
    ]
    train_y, test_y = (torch.as_tensor(source.labels).to(trainer.device) for source in (train, test))
    ks = [min(k, len(train)) for k in NEIGHBORS]
    rankings = knn_rankings(
        features[0], train_y, features[1], ks=ks, temperature=TEMPERATURE, num_classes=len(train.classes)
    )
    accuracies = [float((ranking[:, 0] == test_y).float().mean()) for ranking in rankings]
    return dict(zip(NEIGHBORS, accuracies, strict=True))
