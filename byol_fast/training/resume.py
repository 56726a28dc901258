"""The run that a start continues, and what must not change in it; without torch, so that an error comes at once."""

from __future__ import annotations

from pathlib import Path

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.run_dir import RunDir
from byol_fast.utils.files import expand_home

# Fields that may change between a run and its resumption: they do not change what is computed (the mode only its
# rounding, about which the run warns).
RESUMABLE_CHANGES = frozenset(
    {"name", "out", "log_every", "checkpoint_every", "keep_checkpoints", "data.root", "data.cache", "data.prefetch"}
    | {"data.threads", "knn.val_root", "mode", "max_autotune", "cudnn_benchmark", "log"}
    | {"timeout_minutes", "max_skipped_steps", "memory_check"}
    | {
        "activation_checkpointing",
        "data.on_corrupt",
        "data.max_corrupt_fraction",
        "data.accept_changed",
        "probe.enabled",
        "probe.lr",
    }
)


def check_unchanged(stored: Config, config: Config, run: Path) -> None:
    """Check that a run is continued with the options that it was started with.

    Args:
        stored: configuration of the run.
        config: of this start.
        run: the run's folder, for the message.

    Raises:
        ConfigError: a field differs that changes what is computed.
    """
    changed = configs.differences(stored, config)
    refused = {name: values for name, values in changed.items() if name not in RESUMABLE_CHANGES}
    if refused:
        listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, (a, b) in refused.items())
        raise ConfigError(
            f"resume: {run} must be continued as it was started, but {listed}; drop these options, or start a new run"
        )


def check_resumable(folder: Path, config: Config) -> None:
    """Check a run to be continued by its `config.json`; the checkpoint's configuration is checked when it is loaded.

    Args:
        folder: the run folder.
        config: of this start.

    Raises:
        ConfigError: it is no run folder, its checkpoints are gone, or a field differs that changes what is computed.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(f"resume: {folder} must be a run folder, it has no config.json; check the path")
    run_dir = RunDir(folder.absolute())
    run_dir.check_not_lost()
    if not run_dir.has_checkpoints():
        return  # it starts from the beginning
    try:
        stored = configs.load(folder / "config.json")
    except ConfigError:  # damaged: the checkpoint has another copy
        return
    check_unchanged(stored, config, run_dir.path)


def find_resumable(config: Config) -> Path | None:
    """The run folder that `--resume auto` continues: OUT/NAME, or without a name the newest unfinished run like this.

    Without a name, also the newest run like this if it finished with a problem: begun again, it would only repeat it.

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
    is_newest = True
    for run_dir in map(RunDir, sorted(folders, key=_modified, reverse=True)):
        try:
            if not (run_dir.has_checkpoints() or run_dir.status.exists()):
                continue
            stored = configs.load(run_dir.path / "config.json")
        except (ConfigError, OSError):  # foreign, or private to somebody else
            continue
        same_data = stored.data.root == (config.data.root and expand_home(config.data.root).absolute())
        if not same_data or not set(configs.differences(stored, config)) <= RESUMABLE_CHANGES:
            continue
        has_problem = run_dir.problem() is not None and run_dir.has_checkpoints()
        if not run_dir.is_finished() or (has_problem and is_newest):
            run_dir.check_not_lost()
            return run_dir.path
        is_newest = False
    return None


def _modified(path: Path) -> float:
    """Time of the last change; 0 if the path is gone, as the folder of a start that failed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
