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
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        _create_momentum(sgd)
        sgd.register_load_state_dict_post_hook(_create_momentum)  # a state without momentum replaces the one here
        return sgd
    cuda = any(p.is_cuda for p in parameters)
    adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return adam(groups, lr=0.0, fused=True, capturable=cuda)


def _create_momentum(sgd: torch.optim.Optimizer) -> None:
    """Create missing momentum at zero: torch's first step leaves it uninitialized if that step is skipped."""
    for group in sgd.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if sgd.state[p].get("momentum_buffer") is None:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
