"""The finished run that another one goes on from: its end, and the total of both; without torch, so that an error comes
at once.
"""

from __future__ import annotations

from pathlib import Path

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.metrics_file import Record, read
from byol_fast.training.resume import check_unchanged
from byol_fast.training.run_dir import RunDir
from byol_fast.utils import checkpoint_files
from byol_fast.utils.commands import program, shell_path, short_path


def extend_config(run: Path, *, has_total: bool) -> Config:
    """Configuration of a run that goes on after the end of another one, before its own options are given.

    Args:
        run: folder of the finished run.
        has_total: `epochs` or `steps` is among these options.

    Raises:
        ConfigError: it is no run folder, not finished, or lacks the checkpoint of its last step; or there is no total.
    """
    stored = configs.load(run / "config.json")
    last = _last_record(RunDir(run.absolute()))
    if not has_total:
        raise ConfigError(
            f"extend: epochs or steps must be given, {short_path(run)} has done {_done(last)}; give the new total, for "
            "instance --epochs 300"
        )
    return configs.replace(stored, {"name": "", "steps": 0, "extend": run.absolute(), "extended_at": last["step"]})


def check_extension(config: Config) -> None:
    """Check a run that begins at the end of another one; the checkpoint's configuration is checked when it is loaded.

    Args:
        config: of the run, with `extend`.

    Raises:
        ConfigError: that is no run folder, not finished, or lacks the checkpoint of its last step; a field differs
            that changes what is computed; or the total is not above its steps.
    """
    run = config.extend
    assert run is not None
    if not (run / "config.json").exists():  # perhaps long after `extend_config`: this start may resume the new run
        raise ConfigError(
            f"extend: {run}, which this run goes on from, has no config.json any more; put it back until this run has "
            f"a checkpoint, or begin with `{program()} train --extend RUN --epochs N` where it is now"
        )
    stored = configs.load(run / "config.json")
    last = _last_record(RunDir(run.absolute()))
    if config.extended_at != last["step"]:
        raise ConfigError(
            f"config: extended_at must be the last step of {run}, {last['step']}, got {config.extended_at}; use "
            f"`{program()} train --extend {shell_path(run)} --epochs N`, which sets it"
        )
    check_unchanged(stored, config, run, extends=True)
    done = last["step"] if config.steps else last.get("epoch") or 0
    if (config.steps or config.epochs) <= done:
        raise total_too_small(config, _done(last))


def total_too_small(config: Config, done: str) -> ConfigError:
    """Error of a total that adds no step to those of the run that is extended.

    Args:
        config: of the run.
        done: what that run has done, in words.
    """
    assert config.extend is not None
    name, total = ("steps", config.steps) if config.steps else ("epochs", config.epochs)
    return ConfigError(
        f"extend: {name} must be the total, above what {short_path(config.extend)} has done, {done}, "
        f"got {total:,}; give more {name}"
    )


def _last_record(run_dir: RunDir) -> Record:
    """Step of the end of a finished run and, if its metrics are there, the epoch.

    Raises:
        ConfigError: it is not finished, or has no checkpoint of its last step.
    """
    path, folder = run_dir.path, short_path(run_dir.path)
    if not run_dir.is_finished():
        raise ConfigError(
            f"extend: {folder} must be a finished run, it is not; finish it with "
            f"`{program()} train --resume {shell_path(path)}`"
        )
    steps = checkpoint_files.saved_steps(run_dir.checkpoints)
    records = read(run_dir.metrics) or [{"step": max(steps, default=0)}]
    last = max(records, key=lambda record: int(record["step"]))
    if not checkpoint_files.newest_first(run_dir.checkpoints, last["step"]):
        held = f"those of steps {', '.join(map(str, steps))}" if steps else "none"
        raise ConfigError(
            f"extend: {folder}/checkpoints must hold the checkpoint of the last step, {last['step']}, it holds "
            f"{held}; put it back, or begin a new run"
        )
    return last


def _done(last: Record) -> str:
    epochs = "" if last.get("epoch") is None else f" ({last['epoch']:.6g} epochs)"
    return f"{last['step']:,} steps{epochs}"
