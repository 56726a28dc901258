"""Features of images under a frozen encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_fast.models.split_batchnorm import disable_sync

Images = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def embed(
    encoder: nn.Module,
    images: Images,
    *,
    normalize: nn.Module,
    device: torch.device,
    autocast: torch.dtype | None = None,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """Features of every image, in the order of the images.

    Args:
        encoder: maps normalised `[B, 3, S, S]` to features; runs in eval mode and is left in the mode it was in.
        images: batches of (uint8 `[B, 3, S, S]`, index), as `byol_fast.data.eval_batches` yields them.
        normalize: turns uint8 into the encoder's input.
        device: where the encoder is.
        autocast: dtype to compute in; None leaves the weights' own.
        check: called before every batch; may raise to stop.

    Returns:
        fp32 `[N, D]` on the encoder's device.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    features = []
    try:
        for batch, _ in images:
            if check is not None:
                check()
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                x = encoder(normalize(batch.to(device, non_blocking=True)))
            features.append(x.flatten(1).float())
    finally:
        for module, mode in modes:
            module.training = mode
    if not features:
        raise ValueError("embed: images must hold at least one batch, got none; check the source")
    return torch.cat(features)


@torch.no_grad()
def calibrated(
    encoder: nn.Module,
    images: Images,
    *,
    normalize: nn.Module,
    device: torch.device,
    autocast: torch.dtype | None = None,
    check: Callable[[], None] | None = None,
) -> nn.Module:
    """A copy of an encoder whose batch norms carry the statistics of these images.

    An untrained network's running statistics are 0 and 1; judged with those it looks worse than it is. Averaging the
    statistics of a pass over the data in train mode makes it an honest baseline.

    Args:
        encoder: the network; itself unchanged.
        images: batches as for `embed`.
        normalize: as for `embed`.
        device: where the encoder is.
        autocast: as for `embed`.
        check: as for `embed`.
    """
    network = copy.deepcopy(encoder).eval()
    disable_sync(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # cumulative average: every batch counts the same
            module.train()
    for batch, _ in images:
        if check is not None:
            check()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if len(batch) > 1:  # one image has no statistics
                network(normalize(batch.to(device, non_blocking=True)))
    return network.eval()
