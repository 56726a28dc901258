"""How the mathematics of a step is run: eager, compiled by torch's inductor, or captured whole into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from byol_fast.config import Config, ConfigError
from byol_fast.models.base import SelfSupervisedTask
from byol_fast.training.train_step import Forward, TrainStep, Views
from byol_fast.utils.precision import Precision

WARMUP_STEPS = 3
"""Steps before a capture: libraries choose their algorithms, the optimizer makes its state."""


class Mode(NamedTuple):
    """How a run's steps are executed, and why so."""

    name: Literal["eager", "compile", "graph"]
    why: str


def choose_mode(config: Config, device: torch.device, precision: Precision, world_size: int = 1) -> Mode:
    """`Config.mode` with "auto" resolved.

    Raises:
        ConfigError: a mode is asked for that this run cannot have; says why.
    """
    against_graph = _against_graph(config, device, precision, world_size)
    against_compile = "activation checkpointing is not compiled" if config.activation_checkpointing else None
    mode = _choose(config, device, against_graph, against_compile)
    if config.max_autotune and mode.name == "eager":
        raise ConfigError(
            f"config: max_autotune must be off in mode 'eager' ({mode.why}): nothing is compiled; set max_autotune to "
            "false, or mode to 'compile'"
        )
    return mode


def _choose(config: Config, device: torch.device, against_graph: str | None, against_compile: str | None) -> Mode:
    if config.mode == "graph" and against_graph:
        raise ConfigError(f"config: mode 'graph' cannot serve this run: {against_graph}; set mode to 'auto'")
    if config.mode == "compile" and against_compile:
        raise ConfigError(f"config: mode 'compile' cannot serve this run: {against_compile}; set mode to 'auto'")
    if config.mode != "auto":
        return Mode(config.mode, "as asked")
    if device.type == "cpu":
        return Mode("eager", "on CPUs compiling gains nothing and takes minutes")
    if against_compile:
        return Mode("eager", against_compile)
    if against_graph:
        return Mode("compile", f"no CUDA graph: {against_graph}")
    return Mode("graph", "one GPU, one process, one batch a step")


def _against_graph(config: Config, device: torch.device, precision: Precision, world_size: int) -> str | None:
    if device.type != "cuda":
        return "there is no GPU"
    if world_size > 1:
        return "there are several processes"
    if config.accumulate > 1:
        return "gradients of several batches are accumulated"
    if config.activation_checkpointing:
        return "activation checkpointing is not compiled"
    if precision.name == "fp16":
        return "fp16 with its loss scale has not been measured in a graph"
    return None


def compiled(task: SelfSupervisedTask, mode: Mode, *, alone: bool = True, max_autotune: bool = False) -> Forward:
    """The task's forward pass as the mode asks; what is compiled compiles at its first call.

    Args:
        task: the networks and the loss.
        mode: of the run.
        alone: one process. With several the networks are compiled one by one, because DDP goes between them.
        max_autotune: let inductor time several variants of each kernel, see `Config.max_autotune`.
    """
    if mode.name == "eager":
        return task.training_output
    # Without inductor's own CUDA graphs: in mode graph ours goes around the whole step.
    tuning = "max-autotune-no-cudagraphs" if max_autotune else None
    if not alone:
        for network in task.networks():
            network.compile(dynamic=False, mode=tuning)
        return task.training_output
    # Batch and view size never change within a run, so there is nothing for dynamic shapes to save.
    forward: Forward = torch.compile(task.training_output, dynamic=False, mode=tuning)
    return forward


class CapturedStep:
    """A `TrainStep`'s body as one CUDA graph: target, online forward and backward, loss, LARS and average.

    Made at the first call. The steps that warm libraries up leave no trace: weights, momentum, statistics and random
    numbers are put back before the graph is captured.

    Args:
        step: whose body is captured; its rates live on the device, so a replay follows them.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self._views: list[tuple[Tensor, Tensor]] = []
        self._values: Tensor | None = None

    def __call__(self, views: Views) -> Tensor:
        """Run a step: copy the views into the graph's inputs and replay it.

        Args:
            views: pairs of views on the GPU, of the shape and dtype of the first call's.

        Returns:
            `StepMetrics.values`, a copy that the next replay does not overwrite.
        """
        if self.graph is None:
            self._capture(views)
        elif any(
            a.shape != b.shape or a.dtype != b.dtype for a, b in zip(_flat(views), _flat(self._views), strict=True)
        ):
            shapes = [(list(v.shape), v.dtype) for v in _flat(views)]
            raise ValueError(f"CapturedStep: views must be as at the first call, got {shapes}; keep the batch size")
        for static, view in zip(_flat(self._views), _flat(views), strict=True):
            static.copy_(view, non_blocking=True)
        assert self.graph is not None
        assert self._values is not None
        self.graph.replay()
        return self._values.clone()

    def _capture(self, views: Views) -> None:
        self._views = [(view1.clone(), view2.clone()) for view1, view2 in views]
        device = self.step.device
        leave_no_trace(self.step, lambda: self._warm_up(device))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        failure: Exception | None = None
        try:
            # Other threads (DALI's) may allocate and query events meanwhile; only this thread's calls are checked.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                try:
                    self._values = self.step.body(self._views)
                except Exception as error:  # the end of a broken capture raises, too, and would hide it
                    failure = error
        except RuntimeError:
            torch.cuda.set_stream(stream)
            if failure is None:
                raise
        if failure is not None:
            self._views, self._values = [], None
            raise failure
        self.graph = graph

    def _warm_up(self, device: torch.device) -> None:
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARMUP_STEPS):
                self.step.body(self._views)
        torch.cuda.current_stream(device).wait_stream(aside)


def _flat(views: Views) -> list[Tensor]:
    return [view for pair in views for view in pair]


def leave_no_trace(step: TrainStep, work: Callable[[], None]) -> None:
    """Run steps that must not count: afterwards all that a step changes is as it was.

    State that the optimizer makes meanwhile stays, at zero: the value it begins with.

    Args:
        step: whose state it is.
        work: calls `step.body`.
    """
    before = step.changing()
    saved = [t.detach().clone() for t in before]
    known = {id(t) for t in before}
    cuda = step.device.type == "cuda"
    numbers = torch.cuda.get_rng_state(step.device) if cuda else torch.get_rng_state()
    work()
    with torch.no_grad():
        torch._foreach_copy_([t.detach() for t in before], saved)
        for made in step.changing():
            if id(made) not in known:
                made.zero_()
    if cuda:
        torch.cuda.set_rng_state(numbers, step.device)
    else:
        torch.set_rng_state(numbers)
