"""The clock of a speed run (`byol-fast bench cifar10`), and what it logs."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from byol_fast.bench.speed_images import Images
from byol_fast.bench.speed_log import SpeedLog
from byol_fast.training.callbacks import Callback
from byol_fast.training.metrics_file import read
from byol_fast.training.run_dir import RunResult
from byol_fast.training.train_step import StepOutput
from byol_fast.training.trainer import Trainer
from byol_fast.utils import env
from byol_fast.utils.errors import CheckpointError
from byol_fast.utils.intervals import share_interval
from byol_fast.utils.telemetry import Telemetry

SAVE_SECONDS = 5.0
"""Time between two writes of the time; records of steps, when it is counted, come every ten seconds or more often."""


class SpeedRecorder(Callback):
    """Measures the time of a run's training and writes its log.

    Time of training: from the end of the first step of each start to the last one, with checkpoints and metrics,
    without evaluations. It never goes back: steps that are done again after a crash count twice.

    Args:
        log: of the run.
        images: of the run.
    """

    _telemetry: Telemetry

    def __init__(self, log: SpeedLog, images: Images) -> None:
        self.log, self.images = log, images
        self._lap_end = self._saved_at = time.perf_counter()
        self._lap_paused = self._evaluated = 0.0
        self._has_stepped = False
        self._saved_step = -1
        self._mark: Mark | None = None

    def on_run_begin(self, trainer: Trainer) -> None:
        """Complete the first line, and remove evaluations that are about to be made again."""
        header, state = self.log.header, trainer.state
        environment = env.describe_measurement(trainer.device) | trainer.environment | {"loader": trainer.loader.name}
        if header["starts"] == 0:
            header |= {
                "steps": trainer.total_steps,
                "images": self.images.record,
                "decode_seconds": self.images.seconds,
                "environment": environment,
            }
        else:
            header["changes"] += env.differences(header["environment"], environment)
        header["starts"] += 1
        is_evaluated = state.evaluated_at == state.step
        self.log.drop_after(state.step, evaluated=is_evaluated)
        if is_evaluated and state.step not in {line["step"] for line in self.log.evaluations}:
            # Killed between the metrics and the log. The evaluation is not made again.
            records = read(trainer.metrics.path)
            self._add_line(next(r for r in reversed(records) if r["step"] == state.step and "knn_top1" in r))
        self._telemetry = Telemetry(trainer.device)
        self.log.save()

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        """End the setup with the first step, which compiles."""
        if not self._has_stepped:
            output.values.tolist()  # waits for the device
            self._count(trainer)
            self._has_stepped = True
            self._mark = self._marked(trainer)

    def on_log(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Count the time, and write it every few seconds."""
        self._count(trainer)
        if self._lap_end - self._saved_at > SAVE_SECONDS:
            self.log.save()
            self._saved_at = self._lap_end

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Note the step of the newest checkpoint."""
        self._saved_step = trainer.state.step

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write a line, and save a checkpoint unless the evaluation was the best so far and has done so."""
        self._count(trainer)
        evaluated, now, mark = trainer.throughput.paused_seconds, self._marked(trainer), self._mark
        self._add_line(
            record,
            images_per_second=None if mark is None else now.images_per_second(mark, trainer.global_batch_size),
            watts=None if mark is None else now.watts(mark),
            evaluation_seconds=evaluated - self._evaluated,
        )
        self.log.save()
        if record["step"] > 0 and self._saved_step != record["step"]:
            trainer.save_checkpoint()
        self._evaluated = evaluated
        if self._has_stepped:
            self._mark = self._marked(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Write the time so far, unless not even the first start has begun."""
        self._count(trainer)
        if self.log.header["starts"]:
            with suppress(CheckpointError):  # on a full disk: the first error says so
                self.log.save()

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        """Mark the run as finished."""
        self.log.header |= {"finished": True, "problem": result.problem}
        self.log.save()

    def _add_line(
        self,
        record: dict[str, Any],
        *,
        images_per_second: float | None = None,
        watts: float | None = None,
        evaluation_seconds: float | None = None,
    ) -> None:
        """Add the line of an evaluation, from its record in the metrics and what was measured."""
        low, high = share_interval(record["knn_top1"], record["knn_num_val"])
        line = {
            "seconds": self.log.header["seconds"],
            "epoch": record["epoch"],
            "step": record["step"],
            "knn_top1": record["knn_top1"],
            "knn_low": low,
            "knn_high": high,
            "knn_k": record["knn_k"],
            "num_val": record["knn_num_val"],
            "images_per_second": images_per_second,
            "watts": watts,
            "evaluation_seconds": evaluation_seconds,
        }
        self.log.evaluations.append(line)

    def _count(self, trainer: Trainer) -> None:
        """Add the time since the last call, without evaluations, to that of the training or the setup."""
        now, paused = time.perf_counter(), trainer.throughput.paused_seconds
        name = "seconds" if self._has_stepped else "setup_seconds"
        self.log.header[name] += now - self._lap_end - (paused - self._lap_paused)
        self._lap_end, self._lap_paused = now, paused

    def _marked(self, trainer: Trainer) -> Mark:
        return Mark(trainer.state.step, self.log.header["seconds"], time.perf_counter(), self._telemetry.energy())


class Mark(NamedTuple):
    """Begin of an interval between two evaluations."""

    step: int
    seconds: float
    """Time of training."""
    wall: float
    """Time of everything."""
    joules: float | None
    """Energy counter of the GPU."""

    def images_per_second(self, earlier: Mark, batch_size: int) -> float | None:
        """Images trained on per second of training since an earlier mark."""
        seconds = self.seconds - earlier.seconds
        return batch_size * (self.step - earlier.step) / seconds if seconds > 0 else None

    def watts(self, earlier: Mark) -> float | None:
        """Mean power of the GPU since an earlier mark; None if it is not known."""
        if self.joules is None or earlier.joules is None:
            return None
        return (self.joules - earlier.joules) / (self.wall - earlier.wall)
