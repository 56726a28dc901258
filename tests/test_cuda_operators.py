"""Operators and dtypes that a training step calls, compared with those that torch's CUDA dispatch accepted.

The CPU has operators for dtypes that CUDA lacks, so a step that runs here may fail in its first second on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.dry import operators
from tests.dry.operators import OperatorRecorder
from tests.dry.small_steps import STEPS, Combination, batch, build_step, combinations

VERSION, KNOWN = operators.read()

pytestmark = pytest.mark.skipif(
    operators.torch_version() != VERSION,
    reason=f"{operators.FILE.name} was made with torch {VERSION}, other versions may call other operators",
)


# A CUDA graph holds what the same step calls when it is compiled only, and a CPU has no graphs.
@pytest.mark.parametrize("combination", [c for c in combinations() if c.mode != "graph"], ids=str)
def test_step_calls_only_operators_that_cuda_has(combination: Combination) -> None:
    recorder = OperatorRecorder()
    step = build_step(combination, torch.device("cpu"), recorder.note_parameters)
    views = batch()
    with recorder:
        for k in range(STEPS):
            step(views, k)
    unknown = "\n  ".join(operators.missing(recorder.calls, KNOWN))
    assert not unknown, (
        f"torch {VERSION} on CUDA has not executed these calls of the step in a dry run (operator: dtypes of "
        f"parameters, gradients, optimizer state and buffers):\n  {unknown}\n"
        "Where CUDA has no kernel for a dtype, every such step fails on a GPU. To find out, and to renew "
        f"tests/{operators.FILE.name}: make dry SHIM=FOLDER"
    )
