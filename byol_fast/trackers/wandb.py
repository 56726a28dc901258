"""Metrics and files for Weights & Biases."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_fast.trackers.base import Metrics, RunInfo, Status

log = logging.getLogger(__name__)

_FINISH_TIMEOUT = 20
"""Seconds that wandb's own process may upload after the end of a run; the rest stays on disk, for `wandb sync`."""


class WandbTracker:
    """A run of wandb: history, config, and the files as artifacts.

    Project, entity, server and mode (`WANDB_MODE=offline`) come from wandb's environment variables and settings.
    """

    name = "wandb"

    def begin(self, run: RunInfo) -> str:
        """Start a run, or continue the one of a resumed run.

        Raises:
            RuntimeError: wandb is online, and has no API key.
        """
        import wandb

        # wandb.init would ask at the terminal, in the middle of the progress bar.
        is_online = wandb.run is None and wandb.setup().settings.mode == "online"
        if is_online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("it has no API key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
        self._run: Any = wandb.init(
            name=run.name,
            id=run.tracker_run,
            resume="allow" if run.tracker_run else None,
            config=run.config | {"environment": run.environment},
            dir=None if os.environ.get("WANDB_DIR") else str(run.folder),
            reinit="create_new",  # the process may have a run of its own
            settings=wandb.Settings(console="off", silent=True, finish_timeout=_FINISH_TIMEOUT),
        )
        self._first_step = self._run.step
        upload = f"offline; upload with: wandb sync {shlex.quote(str(self._run.settings.sync_dir))}"
        log.info("wandb: %s", upload if self._run.offline else self._run.url or "disabled, nothing is logged there")
        return str(self._run.id)

    def log(self, metrics: Sequence[Metrics]) -> None:
        """Add to the history. wandb has no way back: what a resumed run repeats is left out, it is there already."""
        for step, values in metrics:
            if step >= self._first_step:
                self._run.log(values, step=step)

    def artifact(self, path: Path) -> None:
        """Save a file as a new version of the artifact `run-ID-NAME`."""
        self._run.log_artifact(str(path), type="run-file")

    def end(self, status: Status) -> None:
        """Finish the run; wandb shows it as failed if it is not complete."""
        self._run.finish(exit_code=0 if status == "finished" else 1)
