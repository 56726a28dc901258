"""Checkpoints of a run: when they are saved, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.builder import TrainerComponents
from byol_fast.training.errors import TrainingError
from byol_fast.training.state import whole_steps_in
from byol_fast.utils import checkpoint as checkpoints

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
        exists = state.world.run_on_main(checkpoints.path_at_step(self._folder, state.step).exists)
        self.saved_step = state.step if state.step and exists else -1
        """Step of the newest checkpoint; -1 for none."""

    def save(self, config: Config) -> Path:
        """Write a checkpoint of the current state; all processes must call it.

        Raises:
            TrainingError: a weight is not finite.
            CheckpointError: the disk is full or read-only.
        """
        parts = self._components
        self._check_weights_finite()
        payload = parts.state.state_dict() | {
            "config": json.dumps(configs.to_dict(config)),
            "environment": json.dumps(parts.environment),
            "feature_dim": parts.state.model.feature_dim,
        }
        step = parts.state.step
        path = parts.execution.world.run_on_main(
            lambda: checkpoints.save(self._folder, step, payload, keep=config.keep_checkpoints)
        )
        self.saved_step = step
        return path

    def keep_as_best(self) -> None:
        """Keep the checkpoint of the current step until another one is better."""
        path = checkpoints.path_at_step(self._folder, self._components.state.step)
        self._components.execution.world.run_on_main(lambda: checkpoints.save_as_best(path))

    def _check_weights_finite(self) -> None:
        """A checkpoint of non-finite weights would pass for a good one."""
        state = self._components.state
        norms = torch.stack(torch._foreach_norm(list[Tensor](state.model.trainable_parameters())))
        if not bool(torch.isfinite(norms).all()):
            raise TrainingError(self.divergence_message(f"a weight is not finite after step {state.step}"))

    def divergence_message(self, problem: str) -> str:
        """Error message of a run that diverged, with its last good checkpoint and what usually helps."""
        saved = checkpoints.saved_steps(self._folder)
        last = f"the last good checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
        return f"training: {problem}; {last}. A smaller optim.lr, a longer warm-up or precision fp32 usually helps"
