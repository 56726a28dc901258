"""Captures of CUDA graphs: what other threads may do meanwhile, and what is said when one fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models.base import ModelOutput
from byol_fast.models.byol import BYOL
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.train_step import TrainStep
from tests.gpu import DEVICE, only_on_a_gpu

ROOT = Path(__file__).parents[2]


def test_no_capture_ends_because_of_another_thread() -> None:
    """In torch's default mode an allocation or event query of any thread (DALI's) makes a capture fail."""
    modes: dict[str, object] = {}
    for folder in ("byol_fast", "kernels", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.cuda.graph", "cuda.graph"}:
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    modes[f"{path.relative_to(ROOT)}:{node.lineno}"] = given.get("capture_error_mode")
    assert modes
    assert set(modes.values()) == {"'thread_local'"}, modes


@pytest.mark.gpu("step")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_an_error_within_a_capture_is_the_one_that_is_raised(error: type[Exception]) -> None:
    """The end of a broken capture raises, too; training must go on outside it, to find a batch that fits."""
    only_on_a_gpu("there is no capture")
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    )
    model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=16).to(DEVICE)
    schedule = RunSchedule(total_steps=8, base_lr=0.1, batch_size=8, tau_base=0.9)

    def forward(view1: torch.Tensor, view2: torch.Tensor) -> ModelOutput:
        if torch.cuda.is_current_stream_capturing():
            if error is torch.OutOfMemoryError:
                torch.empty(2**50, device=DEVICE)
            raise error("no")
        return model.forward_train(view1, view2)

    step = TrainStep(model, build_optimizer(OptimConfig(), model.trainable_parameters()), schedule, forward=forward)
    step.use_cuda_graph()
    views = torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8)
    batch = Batch((views[0], views[1]), None, torch.arange(8))
    stream = torch.cuda.current_stream()
    with pytest.raises(error):
        step(batch, 0)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    with step.without_cuda_graph():
        step(batch, 0)
    torch.cuda.synchronize()
