"""The report page at the end of a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from byol_fast.report.build import ExtraSections, report
from byol_fast.training.callbacks import Callback

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult
    from byol_fast.training.trainer import Trainer

log = logging.getLogger(__name__)


class ReportCallback(Callback):
    """Writes `report.html` into the run folder when the run ends.

    Only the parts that need no images, within about a second; `byol-fast report` adds the rest.

    Args:
        extra_sections: further sections of the page, from the run folder.
    """

    def __init__(self, extra_sections: ExtraSections = lambda run_dir: []) -> None:
        self.extra_sections = extra_sections

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        """Write the page; an error is a warning, because the run is complete and saved."""
        if not trainer.world.is_main_process:
            return
        try:
            report([result.run_dir], pictures=False, extra_sections=self.extra_sections)
        except Exception as error:
            log.warning("no report.html: %s; try byol-fast report %s", error, result.run_dir)
