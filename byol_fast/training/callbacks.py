"""Hooks into a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast.trackers.base import METHODS

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult
    from byol_fast.training.train_step import StepOutput
    from byol_fast.training.trainer import Trainer


class Callback:
    """Hooks that the trainer calls; override the ones you need, the others do nothing.

    With several processes every process calls its callbacks; `trainer.world.is_main_process` is true on the one that
    writes files.
    To end the run after the step under way, with everything saved, call `trainer.stop()`.

    Examples:
        >>> class EarlyStopping(Callback):
        ...     def on_evaluation(self, trainer, record):
        ...         if record["step"] > 0 and record["knn_top1"] > 0.9:
        ...             trainer.stop()
        >>> Trainer(config, callbacks=[EarlyStopping()]).fit()
    """

    def on_run_begin(self, trainer: Trainer) -> None:
        """Called before the first step, also after a resume."""

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        """Called after every optimizer step; reading `output.values` synchronizes with the device."""

    def on_log(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Called with the records of the steps since the last call: every `log_every` steps, and before an evaluation's
        record or a checkpoint is written.
        """

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Called after a kNN evaluation."""

    def on_full_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Called after the kNN evaluation on all images that `knn.full_at_end` adds after the last step."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Called after a checkpoint has been written."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Called instead of `on_run_end` when a signal (`Interrupted`) or an error ends the run; it is raised after."""

    def on_run_end(self, trainer: Trainer, result: RunResult) -> None:
        """Called at the end of the run, after the encoder has been exported."""


_HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def check_callbacks(callbacks: object) -> list[Callback]:
    """Callbacks as a list.

    Raises:
        TypeError: they are no list, or one of them has not all hooks.
    """
    if not isinstance(callbacks, Iterable):
        name = type(callbacks).__name__
        raise TypeError(f"callbacks: must be a list of byol_fast.Callback objects, got {name}; pass callbacks=[...]")
    callbacks = list(callbacks)
    for callback in callbacks:
        if isinstance(callback, type):
            name = callback.__name__
            raise TypeError(f"callbacks: must be byol_fast.Callback objects, got the class {name}; pass {name}()")
        name = type(callback).__name__
        if missing := [hook for hook in _HOOKS if not callable(getattr(callback, hook, None))]:
            is_tracker = all(hasattr(callback, method) for method in METHODS)
            fix = "pass it in byol_fast.TrackerCallback([...])" if is_tracker else "derive it from byol_fast.Callback"
            raise TypeError(
                f"callbacks: must be byol_fast.Callback objects, got {name} without the hook {missing[0]}; {fix}"
            )
    return callbacks
