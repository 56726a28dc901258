"""The state of a run: what a checkpoint holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from byol_fast.data import ViewLoader
from byol_fast.data.sampler import BatchSampler
from byol_fast.models.base import SSLModel
from byol_fast.training.distributed import World
from byol_fast.training.online_probe import OnlineProbe
from byol_fast.utils import records as checks
from byol_fast.utils.checkpoint import optimizer_problem, tensor_problem
from byol_fast.utils.errors import first_line
from byol_fast.utils.precision import GradScaler

log = logging.getLogger(__name__)

_COUNTERS = checks.record_of(
    {"step": checks.count, "evaluated_at": checks.number, "best": checks.number}, required=True
)
_POSITION = checks.record_of({"loader": checks.record_of({"batch_number": checks.count}, required=True)}, required=True)


def named_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's tensors in a `TrainState.state_dict`, by name."""
    tensors: dict[str, Tensor] = dict(state["model"])
    for number, values in state["optimizer"]["state"].items():
        named = {f"the optimizer's {key} of parameter {number}": value for key, value in values.items()}
        tensors |= {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return tensors


def steps_in(epochs: float, loader: ViewLoader | BatchSampler, grad_accum_steps: int) -> float:
    """Optimizer steps in some epochs; a fraction where `grad_accum_steps` does not divide the batches."""
    return epochs * loader.batches_per_epoch / grad_accum_steps


def whole_steps_in(epochs: float, loader: ViewLoader | BatchSampler, grad_accum_steps: int) -> int:
    """`steps_in` as a whole number, rounded down, at least 1."""
    return max(int(steps_in(epochs, loader, grad_accum_steps)), 1)


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore this process's random number generators, see `TrainState.rng_state`."""
    torch.set_rng_state(state["rng"])
    if "rng_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng_cuda"])


@dataclass
class TrainState:
    """Step counter, model, optimizer, loader position, and everything else that training changes."""

    model: SSLModel
    optimizer: torch.optim.Optimizer
    loader: ViewLoader
    grad_scaler: GradScaler | None = None
    world: World = field(default_factory=World)
    grad_accum_steps: int = 1
    """Batches per optimizer step."""
    probe: OnlineProbe | None = None
    step: int = 0
    """Optimizer steps finished."""
    evaluated_at: int = -1
    """Step at which the encoder was evaluated last; -1 for never."""
    skipped_in_a_row: int = 0
    """Steps in a row that were skipped, up to the last step whose record was read."""
    best: float = -1.0
    """Best kNN accuracy so far, 0..1; -1 before the first evaluation of a trained encoder."""

    @property
    def epoch(self) -> float:
        """Finished epochs, with the fraction of the current one."""
        return self.step * self.grad_accum_steps / self.loader.batches_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, momentum, and each process's position in the data and random number generators.

        All processes must call it.
        """
        own: dict[str, Any] = {"loader": self.loader.state_dict(), **self.rng_state()}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "processes": self.world.all_gather(own),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "evaluated_at": self.evaluated_at,
            "best": self.best,
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def rng_state(self) -> dict[str, Tensor]:
        """State of this process's random number generators."""
        state = {"rng": torch.get_rng_state()}
        if next(self.model.parameters()).is_cuda:
            state["rng_cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: it belongs to other data or settings, or to another number of processes.
            RuntimeError: it is that of another model or optimizer, or damaged; nothing was changed.
        """
        processes = state["processes"]
        if len(processes) != self.world.size:
            raise ValueError(
                f"resume: the number of processes must be the run's, {len(processes)}, got {self.world.size}; start it "
                f"with --nproc-per-node so that there are {len(processes)} in all (1 without torchrun), or "
                "begin a new run"
            )
        own = processes[self.world.rank]
        problem = (
            _COUNTERS(state, "")
            or _POSITION(own, "process")
            or tensor_problem(state["model"], self.model.state_dict())
            or optimizer_problem(state["optimizer"], self.optimizer)
            or _rng_problem(own, self.rng_state())
        )
        if problem is not None:  # before anything is overwritten
            raise RuntimeError(problem)
        self.loader.load_state_dict(own["loader"])  # first: it refuses a state of other data
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler is not None and state["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        self.step = state["step"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)  # checkpoints of earlier versions lack it
        self.evaluated_at = state["evaluated_at"]
        self.best = state["best"]
        if self.probe is not None and state.get("probe") is not None:
            try:
                self.probe.load_state_dict(state["probe"])
            except ValueError as error:  # the images changed, and the run was told to go on
                log.warning("%s", error)
        set_rng_state(own)


def _rng_problem(state: dict[str, Any], expected: dict[str, Tensor]) -> str | None:
    """The first state of a random number generator that does not fit; None if all do."""
    for name in expected.keys() & state.keys():
        got = state[name]
        if not isinstance(got, Tensor) or got.dtype != torch.uint8 or got.shape != expected[name].shape:
            return f"{name} must be {len(expected[name])} bytes, got others"
    try:
        torch.Generator().set_state(state["rng"])
    except RuntimeError as error:
        return f"rng is no state of a random number generator ({first_line(error)})"
    return None
