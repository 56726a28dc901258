"""Builds the optimizer of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from byol_fast.config import OptimConfig
from byol_kernels import LARS

CONSTANT = "constant_lr"
"""Key of a parameter group whose learning rate stays at its peak after the warm-up."""


def build_optimizer(
    config: OptimConfig, parameters: Sequence[nn.Parameter], predictor: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build LARS (the reference's rule), or torch's SGD, Adam or AdamW; each can skip a step by `found_inf`.

    Args:
        config: name and hyperparameters; the learning rate is set before every step.
        parameters: trainable parameters.
        predictor: the predictor's parameters, for `config.constant_predictor_lr`.
    """
    constant_ids = {id(p) for p in predictor} if config.constant_predictor_lr else set()
    groups: list[dict[str, Any]] = []
    for constant in (False, True):
        members = [p for p in parameters if (id(p) in constant_ids) == constant]
        if config.name == "lars":
            groups.append({"params": members, CONSTANT: constant})
            continue
        for decays in (True, False):
            params = [p for p in members if (p.ndim > 1 or config.decay_1d) == decays]
            groups.append({"params": params, "weight_decay": config.weight_decay * decays, CONSTANT: constant})
    groups = [group for group in groups if group["params"]]
    if config.name == "lars":
        return LARS(
            groups,
            lr=0.0,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            trust_coefficient=config.trust_coefficient,
            exclude_1d=not config.decay_1d,
        )
    # The fused forms take `found_inf`, so that a step is skipped without a host synchronization.
    if config.name == "sgd":
        return _SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    cuda = any(p.is_cuda for p in parameters)
    adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return adam(groups, lr=0.0, fused=True, capturable=cuda)


class _SGD(torch.optim.SGD):
    """SGD whose momentum begins at zero: torch's first step leaves it uninitialized if that step is skipped."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and create its momentum."""
        super().add_param_group(param_group)
        self._create_momentum()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and create the momentum that it lacks."""
        super().load_state_dict(state_dict)
        self._create_momentum()

    def _create_momentum(self) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
