"""The optimizer of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from byol_fast.config import OptimConfig
from byol_kernels import LARS


def make_optimizer(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """LARS by the reference's rule, or one of torch's, with weight decay on matrices and filters only.

    Args:
        config: name and hyperparameters; the learning rate is set anew before every step.
        parameters: what to optimise.
    """
    if config.name == "lars":
        # It leaves biases and norms (ndim <= 1) out of decay and adaptation by itself.
        return LARS(parameters, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, eta=config.eta)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return (torch.optim.Adam if config.name == "adam" else torch.optim.AdamW)(groups, lr=0.0)
