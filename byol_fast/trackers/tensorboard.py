"""Metrics as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from byol_fast.trackers.base import Metrics, RunInfo, Status


class TensorBoardTracker:
    """Event files in `tb` of the run folder; a resumed run hides what was logged after its checkpoint."""

    name = "tensorboard"

    def begin(self, run: RunInfo) -> None:
        """Open an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.folder / "tb"
        purge_step = run.first_step + 1 if run.first_step else None
        self._writer: Any = SummaryWriter(str(self._folder), purge_step=purge_step)

    def log(self, metrics: Sequence[Metrics]) -> None:
        """Write the values as scalars."""
        self._folder.stat()  # a writer whose folder was deleted fails in its own thread, with a traceback
        for step, values in metrics:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def artifact(self, path: Path) -> None:
        """Do nothing: TensorBoard keeps no files, and these lie beside its own."""

    def end(self, status: Status) -> None:
        """Close the event file, which ends its writer's thread."""
        with suppress(OSError):  # of a folder that is gone; `log` has raised it already
            self._writer.close()
