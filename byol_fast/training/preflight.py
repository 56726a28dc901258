"""Checks before a run is started, the cheap ones: without torch, without a scan of the images."""

from __future__ import annotations

from pathlib import Path

from byol_fast.config import Config
from byol_fast.config.encoder_names import check_encoder_name
from byol_fast.data.errors import SourceError
from byol_fast.data.sources.paths import check_images
from byol_fast.trackers import check_installed
from byol_fast.training.extend import check_extension
from byol_fast.training.init_source import check_init_from
from byol_fast.training.locks import LOCK_FILE
from byol_fast.training.resume import check_resumable
from byol_fast.training.run_dir import RunDir
from byol_fast.utils.commands import program, shell_path
from byol_fast.utils.run_folder import check_run_folder


def check_start(config: Config, *, data: object = None, resume: Path | None = None) -> None:
    """Check the run folder, the names of encoder and trackers, the paths of initial weights and images; writes nothing.

    Args:
        config: of the run.
        data: images instead of the configuration's, see `byol_fast.data.open_source`.
        resume: run folder to continue.

    Raises:
        ConfigError: the folder cannot be used, a field differs from the run to be continued in what is computed, the
            run to be extended is of no use for it, there is no such encoder, there are no such initial weights, or the
            package of a tracker is missing.
        SourceError: there are no images.
    """
    if resume is not None:
        check_resumable(resume, config)
    else:
        check_run_folder(config.out, config.name)
        run_dir = RunDir((config.out / config.name).absolute())
        is_running = (run_dir.path / LOCK_FILE).exists()  # then the lock says who is running there
        if config.name and run_dir.path.is_dir() and not is_running:
            run_dir.check_usable(resume=False)
    check_encoder_name(config.model.encoder)
    if resume is None or not RunDir(resume).has_checkpoints():  # a checkpoint takes the place of the initial weights
        if config.extend is not None:
            check_extension(config)
        else:
            check_init_from(config)
    check_installed(config.log)
    try:
        check_images(config, data)
    except SourceError as error:
        if (run := resume or config.extend) is None or data is not None:
            raise
        option, total = ("--extend", " --epochs N") if resume is None else ("--resume", "")
        command = f"{program()} train {option} {shell_path(run)} FOLDER{total}"
        raise SourceError(f"{error}; if the images were moved, give their new folder: {command}") from None
