"""How the mathematics of a step is run: eager, or compiled by torch's inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from byol_fast.methods import SelfSupervisedTask, TaskOutput

Forward = Callable[[Tensor, Tensor], TaskOutput]


def compiled_forward(task: SelfSupervisedTask, mode: Literal["auto", "on", "off"], device: torch.device) -> Forward:
    """The task's forward pass, compiled or not.

    Args:
        task: the networks and the loss.
        mode: `on`, `off`, or `auto`: on for a GPU. On CPUs it gained nothing and costs a minute or two.
        device: where the task is.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return task.training_output
    # Batch and view size never change within a run, so there is nothing for dynamic shapes to save.
    compiled: Forward = torch.compile(task.training_output, dynamic=False)
    return compiled
