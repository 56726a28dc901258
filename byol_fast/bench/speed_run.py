"""Speed runs (`byol-fast bench cifar10`): kNN accuracy by the time of training."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from byol_fast import config as configs
from byol_fast.bench.speed_images import Images
from byol_fast.bench.speed_log import SpeedLog
from byol_fast.bench.speed_plan import SpeedPlan
from byol_fast.bench.speed_recorder import SpeedRecorder
from byol_fast.config import Config, ConfigError
from byol_fast.training.callbacks import Callback
from byol_fast.training.distributed import started_by_torchrun
from byol_fast.training.errors import Interrupted
from byol_fast.training.locks import exclusive
from byol_fast.training.trainer import Trainer
from byol_fast.utils import progress

WARMUP_STEPS = 3
MEASURED_SECONDS, MAX_MEASURED_STEPS = 3.0, 100
MARGIN = 1.05
"""Share by which a plan assumes steps to be slower than measured."""


def train_all(plan: SpeedPlan, callbacks: Sequence[Callback] = ()) -> list[SpeedLog]:
    """Train all runs of a plan that are not finished, those that were cut from their checkpoint.

    Args:
        plan: recipes and seeds.
        callbacks: further hooks into every run, called after the log is written.

    Returns:
        The logs of all runs of the plan.

    Raises:
        ConfigError: a run cannot be continued, or `minutes` are too few for an epoch, or there are several processes.
        SourceError: there are no images, or those of a set differ in size.
        CheckpointError: a log, a checkpoint or the metrics could not be written.
        Interrupted: a signal; everything up to the last finished step is saved.
    """
    if started_by_torchrun():
        raise ConfigError("bench cifar10: must be one process, got several; start it without torchrun")
    runs = plan.runs()
    images: dict[str, Images] = {}
    for run in runs:
        if not run.is_finished and run.config.recipe not in images:
            images[run.config.recipe] = Images.prepare(run.config)
    planned: dict[str, int] = {}
    for run in runs:  # before any training: an error comes now
        recipe = run.config.recipe
        if run.log is not None and recipe in images:
            images[recipe].check_same(run.log)
        if not run.is_planned and recipe not in planned:
            planned[recipe] = epochs_that_fit(plan, run.config, images[recipe])
    logs = []
    for i in range(len(runs)):
        run = plan.runs()[i]  # again: another process may have trained it since
        if run.log is not None and run.is_finished:
            logs.append(run.log)
            continue
        recipe = run.config.recipe
        config = run.config if run.is_planned else plan.with_epochs(run.config, planned[recipe])
        log = run.log or SpeedLog.new(plan.log_path(config), config, command=plan.command, minutes=plan.minutes)
        logs.append(log)
        recorder = SpeedRecorder(log, images[recipe])
        try:
            Trainer(images[recipe].configure(config), resume=run.checkpointed, callbacks=[recorder, *callbacks]).fit()
        except Interrupted as error:
            if error.is_complete:
                raise
            raise Interrupted(error.signum, error.run_dir, error.step, command=plan.command) from None
        _free()
    return logs


def _free() -> None:
    """Release the memory of a run and what torch.compile keeps of it: it compiles a function only a few times."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def epochs_that_fit(plan: SpeedPlan, config: Config, images: Images) -> int:
    """Most epochs, up to the configuration's, that fit `plan.minutes`, by a short measurement.

    Measured in a trainer of its own, so that the run begins with untouched weights.

    Args:
        plan: of the runs.
        config: of the run.
        images: of the run.

    Raises:
        ConfigError: not one epoch fits.
    """
    assert plan.minutes is not None
    start = time.perf_counter()
    setup, step, evaluation, epoch_steps = _measure(images.configure(config))
    spent = images.seconds + time.perf_counter() - start

    def minutes(epochs: int) -> float:
        every = plan.with_epochs(config, epochs).knn.every_epochs
        evaluations = 1 + -(-epochs // every)  # one of the untrained encoder
        return (spent + setup + MARGIN * epochs * epoch_steps * step + evaluations * evaluation) / 60

    if minutes(1) > plan.minutes:
        raise ConfigError(
            f"bench cifar10: --minutes must be at least {minutes(1):.3g} for one epoch of {config.recipe} (decoding "
            f"and this measurement {spent:.1f} s, setup {setup:.1f} s, {epoch_steps:g} steps of {step:.3g} s, two "
            f"evaluations of {evaluation:.1f} s), got {plan.minutes:.3g}"
        )
    epochs = next(epochs for epochs in range(config.epochs, 0, -1) if minutes(epochs) <= plan.minutes)
    text = f"{config.recipe}: {epochs} epochs of {epoch_steps:g} steps fit {plan.minutes:.3g} minutes"
    progress.current().print(f"{text} ({1e3 * step:.1f} ms a step)")
    return epochs


class _Measured(NamedTuple):
    """Seconds of the parts of a run."""

    setup: float
    step: float
    evaluation: float
    epoch_steps: float
    """Steps in an epoch."""


def _measure(config: Config) -> _Measured:
    """Times of a run's parts, in a trainer that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = Trainer(configs.replace(config, {"out": Path(folder)}))
        try:
            with exclusive():
                _seconds_of_steps(trainer, 1)
                setup = time.perf_counter() - start
                step = _seconds_of_steps(trainer, WARMUP_STEPS) / WARMUP_STEPS
                count = max(1, min(MAX_MEASURED_STEPS, int(MEASURED_SECONDS / step)))
                step = _seconds_of_steps(trainer, count) / count
                evaluation = _seconds_of_evaluation(trainer)
                return _Measured(setup, step, evaluation, trainer.total_steps / config.epochs)
        finally:
            trainer.close()
            del trainer
            _free()


def _seconds_of_steps(trainer: Trainer, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        trainer.train_one_step()
    trainer.queue_records()  # waits for the device
    return time.perf_counter() - start


def _seconds_of_evaluation(trainer: Trainer) -> float:
    assert trainer.knn is not None
    start = time.perf_counter()
    trainer.knn(untrained=False, check=lambda: None)
    return time.perf_counter() - start
