"""Continuing a run from its newest checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.distributed import World
from byol_fast.training.metrics import read as read_metrics
from byol_fast.training.run_dir import RunDir
from byol_fast.training.state import TrainState, named_tensors
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils import env
from byol_fast.utils.checkpoint import CheckpointError
from byol_fast.utils.files import expand_home
from byol_fast.utils.records import record_of

log = logging.getLogger(__name__)

T = TypeVar("T")

_ENVIRONMENT = record_of({"packages": record_of({})})

# Fields that may change between a run and its resumption: they do not change what is computed (the mode only its
# rounding, about which the run warns).
RESUMABLE_CHANGES = frozenset(
    {"name", "out", "log_every", "checkpoint_every", "keep_checkpoints", "data.root", "data.cache", "data.prefetch"}
    | {"data.threads", "knn.val_root", "mode", "max_autotune", "cudnn_benchmark", "tensorboard"}
    | {"timeout_minutes", "max_skipped_steps"}
    | {
        "activation_checkpointing",
        "data.on_corrupt",
        "data.max_corrupt_fraction",
        "data.accept_changed",
        "probe.enabled",
        "probe.lr",
    }
)


def restore_latest(
    state: TrainState, run_dir: RunDir, config: Config, environment: dict[str, Any]
) -> tuple[Config, Path]:
    """Load the newest usable checkpoint into the state of a run; all processes must call it, and use the same one.

    Args:
        state: of the new process.
        run_dir: of the run.
        config: of this start.
        environment: machine, versions and execution mode of this start.

    Returns:
        The configuration to go on with, and the path of the checkpoint.

    Raises:
        CheckpointError: no checkpoint is usable.
        ConfigError: a field differs that changes what is computed.
        ValueError: the checkpoint belongs to other data or another number of processes.
    """
    world = state.world

    def use(path: Path) -> tuple[Path, dict[str, Any]]:
        payload = _on_all(world, lambda: checkpoints.load(path))
        return path, _on_all(world, lambda: _restore(state, path, payload, run_dir, config))

    paths = world.run_on_main(lambda: checkpoints.newest_first(run_dir.checkpoints))
    quiet = not world.is_main_process
    checkpoint, environment_then = checkpoints.use_latest(run_dir.checkpoints, use, paths=paths, quiet=quiet)
    _restore_evaluation(state, run_dir)
    if world.is_main_process:
        for difference in env.differences(environment_then, environment):
            log.warning("resume: %s; training continues, but is not bit-exact", difference)
    return configs.replace(config, {"data.accept_changed": False}), checkpoint  # it holds for one resumption


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


def _restore(state: TrainState, path: Path, payload: dict[str, Any], run_dir: RunDir, config: Config) -> dict[str, Any]:
    """Load a checkpoint into the state of a run; returns the environment in which it was saved."""
    with checkpoints.restoring(path):
        stored = configs.from_dict(json.loads(payload["config"]))
        environment: dict[str, Any] = json.loads(payload["environment"])
        if problem := _ENVIRONMENT(environment, "environment"):
            raise CheckpointError(f"checkpoint: {path} cannot be restored ({problem})")
        checkpoints.check_finite(named_tensors(payload), f"checkpoint: {path}")
    changed = configs.differences(stored, config)
    refused = {name: values for name, values in changed.items() if name not in RESUMABLE_CHANGES}
    if refused:
        listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, (a, b) in refused.items())
        raise ConfigError(
            f"resume: {run_dir.path} must be continued as it was started, but {listed}; "
            "drop these options, or start a new run"
        )
    with checkpoints.restoring(path):
        state.load_state_dict(payload)
    return environment


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


def find_resumable(config: Config) -> Path | None:
    """The run folder that `--resume auto` continues: OUT/NAME, or without a name the newest unfinished run like this.

    Returns:
        A run folder with a checkpoint, or None if there is nothing to continue.

    Raises:
        ConfigError: the run has saved checkpoints, and they are gone.
    """
    if config.name:
        run_dir = RunDir(config.out / config.name)
        run_dir.check_not_lost()
        return run_dir.path if run_dir.has_checkpoints() else None
    folders = list(config.out.iterdir()) if config.out.is_dir() else []
    for run_dir in map(RunDir, sorted(folders, key=_modified, reverse=True)):
        try:
            if run_dir.is_finished() or not (run_dir.has_checkpoints() or run_dir.status.exists()):
                continue
            stored = configs.load(run_dir.path / "config.json")
        except (ConfigError, OSError):  # foreign, or private to somebody else
            continue
        same_data = stored.data.root == (config.data.root and expand_home(config.data.root).absolute())
        if same_data and set(configs.differences(stored, config)) <= RESUMABLE_CHANGES:
            run_dir.check_not_lost()
            return run_dir.path
    return None


def _modified(path: Path) -> float:
    """Time of the last change; 0 if the path is gone, as the folder of a start that failed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
