"""Everything that makes a run what it is at one moment; what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from byol_fast.data import ViewLoader
from byol_fast.methods import SelfSupervisedTask


@dataclass
class TrainState:
    """The one step counter, and whatever changes with it."""

    task: SelfSupervisedTask
    optimizer: torch.optim.Optimizer
    loader: ViewLoader
    step: int = 0
    """Optimizer steps finished."""
    evaluated_at: int = -1
    """Step at which the encoder was evaluated last; -1 for never."""

    @property
    def epoch(self) -> float:
        """Epochs finished, with the fraction of the one under way."""
        return self.step / self.loader.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, momentum, position in the data, random number generators."""
        state: dict[str, Any] = {
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "rng": torch.get_rng_state(),
        }
        if next(self.task.parameters()).is_cuda:
            state["rng_cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.loader.load_state_dict(state["loader"])  # first: it refuses a state of other data
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.evaluated_at = state["evaluated_at"]
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng_cuda"])
