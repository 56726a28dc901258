"""The training loop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch

from byol_fast.config import Config
from byol_fast.data import Batch, CorruptImageError
from byol_fast.export import export_encoder
from byol_fast.trackers import build_trackers
from byol_fast.training import distributed
from byol_fast.training.builder import build_components, global_batch_size
from byol_fast.training.callbacks import Callback, check_callbacks
from byol_fast.training.checkpointer import Checkpointer
from byol_fast.training.errors import Interrupted, TrainingError
from byol_fast.training.first_step import first_step_bar
from byol_fast.training.health import CollapseDetector
from byol_fast.training.knn_monitor import EvalMetrics
from byol_fast.training.locks import exclusive
from byol_fast.training.memory import out_of_memory_message
from byol_fast.training.messages import epoch_text, startup_summary, status_line, training_bar
from byol_fast.training.metrics import MetricsLogger, StepRecords, ThroughputMeter
from byol_fast.training.metrics_file import Record
from byol_fast.training.run_dir import RunResult
from byol_fast.training.state import steps_in, whole_steps_in
from byol_fast.training.tracking import TrackerCallback
from byol_fast.utils.commands import short_path
from byol_fast.utils.errors import first_line
from byol_fast.utils.output import ignore_output_errors
from byol_fast.utils.profiler_ranges import record_range
from byol_fast.utils.progress import Progress, ProgressBar, current, of_run
from byol_fast.utils.run_folder import not_writable
from byol_fast.utils.signals import GracefulShutdown

log = logging.getLogger(__name__)

_STOP = 1000  # above all signal numbers: a callback ends the run


class _EvaluationStopped(Exception):  # noqa: N818
    """A signal arrived between two batches of an evaluation."""


class Trainer:
    """Runs training from the current state to its last step: fetch, step, log, evaluate, save.

    A trainer holds the lock of its run folder until `fit` is over, or `close`. Building the parts is `builder.py`, the
    run directory `run_dir.py`, records `metrics.py`; reports and trackers are callbacks. With several processes
    (torchrun) each of them builds and fits a trainer.

    Args:
        config: of the run; with `extend`, it begins at the end of that run.
        data: images to train on, instead of the configuration's: anything `byol_fast.data.open_source` takes.
        resume: run folder to continue; its checkpoint is loaded and its configuration must agree with `config`.
        callbacks: hooks into the run, called in order.

    Raises:
        ConfigError: a field is invalid, or differs from the run to be resumed in what is computed; another process
            runs in the folder.
        CheckpointError: `resume` holds no usable checkpoint.
        ValueError: the data is missing, empty or too small.
        TypeError: a callback is no `byol_fast.Callback`.
        RuntimeError: another run is being built or trained in this process.

    Examples:
        >>> from byol_fast import Trainer
        >>> from byol_fast.config import recipes
        >>> Trainer(recipes.demo()).fit().knn_top1
    """

    def __init__(
        self,
        config: Config,
        *,
        data: object = None,
        resume: Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = check_callbacks(callbacks)
        parts = self._parts = build_components(config, data=data, resume=resume)
        execution = parts.execution
        self.config = parts.config
        self.world, self.device = execution.world, execution.device
        self.precision, self.mode = execution.precision, execution.mode
        self.environment = parts.environment
        self.run_dir = parts.run_dir.path
        self.train_step = parts.train_step
        self.model = parts.train_step.model
        self.state = parts.state
        self.loader = parts.state.loader
        self.knn = parts.knn
        self.total_steps = parts.total_steps
        self.resumed = parts.checkpoint is not None
        if self.config.log:
            self.callbacks.append(TrackerCallback(build_trackers(self.config.log)))
        self.throughput = ThroughputMeter()
        self._has_own_data = not isinstance(data, str | Path | None)
        self._steps = StepRecords(
            steps_in(1, self.loader, self.config.grad_accum_steps),
            self.throughput,
            self.device,
            None if self.world.is_single else distributed.all_reduce_mean,
        )
        self.metrics = MetricsLogger(parts.run_dir.metrics, is_main_process=self.world.is_main_process)
        self._collapse = CollapseDetector(
            total_steps=self.total_steps, batch_size=self.config.batch_size, method=self.config.method
        )
        self._checkpointer = Checkpointer(parts)
        self._shutdown = GracefulShutdown()
        self._should_stop = self._checkpoint_is_due = self._has_stepped = False

    # --- the run

    @ignore_output_errors()
    def fit(self) -> RunResult:
        """Train to the last step and export the encoder.

        Returns:
            Results of the run.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP; everything up to the last finished step is saved. After the last
                evaluation only a second SIGINT, which before it is a KeyboardInterrupt unless the step is saved.
            TrainingError: too many skipped steps in a row, or out of memory.
            CheckpointError: a checkpoint or the metrics could not be written.
            RuntimeError: another run is being built or trained in this process, or this trainer has released its
                folder: it trains once, and a later trainer of the same folder takes over.
        """
        shown = of_run(is_main_process=self.world.is_main_process).shown()
        with exclusive(), shown, self._shutdown.catch_signals():
            try:
                self._parts.restore_global_state()
                return self._fit()
            except BaseException as error:
                self._shutdown.is_ending = True
                with suppress(KeyboardInterrupt):  # it ends what the callbacks do; the error says what is saved
                    self.call_hooks("on_exception", error)
                if isinstance(error, KeyboardInterrupt) and self._checkpointer.saved_step == self.state.step:
                    raise self._interrupted(signal.SIGINT, is_complete=self._parts.run_dir.is_finished()) from None
                raise
            finally:
                self.close()

    def _fit(self) -> RunResult:
        self.world.run_on_main(self._write_run_files)
        with training_bar(self._parts) as bar:
            for line in [*startup_summary(self._parts), f"run folder: {self.run_dir}"]:
                bar.progress.print(line)
            self.call_hooks("on_run_begin")
            self._evaluate_if_due(bar.progress)  # before the first step
            while self.state.step < self.total_steps and not self._should_stop:
                # Also between slow steps; several processes could not agree on the time.
                is_overdue = not self._has_stepped or (self.world.is_single and bar.is_note_old)
                self.train_one_step()
                bar.advance(self.state.step, description=epoch_text(self.state))
                if is_overdue or self._is_due(self.config.log_every):
                    self._log(bar)
                self._save_if_due()
                self._evaluate_if_due(bar.progress)
                self._raise_if_interrupted()
            if self._checkpointer.saved_step != self.state.step:
                self.save_checkpoint()
            self._evaluate_on_all_images(bar.progress)
            self._shutdown.finish()
            # Before the callbacks: they may evaluate or upload, and need the memory and the files.
            self.loader.close()
            result = self.world.run_on_main(self._export)
        if result.problem is not None and self.world.is_main_process:
            log.warning("%s: %s", short_path(self.run_dir), result.problem)
        self.call_hooks("on_run_end", result)
        return result

    def close(self) -> None:
        """Give up the run folder and all threads; `fit` does it at its end."""
        try:
            self.loader.close()
        finally:
            if self._parts.lock is not None:
                self._parts.lock.release()

    def stop(self) -> None:
        """End the run after the current step, as if it were complete: saved, and the encoder exported."""
        self._should_stop = True

    def train_one_step(self) -> None:
        """Fetch the batches of a step and train on them.

        Raises:
            TrainingError: out of memory; names the largest batch that fits.
        """
        with self.throughput.data_wait(self.loader), record_range("data wait"):
            batches = self._fetch()
        max_autotune = self.config.max_autotune
        bar = nullcontext() if self._has_stepped else first_step_bar(current(), self.mode, max_autotune=max_autotune)
        try:
            with bar:
                output = self.train_step(batches, self.state.step)
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        else:
            self.state.step += 1
            self._has_stepped = True
            probe_top1 = None
            if self.state.probe is not None:
                labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
                probe_top1 = self.state.probe.learn(output.features, labels, output.skipped)
            self._steps.add(self.state.step, output, probe_top1)
            self.throughput.count(self.global_batch_size)
            with record_range("callbacks"):
                self.call_hooks("on_step_end", output)
            return
        # Outside of the handler: the traceback would keep the step's tensors alive.
        raise TrainingError(out_of_memory_message(self.train_step, batches[0], reason, self.config))

    def _fetch(self) -> list[Batch]:
        try:
            return [next(self.loader) for _ in range(self.config.grad_accum_steps)]
        except CorruptImageError:
            if self.world.is_single:  # several processes would wait for each other
                self.save_checkpoint()
            raise

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, over all processes and accumulated batches."""
        return global_batch_size(self.config, self.world)

    # --- records

    def queue_records(self) -> list[Record]:
        """Queue the records of the steps since the last call. Waits for the device, once for all of them.

        Raises:
            TrainingError: `max_skipped_steps` steps in a row were skipped.
        """
        with record_range("metrics"):
            records = self._steps.read()
        if not records:
            return records
        max_skipped = self.config.max_skipped_steps
        for number, record in enumerate(records, 1):
            self.metrics.add(record)
            self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if record.get("skipped") else 0
            if self.state.skipped_in_a_row >= max_skipped:
                del records[number:]  # the run ends here
                break
        self.call_hooks("on_log", records)
        if (warning := self._collapse.update(records)) is not None and self.world.is_main_process:
            log.warning("%s", warning)
        last, skipped = records[-1]["step"], sum(bool(record.get("skipped")) for record in records)
        if skipped and self.world.is_main_process:
            log.warning("skipped %d of the last steps, to step %d: loss or gradient not finite", skipped, last)
        if (in_a_row := self.state.skipped_in_a_row) >= max_skipped:
            self.metrics.flush()
            problem = f"the loss or gradient of {in_a_row} steps in a row, to step {last}, was not finite"
            raise TrainingError(self._checkpointer.divergence_message(problem))
        return records

    def _log(self, bar: ProgressBar) -> None:
        records = self.queue_records()
        if records:
            bar.update(self.state.step, status_line(records[-1]))
        self.metrics.flush()

    # --- evaluation

    def _evaluate_if_due(self, progress: Progress) -> None:
        state = self.state
        every = whole_steps_in(self.config.knn.every_epochs, self.loader, self.config.grad_accum_steps)
        if self.knn is None or state.evaluated_at == state.step or not self._is_due(every):
            return
        self.queue_records()  # waits for the steps on the GPU: their time is not the evaluation's
        with self.throughput.paused():
            result = self.world.run_on_main(self._evaluate)
        if result is None:  # also after the last step: the run is not finished without its evaluation
            self._interrupt(self.world.all_reduce_max(self._shutdown.signum))
        which = f"epoch {state.epoch:.4g}" if state.step else f"{self.config.before_training}, norms calibrated"
        progress.print(f"{result.summary()}  ({which})")
        record = {"step": state.step, "epoch": round(state.epoch, 4), **result.to_dict()}
        if state.step > 0 and result.knn.top1 > state.best:
            if self._checkpointer.saved_step != state.step:
                self.save_checkpoint()
            self._checkpointer.keep_as_best()
            state.best = result.knn.top1
        # Recorded last: on resume, an evaluation found in the metrics counts as completely done.
        state.evaluated_at = state.step
        self.metrics.add(record)
        self.metrics.flush()
        self.call_hooks("on_evaluation", record)

    def _evaluate_on_all_images(self, progress: Progress) -> None:
        """Evaluate the trained encoder once more, if that is asked for and the other evaluations left images out."""
        if self.knn is None or not self.config.knn.full_at_end or not self.knn.is_partial:
            return
        if self.world.run_on_main(lambda: self._parts.run_dir.has_full_evaluation(self.state.step)):
            return  # a finished run is resumed
        result = self.world.run_on_main(lambda: self._evaluate(full=True))
        if result is None:
            self._interrupt(self.world.all_reduce_max(self._shutdown.signum))
        progress.print(f"{result.summary()}  (all images, after the last step)")
        record = {"step": self.state.step, "epoch": round(self.state.epoch, 4), **result.to_dict()}
        self.metrics.add(record)
        self.metrics.flush()
        self.call_hooks("on_full_evaluation", record)

    def _evaluate(self, *, full: bool = False) -> EvalMetrics | None:
        """Evaluate the encoder; None if a signal arrived meanwhile."""
        assert self.knn is not None
        try:
            return self.knn(untrained=self.state.step == 0, check=self._stop_evaluation_on_signal, full=full)
        except _EvaluationStopped:
            return None

    def _stop_evaluation_on_signal(self) -> None:
        if self._shutdown.signum:
            raise _EvaluationStopped

    # --- files, signals and callbacks

    def _save_if_due(self) -> None:
        """Save the periodic checkpoint; within a series of skipped steps, it waits for the first good one."""
        self._checkpoint_is_due |= self._is_due(self._checkpointer.every)
        if self._checkpoint_is_due:
            self.queue_records()
            if not self.state.skipped_in_a_row:
                self.save_checkpoint()
                self._checkpoint_is_due = False

    def save_checkpoint(self) -> None:
        """Write the records so far, then a checkpoint.

        Raises:
            TrainingError: the state is not finite.
            CheckpointError: the disk is full or read-only.
        """
        self.queue_records()
        self.metrics.flush()
        path = self._checkpointer.save(self.config)
        self.world.run_on_main(self._mark_unfinished)
        self.call_hooks("on_checkpoint", path)

    def call_hooks(self, event: str, *values: object) -> None:
        """Call a method of all callbacks, with this trainer and `values`."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *values)

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def _raise_if_interrupted(self) -> None:
        """Stop all processes after the same step, whichever was asked."""
        asked = self.world.all_reduce_max(max(self._shutdown.signum, _STOP * self._should_stop))
        if asked >= _STOP:
            self._should_stop = True
        elif asked and self.state.step < self.total_steps:
            self._interrupt(asked)

    def _interrupt(self, signum: int) -> NoReturn:
        self.save_checkpoint()
        raise self._interrupted(signum)

    def _interrupted(self, signum: int, *, is_complete: bool = False) -> Interrupted:
        step, own = self.state.step, self._has_own_data
        return Interrupted(signum, self.run_dir, step, has_own_data=own, is_complete=is_complete)

    def _write_run_files(self) -> None:
        """Write `config.json` and `environment.json`, and open the metrics."""
        run_dir, lock = self._parts.run_dir, self._parts.lock
        if lock is None or not lock.held:
            raise RuntimeError(
                f"training: a Trainer trains once and must hold the lock of {self.run_dir}, this one has released it; "
                "build another one, with `resume` to continue the run"
            )
        try:
            run_dir.write_config(self.config, self.environment)
            self._mark_unfinished()
            evaluated = self.state.evaluated_at == self.state.step
            self.metrics.open(self.state.step, evaluated=evaluated, source=self._parts.first_metrics)
        except OSError as error:
            raise not_writable(self.run_dir, error) from None

    def _mark_unfinished(self) -> None:
        """Mark the run as unfinished; a complete one that is not trained further stays complete, whatever comes."""
        if self.state.step < self.total_steps or not self._parts.run_dir.is_finished():
            self._parts.run_dir.write_status(finished=False)

    def _export(self) -> RunResult:
        """Export the encoder and mark the run as finished; the report is a callback on `on_run_end`."""
        step, size = self.state.step, self.model.feature_dim
        weights, _ = export_encoder(self.model.encoder, self.config, self.run_dir, step=step, feature_dim=size)
        result = self._parts.run_dir.result(self.config, step, weights, global_batch_size=self.global_batch_size)
        self._parts.run_dir.write_status(finished=True, problem=result.problem)
        return result
