"""Checkpoints of a run: when they are saved, and what is in them."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.builder import TrainerComponents
from byol_fast.training.errors import TrainingError
from byol_fast.training.state import named_tensors, whole_steps_in
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.errors import CheckpointError

# A checkpoint after every epoch of a few steps would cost more than the steps.
MIN_CHECKPOINT_STEPS = 100


class Checkpointer:
    """Saves the state of a run into its `checkpoints` folder.

    Args:
        components: of the run.
    """

    def __init__(self, components: TrainerComponents) -> None:
        config, state = components.config, components.state
        self._components = components
        self._folder = components.run_dir.checkpoints
        epoch = whole_steps_in(1, state.loader, config.grad_accum_steps)
        self.every = config.checkpoint_every or -(-MIN_CHECKPOINT_STEPS // epoch) * epoch
        """Steps between checkpoints: by default whole epochs."""
        self._previous_step = state.step  # see `checkpoints.save`
        # A run that was resumed from the best checkpoint has no usable one of the same step beside it.
        is_saved = components.checkpoint == checkpoints.path_at_step(self._folder, state.step)
        self.saved_step = state.step if is_saved else -1
        """Step of the newest checkpoint; -1 for none."""

    def save(self, config: Config) -> Path:
        """Write a checkpoint of the current state; all processes must call it.

        One within a series of skipped steps is saved beside the older ones, none of which is deleted for it.

        Raises:
            TrainingError: a weight, a buffer or the optimizer's state is not finite.
            CheckpointError: the disk is full or read-only.
        """
        parts = self._components
        payload = parts.state.state_dict() | {
            "config": json.dumps(configs.to_dict(config)),
            "environment": json.dumps(parts.environment),
            "feature_dim": parts.state.model.feature_dim,
        }
        self._check_finite(payload)
        step, previous = parts.state.step, self._previous_step
        keep = None if parts.state.skipped_in_a_row else config.keep_checkpoints
        path = parts.execution.world.run_on_main(
            lambda: checkpoints.save(self._folder, step, payload, keep=keep, previous=previous)
        )
        self.saved_step = step
        if keep is not None:
            self._previous_step = step
        return path

    def keep_as_best(self) -> None:
        """Keep the checkpoint of the current step until another one is better and outside a series of skipped steps."""
        state = self._components.state
        path, keep_others = checkpoints.path_at_step(self._folder, state.step), state.skipped_in_a_row > 0
        state.world.run_on_main(lambda: checkpoints.save_as_best(path, keep_others=keep_others))

    def _check_finite(self, payload: dict[str, Any]) -> None:
        """A checkpoint with a NaN or an infinity would pass for a good one."""
        state = self._components.state
        names_by_rank = state.world.all_gather(checkpoints.nonfinite(named_tensors(payload)))
        if (name := next(chain.from_iterable(names_by_rank), None)) is not None:
            raise TrainingError(self.divergence_message(f"{name} is not finite after step {state.step}"))

    def divergence_message(self, problem: str) -> str:
        """Error message of a run that diverged, with its last good checkpoint and what usually helps."""
        step = self._components.execution.world.run_on_main(self._last_good_step)
        last = "there is no good checkpoint yet" if step is None else f"the last good checkpoint is of step {step}"
        return f"training: {problem}; {last}. A smaller optim.lr, a longer warm-up or precision fp32 usually helps"

    def _last_good_step(self) -> int | None:
        """Step of the newest checkpoint that is intact, finite, and outside a series of skipped steps."""
        for path in checkpoints.newest_first(self._folder):
            with suppress(CheckpointError), checkpoints.restoring(path):
                payload = checkpoints.load(path)
                if not payload.get("skipped_in_a_row") and not checkpoints.nonfinite(named_tensors(payload)):
                    return int(payload["step"])
        return None
