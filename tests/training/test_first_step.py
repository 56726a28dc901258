"""Progress of the first step: the stage that torch.compile and the CUDA graph are in."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from byol_fast.training.cuda_graph import CUDAGraphStep
from byol_fast.training.first_step import current_stage, first_step_bar
from byol_fast.training.mode import Mode
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import Progress, ProgressBar


def test_stages_of_a_compilation() -> None:
    stages = [current_stage()]

    def inner(graph: Any, inputs: Any, **_: Any) -> Any:
        stages.append(current_stage())
        return make_boxed_func(graph.forward)

    def backend(graph: Any, inputs: Any) -> Any:
        stages.append(current_stage())
        return compile_fx(graph, inputs, inner_compile=inner)

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    torch._dynamo.reset()
    assert torch.compile(double, backend=backend)(torch.ones(2)).tolist() == [2, 2]
    stages.append(current_stage())
    assert stages == ["running", "tracing", "compiling", "running"]


def test_stages_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages before torch captures, as far as they need no GPU."""
    stages: list[str] = []

    class NoStream:
        def __init__(self, device: torch.device) -> None:
            stages.append(current_stage())
            raise RuntimeError("no GPU")

    def warm_up(work: Callable[[], None], *_: object) -> None:
        stages.append(current_stage())
        work()

    monkeypatch.setattr("byol_fast.training.cuda_graph.restore_state_after", warm_up)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    with pytest.raises(RuntimeError, match="no GPU"):
        CUDAGraphStep(list, list, torch.device("cuda"))([])  # type: ignore[arg-type]
    assert stages == ["capturing", "warming up for the capture"]


def test_first_step_has_a_bar_unless_it_is_eager() -> None:
    out = io.StringIO()
    progress = Progress(PlainConsole(file=out, width=200))
    with first_step_bar(progress, Mode("graph", "as asked"), max_autotune=True) as bar:
        assert isinstance(bar, ProgressBar)
        bar.print_line()
    with first_step_bar(progress, Mode("eager", "as asked"), max_autotune=False) as nothing:
        assert nothing is None
    assert out.getvalue() == "first step: running  elapsed 0:00:00  25-60 minutes for a ResNet-50\n"
