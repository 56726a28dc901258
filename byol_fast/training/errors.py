"""Errors that end a training run."""

from __future__ import annotations

import signal
from pathlib import Path

from byol_fast.utils.commands import program, shell_path, short_path


class Interrupted(Exception):  # noqa: N818  (a request to stop is no error)
    """A signal stopped the run; the last finished step is saved.

    Args:
        signum: the signal.
        run_dir: the run's folder.
        step: steps finished and saved.
        has_own_data: the images came from the caller's program, which alone can give them again.
        is_complete: the encoder was exported; only what callbacks do at the end was stopped.
        command: goes on with the run, instead of `byol-fast train --resume`.
    """

    def __init__(
        self,
        signum: int,
        run_dir: Path,
        step: int,
        *,
        has_own_data: bool = False,
        is_complete: bool = False,
        command: str = "",
    ) -> None:
        if is_complete:
            text = f"the run is complete and its encoder saved; report with: {program()} report {shell_path(run_dir)}"
        elif has_own_data:
            own = f"byol_fast.pretrain(data, resume={short_path(run_dir)!r}), with the same data"
            text = f"saved after step {step}; go on with: {own}"
        else:
            command = command or f"{program()} train --resume {shell_path(run_dir)}"
            text = f"saved after step {step}; go on with: {command}"
        super().__init__(f"{signal.Signals(signum).name}: {text}")
        self.signum = signum
        self.run_dir = run_dir
        self.step = step
        self.is_complete = is_complete


class TrainingError(RuntimeError):
    """Training cannot continue; names the step, the reason and the last good checkpoint."""


class MainProcessError(RuntimeError):
    """The main process failed; it reports the error itself."""
