"""The run that a start continues, and what must not change in it; without torch, so that an error comes at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.config.fields import expand_home
from byol_fast.training.init_source import INIT_OPTIONS, with_absolute_source
from byol_fast.training.run_dir import RunDir, RunResult
from byol_fast.utils.records import read_json

# Fields that may change between a run and its resumption: they do not change what is computed (the mode only its
# rounding, about which the run warns).
RESUMABLE_CHANGES = frozenset(
    {"name", "out", "log_every", "checkpoint_every", "keep_checkpoints", "data.root", "data.cache", "data.prefetch"}
    | {"data.threads", "knn.val_root", "mode", "max_autotune", "cudnn_benchmark", "log"}
    | {"timeout_minutes", "max_skipped_steps", "memory_check", *INIT_OPTIONS}
    | {
        "activation_checkpointing",
        "data.on_corrupt",
        "data.max_corrupt_fraction",
        "data.accept_changed",
        "probe.enabled",
        "probe.lr",
    }
)
# Fields that may differ between a run and the one that it extends.
_EXTENSION_CHANGES = RESUMABLE_CHANGES - {*INIT_OPTIONS} | {"epochs", "steps", "extend", "extended_at"}
# What a result names beside the digest of its configuration: recipe, seed, machine, and the images of its evaluation.
# All loaders give the same views up to rounding.
_NOT_IN_DIGEST = RESUMABLE_CHANGES - {"init_from", "init_sha256"} | {
    *("recipe", "seed", "device", "data.loader", "extend"),
    *("knn.enabled", "knn.every_epochs", "knn.max_train", "knn.max_val", "knn.full_at_end"),
}


def config_digest(config: Config) -> str:
    """Digest of what a configuration computes, by which a recorded result is compared with a recipe.

    SHA-256 of the JSON of the fields that differ from their defaults, by dotted name: an option that is added later
    leaves the digests of earlier results as they are. Left out are the fields that a resumed run may change, except for
    the initial weights (of a file its SHA-256 counts, not its path); recipe, seed, device, data.loader, the name of an
    extended run, and when and on how many images the kNN accuracy is evaluated.

    Returns:
        The first 12 hexadecimal digits.
    """
    changed = configs.differences(Config(), config)
    values = {name: value for name, (_, value) in changed.items() if name not in _NOT_IN_DIGEST}
    if config.init_sha256:
        del values["init_from"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def check_unchanged(stored: Config, config: Config, run: Path, *, extends: bool = False) -> None:
    """Check that a run is continued with the options that it was started with.

    Args:
        stored: configuration of the run.
        config: of this start.
        run: the run's folder, for the message.
        extends: this start goes on after the run's end, in another folder.

    Raises:
        ConfigError: a field differs that changes what is computed.
    """
    changed = configs.differences(stored, config)
    allowed = _EXTENSION_CHANGES if extends else RESUMABLE_CHANGES
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        command = "extend" if extends else "resume"
        listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, (a, b) in refused.items())
        raise ConfigError(
            f"{command}: {run} must be continued as it was started, but {listed}; drop these options, or "
            "start a new run"
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


def result_without_checkpoints(folder: Path, config: Config) -> RunResult | None:
    """Results of a complete run whose checkpoints were deleted, which is not trained again; None for any other run.

    Args:
        folder: the run folder.
        config: of this start.

    Raises:
        ConfigError: a field differs that changes what is computed.
    """
    run_dir = RunDir(folder.absolute())
    if not run_dir.is_complete_without_checkpoints():
        return None
    check_unchanged(configs.load(folder / "config.json"), config, run_dir.path)
    try:
        steps = int(read_json(run_dir.path / "encoder.json")["step"])
        processes = int(read_json(run_dir.path / "environment.json")["processes"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged
        return None
    images_per_step = config.batch_size * config.grad_accum_steps * processes
    return run_dir.result(config, steps, run_dir.encoder, global_batch_size=images_per_step)


def find_resumable(config: Config) -> Path | None:
    """The run folder that `--resume auto` continues: OUT/NAME, or without a name the newest unfinished run like this.

    Without a name, also the newest run like this if it finished with a problem: begun again, it would only repeat it.

    Returns:
        A run folder with a checkpoint, or of a complete run whose checkpoints were deleted; None if there is nothing to
        continue.

    Raises:
        ConfigError: the run has saved checkpoints, they are gone, and it is not complete or its encoder is gone, too.
    """
    if config.name:
        run_dir = RunDir(config.out / config.name)
        if run_dir.is_complete_without_checkpoints():
            return run_dir.path
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
        same_weights = stored.init_from == with_absolute_source(config).init_from  # a run of others is another run
        if not same_data or not same_weights or not set(configs.differences(stored, config)) <= RESUMABLE_CHANGES:
            continue
        if not run_dir.is_finished():
            run_dir.check_not_lost()
            return run_dir.path
        has_result = run_dir.has_checkpoints() or run_dir.is_complete_without_checkpoints()
        if run_dir.problem() is not None and has_result and is_newest:
            return run_dir.path
        is_newest = False
    return None


def _modified(path: Path) -> float:
    """Time of the last change; 0 if the path is gone, as the folder of a start that failed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
