"""A training step captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from byol_fast.data.batch import Views, copy_views

if TYPE_CHECKING:
    from byol_fast.training.train_step import StepOutput

WARMUP_STEPS = 3


class CUDAGraphStep:
    """A function of views as one CUDA graph, captured at the first call and replayed from then on.

    The warm-up calls before the capture leave no trace: everything in `mutable_tensors` and the random number
    generator are restored.

    Args:
        function: takes the views of each batch, returns a `StepOutput`; launches work on one stream of the device and
            never waits for it. Learning rates and tau must be tensors on the device: a replay reads their new values.
        mutable_tensors: lists all tensors that `function` changes.
        device: the GPU.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Views]], StepOutput],
        mutable_tensors: Callable[[], list[Tensor]],
        device: torch.device,
    ) -> None:
        self._function = function
        self._mutable_tensors = mutable_tensors
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Views] = []
        self._output: StepOutput | None = None

    def __call__(self, views_of_batches: Sequence[Views]) -> StepOutput:
        """Copy the views into the graph's inputs and replay it.

        Args:
            views_of_batches: on the GPU, with the shapes and dtypes of the first call.

        Returns:
            The output; `values` is a copy which the next replay does not overwrite, `features` are not.

        Raises:
            ValueError: other shapes or dtypes than at the first call.
        """
        if self._graph is None:
            self._capture(views_of_batches)
        for static, view in zip(_flat(self._inputs), _flat(views_of_batches), strict=True):
            if static.shape != view.shape or static.dtype != view.dtype:
                shapes = [(list(v.shape), v.dtype) for v in _flat(views_of_batches)]
                raise ValueError(
                    f"CUDAGraphStep: views must be as at the first call, got {shapes}; keep the batch size"
                )
        for static, view in zip(_flat(self._inputs), _flat(views_of_batches), strict=True):
            static.copy_(view, non_blocking=True)
        assert self._graph is not None
        assert self._output is not None
        self._graph.replay()
        return replace(self._output, values=self._output.values.clone())

    def _capture(self, views_of_batches: Sequence[Views]) -> None:
        self._inputs = [copy_views(views) for views in views_of_batches]
        restore_state_after(self._warm_up, self._mutable_tensors, self._device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        failure: Exception | None = None
        try:
            # Other threads (DALI's) may allocate and query events meanwhile; only this thread's calls are checked.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                try:
                    self._output = self._function(self._inputs)
                except Exception as error:  # the end of a broken capture raises, too, and would hide it
                    failure = error
        except RuntimeError:
            torch.cuda.set_stream(stream)
            if failure is None:
                raise
        if failure is not None:
            self._inputs, self._output = [], None
            raise failure
        self._graph = graph

    def _warm_up(self) -> None:
        """Libraries choose their algorithms and the optimizer creates its state, on a side stream as torch asks."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP_STEPS):
                self._function(self._inputs)
        torch.cuda.current_stream(self._device).wait_stream(side)


def _flat(views_of_batches: Sequence[Views]) -> list[Tensor]:
    return [view for views in views_of_batches for view in views]


def restore_state_after(
    work: Callable[[], None], mutable_tensors: Callable[[], list[Tensor]], device: torch.device
) -> None:
    """Run warm-up steps, then restore all state they modified.

    State that the optimizer creates meanwhile stays, at zero: the value it begins with.

    Args:
        work: runs the steps.
        mutable_tensors: lists all tensors that a step changes.
        device: the generator of which is restored, too.
    """
    before = mutable_tensors()
    saved = [t.detach().clone() for t in before]
    known = {id(t) for t in before}
    on_gpu = device.type == "cuda"
    rng_state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    work()
    with torch.no_grad():
        torch._foreach_copy_([t.detach() for t in before], saved)
        for created in mutable_tensors():
            if id(created) not in known:
                created.zero_()
    if on_gpu:
        torch.cuda.set_rng_state(rng_state, device)
    else:
        torch.set_rng_state(rng_state)
