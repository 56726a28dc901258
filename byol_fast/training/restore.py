"""Loading a checkpoint into the state of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.distributed import World
from byol_fast.training.init_source import INIT_OPTIONS
from byol_fast.training.metrics_file import read as read_metrics
from byol_fast.training.resume import check_unchanged
from byol_fast.training.run_dir import RunDir
from byol_fast.training.state import TrainState, named_tensors
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils import env
from byol_fast.utils.errors import CheckpointError
from byol_fast.utils.records import record_of

log = logging.getLogger(__name__)

T = TypeVar("T")

_ENVIRONMENT = record_of({"packages": record_of({})})


def restore_latest(
    state: TrainState, run_dir: RunDir, config: Config, environment: dict[str, Any], *, extends: bool = False
) -> tuple[Config, Path]:
    """Load the newest usable checkpoint into the state of a run; all processes must call it, and use the same one.

    To extend a finished run, it must be one of its last step.

    Args:
        state: of the new process.
        run_dir: of the run that the checkpoint is of.
        config: of this start.
        environment: machine, versions and execution mode of this start.
        extends: `run_dir` is the run that this one extends.

    Returns:
        The configuration to go on with, and the path of the checkpoint.

    Raises:
        CheckpointError: no checkpoint is usable.
        ConfigError: a field differs that changes what is computed.
        ValueError: the checkpoint belongs to other data or another number of processes.
    """
    world = state.world

    def use(path: Path) -> tuple[Path, Config, dict[str, Any]]:
        payload = _on_all(world, lambda: checkpoints.load(path))
        return path, *_on_all(world, lambda: _restore(state, path, payload, run_dir, config, extends=extends))

    at_step = config.extended_at if extends else None
    paths = world.run_on_main(lambda: checkpoints.newest_first(run_dir.checkpoints, at_step))
    quiet = not world.is_main_process
    checkpoint, stored, environment_then = checkpoints.use_latest(run_dir.checkpoints, use, paths=paths, quiet=quiet)
    _restore_evaluation(state, run_dir)
    if extends:
        state.best = -1.0  # the best checkpoint is that of this run's folder
    if world.is_main_process:
        for difference in env.differences(environment_then, environment):
            command = "extend" if extends else "resume"
            log.warning("%s: %s; training continues, but is not bit-exact", command, difference)
    changes = {name: getattr(stored, name) for name in INIT_OPTIONS}  # the weights that the run was started from
    return configs.replace(config, {"data.accept_changed": False} | changes), checkpoint  # it holds for one resumption


def _on_all(world: World, fn: Callable[[], T]) -> T:
    """Call `fn` on all processes; a CheckpointError on one of them is raised on all."""
    result: T | None = None
    problem: str | None = None
    try:
        result = fn()
    except CheckpointError as error:
        problem = str(error)
    for message in world.all_gather(problem):
        if message is not None:
            raise CheckpointError(message)
    return cast("T", result)


def _restore(
    state: TrainState, path: Path, payload: dict[str, Any], run_dir: RunDir, config: Config, *, extends: bool
) -> tuple[Config, dict[str, Any]]:
    """Load a checkpoint into the state of a run; returns the configuration and the environment that it was saved in."""
    with checkpoints.restoring(path):
        stored = configs.from_dict(json.loads(payload["config"]))
        environment: dict[str, Any] = json.loads(payload["environment"])
        if problem := _ENVIRONMENT(environment, "environment"):
            raise CheckpointError(f"checkpoint: {path} cannot be restored ({problem})")
        checkpoints.check_finite(named_tensors(payload), f"checkpoint: {path}")
    check_unchanged(stored, config, run_dir.path, extends=extends)
    with checkpoints.restoring(path):
        state.load_state_dict(payload)
    return stored, environment


def _restore_evaluation(state: TrainState, run_dir: RunDir) -> None:
    """Find out if the checkpoint's step was evaluated: the evaluation comes after the checkpoint, in the metrics."""

    def accuracies() -> list[float]:
        records = read_metrics(run_dir.metrics)
        return [r["knn_top1"] for r in records if r["step"] == state.step and r.get("knn_top1") is not None]

    evaluated = state.world.run_on_main(accuracies)
    if evaluated:
        state.evaluated_at = state.step
        if state.step > 0:
            state.best = max(state.best, evaluated[-1])
