"""The report page at the end of a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from byol_fast.report.build import ExtraSections, report
from byol_fast.training.callbacks import Callback
from byol_fast.training.errors import Interrupted, TrainingError
from byol_fast.utils.commands import program, shell_path

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult
    from byol_fast.training.trainer import Trainer

log = logging.getLogger(__name__)


class ReportCallback(Callback):
    """Writes `report.html` into the run folder when the run ends, is interrupted or diverges.

    Only the parts that need no images, within about a second; `byol-fast report` adds the rest.

    Args:
        extra_sections: further sections of the page, from the run folder.
    """

    def __init__(self, extra_sections: ExtraSections = lambda run_dir: []) -> None:
        self.extra_sections = extra_sections

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        """Write the page."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Write the page of the steps so far."""
        if isinstance(error, Interrupted | TrainingError):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Write the page; an error is a warning, because the run is saved."""
        if not trainer.world.is_main_process:
            return
        try:
            report([trainer.run_dir], pictures=False, extra_sections=self.extra_sections)
        except Exception as error:
            log.warning("no report.html: %s; try %s report %s", error, program(), shell_path(trainer.run_dir))
